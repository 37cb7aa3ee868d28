package signer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
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

const (
	tlsCALife   = 5 * 365 * 24 * time.Hour
	tlsLeafLife = 365 * 24 * time.Hour
)

// TLSFiles makes certificates for a server and its clients, for who has no CA
// of their own for that: file names and contents, keys among them. The CA's key
// is not kept, so that it can certify nobody else; a new client means a new set.
func TLSFiles(hosts []string, clients map[string]string, now time.Time) (map[string][]byte, error) {
	out := map[string][]byte{}
	if len(hosts) == 0 || len(clients) == 0 {
		return nil, fmt.Errorf("TLS certificates: no host or no client: %w", errs.Invalid)
	}
	ca, caKey, err := tlsCertificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "Ringwall signer TLS CA"}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(tlsCALife),
	}, nil, nil)
	if err != nil {
		return nil, err
	}
	out["tls-ca.crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	add := func(stem string, t *x509.Certificate) error {
		t.NotBefore, t.NotAfter, t.KeyUsage = now.Add(-5*time.Minute), now.Add(tlsLeafLife), x509.KeyUsageDigitalSignature
		c, key, err := tlsCertificate(t, ca, caKey)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("TLS certificate %s: %w", stem, err)
		}
		out[stem+".crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		out[stem+".key"] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		return nil
	}
	server := &x509.Certificate{Subject: pkix.Name{CommonName: hosts[0]}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			server.IPAddresses = append(server.IPAddresses, ip)
		} else {
			server.DNSNames = append(server.DNSNames, h)
		}
	}
	if err := add("server", server); err != nil {
		return nil, err
	}
	for name, identity := range clients {
		u, err := url.Parse(identity)
		if err != nil || u.Scheme == "" || u.Host == "" || u.String() != identity {
			return nil, fmt.Errorf("client %s: identity %.200q (want a URI like spiffe://fleet.example/ci/edged): %w", name, identity, errs.Invalid)
		}
		err = add("client-"+name, &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, URIs: []*url.URL{u}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// tlsCertificate makes a key and its certificate, by itself without a parent.
func tlsCertificate(t, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	if parent == nil {
		parent, parentKey = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	return c, key, nil
}
