package csv

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// What a verdict is, in the words of in-toto: a Statement v1 about the artefact
// with a Simple Verification Result, which any policy engine that knows svr can
// ask for. The fields policies, inventory and outcome are ours; in-toto's
// parsing rules let others pass over them.
const (
	VerdictPredicateType = "https://in-toto.io/attestation/svr/v0.1"
	// PropertyPassed stands in a verdict when nothing blocks and nothing is on
	// hold in any of its cells.
	PropertyPassed = "RINGWALL_CSV_PASSED" //nolint:gosec // the name of a property, no password
	// PropertyRing and a ring's name stand there for each ring that passed.
	PropertyRing = "RINGWALL_CSV_PASSED_RING_"

	inTotoPayload = "application/vnd.in-toto+json"
	inTotoType    = "https://in-toto.io/Statement/v1"
	maxVerdict    = 1 << 20
)

type (
	verdictStatement struct {
		Type          string           `json:"_type"`
		Subject       []verdictSubject `json:"subject"`
		PredicateType string           `json:"predicateType"`
		Predicate     verdictBody      `json:"predicate"`
	}
	verdictSubject struct {
		Name        string            `json:"name"`
		Digest      verdictDigest     `json:"digest"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	verdictDigest struct {
		SHA256 string `json:"sha256"`
	}
	verdictBody struct {
		Verifier   verdictVerifier `json:"verifier"`
		Time       string          `json:"timeCreated"`
		Properties []string        `json:"properties"`
		Outcome    Severity        `json:"outcome"`
		Inventory  string          `json:"inventory"` // when the cells were listed
		Policies   []VerdictPolicy `json:"policies"`
	}
	verdictVerifier struct {
		ID string `json:"id"`
	}
)

// VerdictPolicy is a policy that a verdict is about, in one ring.
type VerdictPolicy struct {
	Ring   string `json:"ring"`
	Name   string `json:"name"`
	Epoch  uint64 `json:"epoch"`
	SHA256 string `json:"sha256"`
	// Supplements are the SHA-256 of those that it was joined with, in order.
	Supplements []string `json:"supplements,omitempty"`
	Outcome     Severity `json:"outcome"`
}

func (p *VerdictPolicy) equal(q *VerdictPolicy) bool {
	return p.Ring == q.Ring && p.Name == q.Name && p.Epoch == q.Epoch && p.SHA256 == q.SHA256 && p.Outcome == q.Outcome && slices.Equal(p.Supplements, q.Supplements)
}

// digestsInOrder spells digests, so that two sets compare.
func digestsInOrder(list []integrity.Digest) []string {
	var out []string
	for _, d := range list {
		out = append(out, d.String())
	}
	slices.Sort(out)
	return out
}

// Verdict is a verified verdict.
type Verdict struct {
	Artefact   integrity.Digest
	Verifier   string // who verified, as its certificate says
	At         time.Time
	Inventory  time.Time
	SignedAt   time.Time
	Outcome    Severity
	Properties []string
	Policies   []VerdictPolicy
}

// SignVerdict signs what a report comes to. The signer's purpose is attest, and
// its identity is the verifier.
func SignVerdict(s *pki.Signer, r *Report, verifier string) ([]byte, error) {
	if s.Purpose != pki.PurposeAttest {
		return nil, fmt.Errorf("sign verdict: with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	taken := r.At
	if r.Inventory != nil {
		taken = *r.Inventory
	}
	body := verdictBody{
		Verifier: verdictVerifier{verifier}, Time: utc(r.At), Properties: r.properties(), Outcome: r.Outcome, Inventory: utc(taken), Policies: []VerdictPolicy{},
	}
	for i := range r.Cells {
		c := &r.Cells[i]
		p := VerdictPolicy{c.Ring, c.Policy, c.Epoch, c.PolicySHA256, c.Supplements, c.Outcome}
		if !slices.ContainsFunc(body.Policies, func(q VerdictPolicy) bool { return q.equal(&p) }) {
			body.Policies = append(body.Policies, p)
		}
	}
	b, err := json.Marshal(verdictStatement{
		Type: inTotoType, PredicateType: VerdictPredicateType, Predicate: body,
		Subject: []verdictSubject{{Name: r.Artefact.Name, Digest: verdictDigest{r.Artefact.SHA256}}},
	})
	if err != nil {
		return nil, fmt.Errorf("sign verdict: %w", err)
	}
	if _, err := readVerdict(b); err != nil {
		return nil, fmt.Errorf("sign verdict: %w", err)
	}
	out, err := s.Sign(inTotoPayload, b)
	if err != nil {
		return nil, fmt.Errorf("sign verdict: %w", err)
	}
	return out, nil
}

// properties are what the report shows to hold. A ring passes when all of its
// cells do and nothing stands against the build as a whole.
func (r *Report) properties() []string {
	out := []string{}
	if r.Exit(false) == ExitPass {
		out = append(out, PropertyPassed)
	}
	for _, ring := range r.Rings {
		passed, known := true, false
		for i := range r.Cells {
			if c := &r.Cells[i]; c.Ring == ring {
				known = true
				passed = passed && c.Outcome.rank() < Hold.rank()
			}
		}
		if passed && known {
			out = append(out, PropertyRing+ring)
		}
	}
	return out
}

func readVerdict(payload []byte) (*Verdict, error) {
	var s verdictStatement
	if err := pki.UnmarshalStrict(payload, &s, maxVerdict); err != nil {
		return nil, err
	}
	p := &s.Predicate
	bad := func(what string) (*Verdict, error) { return nil, fmt.Errorf("verdict: %s: %w", what, errs.Invalid) }
	if s.Type != inTotoType || s.PredicateType != VerdictPredicateType || len(s.Subject) != 1 {
		return bad("not an svr about one artefact")
	}
	if p.Outcome.rank() < 0 || p.Verifier.ID == "" {
		return bad("no outcome or no verifier")
	}
	v := &Verdict{Verifier: p.Verifier.ID, Outcome: p.Outcome, Properties: p.Properties, Policies: p.Policies}
	var err error
	if v.Artefact, err = integrity.ParseDigest(s.Subject[0].Digest.SHA256); err != nil || v.Artefact.IsZero() {
		return bad("the artefact has no digest")
	}
	if v.At, err = time.Parse(time.RFC3339, p.Time); err != nil {
		return bad("timeCreated")
	}
	if v.Inventory, err = time.Parse(time.RFC3339, p.Inventory); err != nil {
		return bad("inventory")
	}
	return v, nil
}

// VerifyVerdict checks who signed a verdict, and reads it.
func VerifyVerdict(bundle []byte, roots pki.TrustRoots) (*Verdict, error) {
	b, err := pki.VerifyBundle(bundle, roots, pki.PurposeAttest)
	if err != nil {
		return nil, fmt.Errorf("verdict: %w", err)
	}
	if b.PayloadType != inTotoPayload {
		return nil, fmt.Errorf("verdict: payload type %.80q: %w", b.PayloadType, errs.Untrusted)
	}
	v, err := readVerdict(b.Payload)
	if err != nil {
		return nil, err
	}
	if v.Verifier != b.Identity { // one attester does not speak for another
		return nil, fmt.Errorf("verdict: it says %.200q verified, and %q signed: %w", v.Verifier, b.Identity, errs.Untrusted)
	}
	v.SignedAt = b.SignedAt
	return v, nil
}

// Covers says whether a verdict lets an artefact go to hosts that run a policy
// with these supplements and no others. It fails closed: a policy that the
// verdict does not know, because it is newer than the verdict, of another ring or
// joined with other supplements, is errs.Denied.
func (v *Verdict) Covers(artefact, policy integrity.Digest, ring string, supplements ...integrity.Digest) error {
	if v.Artefact != artefact {
		return fmt.Errorf("the verdict is about artefact %v, not %v: %w", v.Artefact, artefact, errs.Denied)
	}
	want := digestsInOrder(supplements)
	for _, p := range v.Policies {
		if p.SHA256 == policy.String() && p.Ring == ring && slices.Equal(p.Supplements, want) {
			if p.Outcome.rank() >= Hold.rank() || p.Outcome.rank() < 0 {
				return fmt.Errorf("the verdict for policy %s %d in ring %q is %s: %w", p.Name, p.Epoch, ring, p.Outcome, errs.Denied)
			}
			return nil
		}
	}
	return fmt.Errorf("the verdict of %s says nothing about policy %v with %d supplements in ring %q; verify again: %w", utc(v.At), policy, len(want), ring, errs.Denied)
}
