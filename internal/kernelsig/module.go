package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"fmt"

	"ringwall/internal/errs"
)

// Of the kernel's include/linux/module_signature.h.
const (
	moduleMagic     = "~Module signature appended~\n"
	moduleTrailer   = 12 // struct module_signature
	modulePKCS7     = 2  // PKEY_ID_PKCS7
	maxModule       = 512 << 20
	moduleTypeAt    = 2
	moduleLengthAt  = 8
	moduleTrailerAt = moduleTrailer + len(moduleMagic)
)

// SignModule appends a signature to an uncompressed kernel module, as the
// kernel's sign-file does. A module that is signed already is errs.Conflict.
func SignModule(key crypto.Signer, cert *x509.Certificate, module []byte) ([]byte, error) {
	if bytes.HasSuffix(module, []byte(moduleMagic)) {
		return nil, fmt.Errorf("sign module: it has a signature already: %w", errs.Conflict)
	}
	if !bytes.HasPrefix(module, []byte("\x7fELF")) {
		return nil, fmt.Errorf("sign module: it is no ELF file (compressed?): %w", errs.Invalid)
	}
	cms, err := SignDetached(key, cert, module)
	if err != nil {
		return nil, fmt.Errorf("sign module: %w", err)
	}
	trailer := make([]byte, moduleTrailer)
	trailer[moduleTypeAt] = modulePKCS7
	binary.BigEndian.PutUint32(trailer[moduleLengthAt:], uint32(len(cms))) //nolint:gosec // some hundred bytes
	return bytes.Join([][]byte{module, cms, trailer, []byte(moduleMagic)}, nil), nil
}

// SplitModule returns an uncompressed module without its signature, and the
// CMS. A module without a signature is errs.NotFound.
func SplitModule(data []byte) (module, cms []byte, err error) {
	switch {
	case !bytes.HasSuffix(data, []byte(moduleMagic)):
		return nil, nil, fmt.Errorf("module: it is not signed: %w", errs.NotFound)
	case len(data) < moduleTrailerAt || len(data) > maxModule:
		return nil, nil, fmt.Errorf("module: %d bytes: %w", len(data), errs.Invalid)
	}
	body := data[:len(data)-moduleTrailerAt]
	t := data[len(body) : len(body)+moduleTrailer]
	n := binary.BigEndian.Uint32(t[moduleLengthAt:])
	switch {
	case t[moduleTypeAt] != modulePKCS7:
		return nil, nil, fmt.Errorf("module: signature of type %d is not PKCS#7: %w", t[moduleTypeAt], errs.Invalid)
	// as mod_check_sig does
	case t[0]|t[1]|t[3]|t[4]|t[5]|t[6]|t[7] != 0:
		return nil, nil, fmt.Errorf("module: signature's trailer has values that must be zero: %w", errs.Invalid)
	case n == 0 || n > maxCMS || uint64(n) >= uint64(len(body)):
		return nil, nil, fmt.Errorf("module: signature of %d bytes in %d: %w", n, len(body), errs.Invalid)
	}
	at := len(body) - int(n)
	return body[:at:at], body[at:], nil
}

// VerifyModule checks the signature of an uncompressed module the way the
// kernel does with module.sig_enforce=1: plain data, no attributes, by one of
// the certificates, such as those that KernelCertificates finds. It returns the
// certificate. An unsigned module is errs.Untrusted.
func VerifyModule(data []byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	module, cms, err := SplitModule(data)
	if err != nil {
		if !bytes.HasSuffix(data, []byte(moduleMagic)) {
			return nil, fmt.Errorf("module: it is not signed: %w", errs.Untrusted)
		}
		return nil, err
	}
	s, err := ParseCMS(cms)
	if err != nil {
		return nil, fmt.Errorf("module: %w", err)
	}
	if s.Content != nil {
		return nil, fmt.Errorf("module: signature with content inside: %w", errs.Invalid)
	}
	for i := range s.signers {
		if s.signers[i].attributes != nil {
			return nil, fmt.Errorf("module: signature with attributes, which the kernel refuses: %w", errs.Untrusted)
		}
	}
	c, err := s.plain(module, trusted)
	if err != nil {
		return nil, fmt.Errorf("module: %w", err)
	}
	return c, nil
}
