package rollout_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"ringwall/internal/rollout"
)

func start() time.Time { return time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC) }

// fleet is a simulated fleet of which the first ring hosts have the change.
type fleet struct {
	hosts, ring int
	perDay      float64 // newly affected hosts per host and day, without any change
	loopers     float64 // share of hosts that crash all the time
	broken      float64 // share of the hosts that the change breaks
	first       time.Duration
}

func (f *fleet) subjects(r *rand.Rand, bake time.Duration) []rollout.Subject {
	after := func(mean time.Duration) time.Duration { return time.Duration(r.ExpFloat64() * float64(mean)) }
	out := make([]rollout.Subject, f.hosts)
	for i := range out {
		s := &out[i]
		s.Entered = start()
		if i < f.ring {
			s.Activated = start().Add(time.Duration(r.Int64N(int64(10 * time.Minute))))
		}
		hit := time.Duration(math.MaxInt64)
		if f.perDay > 0 {
			hit = after(time.Duration(float64(24*time.Hour) / f.perDay))
		}
		if r.Float64() < f.loopers {
			hit = min(hit, after(20*time.Minute))
		}
		if i < f.ring && r.Float64() < f.broken {
			hit = min(hit, s.Activated.Sub(start())+after(f.first))
		}
		if hit < bake {
			s.Hit = start().Add(hit)
		}
		if r.Float64() < 0.05 { // goes away at some time
			s.Left = start().Add(time.Duration(r.Int64N(int64(bake))))
		}
	}
	return out
}

// stop is when one who looks after every hit stops, and how many hosts with the
// change were hit by then.
func stop(subjects []rollout.Subject, limit float64) (at time.Duration, hosts int, stopped bool) {
	rollout.Trace(subjects, func(t time.Time, e float64) bool {
		at, stopped = t.Sub(start()), e >= limit
		return !stopped
	})
	for i := range subjects {
		s := &subjects[i]
		if !s.Hit.IsZero() && !s.Activated.IsZero() && !s.Hit.Before(s.Activated) && s.Hit.Sub(start()) <= at {
			hosts++
		}
	}
	return at, hosts, stopped
}

// The chance of stopping a harmless change is bounded over any number of looks.
func TestEvidence_harmless(t *testing.T) {
	runs := 1000
	if testing.Short() {
		runs = 100
	}
	all, total := 0, 0
	for name, f := range map[string]fleet{
		"1 % of the fleet":    {hosts: 2500, ring: 25, perDay: 0.02, loopers: 0.005},
		"a noisy fleet":       {hosts: 2500, ring: 100, perDay: 0.2, loopers: 0.02},
		"a quarter of it":     {hosts: 2000, ring: 500, perDay: 0.02, loopers: 0.005},
		"nearly all of it":    {hosts: 1000, ring: 950, perDay: 0.1, loopers: 0.02},
		"everything crashes":  {hosts: 500, ring: 50, perDay: 24, loopers: 0.5},
		"a fleet of 50 hosts": {hosts: 50, ring: 5, perDay: 0.2, loopers: 0.02},
	} {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			stops := 0
			for range runs {
				if _, _, stopped := stop(f.subjects(r, 24*time.Hour), 1/rollout.DefaultFalseAlarm); stopped {
					stops++
				}
			}
			all, total = all+stops, total+runs
			if stops > 4*runs/1000 { // 1 is expected at most, 5 have a chance of 1:270
				t.Errorf("%d of %d harmless changes were stopped", stops, runs)
			}
		})
	}
	t.Logf("%d of %d harmless changes were stopped", all, total)
	if all*1000 > total {
		t.Errorf("%d of %d harmless changes were stopped, at most 0.1 %% may be", all, total)
	}
}

// A change that breaks 30 % of a ring of 1 % of 10,000 hosts is stopped within
// five hosts, at the 95th percentile.
func TestEvidence_harmful(t *testing.T) {
	runs := 200
	if testing.Short() {
		runs = 30
	}
	f := fleet{hosts: 10_000, ring: 100, perDay: 0.02, loopers: 0.005, broken: 0.3, first: time.Hour}
	r := rand.New(rand.NewPCG(3, 4))
	var hosts []int
	var times []time.Duration
	for range runs {
		at, n, stopped := stop(f.subjects(r, 24*time.Hour), 1/rollout.DefaultFalseAlarm)
		if !stopped {
			t.Fatal("a harmful change was not stopped in 24 hours")
		}
		hosts, times = append(hosts, n), append(times, at)
	}
	slices.Sort(hosts)
	slices.Sort(times)
	p95 := runs * 95 / 100
	t.Logf("stopped after %d hosts (median), %d (p95); %v, %v", hosts[runs/2], hosts[p95], times[runs/2].Round(time.Second), times[p95].Round(time.Second))
	if hosts[p95] > 5 {
		t.Errorf("%d hosts were hit before the stop at the 95th percentile, want at most 5", hosts[p95])
	}
}

func TestEvidence(t *testing.T) {
	at := func(m int) time.Time { return start().Add(time.Duration(m) * time.Minute) }
	control := func(n int) []rollout.Subject {
		out := make([]rollout.Subject, n)
		for i := range out {
			out[i].Entered = start()
		}
		return out
	}
	treated := func(hits ...int) []rollout.Subject {
		out := make([]rollout.Subject, 0, len(hits))
		for _, h := range hits {
			s := rollout.Subject{Entered: start(), Activated: at(1)}
			if h >= 0 {
				s.Hit = at(h)
			}
			out = append(out, s)
		}
		return out
	}
	limit := 1 / rollout.DefaultFalseAlarm
	for name, tc := range map[string]struct {
		subjects []rollout.Subject
		stops    bool
		want     float64 // NaN: do not compare
	}{
		"nothing":                            {nil, false, 1},
		"no hits":                            {append(control(99), treated(-1)...), false, 1},
		"nobody to compare with":             {treated(2, 3, 4, 5), false, 1},
		"one of a hundred":                   {append(control(99), treated(2)...), false, math.NaN()},
		"two of a hundred":                   {append(control(98), treated(2, 3)...), true, math.NaN()},
		"hit at the instant of activation":   {append(control(98), treated(1, 1)...), true, math.NaN()},
		"hit before activation is unchanged": {append(control(98), treated(0, 0)...), false, math.NaN()},
		"had left before it was hit": {append(control(98), rollout.Subject{Entered: start(), Activated: at(1), Left: at(2), Hit: at(3)},
			rollout.Subject{Entered: start(), Activated: at(1), Left: at(2), Hit: at(3)}), false, 1},
		"hit before it entered is out": {append(control(98), rollout.Subject{Entered: at(5), Activated: at(6), Hit: at(1)},
			rollout.Subject{Entered: at(5), Activated: at(6), Hit: at(1)}), false, 1},
	} {
		t.Run(name, func(t *testing.T) {
			got := rollout.Evidence(tc.subjects)
			if (got >= limit) != tc.stops || !math.IsNaN(tc.want) && got != tc.want {
				t.Errorf("evidence %v, stops: %v; want stops: %v, %v", got, got >= limit, tc.stops, tc.want)
			}
		})
	}
}

// A hit of the whole fleet, such as a mirror that is gone, is no evidence.
func TestEvidence_everybodyIsHit(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	f := fleet{hosts: 1000, ring: 100}
	s := f.subjects(r, time.Hour)
	for i := range s {
		s[i].Left = time.Time{}
		s[i].Hit = start().Add(30*time.Minute + time.Duration(r.IntN(int(time.Minute))))
	}
	if e := rollout.Evidence(s); e >= 1/rollout.DefaultFalseAlarm {
		t.Errorf("evidence %v of a fleet-wide event", e)
	}
}

func BenchmarkEvidence_10000(b *testing.B) {
	r := rand.New(rand.NewPCG(7, 8))
	f := fleet{hosts: 10_000, ring: 100, perDay: 0.02, loopers: 0.005}
	s := f.subjects(r, 24*time.Hour)
	for b.Loop() {
		rollout.Evidence(s)
	}
}
