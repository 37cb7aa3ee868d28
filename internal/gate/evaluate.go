package gate

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"
)

// candidate is evidence with the attester that the policy knows it by.
type candidate struct {
	*Evidence
	attester string
}

// Evaluate decides whether a release may be signed. It fails closed: whatever
// is missing, too old or not understood leaves the gate on hold.
func Evaluate(p *Policy, r Request, evidence []*Evidence, now time.Time) *Decision {
	e := &evaluation{p: p, r: r, now: now, d: &Decision{State: Pass, Ignored: []Ignored{}}}
	byGate := e.sort(evidence)
	e.release(byGate)
	for i := range p.Gates {
		g := &p.Gates[i]
		e.d.add(e.gate(g, e.agreeing(g, byGate[g.Name])))
	}
	if len(p.Gates) == 0 { // no parsed policy is like that
		e.d.add(Result{Gate: reservedProduct, State: Hold, Code: CodeNoEvidence, Text: "the policy has no gates"})
	}
	e.finish()
	return e.d
}

type evaluation struct {
	p   *Policy
	r   Request
	now time.Time
	d   *Decision
	vex []candidate
}

func (e *evaluation) ignore(v *Evidence, format string, a ...any) {
	e.d.Ignored = append(e.d.Ignored, Ignored{Evidence: v.Digest, Label: v.Label, Reason: fmt.Sprintf(format, a...)})
}

// finish brings what came in any order into one.
func (e *evaluation) finish() {
	slices.SortFunc(e.d.Ignored, func(a, b Ignored) int {
		if c := bytes.Compare(a.Evidence[:], b.Evidence[:]); c != 0 {
			return c
		}
		return strings.Compare(a.Reason, b.Reason)
	})
}

// signed reports whether the evidence is the attester's.
func (a *Attester) signed(v *Evidence) bool {
	return a.Authority == v.CA && (a.Identity != "" && a.Identity == v.Identity || !a.Key.IsZero() && a.Key == v.Key)
}

// known returns the policy's names for who signed: an identity and its key can
// have two.
func (p *Policy) known(v *Evidence) []string {
	var out []string
	for i := range p.Attesters {
		if a := &p.Attesters[i]; a.signed(v) {
			out = append(out, a.Name)
		}
	}
	return out
}

// sort hands each piece of evidence to the gates that ask for it. The result
// does not depend on the order of the evidence; a piece given twice counts once.
func (e *evaluation) sort(evidence []*Evidence) map[string][]candidate {
	all := slices.Clone(evidence)
	slices.SortFunc(all, func(a, b *Evidence) int {
		if c := bytes.Compare(a.Digest[:], b.Digest[:]); c != 0 {
			return c
		}
		if c := a.SignedAt.Compare(b.SignedAt); c != 0 { // the same statement, signed twice
			return c
		}
		return strings.Compare(a.Identity+a.CA+a.Key.String(), b.Identity+b.CA+b.Key.String())
	})
	all = slices.CompactFunc(all, func(a, b *Evidence) bool {
		return a.Digest == b.Digest && a.SignedAt.Equal(b.SignedAt) && a.Identity == b.Identity && a.CA == b.CA && a.Key == b.Key
	})
	out := map[string][]candidate{}
	for _, v := range all {
		who := e.p.known(v)
		switch {
		case len(who) == 0:
			e.ignore(v, "%s, certified by %s, is no attester of policy %s", v.Identity, v.CA, e.p.Name)
		case v.SignedAt.After(e.now.Add(clockSkew)):
			e.ignore(v, "it is signed in the future, at %s", stamp(v.SignedAt))
		case v.Commit == "" && v.SHA256 != e.r.Artefact:
			e.ignore(v, "it is about another artefact, sha256 %s", v.SHA256)
		case v.Product != "" && v.Product != e.r.Product:
			e.ignore(v, "it is about product %s", v.Product)
		case v.Kind == KindApproval:
			e.ignore(v, "an approval counts for a break-glass release only")
		default:
			if !e.place(v, who, out) {
				e.ignore(v, "no gate asks %s for evidence of kind %s%s", who[0], v.Kind, aboutWhat(v))
			}
		}
	}
	return out
}

func aboutWhat(v *Evidence) string {
	s := ""
	if v.Gate != "" {
		s = " named " + v.Gate
	}
	if v.Commit != "" {
		s += " about a source revision"
	}
	return s
}

// place says whether any gate asks for the evidence.
func (e *evaluation) place(v *Evidence, who []string, out map[string][]candidate) bool {
	placed := false
	if v.Kind == KindVEX {
		for _, w := range who {
			if slices.ContainsFunc(e.p.Gates, func(g Gate) bool { return slices.Contains(g.VEX, w) }) {
				e.vex = append(e.vex, candidate{v, w})
				placed = true
			}
		}
		return placed
	}
	for i := range e.p.Gates {
		g := &e.p.Gates[i]
		if g.Kind != v.Kind || v.Gate != "" && v.Gate != g.Name || g.Source != (v.Commit != "") || g.Kind == KindCustom && g.Type != v.Type {
			continue
		}
		for _, w := range who {
			if slices.Contains(g.Attesters, w) {
				out[g.Name] = append(out[g.Name], candidate{v, w})
				placed = true
				break
			}
		}
	}
	return placed
}

// release judges what belongs to no single gate: product, ring, epoch and that
// all evidence speaks of one source revision.
func (e *evaluation) release(byGate map[string][]candidate) {
	add := func(gate string, state State, code Code, text, fix string) {
		e.d.add(Result{Gate: gate, State: state, Code: code, Text: text, Fix: fix})
	}
	p, r := e.p, e.r
	if r.Product != p.Product {
		add(reservedProduct, Fail, CodeWrongProduct, fmt.Sprintf("the release is of product %q, the policy is for %q", r.Product, p.Product), "use the policy of the product")
	}
	e.d.Ring = r.Ring
	if r.Ring == "" && len(p.Rings) > 0 {
		e.d.Ring = p.Rings[len(p.Rings)-1]
	}
	if !slices.Contains(p.Rings, e.d.Ring) {
		add(reservedRing, Fail, CodeWrongRing, fmt.Sprintf("releases may not go to ring %q", r.Ring), "use one of "+strings.Join(p.Rings, ", "))
	}
	switch least := max(p.MinEpoch, r.Signed); {
	case r.Epoch < r.Signed:
		add(reservedEpoch, Fail, CodeEpochBackwards, fmt.Sprintf("epoch %d is below %d, which was signed already", r.Epoch, r.Signed), fmt.Sprintf("sign with epoch %d or higher", least))
	case r.Epoch < least:
		add(reservedEpoch, Fail, CodeEpochBackwards, fmt.Sprintf("epoch %d is below the policy's min_epoch %d", r.Epoch, p.MinEpoch), fmt.Sprintf("sign with epoch %d or higher", least))
	default:
		add(reservedEpoch, Pass, CodePassed, fmt.Sprintf("epoch %d, not below %d", r.Epoch, least), "")
	}
	var found []string
	for i := range p.Gates {
		for _, v := range byGate[p.Gates[i].Name] {
			if v.Commit != "" {
				continue
			}
			// with `source`, what the statement says by itself must agree, too
			for _, rev := range []string{revisionFor(&p.Gates[i], v), v.Revision} {
				if rev != "" {
					found = append(found, rev)
				}
			}
		}
	}
	if r.Revision != "" && len(found) > 0 {
		found = append(found, r.Revision)
	}
	slices.Sort(found)
	found = slices.Compact(found)
	switch {
	case len(found) > 1:
		add(reservedRev, Fail, CodeRevisionConflict, "the evidence is about different source revisions: "+strings.Join(found, ", "), "build, test and review one revision, and sign that")
	case len(found) == 1:
		e.d.Revision = found[0]
		add(reservedRev, Pass, CodePassed, "all evidence is about source revision "+found[0], "")
	case slices.ContainsFunc(p.Gates, Gate.needsRevision):
		add(reservedRev, Hold, CodeRevisionUnknown, "no evidence says from which source revision the artefact was built", "attest with --revision")
	default:
		e.d.Revision = r.Revision
	}
}

// revisionFor is the revision that evidence speaks of, as a gate reads it.
func revisionFor(g *Gate, v candidate) string {
	p, ok := v.Predicate.(*Provenance)
	if !ok || g.SourceURI == "" {
		return v.Revision
	}
	for _, s := range p.Sources {
		if s.URI == g.SourceURI {
			return s.Commit
		}
	}
	return v.Subject.Revision
}

// agreeing leaves out evidence about the source that is not about this
// release's revision: a repository has many.
func (e *evaluation) agreeing(g *Gate, list []candidate) []candidate {
	var out []candidate
	for _, v := range list {
		if v.Commit != "" && v.Commit != e.d.Revision {
			e.ignore(v.Evidence, "gate %s: it is about revision %s", g.Name, v.Commit)
			continue
		}
		out = append(out, v)
	}
	return out
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// gate judges one gate by the evidence for it. What failed is looked at first
// and whatever its age: a failure does not get better by waiting.
func (e *evaluation) gate(g *Gate, list []candidate) Result {
	if len(list) == 0 {
		return e.hold(g, CodeNoEvidence, fmt.Sprintf("no evidence from %s about this %s", strings.Join(g.Attesters, " or "), g.about()), g.howTo())
	}
	for _, v := range list {
		if r, bad := e.failed(g, v); bad {
			return r
		}
	}
	var fresh []candidate
	oldest := time.Time{}
	for _, v := range list {
		if t := v.time(); e.now.Sub(t) <= g.MaxAge {
			fresh = append(fresh, v)
		} else if t.After(oldest) {
			oldest = t
		}
	}
	if len(fresh) == 0 {
		return e.hold(g, CodeStale, fmt.Sprintf("the newest evidence is from %s, older than %s", stamp(oldest), formatDuration(g.MaxAge)), "run it again: "+g.howTo())
	}
	if g.needsRevision() {
		fresh = slices.DeleteFunc(fresh, func(v candidate) bool { return revisionFor(g, v) == "" })
		if len(fresh) == 0 {
			return e.hold(g, CodeNoRevision, "the evidence does not say which source revision it is about", "attest with --revision")
		}
	}
	r := e.passed(g, fresh)
	r.Gate, r.Kind = g.Name, g.Kind
	if r.State == Pass {
		for _, v := range fresh {
			r.Used = append(r.Used, Used{Evidence: v.Digest, Attester: v.attester, Identity: v.Identity, At: v.SignedAt})
		}
	}
	return r
}

func (g *Gate) about() string {
	if g.Source {
		return "source revision"
	}
	return "artefact"
}

// howTo says how evidence is made.
func (g *Gate) howTo() string {
	switch g.Kind {
	case KindProvenance, KindVerification, KindCustom:
		return fmt.Sprintf("ringwall gate attest custom ARTEFACT --predicate FILE --type %s --gate %s", g.typeURI(), g.Name)
	}
	what := "ARTEFACT"
	if g.Source {
		what = "--source"
	}
	return fmt.Sprintf("ringwall gate attest %s %s --gate %s --revision REVISION", g.Kind, what, g.Name)
}

func (g *Gate) typeURI() string {
	switch g.Kind {
	case KindProvenance:
		return TypeProvenance
	case KindVerification:
		return TypeSVR
	}
	return g.Type
}

// time is how old evidence is for a gate: of two times the older.
func (c candidate) time() time.Time {
	t := c.SignedAt
	switch p := c.Predicate.(type) {
	case *Vulns:
		if p.Finished.Before(t) {
			t = p.Finished
		}
	case *Verification:
		if p.At.Before(t) {
			t = p.At
		}
	}
	return t
}

func (e *evaluation) hold(g *Gate, code Code, text, fix string) Result {
	return Result{Gate: g.Name, Kind: g.Kind, State: Hold, Code: code, Text: text, Fix: fix}
}

func (e *evaluation) fail(g *Gate, code Code, text, fix string) (Result, bool) {
	return Result{Gate: g.Name, Kind: g.Kind, State: Fail, Code: code, Text: text, Fix: fix}, true
}
