package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/pki"
)

// file writes what a user has in a file beside the server's directory.
func (s *fleetServer) file(name string, data []byte) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// admin logs the local administrator in.
func (s *fleetServer) admin() {
	s.t.Helper()
	token, err := os.ReadFile(filepath.Join(s.dir, "fleet/break-glass.token"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.file("admin.token", token)
	s.login("admin")
}

// published waits until the server has published all of its audit log.
func (s *fleetServer) published() {
	s.t.Helper()
	var last string
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		code, out, errOut := s.run("admin", "", "audit", "verify", "--server")
		if code == 0 && strings.Contains(out, "signed: all ") {
			return
		}
		last = out + errOut
	}
	s.t.Fatalf("not published: %s", last)
}

// What the database is makes no difference here; TestFaults_ have both.
func TestAudit(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.admin()
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	for range 6 {
		s.must(0, "admin", `{}`, "resource", "put", testGroup, "--file", "-")
	}
	s.published()
	pub, tiles := filepath.Join(s.dir, "fleet/audit-log.pub"), filepath.Join(s.dir, "fleet/audit-log")
	note := filepath.Join(s.dir, "audit.checkpoint")
	_, exported, _ := s.run("admin", "", "audit", "export", "--checkpoint", note)
	log := s.file("audit.jsonl", []byte(exported))
	if got := s.must(0, "admin", "", "audit", "verify", log, "--signed", note, "--trust", pub); !strings.Contains(got, "signed: all ") {
		t.Error(got)
	}
	s.must(0, "admin", "", "audit", "verify", log, "--signed", tiles, "--trust", pub)
	whole := s.must(0, "admin", "", "audit", "verify", tiles, "--trust", pub, "--signed", note)
	_, last, _ := strings.Cut(strings.TrimSpace(whole), "checkpoint: ")
	s.must(0, "admin", "", "audit", "verify", tiles, "--trust", pub, "--checkpoint", last)
	s.must(5, "admin", "", "audit", "verify", tiles, "--trust", pub, "--checkpoint", "1"+last)
	if got := s.must(0, "admin", "", "audit", "verify", log); !strings.Contains(got, "is not shown") {
		t.Errorf("nothing signed: %s", got)
	}
	s.must(2, "admin", "", "audit", "verify", log, "--signed", note)
	s.must(2, "admin", "", "audit", "verify")
	s.must(2, "admin", "", "audit", "verify", tiles)
	s.must(2, "admin", "", "audit", "verify", log, "--keep", filepath.Join(s.dir, "none"))
	s.must(5, "admin", "", "audit", "verify", log, "--signed", note, "--trust", s.file("other.pub", otherLogKey(t, pub)))

	lines := strings.SplitAfter(exported, "\n")
	lines = lines[:len(lines)-1]
	for name, edit := range map[string]func([]string) []string{
		"edited":     func(l []string) []string { l[3] = strings.Replace(l[3], `"done"`, `"failed"`, 1); return l },
		"dropped":    func(l []string) []string { return slices.Delete(l, 3, 4) },
		"re-ordered": func(l []string) []string { l[3], l[4] = l[4], l[3]; return l },
		"repeated":   func(l []string) []string { return slices.Insert(l, 3, l[3]) },
		"truncated":  func(l []string) []string { return l[:len(l)-1] },
		"all gone":   func([]string) []string { return nil },
		"beheaded":   func(l []string) []string { return l[1:] },
		"written anew with every hash right": func(l []string) []string {
			var end audit.Checkpoint
			for i := range l {
				var r audit.Record
				if err := json.Unmarshal([]byte(l[i]), &r); err != nil {
					t.Fatal(err)
				}
				if i == 4 {
					r.Actor = "somebody else"
				}
				if err := r.Seal(end); err != nil {
					t.Fatal(err)
				}
				end = r.Checkpoint()
				b, err := json.Marshal(&r)
				if err != nil {
					t.Fatal(err)
				}
				l[i] = string(b) + "\n"
			}
			return l
		},
	} {
		bad := s.file("bad.jsonl", []byte(strings.Join(edit(slices.Clone(lines)), "")))
		for _, signed := range []string{note, tiles} {
			if code, out, errOut := s.run("admin", "", "audit", "verify", bad, "--signed", signed, "--trust", pub); code != 5 {
				t.Errorf("%s: exit code %d\n%s%s", name, code, out, errOut)
			}
		}
	}

	// The published log itself: a changed, a missing and a cut-off file.
	for name, harm := range map[string]func(dir string) error{
		"entry edited": func(dir string) error {
			file := filepath.Join(dir, "tile/entries/000.p")
			parts, err := os.ReadDir(file)
			if err != nil {
				return err
			}
			for _, f := range parts {
				b, err := os.ReadFile(filepath.Join(file, f.Name()))
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(file, f.Name()), bytes.Replace(b, []byte("1:"), []byte("3:"), 1), 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		"tiles gone":      func(dir string) error { return os.RemoveAll(filepath.Join(dir, "tile/0")) },
		"checkpoint edit": func(dir string) error { return os.WriteFile(filepath.Join(dir, "checkpoint"), []byte("x\n"), 0o600) },
	} {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(tiles)); err != nil {
			t.Fatal(err)
		}
		if err := harm(dir); err != nil {
			t.Fatal(err)
		}
		if code, out, _ := s.run("admin", "", "audit", "verify", dir, "--trust", pub); code != 5 && (name != "checkpoint edit" || code != 3) {
			t.Errorf("%s: exit code %d %s", name, code, out)
		}
	}

	// The server, over time; and its events in OCSF.
	kept := filepath.Join(s.dir, "last")
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--keep", kept)
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--signed", kept)
	_, events, _ := s.run("admin", "", "audit", "export", "--format", "ocsf")
	if n := strings.Count(events, `"class_uid":6003`); n != len(lines)+1 {
		t.Errorf("%d events for %d records", n, len(lines)+1)
	}
	s.must(2, "admin", "", "audit", "export", "--format", "xml")
	// Who may not read the log gets no checkpoint of it either.
	_, token, _ := s.run("admin", "", "token", "create", "eve", "--quiet")
	s.file("eve.token", []byte(token))
	s.login("eve")
	s.must(1, "eve", "", "audit", "verify", "--server")
	s.must(1, "eve", "", "audit", "export", "--checkpoint", filepath.Join(s.dir, "eve.checkpoint"))
	if code := s.stop(); code != 0 {
		t.Errorf("the server ends with %d", code)
	}
	// After a restart it goes on where it was.
	s.start()
	s.login("admin")
	s.published()
	s.must(0, "admin", "", "audit", "verify", "--server", "--trust", pub, "--keep", kept)
}

// otherLogKey is of a log that has nothing to do with the server's, under its name.
func otherLogKey(t *testing.T, pub string) []byte {
	t.Helper()
	line, err := readLine(pub)
	if err != nil {
		t.Fatal(err)
	}
	origin, _, _ := strings.Cut(line, "+")
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := pki.FormatLogKey(origin, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return []byte(other + "\n")
}
