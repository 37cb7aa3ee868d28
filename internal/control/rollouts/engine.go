package rollouts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Lease is the name of the lease under which the engine runs.
const Lease = "rollouts"

// Options are what the engine works with. Inventory and Incidents may be nil:
// then nothing is known of them, and a ring that wants coverage holds.
type Options struct {
	Door      *control.Door
	Store     control.Store // of the door, for what is remembered of hosts
	Fleet     Fleet
	Content   Content
	Inventory Inventory
	Incidents Incidents
	Log       *slog.Logger
	Now       func() time.Time
	// Offline is how long a host may be silent before it counts as gone; zero
	// is ten minutes.
	Offline time.Duration
	// Page tells whoever is on call of a rollout that waits or stopped for
	// something that an engineer must know; it may be told the same again. nil:
	// nobody. Flips are not told: the blocks that they are open incidents.
	Page func(ctx context.Context, id resource.ID, r rollout.Reason)
	// MayAsk says which URLs probes may ask; nil: none.
	MayAsk func(*url.URL) bool
	// Round is the pause between two looks; zero is a second.
	Round time.Duration
}

// Heartbeat is how often a host is heard of at least.
const Heartbeat = 30 * time.Second

// Engine moves rollouts. Progress and Blocks may be used by any replica; Run is
// for the holder of the lease.
type Engine struct {
	Options
	self control.Actor
}

// New returns an engine.
func New(o Options) *Engine {
	if o.Offline == 0 {
		o.Offline = 10 * time.Minute
	}
	if o.Round == 0 {
		o.Round = time.Second
	}
	return &Engine{Options: o, self: control.Engine("rollouts", fleet.TypeRollout+"/advance/action", fleet.TypeRollout+"/admit/action")}
}

// Run moves rollouts until ctx ends, as the holder of a lease. It stops with the
// error of a write that was refused because the lease is gone.
func (e *Engine) Run(ctx context.Context, f control.Fence) error {
	r := e.newRun(f)
	for {
		r.moved = false
		if err := r.round(ctx); err != nil && ctx.Err() == nil {
			e.Log.WarnContext(ctx, "rollouts_round_failed", slog.Any("error", err))
		}
		if err := r.rest(ctx); err != nil {
			return err
		}
	}
}

// Pauses of the engine.
const (
	soon = 50 * time.Millisecond  // after a round in which something happened
	peek = 200 * time.Millisecond // between two looks whether people did something
)

// rest waits for the next round, which comes at once when people changed a
// rollout or a halt, or a check is done.
func (r *run) rest(ctx context.Context) error {
	wait := func(d time.Duration) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
	if r.moved {
		return wait(min(soon, r.Round)) // what follows from it
	}
	for end := time.Now().Add(r.Round); ; {
		left := time.Until(end)
		if left <= 0 {
			return nil
		}
		if err := wait(min(peek, left)); err != nil {
			return err
		}
		if r.news(ctx) || r.checkDone() {
			return nil
		}
	}
}

func (r *run) checkDone() bool {
	for _, w := range r.state {
		if w.check == nil {
			continue
		}
		select {
		case <-w.check.done:
			return true
		default:
		}
	}
	return false
}

// news says whether a rollout or a halt was written since it was asked last. It
// is for speed only: what cannot be read is found in the next round.
func (r *run) news(ctx context.Context) (found bool) {
	const many = 200
	err := r.Store.Read(ctx, func(tx control.Tx) error {
		found = false
		changes, err := tx.Changes(ctx, r.peeked, many)
		if err != nil {
			return err
		}
		found = len(changes) == many
		for i := range changes {
			r.peeked = changes[i].Revision
			kind := changes[i].Document.Type
			found = found || strings.EqualFold(kind, fleet.TypeRollout) || strings.EqualFold(kind, fleet.TypeHalt)
		}
		return nil
	})
	return err == nil && found
}

// run is one holding of the lease. What it keeps in memory is either read from
// the store or can be lost.
type run struct {
	*Engine
	fence control.Fence
	since time.Time // of the holding
	door  *control.Door
	store control.Store

	revision uint64 // of the tree, when the documents were read
	peeked   uint64 // of the tree, see news
	docs     []entry
	state    map[string]*watched // by key of the rollout
	moved    bool                // a write in this round
	signals  []fleet.Signal      // newer than heard
	heard    time.Time
}

// entry is a rollout as it is stored.
type entry struct {
	id  resource.ID
	doc resource.Document
	r   *Rollout
}

func (x *entry) key() string             { return x.id.Key() }
func (x *entry) scope() resource.ID      { return x.id.Parent() }
func (x *entry) plan() rollout.Plan      { return x.r.plan(x.r.salt(x.id), x.r.Status.rings()) }
func (x *entry) phase() rollout.Phase    { return x.r.Status.Phase }
func (x *entry) at(p rollout.Phase) bool { return x.phase() == p }

func (e *Engine) newRun(f control.Fence) *run {
	return &run{Engine: e, fence: f, door: e.Door.Under(f), store: f.Store(e.Store), state: map[string]*watched{}, since: e.Now()}
}

// round looks at every rollout once. One that fails does not keep the others.
func (r *run) round(ctx context.Context) error {
	if err := r.read(ctx); err != nil {
		return err
	}
	failed := []error{r.listen(ctx)}
	live := map[string]bool{}
	docs := r.docs // a write forgets them
	for i := range docs {
		x := &docs[i]
		if x.at(rollout.Draft) || x.r.Status.Over {
			continue
		}
		live[x.key()] = true
		if err := r.move(ctx, x); err != nil {
			delete(r.state, x.key()) // read it anew
			failed = append(failed, fmt.Errorf("%s: %w", x.id, err))
		}
	}
	for key := range r.state {
		if !live[key] {
			delete(r.state, key)
		}
	}
	failed = append(failed, r.read(ctx), r.give(ctx))
	return errors.Join(failed...)
}

// listen reads the signals of all replicas that came since the last round, and
// some of before: what was stored late is not missed, and what was seen is a hit
// already.
func (r *run) listen(ctx context.Context) error {
	if r.heard.IsZero() {
		r.heard = r.Now().Add(-heardBefore)
	}
	got, err := r.Fleet.Signals(ctx, r.heard.Add(-storedLate))
	if err != nil {
		return err
	}
	r.signals = got
	for i := range got {
		if got[i].At.After(r.heard) {
			r.heard = got[i].At
		}
	}
	return nil
}

const (
	heardBefore = time.Hour // how far back a new holder of the lease listens
	storedLate  = 10 * time.Second
)

// read reads the documents if the tree changed. A document that cannot be read
// is left alone, and said.
func (r *run) read(ctx context.Context) error {
	return r.store.Read(ctx, func(tx control.Tx) error {
		now, err := tx.Revision(ctx)
		if err != nil || now == r.revision && r.docs != nil {
			return err
		}
		docs := []entry{}
		err = each(ctx, tx, fleet.TypeRollout, func(d *resource.Document) error {
			parsed, err := parse(d)
			if err != nil {
				r.Log.ErrorContext(ctx, "rollout_unreadable", slog.String("rollout", d.ID.String()), slog.Any("error", err))
				return nil
			}
			docs = append(docs, entry{id: d.ID, doc: *d, r: parsed})
			return nil
		})
		if err == nil {
			r.docs, r.revision, r.peeked = docs, now, now
		}
		return err
	})
}

// move makes at most one transition of a rollout.
func (r *run) move(ctx context.Context, x *entry) error {
	now := r.Now().UTC()
	switch {
	case x.at(rollout.Proposed) && x.r.Status.Check == nil:
		return r.check(ctx, x)
	case x.at(rollout.Proposed) && len(x.r.Status.Check.Problems) > 0:
		return nil // a person has to change it
	}
	w, err := r.watch(ctx, x)
	if err != nil {
		return err
	}
	if x.at(rollout.Stopped) {
		return r.end(ctx, x)
	}
	if err := r.observe(ctx, x, w, now); err != nil {
		return err
	}
	view, err := r.view(ctx, x, w, now)
	if err != nil {
		return err
	}
	plan := x.plan()
	step := plan.Next(x.r.Status.State, view, now)
	w.step = step
	r.page(ctx, x, w)
	switch {
	case step.State.Revision != x.r.Status.Revision:
		return r.advance(ctx, x, w, step.State, now)
	case len(step.Admit) > 0:
		return r.admit(ctx, x, w, step.Admit, now)
	case x.at(rollout.RolledBack) && len(step.Return) == 0:
		return r.end(ctx, x)
	case x.at(rollout.Done) && r.superseded(x):
		return r.end(ctx, x)
	}
	return nil
}

// page tells people what they have not been told yet.
func (r *run) page(ctx context.Context, x *entry, w *watched) {
	for _, why := range w.step.Judgement.Reasons {
		if r.Page == nil || !why.Page || strings.HasPrefix(why.Code, "flip") || w.paged[why.Code] {
			continue
		}
		if w.paged == nil {
			w.paged = map[string]bool{}
		}
		w.paged[why.Code] = true
		r.Page(ctx, x.id, why)
	}
}

// advance stores the next state: one write, with its audit record and, when the
// rollout begins, the place of every host.
func (r *run) advance(ctx context.Context, x *entry, w *watched, next rollout.State, now time.Time) error {
	var placed []rollout.Record
	if x.at(rollout.Proposed) && next.Phase == rollout.Running {
		var err error
		if placed, err = r.place(x, w, now); err != nil {
			return r.recheck(ctx, x, err)
		}
	}
	err := r.write(ctx, x, func(tx control.Tx, s *Status, a *audit.Record) error {
		if x.at(rollout.Running) && (next.Ring > s.Ring || next.Phase == rollout.Done) || x.at(rollout.Proposed) {
			stopped, err := stopsAt(ctx, tx, x.scope(), now)
			if err != nil {
				return err
			}
			if stopped.halt != "" || s.Paused != "" {
				return fmt.Errorf("halted meanwhile: %w", errs.Conflict)
			}
		}
		a.Reason = transition(s, &next)
		s.State = next
		if x.at(rollout.Proposed) && next.Phase == rollout.Running {
			s.Begun = now.Truncate(time.Second)
		}
		if len(placed) == 0 {
			return nil
		}
		records, err := records(tx)
		if err != nil {
			return err
		}
		return records.PutRolloutHosts(ctx, x.key(), placed)
	})
	if err == nil {
		w.take(placed, nil)
	}
	return err
}

// recheck takes an approval back when the fleet is not any more what was approved.
func (r *run) recheck(ctx context.Context, x *entry, why error) error {
	return r.write(ctx, x, func(_ control.Tx, s *Status, a *audit.Record) error {
		a.Reason = clip("to be checked and approved again: "+why.Error(), maxText)
		s.Check, s.Approval = nil, nil
		s.Revision++
		return nil
	})
}

func transition(s *Status, next *rollout.State) string {
	switch {
	case next.Phase != s.Phase:
		text := fmt.Sprintf("%s → %s", s.Phase, next.Phase)
		if len(next.Why) > 0 && next.Why[0].Verdict == rollout.Fail {
			text += ": " + next.Why[0].Text
		}
		return text
	case next.Ring != s.Ring:
		return fmt.Sprintf("ring %d → %d", s.Ring+1, next.Ring+1)
	}
	return fmt.Sprintf("ring %d bakes", next.Ring+1)
}

// end says that nothing is left to do, and forgets the hosts.
func (r *run) end(ctx context.Context, x *entry) error {
	return r.write(ctx, x, func(tx control.Tx, s *Status, a *audit.Record) error {
		a.Reason = fmt.Sprintf("%s, and nothing is left to do", s.Phase)
		s.Over = true
		if w := r.state[x.key()]; w != nil {
			s.Final = ringsOf(x, r.members(x, w, r.Now()))
		}
		records, err := records(tx)
		if err != nil {
			return err
		}
		return records.ForgetRollout(ctx, x.key())
	})
}

// write changes the status of a rollout through the door, if the document is
// still the one that was read.
func (r *run) write(ctx context.Context, x *entry, change func(control.Tx, *Status, *audit.Record) error) error {
	err := r.door.Act(ctx, r.self, fleet.TypeRollout, "advance/action", x.id, func(tx control.Tx, a *audit.Record) error {
		d, err := unchanged(ctx, tx, x)
		if err != nil {
			return err
		}
		next, err := parse(d)
		if err != nil {
			return err
		}
		if err := change(tx, next.Status, a); err != nil {
			return err
		}
		detail, err := json.Marshal(map[string]any{"phase": next.Status.Phase, "ring": next.Status.Ring, "why": next.Status.Why, "over": next.Status.Over})
		if err != nil {
			return err
		}
		a.Detail = string(detail)
		if err := next.store(d); err != nil {
			return err
		}
		_, err = tx.Put(ctx, *d, r.self.Name, resource.When{Revision: x.doc.Revision})
		return err
	})
	return r.settled(err)
}

// settled forgets what was read after a write: the next round reads it anew.
// That somebody else wrote meanwhile is no failure.
func (r *run) settled(err error) error {
	r.moved = r.moved || err == nil
	r.revision, r.docs = 0, nil
	return err
}

func unchanged(ctx context.Context, tx control.Tx, x *entry) (*resource.Document, error) {
	d, err := tx.Get(ctx, x.id)
	if err != nil {
		return nil, err
	}
	if d.Revision != x.doc.Revision {
		return nil, fmt.Errorf("changed meanwhile: %w", errs.Conflict)
	}
	return d, nil
}

// admit stores which hosts may take the change from now on. That a halt came
// meanwhile is seen in the transaction: once a halt is stored nobody is admitted.
func (r *run) admit(ctx context.Context, x *entry, w *watched, hosts []string, now time.Time) error {
	admitted := make([]rollout.Record, 0, len(hosts))
	for _, h := range hosts {
		rec := *w.hosts[h]
		rec.Admitted = now
		admitted = append(admitted, rec)
	}
	err := r.door.Act(ctx, r.self, fleet.TypeRollout, "admit/action", x.id, func(tx control.Tx, a *audit.Record) error {
		if _, err := unchanged(ctx, tx, x); err != nil {
			return err
		}
		stopped, err := stopsAt(ctx, tx, x.scope(), now)
		if err != nil {
			return err
		}
		if stopped.halt != "" {
			return fmt.Errorf("halted meanwhile: %w", errs.Conflict)
		}
		records, err := records(tx)
		if err != nil {
			return err
		}
		detail, err := json.Marshal(map[string]any{"ring": x.r.Status.Ring, "count": len(hosts), "hosts": hosts[:min(len(hosts), maxListed)]})
		if err != nil {
			return err
		}
		a.Reason, a.Detail = fmt.Sprintf("%d hosts of ring %d", len(hosts), x.r.Status.Ring+1), string(detail)
		return records.PutRolloutHosts(ctx, x.key(), admitted)
	})
	if err != nil {
		return r.settled(err)
	}
	r.moved = true
	for i := range admitted {
		w.hosts[admitted[i].Host] = &admitted[i]
	}
	return nil
}

// superseded says whether a later rollout has taken the place of one that is
// done: it is done too, and for all of its hosts.
func (r *run) superseded(x *entry) bool {
	for i := range r.docs {
		o := &r.docs[i]
		if o.at(rollout.Done) && o.r.Status.Epoch > x.r.Status.Epoch && o.scope().Contains(x.scope()) && len(o.r.Selector) == 0 {
			return true
		}
	}
	return false
}

// give assigns to every host what the rollouts say, as far as it has something
// else. Of several the one with the highest epoch counts: a host takes no lower
// one.
func (r *run) give(ctx context.Context) error {
	type meant struct {
		epoch    uint64
		manifest integrity.Digest
	}
	want := map[string]meant{}
	have := map[string]integrity.Digest{}
	for i := range r.docs {
		x := &r.docs[i]
		w := r.state[x.key()]
		if w == nil || x.r.Status.Over {
			continue
		}
		manifest, epoch := x.r.Manifest, x.r.Status.effective()
		switch x.phase() {
		case rollout.RollingBack, rollout.RolledBack:
			manifest = *x.r.Rollback
		case rollout.Running, rollout.Done, rollout.Stopped:
		default:
			continue
		}
		for id, rec := range w.hosts {
			h, here := w.now[id]
			if !here || rec.Admitted.IsZero() || h.Report.Epoch > epoch {
				continue // it would refuse a lower epoch
			}
			have[id] = h.Assigned
			if m := want[id]; epoch > m.epoch {
				want[id] = meant{epoch, manifest}
			}
		}
	}
	var as []fleet.Assignment
	for id, m := range want {
		if have[id] != m.manifest {
			as = append(as, fleet.Assignment{Host: id, Manifest: m.manifest})
		}
	}
	if len(as) == 0 {
		return nil
	}
	var failed []error
	for part := range byManifest(r.ordered(as)) {
		// one manifest that is gone must not keep hosts from going back to another
		if err := r.Fleet.AssignUnder(ctx, r.fence, part); err != nil {
			failed = append(failed, fmt.Errorf("assign %d hosts: %w", len(part), err))
		}
	}
	return errors.Join(failed...)
}

// byManifest yields runs of assignments of one manifest.
func byManifest(as []fleet.Assignment) iter.Seq[[]fleet.Assignment] {
	return func(yield func([]fleet.Assignment) bool) {
		for begin := 0; begin < len(as); {
			end := begin + 1
			for end < len(as) && as[end].Manifest == as[begin].Manifest {
				end++
			}
			if !yield(as[begin:end]) {
				return
			}
			begin = end
		}
	}
}

// Blocks is told of blocks by whichever replica heard of them, and stores the
// flips for the rollouts that they belong to, so that a ring is stopped before its
// hosts report next. The same may come again.
func (e *Engine) Blocks(ctx context.Context, all []incident.Event) error {
	by := map[uint64][]rollout.Hit{}
	for i := range all {
		if x := &all[i]; x.Flip {
			by[x.Epoch] = append(by[x.Epoch], rollout.Hit{Host: x.Host, Signal: hitFlip, At: x.At, Text: clip(x.Kind+" "+x.Path, maxText)})
		}
	}
	for epoch, hits := range by {
		if err := e.addFlips(ctx, epoch, hits); err != nil {
			return fmt.Errorf("rollouts: %d flips of epoch %d: %w", len(hits), epoch, err)
		}
	}
	return nil
}

func (e *Engine) addFlips(ctx context.Context, epoch uint64, flips []rollout.Hit) error {
	return e.Store.Write(ctx, func(tx control.Tx) error {
		rec, err := records(tx)
		if err != nil {
			return err
		}
		return each(ctx, tx, fleet.TypeRollout, func(d *resource.Document) error {
			r, err := parse(d)
			if err != nil || r.Status.Epoch != epoch || r.Status.Over || r.Status.Phase == rollout.Draft || r.Status.Phase == rollout.Proposed {
				return nil //nolint:nilerr // what cannot be read is said by the engine
			}
			return addMembers(ctx, rec, d.ID.Key(), flips)
		})
	})
}

// addMembers stores the hits of hosts that were admitted.
func addMembers(ctx context.Context, rec Records, of string, all []rollout.Hit) error {
	hosts, err := rec.RolloutHosts(ctx, of)
	if err != nil {
		return err
	}
	admitted := map[string]bool{}
	for i := range hosts {
		admitted[hosts[i].Host] = !hosts[i].Admitted.IsZero()
	}
	var hits []rollout.Hit
	for _, h := range all {
		if admitted[h.Host] {
			admitted[h.Host] = false // one is enough
			hits = append(hits, h)
		}
	}
	return rec.AddRolloutHits(ctx, of, hits)
}
