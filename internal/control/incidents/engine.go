package incidents

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
)

// Door is what the engine needs of control.Door.
type Door interface {
	Act(ctx context.Context, by control.Actor, kind, verb string, target resource.ID, fn func(control.Tx, *audit.Record) error) error
	View(ctx context.Context, by control.Actor, fn func(control.Tx) error) error
}

// Notifier tells people; errors are tried again. The same notice is known by the
// same time: another with the same words is another.
type Notifier interface {
	Notify(ctx context.Context, i *Stored, scope resource.ID, n Outgoing) error
}

// Options of an engine.
type Options struct {
	Notifier Notifier // nil: nobody is told, which is logged
	Log      *slog.Logger
	Now      func() time.Time
	Observe  Observe // may be nil
	// Open is told now and then how many incidents of each severity go on; it may be nil.
	Open func(map[incident.Severity]int)
	// Gather is how long blocks are collected before they are stored together;
	// 0: 100 milliseconds.
	Gather time.Duration
}

// Engine takes blocks and keeps incidents. Several may work on one database.
type Engine struct {
	o    Options
	door Door

	mu      sync.Mutex
	waiting []incident.Event
	answers []chan error
	wake    chan struct{} // has room for one
	page    chan struct{} // there may be something to tell

	recent recent
	open   cache // used by flush only

	asked struct {
		sync.Mutex
		cache
	}
}

// New returns an engine; Run makes it work.
func New(d Door, o Options) *Engine {
	if o.Gather == 0 {
		o.Gather = 100 * time.Millisecond
	}
	e := &Engine{
		o: o, door: d, wake: make(chan struct{}, 1), page: make(chan struct{}, 1),
		recent: recent{seen: map[string]bool{}},
	}
	e.open.unread, e.asked.unread = e.unread, e.unread
	return e
}

// unread says that a document is left alone. One that another version wrote must
// not keep all others from being counted and paged.
func (e *Engine) unread(id resource.ID, err error) {
	e.o.Log.Error("incident_unreadable", slog.String("document", id.String()), slog.Any("error", err))
}

// actor is who the engine is for the door.
func actor() control.Actor { return control.Engine("incidents", TypeIncident+"/*") }

// Blocks counts blocks and returns when that is durable. What does not matter is
// left out. The same event may come
// twice; it is counted once, as long as one process saw both.
func (e *Engine) Blocks(ctx context.Context, events []incident.Event) error {
	if len(events) == 0 {
		return nil
	}
	done := make(chan error, 1)
	e.mu.Lock()
	if len(e.waiting)+len(events) > maxWaiting {
		e.mu.Unlock()
		return fmt.Errorf("incidents: %d blocks wait to be stored: %w", maxWaiting, errs.Conflict)
	}
	e.waiting = append(e.waiting, events...)
	e.answers = append(e.answers, done)
	e.mu.Unlock()
	signal(e.wake)
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxWaiting bounds what is held in memory; whoever comes then comes again.
const maxWaiting = 200_000

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run stores blocks until ctx ends. Every process that takes blocks runs it.
func (e *Engine) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			e.answer(ctx.Err())
			return ctx.Err()
		case <-e.wake:
		}
		select {
		case <-ctx.Done():
		case <-time.After(e.o.Gather):
		}
		e.mu.Lock()
		events, answers := e.waiting, e.answers
		e.waiting, e.answers = nil, nil
		e.mu.Unlock()
		err := e.flush(ctx, events)
		if err != nil && ctx.Err() == nil {
			e.o.Log.ErrorContext(ctx, "incidents_not_stored", slog.Int("blocks", len(events)), slog.Any("error", err))
		}
		for _, a := range answers {
			a <- err
		}
	}
}

func (e *Engine) answer(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, a := range e.answers {
		a <- err
	}
	e.waiting, e.answers = nil, nil
}

// flush stores what a batch changes, in one transaction.
func (e *Engine) flush(ctx context.Context, events []incident.Event) error {
	fresh := e.recent.fresh(events)
	if len(fresh) == 0 {
		return nil
	}
	tell := false
	err := e.door.Act(ctx, actor(), TypeIncident, "count/action", resource.ID{}, func(tx control.Tx, r *audit.Record) error {
		if err := e.open.update(ctx, tx); err != nil {
			return err
		}
		w := e.open.working()
		for i := range fresh {
			if err := w.take(&fresh[i]); err != nil {
				return err
			}
		}
		stored, err := w.store(ctx, tx)
		if err != nil {
			return err
		}
		tell = false
		counts := map[string]int{}
		for _, s := range stored {
			counts[s.doc.ID.String()] = s.taken
			tell = tell || len(s.now.Outbox) > 0
		}
		b, err := json.Marshal(map[string]any{"blocks": counts})
		r.Detail = string(b)
		return err
	})
	if err != nil {
		return err
	}
	e.recent.add(fresh)
	if tell {
		signal(e.page)
	}
	return nil
}

// Open are the incidents below a place that a change of policy with this epoch
// caused and that are not resolved.
func (e *Engine) Open(ctx context.Context, below resource.ID, epoch uint64) ([]string, error) {
	e.asked.Lock()
	defer e.asked.Unlock()
	if err := e.door.View(ctx, actor(), func(tx control.Tx) error { return e.asked.update(ctx, tx) }); err != nil {
		return nil, err
	}
	var out []string
	for _, h := range e.asked.incidents {
		over := h.now.State == incident.Resolved || h.now.State == incident.Closed
		if h.now.Epoch == epoch && epoch != 0 && !over && below.Contains(h.doc.ID) {
			out = append(out, h.now.ID)
		}
	}
	slices.Sort(out)
	return out, nil
}

// recent remembers the ids of the last events.
type recent struct {
	seen  map[string]bool
	order []string
}

const maxRecent = 100_000

func (r *recent) fresh(events []incident.Event) []incident.Event {
	out := make([]incident.Event, 0, len(events))
	batch := map[string]bool{}
	for i := range events {
		id := events[i].ID
		if !events[i].Matters() || id != "" && (r.seen[id] || batch[id]) {
			continue
		}
		batch[id] = true
		out = append(out, events[i])
	}
	return out
}

func (r *recent) add(events []incident.Event) {
	for i := range events {
		if id := events[i].ID; id != "" && !r.seen[id] {
			r.seen[id] = true
			r.order = append(r.order, id)
		}
	}
	if over := len(r.order) - maxRecent; over > 0 {
		for _, id := range r.order[:over] {
			delete(r.seen, id)
		}
		r.order = append([]string(nil), r.order[over:]...)
	}
}

// cache holds the incidents that go on, or of which somebody is to be told, and the silences, as of a
// revision of the tree. What it holds is never changed, only replaced.
type cache struct {
	// unread is told of documents that cannot be read, which are left alone.
	unread    func(id resource.ID, err error)
	read      bool
	revision  uint64
	incidents map[string]*held // by key of the document
	silences  map[string]silenced
}

type held struct {
	doc resource.Document
	now *Stored
}

type silenced struct {
	at resource.ID
	Silence
}

// update brings the cache to what the transaction sees.
func (c *cache) update(ctx context.Context, tx control.Tx) error {
	now, err := tx.Revision(ctx)
	if err != nil || c.read && now == c.revision {
		return err
	}
	if c.read && now > c.revision {
		ok, err := c.follow(ctx, tx, now)
		if err != nil || ok {
			return err
		}
	}
	c.incidents, c.silences = map[string]*held{}, map[string]silenced{}
	for _, kind := range []string{TypeIncident, TypeSilence} {
		q := resource.Query{Type: kind, Limit: resource.MaxPage}
		for {
			page, err := tx.List(ctx, q)
			if err != nil {
				return err
			}
			for i := range page {
				c.set(&page[i], false)
			}
			if len(page) < q.Limit {
				break
			}
			q.After = page[len(page)-1].ID.Key()
		}
	}
	c.read, c.revision = true, now
	return nil
}

// follow applies the changes since; it is not ok when they are gone.
func (c *cache) follow(ctx context.Context, tx control.Tx, now uint64) (ok bool, err error) {
	const many = 1000
	for at := c.revision; at < now; {
		changes, err := tx.Changes(ctx, at, many)
		if errors.Is(err, errs.NotFound) || err == nil && len(changes) == 0 {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		for i := range changes {
			c.set(&changes[i].Document, changes[i].Deleted)
		}
		at = changes[len(changes)-1].Revision
	}
	c.revision = now
	return true, nil
}

func (c *cache) set(d *resource.Document, deleted bool) {
	key := d.ID.Key()
	var err error
	switch d.ID.Type() {
	case strings.ToLower(TypeSilence):
		delete(c.silences, key)
		var s *Silence
		if s, err = readSilence(d); err == nil && !deleted {
			c.silences[key] = silenced{d.ID.Parent(), *s}
		}
	case strings.ToLower(TypeIncident):
		delete(c.incidents, key)
		var s *Stored
		if s, err = read(d); err == nil && !deleted && (s.State != incident.Closed || len(s.Outbox) > 0) {
			c.incidents[key] = &held{*d, s}
		}
	}
	if err != nil && !deleted {
		c.unread(d.ID, err)
	}
}

// working is a set of changes to the cache's incidents. It is thrown away when
// the transaction is: the cache learns what was stored from the feed.
type working struct {
	c       *cache
	open    []*incident.Incident // for package incident to look through
	changed map[*incident.Incident]*change
	owner   map[*incident.Incident]*held
	order   []*change
}

type change struct {
	doc   resource.Document
	now   *Stored
	taken int // blocks
}

func (c *cache) working() *working {
	w := &working{c: c, changed: map[*incident.Incident]*change{}, owner: map[*incident.Incident]*held{}}
	for _, h := range c.incidents {
		w.open = append(w.open, &h.now.Incident)
		w.owner[&h.now.Incident] = h
	}
	return w
}

// touch returns the copy of an incident that may be changed.
func (w *working) touch(i *incident.Incident) (*change, error) {
	if c, ok := w.changed[i]; ok {
		return c, nil
	}
	h := w.owner[i]
	s, err := read(&h.doc) // a deep copy
	if err != nil {
		return nil, err
	}
	c := &change{doc: h.doc, now: s}
	w.replace(i, c)
	return c, nil
}

func (w *working) replace(old *incident.Incident, c *change) {
	at := -1
	for k := range w.open {
		if w.open[k] == old {
			at = k
		}
	}
	if at < 0 {
		w.open = append(w.open, &c.now.Incident)
	} else {
		w.open[at] = &c.now.Incident
	}
	w.changed[&c.now.Incident] = c
	w.order = append(w.order, c)
}

// take counts one event.
func (w *working) take(ev *incident.Event) error {
	scope, err := resource.ParseID(ev.Scope)
	if err != nil {
		return err
	}
	var c *change
	var notices []incident.Notice
	if i := incident.Find(ev, w.open); i != nil {
		if c, err = w.touch(i); err != nil {
			return err
		}
		notices = c.now.Add(ev)
	} else {
		name := newName(ev.At)
		id, err := resource.ParseID(strings.TrimSuffix(scope.String(), "/") + "/providers/" + TypeIncident + "/" + name)
		if err != nil {
			return err
		}
		var s Stored
		opened, first := incident.New(name, ev)
		s.Incident, notices = *opened, first
		c = &change{doc: resource.Document{ID: id, Type: TypeIncident}, now: &s}
		w.replace(nil, c)
	}
	c.taken++
	if by := w.silenced(scope, ev); by != "" {
		for k := range notices {
			notices[k].Page = false
			notices[k].Text += " (silenced: " + by + ")"
		}
	}
	c.now.add(notices, ev.At)
	return nil
}

func (w *working) silenced(scope resource.ID, ev *incident.Event) string {
	for _, s := range w.c.silences {
		if s.at.Contains(scope) && ev.At.Before(s.Until) && s.matches(ev) {
			return s.Reason
		}
	}
	return ""
}

// newName is a name that people can say: the day, and five letters.
func newName(at time.Time) string {
	return "inc-" + at.UTC().Format("20060102") + "-" + strings.ToLower(rand.Text()[:6])
}

func (w *working) store(ctx context.Context, tx control.Tx) ([]*change, error) {
	for _, c := range w.order {
		if err := write(&c.doc, c.now); err != nil {
			return nil, err
		}
		if err := c.doc.Check(); err != nil {
			return nil, err
		}
		when := resource.When{Revision: c.doc.Revision, Absent: c.doc.Revision == 0}
		if _, err := tx.Put(ctx, c.doc, actor().Name, when); err != nil {
			return nil, err
		}
	}
	return w.order, nil
}
