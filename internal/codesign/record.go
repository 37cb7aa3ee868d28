package codesign

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// What a release record is, in the words of in-toto. The predicate's URI is a
// URN so that it is nobody's domain; in-toto, sigstore-go and cosign take it.
const (
	releasePayloadType   = "application/vnd.in-toto+json"
	statementType        = "https://in-toto.io/Statement/v1"
	ReleasePredicateType = "urn:ringwall:release:v1"
	subjectName          = "catalogue"
	maxArtefacts         = 64
	maxGates             = 64
	gatePassed           = "passed"
)

// ReleaseInfo is what the signer states about a build.
type ReleaseInfo struct {
	Product   string // lower-case name that policies use
	Version   string
	Epoch     uint32     // security version: only grows; policies can require a minimum
	Revision  string     // of the source; may be empty
	Artefacts []Artefact // what the catalogue was made from
	Gates     []Gate     // checks that passed before signing
	NotAfter  time.Time  // use by; zero: no limit
	// Policy is the release policy that the gates are of; zero: there was none,
	// and nothing but the signer's word stands behind the release.
	Policy integrity.Digest
	Ring   string // the furthest ring that it may go to; empty: not limited
	// Breakglass: why it was signed past its gates; empty: it was not. Its gates
	// are then the approvals, NotAfter and Ring must be given, and only a
	// break-glass certificate can sign it.
	Breakglass string
}

// Artefact is a file that was built.
type Artefact struct {
	Name   string
	Digest integrity.Digest
}

// Gate is a check that passed, with the digest of its signed evidence.
type Gate struct {
	Name     string
	Attester string
	Evidence integrity.Digest
	At       time.Time
}

// Release is a verified release record.
type Release struct {
	ReleaseInfo
	Record    integrity.Digest // SHA-256 of the signed statement; names the release in deny rules
	CA        string           // name of the trusted CA
	Identity  string           // the signer's URI
	SignedAt  time.Time
	Catalogue integrity.Digest // SHA-256 of the catalogue
	Names     integrity.Digest // SHA-256 of the name table
	Logged    *pki.Logged      // where it stands in a transparency log; nil unless the roots name one

	// Of the signing certificate, of its CA and of who signed the timestamp, see pki.Fingerprint.
	CertFingerprint, CAFingerprint, TSAFingerprint integrity.Digest
}

type wireDigest struct {
	SHA256 string `json:"sha256"`
}

type wireResource struct {
	Name   string     `json:"name"`
	Digest wireDigest `json:"digest"`
}

type wireStatement struct {
	Type          string         `json:"_type"`
	Subject       []wireResource `json:"subject"`
	PredicateType string         `json:"predicateType"`
	Predicate     wirePredicate  `json:"predicate"`
}

type wirePredicate struct {
	Product   string         `json:"product"`
	Version   string         `json:"version"`
	Epoch     uint32         `json:"epoch"`
	Source    wireSource     `json:"source"`
	Artefacts []wireResource `json:"artefacts"`
	Catalogue wireCatalogue  `json:"catalogue"`
	Gates     []wireGate     `json:"gates"`
	NotAfter  string         `json:"not_after,omitempty"`
	// By which rules it was signed, and how far it may go.
	Policy     *wireDigest     `json:"policy,omitempty"`
	Ring       string          `json:"ring,omitempty"`
	Breakglass *wireBreakglass `json:"breakglass,omitempty"`
}

type wireSource struct {
	Revision string `json:"revision"`
}

type wireCatalogue struct {
	Count      int        `json:"count"`
	Size       int        `json:"size"`
	Classifier int        `json:"classifier"`
	Names      wireDigest `json:"names"`
}

type wireGate struct {
	Name     string     `json:"name"`
	Result   string     `json:"result"`
	Attester string     `json:"attester"`
	Evidence wireDigest `json:"evidence"`
	At       string     `json:"at"`
}

// SignRelease returns the release record of a catalogue: a Sigstore bundle
// over an in-toto statement with the catalogue as its only subject.
func SignRelease(s *pki.Signer, info ReleaseInfo, catalogue, names []byte) ([]byte, error) {
	b, err := signRelease(s, info, catalogue, names)
	if err != nil {
		return nil, fmt.Errorf("sign release %s %s: %w", info.Product, info.Version, err)
	}
	return b, nil
}

func signRelease(s *pki.Signer, info ReleaseInfo, catalogue, names []byte) ([]byte, error) {
	if s.Purpose != purposeOf(info.Breakglass) {
		return nil, fmt.Errorf("with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	c, err := ParseCatalogue(catalogue)
	if err != nil {
		return nil, err
	}
	hex := func(d integrity.Digest) wireDigest { return wireDigest{SHA256: d.String()} }
	p := wirePredicate{
		Product: info.Product, Version: info.Version, Epoch: info.Epoch, Source: wireSource{Revision: info.Revision},
		Artefacts: []wireResource{}, Gates: []wireGate{},
		Catalogue: wireCatalogue{Count: c.Len(), Size: len(catalogue), Classifier: c.Classifier(), Names: hex(sha256.Sum256(names))},
	}
	p.gating(&info)
	for _, a := range info.Artefacts {
		p.Artefacts = append(p.Artefacts, wireResource{Name: a.Name, Digest: hex(a.Digest)})
	}
	for _, g := range info.Gates {
		p.Gates = append(p.Gates, wireGate{
			Name: g.Name, Result: gatePassed, Attester: g.Attester, Evidence: hex(g.Evidence), At: formatTime(g.At),
		})
	}
	if !info.NotAfter.IsZero() {
		p.NotAfter = formatTime(info.NotAfter)
	}
	payload, err := json.Marshal(wireStatement{
		Type: statementType, PredicateType: ReleasePredicateType, Predicate: p,
		Subject: []wireResource{{Name: subjectName, Digest: hex(c.Digest())}},
	})
	if err != nil {
		return nil, err
	}
	if _, err := readStatement(payload, c); err != nil { // never sign what hosts would refuse
		return nil, err
	}
	return s.Sign(releasePayloadType, payload)
}

// VerifyRelease checks a release record and the catalogue that it is about,
// and returns both. A record that is well signed but says anything that this
// version does not understand is refused, and so is a break-glass release.
func VerifyRelease(bundle, catalogue []byte, roots pki.TrustRoots) (*Release, *Catalogue, error) {
	return verifyRelease(bundle, catalogue, roots, pki.PurposeBuild)
}

// VerifyBreakglass is VerifyRelease for releases that were signed past their
// gates, and for those only. It does not look at the clock: whether NotAfter
// has passed is the caller's to ask.
func VerifyBreakglass(bundle, catalogue []byte, roots pki.TrustRoots) (*Release, *Catalogue, error) {
	return verifyRelease(bundle, catalogue, roots, pki.PurposeBreakglass)
}

func verifyRelease(bundle, catalogue []byte, roots pki.TrustRoots, purpose pki.Purpose) (*Release, *Catalogue, error) {
	v, err := pki.VerifyBundle(bundle, roots, purpose)
	if err != nil {
		return nil, nil, fmt.Errorf("release record: %w", err)
	}
	if v.PayloadType != releasePayloadType {
		return nil, nil, fmt.Errorf("release record: payload type %q: %w", v.PayloadType, errs.Untrusted)
	}
	c, err := ParseCatalogue(catalogue)
	if err != nil {
		return nil, nil, fmt.Errorf("release record: %w", err)
	}
	r, err := readStatement(v.Payload, c)
	if err != nil {
		return nil, nil, fmt.Errorf("release record: %w", err)
	}
	if purposeOf(r.Breakglass) != purpose {
		return nil, nil, fmt.Errorf("release record: a %v certificate for a release that wants a %v one: %w", purpose, purposeOf(r.Breakglass), errs.Untrusted)
	}
	r.CA, r.Identity, r.SignedAt, r.Logged = v.CA, v.Identity, v.SignedAt, v.Logged
	r.CertFingerprint, r.CAFingerprint, r.TSAFingerprint = v.Fingerprint, v.CAFingerprint, v.TSAFingerprint
	return r, c, nil
}

// readStatement decodes a statement and holds it against the catalogue.
func readStatement(payload []byte, c *Catalogue) (*Release, error) {
	var s wireStatement
	if err := pki.UnmarshalStrict(payload, &s, 64<<10); err != nil {
		return nil, err
	}
	bad := func(format string, a ...any) error {
		return fmt.Errorf("statement: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	p := &s.Predicate
	switch {
	case s.Type != statementType:
		return nil, bad("type %.80q", s.Type)
	case s.PredicateType != ReleasePredicateType:
		return nil, bad("predicate type %.80q", s.PredicateType)
	case len(s.Subject) != 1 || s.Subject[0].Name != subjectName:
		return nil, bad("want exactly one subject, %q", subjectName)
	case !productName(p.Product):
		return nil, bad("product %.80q (want letters a-z, digits, + - . up to 64)", p.Product)
	case !printable(p.Version, 1, 128) || !printable(p.Source.Revision, 0, 128):
		return nil, bad("version or revision is empty, too long or not printable")
	case len(p.Artefacts) > maxArtefacts || len(p.Gates) > maxGates:
		return nil, bad("more than %d artefacts or %d gates", maxArtefacts, maxGates)
	case p.Catalogue.Count != c.Len() || p.Catalogue.Size != len(c.raw) || p.Catalogue.Classifier != c.Classifier():
		return nil, bad("catalogue has %d records, %d bytes, classifier %d; the record says otherwise", c.Len(), len(c.raw), c.Classifier())
	}
	r := &Release{
		Record:      sha256.Sum256(payload),
		ReleaseInfo: ReleaseInfo{Product: p.Product, Version: p.Version, Epoch: p.Epoch, Revision: p.Source.Revision},
	}
	var err error
	if r.Catalogue, err = parseDigest(s.Subject[0].Digest); err != nil {
		return nil, err
	}
	if got := c.Digest(); got != r.Catalogue {
		return nil, fmt.Errorf("catalogue is %v, the record is about %v: %w", got, r.Catalogue, errs.Untrusted)
	}
	if r.Names, err = parseDigest(p.Catalogue.Names); err != nil {
		return nil, err
	}
	if p.NotAfter != "" {
		if r.NotAfter, err = parseTime(p.NotAfter); err != nil {
			return nil, err
		}
	}
	if err := readLists(p, r); err != nil {
		return nil, err
	}
	return r, p.readGating(r)
}

func readLists(p *wirePredicate, r *Release) error {
	for _, a := range p.Artefacts {
		d, err := parseDigest(a.Digest)
		if err != nil || !printable(a.Name, 1, 255) {
			return fmt.Errorf("statement: artefact %.80q: %w", a.Name, errs.Invalid)
		}
		r.Artefacts = append(r.Artefacts, Artefact{Name: a.Name, Digest: d})
	}
	for _, g := range p.Gates {
		d, err := parseDigest(g.Evidence)
		at, err2 := parseTime(g.At)
		if err != nil || err2 != nil || g.Result != gatePassed || !printable(g.Name, 1, 64) || !printable(g.Attester, 1, 255) {
			return fmt.Errorf("statement: gate %.80q: %w", g.Name, errs.Invalid)
		}
		r.Gates = append(r.Gates, Gate{Name: g.Name, Attester: g.Attester, Evidence: d, At: at})
	}
	return nil
}

// parseDigest accepts the one spelling that String gives.
func parseDigest(w wireDigest) (integrity.Digest, error) {
	d, err := integrity.ParseDigest(w.SHA256)
	if err != nil || d.String() != w.SHA256 {
		return d, fmt.Errorf("statement: digest %.80q: %w", w.SHA256, errs.Invalid)
	}
	return d, nil
}

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// parseTime accepts the one spelling that formatTime gives.
func parseTime(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil || formatTime(t) != s {
		return time.Time{}, fmt.Errorf("time %.40q (want UTC, such as 2031-05-01T12:00:00Z): %w", s, errs.Invalid)
	}
	return t, nil
}

func productName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || i > 0 && (c == '+' || c == '-' || c == '.')) {
			return false
		}
	}
	return true
}

// printable says whether s is printable ASCII of a length in bounds. What is
// signed is shown to people; nothing in it may hide.
func printable(s string, least, most int) bool {
	if len(s) < least || len(s) > most {
		return false
	}
	for _, c := range []byte(s) {
		if c < 0x20 || c > 0x7e {
			return false
		}
	}
	return true
}
