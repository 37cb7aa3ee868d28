package rollouts

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Kinds are the types of documents of this package. now is the server's clock.
func Kinds(now func() time.Time) []control.Kind {
	return []control.Kind{
		{
			Type: fleet.TypeRollout, Check: checkRollout, Keep: keepRollout,
			About:  "Brings a manifest to hosts, ring by ring; it has begun when it was started and approved.",
			Schema: json.RawMessage(schemaRollout),
			Actions: map[string]control.Action{
				"start":    act(now, start),
				"approve":  act(now, approve),
				"pause":    act(now, pause),
				"resume":   act(now, resume),
				"promote":  act(now, promote),
				"rollback": act(now, takeBack),
			},
		},
		{
			Type: fleet.TypeHalt, Check: checkHalt, Schema: json.RawMessage(schemaHalt),
			About: "Stops the rollouts that touch its scope, always or at some times of the week.",
		},
	}
}

// checkRollout lets people write a spec until the rollout runs, and nothing
// else: a change of what was proposed makes it a draft again, and whatever was
// approved is not any more.
func checkRollout(_ context.Context, _ control.Tx, old, d *resource.Document) error {
	r, err := parse(d)
	if err != nil {
		return err
	}
	if err := r.Spec.check(); err != nil {
		return err
	}
	status := &Status{State: rollout.State{Phase: rollout.Draft}}
	if old != nil {
		before, err := parse(old)
		if err != nil {
			return err
		}
		status = before.Status
		if !r.Spec.equal(&before.Spec) {
			if status.Phase != rollout.Draft && status.Phase != rollout.Proposed {
				return fmt.Errorf("rollout: it is %s and cannot be changed: make another: %w", status.Phase, errs.Conflict)
			}
			status = &Status{State: rollout.State{Phase: rollout.Draft, Revision: status.Revision + 1}}
		}
	}
	r.Status = status
	return r.store(d)
}

// keepRollout keeps what the engine still goes by: without it hosts would stay
// with what they have, and no way back would be known.
func keepRollout(d *resource.Document) error {
	r, err := parse(d)
	if err != nil {
		return nil //nolint:nilerr // the engine cannot read it either
	}
	if s := r.Status; !s.Over && s.Phase != rollout.Draft && s.Phase != rollout.Proposed {
		return fmt.Errorf("the rollout is %s and still says what its hosts get: %w", s.Phase, errs.Conflict)
	}
	return nil
}

// request is the body of an action; not every action reads all of it.
type request struct {
	Reason string `json:"reason,omitempty"`
}

// call is one action on one rollout.
type call struct {
	tx   control.Tx
	by   control.Actor
	now  time.Time
	id   resource.ID
	r    *Rollout
	body request
}

func act(now func() time.Time, do func(context.Context, *call) error) control.Action {
	return control.Action{Do: func(ctx context.Context, tx control.Tx, by control.Actor, d *resource.Document, body json.RawMessage) (any, error) {
		c := call{tx: tx, by: by, now: now().UTC().Truncate(time.Second), id: d.ID}
		if len(body) > 0 {
			if err := strict(body, &c.body); err != nil {
				return nil, fmt.Errorf("request: %w", err)
			}
		}
		if len(c.body.Reason) > maxText {
			return nil, invalid("reason of %d bytes (at most %d)", len(c.body.Reason), maxText)
		}
		var err error
		if c.r, err = parse(d); err != nil {
			return nil, err
		}
		if err := do(ctx, &c); err != nil {
			return nil, err
		}
		return c.r.Status, c.r.store(d)
	}}
}

func (c *call) wrongPhase() error {
	return fmt.Errorf("the rollout is %s: %w", c.r.Status.Phase, errs.Conflict)
}

// start proposes a rollout. Whoever does is its author. One whose check found
// problems is checked again: they may have been put right elsewhere.
func start(ctx context.Context, c *call) error {
	s := c.r.Status
	again := s.Phase == rollout.Proposed && s.Check != nil && len(s.Check.Problems) > 0
	if s.Phase != rollout.Draft && !again {
		return c.wrongPhase()
	}
	if e := c.r.Emergency; e != nil && !c.now.Before(e.Until) {
		return invalid("the emergency ended at %s", e.Until.Format(time.RFC3339))
	}
	if err := c.alone(ctx, func(o *Status) bool { return o.Phase.Active() }, "is under way there"); err != nil {
		return err
	}
	s.Author, s.Check = c.by.ID, nil
	s.State = rollout.State{Phase: rollout.Proposed, Revision: s.Revision + 1, Since: c.now}
	return nil
}

// alone refuses an action if another rollout whose hosts may be the same is in
// the way.
func (c *call) alone(ctx context.Context, inTheWay func(*Status) bool, why string) error {
	return each(ctx, c.tx, fleet.TypeRollout, func(d *resource.Document) error {
		if d.ID.Equal(c.id) || !overlaps(d.ID.Parent(), c.id.Parent()) {
			return nil
		}
		r, err := parse(d)
		if err != nil {
			return fmt.Errorf("%s: %w", d.ID, err)
		}
		if inTheWay(r.Status) {
			return fmt.Errorf("%s (%s) %s: %w", d.ID, r.Status.Phase, why, errs.Conflict)
		}
		return nil
	})
}

// approve is consent to what was checked, and beforehand to going back. Who
// started it does not count.
func approve(_ context.Context, c *call) error {
	s := c.r.Status
	switch {
	case s.Phase != rollout.Proposed:
		return c.wrongPhase()
	case s.Check == nil:
		return fmt.Errorf("it is not checked yet, so there is nothing to approve: wait some seconds: %w", errs.Conflict)
	case len(s.Check.Problems) > 0:
		return fmt.Errorf("%s: %w", s.Check.Problems[0].Text, errs.Conflict)
	case c.by.ID == s.Author:
		return fmt.Errorf("%s started the rollout and cannot approve it: %w", c.by.Name, errs.Denied)
	}
	a := s.Approval
	if a == nil {
		a = &rollout.Approval{Author: s.Author}
		if e := c.r.Emergency; e != nil {
			a.Emergency, a.Reason, a.Until = true, e.Reason, e.Until
		}
	}
	if slices.Contains(a.Approvers, c.by.ID) {
		return fmt.Errorf("%s has approved it already: %w", c.by.Name, errs.Conflict)
	}
	a.Approvers, a.At = append(a.Approvers, c.by.ID), c.now
	s.Approval = a
	s.Revision++
	return nil
}

func (c *call) why() string {
	if c.body.Reason == "" {
		return "by " + c.by.Name
	}
	return c.body.Reason + " (by " + c.by.Name + ")"
}

// pause keeps new hosts from getting the change, also those that come later.
func pause(_ context.Context, c *call) error {
	s := c.r.Status
	if !s.Phase.Active() && s.Phase != rollout.Done {
		return c.wrongPhase()
	}
	s.Paused = "paused: " + c.why()
	s.Revision++
	return nil
}

func resume(_ context.Context, c *call) error {
	s := c.r.Status
	if s.Paused == "" {
		return fmt.Errorf("the rollout is not paused: %w", errs.Conflict)
	}
	s.Paused = ""
	s.Revision++
	return nil
}

// promote lets the ring go on without the rest of what it should show. Harm,
// halts and freezes stay in the way.
func promote(_ context.Context, c *call) error {
	s := c.r.Status
	switch {
	case s.Phase != rollout.Running:
		return c.wrongPhase()
	case c.by.ID == s.Author:
		return fmt.Errorf("%s started the rollout and cannot shorten its bake: %w", c.by.Name, errs.Denied)
	case c.body.Reason == "":
		return invalid("say why, as reason")
	}
	s.Promoted = s.Ring + 1
	s.Revision++
	return nil
}

// takeBack sends the hosts back, or ends a rollout that did not begin. Nobody
// has to be asked.
func takeBack(ctx context.Context, c *call) error {
	s := c.r.Status
	switch {
	case s.Phase == rollout.Done && s.Over:
		return fmt.Errorf("a later rollout has taken its place: %w", errs.Conflict)
	case s.Phase == rollout.Done:
		later := func(o *Status) bool { return o.Epoch > s.Epoch && !o.Begun.IsZero() }
		if err := c.alone(ctx, later, "came later, so that hosts have a higher epoch: make a rollout of what they should have"); err != nil {
			return err
		}
	case s.Phase != rollout.Proposed && s.Phase != rollout.Running:
		return c.wrongPhase()
	}
	plan := c.r.plan("s", s.rings())
	reason := rollout.Reason{Verdict: rollout.Fail, Code: "person", Text: "taken back: " + c.why()}
	s.State = plan.Return(s.State, []rollout.Reason{reason}, c.now)
	return nil
}

// rings are those that the check found, which the rollout goes by.
func (s *Status) rings() []Ring {
	if s.Check == nil {
		return nil
	}
	out := make([]Ring, len(s.Check.Rings))
	for i := range s.Check.Rings {
		out[i] = s.Check.Rings[i].Ring
	}
	return out
}
