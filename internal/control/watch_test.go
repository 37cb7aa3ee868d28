package control_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Who knows more than the database does, because that was restored, is told to
// begin anew instead of being left waiting.
func TestWatch_ahead(t *testing.T) {
	l := newLab(t)
	l.must(root(), thing+"a", `1`)
	last := uint64(0)
	watch := func(after uint64) error {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return l.door.Watch(ctx, root(), resource.ID{}, after, func(c resource.Change) error { last = c.Revision; return nil }, func(uint64) error { return nil })
	}
	if err := watch(0); !errors.Is(err, context.DeadlineExceeded) || last == 0 {
		t.Fatalf("at %d: %v", last, err)
	}
	if err := watch(last); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("at the end: %v", err)
	}
	if err := watch(last + 1); !errors.Is(err, errs.NotFound) {
		t.Errorf("past the end: %v", err)
	}
}
