package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/agent"
	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/enforce"
	"ringwall/internal/integrity"
)

// noKernel stands for the engine, which this machine's kernel need not have: what
// is tested is how the agent and the server get on.
type noKernel struct {
	mu     sync.Mutex
	table  *integrity.Table
	raised uint64
	events chan enforce.Event
}

func (k *noKernel) Adopt(context.Context) ([]enforce.Running, error) { return nil, nil }

func (k *noKernel) Apply(t *integrity.Table) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.table = t
	return nil
}

func (k *noKernel) epoch() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.table == nil {
		return 0
	}
	return k.table.Epoch
}

func (k *noKernel) Guard(...string) error                      { return nil }
func (k *noKernel) Unguard(...string) error                    { return nil }
func (k *noKernel) IsGuarded(string) (bool, error)             { return true, nil }
func (k *noKernel) Protect() error                             { return nil }
func (k *noKernel) Relax(time.Duration) error                  { return nil }
func (k *noKernel) TrustVolume(uint64, integrity.Digest) error { return nil }
func (k *noKernel) ForgetVolume(uint64) error                  { return nil }
func (k *noKernel) Canary(context.Context) error               { return nil }
func (k *noKernel) MustMeasure() bool                          { return false }
func (k *noKernel) Measure(*os.File) error                     { return nil }
func (k *noKernel) IsCanary(enforce.Event) bool                { return false }
func (k *noKernel) Close() error                               { return nil }
func (k *noKernel) Remove() error                              { return nil }

func (k *noKernel) Status() (enforce.Status, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := enforce.Status{Protected: true, Counters: enforce.Counters{Raised: k.raised}}
	if t := k.table; t != nil {
		s.Epoch, s.Policy, s.Entries, s.Modes, s.Process = t.Epoch, t.PolicyDigest, uint64(len(t.Entries)), t.Modes, t.Process
	}
	return s, nil
}

func (k *noKernel) Events(ctx context.Context, fn func(enforce.Event)) error {
	for {
		select {
		case e := <-k.events:
			fn(e)
		case <-ctx.Done():
			return nil
		}
	}
}

const oneRing = `{"rings":[{"name":"all","percent":100}]}`

// A host's agent and the server, from the token to a manifest in force and a block
// that people see.
func TestHostJoin(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the agent answers root only")
	}
	l := newRolloutLab(t, 0, func(*codesign.Manifest, *agentpb.State) {})
	state, run := filepath.Join(l.dir, "state"), filepath.Join(l.dir, "run")
	dirs := []string{"--state", state, "--run", run}
	l.must(0, "admin", "", append([]string{"host", "init", "--trust", filepath.Join(l.dir, "keys"), "--tpm", "none", "--scope", "/sys/fs/cgroup/none"}, dirs...)...)
	join := append([]string{"host", "join", "--server", l.url, "--ca", filepath.Join(l.dir, "fleet/tls/ca.crt"), "--name", "web-1", "--label", "role=web", "--token-file", "-"}, dirs...)
	token := l.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--quiet")
	l.must(2, "admin", "", join[:len(join)-6]...)
	l.must(1, "admin", "rwj_none", join...)
	got := l.must(0, "admin", token, join...) // without an agent
	if !strings.Contains(got, "web-1") || strings.Contains(got, strings.TrimSpace(token)) {
		t.Errorf("joined: %s", got)
	}

	k := &noKernel{events: make(chan enforce.Event, 1)}
	a, err := agent.New(agent.Options{
		StateDir: state, RunDir: run, Log: slog.New(slog.DiscardHandler), Now: time.Now, NoBytecode: true, Version: "test",
		Open: func(enforce.Options) (agent.Enforcer, agent.Watcher, error) { return k, k, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	l.until("the host is online", func() bool {
		return strings.Contains(l.must(0, "admin", "", "fleet", "hosts", "list", "--quiet"), "online")
	})
	l.must(0, "admin", token, join...) // again: the agent says that it is so

	id := rolloutCollection(testGroup) + "/first"
	l.must(0, "admin", oneRing, "rollout", "start", "first", "--scope", testGroup, "--manifest", l.bundles[10].Manifest.String(), "--spec", "-", "--no-rollback")
	l.must(0, "bob", "", "rollout", "approve", id)
	l.until("epoch 10", func() bool { return k.epoch() == 10 })
	l.until("the server knows", func() bool {
		return strings.Contains(l.must(0, "admin", "", "fleet", "hosts", "show", "web-1"), "confirmed")
	})
	k.mu.Lock()
	k.raised = 1
	k.mu.Unlock()
	k.events <- enforce.Event{Seq: 1, Epoch: 10, Kind: integrity.KindExec, Reason: enforce.Unlisted, Refused: true, Path: "/tmp/evil\xff", Digest: integrity.Digest{1}, Comm: "sh"}
	l.until("the block is seen", func() bool {
		return strings.Contains(l.must(0, "admin", "", "fleet", "hosts", "show", "web-1"), "block unlisted /tmp/evil")
	})
	l.must(0, "bob", "", "rollout", "watch", id, "--interval", "50ms")
	// the second one begins with a trial
	l.must(0, "admin", oneRing, "rollout", "start", "second", "--scope", testGroup, "--manifest", l.bundles[12].Manifest.String(), "--spec", "-", "--rollback", l.bundles[12].Rollback.Manifest.String())
	l.must(0, "bob", "", "rollout", "approve", rolloutCollection(testGroup)+"/second")
	l.until("epoch 12", func() bool { return k.epoch() == 12 })
	code, out, _ := l.run("admin", "", append([]string{"status"}, dirs...)...)
	if code != 0 && code != 1 || !strings.Contains(out, "manifest") || !strings.Contains(out, l.bundles[12].Manifest.String()) {
		t.Errorf("status: exit code %d\n%s", code, out)
	}
	l.must(0, "admin", "", append([]string{"host", "leave"}, dirs...)...)
	if _, out, _ := l.run("admin", "", append([]string{"status"}, dirs...)...); strings.Contains(out, "manifest") {
		t.Errorf("status after leaving:\n%s", out)
	}
}
