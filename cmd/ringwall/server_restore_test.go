package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func (s *fleetServer) restore(want int, file string) string {
	s.t.Helper()
	return s.must(want, "admin", "", "server", "restore", "--data", filepath.Join(s.dir, "fleet"), file)
}

// A backup comes back, with nothing but what was changed since lost, and that
// shows.
func TestServer_restore(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.admin()
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", `{"tags":{"n":"1"}}`, "resource", "put", testGroup, "--file", "-")
	s.published()
	data, copied := filepath.Join(s.dir, "fleet"), filepath.Join(s.dir, "copy.db")
	s.must(0, "admin", "", "server", "backup", "--data", data, copied)
	pub := filepath.Join(data, "audit-log.pub")
	kept := filepath.Join(s.dir, "kept")
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--keep", kept)
	if got := s.restore(6, copied); !strings.Contains(got, "stop the server") {
		t.Errorf("restored under a running server: %s", got)
	}
	s.stop()

	// Nothing was lost: the published log goes on, under its key.
	if got := s.restore(0, copied); strings.Contains(got, "are lost") {
		t.Error(got)
	}
	s.start()
	s.login("admin")
	s.published()
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--signed", kept)
	if log := s.must(0, "admin", "", "audit", "export"); !strings.Contains(log, "Ringwall.Server/databases/restore/action") {
		t.Error("the restore is not recorded")
	}

	// Changes after the backup are lost, and their published log is kept.
	s.must(0, "admin", `{"tags":{"n":"2"}}`, "resource", "put", testGroup, "--file", "-")
	s.published()
	var lost struct{ Etag string }
	if err := json.Unmarshal([]byte(s.must(0, "admin", "", "resource", "get", testGroup)), &lost); err != nil {
		t.Fatal(err)
	}
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--keep", kept)
	oldPub, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	if got := s.restore(0, copied); !strings.Contains(got, "2 records that were published later are lost") {
		t.Error(got)
	}
	aside, err := filepath.Glob(filepath.Join(data, "audit-log.before-*"))
	if err != nil || len(aside) != 1 {
		t.Fatalf("%v, %v", aside, err)
	}
	s.must(0, "admin", "", "audit", "verify", aside[0], "--trust", s.file("old.pub", oldPub))
	s.start()
	s.login("admin")
	s.published()
	s.must(5, "admin", "", "audit", "verify", "--server", "--trust", s.file("old.pub", oldPub), "--signed", kept)
	if got := s.must(0, "admin", "", "resource", "get", testGroup); !strings.Contains(got, `"n": "1"`) {
		t.Error(got)
	}
	s.must(6, "admin", "{}", "resource", "put", testGroup, "--file", "-", "--if-match", lost.Etag)
	s.stop()

	// What is no backup of this server changes nothing.
	before, err := os.ReadFile(filepath.Join(data, "control.db"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(copied)
	if err != nil {
		t.Fatal(err)
	}
	other := startServer(t)
	other.admin()
	for range 9 {
		other.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	}
	foreign := filepath.Join(s.dir, "foreign.db")
	other.must(0, "admin", "", "server", "backup", "--data", filepath.Join(other.dir, "fleet"), foreign)
	for name, tc := range map[string]struct {
		file string
		want int
	}{
		"not there":        {filepath.Join(s.dir, "none"), 4},
		"no database":      {s.file("text", []byte(strings.Repeat("text ", 1000))), 3},
		"cut off":          {s.file("half.db", b[:len(b)/2]), 3},
		"another server's": {foreign, 5},
	} {
		code, out, errOut := s.run("admin", "", "server", "restore", "--data", data, tc.file)
		if code != tc.want && (name != "cut off" || code == 0) {
			t.Errorf("%s: exit code %d\n%s%s", name, code, out, errOut)
		}
	}
	if after, err := os.ReadFile(filepath.Join(data, "control.db")); err != nil || string(after) != string(before) {
		t.Errorf("a backup that was refused changed the database: %v", err)
	}
	// On an empty machine.
	s.must(0, "admin", "", "server", "restore", "--data", filepath.Join(s.dir, "new"), copied)
}
