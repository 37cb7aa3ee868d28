package pki

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"path"
	"time"

	"ringwall/internal/errs"
)

// Bounds of what CertifyClient takes and makes.
const (
	maxCSR        = 16 << 10 // bytes
	minClientLife = time.Minute
	maxClientLife = 366 * 24 * time.Hour
)

// CertifyClient certifies a client by its URI, for as long as life from now. csr
// is a certificate request (RFC 2986), as PEM or DER, and only its key is taken
// from it: whatever else it asks for is ignored, so that nobody names himself.
// The request must be signed with that key. A certificate never outlives its
// authority. The error is errs.Invalid.
func (a *TLSAuthority) CertifyClient(csr []byte, identity string, life time.Duration, now time.Time) (*x509.Certificate, error) {
	bad := func(format string, args ...any) (*x509.Certificate, error) {
		return nil, fmt.Errorf("certify %.200q: "+format+": %w", append(append([]any{identity}, args...), errs.Invalid)...)
	}
	u, err := url.Parse(identity)
	switch {
	case err != nil || u.Scheme == "" || u.Host == "" || u.String() != identity:
		return bad("want a URI like ringwall://services/ci")
	case life < minClientLife || life > maxClientLife:
		return bad("a life of %v (%v to %v)", life, minClientLife, maxClientLife)
	case len(csr) > maxCSR:
		return bad("a request of %d bytes (at most %d)", len(csr), maxCSR)
	}
	der := csr
	if b, rest := pem.Decode(csr); b != nil {
		if b.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
			return bad("the PEM holds something else than one certificate request")
		}
		der = b.Bytes
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return bad("the certificate request: %v", err)
	}
	if err := req.CheckSignature(); err != nil {
		return bad("whoever asks does not hold the key: %v", err)
	}
	if !clientKey(req.PublicKey) {
		return bad("a key of another kind than ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits")
	}
	end := now.Add(life)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	if !end.After(now) {
		return bad("the authority is over since %s", a.cert.NotAfter.Format(time.RFC3339))
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("certify %s: %w", identity, err)
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: commonName(u)}, URIs: []*url.URL{u},
		NotBefore: now.Add(-5 * time.Minute), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	made, err := x509.CreateCertificate(rand.Reader, t, a.cert, req.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("certify %s: %w", identity, err)
	}
	return x509.ParseCertificate(made)
}

// commonName is what tools show; who it is stands in the URI. At most 64
// characters (RFC 5280, ub-common-name).
func commonName(u *url.URL) string {
	s := path.Base(u.Path)
	if s == "" || s == "." || s == "/" {
		s = u.Host
	}
	return s[:min(len(s), 64)]
}

func clientKey(pub any) bool {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return k.Curve == elliptic.P256() || k.Curve == elliptic.P384()
	case ed25519.PublicKey:
		return true
	case *rsa.PublicKey:
		return k.N.BitLen() >= 2048 && k.N.BitLen() <= 4096
	}
	return false
}

// Certificate is the authority's own, for the pool of who verifies its clients.
func (a *TLSAuthority) Certificate() *x509.Certificate { return a.cert }
