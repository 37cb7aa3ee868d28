package rollouts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// checked is a check that is being made or was.
type checked struct {
	revision uint64 // of the document that it is about
	done     chan struct{}
	result   *Check
	epoch    uint64
	undo     uint64
	err      error
}

// check begins or stores the check of a rollout. It takes as long as reading the
// bundle does, beside the rounds: others must not wait for it.
func (r *run) check(ctx context.Context, x *entry) error {
	w := r.state[x.key()]
	if w == nil {
		w = &watched{asks: newProber(r.MayAsk)}
		r.state[x.key()] = w
	}
	if w.check == nil || w.check.revision != x.doc.Revision {
		c := &checked{revision: x.doc.Revision, done: make(chan struct{})}
		w.check = c
		about := *x
		go func() {
			defer close(c.done)
			c.err = r.inspect(ctx, &about, c)
		}()
	}
	c := w.check
	select {
	case <-c.done:
	default:
		return nil // in a later round
	}
	w.check = nil
	if c.err != nil {
		return fmt.Errorf("check: %w", c.err) // and again
	}
	return r.write(ctx, x, func(_ control.Tx, s *Status, a *audit.Record) error {
		s.Check, s.Epoch, s.Undo = c.result, c.epoch, c.undo
		s.Revision++
		a.Reason = "checked"
		if n := len(c.result.Problems); n > 0 {
			a.Reason = fmt.Sprintf("checked: %d problems, first %s", n, c.result.Problems[0].Text)
		}
		return nil
	})
}

// inspect finds what a rollout would do, and what is in its way.
func (e *Engine) inspect(ctx context.Context, x *entry, c *checked) error {
	now := e.Now().UTC()
	out := &Check{At: now.Truncate(time.Second)}
	c.result = out
	w := &watched{}
	if err := e.load(ctx, x, w); err != nil {
		return err
	}
	e.checkRings(x, w, out)
	for i := range x.r.Probes {
		if p := &x.r.Probes[i]; !p.allowed(e.MayAsk) {
			out.add("probe", "probe %s: the server may not ask %s: its operator says which URLs it may, with --probe-url", p.Name, p.URL)
		}
	}
	b, err := loadBundle(ctx, e.Content, x.r.Manifest, now)
	if err != nil {
		return out.problem(err)
	}
	c.epoch = b.manifest.Epoch
	if err := errors.Join(out.fits(x, b, now, "manifest"), e.checkRollback(ctx, x, b, c, now)); err != nil {
		return err
	}
	return e.compareBundles(ctx, x, w, b, out, now)
}

// problem notes an error that what was uploaded is to blame for; others stay
// errors.
func (c *Check) problem(err error) error {
	p, ok := problemOf(err)
	if !ok {
		return err
	}
	c.Problems = append(c.Problems, p)
	return nil
}

func (c *Check) add(code, format string, a ...any) {
	c.Problems = append(c.Problems, Problem{Code: code, Text: fmt.Sprintf(format, a...)})
}

func (e *Engine) checkRings(x *entry, w *watched, out *Check) {
	hosts := candidates(x, w)
	out.Hosts = len(hosts)
	if len(hosts) == 0 {
		out.add("hosts", "no host of %s has the labels that are wanted, or there is none", x.scope())
		return
	}
	plan := x.r.plan(x.r.salt(x.id), x.r.Rings)
	if len(x.r.Rings) == 0 {
		plan.Rings = rollout.Fit(plan.Salt, hosts).Rings
	}
	counts := make([]int, len(plan.Rings))
	place, err := plan.Place(hosts)
	if err != nil {
		out.add("rings", "%v", err)
	}
	for _, ring := range place {
		counts[ring]++
	}
	sum := 0
	for i, r := range rings(&plan) {
		sum += counts[i]
		out.Rings = append(out.Rings, RingCheck{Ring: r, Count: counts[i], Detectable: rollout.Detectable(sum)})
	}
}

// fits says whether a manifest may be used here and now.
func (c *Check) fits(x *entry, b *bundle, now time.Time, what string) error {
	m := b.manifest
	scope, err := resource.ParseID(m.Scope)
	if err != nil {
		return c.problem(err)
	}
	switch {
	case !scope.Contains(x.scope()):
		c.add("scope", "the %s is for hosts below %s, the rollout stands below %s", what, m.Scope, x.scope())
	case now.Before(m.NotBefore):
		c.add("time", "the %s begins at %s", what, m.NotBefore.Format(time.RFC3339))
	case !now.Before(m.NotAfter):
		c.add("time", "the %s ended at %s", what, m.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// checkRollback reads the way back to its end: it must work when it is needed.
func (e *Engine) checkRollback(ctx context.Context, x *entry, b *bundle, c *checked, now time.Time) error {
	if x.r.Rollback == nil {
		return nil
	}
	out := c.result
	back, err := loadBundle(ctx, e.Content, *x.r.Rollback, now)
	if err != nil {
		return out.problem(fmt.Errorf("rollback: %w", err))
	}
	c.undo = back.manifest.Epoch
	switch {
	case back.manifest.Undoes != x.r.Manifest:
		out.add("rollback", "the rollback undoes %s, not this manifest", back.manifest.Undoes)
	case back.manifest.Epoch <= b.manifest.Epoch:
		out.add("rollback", "the rollback is of epoch %d, it must be above %d", back.manifest.Epoch, b.manifest.Epoch)
	}
	if err := b.believes(back); err != nil {
		out.add("rollback", "hosts that have the manifest would not take the rollback: %v", err)
	}
	return out.fits(x, back, now, "rollback")
}

// compareBundles compares with what hosts have, and with what they ran.
func (e *Engine) compareBundles(ctx context.Context, x *entry, w *watched, b *bundle, out *Check, now time.Time) error {
	have := map[integrity.Digest]int{}
	ahead := 0
	for _, h := range w.now {
		if !x.r.selects(h.Labels) || h.Report.Manifest == b.manifest.Digest {
			continue
		}
		if h.Report.Epoch >= b.manifest.Epoch {
			ahead++
		}
		if !h.Report.Manifest.IsZero() {
			have[h.Report.Manifest]++
		}
	}
	if ahead > 0 {
		out.add("epoch", "%d hosts have epoch %d or a later one and would refuse it: sign it again with a higher epoch", ahead, b.manifest.Epoch)
	}
	// the most frequent first
	order := slices.SortedFunc(maps.Keys(have), func(p, q integrity.Digest) int {
		return cmp.Or(have[q]-have[p], strings.Compare(p.String(), q.String()))
	})
	var base *bundle
	for i, d := range order[:min(len(order), maxBases)] {
		old, err := loadBundle(ctx, e.Content, d, now)
		if err != nil {
			if _, fault := problemOf(err); !fault {
				return err
			}
			continue // not known here any more
		}
		if err := old.believes(b); err != nil {
			out.add("untrusted", "%d hosts would refuse it: their policy does not trust who signed it: %v", have[d], err)
		}
		if i == 0 || base == nil {
			base = old
		}
	}
	out.differences(base, b)
	return e.replay(ctx, x, base, b, out, now)
}

// maxBases is how many different manifests in force are looked at.
const maxBases = 8

func (c *Check) differences(base, b *bundle) {
	before := map[integrity.Digest]string{}
	if base != nil {
		c.Base = base.manifest.Digest.String()
		c.Changes = integrity.Diff(base.compiled.Policy, b.compiled.Policy)
		if len(c.Changes) > maxListed {
			c.Changes = c.Changes[:maxListed]
		}
		before = base.releases
	}
	list := func(sign string, in, notIn map[integrity.Digest]string) (n int) {
		for _, d := range slices.SortedFunc(maps.Keys(in), func(p, q integrity.Digest) int {
			return cmp.Or(strings.Compare(in[p], in[q]), strings.Compare(p.String(), q.String()))
		}) {
			if _, both := notIn[d]; both {
				continue
			}
			if n++; len(c.Releases.Names) < maxListed {
				c.Releases.Names = append(c.Releases.Names, sign+" "+in[d])
			}
		}
		return n
	}
	c.Releases.Added = list("+", b.releases, before)
	c.Releases.Removed = list("-", before, b.releases)
}

// replay asks the manifest about everything that was recorded. What ran and
// would be refused must be waived before anybody can approve.
func (e *Engine) replay(ctx context.Context, x *entry, base, b *bundle, out *Check, now time.Time) error {
	if e.Inventory == nil {
		return nil
	}
	items, err := e.Inventory.Inventory(ctx, x.scope(), now.Add(-recorded), 0)
	if err != nil {
		return fmt.Errorf("what-if: %w", err)
	}
	unwaived := 0
	what := &out.WhatIf
	for i := range items {
		f := what.ask(base, b, &items[i], now)
		if f == nil {
			continue
		}
		if i := slices.IndexFunc(x.r.Waive, func(w Waiver) bool { return w.SHA256 == f.SHA256 }); i >= 0 {
			f.Waived = x.r.Waive[i].Reason
		} else {
			unwaived++
		}
		what.Hosts = max(what.Hosts, f.Hosts)
		what.Flips = append(what.Flips, *f)
	}
	slices.SortFunc(what.Flips, func(p, q Flip) int {
		return cmp.Or(strings.Compare(p.Waived, q.Waived), q.Hosts-p.Hosts, strings.Compare(p.Path, q.Path), strings.Compare(p.SHA256.String(), q.SHA256.String()))
	})
	if n := len(what.Flips); n > maxListed {
		what.Flips, what.More = what.Flips[:maxListed], n-maxListed
	}
	if unwaived > 0 {
		f := what.Flips[0]
		out.add("flips", "%d executables that ran would be refused, such as %s on %d hosts: allow them, or waive them with a reason", unwaived, cmp.Or(f.Path, f.SHA256.String()), f.Hosts)
	}
	return nil
}

// recorded is how far back the inventory is asked.
const recorded = 30 * 24 * time.Hour

// ask asks about one executable; nil: it is no flip.
func (what *WhatIf) ask(base, b *bundle, it *fleet.Item, now time.Time) *Flip {
	kind, err := integrity.ParseKind(it.Kind)
	if err != nil || it.SHA256.IsZero() {
		return nil // not about a content, such as memory
	}
	what.Asked++
	after, known := verdict(b, kind, it, now)
	if after.Allow {
		what.Allowed++
		return nil
	}
	before, knew := verdict(base, kind, it, now)
	switch {
	case !known && !knew:
		what.Unknown++
		return nil
	case base != nil && !before.Allow:
		return nil // refused already
	}
	return &Flip{Kind: it.Kind, SHA256: it.SHA256, Path: clip(it.Path, maxText), Hosts: it.Hosts, Reason: after.Reason}
}

// verdict is what a bundle says of a content, and whether it knows it at all.
// The packages of a host are not part of a bundle: that content is of one is
// taken from the host's word, which is good enough for a question.
func verdict(b *bundle, kind integrity.Kind, it *fleet.Item, now time.Time) (v integrity.Verdict, known bool) {
	if b == nil {
		return v, false
	}
	o := b.compiled.Object(kind, integrity.Key{Digest: it.SHA256})
	if from := packageOf(it.Signer); from != nil && len(o.Memberships) == 0 {
		o.Memberships = []integrity.Membership{{
			Origin: from, Kinds: integrity.SetOf(kind), Names: []string{strings.TrimPrefix(it.Path, "/")}, SHA256: it.SHA256,
		}}
	}
	v = b.compiled.Evaluate(&o, now)
	return v, len(o.Memberships) > 0 || v.Allow || v.Rule != ""
}

// packageOf reads how agents name the package that content is of; nil: of none.
func packageOf(signer string) *integrity.Origin {
	text, ok := strings.CutPrefix(signer, "package ")
	what, archive, ok2 := strings.Cut(text, " of archive ")
	name, version, ok3 := strings.Cut(what, " ")
	if !ok || !ok2 || !ok3 || name == "" || archive == "" {
		return nil
	}
	return &integrity.Origin{Package: name, Version: version, Archive: archive}
}
