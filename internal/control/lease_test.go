package control_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// ledger is one lease, as the store keeps it; down makes it unreachable.
type ledger struct {
	mu    sync.Mutex
	owner string
	until time.Time
	fence uint64
	down  bool
	terms int // how often it was acquired
}

var errDown = errors.New("the database is away")

func (l *ledger) AcquireLease(_ context.Context, _, owner string, term time.Duration) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.down:
		return 0, errDown
	case l.owner != owner && time.Now().Before(l.until):
		return 0, errs.Conflict
	}
	l.owner, l.until, l.fence, l.terms = owner, time.Now().Add(term), l.fence+1, l.terms+1
	return l.fence, nil
}

func (l *ledger) RenewLease(_ context.Context, _ string, fence uint64, term time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.down:
		return errDown
	case l.fence != fence:
		return errs.Conflict
	}
	l.until = time.Now().Add(term)
	return nil
}

func (l *ledger) ReleaseLease(ctx context.Context, name string, fence uint64) error {
	return l.RenewLease(ctx, name, fence, 0)
}

func (l *ledger) set(f func(*ledger)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(l)
}

func leader(l control.Leases, owner string) *control.Leader {
	return &control.Leader{Leases: l, Owner: owner, Term: control.DefaultTerm, Log: slog.New(slog.DiscardHandler)}
}

// Of two replicas one works. When it ends the other takes over at once, and when
// it dies within a term and a third.
func TestLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shared := &ledger{}
		working := map[string]int{}
		var mu sync.Mutex
		work := func(owner string) func(context.Context, control.Fence) error {
			return func(ctx context.Context, f control.Fence) error {
				mu.Lock()
				working[owner]++
				if working["a"]+working["b"] != 1 {
					t.Errorf("fence %d: two work", f.Number)
				}
				mu.Unlock()
				<-ctx.Done()
				mu.Lock()
				working[owner]--
				mu.Unlock()
				return ctx.Err()
			}
		}
		count := func(owner string) int { mu.Lock(); defer mu.Unlock(); return working[owner] }
		ctxA, stopA := context.WithCancel(t.Context())
		ctxB, stopB := context.WithCancel(t.Context())
		held := 0
		a := leader(shared, "a")
		a.Held = func(_ string, yes bool) {
			held--
			if yes {
				held += 2
			}
		}
		doneA := make(chan error, 1)
		go func() { doneA <- a.Run(ctxA, "x", work("a")) }()
		synctest.Wait()
		go func() { _ = leader(shared, "b").Run(ctxB, "x", work("b")) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		if count("a") != 1 || held != 1 || shared.terms != 1 {
			t.Errorf("after an hour: a %d, held %d, %d terms", count("a"), held, shared.terms)
		}
		stopA()
		if err := <-doneA; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		time.Sleep(control.DefaultTerm / 3)
		synctest.Wait()
		if count("b") != 1 || held != 0 {
			t.Errorf("after a's end: b %d, held %d", count("b"), held)
		}
		stopB()
		synctest.Wait()
	})
}

// A holder whose database is away, or whom another overtook, stops by itself.
func TestLeader_loses(t *testing.T) {
	for name, tc := range map[string]struct {
		harm   func(*ledger)
		within time.Duration
	}{
		"database away": {func(l *ledger) { l.down = true }, control.DefaultTerm},
		"overtaken":     {func(l *ledger) { l.fence, l.owner, l.until = l.fence+1, "c", time.Now().Add(time.Hour) }, control.DefaultTerm / 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shared := &ledger{}
				ctx, cancel := context.WithCancel(t.Context())
				starts, stopped := 0, time.Time{}
				go func() {
					_ = leader(shared, "a").Run(ctx, "x", func(ctx context.Context, _ control.Fence) error {
						starts++
						<-ctx.Done()
						stopped = time.Now()
						return nil
					})
				}()
				time.Sleep(time.Minute + time.Second)
				synctest.Wait()
				harmed := time.Now()
				shared.set(tc.harm)
				time.Sleep(time.Minute)
				synctest.Wait()
				if stopped.IsZero() || stopped.Sub(harmed) > tc.within || starts != 1 {
					t.Errorf("%d starts, stopped after %s", starts, stopped.Sub(harmed))
				}
				shared.set(func(l *ledger) { l.down, l.until = false, time.Time{} })
				time.Sleep(control.DefaultTerm)
				synctest.Wait()
				if starts != 2 {
					t.Errorf("%d starts after all is well again", starts)
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}

// Work that fails is tried again, not at once.
func TestLeader_again(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute-time.Second)
		defer cancel()
		runs := 0
		_ = leader(&ledger{}, "a").Run(ctx, "x", func(context.Context, control.Fence) error { runs++; return errors.New("no") })
		if runs != 12 {
			t.Errorf("%d runs in a minute", runs)
		}
	})
}

// A holder that was overtaken cannot change anything, and a store without fences
// is refused.
func TestDoor_Under(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	fence, err := l.store.AcquireLease(ctx, "engine", "a", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	f := control.Fence{Lease: "engine", Number: fence}
	change := func(d *control.Door, n int) error {
		doc := resource.Document{ID: id(thing + "t"), Properties: []byte(fmt.Sprint(n))}
		_, err := d.Put(ctx, root(), doc, resource.When{}, false)
		return err
	}
	if err := change(l.door.Under(f), 1); err != nil {
		t.Fatal(err)
	}
	if err := l.store.ReleaseLease(ctx, "engine", fence); err != nil {
		t.Fatal(err)
	}
	if err := change(l.door.Under(f), 2); err != nil {
		t.Errorf("given back, and nobody took it: %v", err)
	}
	if _, err := l.store.AcquireLease(ctx, "engine", "b", time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := change(l.door.Under(f), 3); !errors.Is(err, errs.Conflict) {
		t.Errorf("overtaken: %v", err)
	}
	d, err := l.door.Get(ctx, root(), id(thing+"t"))
	if err != nil || string(d.Properties) != "2" {
		t.Errorf("%s, %v", d.Properties, err)
	}
	if err := f.Store(blind{shelf{l.store}}).Write(ctx, func(control.Tx) error { t.Error("ran"); return nil }); !errors.Is(err, errs.Unsupported) {
		t.Errorf("a store without fences: %v", err)
	}
}

// blind is a store whose transactions know no fences.
type blind struct{ control.Store }

func (b blind) Write(ctx context.Context, fn func(control.Tx) error) error {
	return b.Store.Write(ctx, func(tx control.Tx) error { return fn(struct{ control.Tx }{tx}) })
}
