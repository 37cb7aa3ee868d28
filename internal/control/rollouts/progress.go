package rollouts

import (
	"context"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Progress is how a rollout stands at this moment, for people.
type Progress struct {
	ID       resource.ID      `json:"id"`
	Phase    rollout.Phase    `json:"phase"`
	Ring     int              `json:"ring"` // under way, counted from 0
	Baking   time.Time        `json:"baking,omitzero"`
	Manifest string           `json:"manifest"`
	Epoch    uint64           `json:"epoch,omitempty"`
	Over     bool             `json:"over,omitempty"`
	Rings    []RingProgress   `json:"rings,omitempty"`
	Verdict  rollout.Verdict  `json:"verdict,omitempty"`
	Why      []rollout.Reason `json:"why,omitempty"` // it waits, or went back
}

// RingProgress counts the hosts of a ring.
type RingProgress struct {
	Name     string `json:"name"`
	Hosts    int    `json:"hosts"`
	Online   int    `json:"online"`
	Admitted int    `json:"admitted"`
	Applied  int    `json:"applied"` // had the change in force
	Refused  int    `json:"refused,omitempty"`
	Silent   int    `json:"silent,omitempty"`
	Flipped  int    `json:"flipped,omitempty"`
	Back     int    `json:"back,omitempty"` // of the admitted ones
}

// Progress reads how a rollout stands, for whoever may read its document. It
// changes nothing; answers of probes and coverage are known to the replica that
// moves the rollout only and are not asked for again.
func (e *Engine) Progress(ctx context.Context, by control.Actor, id resource.ID) (*Progress, error) {
	d, err := e.Door.Get(ctx, by, id)
	if err != nil {
		return nil, err
	}
	r, err := parse(d)
	if err != nil {
		return nil, err
	}
	x := &entry{id: d.ID, doc: *d, r: r}
	s := r.Status
	out := &Progress{
		ID: d.ID, Phase: s.Phase, Ring: s.Ring, Baking: s.Baking, Manifest: r.Manifest.String(), Epoch: s.Epoch, Over: s.Over,
		Rings: s.Final, Why: s.Why,
	}
	switch {
	case s.Over || s.Phase == rollout.Draft:
		return out, nil
	case s.Phase == rollout.Proposed:
		return out, e.waits(ctx, x, out)
	}
	now := e.Now().UTC()
	w := &watched{}
	if err := e.load(ctx, x, w); err != nil {
		return nil, err
	}
	w.take(e.look(x, w, now))
	v := e.members(x, w, now)
	if err := e.readStops(ctx, x, v, now); err != nil {
		return nil, err
	}
	out.Rings = ringsOf(x, v)
	if s.Phase != rollout.Running {
		return out, nil
	}
	plan := x.plan()
	v.Coverage = 1 // see above
	j := plan.Judge(s.Ring, s.Baking, v, now)
	out.Verdict, out.Why = j.Verdict, j.Reasons
	return out, nil
}

// waits says what a proposed rollout waits for.
func (e *Engine) waits(ctx context.Context, x *entry, out *Progress) error {
	s := x.r.Status
	why := rollout.Reason{Verdict: rollout.Hold, Code: "approval", Text: "waits for approval"}
	switch {
	case s.Check == nil:
		why.Code, why.Text = "check", "is being checked"
	case len(s.Check.Problems) > 0:
		why.Code, why.Text = s.Check.Problems[0].Code, s.Check.Problems[0].Text
	case s.Approval != nil && s.Approval.Emergency && len(s.Approval.Approvers) == 1:
		why.Text = "waits for a second approval, as an emergency"
	case s.Approval != nil:
		v := &rollout.View{}
		now := e.Now().UTC()
		if err := e.readStops(ctx, x, v, now); err != nil {
			return err
		}
		plan := x.plan()
		why.Code, why.Text = "starting", "is approved and about to begin"
		if step := plan.Next(s.State, v, now); len(step.Judgement.Reasons) > 0 {
			why = step.Judgement.Reasons[0]
		}
	}
	out.Verdict, out.Why = rollout.Hold, []rollout.Reason{why}
	return nil
}

func ringsOf(x *entry, v *rollout.View) []RingProgress {
	rings := x.r.Status.rings()
	out := make([]RingProgress, len(rings))
	for i := range rings {
		out[i].Name = rings[i].Name
	}
	count := func(n *int, is bool) {
		if is {
			*n++
		}
	}
	for i := range v.Members {
		m := &v.Members[i]
		if m.Ring >= len(out) {
			continue
		}
		p := &out[m.Ring]
		p.Hosts++
		count(&p.Online, m.Online)
		count(&p.Admitted, !m.Admitted.IsZero())
		count(&p.Applied, !m.Applied.IsZero())
		count(&p.Refused, m.Refused != "")
		count(&p.Silent, m.Silent)
		count(&p.Flipped, m.Flips > 0)
		count(&p.Back, m.Back && !m.Admitted.IsZero())
	}
	return out
}
