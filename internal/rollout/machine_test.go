package rollout_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"ringwall/internal/rollout"
)

func member(id string, ring int, change func(*rollout.Member)) rollout.Member {
	m := rollout.Member{Host: rollout.Host{ID: id}, Ring: ring, Online: true}
	if change != nil {
		change(&m)
	}
	return m
}

// ring makes n members that applied the change at the start.
func ring(n, at int) []rollout.Member {
	out := make([]rollout.Member, n)
	for i := range out {
		out[i] = member(fmt.Sprintf("r%d-%03d", at, i), at, func(m *rollout.Member) { m.Admitted, m.Applied = start(), start() })
	}
	return out
}

func TestJudge(t *testing.T) {
	plan := rollout.Plan{Salt: "s", Rings: []rollout.Ring{
		{Name: "canary", Percent: 5, Bake: rollout.Bake{Time: time.Hour, HostHours: 10, Coverage: 0.5}},
		{Name: "all", Percent: 100},
	}}
	now := start().Add(2 * time.Hour)
	with := func(n int, change func([]rollout.Member)) rollout.View {
		v := rollout.View{Members: append(ring(n, 0), member("later", 1, nil)), Coverage: 0.6}
		change(v.Members)
		return v
	}
	nothing := func([]rollout.Member) {}
	for name, tc := range map[string]struct {
		view   rollout.View
		baking time.Time
		want   rollout.Verdict
		code   string // of the first reason
	}{
		"all is well":      {with(50, nothing), start(), rollout.Pass, ""},
		"has just begun":   {with(50, nothing), now.Add(-time.Minute), rollout.Hold, "baking"},
		"not converged":    {with(50, nothing), time.Time{}, rollout.Hold, "converging"},
		"too little seen":  {rollout.View{Members: ring(50, 0), Coverage: 0.4}, start(), rollout.Hold, "coverage"},
		"too few hours":    {with(3, nothing), start(), rollout.Hold, "host-hours"},
		"one flip of many": {with(50, func(m []rollout.Member) { m[3].Flips = 1 }), start(), rollout.Hold, "flip"},
		"a noisy host is one": {
			with(50, func(m []rollout.Member) { m[3].Flips = 900 }), start(),
			rollout.Hold, "flip",
		},
		"two flips":                {with(50, func(m []rollout.Member) { m[3].Flips, m[4].Flips = 1, 1 }), start(), rollout.Fail, "flips"},
		"a flip of a critical one": {with(50, func(m []rollout.Member) { m[3].Flips, m[3].Critical = 1, true }), start(), rollout.Fail, "flips"},
		"a flip in a small ring":   {with(9, func(m []rollout.Member) { m[3].Flips = 1 }), start(), rollout.Fail, "flips"},
		"a flip of a host that was not asked": {
			with(50, func(m []rollout.Member) { m[50].Flips = 1 }), start(),
			rollout.Pass, "",
		},
		"two hosts went back": {
			with(50, func(m []rollout.Member) { m[3].Refused, m[4].Refused = "sshd is down", "sshd is down" }), start(),
			rollout.Fail, "refused",
		},
		"one of many died": {with(200, func(m []rollout.Member) { m[3].Silent = true }), start(), rollout.Pass, "silent"},
		"one of few died":  {with(8, func(m []rollout.Member) { m[3].Silent = true }), start(), rollout.Hold, "silent"},
		"many died":        {with(50, func(m []rollout.Member) { m[3].Silent, m[4].Silent = true, true }), start(), rollout.Fail, "silent"},
		"others are silent too": {
			rollout.View{Members: with(50, func(m []rollout.Member) { m[3].Silent, m[4].Silent = true, true }).Members, Coverage: 1, Quiet: 0.02},
			start(),
			rollout.Hold, "silent",
		},
		"others are silent, and far fewer": {
			rollout.View{Members: with(50, func(m []rollout.Member) { m[3].Silent, m[4].Silent, m[5].Silent, m[6].Silent = true, true, true, true }).Members, Coverage: 1, Quiet: 0.02},
			start(),
			rollout.Fail, "silent",
		},
		"an open incident":    {rollout.View{Members: ring(50, 0), Coverage: 1, Incidents: []string{"INC-1"}}, start(), rollout.Hold, "incident"},
		"stop the line":       {rollout.View{Members: ring(50, 0), Coverage: 1, Halt: "stopped by ana"}, start(), rollout.Hold, "halted"},
		"frozen":              {rollout.View{Members: ring(50, 0), Coverage: 1, Freeze: "year end"}, start(), rollout.Hold, "frozen"},
		"reports come late":   {rollout.View{Members: ring(50, 0), Coverage: 1, Lag: 10 * time.Minute}, start(), rollout.Hold, "blind"},
		"the server was away": {rollout.View{Members: ring(50, 0), Coverage: 1, Blind: "was away"}, start(), rollout.Hold, "blind"},
		"all went offline since": {
			with(50, func(m []rollout.Member) {
				for i := range m {
					m[i].Online = false
				}
			}), start(),
			rollout.Hold, "nobody",
		},
		"a probe without data":     {rollout.View{Members: ring(50, 0), Coverage: 1, Probes: []rollout.Probe{{Name: "errors"}}}, start(), rollout.Hold, "probe"},
		"no data can be a failure": {rollout.View{Members: ring(50, 0), Coverage: 1, Probes: []rollout.Probe{{Name: "errors", NoData: rollout.Fail}}}, start(), rollout.Fail, "probe"},
		"no data is never success": {rollout.View{Members: ring(50, 0), Coverage: 1, Probes: []rollout.Probe{{Name: "errors", NoData: rollout.Pass}}}, start(), rollout.Hold, "probe"},
		"a probe fails":            {rollout.View{Members: ring(50, 0), Coverage: 1, Probes: []rollout.Probe{{Name: "errors", Answer: rollout.Fail}}}, start(), rollout.Fail, "probe"},
		"a probe passes":           {rollout.View{Members: ring(50, 0), Coverage: 1, Probes: []rollout.Probe{{Name: "errors", Answer: rollout.Pass}}}, start(), rollout.Pass, ""},
		"harm beats everything":    {rollout.View{Members: ring(50, 0), Halt: "stopped", Probes: []rollout.Probe{{Name: "x", Answer: rollout.Fail}}}, time.Time{}, rollout.Fail, "probe"},
	} {
		t.Run(name, func(t *testing.T) {
			j := plan.Judge(0, tc.baking, &tc.view, now)
			code := ""
			if len(j.Reasons) > 0 {
				code = j.Reasons[0].Code
			}
			if j.Verdict != tc.want || code != tc.code {
				t.Errorf("%s (%s), want %s (%s): %+v", j.Verdict, code, tc.want, tc.code, j.Reasons)
			}
		})
	}
}

// world is a fleet with a server that is killed between any two instructions:
// what a step said is done in part, and the stored state may be the old one.
type world struct {
	plan    rollout.Plan
	state   rollout.State // stored
	members []rollout.Member
	halt    string
	now     time.Time
	r       *rand.Rand
	crash   float64

	breaks func(*rollout.Member) // what the change does to a host
}

func newWorld(seed uint64, perRing ...int) *world {
	w := &world{now: start(), r: rand.New(rand.NewPCG(seed, 1)), plan: rollout.Plan{Salt: "s", MaxUnavailable: 4}}
	for i, n := range perRing {
		w.plan.Rings = append(w.plan.Rings, rollout.Ring{
			Name: fmt.Sprint(i), Percent: 100 * float64(i+1) / float64(len(perRing)), Bake: rollout.Bake{Time: 10 * time.Minute},
		})
		for k := range n {
			w.members = append(w.members, member(fmt.Sprintf("%d-%02d", i, k), i, nil))
		}
	}
	w.state = rollout.State{Phase: rollout.Proposed, Approval: &rollout.Approval{Author: "a", Approvers: []string{"b"}}}
	return w
}

// tick is one round of the server, and a minute of the fleet.
func (w *world) tick(t *testing.T) {
	t.Helper()
	killed := func() bool { return w.r.Float64() < w.crash }
	before := w.state
	s := w.plan.Next(w.state, &rollout.View{Members: w.members, Coverage: 1, Halt: w.halt}, w.now)
	again := w.plan.Next(w.state, &rollout.View{Members: w.members, Coverage: 1, Halt: w.halt}, w.now)
	if s.State.Phase != again.State.Phase || !slices.Equal(s.Admit, again.Admit) || !slices.Equal(s.Return, again.Return) {
		t.Fatal("the same input gives another step")
	}
	if !killed() {
		w.state = s.State
		for _, list := range [][]string{s.Admit, s.Return} {
			for _, id := range list {
				if killed() {
					break
				}
				w.offer(t, id, &before, len(s.Return) > 0)
			}
		}
	}
	w.now = w.now.Add(time.Minute)
	for i := range w.members {
		m := &w.members[i]
		m.Online = w.r.Float64() < 0.97
		if m.Online && !m.Admitted.IsZero() && m.Applied.IsZero() && w.r.Float64() < 0.7 {
			m.Applied = w.now
			if w.breaks != nil {
				w.breaks(m)
			}
		}
	}
}

func (w *world) offer(t *testing.T, id string, s *rollout.State, back bool) {
	t.Helper()
	m := &w.members[slices.IndexFunc(w.members, func(m rollout.Member) bool { return m.ID == id })]
	switch {
	case back:
		m.Back = m.Back || m.Online && w.r.Float64() < 0.8
	case m.Ring > s.Ring:
		t.Fatalf("host %s of ring %d is admitted while ring %d is under way", id, m.Ring, s.Ring)
	default:
		m.Admitted = w.now
	}
}

func (w *world) run(t *testing.T, until rollout.Phase) {
	t.Helper()
	for range 3000 {
		was := w.state
		w.tick(t)
		if w.state.Ring < was.Ring || w.state.Ring > was.Ring+1 || w.state.Revision > was.Revision+1 {
			t.Fatalf("from %+v to %+v", was, w.state)
		}
		if w.state.Phase == until {
			return
		}
	}
	t.Fatalf("stays %s in ring %d: %+v", w.state.Phase, w.state.Ring, w.state.Why)
}

func TestNext_completes(t *testing.T) {
	for seed := range uint64(300) {
		w := newWorld(seed, 3, 20, 40)
		w.crash = 0.2
		w.run(t, rollout.Done)
		for i := range w.members {
			if m := &w.members[i]; m.Admitted.IsZero() && m.Online {
				t.Errorf("seed %d: done, and %s was never asked", seed, m.ID)
			}
		}
	}
}

// A change that makes hosts deny what they allowed is stopped in the first
// ring, and every host that has it goes back, wherever the server is killed.
func TestNext_goesBack(t *testing.T) {
	for seed := range uint64(1000) {
		w := newWorld(seed, 3, 20, 40)
		w.crash = 0.3
		w.breaks = func(m *rollout.Member) { m.Flips = 1 }
		w.run(t, rollout.RolledBack)
		for range 200 { // those that were offline come back
			w.tick(t)
		}
		for i := range w.members {
			switch m := &w.members[i]; {
			case m.Ring > 0 && !m.Admitted.IsZero():
				t.Fatalf("seed %d: %s of ring %d got the change", seed, m.ID, m.Ring)
			case !m.Admitted.IsZero() && !m.Back:
				t.Fatalf("seed %d: %s keeps the change", seed, m.ID)
			}
		}
		if len(w.state.Why) == 0 || w.state.Why[0].Code != "flips" {
			t.Fatalf("seed %d: went back because of %+v", seed, w.state.Why)
		}
	}
}

func TestNext_waits(t *testing.T) {
	w := newWorld(1, 2, 2)
	w.state.Approval = nil
	for range 50 {
		w.tick(t)
	}
	if w.state.Phase != rollout.Proposed || w.state.Why[0].Code != "approval" {
		t.Fatalf("without approval: %+v", w.state)
	}
	w.state.Approval = &rollout.Approval{Author: "a", Approvers: []string{"a"}}
	w.tick(t)
	if w.state.Phase != rollout.Proposed {
		t.Fatal("approved by its author")
	}
	w.state.Approval.Approvers = []string{"b"}
	w.halt = "stopped by ana"
	for range 50 {
		w.tick(t)
	}
	for i := range w.members {
		if !w.members[i].Admitted.IsZero() {
			t.Fatal("a host was admitted while the line was stopped")
		}
	}
	w.halt = ""
	w.run(t, rollout.Done)
}

// Nobody who is online means no evidence, and no promotion, for as long as it takes.
func TestNext_nobodyIsOnline(t *testing.T) {
	p := newWorld(1, 2, 2).plan
	s := rollout.State{Phase: rollout.Running}
	v := &rollout.View{Members: []rollout.Member{member("a", 0, func(m *rollout.Member) { m.Online = false }), member("b", 1, nil)}, Coverage: 1}
	for now := start(); now.Before(start().Add(100 * time.Hour)); now = now.Add(time.Hour) {
		step := p.Next(s, v, now)
		if s = step.State; s.Ring != 0 || s.Phase != rollout.Running || !s.Baking.IsZero() || len(step.Admit) > 0 {
			t.Fatalf("%+v", step)
		}
	}
}

func TestNext_emergency(t *testing.T) {
	w := newWorld(1, 2, 2, 30)
	w.plan.MaxUnavailable = 0
	w.state.Approval = &rollout.Approval{Author: "a", Approvers: []string{"b", "c"}, Emergency: true, Reason: "CVE", Until: start().Add(time.Hour)}
	w.tick(t)
	w.tick(t)
	w.tick(t)
	admitted := 0
	for i := range w.members {
		if !w.members[i].Admitted.IsZero() {
			admitted++
		}
	}
	if w.state.Ring != 2 || admitted < 25 {
		t.Errorf("an emergency has reached ring %d and %d hosts after three rounds", w.state.Ring, admitted)
	}
	// Harm stops it all the same.
	w.breaks = func(m *rollout.Member) { m.Refused = "sshd is down" }
	for i := range w.members {
		w.breaks(&w.members[i])
	}
	w.run(t, rollout.RolledBack)
}

// A person lets a ring go on without its bake, never past harm or a halt.
func TestNext_promoted(t *testing.T) {
	p := newWorld(1, 2, 2).plan
	now := start().Add(time.Minute)
	view := func(change func(*rollout.View)) *rollout.View {
		v := &rollout.View{Members: append(ring(20, 0), member("b", 1, nil)), Coverage: 1}
		change(v)
		return v
	}
	for name, tc := range map[string]struct {
		promoted int
		change   func(*rollout.View)
		ring     int
		phase    rollout.Phase
	}{
		"nobody did":        {0, func(*rollout.View) {}, 0, rollout.Running},
		"this ring":         {1, func(*rollout.View) {}, 1, rollout.Running},
		"a ring before":     {2, func(*rollout.View) {}, 0, rollout.Running},
		"past a hold":       {1, func(v *rollout.View) { v.Incidents = []string{"INC-1"} }, 1, rollout.Running},
		"not past a halt":   {1, func(v *rollout.View) { v.Halt = "stopped" }, 0, rollout.Running},
		"not past a freeze": {1, func(v *rollout.View) { v.Freeze = "year end" }, 0, rollout.Running},
		"not past harm": {1, func(v *rollout.View) {
			v.Members[3].Flips, v.Members[4].Flips = 1, 1
		}, 0, rollout.RollingBack},
	} {
		s := rollout.State{Phase: rollout.Running, Baking: start(), Promoted: tc.promoted}
		got := p.Next(s, view(tc.change), now).State
		if got.Ring != tc.ring || got.Phase != tc.phase {
			t.Errorf("%s: ring %d, %s", name, got.Ring, got.Phase)
		}
	}
}

// Without anything to go back to, harm stops a rollout where it is.
func TestNext_noReturn(t *testing.T) {
	w := newWorld(1, 4, 4)
	w.plan.NoReturn = true
	w.breaks = func(m *rollout.Member) { m.Flips = 1 }
	w.run(t, rollout.Stopped)
	before := w.state
	w.tick(t)
	if w.state.Revision != before.Revision || w.state.Why[0].Code != "flips" {
		t.Errorf("%+v", w.state)
	}
	for i := range w.members {
		if w.members[i].Ring == 1 && !w.members[i].Admitted.IsZero() {
			t.Error("a host of the second ring has it")
		}
	}
}

// Who comes after the end gets the change too, unless the line is stopped.
func TestNext_late(t *testing.T) {
	p := newWorld(1, 2, 2).plan
	v := &rollout.View{Members: append(ring(2, 0), member("late", 1, nil))}
	s := rollout.State{Phase: rollout.Done, Ring: 1}
	if got := p.Next(s, v, start()); len(got.Admit) != 1 || got.State.Revision != 0 {
		t.Errorf("%+v", got)
	}
	v.Halt = "stopped"
	if got := p.Next(s, v, start()); len(got.Admit) != 0 {
		t.Errorf("%+v", got)
	}
}
