package csv

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Bounds of recorded executions.
const (
	maxUseLine  = 1 << 20
	maxUses     = 4 << 20 // distinct
	maxUsePaths = 16
)

// Use is content that ran, or that was to run: what, as what, and where.
type Use struct {
	Key   integrity.Key
	Kind  integrity.Kind
	Paths []string // some of the names that it was seen under
	Count int      // how often
	Hosts int      // on how many hosts; 0: not recorded
}

// Uses collects recorded executions, each content and kind once.
type Uses struct {
	at    map[useKey]*use
	order []useKey
	// Skipped counts records that are not about a content, by reason.
	Skipped map[string]int
}

type useKey struct {
	key  integrity.Key
	kind integrity.Kind
}

type use struct {
	paths []string
	count int
	hosts map[string]bool
}

// NewUses returns an empty collection.
func NewUses() *Uses { return &Uses{at: map[useKey]*use{}, Skipped: map[string]int{}} }

// Add notes a use. Past the bound it is errs.Invalid.
func (u *Uses) Add(k integrity.Key, kind integrity.Kind, path, host string, count int) error {
	at := useKey{k, kind}
	x := u.at[at]
	if x == nil {
		if len(u.order) == maxUses {
			return fmt.Errorf("more than %d different executions: %w", maxUses, errs.Invalid)
		}
		x = &use{}
		u.at[at] = x
		u.order = append(u.order, at)
	}
	x.count += max(count, 1)
	if path != "" && len(x.paths) < maxUsePaths && !slices.Contains(x.paths, path) {
		x.paths = append(x.paths, path)
	}
	if host != "" {
		if x.hosts == nil {
			x.hosts = map[string]bool{}
		}
		x.hosts[host] = true
	}
	return nil
}

// all lists the uses in order of their first paths.
func (u *Uses) all() []Use {
	out := make([]Use, 0, len(u.order))
	for _, at := range u.order {
		x := u.at[at]
		out = append(out, Use{Key: at.key, Kind: at.kind, Paths: slices.Sorted(slices.Values(x.paths)), Count: x.count, Hosts: len(x.hosts)})
	}
	return out
}

// useRecord is what matters here of a line of an event log.
type useRecord struct {
	Type   string `json:"type"`
	Reason string `json:"reason"`
	Host   string `json:"host"`
	Kind   string `json:"kind"`
	Path   string `json:"path"`
	Digest string `json:"digest"`
	Count  int    `json:"count"`
}

// ReadEvents adds the records of an event log, JSON lines as `ringwall events
// --output json` prints them. Fields that this version does not know are left
// alone; a line that is no record is errs.Invalid with its number.
func (u *Uses) ReadEvents(r io.Reader) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 64<<10), maxUseLine)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" {
			continue
		}
		var e useRecord
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return fmt.Errorf("events: line %d: %w: %w", n, err, errs.Invalid)
		}
		kind, err := integrity.ParseKind(e.Kind)
		key, err2 := integrity.ParseKey(e.Digest)
		if err != nil || err2 != nil {
			// Memory, ptrace, notices and gaps are not about a content.
			u.Skipped[cmp.Or(e.Reason, e.Type, "unknown")] += max(e.Count, 1)
			continue
		}
		if err := u.Add(key, kind, e.Path, e.Host, e.Count); err != nil {
			return fmt.Errorf("events: line %d: %w", n, err)
		}
	}
	if err := sc.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("a line of more than %d bytes: %w", maxUseLine, errs.Invalid)
		}
		return fmt.Errorf("events: %w", err)
	}
	return nil
}

// Flip is a use that two policies decide differently.
type Flip struct {
	Kind    string   `json:"kind"`
	Digest  string   `json:"digest"`
	Paths   []string `json:"paths"`
	Count   int      `json:"count"`
	Hosts   int      `json:"hosts"`
	OldRule string   `json:"old_rule"` // that allowed it, or denied it
	NewRule string   `json:"new_rule"`
	Reason  string   `json:"reason"` // of the new policy
	Effect  string   `json:"effect"` // blocked or logged; runs for what is newly allowed
}

// Change is what a change of a policy does to recorded executions.
type Change struct {
	Old     string         `json:"old"`
	New     string         `json:"new"`
	Asked   int            `json:"asked"`
	Blocked []Flip         `json:"blocked"` // allowed by the old one, refused by the new
	Allowed []Flip         `json:"allowed"` // the other way round
	Both    int            `json:"refused_by_both"`
	Skipped map[string]int `json:"skipped,omitempty"`
}

// Compare judges every use under two policies.
func (u *Uses) Compare(before, after *integrity.Compiled, now time.Time) *Change {
	label := func(p *integrity.Policy) string { return fmt.Sprintf("%s %d", p.Name, p.Epoch) }
	out := &Change{Old: label(before.Policy), New: label(after.Policy), Blocked: []Flip{}, Allowed: []Flip{}, Skipped: u.Skipped}
	for _, x := range u.all() {
		out.Asked++
		a, b := judgeUse(before, x, now), judgeUse(after, x, now)
		if !a.Allow && !b.Allow {
			out.Both++
		}
		if a.Allow == b.Allow {
			continue
		}
		f := Flip{
			Kind: x.Kind.String(), Digest: x.Key.String(), Paths: x.Paths, Count: x.Count, Hosts: x.Hosts,
			OldRule: a.Rule, NewRule: b.Rule, Reason: b.Reason, Effect: "runs",
		}
		if f.Paths == nil {
			f.Paths = []string{}
		}
		if b.Allow {
			out.Allowed = append(out.Allowed, f)
			continue
		}
		switch b.Mode {
		case integrity.ModeEnforce:
			f.Effect = "blocked"
		case integrity.ModeAudit:
			f.Effect = "logged"
		default:
			continue // the new policy does not look
		}
		out.Blocked = append(out.Blocked, f)
	}
	worst := func(a, b Flip) int {
		return cmp.Or(strings.Compare(a.Effect, b.Effect), b.Hosts-a.Hosts, b.Count-a.Count, slices.Compare(a.Paths, b.Paths), strings.Compare(a.Digest, b.Digest))
	}
	slices.SortFunc(out.Blocked, worst)
	slices.SortFunc(out.Allowed, worst)
	return out
}

func judgeUse(c *integrity.Compiled, x Use, now time.Time) integrity.Verdict {
	o := c.Object(x.Kind, x.Key)
	v := c.Evaluate(&o, now)
	if v.Mode == integrity.ModeOff {
		v.Allow = true // it runs
	}
	return v
}
