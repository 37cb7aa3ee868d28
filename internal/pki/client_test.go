package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func newCSR(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"server.example"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestCertifyClient(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	a, err := pki.NewTLSAuthority("Example client CA", now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr := newCSR(t, key)
	c, err := a.CertifyClient(csr, "ringwall://services/ci", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != "ringwall://services/ci" || c.Subject.CommonName != "ci" || len(c.DNSNames) != 0 || c.IsCA || !c.NotAfter.Equal(now.Add(time.Hour).UTC()) {
		t.Errorf("%v %v %v, until %v", c.URIs, c.Subject, c.DNSNames, c.NotAfter)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.Certificate())
	if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("the certificate of a client serves as a server's")
	}
	if c, err := a.CertifyClient(csr, "ringwall://hosts/h1", 300*24*time.Hour, now.AddDate(9, 10, 0)); err != nil || c.NotAfter.After(a.Certificate().NotAfter) {
		t.Errorf("it outlives its authority: %v", err)
	}

	small, err := rsa.GenerateKey(rand.Reader, 1024) // to be refused
	if err != nil {
		t.Fatal(err)
	}
	odd, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := []byte(string(csr))
	block, _ := pem.Decode(forged)
	block.Bytes[len(block.Bytes)-1] ^= 1
	for name, tc := range map[string]struct {
		csr      []byte
		identity string
		life     time.Duration
		at       time.Time
	}{
		"no URI":              {csr, "ci", time.Hour, now},
		"no life":             {csr, "ringwall://services/ci", 0, now},
		"a life too long":     {csr, "ringwall://services/ci", 400 * 24 * time.Hour, now},
		"no request":          {[]byte("x"), "ringwall://services/ci", time.Hour, now},
		"too big":             {make([]byte, 20<<10), "ringwall://services/ci", time.Hour, now},
		"a certificate":       {pki.EncodeCertificate(c), "ringwall://services/ci", time.Hour, now},
		"two":                 {append(newCSR(t, key), csr...), "ringwall://services/ci", time.Hour, now},
		"without the key":     {block.Bytes, "ringwall://services/ci", time.Hour, now},
		"a short RSA key":     {newCSR(t, small), "ringwall://services/ci", time.Hour, now},
		"another curve":       {newCSR(t, odd), "ringwall://services/ci", time.Hour, now},
		"the authority ended": {csr, "ringwall://services/ci", time.Hour, now.AddDate(11, 0, 0)},
	} {
		if _, err := a.CertifyClient(tc.csr, tc.identity, tc.life, tc.at); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzCertifyClient(f *testing.F) {
	key, err := pki.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	now := time.Now()
	a, err := pki.NewTLSAuthority("Example client CA", now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(newCSR(f, key), "ringwall://services/ci")
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"), "ringwall://hosts/x")
	f.Fuzz(func(t *testing.T, csr []byte, identity string) {
		c, err := a.CertifyClient(csr, identity, time.Hour, now)
		if err == nil && (len(c.URIs) != 1 || c.URIs[0].String() != identity || c.IsCA || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0) {
			t.Errorf("%q got %v %v", identity, c.URIs, c.DNSNames)
		}
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Error(err)
		}
	})
}
