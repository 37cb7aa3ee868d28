package gate

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// Kind is a sort of check, and so of evidence.
type Kind string

// The kinds.
const (
	KindTest         Kind = "test"         // test results
	KindReview       Kind = "review"       // people who looked at the change
	KindScan         Kind = "scan"         // static analysis
	KindVulns        Kind = "vulns"        // known vulnerabilities
	KindVEX          Kind = "vex"          // which of them do not matter, and why
	KindProvenance   Kind = "provenance"   // where and from what it was built
	KindVerification Kind = "verification" // somebody else's verdict, such as CSV's
	KindSurface      Kind = "surface"      // what the attack surface gained
	KindApproval     Kind = "approval"     // of a break-glass release
	KindCustom       Kind = "custom"       // anything else, by its URI
)

// GateKinds are the kinds that a gate can have.
func GateKinds() []Kind {
	return []Kind{KindTest, KindReview, KindScan, KindVulns, KindProvenance, KindVerification, KindSurface, KindCustom}
}

// Types of predicates. Those of in-toto, SLSA and OpenVEX are as their
// specifications have them; ours are URNs, because we own no domain.
const (
	TypeTest        = "https://in-toto.io/attestation/test-result/v0.1"
	TypeReview      = "https://in-toto.io/attestation/human-review/vcs/v0.1"
	TypeHumanReview = "https://in-toto.io/attestation/human-review/v0.1"
	TypeScan        = "urn:ringwall:scan:v1"
	TypeVulns       = "https://in-toto.io/attestation/vulns/v0.2"
	TypeVEX         = "https://openvex.dev/ns/v0.2.0"
	TypeProvenance  = "https://slsa.dev/provenance/v1"
	TypeSVR         = "https://in-toto.io/attestation/svr/v0.1"
	TypeSurface     = "urn:ringwall:attack-surface:v1"
	TypeApproval    = "urn:ringwall:breakglass-approval:v1"

	typeVulns01    = "https://in-toto.io/attestation/vulns/v0.1"
	typeReviewHTTP = "http://in-toto.io/attestation/human-review/vcs/v0.1" // the specification has both spellings
	typeVEXShort   = "https://openvex.dev/ns"
)

// kindOf returns the kind of a predicate and the one spelling of its type.
func kindOf(uri string) (Kind, string) {
	switch uri {
	case TypeTest:
		return KindTest, uri
	case TypeReview, typeReviewHTTP:
		return KindReview, TypeReview
	case TypeHumanReview:
		return KindReview, uri
	case TypeScan:
		return KindScan, uri
	case TypeVulns, typeVulns01:
		return KindVulns, TypeVulns
	case TypeVEX, typeVEXShort:
		return KindVEX, TypeVEX
	case TypeProvenance:
		return KindProvenance, uri
	case TypeSVR:
		return KindVerification, uri
	case TypeSurface:
		return KindSurface, uri
	case TypeApproval:
		return KindApproval, uri
	}
	return KindCustom, uri
}

// TestResult is in-toto's test-result v0.1.
type TestResult struct {
	Result                 string // PASSED, WARNED or FAILED
	Passed, Warned, Failed []string
}

// Review is in-toto's human-review, of a version control system or plain.
// Authors are in its annotations, because the specification has no field for
// them; a review that does not name them cannot show that nobody reviewed
// their own work.
type Review struct {
	Result    string // pass or fail
	Authors   []Person
	Reviewers []Person // empty in the plain form: the attester is the reviewer
}

// Person is an author or reviewer; of the two at least one is not empty.
type Person struct {
	Name string
	URI  string
}

// String returns the person for a line of text.
func (p Person) String() string {
	switch {
	case p.URI == "":
		return p.Name
	case p.Name == "":
		return p.URI
	}
	return p.Name + " <" + p.URI + ">"
}

// same says whether two are the same person: it errs on the side of yes,
// because two that are one must not review each other.
func (p Person) same(q Person) bool {
	return p.URI != "" && strings.EqualFold(p.URI, q.URI) || p.Name != "" && strings.EqualFold(p.Name, q.Name)
}

// Scan is the outcome of static analysis, as counted from SARIF.
type Scan struct {
	Tool   string
	Counts map[string]int // by SARIF level: error, warning, note
}

// Vulns is in-toto's vulns v0.1 or v0.2.
type Vulns struct {
	Scanner  string
	Database time.Time // when its vulnerability database was last updated
	Finished time.Time
	Found    []Vulnerability
}

// Vulnerability is one that a scanner found.
type Vulnerability struct {
	ID       string
	Severity string // critical, high, medium, low, none or unknown
}

// VEX is an OpenVEX document, v0.2.0.
type VEX struct {
	Statements []VEXStatement
}

// VEXStatement says how vulnerabilities matter to products.
type VEXStatement struct {
	Vulnerabilities []string // id and aliases
	Status          string   // not_affected, affected, fixed or under_investigation
	Why             string   // justification or impact statement
	Hashes          []Digest // of the products; empty: the statement's subject
}

// Provenance is SLSA's, v1.
type Provenance struct {
	Builder   string
	BuildType string
	Sources   []Source
}

// Source is what a build depended on, with a git commit.
type Source struct {
	URI    string
	Commit string
}

// revision is the commit if all sources agree on it.
func (p *Provenance) revision() string {
	found := ""
	for _, s := range p.Sources {
		if found != "" && s.Commit != found {
			return "" // the policy must say which source is meant
		}
		found = s.Commit
	}
	return found
}

// Verification is in-toto's svr v0.1.
type Verification struct {
	Verifier   string
	At         time.Time
	Properties []string
	Outcome    string // ours (CSV): "block" is against the release; others leave it out
}

// Surface is what a build adds to the attack surface.
type Surface struct {
	New      []string // what the build before it did not have, such as "listens tcp/8443"
	Approved []Approved
}

// Approved is a new thing that somebody accepted.
type Approved struct {
	Item string
	By   Person
}

// Approval is one person's word for a release past the gates.
type Approval struct {
	Product  string
	Ring     string
	Reason   string
	NotAfter time.Time
}

// Custom is a predicate that is only known by its URI.
type Custom struct{ fields object }

// Field returns the text of a scalar by its dotted path.
func (c *Custom) Field(path string) (string, bool) {
	var v any = c.fields
	for key := range strings.SplitSeq(path, ".") {
		o, ok := v.(object)
		if !ok {
			return "", false
		}
		v = o[key]
	}
	switch v := v.(type) {
	case string:
		return v, true
	case json.Number:
		return v.String(), true
	case bool:
		return strconv.FormatBool(v), true
	}
	return "", false
}

func parsePredicate(k Kind, uri string, o object) (any, error) {
	switch k {
	case KindTest:
		return parseTest(o)
	case KindReview:
		return parseReview(o, uri == TypeHumanReview)
	case KindScan:
		return parseScan(o)
	case KindVulns:
		return parseVulns(o)
	case KindVEX:
		return parseVEX(o)
	case KindProvenance:
		return parseProvenance(o)
	case KindVerification:
		return parseVerification(o)
	case KindSurface:
		return parseSurface(o)
	case KindApproval:
		return parseApproval(o)
	}
	return &Custom{o}, nil
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errs.Invalid)
}

func parseTest(o object) (*TestResult, error) {
	t := &TestResult{Result: o.text("result")}
	if !slices.Contains([]string{"PASSED", "WARNED", "FAILED"}, t.Result) {
		return nil, invalid("result %.20q (want PASSED, WARNED or FAILED)", t.Result)
	}
	for key, to := range map[string]*[]string{"passedTests": &t.Passed, "warnedTests": &t.Warned, "failedTests": &t.Failed} {
		var ok bool
		if *to, ok = o.texts(key); !ok {
			return nil, invalid("%s is no list of texts", key)
		}
	}
	return t, nil
}

func parseReview(o object, plain bool) (*Review, error) {
	r := &Review{Result: o.text("result")}
	if plain {
		if r.Result != "pass" && r.Result != "fail" {
			return nil, invalid("result %.20q (want pass or fail)", r.Result)
		}
	} else if r.Result = "pass"; len(o.list("reviewers")) == 0 {
		return nil, invalid("no reviewers")
	}
	var err error
	if r.Reviewers, err = parsePeople(o, "reviewers"); err != nil {
		return nil, err
	}
	if plain {
		r.Reviewers = nil
	}
	r.Authors, err = parsePeople(o.object("annotations"), "authors")
	return r, err
}

func parsePeople(o object, key string) ([]Person, error) {
	list, ok := o.objects(key)
	if !ok {
		return nil, invalid("%s is no list of objects", key)
	}
	var out []Person
	for _, v := range list {
		p, err := parsePerson(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func parsePerson(o object) (Person, error) {
	p := Person{Name: strings.TrimSpace(o.text("name")), URI: strings.TrimSpace(o.text("uri"))}
	if p.Name+p.URI == "" || !readable(p.Name, 0, maxName) || !readable(p.URI, 0, maxName) {
		return p, invalid("a person has neither a readable name nor a URI")
	}
	return p, nil
}

func levels() []string { return []string{"error", "warning", "note"} }

func parseScan(o object) (*Scan, error) {
	s := &Scan{Tool: o.object("tool").text("name"), Counts: map[string]int{}}
	counts := o.object("counts")
	for _, l := range levels() {
		n := counts.number(l)
		if n < 0 {
			return nil, invalid("counts.%s is no number", l)
		}
		s.Counts[l] = n
	}
	if !readable(s.Tool, 1, maxName) {
		return nil, invalid("tool.name is missing")
	}
	return s, nil
}

// Severities lists them, worst first. What a scanner cannot rate is unknown,
// which is a severity of its own.
func Severities() []string {
	return []string{"critical", "high", "medium", "low", "none", "unknown"}
}

// severityOf reads a word, or a CVSS score by CVSS 3.1's qualitative scale.
func severityOf(s string) string {
	s = strings.ToLower(strings.TrimSpace(s))
	switch s {
	case "moderate":
		return "medium"
	case "negligible", "info", "informational":
		return "low"
	}
	if slices.Contains(Severities(), s) {
		return s
	}
	f, err := strconv.ParseFloat(s, 64)
	switch {
	case err != nil || math.IsNaN(f) || f < 0 || f > 10:
		return "unknown"
	case f >= 9:
		return "critical"
	case f >= 7:
		return "high"
	case f >= 4:
		return "medium"
	case f > 0:
		return "low"
	}
	return "none"
}

// worst of two severities; unknown gives way to anything that is rated.
func worst(a, b string) string {
	all := Severities()
	if slices.Index(all, b) < slices.Index(all, a) {
		return b
	}
	return a
}

func parseVulns(o object) (*Vulns, error) {
	scanner, meta := o.object("scanner"), o.object("metadata")
	v := &Vulns{Scanner: scanner.text("uri")}
	if !readable(v.Scanner, 1, maxName) {
		return nil, invalid("scanner.uri is missing")
	}
	var err error
	if v.Database, err = timeOf(scanner.object("db"), "lastUpdate"); err != nil {
		return nil, err
	}
	if v.Finished, err = timeOf(meta, "scanFinishedOn"); err != nil {
		return nil, err
	}
	if _, given := scanner["result"].([]any); !given {
		return nil, invalid("scanner.result is missing; an empty list says that nothing was found")
	}
	list, ok := scanner.objects("result")
	if !ok {
		return nil, invalid("scanner.result is no list of objects")
	}
	for _, r := range list {
		if inner := r.object("vulnerability"); inner != nil { // as v0.1's text has it
			r = inner
		}
		f := Vulnerability{ID: r.text("id"), Severity: "unknown"}
		if !readable(f.ID, 1, 200) {
			return nil, invalid("a result has no id")
		}
		severities, ok := r.objects("severity")
		if !ok {
			return nil, invalid("severity of %s is no list of objects", f.ID)
		}
		for _, s := range severities {
			f.Severity = worst(f.Severity, severityOf(s.text("score")))
		}
		v.Found = append(v.Found, f)
	}
	return v, nil
}

func timeOf(o object, key string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, o.text(key))
	if err != nil {
		return t, invalid("%s is no time (want 2031-05-01T12:00:00Z)", key)
	}
	return t.UTC(), nil
}

func parseVEX(o object) (*VEX, error) {
	list, ok := o.objects("statements")
	if !ok || len(list) == 0 {
		return nil, invalid("no statements")
	}
	v := &VEX{}
	for _, s := range list {
		st := VEXStatement{Status: s.text("status"), Why: s.text("justification")}
		if st.Why == "" {
			st.Why = s.text("impact_statement")
		}
		if !slices.Contains([]string{"not_affected", "affected", "fixed", "under_investigation"}, st.Status) {
			return nil, invalid("status %.30q", st.Status)
		}
		if st.Status == "not_affected" && st.Why == "" {
			return nil, invalid("not_affected without justification or impact_statement")
		}
		if id := s.text("vulnerability"); id != "" { // before v0.2
			st.Vulnerabilities = []string{id}
		} else {
			n := s.object("vulnerability")
			aliases, ok := n.texts("aliases")
			if !ok || n.text("name") == "" {
				return nil, invalid("a statement names no vulnerability")
			}
			st.Vulnerabilities = append([]string{n.text("name")}, aliases...)
		}
		products, ok := s.objects("products")
		if !ok {
			return nil, invalid("products is no list of objects")
		}
		for _, p := range products {
			h := p.object("hashes").text("sha-256")
			if h == "" { // named otherwise: the subject says which artefact is meant
				st.Hashes = nil
				break
			}
			d, err := ParseDigest(strings.ToLower(h))
			if err != nil {
				return nil, err
			}
			st.Hashes = append(st.Hashes, d)
		}
		v.Statements = append(v.Statements, st)
	}
	return v, nil
}

func parseProvenance(o object) (*Provenance, error) {
	d := o.object("buildDefinition")
	p := &Provenance{Builder: o.object("runDetails").object("builder").text("id"), BuildType: d.text("buildType")}
	if !readable(p.Builder, 1, maxName) || !readable(p.BuildType, 1, maxName) {
		return nil, invalid("runDetails.builder.id or buildDefinition.buildType is missing")
	}
	list, ok := d.objects("resolvedDependencies")
	if !ok {
		return nil, invalid("resolvedDependencies is no list of objects")
	}
	for _, r := range list {
		c := r.object("digest").text("gitCommit")
		if c == "" {
			continue
		}
		if !isCommit(c) || !readable(r.text("uri"), 0, maxName) {
			return nil, invalid("dependency %.60q: commit %.64q", r.text("uri"), c)
		}
		p.Sources = append(p.Sources, Source{URI: r.text("uri"), Commit: c})
	}
	return p, nil
}

func parseVerification(o object) (*Verification, error) {
	v := &Verification{Verifier: o.object("verifier").text("id"), Outcome: o.text("outcome")}
	if !readable(v.Verifier, 1, maxName) {
		return nil, invalid("verifier.id is missing")
	}
	var err error
	if v.At, err = timeOf(o, "timeCreated"); err != nil {
		return nil, err
	}
	var ok bool
	if v.Properties, ok = o.texts("properties"); !ok || v.Properties == nil && o["properties"] == nil {
		return nil, invalid("properties is no list of texts")
	}
	return v, nil
}

func parseSurface(o object) (*Surface, error) {
	s := &Surface{}
	var ok bool
	if s.New, ok = o.texts("new"); !ok || o["new"] == nil {
		return nil, invalid("new is no list of texts; an empty one says that nothing was added")
	}
	list, ok := o.objects("approved")
	if !ok {
		return nil, invalid("approved is no list of objects")
	}
	for _, a := range list {
		by, err := parsePerson(a.object("by"))
		if err != nil {
			return nil, err
		}
		s.Approved = append(s.Approved, Approved{Item: a.text("item"), By: by})
	}
	return s, nil
}

func parseApproval(o object) (*Approval, error) {
	a := &Approval{Product: o.text("product"), Ring: o.text("ring"), Reason: o.text("reason")}
	var err error
	if a.NotAfter, err = timeOf(o, "not_after"); err != nil {
		return nil, err
	}
	if !readable(a.Product, 1, 64) || !readable(a.Ring, 1, 64) || !readable(a.Reason, 1, 1000) {
		return nil, invalid("product, ring or reason is missing, too long or not readable")
	}
	return a, nil
}
