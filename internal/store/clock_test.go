package store_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// A server whose clock is set forward and back, beside one whose clock is right:
// the order of the feed, of the chain and of conditions never comes from a clock.
func TestClock(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		right, wrong := open(t, url), open(t, url)
		ctx := t.Context()
		steps := []time.Duration{0, 1000 * time.Hour, -1000 * time.Hour, time.Second, -30 * 365 * 24 * time.Hour, 0}
		d, revision := doc(vault+"kv1"), uint64(0)
		for i, step := range steps {
			wrong.SetClock(func() time.Time { return time.Now().Add(step) })
			for _, s := range []*store.Store{wrong, right} {
				d.Properties = fmt.Append(nil, i)
				err := s.Write(ctx, func(tx *store.Tx) error {
					made, err := tx.Put(ctx, d, "ana", resource.When{Revision: revision})
					if err != nil {
						return err
					}
					revision = made.Revision
					return tx.AppendAudit(ctx, &audit.Record{Actor: "ana", Action: "x/write", Outcome: audit.Done})
				})
				if err != nil {
					t.Fatalf("step %s: %v", step, err)
				}
			}
			if err := wrong.SetOutbox(ctx, "x", revision, ""); err != nil {
				t.Errorf("step %s: %v", step, err)
			}
		}
		err := right.Read(ctx, func(tx *store.Tx) error {
			cs, err := tx.Changes(ctx, 0, 100)
			if len(cs) != 2*len(steps) || cs[len(cs)-1].Revision != uint64(2*len(steps)) {
				t.Errorf("%d changes", len(cs))
			}
			rs, err2 := tx.Audit(ctx, 0, 100)
			backwards := 0
			for i := 1; i < len(rs); i++ {
				if rs[i].At.Before(rs[i-1].At) {
					backwards++
				}
			}
			if backwards < 2 {
				t.Error("no clock went back: this tests nothing")
			}
			return errors.Join(err, err2, verifyChain(ctx, tx, 2*len(steps)))
		})
		if err != nil {
			t.Error(err)
		}
	})
}
