package rollout

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"ringwall/internal/errs"
)

// Plan says how a change goes through the hosts of its scope.
type Plan struct {
	// Salt makes membership independent of other rollouts: without one the same
	// hosts would always be first.
	Salt  string
	Rings []Ring // in order, at least one
	// MaxUnavailable bounds the hosts that have been admitted and have not
	// reported back yet; 0: no bound.
	MaxUnavailable int
	// NoReturn: there is nothing to go back to, harm stops the rollout where it is.
	NoReturn bool
	Limits   Limits
}

// Ring is an ordered part of the hosts.
type Ring struct {
	Name string
	// Percent of the hosts in scope, the rings before included: it grows from
	// ring to ring, and the last has 100.
	Percent float64
	Hosts   []string // ids of members whatever the percentage says
	Bake    Bake
}

// Bake is what a ring must have shown before the next one starts. All of it
// must hold.
type Bake struct {
	Time      time.Duration // since the ring converged
	HostHours float64       // of converged, online hosts
	// Coverage is the share of the next ring's recorded executables, each
	// weighed by its hosts, that this ring has evaluated under the change: 0 to 1.
	Coverage float64
}

// Limits are when a rollout stops.
type Limits struct {
	Converged  float64       // share of online members that must have applied; 0: DefaultConverged
	FlipHosts  int           // distinct hosts with a flip that mean failure; 0: DefaultFlipHosts
	SmallRing  int           // in rings of at most so many hosts one is enough; 0: DefaultSmallRing
	FalseAlarm float64       // chance of stopping a harmless change, over the whole rollout; 0: DefaultFalseAlarm
	ApplyTime  time.Duration // after which an admitted, online host that has not applied is named; 0: DefaultApplyTime
}

// What Limits stand for when they are zero.
const (
	DefaultConverged  = 0.95
	DefaultFlipHosts  = 2
	DefaultSmallRing  = 10
	DefaultFalseAlarm = 0.001
	DefaultApplyTime  = 15 * time.Minute
)

// Default is the plan that a fleet starts with: 1, 5, 25 and 100 percent.
func Default(salt string) Plan {
	return Plan{Salt: salt, Rings: []Ring{
		{Name: "canary", Percent: 1, Bake: Bake{Time: 30 * time.Minute, Coverage: 0.5}},
		{Name: "early", Percent: 5, Bake: Bake{Time: 2 * time.Hour, Coverage: 0.8}},
		{Name: "broad", Percent: 25, Bake: Bake{Time: 4 * time.Hour}},
		{Name: "all", Percent: 100},
	}}
}

// Fit is Default for a fleet of these hosts: rings that would get nobody are left
// out, so that a small fleet has the stages that it has hosts for.
func Fit(salt string, hosts []Host) Plan {
	p := Default(salt)
	place, _ := p.place(hosts)
	used := make([]bool, len(p.Rings))
	for _, r := range place {
		used[r] = true
	}
	rings := p.Rings[:0:0]
	for i, r := range p.Rings {
		if used[i] || i == 0 {
			rings = append(rings, r)
		}
	}
	rings[len(rings)-1].Percent = 100
	p.Rings = rings
	return p
}

// Check says whether a plan makes sense; the error is errs.Invalid and names
// the ring.
func (p *Plan) Check() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("rollout plan: "+format+": %w", append(a, errs.Invalid)...)
	}
	if len(p.Rings) == 0 || len(p.Rings) > 64 {
		return bad("%d rings (1 to 64)", len(p.Rings))
	}
	if p.Salt == "" {
		return bad("no salt: the same hosts would always be first")
	}
	names, members, before := map[string]bool{}, map[string]string{}, 0.0
	for i := range p.Rings {
		r := &p.Rings[i]
		switch {
		case r.Name == "" || names[r.Name]:
			return bad("ring %d has no name of its own", i+1)
		case math.IsNaN(r.Percent) || r.Percent < before || r.Percent > 100:
			return bad("ring %s: percent %v is not between the ring before it (%v) and 100", r.Name, r.Percent, before)
		case r.Percent == before && len(r.Hosts) == 0:
			return bad("ring %s adds no hosts", r.Name)
		case r.Bake.Time < 0 || r.Bake.HostHours < 0 || r.Bake.Coverage < 0 || r.Bake.Coverage > 1:
			return bad("ring %s: bake out of bounds", r.Name)
		}
		for _, h := range r.Hosts {
			if other, ok := members[h]; ok {
				return bad("host %s is in rings %s and %s", h, other, r.Name)
			}
			members[h] = r.Name
		}
		names[r.Name], before = true, r.Percent
	}
	if before != 100 {
		return bad("the last ring ends at %v percent, some hosts would never get the change", before)
	}
	return p.Limits.check(bad)
}

func (l *Limits) check(bad func(string, ...any) error) error {
	switch {
	case l.Converged < 0 || l.Converged > 1 || math.IsNaN(l.Converged):
		return bad("converged %v is no share", l.Converged)
	case l.FalseAlarm < 0 || l.FalseAlarm >= 0.5 || math.IsNaN(l.FalseAlarm):
		return bad("false alarm %v is not below 0.5", l.FalseAlarm)
	case l.FlipHosts < 0 || l.SmallRing < 0 || l.ApplyTime < 0:
		return bad("negative limit")
	}
	return nil
}

// Host is what decides a host's ring.
type Host struct {
	ID string
	// Stratum is what makes hosts alike, such as role, image, kernel and
	// architecture: every stratum has a host in the first ring.
	Stratum string
	// Critical hosts count double: one that a change breaks is enough.
	Critical bool
}

// maxFirsts bounds the hosts that are first for their stratum, as a part of all
// hosts: hosts say themselves what they are, and if all differ they must not all
// be first.
const maxFirsts = 4

// Place gives each host its ring. A host's place depends on its id and the
// salt, so that the choice within a stratum is random and stays when others
// come and go; the host of each stratum that the hash puts first is in the
// first ring in any case, up to a quarter of all hosts. A ring that gets no host is an error: it would prove
// nothing and look like success.
func (p *Plan) Place(hosts []Host) (map[string]int, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	place, err := p.place(hosts)
	if err != nil {
		return nil, err
	}
	count := make([]int, len(p.Rings))
	for _, r := range place {
		count[r]++
	}
	if i := slices.Index(count, 0); i >= 0 {
		return nil, fmt.Errorf("rollout plan: ring %s gets none of %d hosts: give it a larger percentage or name its hosts: %w", p.Rings[i].Name, len(hosts), errs.Invalid)
	}
	return place, nil
}

func (p *Plan) place(hosts []Host) (map[string]int, error) {
	explicit := p.explicit()
	place := make(map[string]int, len(hosts))
	type first struct {
		id string
		at float64
	}
	firsts, covered := map[string]first{}, map[string]bool{}
	for _, h := range hosts {
		if _, twice := place[h.ID]; twice {
			return nil, fmt.Errorf("rollout plan: host %s is there twice: %w", h.ID, errs.Invalid)
		}
		ring := p.ringOf(h.ID, explicit)
		place[h.ID] = ring
		if ring == 0 {
			covered[h.Stratum] = true
		}
		if _, ok := explicit[h.ID]; ok {
			continue
		}
		if at, f := p.point(h.ID), firsts[h.Stratum]; f.id == "" || at < f.at {
			firsts[h.Stratum] = first{h.ID, at}
		}
	}
	missing := make([]first, 0, len(firsts))
	for stratum, f := range firsts {
		if !covered[stratum] {
			missing = append(missing, f)
		}
	}
	slices.SortFunc(missing, func(a, b first) int { return cmp.Compare(a.at, b.at) })
	for _, f := range missing[:min(len(missing), max(1, len(hosts)/maxFirsts))] {
		place[f.id] = 0
	}
	return place, nil
}

// Join is the ring of a host that came after Place: never one before the ring
// that the rollout has reached, so that it is still staged.
func (p *Plan) Join(id string, reached int) int {
	return max(p.ringOf(id, p.explicit()), reached)
}

func (p *Plan) explicit() map[string]int {
	m := map[string]int{}
	for i := range p.Rings {
		for _, h := range p.Rings[i].Hosts {
			m[h] = i
		}
	}
	return m
}

func (p *Plan) ringOf(id string, explicit map[string]int) int {
	if r, ok := explicit[id]; ok {
		return r
	}
	at := p.point(id)
	return slices.IndexFunc(p.Rings, func(r Ring) bool { return at < r.Percent/100 })
}

// point is a host's place between 0 and 1, below 1.
func (p *Plan) point(id string) float64 {
	h := sha256.New()
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(p.Salt))) // no two pairs hash alike
	h.Write(n[:])
	h.Write([]byte(p.Salt))
	h.Write([]byte(id))
	return float64(binary.BigEndian.Uint64(h.Sum(nil))>>11) / (1 << 53)
}

// Detectable is the smallest share of hosts that a change must break so that a
// ring of n hosts has at least one of them with 95 % probability: what the ring
// can see at all. 1 for an empty ring.
func Detectable(n int) float64 {
	if n <= 0 {
		return 1
	}
	return 1 - math.Pow(0.05, 1/float64(n))
}
