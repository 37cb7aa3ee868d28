package rollout

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Subject is one host as the comparison of changed with unchanged hosts sees
// it, for one signal (a crash, a lost heartbeat, a failed unit, …). Times are
// the server's, of receipt: a host's clock proves nothing.
type Subject struct {
	ID        string
	Entered   time.Time // the rollout's start, or when the host came
	Activated time.Time // when it had the change; zero: not yet
	Hit       time.Time // first signal since Entered; zero: none. What came before Entered takes the host out
	Left      time.Time // offline since, or taken out of the rollout; zero: still there
}

// Evidence is how strongly hits concentrate on hosts that have the change: an
// e-value. If the change does no harm, the probability that it ever reaches
// 1/α is at most α, however often one looks and whenever one stops (Ville's
// inequality). It is the mean of likelihood ratios, over a few rates of harm,
// of the partial likelihood "which of the hosts at risk was hit":
//
//	ter Schure, Pérez-Ortiz, Ly, Grünwald: The anytime-valid logrank test,
//	New England Journal of Statistics in Data Science 2(2), 2024.
//
// A host counts once, so a noisy one cannot stop a rollout; what hits the whole
// fleet hits both groups and cancels out. It is sound when membership is random
// among hosts that are alike, which Plan.Place sees to; hand-picked rings void
// that. Hosts that are hit at the same instant are taken one after the other.
func Evidence(subjects []Subject) float64 {
	last := 1.0
	trace(subjects, func(_ time.Time, e float64) bool { last = e; return true })
	return last
}

// trace yields the evidence after each hit, in order of time, until visit
// returns false.
func trace(subjects []Subject, visit func(time.Time, float64) bool) {
	type change struct {
		at            time.Time
		order         int // a host that is hit is still at risk at that instant
		control, risk int // what it does to the hosts at risk
		hit, treated  bool
	}
	const enter, hit, leave = 0, 1, 2
	var cs []change
	for i := range subjects {
		s := &subjects[i]
		end, out := s.end()
		if out && !end.After(s.Entered) && !s.Hit.Equal(end) {
			continue
		}
		activated := !s.Activated.IsZero() && (!out || !s.Activated.After(end))
		cs = append(cs, change{at: s.Entered, order: enter, control: 1})
		if activated {
			at := s.Activated
			if at.Before(s.Entered) {
				at = s.Entered
			}
			cs = append(cs, change{at: at, order: enter, control: -1, risk: 1})
		}
		if !out {
			continue
		}
		c := change{at: end, order: leave, control: -1}
		if activated {
			c.control, c.risk = 0, -1
		}
		if s.Hit.Equal(end) && !s.Hit.IsZero() {
			c.order, c.hit, c.treated = hit, true, activated
		}
		cs = append(cs, c)
	}
	slices.SortFunc(cs, func(a, b change) int {
		return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.order, b.order))
	})
	var logs evidence
	treated, control := 0, 0
	for _, c := range cs {
		if c.hit {
			logs.add(c.treated, treated, control)
			if !visit(c.at, logs.mean()) {
				return
			}
		}
		control += c.control
		treated += c.risk
	}
}

// end is when the host is no longer at risk, and whether it is not.
func (s *Subject) end() (time.Time, bool) {
	switch {
	case s.Hit.IsZero() && s.Left.IsZero():
		return time.Time{}, false
	case s.Hit.IsZero() || !s.Left.IsZero() && s.Left.Before(s.Hit):
		return s.Left, true
	}
	return s.Hit, true
}

// harm are the rates, against unchanged hosts, that Evidence is sensitive to.
func harm() [5]float64 { return [5]float64{3, 10, 30, 100, 300} }

// evidence are the logarithms of the likelihood ratios, one for each rate.
type evidence [5]float64

func (e *evidence) add(hitTreated bool, treated, control int) {
	if treated == 0 || control == 0 {
		return // nobody to compare with says nothing
	}
	t, c := float64(treated), float64(control)
	p0 := t / (t + c)
	for i, rate := range harm() {
		p := rate * t / (rate*t + c)
		if hitTreated {
			e[i] += math.Log(p / p0)
		} else {
			e[i] += math.Log((1 - p) / (1 - p0))
		}
	}
}

func (e *evidence) mean() float64 {
	top := slices.Max(e[:])
	sum := 0.0
	for _, l := range e {
		sum += math.Exp(l - top)
	}
	return math.Exp(top) * sum / float64(len(e))
}
