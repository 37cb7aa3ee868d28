package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 5280 key identifiers, not a signature
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"ringwall/internal/errs"
)

// Lifetimes.
const (
	MaxLeafLifetime       = 7 * 24 * time.Hour
	maxBreakglassLifetime = 24 * time.Hour
	rootLifetime          = 20 * 365 * 24 * time.Hour
	caLifetime            = 5 * 365 * 24 * time.Hour
	backdate              = 5 * time.Minute // for clocks that lag behind the issuer's
	maxIdentity           = 240
	maxCertificate        = 8 << 10
)

func oidExtKeyUsage() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 5, 29, 37} }
func oidTimeStamping() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
}

// Issuer is a certificate authority: a certificate and its key.
type Issuer struct {
	Cert *x509.Certificate
	Key  crypto.Signer
}

// NewRoot makes a self-signed root. Its key signs only the issuing CAs and the
// TSA and can be taken offline afterwards.
func NewRoot(name string, key crypto.Signer, now time.Time) (*Issuer, error) {
	t, err := template(name, key.Public(), now, rootLifetime)
	if err != nil {
		return nil, fmt.Errorf("make root %q: %w", name, err)
	}
	t.IsCA, t.MaxPathLen, t.KeyUsage = true, 1, x509.KeyUsageCertSign
	i := &Issuer{Cert: t, Key: key}
	if i.Cert, err = i.sign(t, key.Public()); err != nil {
		return nil, fmt.Errorf("make root %q: %w", name, err)
	}
	return i, nil
}

// IssueCA makes the CA that issues leaves of one purpose, and only those.
func (i *Issuer) IssueCA(p Purpose, name string, key crypto.Signer, now time.Time) (*Issuer, error) {
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("issue CA %q: %w", name, err)
	}
	t, err := template(name, key.Public(), now, caLifetime)
	if err != nil {
		return nil, fmt.Errorf("issue CA %q: %w", name, err)
	}
	t.IsCA, t.MaxPathLenZero, t.KeyUsage = true, true, x509.KeyUsageCertSign
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{p.OID()}
	c, err := i.sign(t, key.Public())
	if err != nil {
		return nil, fmt.Errorf("issue CA %q: %w", name, err)
	}
	return &Issuer{Cert: c, Key: key}, nil
}

// IssueTSA makes the certificate of a timestamp authority: its only extended
// key usage is timeStamping, and critical.
func (i *Issuer) IssueTSA(name string, key crypto.Signer, now time.Time) (*x509.Certificate, error) {
	t, err := template(name, key.Public(), now, caLifetime)
	if err != nil {
		return nil, fmt.Errorf("issue TSA %q: %w", name, err)
	}
	eku, err := asn1.Marshal([]asn1.ObjectIdentifier{oidTimeStamping()})
	if err != nil {
		return nil, fmt.Errorf("issue TSA %q: %w", name, err)
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtraExtensions = []pkix.Extension{{Id: oidExtKeyUsage(), Critical: true, Value: eku}}
	c, err := i.sign(t, key.Public())
	if err != nil {
		return nil, fmt.Errorf("issue TSA %q: %w", name, err)
	}
	return c, nil
}

// LeafRequest says which signing certificate is wanted.
type LeafRequest struct {
	Purpose  Purpose
	Identity string // URI, such as spiffe://fleet.example/build/edged
	Now      time.Time
	Lifetime time.Duration // 0: the most that the purpose allows
}

// IssueLeaf makes a signing certificate for pub.
func (i *Issuer) IssueLeaf(r LeafRequest, pub crypto.PublicKey) (*x509.Certificate, error) {
	if err := r.Purpose.check(); err != nil {
		return nil, fmt.Errorf("issue leaf for %q: %w", r.Identity, err)
	}
	u, err := parseIdentity(r.Identity)
	if err != nil {
		return nil, fmt.Errorf("issue leaf: %w", err)
	}
	life := r.Lifetime
	if life == 0 {
		life = r.Purpose.MaxLifetime()
	}
	if life <= backdate || life > r.Purpose.MaxLifetime() {
		return nil, fmt.Errorf("issue leaf for %q: lifetime %v (want more than %v, at most %v): %w",
			r.Identity, life, backdate, r.Purpose.MaxLifetime(), errs.Invalid)
	}
	t, err := template(r.Purpose.String()+" signer", pub, r.Now, life-backdate)
	if err != nil {
		return nil, fmt.Errorf("issue leaf for %q: %w", r.Identity, err)
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{r.Purpose.OID()}
	t.URIs = []*url.URL{u}
	c, err := i.sign(t, pub)
	if err != nil {
		return nil, fmt.Errorf("issue leaf for %q: %w", r.Identity, err)
	}
	if err := CheckLeaf(c, r.Purpose); err != nil {
		return nil, fmt.Errorf("issue leaf for %q: %w", r.Identity, err)
	}
	return c, nil
}

func template(name string, pub crypto.PublicKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	id, err := keyID(pub)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	serial.SetBit(serial, 126, 1) // never zero, always the same length
	now = now.UTC().Truncate(time.Second)
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, SubjectKeyId: id,
		NotBefore: now.Add(-backdate), NotAfter: now.Add(life),
		BasicConstraintsValid: true, SignatureAlgorithm: x509.ECDSAWithSHA256,
	}, nil
}

// keyID is SHA-1 over the public key's bits, which is what the kernel's IMA
// and evmctl expect; crypto/x509's own choice has not been that since Go 1.25.
func keyID(pub crypto.PublicKey) ([]byte, error) {
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("key is not on P-256: %w", errs.Invalid)
	}
	bits, err := ec.Bytes()
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	h := sha1.Sum(bits) //nolint:gosec // see the import
	return h[:], nil
}

func (i *Issuer) sign(t *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, i.Cert, pub, lowS{i.Key})
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// parseIdentity reads a signer's identity, which must be a plain absolute URI
// in the one spelling that comparing strings needs.
func parseIdentity(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || len(s) > maxIdentity || u.Scheme == "" || u.Host == "" || u.User != nil || u.RawQuery != "" ||
		u.ForceQuery || u.Fragment != "" || u.String() != s {
		return nil, fmt.Errorf("identity %.250q (want a URI like spiffe://fleet.example/build/main): %w", s, errs.Invalid)
	}
	return u, nil
}

// CheckLeaf says whether a certificate has exactly the shape of a signing leaf
// for the purpose. It does not say who issued it.
func CheckLeaf(c *x509.Certificate, p Purpose) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%v certificate: %s: %w", p, fmt.Sprintf(format, a...), errs.Untrusted)
	}
	if err := p.check(); err != nil {
		return err
	}
	switch {
	case c.Version != 3:
		return bad("version %d", c.Version)
	case c.IsCA:
		return bad("it is a CA")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return bad("key usage is not digitalSignature alone")
	case len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0:
		return bad("no extended key usage")
	case !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}):
		return bad("extended key usage is not codeSigning and %v alone", p.OID())
	case len(c.UnknownExtKeyUsage) != 1 || !c.UnknownExtKeyUsage[0].Equal(p.OID()):
		return bad("extended key usage lacks %v or has others", p.OID())
	case len(c.UnhandledCriticalExtensions) > 0:
		return bad("critical extension %v is not known", c.UnhandledCriticalExtensions[0])
	case c.NotAfter.Sub(c.NotBefore) > p.MaxLifetime() || !c.NotAfter.After(c.NotBefore):
		return bad("valid for %v (at most %v)", c.NotAfter.Sub(c.NotBefore), p.MaxLifetime())
	case len(c.URIs) != 1 || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) > 0:
		return bad("want exactly one name, a URI")
	}
	if _, err := parseIdentity(c.URIs[0].String()); err != nil {
		return bad("%v", err)
	}
	return checkP256(c)
}

func checkP256(c *x509.Certificate) error {
	ec, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return fmt.Errorf("certificate %q: key is not on P-256: %w", c.Subject.CommonName, errs.Untrusted)
	}
	if c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		return fmt.Errorf("certificate %q: signed with %v, not ECDSA with SHA-256: %w",
			c.Subject.CommonName, c.SignatureAlgorithm, errs.Untrusted)
	}
	return nil
}

// checkTSA says whether a certificate may sign timestamps: timeStamping is its
// only extended key usage, and the extension is critical (RFC 3161, 2.3).
func checkTSA(c *x509.Certificate) error {
	bad := func(s string) error {
		return fmt.Errorf("TSA certificate %q: %s: %w", c.Subject.CommonName, s, errs.Untrusted)
	}
	switch {
	case c.Version != 3:
		return bad("not version 3")
	case c.IsCA:
		return bad("it is a CA")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return bad("key usage is not digitalSignature alone")
	case !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping}) || len(c.UnknownExtKeyUsage) > 0:
		return bad("extended key usage is not timeStamping alone")
	case len(c.UnhandledCriticalExtensions) > 0:
		return bad("unknown critical extension")
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidExtKeyUsage()) && !e.Critical {
			return bad("extended key usage is not critical")
		}
	}
	return checkP256(c)
}

// checkCA says whether a certificate may issue leaves of the purpose.
func checkCA(c *x509.Certificate, p Purpose) error {
	bad := func(s string) error { return fmt.Errorf("CA %q: %s: %w", c.Subject.CommonName, s, errs.Untrusted) }
	switch {
	case c.Version != 3 || !c.BasicConstraintsValid || !c.IsCA:
		return bad("not a CA")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return bad("may not sign certificates")
	case !slices.ContainsFunc(c.UnknownExtKeyUsage, p.OID().Equal):
		return bad("not a CA for purpose " + p.String())
	case slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny):
		return bad("has anyExtendedKeyUsage")
	}
	return checkP256(c)
}

// Fingerprint identifies a certificate in policies: SHA-256 over its DER, with
// the issuer's signature in the form with the smaller s. For certificates that
// Ringwall issued that is what `openssl x509 -fingerprint -sha256` prints; for
// others it makes sure that flipping the signature, which anyone can do, does
// not escape a revocation.
func Fingerprint(c *x509.Certificate) [32]byte {
	var outer struct {
		TBS       asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.Raw, &outer); err != nil {
		return sha256.Sum256(c.Raw)
	}
	sig, err := normalise(c.Signature)
	if err != nil || bytes.Equal(sig, c.Signature) {
		return sha256.Sum256(c.Raw)
	}
	outer.Signature = asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	der, err := asn1.Marshal(outer)
	if err != nil {
		return sha256.Sum256(c.Raw)
	}
	return sha256.Sum256(der)
}

// EncodeCertificate returns the certificate as PEM.
func EncodeCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// DecodeCertificate reads exactly one PEM certificate.
func DecodeCertificate(data []byte) (*x509.Certificate, error) {
	if len(data) > 4*maxCertificate {
		return nil, fmt.Errorf("decode certificate: %d bytes: %w", len(data), errs.Invalid)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("decode certificate: want exactly one PEM certificate: %w", errs.Invalid)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("decode certificate: %w: %w", err, errs.Invalid)
	}
	return c, nil
}
