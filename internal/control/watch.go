package control

import (
	"context"
	"fmt"
	"sync"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// poll is how often a watcher looks for what another replica wrote.
const poll = 500 * time.Millisecond

const watchPage = 500

// Watch hands every change after a revision to visit, in order and without a
// gap, as far as the actor may read it, until ctx ends or visit fails. It
// begins with what has happened already; errs.NotFound if the feed does not go
// back so far, or has not come so far. seen is called with each revision that
// was passed, so that a watcher can resume there although nothing was visible to
// it.
func (d *Door) Watch(ctx context.Context, by Actor, below resource.ID, after uint64, visit func(resource.Change) error, seen func(uint64) error) error {
	for begun := false; ; begun = true {
		signal := d.wake.wait()
		var page []resource.Change
		passed, more := after, false
		err := d.store.Read(ctx, func(tx Tx) error {
			if !begun {
				if err := notAhead(ctx, tx, after); err != nil {
					return err
				}
			}
			all, err := tx.Changes(ctx, after, watchPage)
			if err != nil {
				return err
			}
			page, passed, more = nil, after, len(all) == watchPage
			for _, c := range all {
				passed = c.Revision
				if !below.Contains(c.Document.ID) {
					continue
				}
				decision, err := d.can(ctx, tx, by, c.Document.Type+"/read", c.Document.ID)
				if err != nil {
					return err
				}
				if decision.err == nil {
					c.Document = *d.shown(&c.Document)
					page = append(page, c)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("watch %s: %w", below, err)
		}
		for _, c := range page {
			if err := visit(c); err != nil {
				return err
			}
		}
		after = passed
		if err := seen(after); err != nil {
			return err
		}
		if more {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-signal:
		case <-time.After(poll):
		}
	}
}

// notAhead refuses a watcher who has seen more than there is: the database was
// restored, and what he knows is not its past.
func notAhead(ctx context.Context, tx Tx, after uint64) error {
	now, err := tx.Revision(ctx)
	if err == nil && after > now {
		err = fmt.Errorf("the feed has come to revision %d, not to %d: list everything and watch from then: %w", now, after, errs.NotFound)
	}
	return err
}

// wake tells watchers of this process that something was written.
type wake struct {
	mu sync.Mutex
	c  chan struct{}
}

func newWake() *wake { return &wake{c: make(chan struct{})} }

func (w *wake) wait() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.c
}

func (w *wake) all() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.c)
	w.c = make(chan struct{})
}
