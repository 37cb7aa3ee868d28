package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/testkit"
)

// lockedBuffer is what one goroutine writes and another reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// fleetServer is `ringwall server` with a person at its command line.
type fleetServer struct {
	t    *testing.T
	dir  string
	args []string
	url  string
	stop func() int
	said func() string // on standard error
}

func startServer(t *testing.T, args ...string) *fleetServer {
	t.Helper()
	s := &fleetServer{t: t, dir: t.TempDir(), args: args}
	s.start()
	return s
}

func (s *fleetServer) start() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var out lockedBuffer
	s.said = out.String
	code := make(chan int, 1)
	args := append([]string{"server", "--data", filepath.Join(s.dir, "fleet"), "--listen", "127.0.0.1:0"}, s.args...)
	go func() {
		code <- run(ctx, args, &env{stdin: strings.NewReader(""), stdout: &out, stderr: &out, now: time.Now, getenv: func(string) string { return "" }})
	}()
	s.stop = sync.OnceValue(func() int { cancel(); return <-code })
	s.t.Cleanup(func() { s.stop() })
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, rest, ok := strings.Cut(out.String(), "serving on "); ok && strings.Contains(rest, "\n") {
			s.url, _, _ = strings.Cut(rest, "\n")
			return
		}
	}
	s.t.Fatalf("the server does not start: %s", out.String())
}

// run runs a command as a user with a session of its own.
func (s *fleetServer) run(user, stdin string, args ...string) (code int, stdout, stderr string) {
	s.t.Helper()
	var out, errOut bytes.Buffer
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	code = run(ctx, args, &env{stdin: strings.NewReader(stdin), stdout: &out, stderr: &errOut, now: time.Now, getenv: func(name string) string {
		if name == "RINGWALL_SESSION" {
			return filepath.Join(s.dir, user+".session")
		}
		return ""
	}})
	return code, out.String(), errOut.String()
}

func (s *fleetServer) must(want int, user, stdin string, args ...string) string {
	s.t.Helper()
	code, out, errOut := s.run(user, stdin, args...)
	if code != want {
		s.t.Fatalf("ringwall %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), code, want, out, errOut)
	}
	return out + errOut
}

func (s *fleetServer) login(user string) {
	s.t.Helper()
	s.must(0, user, "", "login", "--server", s.url, "--ca", filepath.Join(s.dir, "fleet/tls/ca.crt"), "--token-file", filepath.Join(s.dir, user+".token"))
}

const testGroup = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web"

func TestServer(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { testServer(t, startServer(t)) })
	t.Run("postgres", func(t *testing.T) {
		testServer(t, startServer(t, "--database", testkit.StartPostgres(t).Database()))
	})
}

func testServer(t *testing.T, s *fleetServer) {
	t.Helper()
	if got := s.must(4, "admin", "", "resource", "list", "/subscriptions"); !strings.Contains(got, "ringwall login --server") {
		t.Errorf("not logged in: %s", got)
	}
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	if code, _, msg := s.run("admin", "x", "login", "--server", s.url); code == 0 {
		t.Errorf("logged in to a server that nobody certifies: %s", msg)
	}
	s.must(5, "admin", "rwt_wrong", "login", "--server", s.url, "--ca", filepath.Join(s.dir, "fleet/tls/ca.crt"))
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", `{"tags":{"team":"web"}}`, "resource", "put", testGroup, "--file", "-", "--create")
	s.must(6, "admin", `{}`, "resource", "put", testGroup, "--file", "-", "--create")
	s.must(3, "admin", "", "resource", "get", "/nonsense")
	s.must(4, "admin", "", "resource", "get", testGroup+"2")
	var doc struct{ Etag, Type string }
	if err := json.Unmarshal([]byte(s.must(0, "admin", "", "resource", "get", testGroup)), &doc); err != nil || doc.Type != "Microsoft.Resources/subscriptions/resourceGroups" {
		t.Errorf("%+v, %v", doc, err)
	}
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-", "--if-match", doc.Etag)
	s.must(6, "admin", "{}", "resource", "put", testGroup, "--file", "-", "--if-match", doc.Etag)

	// Ana may read the group and nothing else.
	_, token, _ := s.run("admin", "", "token", "create", "ana", "--quiet")
	if err := os.WriteFile(filepath.Join(s.dir, "ana.token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	s.login("ana")
	s.must(1, "ana", "", "resource", "get", testGroup)
	s.must(0, "admin", `{"properties":{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/acdd72a7-3385-48ef-bd42-f606fba81ae7","principalId":"ana"}}`,
		"resource", "put", testGroup+"/providers/Microsoft.Authorization/roleAssignments/ana", "--file", "-")
	s.must(0, "ana", "", "resource", "get", testGroup)
	s.must(1, "ana", "{}", "resource", "put", testGroup, "--file", "-")
	s.must(1, "ana", "", "audit", "export")
	if got := s.must(0, "ana", "", "resource", "watch", "--count", "3"); strings.Count(got, "\n") != 3 || strings.Contains(got, "Ringwall.Identity") {
		t.Errorf("ana sees %s", got)
	}

	// The audit log says it all, and an edit shows.
	log := filepath.Join(s.dir, "audit.jsonl")
	exported := s.must(0, "admin", "", "audit", "export")
	if err := os.WriteFile(log, []byte(exported), 0o600); err != nil {
		t.Fatal(err)
	}
	verified := s.must(0, "admin", "", "audit", "verify", log)
	_, checkpoint, _ := strings.Cut(strings.TrimSpace(verified), "checkpoint: ")
	s.must(0, "admin", "", "audit", "verify", log, "--checkpoint", checkpoint)
	if !strings.Contains(verified, "the chain is whole") || strings.Contains(exported, strings.TrimSpace(token)) || strings.Count(exported, `"outcome":"refused"`) != 1 {
		t.Errorf("%s\n%s", verified, exported)
	}
	if err := os.WriteFile(log, []byte(strings.Replace(exported, `"ana"`, `"bob"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.must(5, "admin", "", "audit", "verify", log)
	lines := strings.SplitAfter(exported, "\n")
	if err := os.WriteFile(log, []byte(strings.Join(lines[:len(lines)-3], "")), 0o600); err != nil {
		t.Fatal(err)
	}
	s.must(0, "admin", "", "audit", "verify", log) // nobody can tell, without a checkpoint
	s.must(5, "admin", "", "audit", "verify", log, "--checkpoint", checkpoint)

	// A restart changes nothing, and makes no second administrator.
	if code := s.stop(); code != 0 {
		t.Errorf("the server ends with %d", code)
	}
	s.start()
	if exists(filepath.Join(s.dir, "fleet/break-glass.token")) {
		t.Error("a second local administrator")
	}
	s.login("admin")
	s.must(0, "admin", "", "resource", "get", testGroup)
}

func TestServer_backup(t *testing.T) {
	s := startServer(t)
	copied := filepath.Join(s.dir, "copy.db")
	s.must(0, "admin", "", "server", "backup", "--data", filepath.Join(s.dir, "fleet"), copied)
	s.must(6, "admin", "", "server", "backup", "--data", filepath.Join(s.dir, "fleet"), copied)
	s.must(4, "admin", "", "server", "backup", "--data", s.dir, copied+"2")
	if got := s.must(6, "admin", "", "server", "--data", filepath.Join(s.dir, "fleet"), "--listen", "127.0.0.1:0"); !strings.Contains(got, "in use") {
		t.Errorf("a second server on one SQLite database: %s", got)
	}
	for _, f := range []string{"fleet/control.db", "fleet/tls/ca.key", "fleet/tls/server.key", "fleet/break-glass.token", "fleet/audit-log.key", "copy.db"} {
		st, err := os.Stat(filepath.Join(s.dir, f))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, st.Mode(), err)
		}
	}
}
