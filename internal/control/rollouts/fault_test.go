package rollouts_test

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
	"ringwall/internal/store"
)

var errKilled = errors.New("killed")

// story is what happened in a run: the transitions on record, in order, and what
// every host has in the end.
type story struct {
	transitions []string
	hosts       map[string]integrity.Digest
	given       map[string][]integrity.Digest // to each host, in order
	kills       int
}

// tell runs a rollout to its end. With a rate the process is killed at that share
// of its instructions that leave it, and started again.
func tell(t *testing.T, k *keys, seed uint64, rate float64, end rollout.Phase, breaks func(*world, *fleet.Host)) story {
	t.Helper()
	w := newWorld(t, 30, k)
	if breaks != nil {
		w.fleet.breaks = func(x *fleet.Host) { breaks(w, x) }
	}
	r := rand.New(rand.NewPCG(seed, 1))
	out := story{hosts: map[string]integrity.Digest{}, given: map[string][]integrity.Digest{}}
	var mu sync.Mutex // what a killed process had begun may go on for a moment
	dies := func() error {
		mu.Lock()
		defer mu.Unlock()
		if r.Float64() < rate {
			out.kills++
			return errKilled
		}
		return nil
	}
	round := func() {
		w.fleet.fail = dies
		w.setFault(dies)
		for {
			err := w.round(context.Background())
			if err == nil {
				break
			}
			if !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			w.setFault(nil)
			w.restart()
			w.setFault(dies)
		}
		w.fleet.fail = nil
		w.setFault(nil)
	}
	w.put(change, w.spec(tenth))
	w.must(ana(), change, "start", `{}`)
	round()
	w.must(bob(), change, "approve", `{}`)
	for range 40 {
		if s := w.status(change); s.Phase == end && (s.Over || end == rollout.Done) {
			break
		}
		round()
		w.pass(5 * time.Minute)
		w.fleet.step()
		for _, x := range w.fleet.all {
			if g := out.given[x.ID]; len(g) == 0 || g[len(g)-1] != x.Assigned {
				out.given[x.ID] = append(g, x.Assigned)
			}
		}
	}
	if s := w.status(change); s.Phase != end {
		t.Fatalf("seed %d: stays %s: %+v", seed, s.Phase, s.Why)
	}
	for _, x := range w.fleet.all {
		out.hosts[x.ID] = x.Report.Manifest
	}
	out.transitions = w.transitions()
	return out
}

// Wherever the process is killed, what happens is what happens without it: no
// transition is lost, none is made twice, and every host gets the same.
func TestEngine_killed(t *testing.T) {
	k := newKeys(t)
	seeds := uint64(8)
	if testing.Short() {
		seeds = 5
	}
	for name, tc := range map[string]struct {
		end    rollout.Phase
		breaks func(*world, *fleet.Host)
	}{
		"good": {rollout.Done, nil},
		"bad": {rollout.RolledBack, func(w *world, x *fleet.Host) {
			if x.Report.Manifest == w.good {
				x.Report.Flips = 1
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want := tell(t, k, 0, 0, tc.end, tc.breaks)
			kills := 0
			for seed := range seeds {
				got := tell(t, k, seed, 0.15, tc.end, tc.breaks)
				kills += got.kills
				if !slices.Equal(got.transitions, want.transitions) {
					t.Errorf("seed %d: transitions\n%q\nwant\n%q", seed, got.transitions, want.transitions)
				}
				if !maps.Equal(got.hosts, want.hosts) {
					t.Errorf("seed %d: hosts have something else", seed)
				}
				for host, g := range got.given {
					if len(g) > len(want.given[host]) {
						t.Errorf("seed %d: %s was given %d manifests, without kills %d", seed, host, len(g), len(want.given[host]))
					}
				}
			}
			t.Logf("killed %d times in %d runs; %q", kills, seeds, want.transitions)
			if kills < int(seeds) {
				t.Errorf("killed %d times in %d runs: this tests nothing", kills, seeds)
			}
		})
	}
}

// Once a halt or a pause is stored nobody is admitted, at whichever instruction
// of the engine it comes.
func TestEngine_stoppedAnywhere(t *testing.T) {
	k := newKeys(t)
	for name, stop := range map[string]func(*control.Door) error{
		"halt": func(d *control.Door) error {
			_, err := d.Put(context.Background(), ana(), resource.Document{ID: id(halts + "now"), Properties: []byte(`{"reason":"stop"}`)}, resource.When{}, false)
			return err
		},
		"pause": func(d *control.Door) error {
			_, err := d.Invoke(context.Background(), ana(), id(change), "pause", []byte(`{}`))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			came, after := 0, 0
			for n := 2; n <= 20; n += 2 {
				if atStop, now := stopAt(t, k, n, stop); atStop >= 0 {
					came++
					after += min(atStop, 1)
					if now != atStop {
						t.Errorf("it came at call %d with %d hosts admitted, now %d are", n, atStop, now)
					}
				}
			}
			if came < 6 || after == 0 || after == came {
				t.Errorf("it came %d times, %d of them after an admission: this tests nothing", came, after)
			}
		})
	}
}

// stopAt stops a rollout when the engine leaves itself for the n-th time, and
// returns how many hosts were admitted then (-1: it never came to that) and are
// some rounds later.
func stopAt(t *testing.T, k *keys, n int, stop func(*control.Door) error) (then, now int) {
	t.Helper()
	w := newWorld(t, 12, k)
	w.begin(tenth)
	bare, err := control.New(shelf{Store: w.store}, rollouts.Kinds(w.now)...)
	if err != nil {
		t.Fatal(err)
	}
	admitted := func() (n int) {
		err := w.store.Read(t.Context(), func(tx *store.Tx) error {
			all, err := tx.RolloutHosts(t.Context(), id(change).Key())
			for i := range all {
				if !all[i].Admitted.IsZero() {
					n++
				}
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return n
	}
	var calls atomic.Int64
	then = -1
	w.setFault(func() error {
		if calls.Add(1) == int64(n) {
			if err := stop(bare); err != nil {
				t.Error(err)
			}
			then = admitted()
		}
		return nil
	})
	for range 5 {
		_ = w.round(t.Context()) // that a write was refused is what is wanted
		w.pass(10 * time.Second)
		w.fleet.step()
	}
	w.setFault(nil)
	return then, admitted()
}
