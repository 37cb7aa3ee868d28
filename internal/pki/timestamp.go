package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"ringwall/internal/errs"
)

// Bounds of a timestamp response.
const (
	maxTimestamp    = 16 << 10
	maxTSACerts     = 4
	maxTSAttributes = 16
)

func oidSignedData() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2} }

func oidTSTInfo() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}
}

func oidContentType() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
}

func oidMessageDigest() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
}

func oidSigningTime() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
}

func oidSigningCertV2() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47}
}

func oidSHA256() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1} }

func oidECDSASHA256() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
}

// RFC 3161 and RFC 5652 structures, only as wide as Ringwall accepts.
type tsResponse struct {
	Status struct {
		Status  int
		Strings []asn1.RawValue `asn1:"optional"`
	}
	Token asn1.RawValue
}

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content signedData `asn1:"explicit,tag:0"`
}

type signedData struct {
	Version          int
	DigestAlgorithms []pkix.AlgorithmIdentifier `asn1:"set"`
	Content          struct {
		Type asn1.ObjectIdentifier
		Data []byte `asn1:"explicit,tag:0"`
	}
	Certificates asn1.RawValue `asn1:"optional,tag:0"`
	Signers      []signerInfo  `asn1:"set"`
}

type signerInfo struct {
	Version    int
	Issuer     issuerSerial
	Digest     pkix.AlgorithmIdentifier
	Attributes asn1.RawValue `asn1:"tag:0"`
	Algorithm  pkix.AlgorithmIdentifier
	Signature  []byte
}

type issuerSerial struct {
	Issuer asn1.RawValue
	Serial *big.Int
}

type attribute struct {
	Type   asn1.ObjectIdentifier
	Values []asn1.RawValue `asn1:"set"`
}

type tstInfo struct {
	Version   int
	Policy    asn1.ObjectIdentifier
	Imprint   imprint
	Serial    *big.Int
	Time      time.Time        `asn1:"generalized"`
	Accuracy  accuracy         `asn1:"optional"`
	Ordering  bool             `asn1:"optional"`
	Nonce     *big.Int         `asn1:"optional"`
	TSA       asn1.RawValue    `asn1:"optional,tag:0"`
	Extension []pkix.Extension `asn1:"optional,tag:1"`
}

type accuracy struct {
	Seconds int `asn1:"optional"`
	Millis  int `asn1:"optional,tag:0"`
	Micros  int `asn1:"optional,tag:1"`
}

type imprint struct {
	Algorithm pkix.AlgorithmIdentifier
	Hash      []byte
}

type signingCertV2 struct {
	Certs []essCertIDv2
}

type essCertIDv2 struct {
	Algorithm pkix.AlgorithmIdentifier `asn1:"optional"`
	Hash      []byte
	Issuer    asn1.RawValue `asn1:"optional"`
}

// Stamp is what a timestamp authority vouches for.
type Stamp struct {
	Time   time.Time
	TSA    string // the name of the trusted authority
	Signer *x509.Certificate
}

// VerifyTimestamp checks a DER-encoded RFC 3161 response over message and
// returns the time in it. The token must be granted, be signed once by a
// certificate that is (or was issued by) one of tsas and may do nothing else,
// carry SHA-256 of message, and be strict DER throughout.
func VerifyTimestamp(response, message []byte, tsas []Anchor) (*Stamp, error) {
	s, err := verifyTimestamp(response, message, tsas)
	if err != nil {
		return nil, fmt.Errorf("timestamp: %w", err)
	}
	return s, nil
}

func verifyTimestamp(response, message []byte, tsas []Anchor) (*Stamp, error) {
	sd, err := parseResponse(response)
	if err != nil {
		return nil, err
	}
	info, err := parseInfo(sd.Content.Data)
	if err != nil {
		return nil, err
	}
	if err := checkInfo(info, message); err != nil {
		return nil, err
	}
	certs, err := parseCerts(sd.Certificates)
	if err != nil {
		return nil, err
	}
	signer, name, err := findTSA(&sd.Signers[0].Issuer, certs, tsas, info.Time)
	if err != nil {
		return nil, err
	}
	if err := checkSigner(&sd.Signers[0], sd.Content.Data, signer); err != nil {
		return nil, err
	}
	return &Stamp{Time: info.Time.UTC(), TSA: name, Signer: signer}, nil
}

// parseDER decodes exactly one value.
func parseDER(data []byte, v any, what string) error {
	rest, err := asn1.Unmarshal(data, v)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", what, err, errs.Invalid)
	}
	if len(rest) > 0 {
		return fmt.Errorf("%s: %d bytes after the end: %w", what, len(rest), errs.Invalid)
	}
	return nil
}

func parseResponse(der []byte) (*signedData, error) {
	if len(der) > maxTimestamp {
		return nil, fmt.Errorf("%d bytes (at most %d): %w", len(der), maxTimestamp, errs.Invalid)
	}
	var r tsResponse
	if err := parseDER(der, &r, "response"); err != nil {
		return nil, err
	}
	if r.Status.Status != 0 {
		return nil, fmt.Errorf("status %d, not granted: %w", r.Status.Status, errs.Untrusted)
	}
	var ci contentInfo
	if err := parseDER(r.Token.FullBytes, &ci, "token"); err != nil {
		return nil, err
	}
	sd := &ci.Content
	// What encoding/asn1 passed over does not come out again: unsigned
	// attributes, or anything behind the end of what is known.
	if again, err := asn1.Marshal(ci); err != nil || !bytes.Equal(again, r.Token.FullBytes) {
		return nil, fmt.Errorf("token: it holds what is not known: %w", errs.Invalid)
	}
	switch {
	case !ci.Type.Equal(oidSignedData()) || !sd.Content.Type.Equal(oidTSTInfo()) || sd.Version != 3:
		return nil, fmt.Errorf("not a signed TSTInfo: %w", errs.Untrusted)
	case len(sd.Signers) != 1:
		return nil, fmt.Errorf("%d signers (want 1): %w", len(sd.Signers), errs.Untrusted)
	case len(sd.DigestAlgorithms) != 1 || !isSHA256(sd.DigestAlgorithms[0]):
		return nil, fmt.Errorf("digest is not SHA-256: %w", errs.Untrusted)
	}
	return sd, nil
}

// isSHA256 accepts the two ways of writing SHA-256 without parameters.
func isSHA256(a pkix.AlgorithmIdentifier) bool {
	return a.Algorithm.Equal(oidSHA256()) &&
		(len(a.Parameters.FullBytes) == 0 || bytes.Equal(a.Parameters.FullBytes, asn1.NullBytes))
}

// parseInfo reads a TSTInfo to its end, element by element: encoding/asn1
// passes over what a SEQUENCE has behind the last field that it knows, and so
// over a critical extension too.
func parseInfo(der []byte) (*tstInfo, error) {
	var seq asn1.RawValue
	if err := parseDER(der, &seq, "TSTInfo"); err != nil {
		return nil, err
	}
	if seq.Class != asn1.ClassUniversal || seq.Tag != asn1.TagSequence || !seq.IsCompound {
		return nil, fmt.Errorf("TSTInfo: not a sequence: %w", errs.Invalid)
	}
	var i tstInfo
	rest := seq.Bytes
	for _, f := range []struct {
		to       any
		params   string
		optional bool
		class    int
		tag      int
	}{
		{&i.Version, "", false, 0, asn1.TagInteger},
		{&i.Policy, "", false, 0, asn1.TagOID},
		{&i.Imprint, "", false, 0, asn1.TagSequence},
		{&i.Serial, "", false, 0, asn1.TagInteger},
		{&i.Time, "generalized", false, 0, asn1.TagGeneralizedTime},
		{&i.Accuracy, "", true, 0, asn1.TagSequence},
		{&i.Ordering, "", true, 0, asn1.TagBoolean},
		{&i.Nonce, "", true, 0, asn1.TagInteger},
		{&i.TSA, "", true, asn1.ClassContextSpecific, 0},
		{&i.Extension, "tag:1", true, asn1.ClassContextSpecific, 1},
	} {
		var next asn1.RawValue
		after, err := asn1.Unmarshal(rest, &next)
		if f.optional && (len(rest) == 0 || err == nil && (next.Class != f.class || next.Tag != f.tag)) {
			continue
		}
		if err == nil {
			_, err = asn1.UnmarshalWithParams(next.FullBytes, f.to, f.params)
		}
		if err != nil {
			return nil, fmt.Errorf("TSTInfo: %w: %w", err, errs.Invalid)
		}
		rest = after
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("TSTInfo: something follows that is not known: %w", errs.Invalid)
	}
	return &i, nil
}

func checkInfo(i *tstInfo, message []byte) error {
	want := sha256.Sum256(message)
	switch {
	case i.Version != 1:
		return fmt.Errorf("TSTInfo version %d: %w", i.Version, errs.Untrusted)
	case !isSHA256(i.Imprint.Algorithm):
		return fmt.Errorf("imprint is not SHA-256: %w", errs.Untrusted)
	case !bytes.Equal(i.Imprint.Hash, want[:]):
		return fmt.Errorf("token is for other data: %w", errs.Untrusted)
	}
	for _, e := range i.Extension {
		if e.Critical {
			return fmt.Errorf("unknown critical extension %v: %w", e.Id, errs.Untrusted)
		}
	}
	return nil
}

func parseCerts(v asn1.RawValue) ([]*x509.Certificate, error) {
	if len(v.FullBytes) == 0 {
		return nil, nil
	}
	var out []*x509.Certificate
	for rest := v.Bytes; len(rest) > 0; {
		if len(out) == maxTSACerts {
			return nil, fmt.Errorf("more than %d certificates: %w", maxTSACerts, errs.Invalid)
		}
		var raw asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &raw); err != nil {
			return nil, fmt.Errorf("certificates: %w: %w", err, errs.Invalid)
		}
		c, err := x509.ParseCertificate(raw.FullBytes)
		if err != nil {
			return nil, fmt.Errorf("certificates: %w: %w", err, errs.Invalid)
		}
		out = append(out, c)
	}
	return out, nil
}

// findTSA returns the certificate that the token names as its signer, if one
// of the anchors is that certificate or issued it, at the time of the token.
func findTSA(id *issuerSerial, certs []*x509.Certificate, tsas []Anchor, at time.Time) (*x509.Certificate, string, error) {
	isSigner := func(c *x509.Certificate) bool {
		return bytes.Equal(c.RawIssuer, id.Issuer.FullBytes) && c.SerialNumber.Cmp(id.Serial) == 0
	}
	why := fmt.Errorf("signer is no trusted timestamp authority: %w", errs.Untrusted)
	for _, a := range tsas {
		candidates := certs
		if !a.Cert.IsCA {
			candidates = []*x509.Certificate{a.Cert}
		}
		for _, c := range candidates {
			if !isSigner(c) {
				continue
			}
			err := checkTSA(c)
			if err == nil {
				err = inValidity(c, at)
			}
			if err == nil && a.Cert.IsCA {
				err = issuedBy(c, a.Cert, at)
			}
			if err == nil {
				return c, a.Name, nil
			}
			why = err
		}
	}
	return nil, "", why
}

func inValidity(c *x509.Certificate, at time.Time) error {
	if at.Before(c.NotBefore) || at.After(c.NotAfter) {
		return fmt.Errorf("certificate %q is valid from %s to %s, not at %s: %w", c.Subject.CommonName,
			c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), at.UTC().Format(time.RFC3339), errs.Untrusted)
	}
	return nil
}

// issuedBy says whether ca issued c directly and both were valid at the time.
// Extended key usages are the caller's to check: crypto/x509 accepts a leaf
// without any when a particular one is asked for.
func issuedBy(c, ca *x509.Certificate, at time.Time) error {
	if err := checkP256(ca); err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	_, err := c.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("certificate %q was not issued by %q: %w: %w", c.Subject.CommonName, ca.Subject.CommonName, err, errs.Untrusted)
	}
	return nil
}

// checkSigner verifies the one signature: over attributes that bind the
// content, its type and the certificate.
func checkSigner(si *signerInfo, content []byte, cert *x509.Certificate) error {
	if si.Version != 1 || !isSHA256(si.Digest) || !si.Algorithm.Algorithm.Equal(oidECDSASHA256()) {
		return fmt.Errorf("signature is not ECDSA with SHA-256: %w", errs.Untrusted)
	}
	attrs, err := parseAttributes(si.Attributes.Bytes)
	if err != nil {
		return err
	}
	var ct asn1.ObjectIdentifier
	if err := parseDER(attrs[oidContentType().String()], &ct, "content type"); err != nil {
		return err
	}
	var md []byte
	if err := parseDER(attrs[oidMessageDigest().String()], &md, "message digest"); err != nil {
		return err
	}
	var sc signingCertV2
	if err := parseDER(attrs[oidSigningCertV2().String()], &sc, "signing certificate"); err != nil {
		return err
	}
	sum, certSum := sha256.Sum256(content), sha256.Sum256(cert.Raw)
	switch {
	case !ct.Equal(oidTSTInfo()):
		return fmt.Errorf("signed content type is %v: %w", ct, errs.Untrusted)
	case !bytes.Equal(md, sum[:]):
		return fmt.Errorf("signed digest is of other content: %w", errs.Untrusted)
	case len(sc.Certs) == 0 || (len(sc.Certs[0].Algorithm.Algorithm) > 0 && !isSHA256(sc.Certs[0].Algorithm)) ||
		!bytes.Equal(sc.Certs[0].Hash, certSum[:]):
		return fmt.Errorf("signed certificate digest is of another certificate: %w", errs.Untrusted)
	}
	signed := bytes.Clone(si.Attributes.FullBytes)
	signed[0] = 0x31 // RFC 5652, 5.4: signed as SET OF, sent as [0]
	if err := cert.CheckSignature(x509.ECDSAWithSHA256, signed, si.Signature); err != nil {
		return fmt.Errorf("signature: %w: %w", err, errs.Untrusted)
	}
	return nil
}

// parseAttributes returns the value of every attribute by type. Each type may
// appear once, with one value.
func parseAttributes(der []byte) (map[string][]byte, error) {
	out := make(map[string][]byte)
	for len(der) > 0 {
		var a attribute
		var err error
		if der, err = asn1.Unmarshal(der, &a); err != nil {
			return nil, fmt.Errorf("attributes: %w: %w", err, errs.Invalid)
		}
		t := a.Type.String()
		if _, dup := out[t]; dup || len(a.Values) != 1 || len(out) == maxTSAttributes {
			return nil, fmt.Errorf("attribute %s is repeated or has %d values: %w", t, len(a.Values), errs.Invalid)
		}
		out[t] = a.Values[0].FullBytes
	}
	return out, nil
}
