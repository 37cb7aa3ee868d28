package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	rpc "connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
)

// simHost takes every manifest that it is given, and reports it.
type simHost struct {
	*fleetHost
	mu    sync.Mutex
	state *agentpb.State
}

// run waits until ctx ends. breaks is what a manifest does to the host.
func (h *simHost) run(ctx context.Context, breaks func(m *codesign.Manifest, s *agentpb.State)) {
	var have []byte
	for ctx.Err() == nil {
		h.mu.Lock()
		q := &agentpb.WaitRequest{State: h.state, HaveManifest: have}
		h.mu.Unlock()
		out, err := h.Wait(ctx, rpc.NewRequest(q))
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		b := out.Msg.GetManifest()
		if len(b) == 0 {
			continue
		}
		m, err := codesign.UnverifiedManifest(b)
		if err != nil {
			continue
		}
		have = m.Digest[:]
		h.mu.Lock()
		h.state = &agentpb.State{Phase: agentpb.State_PHASE_CONFIRMED, Manifest: have, Epoch: m.Epoch, AgentVersion: "1", Mode: "enforce"}
		breaks(m, h.state)
		h.mu.Unlock()
	}
}

func (h *simHost) epoch() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state.GetEpoch()
}

// rolloutLab is a server with hosts, bundles of epochs 10, 12 and 14, each with
// its way back, and two people.
type rolloutLab struct {
	*fleetServer
	hosts   []*simHost
	bundles map[int]madeBundle
}

func newRolloutLab(t *testing.T, n int, breaks func(m *codesign.Manifest, s *agentpb.State)) *rolloutLab {
	t.Helper()
	l := &rolloutLab{fleetServer: startServer(t), bundles: map[int]madeBundle{}}
	if err := os.Rename(filepath.Join(l.dir, "fleet/break-glass.token"), filepath.Join(l.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	l.login("admin")
	l.must(0, "admin", "{}", "resource", "put", strings.TrimSuffix(testGroup, "/resourceGroups/web"), "--file", "-")
	l.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	token := l.must(0, "admin", "", "token", "create", "bob", "--name", "Bob", "--quiet")
	if err := os.WriteFile(filepath.Join(l.dir, "bob.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(0, "admin", `{"properties":{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/b24988ac-6180-42a0-ab88-20f7382dd24c","principalId":"bob"}}`,
		"resource", "put", "/providers/Microsoft.Authorization/roleAssignments/bob", "--file", "-")
	l.login("bob")
	l.makeBundles()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	for i := range n {
		token := l.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--quiet")
		h := &simHost{fleetHost: l.joinHost(token, fmt.Sprintf("web-%d", i)), state: &agentpb.State{AgentVersion: "1"}}
		l.hosts = append(l.hosts, h)
		wg.Go(func() { h.run(ctx, breaks) })
	}
	return l
}

func (l *rolloutLab) makeBundles() {
	l.t.Helper()
	path := func(name string) string { return filepath.Join(l.dir, name) }
	l.must(0, "admin", "", "key", "init", path("keys"), "--name", "Test Fleet", "--quiet")
	policy := l.must(0, "admin", "", "policy", "init", "--keys", path("keys"), "--name", "base", "--archive", "none", "--quiet")
	previous := ""
	for _, epoch := range []int{10, 12, 14} {
		if err := os.WriteFile(path("base.yaml"), []byte(epochLine.ReplaceAllString(policy, fmt.Sprint("epoch: ", epoch))), 0o644); err != nil {
			l.t.Fatal(err)
		}
		dir := path(fmt.Sprint("b", epoch))
		args := []string{"fleet", "bundle", "make", path("base.yaml"), "--keys", path("keys"), "--scope", testGroup, "--out", dir, "--output", "json", "--quiet"}
		if previous != "" {
			args = append(args, "--previous", previous)
		}
		var made madeBundle
		if err := json.Unmarshal([]byte(l.must(0, "admin", "", args...)), &made); err != nil {
			l.t.Fatal(err)
		}
		l.bundles[epoch], previous = made, dir
		l.must(0, "admin", "", "fleet", "bundle", "push", dir)
	}
}

// until waits for hosts to have an epoch.
func (l *rolloutLab) until(what string, ok func() bool) {
	l.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func (l *rolloutLab) have(epoch uint64) (n int) {
	for _, h := range l.hosts {
		if h.epoch() == epoch {
			n++
		}
	}
	return n
}

const fastRings = `{"rings":[{"name":"canary","percent":30,"bake":{"time":"1s"}},{"name":"all","percent":100}]}`

func TestRollout(t *testing.T) {
	l := newRolloutLab(t, 12, func(m *codesign.Manifest, s *agentpb.State) {
		if m.Epoch == 14 {
			s.Flips = 1
		}
	})
	id := func(name string) string { return rolloutCollection(testGroup) + "/" + name }
	start := func(want int, name string, epoch int, args ...string) string {
		t.Helper()
		b := l.bundles[epoch]
		args = append([]string{"rollout", "start", name, "--scope", testGroup, "--manifest", b.Manifest.String(), "--spec", "-"}, args...)
		if b.Rollback != nil {
			args = append(args, "--rollback", b.Rollback.Manifest.String())
		}
		return l.must(want, "admin", fastRings, args...)
	}
	l.must(2, "admin", "", "rollout", "start", "first", "--scope", testGroup, "--manifest", l.bundles[10].Manifest.String())

	// The first one has nothing to go back to, and says so.
	got := start(0, "first", 10, "--no-rollback")
	for _, want := range []string{"12 hosts, epoch 10", "ring 1  canary", "nothing to compare with"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in the plan:\n%s", want, got)
		}
	}
	l.must(1, "admin", "", "rollout", "approve", id("first"))
	if l.have(10) != 0 {
		t.Error("hosts have it before anybody approved")
	}
	l.must(0, "bob", "", "rollout", "approve", id("first"))
	got = l.must(0, "bob", "", "rollout", "watch", id("first"), "--interval", "50ms")
	if !strings.Contains(got, ": running") || !strings.Contains(got, "12 online") && !strings.Contains(got, "> ring 1") || l.have(10) != 12 {
		t.Errorf("%d hosts have it:\n%s", l.have(10), got)
	}

	// A halt holds before it begins; the second one completes when it is gone.
	start(0, "second", 12)
	if got := start(6, "another", 14); !strings.Contains(got, "is under way there") {
		t.Errorf("two at once: %s", got)
	}
	l.must(0, "bob", "", "rollout", "halt", "/", "--reason", "not now")
	l.must(0, "bob", "", "rollout", "approve", id("second"))
	time.Sleep(1500 * time.Millisecond)
	if n := l.have(12); n != 0 {
		t.Errorf("%d hosts got it while the line was stopped", n)
	}
	if got := l.must(0, "bob", "", "rollout", "show", id("second")); !strings.Contains(got, "not now (stop, by Bob)") {
		t.Errorf("halted: %s", got)
	}
	l.must(0, "bob", "", "rollout", "unhalt", "/")
	l.must(0, "bob", "", "rollout", "watch", id("second"), "--interval", "50ms")
	if l.have(12) != 12 {
		t.Errorf("%d hosts have the second one", l.have(12))
	}

	// What hosts run by now is what is asked before a build ships.
	live, build := filepath.Join(l.dir, "live"), t.TempDir()
	if err := os.WriteFile(filepath.Join(build, "tool"), []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := l.must(0, "admin", "", "fleet", "cells", "--scope", testGroup, "--out", live); !strings.Contains(got, "12 hosts") {
		t.Errorf("cells: %s", got)
	}
	if got := l.must(0, "admin", "", "csv", "verify", build, "--cells", filepath.Join(live, "cells.yaml")); !strings.Contains(got, "CSV001") || !strings.Contains(got, "(12 hosts)") {
		t.Errorf("csv: %s", got)
	}

	// The third one breaks hosts, and goes back by itself.
	got = start(0, "third", 14)
	if !strings.Contains(got, "they decide alike") && !strings.Contains(got, "releases: 0 come, 0 go") {
		t.Errorf("plan: %s", got)
	}
	l.must(0, "bob", "", "rollout", "approve", id("third"))
	got = l.must(1, "bob", "", "rollout", "watch", id("third"), "--interval", "50ms")
	if !strings.Contains(got, "denied what the bundle before allows") {
		t.Errorf("watch: %s", got)
	}
	l.until("hosts go back", func() bool { return l.have(14) == 0 })
	if back, kept := l.have(15), l.have(12); back == 0 || back+kept != 12 {
		t.Errorf("%d went back, %d kept what they had", back, kept)
	}
	testRolloutRecord(t, l, id)
}

// testRolloutRecord looks at what is left in lists and in the audit log.
func testRolloutRecord(t *testing.T, l *rolloutLab, id func(string) string) {
	t.Helper()
	var list struct {
		Rollouts []struct {
			ID, Phase string
		}
	}
	if err := json.Unmarshal([]byte(l.must(0, "bob", "", "rollout", "list", "--all", "--output", "json", "--quiet")), &list); err != nil {
		t.Fatal(err)
	}
	var phases []string
	for _, r := range list.Rollouts {
		phases = append(phases, filepath.Base(r.ID)+" "+r.Phase)
	}
	slices.Sort(phases)
	if want := []string{"another draft", "first done", "second done", "third rolled-back"}; !slices.Equal(phases, want) {
		t.Errorf("%q, want %q", phases, want)
	}
	log := l.must(0, "admin", "", "audit", "export")
	for _, want := range []string{"ringwall rollouts", "running → rolling-back", id("third")} {
		if !strings.Contains(log, want) {
			t.Errorf("the audit log does not say %q", want)
		}
	}
	// What is done can be taken back by hand; what was taken back cannot.
	l.must(6, "bob", "", "rollout", "rollback", id("third"))
	l.must(6, "bob", "", "rollout", "promote", id("third"), "--reason", "x")
	l.must(4, "bob", "", "rollout", "pause", id("none"))
}
