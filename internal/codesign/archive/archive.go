// Package archive verifies a Debian archive's signature. It is a package of
// its own so that the OpenPGP library, the largest parser of hostile bytes in
// the tree, is only in programs that ask for it.
package archive

import (
	"bytes"
	"fmt"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// Bounds of what is parsed.
const (
	maxInRelease = 4 << 20
	maxKeyring   = 1 << 20
)

// VerifyInRelease checks the clear-signature of an InRelease file against a
// keyring (binary or armoured) and returns what it says. Text before or after
// the signed part is refused: other readers may take it for signed. Keys and
// signatures must be valid at the time given. Whether the file is too old is
// for the caller to say: compare ValidUntil with now, and Date with the last
// one seen.
func VerifyInRelease(data, keyring []byte, at time.Time) (*codesign.Suite, error) {
	s, err := verifyInRelease(data, keyring, at)
	if err != nil {
		return nil, fmt.Errorf("verify InRelease: %w", err)
	}
	return s, nil
}

func verifyInRelease(data, keyring []byte, at time.Time) (suite *codesign.Suite, err error) {
	// A parser's panic on hostile input is a refusal, not an outage.
	defer func() {
		if p := recover(); p != nil {
			suite, err = nil, fmt.Errorf("OpenPGP parser: %v: %w", p, errs.Invalid)
		}
	}()
	if len(data) > maxInRelease || len(keyring) > maxKeyring {
		return nil, fmt.Errorf("%d bytes with a keyring of %d: %w", len(data), len(keyring), errs.Invalid)
	}
	keys, err := readKeyring(keyring)
	if err != nil {
		return nil, err
	}
	const begin = "-----BEGIN PGP SIGNED MESSAGE-----\n"
	if !bytes.HasPrefix(data, []byte(begin)) || bytes.Count(data, []byte("\n-----BEGIN PGP")) != 1 {
		return nil, fmt.Errorf("not exactly one signed message, from the first byte on: %w", errs.Untrusted)
	}
	block, rest := clearsign.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("not a signed message: %w", errs.Invalid)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("text after the signature: %w", errs.Untrusted)
	}
	signer, err := block.VerifySignature(keys, &packet.Config{Time: func() time.Time { return at }})
	if err != nil || signer == nil {
		return nil, fmt.Errorf("signature: %w: %w", err, errs.Untrusted)
	}
	suite, err = codesign.ParseSuite(block.Bytes)
	if err != nil {
		return nil, err
	}
	suite.Signer = fmt.Sprintf("%X", signer.PrimaryKey.Fingerprint)
	return suite, nil
}

func readKeyring(b []byte) (openpgp.EntityList, error) {
	read := openpgp.ReadKeyRing
	if bytes.HasPrefix(b, []byte("-----BEGIN")) {
		read = openpgp.ReadArmoredKeyRing
	}
	keys, err := read(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("keyring: %w: %w", err, errs.Invalid)
	}
	return keys, nil
}
