package rollouts

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Rollout is what the document of a rollout holds. It stands below the scope
// whose hosts it is for.
type Rollout struct {
	Spec
	// Status is the server's. What a client sends here is ignored if it is what
	// the client read, and refused otherwise.
	Status *Status `json:"status,omitempty"`
}

// Spec is what people write.
type Spec struct {
	Manifest integrity.Digest `json:"manifest"` // SHA-256 of the signed manifest
	// Rollback undoes Manifest: the content before, under a higher epoch. Without
	// one, harm stops the rollout and hosts keep the change: NoRollback says that
	// this is meant, and whoever approves says so too.
	Rollback   *integrity.Digest `json:"rollback,omitempty"`
	NoRollback bool              `json:"no_rollback,omitempty"`
	Reason     string            `json:"reason,omitempty"` // for people
	// Selector takes part of the scope's hosts: those that have all these labels.
	Selector map[string]string `json:"selector,omitempty"`
	// Rings are the stages; empty: as many of the usual ones as the fleet has
	// hosts for.
	Rings          []Ring     `json:"rings,omitempty"`
	MaxUnavailable int        `json:"max_unavailable,omitempty"` // hosts at a time; 0: no bound
	Limits         *Limits    `json:"limits,omitempty"`
	Probes         []Probe    `json:"probes,omitempty"`
	Waive          []Waiver   `json:"waive,omitempty"`
	Emergency      *Emergency `json:"emergency,omitempty"`
}

// Ring is a stage; see rollout.Ring.
type Ring struct {
	Name    string   `json:"name"`
	Percent float64  `json:"percent"`
	Hosts   []string `json:"hosts,omitempty"` // ids
	Bake    Bake     `json:"bake,omitzero"`
}

// Bake is what a ring must have shown; see rollout.Bake.
type Bake struct {
	Time      Duration `json:"time,omitempty"`
	HostHours float64  `json:"host_hours,omitempty"`
	Coverage  float64  `json:"coverage,omitempty"`
}

// Limits are when a rollout stops; zero is the rule's default, see rollout.Limits.
type Limits struct {
	Converged  float64  `json:"converged,omitempty"`
	FlipHosts  int      `json:"flip_hosts,omitempty"`
	SmallRing  int      `json:"small_ring,omitempty"`
	FalseAlarm float64  `json:"false_alarm,omitempty"`
	ApplyTime  Duration `json:"apply_time,omitempty"`
}

// Waiver says that a content may be refused from now on although it ran.
type Waiver struct {
	SHA256 integrity.Digest `json:"sha256"`
	Reason string           `json:"reason"`
}

// Emergency collapses rings and bake. It takes two approvers.
type Emergency struct {
	Reason string    `json:"reason"`
	Until  time.Time `json:"until"`
}

// Status is where a rollout stands.
type Status struct {
	rollout.State
	Author string    `json:"author,omitempty"` // object id of who started it
	Begun  time.Time `json:"begun,omitzero"`   // approved, and hosts were placed
	Paused string    `json:"paused,omitempty"` // why, by whom
	Check  *Check    `json:"check,omitempty"`  // nil: not checked yet
	Epoch  uint64    `json:"epoch,omitempty"`  // of the manifest
	Undo   uint64    `json:"undo_epoch,omitempty"`
	// Over: nothing of it is left to do, and its hosts are forgotten.
	Over  bool           `json:"over,omitempty"`
	Final []RingProgress `json:"final,omitempty"` // counts of the hosts that were forgotten
}

// Bounds of a document.
const (
	maxSelector = 20
	maxProbes   = 10
	maxWaivers  = 1000
	maxText     = 2000 // bytes of a reason
	maxNamed    = 50_000
)

// parse reads a document strictly; the error is errs.Invalid.
func parse(d *resource.Document) (*Rollout, error) {
	var r Rollout
	if err := strict(d.Properties, &r); err != nil {
		return nil, fmt.Errorf("rollout: %w", err)
	}
	if r.Status == nil {
		r.Status = &Status{State: rollout.State{Phase: rollout.Draft}}
	}
	return &r, nil
}

func (r *Rollout) store(d *resource.Document) error {
	b, err := json.Marshal(r)
	d.Properties = b
	return err
}

// strict reads JSON without unknown fields or anything behind it.
func strict(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if len(bytes.TrimSpace(b[dec.InputOffset():])) > 0 {
		return fmt.Errorf("goes on after its end: %w", errs.Invalid)
	}
	return nil
}

func invalid(format string, a ...any) error {
	return fmt.Errorf(format+": %w", append(a, errs.Invalid)...)
}

// check says whether a spec makes sense by itself.
func (s *Spec) check() error {
	switch {
	case s.Manifest.IsZero():
		return invalid("rollout: manifest is missing")
	case s.Rollback == nil && !s.NoRollback:
		return invalid("rollout: no rollback: make one with the bundle (--previous), or say no_rollback")
	case s.Rollback != nil && (s.NoRollback || s.Rollback.IsZero() || *s.Rollback == s.Manifest):
		return invalid("rollout: rollback is no other manifest, or no_rollback contradicts it")
	case len(s.Selector) > maxSelector || len(s.Probes) > maxProbes || len(s.Waive) > maxWaivers || len(s.Reason) > maxText:
		return invalid("rollout: more than %d labels, %d probes, %d waivers or %d bytes of reason", maxSelector, maxProbes, maxWaivers, maxText)
	case s.MaxUnavailable < 0:
		return invalid("rollout: max_unavailable is negative")
	}
	for i := range s.Waive {
		if w := &s.Waive[i]; w.SHA256.IsZero() || w.Reason == "" || len(w.Reason) > maxText {
			return invalid("rollout: a waiver has a sha256 and a reason")
		}
	}
	if e := s.Emergency; e != nil && (e.Reason == "" || len(e.Reason) > maxText || e.Until.IsZero()) {
		return invalid("rollout: an emergency has a reason and an end")
	}
	for i := range s.Probes {
		if err := s.Probes[i].check(); err != nil {
			return err
		}
	}
	named := 0
	for i := range s.Rings {
		named += len(s.Rings[i].Hosts)
	}
	if named > maxNamed {
		return invalid("rollout: %d hosts by name (at most %d)", named, maxNamed)
	}
	if len(s.Rings) == 0 {
		return nil
	}
	p := s.plan("s", s.Rings)
	return p.Check()
}

// plan is the spec with these rings, for the rules.
func (s *Spec) plan(salt string, rings []Ring) rollout.Plan {
	p := rollout.Plan{Salt: salt, MaxUnavailable: s.MaxUnavailable, NoReturn: s.Rollback == nil}
	for i := range rings {
		r := &rings[i]
		p.Rings = append(p.Rings, rollout.Ring{Name: r.Name, Percent: r.Percent, Hosts: r.Hosts, Bake: rollout.Bake{
			Time: time.Duration(r.Bake.Time), HostHours: r.Bake.HostHours, Coverage: r.Bake.Coverage,
		}})
	}
	if l := s.Limits; l != nil {
		p.Limits = rollout.Limits{
			Converged: l.Converged, FlipHosts: l.FlipHosts, SmallRing: l.SmallRing, FalseAlarm: l.FalseAlarm, ApplyTime: time.Duration(l.ApplyTime),
		}
	}
	return p
}

// rings are a plan's, as documents say it.
func rings(p *rollout.Plan) []Ring {
	out := make([]Ring, len(p.Rings))
	for i := range p.Rings {
		r := &p.Rings[i]
		out[i] = Ring{Name: r.Name, Percent: r.Percent, Hosts: r.Hosts, Bake: Bake{Time: Duration(r.Bake.Time), HostHours: r.Bake.HostHours, Coverage: r.Bake.Coverage}}
	}
	return out
}

// salt makes membership independent of other rollouts, and the same for one
// manifest in one rollout however often it is planned.
func (s *Spec) salt(id resource.ID) string { return id.Key() + " " + s.Manifest.String() }

// selects says whether a host has the labels.
func (s *Spec) selects(labels map[string]string) bool {
	for k, v := range s.Selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// equal compares what people wrote, in the one form that it is stored in.
func (s *Spec) equal(o *Spec) bool {
	a, errA := json.Marshal(s)
	b, errB := json.Marshal(o)
	return errA == nil && errB == nil && bytes.Equal(a, b)
}

// Duration is written as Go writes it, such as "1h30m"; a number is seconds.
type Duration time.Duration

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return json.Marshal(s)
}

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &text); err == nil {
		v, err := time.ParseDuration(text)
		if err != nil {
			return invalid("duration %.40q (want such as 30m or 1h30m)", text)
		}
		*d = Duration(v)
		return nil
	}
	var seconds float64
	if err := json.Unmarshal(b, &seconds); err != nil || math.Abs(seconds) > 1e9 {
		return invalid("duration %.40q (want such as \"30m\")", b)
	}
	*d = Duration(seconds * float64(time.Second))
	return nil
}

// overlaps says whether two scopes can share hosts.
func overlaps(a, b resource.ID) bool { return a.Contains(b) || b.Contains(a) }

// effective is the highest epoch that the rollout gives its hosts.
func (s *Status) effective() uint64 {
	switch s.Phase {
	case rollout.RollingBack, rollout.RolledBack:
		return cmp.Or(s.Undo, s.Epoch)
	}
	return s.Epoch
}
