package gate

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// EvaluateBreakglass decides whether a release may be signed past its gates:
// with the break-glass certificate, up to the policy's ring, for hours. It
// wants approvals of this very artefact by as many different people as the
// policy says, and fails closed like Evaluate. Whoever signs on its word must
// raise an alert.
func EvaluateBreakglass(p *Policy, r Request, evidence []*Evidence, now time.Time) *Decision {
	e := &evaluation{p: p, r: r, now: now, d: &Decision{State: Pass, Breakglass: true, Ignored: []Ignored{}, Revision: r.Revision}}
	b := p.Breakglass
	if b == nil {
		e.d.add(Result{Gate: "breakglass", State: Fail, Code: CodeNoBreakglass, Text: "the policy has no break-glass for " + p.Product, Fix: "pass the gates"})
		return e.d
	}
	if r.Ring == "" {
		r.Ring = p.Rings[0]
		e.r.Ring = r.Ring
	}
	e.limits(b)
	e.approvals(b, evidence)
	e.finish()
	return e.d
}

// limits judges what a break-glass release shares with others, and its ring.
func (e *evaluation) limits(b *Breakglass) {
	p, r := e.p, e.r
	e.d.Ring = r.Ring
	if r.Product != p.Product {
		e.d.add(Result{
			Gate: reservedProduct, State: Fail, Code: CodeWrongProduct,
			Text: fmt.Sprintf("the release is of product %q, the policy is for %q", r.Product, p.Product), Fix: "use the policy of the product",
		})
	}
	if i := slices.Index(p.Rings, r.Ring); i < 0 || i > slices.Index(p.Rings, b.Ring) {
		e.d.add(Result{
			Gate: reservedRing, State: Fail, Code: CodeWrongRing,
			Text: fmt.Sprintf("break-glass releases go no further than ring %s, not to %q", b.Ring, r.Ring), Fix: "ask for ring " + b.Ring,
		})
	}
	if least := max(p.MinEpoch, r.Signed); r.Epoch < least {
		e.d.add(Result{
			Gate: reservedEpoch, State: Fail, Code: CodeEpochBackwards,
			Text: fmt.Sprintf("epoch %d is below %d", r.Epoch, least), Fix: fmt.Sprintf("sign with epoch %d or higher", least),
		})
	}
}

func (e *evaluation) approvals(b *Breakglass, evidence []*Evidence) {
	all := slices.Clone(evidence)
	slices.SortFunc(all, func(a, c *Evidence) int {
		return strings.Compare(a.Digest.String()+a.Identity, c.Digest.String()+c.Identity)
	})
	r := Result{Gate: "breakglass", Kind: KindApproval, State: Pass, Code: CodePassed}
	var identities []string
	keys := map[Digest]bool{}
	var reasons []string
	for _, v := range all {
		a, ok := v.Predicate.(*Approval)
		who := slices.DeleteFunc(e.p.known(v), func(n string) bool { return !slices.Contains(b.Approvers, n) })
		switch {
		case !ok:
			e.ignore(v, "it is no approval; gates do not count here")
		case len(who) == 0:
			e.ignore(v, "%s, certified by %s, is no approver", v.Identity, v.CA)
		case v.SHA256 != e.r.Artefact || a.Product != e.p.Product:
			e.ignore(v, "it approves something else")
		case v.SignedAt.After(e.now.Add(clockSkew)) || e.now.Sub(v.SignedAt) > b.MaxTime:
			e.ignore(v, "it is signed at %s, and counts for %s", stamp(v.SignedAt), formatDuration(b.MaxTime))
		case a.Ring != e.r.Ring:
			e.ignore(v, "it approves ring %s", a.Ring)
		case !a.NotAfter.After(e.now):
			e.ignore(v, "what it approves ended %s", stamp(a.NotAfter))
		case slices.Contains(identities, v.Identity) || keys[v.Key]:
			e.ignore(v, "%s has approved already, or the key has", v.Identity)
		default:
			identities = append(identities, v.Identity)
			keys[v.Key] = true
			if !slices.Contains(reasons, a.Reason) {
				reasons = append(reasons, a.Reason)
			}
			if e.d.NotAfter.IsZero() || a.NotAfter.Before(e.d.NotAfter) {
				e.d.NotAfter = a.NotAfter
			}
			r.Used = append(r.Used, Used{Evidence: v.Digest, Attester: who[0], Identity: v.Identity, At: v.SignedAt})
		}
	}
	slices.Sort(reasons)
	slices.Sort(identities)
	slices.SortFunc(r.Used, func(a, b Used) int { return strings.Compare(a.Identity, b.Identity) })
	e.d.Reason = strings.Join(reasons, "; ")
	r.Text = fmt.Sprintf("approved by %s: %s", strings.Join(identities, ", "), e.d.Reason)
	switch {
	case len(identities) < b.Required:
		r.State, r.Code, r.Used = Hold, CodeTooFewApprovals, nil
		r.Text = fmt.Sprintf("%d of %d approvals for ring %s: %s", len(identities), b.Required, e.r.Ring, strings.Join(identities, ", "))
		r.Fix = "each approver: ringwall gate attest approval ARTEFACT --product " + e.p.Product + " --ring " + e.r.Ring + " --reason …"
	case e.d.NotAfter.Sub(e.now) > b.MaxTime:
		// the approvers asked for more than the policy gives: they get what it gives
		e.d.NotAfter = e.now.Add(b.MaxTime).UTC().Truncate(time.Second)
	}
	e.d.add(r)
}
