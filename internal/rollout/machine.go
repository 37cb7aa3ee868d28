package rollout

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/errs"
)

// Phase is where a rollout stands.
type Phase string

// The phases. Done, RolledBack and Stopped are final; hosts that were offline
// then, or come later, still take the change or go back.
const (
	Draft       Phase = "draft"        // being written
	Proposed    Phase = "proposed"     // waits for approval
	Running     Phase = "running"      // admits hosts, or bakes
	RollingBack Phase = "rolling-back" // hosts go back to the content before
	RolledBack  Phase = "rolled-back"
	Stopped     Phase = "stopped" // did harm, and has nothing to go back to
	Done        Phase = "done"
)

// Active says whether a rollout is under way: there is one in a scope.
func (p Phase) Active() bool { return p == Proposed || p == Running || p == RollingBack }

// State is what is stored of a rollout. Each transition is one write that
// compares Revision, so two replicas cannot both make it.
type State struct {
	Phase    Phase     `json:"phase"`
	Revision uint64    `json:"revision"`
	Ring     int       `json:"ring"`               // the last one that is admitted
	Baking   time.Time `json:"baking,omitzero"`    // since when it has converged
	Since    time.Time `json:"since"`              // of the phase
	Promoted int       `json:"promoted,omitempty"` // the ring, counted from 1, that a person lets go on without all of its bake
	Why      []Reason  `json:"why,omitempty"`      // it waits, or went back
	Approval *Approval `json:"approval,omitempty"` // by whom
}

// Approval is consent to a rollout, and beforehand to its rollback: an envelope
// signed with it holds the old content under a higher epoch, so that going back
// needs no person and no online key, and a stolen server cannot replay an old
// policy by itself.
type Approval struct {
	Author    string    `json:"author"`
	Approvers []string  `json:"approvers"`
	At        time.Time `json:"at"`
	// Emergency collapses rings and bake, never checks of the content: two
	// approvers, a reason, an end.
	Emergency bool      `json:"emergency,omitempty"`
	Reason    string    `json:"reason,omitempty"`
	Until     time.Time `json:"until,omitzero"`
}

// Check refuses an approval that is none: the author does not count, and an
// emergency needs two people and a reason.
func (a *Approval) Check(now time.Time) error {
	people := slices.Compact(slices.Sorted(slices.Values(a.Approvers)))
	switch {
	case a.Author == "" || len(people) == 0 || people[0] == "":
		return fmt.Errorf("approval: no author or no approver: %w", errs.Invalid)
	case slices.Contains(people, a.Author):
		return fmt.Errorf("approval: %s wrote the change and cannot approve it: %w", a.Author, errs.Denied)
	case a.Emergency && len(people) < 2:
		return fmt.Errorf("approval: an emergency needs two approvers: %w", errs.Denied)
	case a.Emergency && a.Reason == "":
		return fmt.Errorf("approval: an emergency needs a reason: %w", errs.Invalid)
	case a.Emergency && (a.Until.IsZero() || !now.Before(a.Until)):
		return fmt.Errorf("approval: an emergency needs an end that is not over: %w", errs.Invalid)
	}
	return nil
}

// Step is what to do next. Doing it twice does no harm.
type Step struct {
	State State
	Admit []string // hosts that may take the change now
	// Return are hosts that must go back, in the order in which to offer it:
	// the ring that failed first.
	Return    []string
	Judgement Judgement
}

// Next decides. It is called again and again with what is stored and what
// hosts report; the same input gives the same step. The caller stores
// Step.State if it differs from s before it acts on the rest, and comes again.
func (p *Plan) Next(s State, v *View, now time.Time) Step {
	switch s.Phase {
	case Proposed:
		if s.Approval == nil || s.Approval.Check(now) != nil {
			j := Judgement{Verdict: Hold}
			j.say(Hold, "approval", "waits for approval")
			s.Why = j.Reasons
			return Step{State: s, Judgement: j}
		}
		if j := stopped(v, s.emergency(now)); j.Verdict == Hold {
			s.Why = j.Reasons
			return Step{State: s, Judgement: j}
		}
		return Step{State: s.to(Running, now), Judgement: Judgement{Verdict: Hold}}
	case Running:
		return p.run(s, v, now)
	case RollingBack, RolledBack:
		return p.goBack(s, v, now)
	case Done:
		step := Step{State: s, Judgement: Judgement{Verdict: Pass}}
		if stopped(v, false).Verdict == Pass {
			step.Admit = p.admit(len(p.Rings)-1, v) // they were offline, or joined
		}
		return step
	}
	return Step{State: s, Judgement: Judgement{Verdict: Hold}}
}

// Return is the state after harm, or a person who says so: hosts go back, or
// the rollout stops where it is if there is nothing to go back to.
func (p *Plan) Return(s State, why []Reason, now time.Time) State {
	phase := RollingBack
	if p.NoReturn {
		phase = Stopped
	}
	s = s.to(phase, now)
	s.Why = why
	return s
}

func (s State) to(phase Phase, now time.Time) State {
	s.Phase, s.Since, s.Revision, s.Why = phase, now, s.Revision+1, nil
	return s
}

// emergency says whether rings, bakes and freezes are left out now.
func (s *State) emergency(now time.Time) bool {
	return s.Approval != nil && s.Approval.Emergency && now.Before(s.Approval.Until)
}

// stopped is a hold if nothing may begin.
func stopped(v *View, emergency bool) Judgement {
	j := Judgement{Verdict: Pass}
	switch {
	case v.Halt != "":
		j.say(Hold, "halted", v.Halt)
	case v.Freeze != "" && !emergency:
		j.say(Hold, "frozen", v.Freeze)
	}
	return j
}

func (p *Plan) run(s State, v *View, now time.Time) Step {
	emergency := s.emergency(now)
	if emergency && s.Ring < len(p.Rings)-1 {
		s = s.to(Running, now)
		s.Ring, s.Baking = len(p.Rings)-1, time.Time{}
		return Step{State: s, Judgement: Judgement{Verdict: Hold}}
	}
	j := p.Judge(s.Ring, s.Baking, v, now)
	step := Step{State: s, Judgement: j}
	step.State.Why = j.Reasons
	if j.Verdict == Fail {
		step.State = p.Return(s, j.Reasons, now)
		return step
	}
	promoted := s.Promoted == s.Ring+1
	if stopped(v, emergency).Verdict == Hold {
		return step // nobody new; who has it keeps it
	}
	if s.Baking.IsZero() {
		if promoted || p.hasConverged(s.Ring, v, now) {
			step.State.Baking = now
			step.State.Revision++
			return step
		}
		step.Admit = p.admit(s.Ring, v)
		return step
	}
	if late := p.admit(s.Ring, v); len(late) > 0 {
		step.Admit = late // they were offline, or joined
	}
	switch {
	case j.Verdict != Pass && !promoted:
	case s.Ring == len(p.Rings)-1:
		step.State = s.to(Done, now)
		step.Admit = nil
	default:
		step.State = s.to(Running, now)
		step.State.Ring, step.State.Baking = s.Ring+1, time.Time{}
		step.Admit = nil
	}
	return step
}

// hasConverged says whether enough of a ring has applied the change. A ring
// without online hosts has not: it proves nothing.
func (p *Plan) hasConverged(at int, v *View, now time.Time) bool {
	for i := range v.Members {
		if m := &v.Members[i]; m.Ring == at && m.Online && m.Admitted.IsZero() {
			return false // there is somebody to ask yet
		}
	}
	online, applied, _ := p.converged(at, v, now)
	return online > 0 && float64(applied) >= cmp.Or(p.Limits.Converged, DefaultConverged)*float64(online)
}

// admit picks who may take the change now: online hosts of the rings up to at
// that were not admitted, in the order of their ids, as many as may be
// unavailable at once.
func (p *Plan) admit(at int, v *View) []string {
	var out []string
	busy := 0
	for i := range v.Members {
		m := &v.Members[i]
		switch {
		case m.Ring > at:
		case m.Admitted.IsZero() && m.Online:
			out = append(out, m.ID)
		case !m.Admitted.IsZero() && m.Applied.IsZero() && m.Refused == "" && m.Online:
			busy++
		}
	}
	slices.Sort(out)
	if p.MaxUnavailable > 0 {
		out = out[:min(len(out), max(0, p.MaxUnavailable-busy))]
	}
	return out
}

func (p *Plan) goBack(s State, v *View, now time.Time) Step {
	step := Step{State: s, Judgement: Judgement{Verdict: Fail, Reasons: s.Why}}
	var back []*Member
	waiting := false
	for i := range v.Members {
		m := &v.Members[i]
		if m.Admitted.IsZero() || m.Back {
			continue
		}
		back = append(back, m) // offline ones too: it is what they find when they return
		waiting = waiting || m.Online
	}
	slices.SortFunc(back, func(a, b *Member) int { return cmp.Or(cmp.Compare(b.Ring, a.Ring), cmp.Compare(a.ID, b.ID)) })
	for _, m := range back {
		step.Return = append(step.Return, m.ID)
	}
	if !waiting && s.Phase == RollingBack {
		step.State = s.to(RolledBack, now)
		step.State.Why = s.Why
	}
	return step
}
