package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/enforce"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func TestJoin(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	s := f.until("a first report", func(s *agentpb.State) bool { return s.GetEpoch() == 5 })
	if s.GetPhase() != agentpb.State_PHASE_NONE || s.GetMode() != "enforce" || len(s.GetBootId()) != 16 || len(s.GetKernelTable()) != 32 || s.GetLabels()["role"] != "edge" ||
		s.GetAgentStarts() != 1 || s.GetAgentVersion() != "test" || !s.GetEnforcementProven() {
		t.Errorf("state %v", s)
	}
	st, err := os.Stat(filepath.Join(l.state(), fileLink))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, mode %v", err, st.Mode())
	}
	raw, err := os.ReadFile(filepath.Join(l.state(), fileLink))
	if err != nil || strings.Contains(string(raw), joinWord) {
		t.Errorf("the token is kept: %v", err)
	}
	link := l.status().Link
	for end := time.Now().Add(time.Minute); link != nil && link.State != linkConnected && time.Now().Before(end); link = l.status().Link {
		time.Sleep(5 * time.Millisecond)
	}
	if link == nil || link.Server != f.srv.URL || link.Resource != hostPlace || !slices.Equal(link.CA, []string{"Fleet server CA"}) || link.State != linkConnected {
		t.Errorf("status %s", jsonOf(link))
	}
	t.Run("again changes nothing", func(t *testing.T) {
		l.join(f)
		again, err := os.ReadFile(filepath.Join(l.state(), fileLink))
		if err != nil || f.enrols != 1 || !strings.Contains(string(again), "BEGIN") {
			t.Errorf("%v, %d enrolments", err, f.enrols)
		}
	})
	t.Run("another server", func(t *testing.T) {
		q := f.request()
		q.Server = "https://127.0.0.1:1"
		var s LinkStatus
		if err := l.client().Call(t.Context(), "join", q, &s); !errors.Is(err, errs.Conflict) {
			t.Error(err)
		}
	})
	t.Run("leave, and another start", func(t *testing.T) {
		var none struct{}
		if err := l.client().Call(t.Context(), "leave", none, &none); err != nil {
			t.Fatal(err)
		}
		l.stop()
		l.start()
		if s := l.status(); s.Link != nil || s.State != StateEnforcing {
			t.Errorf("status %s, %s", s.State, jsonOf(s.Link))
		}
	})
}

func TestJoin_refused(t *testing.T) {
	t.Parallel()
	f, other := newFleetServer(t), newFleetServer(t)
	l := newLab(t)
	l.prepare(nil)
	for name, c := range map[string]struct {
		change func(*JoinRequest)
		kind   error
	}{
		"no https":             {func(q *JoinRequest) { q.Server = "http://127.0.0.1:1" }, errs.Invalid},
		"a password":           {func(q *JoinRequest) { q.Server = "https://a:b@127.0.0.1:1" }, errs.Invalid},
		"a path":               {func(q *JoinRequest) { q.Server += "/x" }, errs.Invalid},
		"a CA of another":      {func(q *JoinRequest) { q.CA = other.request().CA }, errs.Untrusted},
		"no CA":                {func(q *JoinRequest) { q.CA = "" }, errs.Invalid},
		"no token":             {func(q *JoinRequest) { q.Token = "" }, errs.Invalid},
		"another token":        {func(q *JoinRequest) { q.Token = "x" }, errs.Denied},
		"a name with a blank":  {func(q *JoinRequest) { q.Name = "a b" }, errs.Invalid},
		"a label that is long": {func(q *JoinRequest) { q.Labels = map[string]string{"a": strings.Repeat("x", 200)} }, errs.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			q := f.request()
			c.change(&q)
			if _, err := JoinStopped(t.Context(), l.state(), q, l.now(), "test"); !errors.Is(err, c.kind) {
				t.Errorf("%v, want %v", err, c.kind)
			}
			if err := LeaveStopped(l.state()); err != nil {
				t.Error(err)
			}
		})
	}
}

// The answer of the first try is lost: the same key asks again, and the token is
// good for it.
func TestJoin_answerLost(t *testing.T) {
	t.Parallel()
	f, l := newFleetServer(t), newLab(t)
	l.prepare(nil)
	f.set(func() { f.down = true })
	if _, err := JoinStopped(t.Context(), l.state(), f.request(), l.now(), "test"); err == nil {
		t.Fatal("joined")
	}
	f.set(func() { f.down = false })
	if _, err := JoinStopped(t.Context(), l.state(), f.request(), l.now(), "test"); err != nil {
		t.Fatal(err)
	}
	stranger := newLab(t)
	stranger.prepare(nil)
	if _, err := JoinStopped(t.Context(), stranger.state(), f.request(), l.now(), "test"); !errors.Is(err, errs.Denied) {
		t.Errorf("another key with the same token: %v", err)
	}
}

func TestLink_renews(t *testing.T) {
	t.Parallel()
	l, f := newLab(t), newFleetServer(t)
	f.life = 2 * time.Minute
	l.options = func(o *Options) { o.pace = testPace() }
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	l.join(f)
	before, err := l.agent.state.readLink()
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() { f.life = time.Hour })
	l.forward(100 * time.Second) // a third of its life and less
	f.until("a renewal", func(*agentpb.State) bool { f.mu.Lock(); defer f.mu.Unlock(); return f.renewals == 1 })
	n := len(f.states)
	f.until("a call with it", func(*agentpb.State) bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.states) > n+1 })
	after, err := l.agent.state.readLink()
	if err != nil || after.Key == before.Key || after.Certificates == before.Certificates || f.renewals != 1 {
		t.Errorf("%v: the same key or certificate, or %d renewals", err, f.renewals)
	}
}

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

// Going back is a manifest with a higher epoch, for hosts that have what it undoes.
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

// What tightens stays, whatever the host's own checks say.
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

// A transfer that is cut, or brings something else, is begun again; what lies half
// on the disk is never used.
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

// Whatever of the fleet's files is damaged, the host enforces what it confirmed,
// and puts right what the server can give it again.
func TestFleetFiles_damaged(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	rel := l.release("#!/bin/sh\n# rel\n")
	for e := 6; e <= 7; e++ {
		m := l.manifest(f, l.policy(e, "enforce", allowTool), uint64(e), []ReleaseRequest{rel}, nil)
		f.assign(m)
		f.untilPhase(agentpb.State_PHASE_CONFIRMED, m)
	}
	l.stop()
	catalogue := filepath.Join(dirChunks, integrity.Digest(sha256.Sum256(rel.Catalogue)).String())
	for _, file := range []string{fileBundle, fileBundleCopy, fileBundlePrev, fileTrial, fileOutcome, fileLink, "spool/blocks/stream", catalogue} {
		for kind, do := range map[string]func(string) error{
			"cut": func(n string) error { return os.WriteFile(n, []byte("{"), 0o600) },
			"directory": func(n string) error {
				return errors.Join(os.RemoveAll(n), os.MkdirAll(filepath.Join(n, "full"), 0o700))
			},
		} {
			if kind == "directory" && file != fileBundle && file != catalogue {
				continue // enough
			}
			t.Run(file[:min(len(file), 20)]+" "+kind, func(t *testing.T) {
				t.Parallel()
				c := l.again(t)
				c.t = t
				c.options = l.options
				if err := do(filepath.Join(c.state(), file)); err != nil {
					t.Fatal(err)
				}
				c.start()
				if s := c.status(); s.State != StateEnforcing || s.Policy.Epoch != 7 || !c.kernel.protected {
					t.Errorf("state %s, epoch %d", s.State, s.Policy.Epoch)
				}
				for end := time.Now().Add(time.Minute); !c.allows("#!/bin/sh\n# rel\n"); time.Sleep(5 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("the manifest's release is not authorised")
					}
				}
			})
		}
	}
}

// The server is away: everything waits on the disk, over a restart too, and comes
// in order when it is back. Blocks are with the server in less than a second.
func TestSpool_serverAway(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	f.until("a report", func(s *agentpb.State) bool { return s.GetEpoch() == 5 })
	seq := uint64(0)
	block := func() { seq++; l.use(seq, fmt.Sprintf("content %d", seq), 5) }
	fastest := time.Hour
	for n := uint64(1); n <= 5 && fastest > time.Second; n++ { // a busy machine may need another try
		began := time.Now()
		block()
		f.got("a block", func(r *agentpb.Record) bool { return r.GetBlock().GetEvent() == n })
		fastest = min(fastest, time.Since(began))
	}
	if fastest > time.Second {
		t.Errorf("a block took %v to the server", fastest)
	}
	connected := seq
	f.set(func() { f.down = true })
	for range 20 {
		block()
	}
	l.waitFor(fmt.Sprintf("content %d", seq))
	l.forward(time.Hour)
	l.stop()
	l.start()
	for range 20 {
		block()
	}
	l.waitFor(fmt.Sprintf("content %d", seq))
	if s := l.status(); s.State != StateEnforcing || s.Link.Spooled == 0 {
		t.Errorf("state %s, %s", s.State, jsonOf(s.Link))
	}
	f.set(func() { f.down = false; f.busy = 20 * time.Millisecond })
	time.Sleep(100 * time.Millisecond)
	f.set(func() { f.busy = 0 })
	f.got("the last block", func(r *agentpb.Record) bool { return r.GetBlock().GetEvent() == seq })
	f.mu.Lock()
	defer f.mu.Unlock()
	var got []uint64
	for _, r := range f.records {
		if b := r.GetBlock(); b != nil {
			got = append(got, b.GetEvent())
			if b.GetReason() != "unlisted" || b.GetMode() != "enforce" || len(b.GetSha256()) != 32 || b.GetEpoch() != 5 || b.GetFlip() || b.GetCount() != 1 {
				t.Errorf("block %v", b)
			}
		}
	}
	if uint64(len(got)) != connected+40 || !slices.IsSorted(got) {
		t.Errorf("blocks %v", got)
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

func TestDirectives(t *testing.T) {
	t.Parallel()
	l, f := newLab(t), newFleetServer(t)
	var mu sync.Mutex
	var calls [][]netip.AddrPort
	attested := make(chan struct{}, 1)
	l.options = func(o *Options) {
		o.pace = testPace()
		o.Isolate = func(_ context.Context, to []netip.AddrPort) error {
			mu.Lock()
			defer mu.Unlock()
			calls = append(calls, to)
			return nil
		}
		o.Attest = func(context.Context, agentpb.AgentClient) error { attested <- struct{}{}; return nil }
	}
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	l.join(f)
	last := func() []netip.AddrPort {
		mu.Lock()
		defer mu.Unlock()
		if len(calls) == 0 {
			return nil
		}
		return calls[len(calls)-1]
	}
	f.set(func() {
		f.directives = &agentpb.Directives{Revision: 3, Isolated: true, AttestUs: 5, ResendInventory: true}
	})
	f.until("isolation", func(s *agentpb.State) bool { return s.GetIsolated() })
	if to := last(); len(to) != 1 || "https://"+to[0].String() != f.srv.URL {
		t.Errorf("isolated to %v", to)
	}
	<-attested
	var none struct{}
	if err := l.client().Call(t.Context(), "leave", none, &none); !errors.Is(err, errs.Denied) {
		t.Errorf("left while isolated: %v", err)
	}
	l.stop()
	mu.Lock()
	calls = nil
	mu.Unlock()
	l.start()
	f.until("isolation after a restart", func(s *agentpb.State) bool { return s.GetIsolated() && s.GetAgentStarts() == 2 })
	if len(last()) != 1 {
		t.Errorf("after a restart isolated to %v", last())
	}
	f.set(func() { f.directives = &agentpb.Directives{Revision: 4} })
	f.until("the release", func(s *agentpb.State) bool { return !s.GetIsolated() })
	if len(last()) != 0 {
		t.Errorf("released to %v", last())
	}
}

// What runs here is in the inventory: this test does.
func TestInventory(t *testing.T) {
	t.Parallel()
	l, f := newLab(t), newFleetServer(t)
	l.options = func(o *Options) {
		o.pace = testPace()
		o.pace.sampleTick, o.pace.reportTick = 20*time.Millisecond, 20*time.Millisecond
	}
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	l.join(f)
	self, _, err := identity("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	r := f.got("this test", func(r *agentpb.Record) bool { return slices.Equal(r.GetExecution().GetSha256(), self[:]) }).GetExecution()
	exe, _ := os.Readlink("/proc/self/exe")
	if r.GetPath() != exe || r.GetKind() != "exec" || r.GetCount() == 0 || r.GetSigner() == "" {
		t.Errorf("execution %v, want %s", r, exe)
	}
}

// A crash at any step of a trial leaves a host that enforces the old or the new
// policy with what belongs to it, and takes the next manifest.
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

// The power goes between any two files that confirming writes.
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

// What the agent says last waits for the next one to send.
func TestSpool_lastWords(t *testing.T) {
	t.Parallel()
	l, f := inFleet(t)
	f.until("a report", func(s *agentpb.State) bool { return s.GetEpoch() == 5 })
	l.stop()
	l.start()
	f.got("the end of the first agent", func(r *agentpb.Record) bool { return r.GetNotice().GetCode() == noticeStop })
	f.got("the signal", func(r *agentpb.Record) bool { return r.GetSignal().GetName() == signalRestart })
}

// The digest is of what the kernel says that it enforces, or of nothing that the
// agent ever made.
func TestTableDigest(t *testing.T) {
	t.Parallel()
	table := func(change func(*integrity.Table)) *integrity.Table {
		x := &integrity.Table{PolicyDigest: integrity.Digest{1}, Epoch: 5, Entries: map[integrity.Key]integrity.Entry{
			{Digest: integrity.Digest{2}}: {Kinds: integrity.SetOf(integrity.KindExec)}, {Digest: integrity.Digest{3}}: {Kinds: integrity.SetOf(integrity.KindScript)},
		}}
		if change != nil {
			change(x)
		}
		return x
	}
	kernel := func(x *integrity.Table) *enforce.Status {
		return &enforce.Status{Epoch: x.Epoch, Policy: x.PolicyDigest, Entries: uint64(len(x.Entries)), Modes: x.Modes, Process: x.Process}
	}
	var d tableDigest
	base := table(nil)
	want := d.of(base, kernel(base))
	if again := table(nil); d.of(again, kernel(again)) != want {
		t.Error("an equal table has another digest")
	}
	for name, change := range map[string]func(*integrity.Table){
		"an entry's kinds": func(x *integrity.Table) {
			x.Entries[integrity.Key{Digest: integrity.Digest{2}}] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindScript)}
		},
		"an entry's role": func(x *integrity.Table) {
			x.Entries[integrity.Key{Digest: integrity.Digest{2}}] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindExec), Roles: integrity.RoleDebug}
		},
		"a mode":        func(x *integrity.Table) { x.Modes[integrity.KindExec] = integrity.ModeEnforce },
		"another entry": func(x *integrity.Table) { x.Entries[integrity.Key{Digest: integrity.Digest{4}}] = integrity.Entry{} },
	} {
		x := table(change)
		if d.of(x, kernel(x)) == want {
			t.Errorf("%s: the same digest", name)
		}
	}
	for name, change := range map[string]func(*enforce.Status){
		"nothing":       func(s *enforce.Status) { *s = enforce.Status{} },
		"another mode":  func(s *enforce.Status) { s.Modes[integrity.KindExec] = integrity.ModeAudit },
		"more content":  func(s *enforce.Status) { s.Entries++ },
		"another epoch": func(s *enforce.Status) { s.Epoch-- },
	} {
		s := kernel(base)
		change(s)
		if d.of(base, s) == want {
			t.Errorf("the kernel has %s, and the digest is that of the table", name)
		}
	}
}
