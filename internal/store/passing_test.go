package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/store"
)

func TestPassing(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s, ctx := open(t, url), t.Context()
		soon := time.Now().Add(time.Hour)
		write := func(fn func(*store.Tx) error) {
			t.Helper()
			if err := s.Write(ctx, fn); err != nil {
				t.Fatal(err)
			}
		}
		kept := func(key string) (out string, err error) {
			err = s.Read(ctx, func(tx *store.Tx) error {
				b, err := tx.Kept(ctx, key)
				out = string(b)
				return err
			})
			return out, err
		}
		write(func(tx *store.Tx) error {
			return errors.Join(tx.Keep(ctx, "a", []byte("one"), soon), tx.Keep(ctx, "b", nil, soon), tx.Keep(ctx, "over", []byte("x"), time.Now().Add(-time.Second)))
		})
		if got, err := kept("a"); got != "one" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if got, err := kept("b"); got != "" || err != nil {
			t.Errorf("an empty value: %q, %v", got, err)
		}
		for _, key := range []string{"over", "never"} {
			if _, err := kept(key); !errors.Is(err, errs.NotFound) {
				t.Errorf("%s: %v", key, err)
			}
		}
		write(func(tx *store.Tx) error {
			return errors.Join(tx.Keep(ctx, "a", []byte("two"), soon), tx.Forget(ctx, "b"), tx.Forget(ctx, "never"))
		})
		if got, err := kept("a"); got != "two" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := kept("b"); !errors.Is(err, errs.NotFound) {
			t.Errorf("forgotten: %v", err)
		}
		err := s.Write(ctx, func(tx *store.Tx) error { return tx.Keep(ctx, "c", []byte(strings.Repeat("x", 300<<10)), soon) })
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("too long: %v", err)
		}
		if err := s.Read(ctx, func(tx *store.Tx) error { return tx.Keep(ctx, "c", nil, soon) }); err == nil {
			t.Error("a reader keeps something")
		}
	})
}
