package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// An entry more changes nothing else of a policy.
func TestWithEntry(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	entry := map[string]any{"rule": "new", "sha256": []string{sum}, "reason": "why"}
	for name, text := range map[string]string{
		"no section": "version: 1 # a comment\nname: x\nepoch: 3\nmode: enforce\nallow:\n  - {rule: a, sha256: [" + sum + "]}\n",
		"a section":  "version: 1 # a comment\nname: x\nepoch: 3\nmode: enforce\ndeny:\n  # why not\n  - {rule: old, sha256: [" + sum + "], reason: b}\n",
	} {
		t.Run(name, func(t *testing.T) {
			out, err := withEntry([]byte(text), "deny", entry)
			if err != nil {
				t.Fatal(err)
			}
			p, err := integrity.ParseNamed("p", out)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if want := strings.Count(text, "rule: old") + 1; len(p.Deny) != want || p.Deny[want-1].Rule != "new" {
				t.Errorf("%d denies\n%s", len(p.Deny), out)
			}
			if !strings.Contains(string(out), "# a comment") || strings.Contains(text, "# why not") && !strings.Contains(string(out), "# why not") {
				t.Errorf("comments are gone:\n%s", out)
			}
			if again, err := withEpoch(out, 9); err != nil || !strings.Contains(string(again), "epoch: 9\n") {
				t.Errorf("%v\n%s", err, again)
			}
		})
	}
	for name, text := range map[string]string{"no mapping": "- a\n", "no list": "deny: 4\n", "no YAML": "a: [\n"} {
		if _, err := withEntry([]byte(text), "deny", entry); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: error %v, want invalid", name, err)
		}
	}
}

// TestIncident_authorise: a command makes, pushes and proposes what lets the
// content of an incident run for a while.
func TestIncident_authorise(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	keys, policy := filepath.Join(s.dir, "keys"), filepath.Join(s.dir, "policy.yaml")
	s.must(0, "admin", "", "key", "init", keys, "--name", "Test")
	_, trust, _ := s.run("admin", "", "key", "trust", keys)
	if err := os.WriteFile(policy, []byte("version: 1\nname: test\nepoch: 4\nmode: enforce\n"+trust), 0o600); err != nil {
		t.Fatal(err)
	}
	before, after := filepath.Join(s.dir, "b4"), filepath.Join(s.dir, "b6")
	s.must(0, "admin", "", "fleet", "bundle", "make", policy, "--keys", keys, "--scope", testGroup, "--out", before)
	s.must(0, "admin", "", "fleet", "bundle", "push", before)
	const name = "inc-20310501-k3f9ab"
	s.putIncident(name, time.Now())

	args := []string{"--for", "2h", "--reason", "ticket 4711", "--bundle", before, "--keys", keys, "--out", after}
	s.must(4, "admin", "", append([]string{"incident", "authorise", name, "--sha256", strings.Repeat("00", 32)}, args...)...)
	s.must(2, "admin", "", append([]string{"incident", "authorise", name, "--for", "9000h"}, args[2:]...)...)
	// There are no hosts yet, which the server's check says: exit code 1.
	out := s.must(1, "admin", "", append([]string{"incident", "authorise", name}, args...)...)
	if !strings.Contains(out, "epoch 6") || !strings.Contains(out, "rollout approve "+testGroup) {
		t.Error(out)
	}
	made, err := openBundle(after)
	if err != nil {
		t.Fatal(err)
	}
	text, err := made.policy(nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := integrity.ParseNamed("policy", text)
	if err != nil || p.Epoch != 6 || len(p.Allow) != 1 {
		t.Fatalf("%v\n%s", err, text)
	}
	if x := p.Allow[0]; x.Rule != name || time.Until(x.Until) > 2*time.Hour || time.Until(x.Until) < time.Hour {
		t.Errorf("%+v", x)
	}
	if !exists(filepath.Join(after, bundleRollback)) {
		t.Error("there is no way back")
	}
	s.must(6, "admin", "", append([]string{"incident", "deny", name}, args[2:]...)...) // the directory is there
}
