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

// Going back is a manifest with a higher epoch, for hosts that have what it undoes.
// What tightens stays, whatever the host's own checks say.
// A transfer that is cut, or brings something else, is begun again; what lies half
// on the disk is never used.
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
	t.Logf("a block was with the server after %v", fastest)
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
// The power goes between any two files that confirming writes.
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
