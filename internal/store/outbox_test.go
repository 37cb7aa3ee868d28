package store_test

import (
	"errors"
	"testing"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/store"
)

func TestOutbox(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		if end, err := s.AuditEnd(ctx); err != nil || end != (audit.Checkpoint{}) {
			t.Errorf("%+v, %v", end, err)
		}
		for range 3 {
			err := s.Write(ctx, func(tx *store.Tx) error {
				return tx.AppendAudit(ctx, &audit.Record{Actor: "ana", Action: "x/write", Outcome: audit.Done})
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		rs, err := s.AuditAfter(ctx, 1, 10)
		if err != nil || len(rs) != 2 || rs[0].Seq != 2 {
			t.Fatalf("%+v, %v", rs, err)
		}
		if end, err := s.AuditEnd(ctx); err != nil || end != rs[1].Checkpoint() {
			t.Errorf("%+v, %v", end, err)
		}
		is := func(name string, position uint64, state string) {
			t.Helper()
			if p, text, err := s.Outbox(ctx, name); err != nil || p != position || text != state {
				t.Errorf("%s: %d, %q, %v", name, p, text, err)
			}
		}
		is("a", 0, "")
		if err := errors.Join(s.SetOutbox(ctx, "a", 2, "x"), s.SetOutbox(ctx, "b", 7, ""), s.SetOutbox(ctx, "a", 2, "y"), s.SetOutbox(ctx, "a", 3, "z")); err != nil {
			t.Error(err)
		}
		is("a", 3, "z")
		is("b", 7, "")
		if err := s.SetOutbox(ctx, "a", 2, "old"); !errors.Is(err, errs.Conflict) {
			t.Errorf("back: %v", err)
		}
		is("a", 3, "z")
	})
}
