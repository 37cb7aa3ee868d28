package store_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

const term = time.Minute

func TestLease(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		a, b := open(t, url), open(t, url) // two replicas
		ctx := t.Context()
		acquire := func(s *store.Store, owner string) uint64 {
			t.Helper()
			fence, err := s.AcquireLease(ctx, "rollouts", owner, term)
			if err != nil {
				t.Fatal(err)
			}
			return fence
		}
		refused := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, errs.Conflict) {
				t.Errorf("%s: %v", what, err)
			}
		}
		check := func(s *store.Store, fence uint64) error {
			return s.Write(ctx, func(tx *store.Tx) error { return tx.CheckFence(ctx, "rollouts", fence) })
		}
		refused("a fence of a lease that nobody ever held", check(a, 0))
		first := acquire(a, "a")
		_, err := b.AcquireLease(ctx, "rollouts", "b", term)
		refused("held by another", err)
		if other, err := b.AcquireLease(ctx, "incidents", "b", term); err != nil || other != 1 {
			t.Errorf("another lease: %d, %v", other, err)
		}
		if err := errors.Join(a.RenewLease(ctx, "rollouts", first, term), check(a, first)); err != nil {
			t.Error(err)
		}
		// One that asks again, not knowing that it holds it, gets it.
		again := acquire(a, "a")
		if again <= first {
			t.Errorf("fence %d after %d", again, first)
		}
		refused("renewed with the fence before", a.RenewLease(ctx, "rollouts", first, term))
		// Given back, it is the other's at once.
		if err := a.ReleaseLease(ctx, "rollouts", again); err != nil {
			t.Error(err)
		}
		third := acquire(b, "b")
		if third <= again {
			t.Errorf("fence %d after %d", third, again)
		}
		refused("released what is another's", a.ReleaseLease(ctx, "rollouts", again))
		refused("wrote with an old fence", check(a, again))
		if err := check(b, third); err != nil {
			t.Error(err)
		}
		if err := a.EndLeases(ctx); err != nil {
			t.Error(err)
		}
		if fourth := acquire(a, "c"); fourth <= third {
			t.Errorf("fence %d after %d", fourth, third)
		}
		refused("wrote with an old fence", check(b, third))
		for _, bad := range []func() (uint64, error){
			func() (uint64, error) { return a.AcquireLease(ctx, "", "a", term) },
			func() (uint64, error) { return a.AcquireLease(ctx, "x", "", term) },
			func() (uint64, error) { return a.AcquireLease(ctx, "x", "a", 0) },
		} {
			if _, err := bad(); !errors.Is(err, errs.Invalid) {
				t.Errorf("%v", err)
			}
		}
	})
}

// Whatever the clock does, a holder that is gone is replaced within two terms,
// and one that was replaced writes nothing more.
func TestLease_clock(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		s := open(t, url)
		ctx := t.Context()
		for _, tc := range []struct {
			step time.Duration // of the clock
			free bool          // the lease may be taken then
		}{
			{0, false},
			{term / 2, false},
			{term - time.Second, false},
			{term, true},
			{1000 * time.Hour, true},
			{-time.Second, true}, // set back: its end is further ahead than anybody writes
			{-1000 * time.Hour, true},
		} {
			t.Run(fmt.Sprint(tc.step), func(t *testing.T) {
				name := "clock " + fmt.Sprint(tc.step)
				old, err := s.AcquireLease(ctx, name, "a", term)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.StepClock(ctx, name, tc.step); err != nil {
					t.Fatal(err)
				}
				_, err = s.AcquireLease(ctx, name, "b", term)
				if tc.free && err != nil || !tc.free && !errors.Is(err, errs.Conflict) {
					t.Errorf("%v", err)
				}
				err = s.RenewLease(ctx, name, old, term)
				if tc.free && !errors.Is(err, errs.Conflict) || !tc.free && err != nil {
					t.Errorf("the first holder: %v", err)
				}
			})
		}
		// Over, but nobody took it: still the holder's, who may renew it.
		if _, err := s.AcquireLease(ctx, "x", "a", term); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.StepClock(ctx, "x", 2*term), s.RenewLease(ctx, "x", 1, term)); err != nil {
			t.Error(err)
		}
		if _, err := s.AcquireLease(ctx, "x", "b", term); !errors.Is(err, errs.Conflict) {
			t.Errorf("taken although it was renewed: %v", err)
		}
	})
}

// Two holders that fight, each sure that it is the one: every write that was
// accepted was made with the newest fence, and none was overwritten by an older.
func TestLease_fight(t *testing.T) {
	engines(t, func(t *testing.T, url string) {
		stores := []*store.Store{open(t, url), open(t, url)}
		ctx := t.Context()
		d := doc(vault + "state")
		var mu sync.Mutex
		accepted, refusals := 0, 0
		var wg sync.WaitGroup
		for i, s := range stores {
			wg.Go(func() {
				owner, fence := fmt.Sprint("holder ", i), uint64(0)
				for range 40 {
					// A term that is over before the writes below are done, so that both take it all the time.
					if got, err := s.AcquireLease(ctx, "fight", owner, time.Millisecond); err == nil {
						fence = got
					} else if !errors.Is(err, errs.Conflict) {
						t.Error(err)
					}
					for range 3 {
						time.Sleep(time.Millisecond)
						err := s.Write(ctx, func(tx *store.Tx) error {
							if err := tx.CheckFence(ctx, "fight", fence); err != nil {
								return err
							}
							d := d
							d.Properties = json.RawMessage(fmt.Sprint(fence))
							_, err := tx.Put(ctx, d, owner, resource.When{})
							return err
						})
						mu.Lock()
						switch {
						case err == nil:
							accepted++
						case errors.Is(err, errs.Conflict):
							refusals++
						default:
							t.Error(err)
						}
						mu.Unlock()
					}
				}
			})
		}
		wg.Wait()
		err := stores[0].Read(ctx, func(tx *store.Tx) error {
			cs, err := tx.Changes(ctx, 0, 1000)
			last := uint64(0)
			for _, c := range cs {
				var fence uint64
				if err := json.Unmarshal(c.Document.Properties, &fence); err != nil {
					return err
				}
				if fence < last {
					t.Errorf("revision %d was written with fence %d after %d", c.Revision, fence, last)
				}
				last = fence
			}
			if len(cs) != accepted {
				t.Errorf("%d changes, %d were acknowledged", len(cs), accepted)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if accepted == 0 || refusals == 0 {
			t.Errorf("%d accepted, %d refused: that was no fight", accepted, refusals)
		}
		t.Logf("%d accepted, %d refused", accepted, refusals)
	})
}
