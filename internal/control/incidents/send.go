package incidents

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
)

// Bounds of telling people.
const (
	lookEvery    = time.Second // for what another process stored
	tickEvery    = 15 * time.Second
	refreshEvery = time.Minute
	sendAtOnce   = 8
	sendTimeout  = 30 * time.Second
	maxTries     = 20 // of an update; a page is tried until it is accepted
	maxPause     = time.Minute
)

// Tell sends what waits to be told, ends acknowledgements and escalates, until
// ctx ends. One process does it at a time: d is held to its lease. Should two do
// it for a moment, somebody is told twice.
func (e *Engine) Tell(ctx context.Context, d Door) error {
	t := &teller{e: e, door: d, open: cache{unread: e.unread}}
	for {
		err := d.View(ctx, actor(), func(tx control.Tx) error { return t.open.update(ctx, tx) })
		if err == nil {
			err = t.tick(ctx)
		}
		if err == nil {
			err = t.send(ctx)
		}
		if err != nil {
			return err
		}
		t.count()
		t.refresh(ctx)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-e.page:
		case <-time.After(lookEvery):
		}
	}
}

type teller struct {
	e                 *Engine
	door              Door
	open              cache
	ticked, refreshed time.Time
}

// count tells how much goes on.
func (t *teller) count() {
	if t.e.o.Open == nil {
		return
	}
	n := map[incident.Severity]int{incident.Info: 0, incident.Warning: 0, incident.High: 0, incident.Critical: 0}
	for _, h := range t.open.incidents {
		if h.now.State != incident.Closed {
			n[h.now.Severity]++
		}
	}
	t.e.o.Open(n)
}

// due says whether something that is done from time to time is to be done now. A
// clock that went back makes it due.
func due(last *time.Time, every time.Duration, now time.Time) bool {
	if d := now.Sub(*last); d >= 0 && d < every {
		return false
	}
	*last = now
	return true
}

// tick lets time pass for every open incident.
func (t *teller) tick(ctx context.Context) error {
	now := t.e.o.Now()
	if !due(&t.ticked, tickEvery, now) {
		return nil
	}
	pass := func(s *Stored) bool {
		lines, state, level := len(s.Timeline)+s.Dropped, s.State, s.Level
		s.add(s.Tick(now), now)
		return len(s.Timeline)+s.Dropped != lines || s.State != state || s.Level != level
	}
	var keys []string
	for key, h := range t.open.incidents {
		if s, err := read(&h.doc); err == nil && pass(s) {
			keys = append(keys, key)
		}
	}
	return t.change(ctx, "escalate/action", keys, func(_ string, s *Stored) { pass(s) })
}

// change applies fn to incidents and stores them, in one transaction.
func (t *teller) change(ctx context.Context, verb string, keys []string, fn func(key string, s *Stored)) error {
	if len(keys) == 0 {
		return nil
	}
	slices.Sort(keys)
	target := t.open.incidents[keys[0]].doc.ID
	err := t.door.Act(ctx, actor(), TypeIncident, verb, target, func(tx control.Tx, _ *audit.Record) error {
		if err := t.open.update(ctx, tx); err != nil {
			return err
		}
		w := t.open.working()
		for _, key := range keys {
			h, ok := t.open.incidents[key]
			if !ok {
				continue // somebody deleted it
			}
			c, err := w.touch(&h.now.Incident)
			if err != nil {
				return err
			}
			fn(key, c.now)
		}
		_, err := w.store(ctx, tx)
		return err
	})
	if err != nil {
		return err
	}
	return t.door.View(ctx, actor(), func(tx control.Tx) error { return t.open.update(ctx, tx) })
}

// outcome is what became of the first notices of an incident.
type outcome struct {
	sent  []Outgoing
	paged bool
	err   error // of the one after them
}

// send tells what is due, several incidents at once, the notices of each in
// order.
func (t *teller) send(ctx context.Context) error {
	now := t.e.o.Now()
	var mu sync.Mutex
	outcomes := map[string]outcome{}
	var wg sync.WaitGroup
	slots := make(chan struct{}, sendAtOnce)
	for key, h := range t.open.incidents {
		if len(h.now.Outbox) == 0 || now.Before(h.now.Outbox[0].Next) {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			o := t.sendOne(ctx, h)
			mu.Lock()
			defer mu.Unlock()
			outcomes[key] = o
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var keys []string
	for key := range outcomes {
		keys = append(keys, key)
	}
	first := map[string]time.Duration{}
	err := t.change(ctx, "tell/action", keys, func(key string, s *Stored) {
		before := s.PagedAt
		s.told(outcomes[key], t.e.o.Now())
		if before.IsZero() && !s.PagedAt.IsZero() {
			first[key] = s.PagedAt.Sub(s.OpenedAt)
		}
	})
	if err == nil && t.e.o.Observe != nil {
		for _, took := range first {
			t.e.o.Observe("page", took)
		}
	}
	return err
}

func (t *teller) sendOne(ctx context.Context, h *held) (out outcome) {
	for _, o := range h.now.Outbox {
		if t.e.o.Notifier == nil {
			t.e.o.Log.WarnContext(ctx, "nobody_to_tell", slog.String("incident", h.now.ID), slog.String("text", o.Text), slog.Bool("page", o.Page))
			out.sent = append(out.sent, o)
			continue
		}
		try, cancel := context.WithTimeout(ctx, sendTimeout)
		out.err = t.e.o.Notifier.Notify(try, h.now, h.doc.ID.Parent(), o)
		cancel()
		if out.err != nil {
			t.e.o.Log.WarnContext(ctx, "not_told", slog.String("incident", h.now.ID), slog.Bool("page", o.Page), slog.Int("tries", o.Tries+1), slog.Any("error", out.err))
			return out
		}
		out.paged = out.paged || o.Page
		out.sent = append(out.sent, o)
	}
	return out
}

// told takes what was sent out of the outbox. What failed comes again later, an
// update only so often.
func (s *Stored) told(o outcome, now time.Time) {
	for _, sent := range o.sent {
		s.Outbox = slices.DeleteFunc(s.Outbox, func(x Outgoing) bool { return x.Notice == sent.Notice && x.At.Equal(sent.At) })
	}
	if o.paged && s.PagedAt.IsZero() {
		s.PagedAt = now
	}
	if o.err == nil || len(s.Outbox) == 0 {
		return
	}
	first := &s.Outbox[0]
	first.Tries++
	first.Next = now.Add(min(time.Second<<min(first.Tries, 10), maxPause))
	if !first.Page && first.Tries >= maxTries {
		s.Outbox = s.Outbox[1:]
	}
}

// refresh says again what still goes on, for receivers that forget otherwise.
func (t *teller) refresh(ctx context.Context) {
	r, ok := t.e.o.Notifier.(Refresher)
	if !ok || !due(&t.refreshed, refreshEvery, t.e.o.Now()) {
		return
	}
	for _, h := range t.open.incidents {
		if h.now.State == incident.Resolved || h.now.State == incident.Closed {
			continue
		}
		try, cancel := context.WithTimeout(ctx, sendTimeout)
		err := r.Refresh(try, h.now, h.doc.ID.Parent())
		cancel()
		if err != nil {
			t.e.o.Log.WarnContext(ctx, "not_refreshed", slog.String("incident", h.now.ID), slog.Any("error", err))
			return
		}
	}
}

// Refresher is a Notifier whose receivers, such as Alertmanager, take what is
// not said again for over.
type Refresher interface {
	Refresh(ctx context.Context, i *Stored, scope resource.ID) error
}
