package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"ringwall/internal/errs"
)

// Leases is who may run what must run once in the fleet; *store.Store is one.
// errs.Conflict from AcquireLease: another holds it; from the others: the
// holding is over.
type Leases interface {
	AcquireLease(ctx context.Context, name, owner string, term time.Duration) (fence uint64, err error)
	RenewLease(ctx context.Context, name string, fence uint64, term time.Duration) error
	ReleaseLease(ctx context.Context, name string, fence uint64) error
}

// Fence is one holding of a lease. Whoever writes as its holder writes through
// Door.Under or Fence.Store: when another has taken the lease, even while the
// holder was stopped or its clock was wrong, the write is refused.
type Fence struct {
	Lease  string
	Number uint64 // only grows
}

// Store is s with every writing transaction held to the fence; errs.Conflict
// when the holding is over.
func (f Fence) Store(s Store) Store { return fenced{s, f} }

// Under is the door with every change held to a fence.
func (d *Door) Under(f Fence) *Door {
	out := *d
	out.store = f.Store(d.store)
	return &out
}

type fenced struct {
	Store
	fence Fence
}

// Write implements Store. It fails closed: a transaction that cannot check
// fences writes nothing.
func (f fenced) Write(ctx context.Context, fn func(Tx) error) error {
	return f.Store.Write(ctx, func(tx Tx) error {
		checker, ok := tx.(interface {
			CheckFence(ctx context.Context, name string, fence uint64) error
		})
		if !ok {
			return fmt.Errorf("lease %s: this store has no fences: %w", f.fence.Lease, errs.Unsupported)
		}
		if err := checker.CheckFence(ctx, f.fence.Lease, f.fence.Number); err != nil {
			return err
		}
		return fn(tx)
	})
}

// Leader runs loops of which there must be one in the fleet, whatever the
// number of replicas.
type Leader struct {
	Leases Leases
	Owner  string        // of this process alone
	Term   time.Duration // for which a lease is held without renewal; the same in every replica
	Log    *slog.Logger
	// Held is told when a lease is taken and when it is given up; it may be nil.
	Held func(lease string, held bool)
}

// DefaultTerm is how long a holder may be silent before another takes over.
const DefaultTerm = 15 * time.Second

// Run runs fn while this process holds the lease, and again whenever it gets it,
// until ctx ends; it returns ctx's error. fn's context ends with the holding:
// when another took it, or when it could not be renewed for a term. That is
// for speed; what keeps a holder that was overtaken from writing is the fence.
// An fn that returns is run again after a third of the term; its error is
// logged.
func (l *Leader) Run(ctx context.Context, lease string, fn func(ctx context.Context, f Fence) error) error {
	for ctx.Err() == nil {
		asked := time.Now()
		fence, err := l.Leases.AcquireLease(ctx, lease, l.Owner, l.Term)
		switch {
		case err == nil:
			l.hold(ctx, Fence{lease, fence}, asked, fn)
		case ctx.Err() == nil && !errors.Is(err, errs.Conflict):
			l.Log.WarnContext(ctx, "lease_not_acquired", slog.String("lease", lease), slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(l.Term / 3):
		}
	}
	return ctx.Err()
}

// releaseTime is how long a process that ends waits to give a lease back.
const releaseTime = 5 * time.Second

func (l *Leader) hold(ctx context.Context, f Fence, since time.Time, fn func(ctx context.Context, f Fence) error) {
	if l.Held != nil {
		l.Held(f.Lease, true)
		defer l.Held(f.Lease, false)
	}
	working, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- fn(working, f) }()
	renewed := make(chan struct{})
	go func() {
		defer close(renewed)
		defer stop()
		l.renew(working, f, since)
	}()
	err := <-done
	stop()
	<-renewed
	if err != nil && ctx.Err() == nil {
		l.Log.WarnContext(ctx, "leader_stopped", slog.String("lease", f.Lease), slog.Uint64("fence", f.Number), slog.Any("error", err))
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	if err := l.Leases.ReleaseLease(end, f.Lease, f.Number); err != nil && !errors.Is(err, errs.Conflict) {
		l.Log.WarnContext(ctx, "lease_not_released", slog.String("lease", f.Lease), slog.Any("error", err)) // it ends by itself
	}
}

// renew keeps a holding until ctx ends or the holding does.
func (l *Leader) renew(ctx context.Context, f Fence, since time.Time) {
	tick := time.NewTicker(l.Term / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		asked := time.Now()
		limit, cancel := context.WithDeadline(ctx, since.Add(l.Term))
		err := l.Leases.RenewLease(limit, f.Lease, f.Number, l.Term)
		cancel()
		switch {
		case err == nil:
			since = asked
		case ctx.Err() != nil:
			return
		case errors.Is(err, errs.Conflict) || time.Since(since) >= l.Term:
			l.Log.WarnContext(ctx, "lease_lost", slog.String("lease", f.Lease), slog.Uint64("fence", f.Number), slog.Any("error", err))
			return
		default:
			l.Log.WarnContext(ctx, "lease_not_renewed", slog.String("lease", f.Lease), slog.Any("error", err))
		}
	}
}
