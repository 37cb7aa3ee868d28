// Package keystore opens private keys wherever they are kept: in an encrypted
// file, or in a token (HSM, smart card) behind PKCS#11.
//
// A key is named by a URI:
//
//	file:PATH
//	pkcs11:token=fleet;object=build-ca?module-path=/usr/lib/softhsm/libsofthsm2.so
//
// PKCS#11 needs C code, which the default binary does not have: it is linked
// with the build tag pkcs11 only, and so stays out of what hosts run.
package keystore

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

const (
	schemeFile   = "file:"
	schemePKCS11 = "pkcs11:"
	maxURI       = 1 << 10
	maxSecret    = 1 << 10
)

// Open opens the key that a URI names. The passphrase decrypts a key file, or
// is the token's PIN; without it the URI's pin-source is read, if that is a
// file. A key that is not on P-256 is refused (errs.Invalid).
//
// In a binary without PKCS#11 a pkcs11 URI is errs.Unsupported.
func Open(uri string, passphrase []byte) (crypto.Signer, error) {
	switch {
	case strings.HasPrefix(uri, schemeFile):
		path, err := filePath(uri)
		if err != nil {
			return nil, fmt.Errorf("open key: %w", err)
		}
		k, err := pki.ReadKey(path, passphrase)
		if err != nil {
			return nil, fmt.Errorf("open key: %w", err)
		}
		return k, nil
	case strings.HasPrefix(uri, schemePKCS11):
		u, pin, err := tokenAndPIN(uri, passphrase)
		if err != nil {
			return nil, fmt.Errorf("open key: %w", err)
		}
		k, err := openToken(u, pin)
		if err != nil {
			return nil, fmt.Errorf("open key %s: %w", u, err)
		}
		return k, nil
	}
	return nil, fmt.Errorf("open key: %.40q is no file: or pkcs11: URI: %w", uri, errs.Invalid)
}

// Generate makes a key on P-256 in the token that a pkcs11 URI names, under the
// URI's object name, which must be free (errs.Conflict). The key cannot leave
// the token.
func Generate(uri string, pin []byte) (crypto.Signer, error) {
	u, pin, err := tokenAndPIN(uri, pin)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	if u.Object == "" {
		return nil, fmt.Errorf("make key %s: the URI lacks object=NAME: %w", u, errs.Invalid)
	}
	k, err := generateInToken(u, pin)
	if err != nil {
		return nil, fmt.Errorf("make key %s: %w", u, err)
	}
	return k, nil
}

func tokenAndPIN(uri string, pin []byte) (*URI, []byte, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, nil, err
	}
	if u.ModulePath == "" {
		return nil, nil, fmt.Errorf("%s lacks module-path=FILE, the token's PKCS#11 library: %w", u, errs.Invalid)
	}
	if len(pin) > 0 {
		return u, pin, nil
	}
	if !strings.HasPrefix(u.PINSource, schemeFile) {
		return nil, nil, fmt.Errorf("%s: no PIN was given, and pin-source names no file: %w", u, errs.Denied)
	}
	path, err := filePath(u.PINSource)
	if err != nil {
		return nil, nil, err
	}
	if pin, err = ReadSecret(path); err != nil {
		return nil, nil, err
	}
	return u, pin, nil
}

// filePath returns the path of a file: URI; file:PATH and file:///PATH are both
// in use.
func filePath(uri string) (string, error) {
	rest := strings.TrimPrefix(uri, schemeFile)
	if strings.HasPrefix(rest, "//") {
		if rest = rest[2:]; !strings.HasPrefix(rest, "/") {
			return "", fmt.Errorf("%.80q is on another machine: %w", uri, errs.Invalid)
		}
	}
	path, err := url.PathUnescape(rest)
	if err != nil || path == "" || len(uri) > maxURI {
		return "", fmt.Errorf("%.80q names no file: %w", uri, errs.Invalid)
	}
	return path, nil
}

// ReadSecret reads a passphrase or PIN: the first line of a file that only its
// owner may read.
func ReadSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("secret: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("secret: %w", err)
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("secret: mode %04o of %s lets others read it: %w", st.Mode().Perm(), filepath.Base(path), errs.Denied)
	}
	return FirstLine(f)
}

// FirstLine reads a secret from r.
func FirstLine(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("secret: %w", err)
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 || len(b) > maxSecret {
		return nil, fmt.Errorf("secret: it is empty or longer than %d bytes: %w", maxSecret, errs.Invalid)
	}
	return line, nil
}
