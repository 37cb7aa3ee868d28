package kernelsig

import (
	"crypto"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 5280 key identifiers, not a signature
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"ringwall/internal/errs"
)

// NewCertificate makes a self-signed certificate for a key that signs for
// kernels: what is enrolled as a machine owner key or loaded into a keyring. It
// signs code and nothing else, is no CA, and has the subject key identifier
// that IMA and evmctl go by. The kernel does not look at its validity; lifetime
// is for people.
func NewCertificate(key crypto.Signer, name string, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	c, err := newCertificate(key, name, now, lifetime)
	if err != nil {
		return nil, fmt.Errorf("certificate %q: %w", name, err)
	}
	return c, nil
}

func newCertificate(key crypto.Signer, name string, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	if name == "" || len(name) > 64 || lifetime <= 0 {
		return nil, fmt.Errorf("name of 1 to 64 bytes and a lifetime wanted: %w", errs.Invalid)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("key: %w: %w", err, errs.Invalid)
	}
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if err := unmarshal(der, &spki); err != nil {
		return nil, err
	}
	id := sha1.Sum(spki.Key.Bytes) //nolint:gosec // see the import
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	serial.SetBit(serial, 126, 1) // never zero
	now = now.UTC().Truncate(time.Second)
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, SubjectKeyId: id[:], AuthorityKeyId: id[:],
		NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(lifetime), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	if der, err = x509.CreateCertificate(rand.Reader, t, t, key.Public(), key); err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return c, CheckSigner(c)
}
