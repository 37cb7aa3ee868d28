package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func TestManifest_confirmed(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	one, two, three := l.release("#!/bin/sh\n# one\n"), l.release("#!/bin/sh\n# two\n"), l.release("#!/bin/sh\n# three\n")
	f.piece = 100 // in many pieces
	m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, []ReleaseRequest{one, two}, nil)
	f.assign(m6)
	f.untilPhase(agentpb.State_PHASE_PROVISIONAL, m6)
	s := f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
	if s.GetEpoch() != 6 || !l.allows("#!/bin/sh\n# one\n") {
		t.Errorf("state %v", s)
	}
	if least, err := l.agent.floor.Get(); err != nil || least != 6 {
		t.Errorf("floor %d, %v", least, err)
	}
	table := s.GetKernelTable()
	// the host's own release stays, those of an earlier manifest go with it
	var a ReleaseAnswer
	own := l.release("#!/bin/sh\n# own\n")
	if err := l.client().Call(t.Context(), "release", own, &a); err != nil {
		t.Fatal(err)
	}
	m7 := l.manifest(f, l.policy(7, "enforce", allowTool), 7, []ReleaseRequest{two}, nil)
	f.assign(m7)
	s = f.untilPhase(agentpb.State_PHASE_CONFIRMED, m7)
	if l.allows("#!/bin/sh\n# one\n") || !l.allows("#!/bin/sh\n# two\n") || !l.allows("#!/bin/sh\n# own\n") {
		t.Error("not what the manifest lists and the host added")
	}
	if slices.Equal(table, s.GetKernelTable()) {
		t.Error("another table has the same digest")
	}
	if st := l.status().Link; st.LocalItems != 1 || st.Phase != "confirmed" {
		t.Errorf("link %s", jsonOf(st))
	}
	m8 := l.manifest(f, l.policy(8, "enforce", allowTool), 8, []ReleaseRequest{three}, nil)
	f.assign(m8)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m8)
	stale := filepath.Join(l.state(), dirChunks, integrity.Digest(sha256.Sum256(one.Catalogue)).String())
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(stale); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("content of no manifest is kept")
		}
	}
	l.stop()
	l.start()
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m8)
	if !l.allows("#!/bin/sh\n# three\n") || !l.allows("#!/bin/sh\n# own\n") {
		t.Error("lost in a restart")
	}
}

func TestManifest_refused(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	stranger := l.authority("stranger")
	m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, nil, nil)
	f.assign(m6)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
	foreign := l.release("#!/bin/sh\n# x\n")
	foreign.Record = []byte("{}")
	signed := func(keys func(), m func() []byte) []byte {
		was := l.keys
		keys()
		defer func() { l.keys = was }()
		return m()
	}
	p9, p6 := l.policy(9, "enforce", allowTool), l.policy(6, "enforce", allowTool+"# again\n")
	for name, m := range map[string][]byte{
		"an old one again":          l.manifest(f, l.policy(5, "enforce", allowTool), 5, nil, nil),
		"another of this epoch":     l.manifest(f, p6, 6, nil, nil),
		"for another scope":         l.manifest(f, p9, 9, nil, func(m *codesign.Manifest) { m.Scope = "/subscriptions/other" }),
		"for a scope of like name":  l.manifest(f, p9, 9, nil, func(m *codesign.Manifest) { m.Scope = "/subscriptions/s/resourceGroups/edg" }),
		"too late":                  l.manifest(f, p9, 9, nil, func(m *codesign.Manifest) { m.NotAfter = l.now().Add(-time.Minute) }),
		"not its policy's epoch":    l.manifest(f, p9, 10, nil, nil),
		"undoes what it has not":    l.manifest(f, l.policy(7, "enforce", allowTool), 7, nil, func(m *codesign.Manifest) { m.Undoes = integrity.Digest{1} }),
		"another fleet's":           signed(func() { l.keys = stranger }, func() []byte { return l.manifest(f, p9, 9, nil, nil) }),
		"a policy of another fleet": l.manifest(f, l.signedBy(stranger, l.policyYAML(9, "enforce", allowTool)), 9, nil, nil),
		"a release that is no such": l.manifest(f, p9, 9, []ReleaseRequest{foreign}, nil),
		"a supplement without rights": l.manifest(f, p9, 9, nil, func(m *codesign.Manifest) {
			m.Index = []integrity.Digest{f.keep([]byte(`[{"supplement":"` + f.keep([]byte("x")).String() + `"}]`))}
		}),
		"no manifest": []byte("{}"),
	} {
		t.Run(name, func(t *testing.T) {
			n := len(l.kernel.applied)
			f.assign(m)
			s := f.untilPhase(agentpb.State_PHASE_REFUSED, m)
			if s.GetEpoch() != 6 || s.GetReason() == "" || len(l.kernel.applied) != n {
				t.Errorf("state %v", s)
			}
		})
	}
	t.Run("goes on with a good one", func(t *testing.T) {
		m := l.manifest(f, p9, 9, nil, nil)
		f.assign(m)
		f.untilPhase(agentpb.State_PHASE_CONFIRMED, m)
	})
}

func TestManifest_rollback(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, nil, nil)
	m7 := l.manifest(f, l.policy(7, "enforce", allowTool), 7, nil, func(m *codesign.Manifest) { m.Undoes = sha256.Sum256(m6) })
	f.assign(m6)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
	f.assign(m7)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m7)
}

func TestManifest_notYet(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	m := l.manifest(f, l.policy(6, "enforce", allowTool), 6, nil, func(m *codesign.Manifest) { m.NotBefore = l.now().Add(time.Hour) })
	f.assign(m)
	time.Sleep(100 * time.Millisecond)
	if s := f.last(); s.GetEpoch() != 5 || s.GetPhase() != agentpb.State_PHASE_NONE {
		t.Errorf("state %v", s)
	}
	l.forward(61 * time.Minute)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m)
}

func TestTrial_takenBack(t *testing.T) {
	t.Parallel()
	text := func(i int) string { return fmt.Sprintf("#!/bin/sh\n# %d\n", i) }
	for name, c := range map[string]struct {
		ssh   string // under the policy of the trial
		mute  bool   // the server does not answer during the trial
		after func(l *lab)
		why   string
	}{
		"the server is gone": {"active", true, func(*lab) {}, "the server has not answered"},
		"ssh died":           {"failed", false, func(*lab) {}, "no longer active: ssh.service"},
		"it refuses what was in use": {"active", true, func(l *lab) {
			for i := range maxFlips + 2 {
				l.use(uint64(i)+1, text(i), 6)
			}
		}, "contents that the manifest before allows"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, f := newLab(t), newFleetServer(t)
			trialMax := 700 * time.Millisecond
			l.options = func(o *Options) {
				o.pace = testPace()
				o.pace.trialMax = trialMax
				o.Units = Units{Watch: []string{"ssh.service", "other.service"}, Run: func(_ context.Context, args ...string) (string, error) {
					if args[0] != "is-active" {
						return "", nil
					}
					ssh := "active"
					if l.kernel.live().Epoch == 6 {
						ssh = c.ssh
					}
					return ssh + "\ninactive\n", errors.New("exit status 3")
				}}
			}
			contents := make([]ReleaseRequest, maxFlips+2)
			for i := range contents {
				contents[i] = l.release(text(i))
			}
			l.prepare(l.policy(5, "enforce", allowTool), contents...)
			l.startInit()
			l.join(f)
			f.until("a report", func(s *agentpb.State) bool { return s.GetEpoch() == 5 })
			m := l.manifest(f, l.policy(6, "enforce", ""), 6, nil, nil)
			f.set(func() { f.assigned, f.muteTrial = m, c.mute })
			f.until("the trial", func(s *agentpb.State) bool { return s.GetPhase() == agentpb.State_PHASE_PROVISIONAL })
			c.after(l)
			for end := time.Now().Add(time.Minute); l.kernel.live().Epoch != 5; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("not taken back")
				}
			}
			f.set(func() { f.muteTrial = false })
			s := f.untilPhase(agentpb.State_PHASE_REVERTED, m)
			if s.GetEpoch() != 5 || !strings.Contains(s.GetReason(), c.why) {
				t.Errorf("epoch %d, reason %q, want %q", s.GetEpoch(), s.GetReason(), c.why)
			}
			if least, err := l.agent.floor.Get(); err != nil || least != 5 {
				t.Errorf("floor %d, %v", least, err)
			}
			f.got("the signal", func(r *agentpb.Record) bool { return r.GetSignal().GetName() == signalReverted })
			// it stays so, also after a restart
			l.stop()
			trialMax = time.Minute
			l.start()
			f.untilPhase(agentpb.State_PHASE_REVERTED, m)
			if l.kernel.live().Epoch != 5 {
				t.Errorf("epoch %d after a restart", l.kernel.live().Epoch)
			}
			// and the next one is taken
			next := l.manifest(f, l.policy(7, "enforce", allowTool), 7, nil, nil)
			f.assign(next)
			f.untilPhase(agentpb.State_PHASE_CONFIRMED, next)
		})
	}
}

func TestManifest_tightens(t *testing.T) {
	t.Parallel()
	l, f := inFleetFor(t, 200*time.Millisecond)
	m := l.manifest(f, l.policy(6, "enforce", ""), 6, nil, func(m *codesign.Manifest) { m.Tightens = true })
	f.assign(m)
	for end := time.Now().Add(time.Minute); l.kernel.live().Epoch != 6; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not taken")
		}
	}
	f.set(func() { f.down = true })
	time.Sleep(400 * time.Millisecond)
	if e := l.kernel.live().Epoch; e != 6 {
		t.Errorf("epoch %d", e)
	}
	l.stop()
	l.start()
	if e := l.kernel.live().Epoch; e != 6 {
		t.Errorf("epoch %d after a restart", e)
	}
}

func TestChunks_spoiled(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	rel := l.release("#!/bin/sh\n# rel\n")
	m := l.manifest(f, l.policy(6, "enforce", allowTool), 6, []ReleaseRequest{rel}, nil)
	bad, n := map[integrity.Digest]int{}, 0
	f.piece = 50
	f.spoil = func(d integrity.Digest, offset uint64, data []byte) ([]byte, error) {
		if offset < 50 || bad[d] >= 2 {
			return data, nil
		}
		bad[d]++
		n++
		if n%2 == 0 {
			return append([]byte{^data[0]}, data[1:]...), nil
		}
		return nil, errDown
	}
	// a host that died while it wrote, and a chunk that a disk damaged
	d := integrity.Digest(sha256.Sum256(rel.Catalogue))
	for name, content := range map[string][]byte{"." + d.String() + ".tmp-1": rel.Catalogue[:10], d.String() + "x": {1}} {
		if err := os.WriteFile(filepath.Join(l.state(), dirChunks, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.assign(m)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m)
	if !l.allows("#!/bin/sh\n# rel\n") || n < 2 {
		t.Errorf("allowed %v, %d pieces were spoiled", l.allows("#!/bin/sh\n# rel\n"), n)
	}
	if b, err := os.ReadFile(filepath.Join(l.state(), dirChunks, d.String())); err != nil || !slices.Equal(b, rel.Catalogue) {
		t.Errorf("%v: another content under the digest", err)
	}
}

func TestFlip(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	used, attack := "#!/bin/sh\n# used\n", "#!/bin/sh\n# attack\n"
	m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, []ReleaseRequest{l.release(used)}, nil)
	f.assign(m6)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
	m7 := l.manifest(f, l.policy(7, "enforce", allowTool), 7, nil, nil)
	f.assign(m7)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m7)
	l.use(1, used, 7)
	l.use(2, attack, 7)
	if !f.got("what was in use", func(r *agentpb.Record) bool { return r.GetBlock().GetEvent() == 1 }).GetBlock().GetFlip() {
		t.Error("no flip: the manifest before allows it")
	}
	if f.got("an attack", func(r *agentpb.Record) bool { return r.GetBlock().GetEvent() == 2 }).GetBlock().GetFlip() {
		t.Error("an attack is a flip")
	}
	f.until("the count", func(s *agentpb.State) bool { return s.GetFlips() == 1 })
	// and after a restart the manifest before is compared with as well
	l.stop()
	l.start()
	f.until("a report", func(s *agentpb.State) bool { return s.GetAgentStarts() == 2 })
	l.use(3, used+"x", 7)
	l.use(4, used, 7)
	if !f.got("it once more", func(r *agentpb.Record) bool { return r.GetBlock().GetEvent() == 4 }).GetBlock().GetFlip() {
		t.Error("no flip after a restart")
	}
}

func TestTrial_crashAtEveryStep(t *testing.T) {
	t.Parallel()
	old, fresh := "#!/bin/sh\n# old\n", "#!/bin/sh\n# fresh\n"
	for _, how := range []string{"kept", "taken back", "tightens"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			l, f := inFleet(t)
			m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, []ReleaseRequest{l.release(old)}, nil)
			f.assign(m6)
			f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
			if how == "taken back" {
				l.stop()
				l.options = func(o *Options) { o.pace, o.pace.trialMax = testPace(), 300*time.Millisecond }
				l.start()
			}
			shots := map[string]*lab{}
			var order []string
			l.agent.opts.crash = func(step string) {
				name := fmt.Sprintf("%02d %s", len(order), step)
				order = append(order, name)
				shots[name] = l.again(t)
			}
			m7 := l.manifest(f, l.policy(7, "enforce", allowTool), 7, []ReleaseRequest{l.release(fresh)}, func(m *codesign.Manifest) { m.Tightens = how == "tightens" })
			f.set(func() { f.assigned, f.muteTrial = m7, how == "taken back" })
			want := agentpb.State_PHASE_CONFIRMED
			if how == "taken back" {
				want = agentpb.State_PHASE_REVERTED
				f.until("the trial", func(s *agentpb.State) bool { return s.GetPhase() == agentpb.State_PHASE_PROVISIONAL })
				for end := time.Now().Add(time.Minute); l.kernel.live().Epoch != 6 && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
				}
				f.set(func() { f.muteTrial = false })
			}
			f.untilPhase(want, m7)
			l.stop()
			if len(order) < 5 {
				t.Fatalf("steps %v", order)
			}
			f.set(func() { f.down = true })
			for _, name := range order {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					c := shots[name]
					c.t = t
					c.options = l.options
					c.start()
					e := c.kernel.live().Epoch
					least, err := c.agent.floor.Get()
					if err != nil || e != 6 && e != 7 || least > e {
						t.Fatalf("epoch %d, floor %d, %v", e, least, err)
					}
					if c.allows(old) != (e == 6) || c.allows(fresh) != (e == 7) {
						t.Errorf("epoch %d with the releases of the other one", e)
					}
					if how == "tightens" && e != 7 && !strings.Contains(name, "before trial") {
						t.Errorf("epoch %d: what tightens went back", e)
					}
					if _, err := c.agent.state.readBundle(fileTrial); !errors.Is(err, errs.NotFound) {
						t.Errorf("a trial is left: %v", err)
					}
					if !strings.Contains(name, "trial written") && !strings.Contains(name, "confirmed") && !strings.Contains(name, "failure written") {
						return // enough
					}
					c.stop()
					c.start() // and the start after that finds nothing left to do
					if again := c.kernel.live().Epoch; again != e {
						t.Errorf("epoch %d, and %d at the next start", e, again)
					}
				})
			}
		})
	}
}

func TestTrial_halfConfirmed(t *testing.T) {
	t.Parallel()
	old, fresh := "#!/bin/sh\n# old\n", "#!/bin/sh\n# fresh\n"
	l, f := inFleet(t)
	m6 := l.manifest(f, l.policy(6, "enforce", allowTool), 6, []ReleaseRequest{l.release(old)}, nil)
	f.assign(m6)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m6)
	var before *lab
	l.agent.opts.crash = func(step string) {
		if step == "outcome written" {
			before = l.again(t)
		}
	}
	m7 := l.manifest(f, l.policy(7, "enforce", allowTool), 7, []ReleaseRequest{l.release(fresh)}, nil)
	f.assign(m7)
	f.untilPhase(agentpb.State_PHASE_CONFIRMED, m7)
	l.stop()
	f.set(func() { f.down = true })
	order := []string{filePrevious, filePolicy, filePolicyCopy, "floor/epoch", fileBundlePrev, fileBundleCopy, fileBundle}
	for n := range len(order) + 1 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			c := before.again(t)
			c.options = l.options
			for _, name := range order[:n] {
				b, err := os.ReadFile(filepath.Join(l.state(), name))
				if err != nil {
					t.Fatal(err)
				}
				c.put(name, b)
			}
			c.start()
			e, want := c.kernel.live().Epoch, uint64(6)
			if n >= 2 {
				want = 7
			}
			least, err := c.agent.floor.Get()
			if err != nil || e != want || least > e || c.allows(old) != (e == 6) || c.allows(fresh) != (e == 7) {
				t.Errorf("epoch %d, floor %d, %v", e, least, err)
			}
			if b, err := c.agent.state.readBundle(fileBundle); err != nil || b.Epoch != e {
				t.Errorf("the confirmed manifest: %v, %v", b, err)
			}
		})
	}
}
