package pki_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"testing"
	"time"

	"ringwall/internal/pki"
)

const (
	identity    = "spiffe://fleet.example/build/main"
	payloadType = "application/vnd.in-toto+json"
)

// epoch is when the test authority is made. Far from now on purpose: nothing
// may depend on the machine's clock.
func epoch() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

type world struct {
	*pki.Authority
	clock *clock
}

func newWorld(t testing.TB) *world {
	t.Helper()
	c := &clock{epoch()}
	a, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Example Fleet", Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return &world{a, c}
}

func (w *world) signer(t testing.TB, p pki.Purpose) *pki.Signer {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: p, Identity: identity, Now: w.clock.now()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// leafTemplate is a good build leaf, for tests to spoil.
func leafTemplate() *x509.Certificate {
	u, _ := url.Parse(identity)
	return &x509.Certificate{
		SerialNumber: big.NewInt(77), Subject: pkix.Name{CommonName: "leaf"},
		NotBefore: epoch().Add(-time.Hour), NotAfter: epoch().Add(24 * time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{pki.PurposeBuild.OID()}, URIs: []*url.URL{u},
	}
}

func tsaTemplate(t testing.TB, critical bool, ekus ...asn1.ObjectIdentifier) *x509.Certificate {
	t.Helper()
	c := leafTemplate()
	c.Subject.CommonName, c.URIs, c.ExtKeyUsage, c.UnknownExtKeyUsage = "tsa", nil, nil, nil
	if len(ekus) > 0 {
		v, err := asn1.Marshal(ekus)
		if err != nil {
			t.Fatal(err)
		}
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: critical, Value: v}}
	}
	return c
}

func issue(t testing.TB, i *pki.Issuer, template *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, i.Cert, pub, i.Key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func key384(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func keyRSA(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
