package gate

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"
	"unicode"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Digest is a SHA-256.
type Digest [32]byte

// String returns 64 hex digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ParseDigest reads what String gives.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(d) || hex.EncodeToString(b) != s {
		return d, fmt.Errorf("digest %.80q (want 64 lower-case hex digits): %w", s, errs.Invalid)
	}
	copy(d[:], b)
	return d, nil
}

// IsZero says whether the digest is none.
func (d Digest) IsZero() bool { return d == Digest{} }

const (
	payloadType   = "application/vnd.in-toto+json"
	statementType = "https://in-toto.io/Statement/v1"
	maxStatement  = 1 << 20
	maxName       = 1024
)

// Subject is what a statement is about: an artefact by its SHA-256, or a source
// revision by its git commit; never both, since the two are not the same thing.
// The other fields are annotations of the subject (in-toto's ResourceDescriptor).
type Subject struct {
	Name   string
	SHA256 Digest // zero: about a revision
	Commit string // empty: about an artefact

	Gate     string // the gate that the evidence is for; empty: any of its kind
	Product  string // may be empty
	Revision string // of the source that the artefact was made from; may be empty
}

// Statement is an in-toto Statement v1 with exactly one subject: with several,
// "one of N matches" lets evidence about one thing vouch for another.
type Statement struct {
	Subject
	Type      string // the predicate's URI
	Kind      Kind
	Predicate any // *TestResult, *Review, …; see the kinds
}

// Evidence is a statement whose signature was verified.
type Evidence struct {
	Statement
	Digest      Digest // SHA-256 of the signed statement: how records name it
	Label       string // where it came from, for people; set by the caller
	CA          string // name of the authority in the policy
	Identity    string // the attester's URI
	Key         Digest // SHA-256 of the attester's public key (SubjectPublicKeyInfo)
	Fingerprint Digest // of the attester's certificate, see pki.Fingerprint
	SignedAt    time.Time
}

// Open verifies a bundle of evidence. Who signed is stated, not judged: that is
// Evaluate's. The error wraps errs.Untrusted when the signature is not to be
// believed and errs.Invalid when the statement is not understood.
func Open(bundle []byte, roots pki.TrustRoots) (*Evidence, error) {
	v, err := pki.VerifyBundle(bundle, roots, pki.PurposeAttest)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if v.PayloadType != payloadType {
		return nil, fmt.Errorf("evidence: payload type %.80q: %w", v.PayloadType, errs.Untrusted)
	}
	s, err := ParseStatement(v.Payload)
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	return &Evidence{
		Statement: *s, Digest: sha256.Sum256(v.Payload), CA: v.CA, Identity: v.Identity, SignedAt: v.SignedAt,
		Key: sha256.Sum256(v.Leaf.RawSubjectPublicKeyInfo), Fingerprint: v.Fingerprint,
	}, nil
}

// Sign signs a statement that EncodeStatement made.
func Sign(s *pki.Signer, statement []byte) ([]byte, error) {
	if s.Purpose != pki.PurposeAttest {
		return nil, fmt.Errorf("sign evidence: with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	if _, err := ParseStatement(statement); err != nil { // never sign what no gate would read
		return nil, fmt.Errorf("sign evidence: %w", err)
	}
	b, err := s.Sign(payloadType, statement)
	if err != nil {
		return nil, fmt.Errorf("sign evidence: %w", err)
	}
	return b, nil
}

// EncodeStatement returns the statement of a predicate about a subject.
func EncodeStatement(s Subject, predicateType string, predicate any) ([]byte, error) {
	digest := map[string]string{}
	if !s.SHA256.IsZero() {
		digest["sha256"] = s.SHA256.String()
	}
	if s.Commit != "" {
		digest["gitCommit"] = s.Commit
	}
	notes := map[string]string{}
	for k, v := range map[string]string{"gate": s.Gate, "product": s.Product, "revision": s.Revision} {
		if v != "" {
			notes[k] = v
		}
	}
	type subject struct {
		Name        string            `json:"name,omitempty"`
		Digest      map[string]string `json:"digest"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	b, err := json.Marshal(struct {
		Type          string    `json:"_type"`
		Subject       []subject `json:"subject"`
		PredicateType string    `json:"predicateType"`
		Predicate     any       `json:"predicate"`
	}{statementType, []subject{{s.Name, digest, notes}}, predicateType, predicate})
	if err != nil {
		return nil, fmt.Errorf("encode statement: %w", err)
	}
	if _, err := ParseStatement(b); err != nil {
		return nil, fmt.Errorf("encode statement: %w", err)
	}
	return b, nil
}

// ParseStatement reads a statement. Its own keys are known or it is refused; in
// predicates and resource descriptors unknown keys are ignored, as in-toto's
// parsing rules ask (a field can only add to what is stated, never take back).
func ParseStatement(data []byte) (*Statement, error) {
	o, err := parseObject(data, maxStatement)
	if err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	bad := func(format string, a ...any) (*Statement, error) {
		return nil, fmt.Errorf("statement: %s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	for k := range o {
		switch k {
		case "_type", "subject", "predicateType", "predicate":
		default:
			return bad("unknown key %.60q", k)
		}
	}
	if o.text("_type") != statementType {
		return bad("type %.80q (want %s)", o.text("_type"), statementType)
	}
	subjects, ok := o.objects("subject")
	if !ok || len(subjects) != 1 {
		return bad("%d subjects (want exactly one)", len(subjects))
	}
	s := &Statement{Type: o.text("predicateType")}
	if s.Subject, err = parseSubject(subjects[0]); err != nil {
		return nil, fmt.Errorf("statement: %w", err)
	}
	predicate, ok := o["predicate"].(object)
	if !ok {
		return bad("no predicate")
	}
	if !readable(s.Type, 1, 256) {
		return bad("predicate type is empty, too long or not readable")
	}
	s.Kind, s.Type = kindOf(s.Type)
	if s.Predicate, err = parsePredicate(s.Kind, s.Type, predicate); err != nil {
		return nil, fmt.Errorf("statement: %s: %w", s.Kind, err)
	}
	if p, ok := s.Predicate.(*Provenance); ok {
		switch {
		case s.Revision == "":
			s.Revision = p.revision()
		case len(p.Sources) > 0 && !slices.ContainsFunc(p.Sources, func(d Source) bool { return d.Commit == s.Revision }):
			return bad("revision %.64q is not one that it was built from", s.Revision)
		}
	}
	return s, nil
}

func parseSubject(o object) (Subject, error) {
	notes, digest := o.object("annotations"), o.object("digest")
	s := Subject{
		Name: o.text("name"), Commit: digest.text("gitCommit"),
		Gate: notes.text("gate"), Product: notes.text("product"), Revision: notes.text("revision"),
	}
	for _, v := range []string{s.Name, s.Gate, s.Product, s.Revision} {
		if !readable(v, 0, maxName) {
			return s, fmt.Errorf("subject: %.40q is too long or not readable: %w", v, errs.Invalid)
		}
	}
	hash := digest.text("sha256")
	switch {
	case hash != "" && s.Commit != "":
		return s, fmt.Errorf("subject: an artefact and a revision are not one thing: %w", errs.Invalid)
	case hash != "":
		var err error
		if s.SHA256, err = ParseDigest(hash); err != nil || s.SHA256.IsZero() {
			return s, fmt.Errorf("subject: sha256 %.80q: %w", hash, errs.Invalid)
		}
	case !isCommit(s.Commit):
		return s, fmt.Errorf("subject: neither sha256 nor gitCommit in its digest: %w", errs.Invalid)
	case s.Revision != "" && s.Revision != s.Commit:
		return s, fmt.Errorf("subject: revision %.64q of commit %.64q: %w", s.Revision, s.Commit, errs.Invalid)
	default:
		s.Revision = s.Commit
	}
	return s, nil
}

// isCommit says whether s is a git commit id, SHA-1 or SHA-256.
func isCommit(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && (len(b) == 20 || len(b) == 32) && hex.EncodeToString(b) == s
}

// readable says whether s is printable text of a length in bounds: what is
// signed is shown to people, and nothing in it may hide.
func readable(s string, least, most int) bool {
	if len(s) < least || len(s) > most {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
