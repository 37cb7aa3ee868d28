package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

const testPassword = "correct horse battery"

// runAt is run at another time, with what the command says while it runs.
func (s *fleetServer) runAt(user string, now func() time.Time, errOut io.Writer, args ...string) (int, string) {
	s.t.Helper()
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(s.t.Context(), 60*time.Second)
	defer cancel()
	code := run(ctx, args, &env{stdin: strings.NewReader(""), stdout: &out, stderr: errOut, now: now, getenv: func(name string) string {
		if name == "RINGWALL_SESSION" {
			return filepath.Join(s.dir, user+".session")
		}
		return ""
	}})
	return code, out.String()
}

// browser is what a person's browser does.
func (s *fleetServer) browser() *http.Client {
	s.t.Helper()
	ca, err := os.ReadFile(filepath.Join(s.dir, "fleet/tls/ca.crt"))
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}}}
}

func (s *fleetServer) submit(where string, form url.Values) string {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, where, strings.NewReader(form.Encode()))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := s.browser().Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		s.t.Errorf("%s: %s %s %v", where, resp.Status, b, err)
	}
	return string(b)
}

// waitFor waits until a command says something.
func waitFor(t *testing.T, out *lockedBuffer, re string) []string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if m := regexp.MustCompile(re).FindStringSubmatch(out.String()); m != nil {
			return m
		}
	}
	t.Fatalf("it never says %s: %s", re, out.String())
	return nil
}

func TestSignOn(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(3, "admin", "short\n", "user", "add", "ana")
	s.must(0, "admin", testPassword+"\n", "user", "add", "ana", "--name", "Ana")
	s.must(6, "admin", testPassword+"\n", "user", "add", "ana")
	s.must(0, "admin", "", "group", "create", "readers", "user:ana")
	s.must(0, "admin", "", "role", "assign", "reader", "--to", "group:readers")
	s.must(0, "admin", "", "role", "assign", "reader", "--to", "group:readers") // once

	// On another device.
	begin := []string{"login", "--server", s.url, "--ca", filepath.Join(s.dir, "fleet/tls/ca.crt"), "--issuer", "local"}
	var says lockedBuffer
	code := make(chan int, 1)
	go func() { c, _ := s.runAt("ana", time.Now, &says, begin...); code <- c }()
	m := waitFor(t, &says, `open (https://\S+)\nand enter (\S+)\n`)
	s.submit(m[1], url.Values{"user_code": {m[2]}, "username": {"ana"}, "password": {testPassword}})
	if c := <-code; c != 0 {
		t.Fatalf("exit code %d: %s", c, says.String())
	}
	file := filepath.Join(s.dir, "ana.session")
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if got := s.must(0, "ana", "", "whoami"); !strings.Contains(got, "local|ana") || !strings.Contains(got, "local#readers") {
		t.Error(got)
	}
	s.must(0, "ana", "", "resource", "list", "/subscriptions")
	s.must(1, "ana", testPassword+"\n", "user", "add", "eve")

	// The token is replaced when it is nearly over, whoever comes first.
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	later := func() time.Time { return time.Now().Add(14*time.Minute + 30*time.Second) }
	codes := make(chan int, 3)
	for range 3 {
		go func() { c, _ := s.runAt("ana", later, io.Discard, "whoami"); codes <- c }()
	}
	for range 3 {
		if c := <-codes; c != 0 {
			t.Errorf("exit code %d", c)
		}
	}
	after, err := os.ReadFile(file)
	if err != nil || bytes.Equal(before, after) {
		t.Errorf("the session is as it was, %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "thief.session"), before, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, _ := s.runAt("thief", later, io.Discard, "whoami"); c != 5 {
		t.Errorf("a refresh token that was used: exit code %d", c)
	}
	var over lockedBuffer
	if c, _ := s.runAt("ana", func() time.Time { return later().Add(15 * time.Minute) }, &over, "whoami"); c != 5 || !strings.Contains(over.String(), "ringwall login") {
		t.Errorf("after a theft the session goes on: exit code %d, %s", c, over.String())
	}

	// With the browser of this machine.
	says = lockedBuffer{}
	go func() { c, _ := s.runAt("ana", time.Now, &says, append(begin, "--browser")...); code <- c }()
	m = waitFor(t, &says, `sign on at\n  (https://\S+)\n`)
	at, err := url.Parse(m[1])
	if err != nil {
		t.Fatal(err)
	}
	form := at.Query()
	form.Set("username", "ana")
	form.Set("password", testPassword)
	at.RawQuery = ""
	if got := s.submit(at.String(), form); !strings.Contains(got, "Go back to the command line") {
		t.Error(got)
	}
	if c := <-code; c != 0 {
		t.Fatalf("exit code %d: %s", c, says.String())
	}
	s.must(0, "ana", "", "whoami")
	s.must(0, "admin", "", "user", "disable", "ana")
	s.must(5, "ana", "", "whoami")
	s.must(0, "admin", "", "user", "enable", "ana")
	s.must(0, "ana", "", "whoami")
	s.must(0, "ana", "", "logout")
	s.must(4, "ana", "", "whoami")
	log := s.must(0, "admin", "", "audit", "export")
	if strings.Contains(log, "argon2id") || strings.Contains(log, testPassword) || strings.Count(log, "signOn/action") != 2 {
		t.Errorf("the audit log: %s", log)
	}
}

func TestServiceCertificates(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	stem := filepath.Join(s.dir, "ci")
	s.must(3, "admin", "", "cert", "issue", "CI", "--out", stem)
	s.must(3, "admin", "", "cert", "issue", "ci", "--out", stem, "--hours", "9999")
	s.must(0, "admin", "", "cert", "issue", "ci", "--out", stem)
	s.must(6, "admin", "", "cert", "issue", "ci", "--out", stem)
	if st, err := os.Stat(stem + ".key"); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	s.must(0, "ci", "", "login", "--server", s.url, "--ca", filepath.Join(s.dir, "fleet/tls/ca.crt"), "--cert", stem+".crt", "--key", stem+".key")
	if got := s.must(0, "ci", "", "whoami"); !strings.Contains(got, "ringwall://services/ci") {
		t.Error(got)
	}
	s.must(1, "ci", "", "resource", "get", testGroup)
	s.must(1, "ci", "", "cert", "issue", "other", "--out", stem+"2")
	s.must(0, "admin", "", "role", "assign", "owner", "--to", "service:ci")
	s.must(0, "ci", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", "", "role", "unassign", "owner", "--from", "service:ci")
	s.must(4, "admin", "", "role", "unassign", "owner", "--from", "service:ci")
	s.must(1, "ci", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")

	// It renews its own, with a new key.
	old, err := os.ReadFile(stem + ".key")
	if err != nil {
		t.Fatal(err)
	}
	s.must(0, "ci", "", "cert", "renew", "--hours", "2")
	if again, err := os.ReadFile(stem + ".key"); err != nil || bytes.Equal(old, again) {
		t.Errorf("the key is as it was, %v", err)
	}
	s.must(0, "ci", "", "whoami")
	var list struct {
		Certificates []struct{ Serial, PrincipalID string }
	}
	if err := json.Unmarshal([]byte(s.must(0, "admin", "", "cert", "list", "--output", "json")), &list); err != nil || len(list.Certificates) != 2 {
		t.Errorf("%+v, %v", list, err)
	}
	s.must(0, "admin", "", "cert", "revoke", "ci")
	s.must(5, "ci", "", "whoami")
	s.must(5, "ci", "", "cert", "renew")
	s.must(4, "admin", "", "cert", "revoke", "ci")
}

func TestRoles(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	if got := s.must(0, "admin", "", "role", "list"); strings.Count(got, "\n") != 9 || !strings.Contains(got, "on-call-engineer") {
		t.Error(got)
	}
	s.must(0, "admin", `{"properties":{"roleName":"Gardener","type":"CustomRole","assignableScopes":["/"],"permissions":[{"actions":["Microsoft.Resources/*"]}]}}`,
		"resource", "put", "/providers/Microsoft.Authorization/roleDefinitions/61285a74-eb0d-471a-a453-4aeb205dddeb", "--file", "-")
	if got := s.must(0, "admin", "", "role", "show", "gardener"); !strings.Contains(got, "may      Microsoft.Resources/*") {
		t.Error(got)
	}
	s.must(4, "admin", "", "role", "show", "nobody")
	s.must(0, "admin", "", "group", "create", "inner", "user:ana")
	s.must(0, "admin", "", "group", "create", "outer", "group:inner")
	s.must(3, "admin", "", "group", "add", "inner", "group:outer") // a circle
	s.must(0, "admin", "", "role", "assign", "gardener", "--to", "group:outer")
	if got := s.must(0, "admin", "", "role", "assignments"); !strings.Contains(got, "gardener") || !strings.Contains(got, "local#outer") {
		t.Error(got)
	}
	if got := s.must(0, "admin", "", "can", "user:ana", "Microsoft.Resources/subscriptions/write", "/subscriptions/x"); !strings.Contains(got, "yes: role Gardener") || !strings.Contains(got, "through local#outer") {
		t.Error(got)
	}
	s.must(1, "admin", "", "can", "user:ana", "Ringwall.Fleet/hosts/write", "/")
	s.must(0, "admin", "", "can", "me", "Ringwall.Fleet/hosts/write", "/")
	s.must(0, "admin", "", "group", "remove", "inner", "user:ana")
	s.must(1, "admin", "", "can", "user:ana", "Microsoft.Resources/subscriptions/write", "/subscriptions/x")
	if got := s.must(0, "admin", "", "group", "list"); got != "inner\nouter\n  local#inner\n" {
		t.Errorf("%q", got)
	}
	s.must(0, "admin", "", "group", "delete", "outer")
	s.must(2, "admin", "", "role", "assign", "reader", "--to", "")
	s.must(3, "admin", "", "role", "assign", "reader", "--to", "user:a b")
}
