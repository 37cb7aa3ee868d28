package pki

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"

	"ringwall/internal/errs"
)

// How long TLS certificates last.
const (
	tlsCALife   = 10 * 365 * 24 * time.Hour
	tlsLeafLife = 365 * 24 * time.Hour
)

// TLSAuthority certifies the servers and clients of Ringwall's own connections,
// where a fleet has no CA for that. It has nothing to do with what may be
// signed: its certificates are for TLS only.
type TLSAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewTLSAuthority makes one; name stands in its certificate.
func NewTLSAuthority(name string, now time.Time) (*TLSAuthority, error) {
	c, key, err := tlsCertificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(tlsCALife),
	}, nil)
	if err != nil {
		return nil, err
	}
	return &TLSAuthority{c, key}, nil
}

// LoadTLSAuthority reads what PEM returned.
func LoadTLSAuthority(cert, key []byte) (*TLSAuthority, error) {
	c, err := DecodeCertificate(cert)
	if err != nil {
		return nil, fmt.Errorf("TLS authority: %w", err)
	}
	k, err := DecodeKey(key, nil)
	if err != nil {
		return nil, fmt.Errorf("TLS authority: %w", err)
	}
	if !c.IsCA || !k.PublicKey.Equal(c.PublicKey) {
		return nil, fmt.Errorf("TLS authority: not a CA, or not its key: %w", errs.Invalid)
	}
	return &TLSAuthority{c, k}, nil
}

// PEM returns the certificate and the key.
func (a *TLSAuthority) PEM() (cert, key []byte, err error) {
	key, err = EncodeKey(a.key, nil)
	return EncodeCertificate(a.cert), key, err
}

// Server certifies a server for names and addresses, as PEM.
func (a *TLSAuthority) Server(hosts []string, now time.Time) (cert, key []byte, err error) {
	if len(hosts) == 0 {
		return nil, nil, fmt.Errorf("TLS certificate of a server without a name: %w", errs.Invalid)
	}
	t := &x509.Certificate{Subject: pkix.Name{CommonName: hosts[0]}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	return a.issue(t, now)
}

// Client certifies a client by its URI, as PEM.
func (a *TLSAuthority) Client(name, identity string, now time.Time) (cert, key []byte, err error) {
	u, err := url.Parse(identity)
	if err != nil || u.Scheme == "" || u.Host == "" || u.String() != identity {
		return nil, nil, fmt.Errorf("client %s: identity %.200q (want a URI like spiffe://fleet.example/ci/edged): %w", name, identity, errs.Invalid)
	}
	return a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{u}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, now)
}

func (a *TLSAuthority) issue(t *x509.Certificate, now time.Time) (cert, key []byte, err error) {
	t.NotBefore, t.NotAfter, t.KeyUsage = now.Add(-5*time.Minute), now.Add(tlsLeafLife), x509.KeyUsageDigitalSignature
	c, k, err := tlsCertificate(t, a)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	return EncodeCertificate(c), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// tlsCertificate makes a key and its certificate, by itself without a parent.
func tlsCertificate(t *x509.Certificate, by *TLSAuthority) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	fail := func(err error) (*x509.Certificate, *ecdsa.PrivateKey, error) {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	key, err := NewKey()
	if err != nil {
		return fail(err)
	}
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return fail(err)
	}
	parent, parentKey := t, key
	if by != nil {
		parent, parentKey = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
	if err != nil {
		return fail(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	return c, key, nil
}
