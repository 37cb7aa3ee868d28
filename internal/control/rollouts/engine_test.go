package rollouts_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
	"ringwall/internal/store"
)

// A change that does no harm reaches every host, ring by ring.
func TestEngine_good(t *testing.T) {
	w := newWorld(t, 200, newKeys(t))
	w.begin("")
	s := w.until(change, rollout.Running, time.Minute, 5)
	if s.Epoch != 2 || s.Undo != 3 || s.Check.Hosts != 200 || len(s.Check.Rings) < 3 {
		t.Fatalf("%+v", s.Check)
	}
	seen := map[int]int{}
	for range 500 {
		s = w.status(change)
		if s.Phase == rollout.Done {
			break
		}
		if n := w.fleet.count(isOn(w.good)); n > 0 && seen[s.Ring] < n {
			seen[s.Ring] = n
		}
		w.tick(5 * time.Minute)
	}
	if s.Phase != rollout.Done || w.fleet.count(isOn(w.good)) != 200 {
		t.Fatalf("%s, %d hosts: %+v", s.Phase, w.fleet.count(isOn(w.good)), s.Why)
	}
	sum := 0
	for i, ring := range s.Check.Rings[:len(s.Check.Rings)-1] {
		if sum += ring.Count; seen[i] != sum {
			t.Errorf("while ring %d was under way %d hosts had it, want %d", i, seen[i], sum)
		}
	}
	if w.fleet.assigned != 200 {
		t.Errorf("%d assignments of 200 hosts", w.fleet.assigned)
	}
	// Who comes later gets it too.
	w.fleet.add("web-late")
	for range 4 {
		w.tick(time.Minute)
	}
	if got := w.fleet.all["web-late"].Report.Manifest; got != w.good {
		t.Errorf("a host that came later has %s", got)
	}
}

// A change that makes hosts deny what they allowed is stopped in the first ring
// and taken back without a person.
func TestEngine_bad(t *testing.T) {
	w := newWorld(t, 200, newKeys(t))
	w.fleet.breaks = func(x *fleet.Host) {
		if x.Report.Manifest == w.good {
			x.Report.Flips = 3
		}
	}
	w.begin("")
	w.until(change, rollout.Running, time.Minute, 5)
	hit := 0
	for range 50 {
		hit = max(hit, w.fleet.count(isOn(w.good)))
		w.tick(time.Minute)
	}
	s := w.status(change)
	if s.Phase != rollout.RolledBack || !s.Over || s.Ring != 0 || s.Why[0].Code != "flips" || len(s.Why[0].Hosts) == 0 {
		t.Errorf("%s in ring %d, over %v: %+v", s.Phase, s.Ring, s.Over, s.Why)
	}
	if hit == 0 || hit > s.Check.Rings[0].Count {
		t.Errorf("%d hosts had it, the first ring has %d", hit, s.Check.Rings[0].Count)
	}
	if n := w.fleet.count(isOn(w.back)); n != hit {
		t.Errorf("%d of %d hosts went back", n, hit)
	}
	if n := w.fleet.count(isOn(w.before)); n != 200-hit {
		t.Errorf("%d hosts have what they had, want %d", n, 200-hit)
	}
	if s.Final[0].Back != hit || s.Final[0].Flipped != hit {
		t.Errorf("%+v", s.Final)
	}
}

// What was taken back stays so although the rollout before it is done and still
// says what its hosts get: epochs only grow.
func TestEngine_afterRollback(t *testing.T) {
	k := newKeys(t)
	bad := k.content.put(t, k, 4, integrity.Digest{}, "")
	badBack := k.content.put(t, k, 5, bad, "")
	w := newWorld(t, 30, k)
	w.fleet.epochs[bad], w.fleet.epochs[badBack] = 4, 5
	w.begin(tenth)
	w.until(change, rollout.Done, 10*time.Minute, 100)
	w.fleet.breaks = func(x *fleet.Host) {
		if x.Report.Manifest == bad {
			x.Report.Flips = 1
		}
	}
	second := group + "/providers/Ringwall.Fleet/rollouts/second"
	w.put(second, fmt.Sprintf(`{"manifest":%q,"rollback":%q%s}`, bad, badBack, tenth))
	w.must(ana(), second, "start", `{}`)
	w.tick(0)
	w.must(bob(), second, "approve", `{}`)
	w.until(second, rollout.RolledBack, time.Minute, 20)
	late := w.fleet.add("web-late")
	for range 10 {
		w.tick(time.Minute)
	}
	back, kept := w.fleet.count(isOn(badBack)), w.fleet.count(isOn(w.good))
	if back == 0 || back+kept != 31 || late.Report.Manifest != w.good {
		t.Errorf("%d went back, %d kept what they had, the late one has epoch %d", back, kept, late.Report.Epoch)
	}
	if n := w.fleet.count(func(x *fleet.Host) bool { return x.Assigned != x.Report.Manifest }); n != 0 {
		t.Errorf("%d hosts are meant to have something else", n)
	}
	if err := w.act(ana(), change, "rollback", `{}`); !errors.Is(err, errs.Conflict) {
		t.Errorf("hosts with a higher epoch would not go back: %v", err)
	}
	// The next one takes the place of both.
	next := k.content.put(t, k, 6, integrity.Digest{}, "")
	w.fleet.epochs[next] = 6
	third := group + "/providers/Ringwall.Fleet/rollouts/third"
	w.put(third, fmt.Sprintf(`{"manifest":%q,"no_rollback":true%s}`, next, tenth))
	w.must(ana(), third, "start", `{}`)
	w.tick(0)
	w.must(bob(), third, "approve", `{}`)
	w.until(third, rollout.Done, 10*time.Minute, 100)
	w.tick(time.Minute)
	if n := w.fleet.count(isOn(next)); n != 31 || !w.status(change).Over || w.status(third).Over {
		t.Errorf("%d hosts have the third, the first is over: %v", n, w.status(change).Over)
	}
	if err := w.door.Delete(t.Context(), ana(), id(change), noCondition(), false); err != nil {
		t.Errorf("delete what is over: %v", err)
	}
}

// Hosts that go back by themselves speak against a change as well, and so do
// signals against which there is no proof, only comparison.
func TestEngine_signals(t *testing.T) {
	k := newKeys(t)
	for name, tc := range map[string]struct {
		breaks func(*fleet.Host)
		code   string
	}{
		"goes back by itself": {func(x *fleet.Host) {
			x.Report.Phase, x.Report.Failed, x.Report.Reason = fleet.Reverted, x.Report.Manifest, "sshd is down"
			x.Report.Manifest, x.Report.Epoch = [32]byte{1}, 1
		}, "refused"},
		"restarts":        {func(x *fleet.Host) { x.Report.AgentStarts++ }, "signal"},
		"units fail":      {func(x *fleet.Host) { x.Report.FailedUnits = []string{"nginx.service"} }, "signal"},
		"is not heard of": {func(x *fleet.Host) { x.Online = false }, "silent"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 300, k)
			w.fleet.breaks = func(x *fleet.Host) {
				if x.Report.Manifest == w.good {
					tc.breaks(x)
				}
			}
			w.begin(tenth)
			s := w.until(change, rollout.RollingBack, time.Minute, 60)
			if s.Ring != 0 || s.Why[0].Code != tc.code {
				t.Errorf("ring %d: %+v", s.Ring, s.Why)
			}
		})
	}
}

// Flips that any replica heard of stop a rollout before its hosts report next.
func TestEngine_blocks(t *testing.T) {
	w := newWorld(t, 200, newKeys(t))
	w.begin(tenth)
	w.until(change, rollout.Running, time.Minute, 5)
	w.tick(time.Minute)
	w.tick(time.Minute)
	var on []incident.Event
	for _, x := range w.fleet.all {
		if x.Report.Manifest == w.good {
			on = append(on, incident.Event{Host: x.ID, Kind: "library", Path: "/usr/lib/libfoo.so", Epoch: 2, Flip: true, At: w.now()})
		}
	}
	if len(on) < 2 {
		t.Fatalf("%d hosts have it", len(on))
	}
	for what, edit := range map[string]func(*incident.Event){
		"another epoch":            func(e *incident.Event) { e.Epoch = 7 },
		"no flip":                  func(e *incident.Event) { e.Flip = false },
		"a host that is no member": func(e *incident.Event) { e.Host = "stranger" },
	} {
		all := slices.Clone(on)
		for i := range all {
			edit(&all[i])
		}
		if err := w.engine.Blocks(t.Context(), all); err != nil {
			t.Fatal(err)
		}
		w.tick(0)
		if s := w.status(change); s.Phase != rollout.Running {
			t.Fatalf("%s: %s", what, s.Phase)
		}
	}
	if err := w.engine.Blocks(t.Context(), append(slices.Clone(on), on...)); err != nil {
		t.Fatal(err)
	}
	w.tick(0)
	if s := w.status(change); s.Phase != rollout.RollingBack || s.Why[0].Code != "flips" {
		t.Errorf("%s %+v", s.Phase, s.Why)
	}
}

// Silence is held against nobody while the server was away, or is cut off.
func TestEngine_cutOff(t *testing.T) {
	k := newKeys(t)
	all := func(w *world, online bool) {
		for _, x := range w.fleet.all {
			x.Online = online
		}
	}
	for name, tc := range map[string]struct {
		rings string
		cut   func(*world)
	}{
		"the server was down": {tenth, func(w *world) {
			all(w, false)
			w.pass(time.Hour)
			w.restart()
			w.tick(30 * time.Second)
			w.tick(30 * time.Second)
		}},
		"the network was cut": {tenth, func(w *world) {
			all(w, false)
			for range 60 {
				w.tick(time.Minute)
			}
		}},
		"and all have the change": {`,"rings":[{"name":"all","percent":100,"bake":{"time":"10h"}}]`, func(w *world) {
			all(w, false)
			for range 60 {
				w.tick(time.Minute)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 100, k)
			w.begin(tc.rings)
			w.until(change, rollout.Running, time.Minute, 5)
			for range 5 {
				w.tick(time.Minute)
			}
			if w.fleet.count(isOn(w.good)) == 0 {
				t.Fatal("nobody has it")
			}
			tc.cut(w)
			s := w.status(change)
			if s.Phase != rollout.Running || s.Ring != 0 {
				t.Fatalf("%s in ring %d: %+v", s.Phase, s.Ring, s.Why)
			}
			all(w, true)
			w.fleet.step()
			w.until(change, rollout.Done, 10*time.Minute, 100)
			err := w.store.Read(t.Context(), func(tx *store.Tx) error {
				hits, err := tx.RolloutHits(t.Context(), id(change).Key())
				if len(hits) != 0 {
					t.Errorf("%d hits, such as %+v", len(hits), hits[0])
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Signals of any replica are compared; those from before the rollout are not.
func TestEngine_signalsOfReplicas(t *testing.T) {
	w := newWorld(t, 300, newKeys(t))
	w.begin(tenth)
	w.until(change, rollout.Running, time.Minute, 5)
	w.tick(time.Minute)
	w.tick(time.Minute)
	for _, x := range w.fleet.all {
		if x.Report.Manifest == w.good {
			w.fleet.signals = append(w.fleet.signals,
				fleet.Signal{Host: x.ID, Name: "attestation", At: noon().Add(-time.Minute)},
				fleet.Signal{Host: x.ID, Name: "coffee", At: w.now()})
		}
	}
	w.tick(time.Second)
	if s := w.status(change); s.Phase != rollout.Running {
		t.Fatalf("%s: %+v", s.Phase, s.Why)
	}
	for _, s := range slices.Clone(w.fleet.signals) {
		w.fleet.signals = append(w.fleet.signals, fleet.Signal{Host: s.Host, Name: "attestation", At: w.now()})
	}
	w.tick(time.Second)
	if s := w.status(change); s.Phase != rollout.RollingBack || s.Why[0].Code != "signal" || !strings.HasPrefix(s.Why[0].Text, "attestation: ") {
		t.Errorf("%s: %+v", s.Phase, s.Why)
	}
}

// Once a halt is stored nobody is admitted; who has the change keeps it. When it
// is gone the rollout goes on.
func TestEngine_halt(t *testing.T) {
	w := newWorld(t, 40, newKeys(t))
	w.begin(tenth + `,"max_unavailable":1`)
	w.until(change, rollout.Running, time.Second, 5)
	for range 3 {
		w.tick(time.Second)
	}
	w.put(halts+"stop", `{"reason":"something is wrong"}`)
	had := w.fleet.count(func(x *fleet.Host) bool { return x.Assigned == w.good })
	if had == 0 {
		t.Fatal("nobody had it when the halt came")
	}
	for range 60 {
		w.tick(time.Minute)
	}
	if n := w.fleet.count(func(x *fleet.Host) bool { return x.Assigned == w.good }); n != had {
		t.Errorf("%d hosts, %d when the halt came", n, had)
	}
	p, err := w.engine.Progress(t.Context(), ana(), id(change))
	if err != nil || p.Verdict != rollout.Hold || p.Why[0].Code != "halted" || !strings.Contains(p.Why[0].Text, "something is wrong (stop, by ana)") {
		t.Errorf("%+v, %v", p, err)
	}
	if err := w.door.Delete(t.Context(), ana(), id(halts+"stop"), noCondition(), false); err != nil {
		t.Fatal(err)
	}
	w.until(change, rollout.Done, 5*time.Minute, 500)
}

// While it is halted an approved rollout does not begin, and nothing is tried and
// fails, which would be on record every second.
func TestEngine_haltBeforeItBegins(t *testing.T) {
	w := newWorld(t, 30, newKeys(t))
	w.propose(tenth)
	w.put(halts+"stop", `{"reason":"not now"}`)
	w.must(bob(), change, "approve", `{}`)
	count := func() (n int) {
		err := w.store.Read(t.Context(), func(tx *store.Tx) error {
			all, err := tx.Audit(t.Context(), 0, 1000)
			n = len(all)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	for range 10 {
		w.tick(time.Second)
	}
	if s := w.status(change); s.Phase != rollout.Proposed || count() != before {
		t.Errorf("%s, %d records more", s.Phase, count()-before)
	}
	p, err := w.engine.Progress(t.Context(), ana(), id(change))
	if err != nil || p.Why[0].Code != "halted" {
		t.Errorf("%+v, %v", p, err)
	}
	if err := w.door.Delete(t.Context(), ana(), id(halts+"stop"), noCondition(), false); err != nil {
		t.Fatal(err)
	}
	w.until(change, rollout.Running, time.Second, 3)
}

// A pause is a halt of one rollout; a person can let a ring go on, and take all
// of it back at any time.
func TestEngine_people(t *testing.T) {
	w := newWorld(t, 100, newKeys(t))
	w.begin("")
	w.until(change, rollout.Running, time.Minute, 5)
	w.must(ana(), change, "pause", `{"reason":"lunch"}`)
	for range 40 {
		w.tick(5 * time.Minute)
	}
	if s := w.status(change); s.Ring != 0 || s.Paused != "paused: lunch (by ana)" {
		t.Errorf("%+v", s)
	}
	w.must(ana(), change, "resume", `{}`)
	w.tick(time.Second)
	w.tick(time.Second)
	if err := w.act(ana(), change, "promote", `{"reason":"in a hurry"}`); !errors.Is(err, errs.Denied) {
		t.Errorf("the author shortens the bake: %v", err)
	}
	w.must(bob(), change, "promote", `{"reason":"seen enough"}`)
	for range 4 {
		w.tick(time.Second)
	}
	if s := w.status(change); s.Ring != 1 {
		t.Errorf("ring %d after a promotion", s.Ring)
	}
	w.must(ana(), change, "rollback", `{"reason":"changed my mind"}`)
	s := w.until(change, rollout.RolledBack, time.Minute, 20)
	if w.fleet.count(isOn(w.good)) != 0 || w.fleet.count(isOn(w.back)) == 0 || !strings.Contains(s.Why[0].Text, "changed my mind (by ana)") {
		t.Errorf("%+v", s.Why)
	}
}

// What is done can be taken back too, and a host that was away finds it when it returns.
func TestEngine_rollbackOfWhatIsDone(t *testing.T) {
	w := newWorld(t, 20, newKeys(t))
	w.begin("")
	w.until(change, rollout.Done, 5*time.Minute, 500)
	away := w.fleet.all["web-0007"]
	away.Online = false
	w.pass(time.Hour)
	w.tick(time.Minute)
	w.must(ana(), change, "rollback", `{}`)
	w.until(change, rollout.RolledBack, time.Minute, 20)
	for range 5 {
		w.tick(time.Minute)
	}
	s := w.status(change)
	if s.Over || w.fleet.count(isOn(w.back)) != 19 || away.Assigned != w.back {
		t.Fatalf("over %v, %d hosts", s.Over, w.fleet.count(isOn(w.back)))
	}
	away.Online = true
	for range 5 {
		w.tick(time.Minute)
	}
	if s = w.status(change); !s.Over || w.fleet.count(isOn(w.back)) != 20 {
		t.Errorf("over %v, %d hosts", s.Over, w.fleet.count(isOn(w.back)))
	}
}

// A process whose lease was taken writes nothing any more.
func TestEngine_overtaken(t *testing.T) {
	w := newWorld(t, 20, newKeys(t))
	w.begin("")
	old := w.round
	w.restart()
	if err := old(t.Context()); !errors.Is(err, errs.Conflict) {
		t.Errorf("the old one: %v", err)
	}
	if s := w.status(change); s.Phase != rollout.Proposed || s.Check == nil {
		t.Errorf("%+v", s)
	}
	w.until(change, rollout.Done, 5*time.Minute, 500)
}

func noCondition() resource.When { return resource.When{} }

// The loop itself, with the clock on the wall: what people do is seen at once,
// and the loop ends with its context.
func TestEngine_run(t *testing.T) {
	w := newWorld(t, 20, newKeys(t))
	ctx, cancel := context.WithCancel(t.Context())
	e := rollouts.New(rollouts.Options{
		Door: w.door, Store: w.shelf(), Fleet: w.fleet, Content: w.content, Inventory: w.inventory,
		Log: slog.New(slog.DiscardHandler), Now: w.now, Round: time.Hour,
	})
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx, w.fence) }()
	until := func(what string, ok func(*rollouts.Status) bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !ok(w.status(change)); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: not within 20 s: %+v", what, w.status(change))
			}
		}
	}
	w.put(change, w.spec(tenth))
	w.must(ana(), change, "start", `{}`)
	until("checked", func(s *rollouts.Status) bool { return s.Check != nil })
	w.must(bob(), change, "approve", `{}`)
	until("runs", func(s *rollouts.Status) bool { return s.Phase == rollout.Running })
	until("is given", func(*rollouts.Status) bool {
		return w.fleet.count(func(x *fleet.Host) bool { return x.Assigned == w.good }) > 0
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
