package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"fmt"

	"ringwall/internal/errs"
)

// Of the kernel's security/integrity/integrity.h.
const (
	imaDigsig       = 0x03 // EVM_IMA_XATTR_DIGSIG: signature over the file's hash
	imaVerityDigsig = 0x06 // IMA_VERITY_DIGSIG: over its fs-verity digest
	imaSHA256       = 4    // HASH_ALGO_SHA256
	imaHeader       = 9    // type, version, algorithm, key id, length
	maxIMA          = 4096
)

// IMASignature makes the value of the extended attribute security.ima for a
// file's SHA-256, as `evmctl ima_sign` does (format 2). The kernel looks for
// the key by the last four bytes of the certificate's subject key identifier,
// so the certificate must have that extension.
func IMASignature(key crypto.Signer, cert *x509.Certificate, digest [32]byte) ([]byte, error) {
	b, err := signIMA(key, cert, imaDigsig, 2, digest)
	if err != nil {
		return nil, fmt.Errorf("IMA signature: %w", err)
	}
	return b, nil
}

// IMAVeritySignature makes the value of security.ima for a file's fs-verity
// digest (format 3, `evmctl ima_sign --veritysig`), for rules that say
// digest_type=verity (Linux 5.19 and newer).
func IMAVeritySignature(key crypto.Signer, cert *x509.Certificate, digest [32]byte) ([]byte, error) {
	b, err := signIMA(key, cert, imaVerityDigsig, 3, fileID(digest))
	if err != nil {
		return nil, fmt.Errorf("IMA signature: %w", err)
	}
	return b, nil
}

// fileID is the SHA-256 of struct ima_file_id, which format 3 signs.
func fileID(digest [32]byte) [32]byte {
	return sha256.Sum256(append([]byte{imaVerityDigsig, imaSHA256}, digest[:]...))
}

func signIMA(key crypto.Signer, cert *x509.Certificate, kind, version byte, digest [32]byte) ([]byte, error) {
	id, err := keyIDTail(cert)
	if err != nil {
		return nil, err
	}
	sig, err := signDigest(key, cert, digest[:])
	if err != nil {
		return nil, err
	}
	b := append([]byte{kind, version, imaSHA256}, id...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sig))) //nolint:gosec // at most an RSA key's size
	return append(b, sig...), nil
}

// IMAHeader is a parsed value of security.ima.
type IMAHeader struct {
	Verity    bool // over the fs-verity digest, not over the content's hash
	KeyID     [4]byte
	Signature []byte
}

// ParseIMA reads a signature from security.ima: format 2, or 3 for fs-verity,
// with SHA-256. A bare hash, which is no signature, is refused.
func ParseIMA(xattr []byte) (*IMAHeader, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("security.ima: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	if len(xattr) < imaHeader || len(xattr) > maxIMA {
		return nil, bad("%d bytes", len(xattr))
	}
	h := &IMAHeader{Verity: xattr[0] == imaVerityDigsig, KeyID: [4]byte(xattr[3:7]), Signature: xattr[imaHeader:]}
	switch {
	case xattr[0] != imaDigsig && xattr[0] != imaVerityDigsig:
		return nil, bad("type %d is no signature", xattr[0])
	case !h.Verity && xattr[1] != 2, h.Verity && xattr[1] != 3:
		return nil, bad("format %d of type %d", xattr[1], xattr[0])
	case xattr[2] != imaSHA256:
		return nil, bad("hash algorithm %d is not SHA-256", xattr[2])
	case int(binary.BigEndian.Uint16(xattr[7:])) != len(h.Signature) || len(h.Signature) == 0:
		return nil, bad("signature of %d bytes, %d announced", len(h.Signature), binary.BigEndian.Uint16(xattr[7:]))
	}
	return h, nil
}

// VerifyIMA checks a value of security.ima. The digest is the file's SHA-256,
// or its fs-verity digest where the value says so (IMAHeader.Verity).
func VerifyIMA(xattr []byte, digest [32]byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	h, err := ParseIMA(xattr)
	if err != nil {
		return nil, err
	}
	if h.Verity {
		digest = fileID(digest)
	}
	err = fmt.Errorf("signed with a key that is not trusted: %w", errs.Untrusted)
	for _, c := range trusted {
		if id, e := keyIDTail(c); e != nil || !bytes.Equal(id, h.KeyID[:]) {
			continue
		}
		if err = CheckSigner(c); err != nil {
			continue
		}
		if err = verifyDigest(c, crypto.SHA256, keyAlgorithm(c), digest[:], h.Signature); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("security.ima: %w", err)
}

// keyAlgorithm is how verifyDigest is told that only the key says it.
func keyAlgorithm(c *x509.Certificate) asn1.ObjectIdentifier {
	switch c.PublicKey.(type) {
	case *rsa.PublicKey:
		return oidRSA()
	case *ecdsa.PublicKey:
		return oidECDSASHA256()
	}
	return nil
}
