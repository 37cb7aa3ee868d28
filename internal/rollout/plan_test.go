package rollout_test

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/rollout"
)

func hosts(n int, stratum string) []rollout.Host {
	out := make([]rollout.Host, n)
	for i := range out {
		out[i] = rollout.Host{ID: fmt.Sprintf("%s-%04d", stratum, i), Stratum: stratum}
	}
	return out
}

func TestPlan_check(t *testing.T) {
	plan := func(rings ...rollout.Ring) rollout.Plan { return rollout.Plan{Salt: "s", Rings: rings} }
	ring := func(name string, percent float64, hosts ...string) rollout.Ring {
		return rollout.Ring{Name: name, Percent: percent, Hosts: hosts}
	}
	for name, tc := range map[string]struct {
		plan rollout.Plan
		want string // in the error; "" for none
	}{
		"default":            {rollout.Default("s"), ""},
		"hosts by name only": {plan(ring("canary", 0, "a"), ring("all", 100)), ""},
		"no rings":           {plan(), "0 rings"},
		"no salt":            {rollout.Plan{Rings: []rollout.Ring{ring("all", 100)}}, "no salt"},
		"unnamed":            {plan(ring("", 100)), "no name of its own"},
		"same name":          {plan(ring("a", 1), ring("a", 100)), "no name of its own"},
		"shrinks":            {plan(ring("a", 50), ring("b", 10), ring("c", 100)), "percent 10 is not between"},
		"adds nothing":       {plan(ring("a", 50), ring("b", 50), ring("c", 100)), "adds no hosts"},
		"too much":           {plan(ring("a", 101)), "percent 101"},
		"not a number":       {plan(ring("a", math.NaN())), "percent NaN"},
		"ends early":         {plan(ring("a", 99)), "some hosts would never get the change"},
		"a host twice":       {plan(ring("a", 1, "x"), ring("b", 100, "x")), "host x is in rings a and b"},
		"negative bake":      {plan(rollout.Ring{Name: "a", Percent: 100, Bake: rollout.Bake{Time: -1}}), "bake out of bounds"},
		"coverage above one": {plan(rollout.Ring{Name: "a", Percent: 100, Bake: rollout.Bake{Coverage: 1.1}}), "bake out of bounds"},
		"false alarm": {
			rollout.Plan{Salt: "s", Rings: []rollout.Ring{ring("a", 100)}, Limits: rollout.Limits{FalseAlarm: 0.9}},
			"false alarm 0.9",
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.plan.Check()
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (!errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestPlan_place(t *testing.T) {
	p := rollout.Default("salt")
	fleet := append(hosts(5000, "web"), hosts(3, "db")...)
	place, err := p.Place(fleet)
	if err != nil {
		t.Fatal(err)
	}
	count := map[int]int{}
	dbFirst := 0
	for h, r := range place {
		count[r]++
		if strings.HasPrefix(h, "db") && r == 0 {
			dbFirst++
		}
	}
	for ring, want := range []float64{50, 200, 1000, 3750} {
		if got := float64(count[ring]); math.Abs(got-want) > 4*math.Sqrt(want) {
			t.Errorf("ring %d has %v hosts, about %v are wanted", ring, got, want)
		}
	}
	if dbFirst == 0 {
		t.Error("a small stratum has no host in the first ring")
	}
	// Others coming and going move nobody but a stratum's first.
	fewer, err := p.Place(fleet[:4000])
	if err != nil {
		t.Fatal(err)
	}
	for h, r := range fewer {
		if place[h] != r {
			t.Errorf("host %s moved from ring %d to %d", h, place[h], r)
		}
	}
	// Another rollout begins with others.
	other := rollout.Default("another")
	again, err := other.Place(fleet)
	if err != nil {
		t.Fatal(err)
	}
	if maps.Equal(place, again) {
		t.Error("the same hosts are first in every rollout")
	}
	if got := p.Join("web-0001", 2); got < 2 {
		t.Errorf("a host that joins is in ring %d, ahead of the rollout", got)
	}
}

func TestPlan_placeRefuses(t *testing.T) {
	p := rollout.Default("s")
	if _, err := p.Place(nil); !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "canary gets none of 0") {
		t.Errorf("an empty ring: %v", err)
	}
	if _, err := p.Place(append(hosts(500, "a"), hosts(1, "a")...)); !errors.Is(err, errs.Invalid) {
		t.Errorf("a host twice: %v", err)
	}
	p = rollout.Plan{Salt: "s", Rings: []rollout.Ring{{Name: "lab", Hosts: []string{"a-0007"}}, {Name: "all", Percent: 100}}}
	place, err := p.Place(hosts(10, "a"))
	if err != nil || place["a-0007"] != 0 {
		t.Errorf("explicit member: %v, %v", place, err)
	}
}

// Hosts that all differ are not all first.
func TestPlan_placeStrata(t *testing.T) {
	p := rollout.Plan{Salt: "s", Rings: []rollout.Ring{{Name: "canary", Percent: 0.001}, {Name: "all", Percent: 100}}}
	var fleet []rollout.Host
	for i := range 40 {
		fleet = append(fleet, hosts(1, fmt.Sprint("kind", i))...)
	}
	place, err := p.Place(fleet)
	if err != nil {
		t.Fatal(err)
	}
	first := 0
	for _, r := range place {
		if r == 0 {
			first++
		}
	}
	if first != 10 {
		t.Errorf("%d of 40 hosts are first, want a quarter", first)
	}
}

// The plan that is made for a fleet has no ring without hosts, whatever its size.
func TestFit(t *testing.T) {
	for _, n := range []int{1, 2, 3, 5, 10, 50, 200, 5000} {
		for _, salt := range []string{"a", "b", "c", "d"} {
			p := rollout.Fit(salt, hosts(n, "web"))
			place, err := p.Place(hosts(n, "web"))
			if err != nil {
				t.Fatalf("%d hosts: %v: %+v", n, err, p.Rings)
			}
			first := 0
			for _, r := range place {
				if r == 0 {
					first++
				}
			}
			if n > 3 && first > n/2 {
				t.Errorf("%d of %d hosts are first", first, n)
			}
			if n == 5000 && len(p.Rings) != 4 {
				t.Errorf("a large fleet has %d rings", len(p.Rings))
			}
		}
	}
}

func TestDetectable(t *testing.T) {
	for n, want := range map[int]float64{0: 1, 1: 0.95, 10: 0.259, 59: 0.05, 299: 0.01} {
		if got := rollout.Detectable(n); math.Abs(got-want) > 0.001 {
			t.Errorf("a ring of %d sees %v, want %v", n, got, want)
		}
	}
}

func TestApproval(t *testing.T) {
	now := start()
	later := now.Add(time.Hour)
	for name, tc := range map[string]struct {
		a    rollout.Approval
		want error
	}{
		"good":                   {rollout.Approval{Author: "a", Approvers: []string{"b"}}, nil},
		"nobody":                 {rollout.Approval{Author: "a"}, errs.Invalid},
		"author":                 {rollout.Approval{Author: "a", Approvers: []string{"b", "a"}}, errs.Denied},
		"emergency":              {rollout.Approval{Author: "a", Approvers: []string{"b", "c"}, Emergency: true, Reason: "r", Until: later}, nil},
		"emergency by one":       {rollout.Approval{Author: "a", Approvers: []string{"b", "b"}, Emergency: true, Reason: "r", Until: later}, errs.Denied},
		"emergency, no reason":   {rollout.Approval{Author: "a", Approvers: []string{"b", "c"}, Emergency: true, Until: later}, errs.Invalid},
		"emergency without end":  {rollout.Approval{Author: "a", Approvers: []string{"b", "c"}, Emergency: true, Reason: "r"}, errs.Invalid},
		"emergency that is over": {rollout.Approval{Author: "a", Approvers: []string{"b", "c"}, Emergency: true, Reason: "r", Until: now}, errs.Invalid},
	} {
		if err := tc.a.Check(now); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}
