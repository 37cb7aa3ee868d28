package kernelsig

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha512" // registers SHA-384 and SHA-512
	"crypto/x509"
	"encoding/asn1"
	"fmt"

	"ringwall/internal/errs"
)

// Bounds of a CMS.
const (
	maxCMS             = 1 << 20
	maxCMSCertificates = 32
	maxCMSSigners      = 8
	maxAttributes      = 64
	maxAttached        = maxCMS // content inside
)

// SignedData is a parsed CMS SignedData (RFC 5652; PKCS #7 1.5 is read too).
// Parsing says nothing about who signed.
type SignedData struct {
	ContentType  asn1.ObjectIdentifier
	Content      []byte // the octets of the content, without tag and length; nil: detached
	Certificates []*x509.Certificate
	signers      []signer
}

type signer struct {
	issuer, keyID []byte // either
	serial        []byte // DER contents of the INTEGER
	hash          crypto.Hash
	algorithm     asn1.ObjectIdentifier
	attributes    []byte // as a SET, which is what the signature is over; nil: none
	signature     []byte
	unsigned      asn1.RawValue
}

// ParseCMS reads a DER ContentInfo with SignedData in it, at most 1 MiB and
// with nothing after it.
func ParseCMS(der []byte) (*SignedData, error) {
	s, err := parseCMS(der)
	if err != nil {
		return nil, fmt.Errorf("parse CMS: %w", err)
	}
	return s, nil
}

func parseCMS(der []byte) (*SignedData, error) {
	if len(der) > maxCMS {
		return nil, fmt.Errorf("%d bytes (at most %d): %w", len(der), maxCMS, errs.Invalid)
	}
	var outer contentInfo
	if err := unmarshal(der, &outer); err != nil {
		return nil, err
	}
	if !outer.Type.Equal(oidSignedData()) {
		return nil, fmt.Errorf("content type %v is not SignedData: %w", outer.Type, errs.Invalid)
	}
	var w signedData
	if err := unmarshal(outer.Content.Bytes, &w); err != nil {
		return nil, err
	}
	if len(w.Signers) == 0 || len(w.Signers) > maxCMSSigners {
		return nil, fmt.Errorf("%d signers (1 to %d): %w", len(w.Signers), maxCMSSigners, errs.Invalid)
	}
	s := &SignedData{ContentType: w.Content.Type}
	if len(w.Content.Content.Bytes) > 0 {
		var c asn1.RawValue
		if err := unmarshal(w.Content.Content.Bytes, &c); err != nil {
			return nil, err
		}
		if s.ContentType.Equal(oidData()) && (c.Class != asn1.ClassUniversal || c.Tag != asn1.TagOctetString || c.IsCompound) {
			return nil, fmt.Errorf("content is no octet string: %w", errs.Invalid)
		}
		s.Content = append([]byte{}, c.Bytes...)
	}
	var err error
	if s.Certificates, err = parseCertificates(w.Certificates.Bytes); err != nil {
		return nil, err
	}
	for i := range w.Signers {
		g, err := parseSigner(&w.Signers[i])
		if err != nil {
			return nil, fmt.Errorf("signer %d: %w", i+1, err)
		}
		s.signers = append(s.signers, g)
	}
	return s, nil
}

// unmarshal is asn1.Unmarshal that wants nothing after the value.
func unmarshal(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if len(rest) > 0 {
		return fmt.Errorf("%d bytes too many: %w", len(rest), errs.Invalid)
	}
	return nil
}

// parseCertificates reads certificates one after the other.
func parseCertificates(der []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for len(der) > 0 {
		var raw asn1.RawValue
		rest, err := asn1.Unmarshal(der, &raw)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w: %w", err, errs.Invalid)
		}
		if len(out) == maxCMSCertificates {
			return nil, fmt.Errorf("more than %d certificates: %w", maxCMSCertificates, errs.Invalid)
		}
		c, err := x509.ParseCertificate(raw.FullBytes)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w: %w", err, errs.Invalid)
		}
		out, der = append(out, c), rest
	}
	return out, nil
}

func parseSigner(w *signerInfo) (signer, error) {
	g := signer{algorithm: w.Algorithm.Algorithm, signature: w.Signature, unsigned: w.Unsigned}
	switch {
	case w.SID.Class == asn1.ClassContextSpecific && w.SID.Tag == 0 && len(w.SID.Bytes) > 0:
		g.keyID = w.SID.Bytes
	case w.SID.Class == asn1.ClassUniversal && w.SID.Tag == asn1.TagSequence:
		var id struct{ Issuer, Serial asn1.RawValue }
		if err := unmarshal(w.SID.FullBytes, &id); err != nil {
			return g, err
		}
		if id.Serial.Class != asn1.ClassUniversal || id.Serial.Tag != asn1.TagInteger {
			return g, fmt.Errorf("serial number: %w", errs.Invalid)
		}
		g.issuer, g.serial = id.Issuer.FullBytes, id.Serial.Bytes
	default:
		return g, fmt.Errorf("it is named neither by issuer nor by key: %w", errs.Invalid)
	}
	switch w.Digest.Algorithm.String() {
	case "2.16.840.1.101.3.4.2.1":
		g.hash = crypto.SHA256
	case "2.16.840.1.101.3.4.2.2":
		g.hash = crypto.SHA384
	case "2.16.840.1.101.3.4.2.3":
		g.hash = crypto.SHA512
	default:
		return g, fmt.Errorf("digest algorithm %v (want SHA-256, SHA-384 or SHA-512): %w", w.Digest.Algorithm, errs.Unsupported)
	}
	if len(w.Signed.FullBytes) > 0 {
		if !w.Signed.IsCompound {
			return g, fmt.Errorf("signed attributes: %w", errs.Invalid)
		}
		g.attributes = bytes.Clone(w.Signed.FullBytes)
		g.attributes[0] = asn1.TagSet | 0x20
	}
	return g, nil
}

// by says whether c is the certificate that the signer names.
func (g *signer) by(c *x509.Certificate) bool {
	if g.keyID != nil {
		return bytes.Equal(g.keyID, c.SubjectKeyId)
	}
	serial, err := asn1.Marshal(c.SerialNumber)
	if err != nil {
		return false
	}
	var raw asn1.RawValue
	if _, err := asn1.Unmarshal(serial, &raw); err != nil {
		return false
	}
	return bytes.Equal(g.issuer, c.RawIssuer) && bytes.Equal(g.serial, raw.Bytes)
}

// verify checks that c's key signed content, through the attributes if there
// are any.
func (g *signer) verify(c *x509.Certificate, contentType asn1.ObjectIdentifier, content []byte) error {
	digest := sum(g.hash, content)
	if g.attributes != nil {
		if err := g.checkAttributes(contentType, digest); err != nil {
			return err
		}
		digest = sum(g.hash, g.attributes)
	}
	return verifyDigest(c, g.hash, g.algorithm, digest, g.signature)
}

func sum(h crypto.Hash, b []byte) []byte {
	s := h.New()
	_, _ = s.Write(b) // never fails
	return s.Sum(nil)
}

// checkAttributes wants the two attributes that RFC 5652 requires, once each.
func (g *signer) checkAttributes(contentType asn1.ObjectIdentifier, digest []byte) error {
	var set []struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}
	rest, err := asn1.UnmarshalWithParams(g.attributes, &set, "set")
	if err != nil || len(rest) > 0 || len(set) > maxAttributes {
		return fmt.Errorf("signed attributes: %w", errs.Invalid)
	}
	var types, digests int
	for _, a := range set {
		switch a.Type.String() {
		case "1.2.840.113549.1.9.3":
			var t asn1.ObjectIdentifier
			if len(a.Values) != 1 || unmarshal(a.Values[0].FullBytes, &t) != nil || !t.Equal(contentType) {
				return fmt.Errorf("signed content type is another: %w", errs.Untrusted)
			}
			types++
		case "1.2.840.113549.1.9.4":
			var d []byte
			if len(a.Values) != 1 || unmarshal(a.Values[0].FullBytes, &d) != nil || !bytes.Equal(d, digest) {
				return fmt.Errorf("the signature is over other content: %w", errs.Untrusted)
			}
			digests++
		}
	}
	if types != 1 || digests != 1 {
		return fmt.Errorf("signed attributes name the content's type %d times and its digest %d times: %w", types, digests, errs.Invalid)
	}
	return nil
}

// verifyDigest checks a bare signature; algorithm may be that of the key alone
// or the one with the hash.
func verifyDigest(c *x509.Certificate, h crypto.Hash, algorithm asn1.ObjectIdentifier, digest, signature []byte) error {
	var names map[string]crypto.Hash
	ok := false
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		names = map[string]crypto.Hash{
			"1.2.840.113549.1.1.1": h, "1.2.840.113549.1.1.11": crypto.SHA256,
			"1.2.840.113549.1.1.12": crypto.SHA384, "1.2.840.113549.1.1.13": crypto.SHA512,
		}
		ok = rsa.VerifyPKCS1v15(k, h, digest, signature) == nil
	case *ecdsa.PublicKey:
		names = map[string]crypto.Hash{
			"1.2.840.10045.2.1": h, "1.2.840.10045.4.3.2": crypto.SHA256,
			"1.2.840.10045.4.3.3": crypto.SHA384, "1.2.840.10045.4.3.4": crypto.SHA512,
		}
		ok = ecdsa.VerifyASN1(k, digest, signature)
	}
	if names[algorithm.String()] != h {
		return fmt.Errorf("signature algorithm %v with %v does not fit the key of %q: %w", algorithm, h, c.Subject.CommonName, errs.Untrusted)
	}
	if !ok {
		return fmt.Errorf("the signature of %q does not verify: %w", c.Subject.CommonName, errs.Untrusted)
	}
	return nil
}

// VerifyDetached checks a detached CMS over content as the kernel does for
// fs-verity and dm-verity: exactly one signer, plain data, and the signer's
// certificate is one of trusted. Chains are not followed and certificates
// inside the CMS are ignored, which refuses more than the kernel. CheckSigner
// applies. It returns the certificate.
func VerifyDetached(cms, content []byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	s, err := ParseCMS(cms)
	if err != nil {
		return nil, err
	}
	if s.Content != nil {
		return nil, fmt.Errorf("CMS: its content is inside, not detached: %w", errs.Invalid)
	}
	return s.plain(content, trusted)
}

// VerifyAttached is VerifyDetached for a CMS with its content inside, and
// returns that too.
func VerifyAttached(cms []byte, trusted []*x509.Certificate) (content []byte, by *x509.Certificate, err error) {
	s, err := ParseCMS(cms)
	if err != nil {
		return nil, nil, err
	}
	if s.Content == nil {
		return nil, nil, fmt.Errorf("CMS: there is no content inside: %w", errs.Invalid)
	}
	by, err = s.plain(s.Content, trusted)
	if err != nil {
		return nil, nil, err
	}
	return s.Content, by, nil
}

func (s *SignedData) plain(content []byte, trusted []*x509.Certificate) (*x509.Certificate, error) {
	switch {
	case !s.ContentType.Equal(oidData()):
		return nil, fmt.Errorf("CMS: content type %v is not data: %w", s.ContentType, errs.Untrusted)
	case len(s.signers) != 1:
		return nil, fmt.Errorf("CMS: %d signers, want one: %w", len(s.signers), errs.Untrusted)
	}
	g := &s.signers[0]
	err := fmt.Errorf("signed with a key that is not trusted: %w", errs.Untrusted)
	for _, c := range trusted { // names may repeat, keys decide
		if !g.by(c) {
			continue
		}
		if err = CheckSigner(c); err != nil {
			continue
		}
		if err = g.verify(c, s.ContentType, content); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("CMS: %w", err)
}
