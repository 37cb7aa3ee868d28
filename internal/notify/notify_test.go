package notify_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"mime/quotedprintable"
	"net"
	"net/http"
	"net/http/httptest"
	"net/mail"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/notify"
)

var start = time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)

func message() *notify.Message {
	return &notify.Message{
		Type: "ringwall.csv.blocked", Source: "urn:ringwall:csv", Subject: "edged", Fingerprint: "f1",
		Title: "edged 4.7.0 would be blocked\r\nBcc: all@example.com", Text: "Übel: usr/bin/edged\nfix: sign it", Owners: []string{"@team", "own@example.com"},
		Data: map[string]int{"hosts": 9812}, At: start,
	}
}

// load writes a configuration and its secrets, and loads it.
func load(t *testing.T, doc string, secrets map[string]string) ([]notify.Target, error) {
	t.Helper()
	dir := t.TempDir()
	for name, s := range secrets {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "notify.yaml")
	if err := os.WriteFile(file, []byte(doc), 0o644); err != nil {
		t.Fatal(err)
	}
	return notify.Load(file)
}

func mustLoad(t *testing.T, doc string, secrets map[string]string) []notify.Target {
	t.Helper()
	targets, err := load(t, doc, secrets)
	if err != nil {
		t.Fatal(err)
	}
	return targets
}

func TestWebhook_cloudEvent(t *testing.T) {
	answers := []int{503, 429, 200}
	var ids []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Content-Type"); got != "application/cloudevents+json" {
			t.Errorf("content type %q", got)
		}
		if got := r.Header.Get("Authorization"); got != "Bearer s3cret" {
			t.Errorf("authorization %q", got)
		}
		var e map[string]any
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			t.Error(err)
		}
		// What CloudEvents 1.0 requires, and what we promise.
		for _, k := range []string{"specversion", "id", "source", "type"} {
			if s, _ := e[k].(string); s == "" {
				t.Errorf("attribute %s is missing", k)
			}
		}
		data, _ := e["data"].(map[string]any)
		if e["specversion"] != "1.0" || e["type"] != "ringwall.csv.blocked" || e["subject"] != "edged" || e["time"] != "2031-05-01T12:00:00Z" ||
			data["fingerprint"] != "f1" || !strings.Contains(data["text"].(string), "fix: sign it") {
			t.Errorf("event %v", e)
		}
		ids = append(ids, e["id"].(string))
		w.WriteHeader(answers[0])
		answers = answers[1:]
	}))
	defer srv.Close()
	targets := mustLoad(t, "version: 1\nwebhooks:\n  - {url_file: url, token_file: token}\n", map[string]string{"url": srv.URL + "/T0/secretpath", "token": "s3cret"})
	notify.SetFast(targets[0], nil, nil)
	if err := targets[0].Send(t.Context(), message()); err != nil {
		t.Fatal(err)
	}
	if len(ids) != 3 || ids[0] != ids[1] || ids[1] != ids[2] { // a receiver may drop what it has seen
		t.Errorf("ids %q", ids)
	}
	if strings.Contains(targets[0].Name(), "secretpath") {
		t.Errorf("name %q holds the secret", targets[0].Name())
	}
}

func TestWebhook_failures(t *testing.T) {
	calls := 0
	var other *httptest.Server
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls++
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, other.URL, http.StatusFound)
		case "/no":
			w.WriteHeader(http.StatusForbidden)
		default:
			w.WriteHeader(http.StatusBadGateway)
		}
	}))
	defer srv.Close()
	other = httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("followed a redirect") }))
	defer other.Close()
	for path, want := range map[string]int{"/away": 1, "/no": 1, "/down": 3} {
		calls = 0
		targets := mustLoad(t, "version: 1\nwebhooks: [{url: \""+srv.URL+path+"\"}]\n", nil)
		notify.SetFast(targets[0], nil, nil)
		if err := targets[0].Send(t.Context(), message()); err == nil || calls != want {
			t.Errorf("%s: %v after %d calls, want %d", path, err, calls, want)
		}
	}
	targets := mustLoad(t, "version: 1\nwebhooks: [{url_file: u}]\n", map[string]string{"u": "http://127.0.0.1:1/secretpath"})
	notify.SetFast(targets[0], nil, nil)
	if err := targets[0].Send(t.Context(), message()); err == nil || strings.Contains(err.Error(), "secretpath") {
		t.Errorf("error %v", err)
	}
}

// mailServer is an SMTP server of one connection after another.
type mailServer struct {
	t        *testing.T
	l        net.Listener
	cert     tls.Certificate
	starttls bool
	mu       sync.Mutex
	from     string
	to       []string
	auth     string
	clear    bool // mail came without TLS
	body     string
}

func newMailServer(t *testing.T, starttls bool) (*mailServer, *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	s := &mailServer{t: t, cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, starttls: starttls}
	if s.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.l.Close() })
	go func() {
		for {
			c, err := s.l.Accept()
			if err != nil {
				return
			}
			s.serve(c, false)
		}
	}()
	return s, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

func (s *mailServer) serve(c net.Conn, secure bool) {
	defer c.Close()
	r := bufio.NewReader(c)
	say := func(f string, a ...any) { fmt.Fprintf(c, f+"\r\n", a...) }
	if !secure {
		say("220 test")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSpace(line)
		verb, rest, _ := strings.Cut(line, " ")
		switch strings.ToUpper(verb) {
		case "EHLO":
			switch {
			case s.starttls && !secure:
				say("250-test\r\n250 STARTTLS")
			default:
				say("250-test\r\n250 AUTH PLAIN")
			}
		case "STARTTLS":
			if !s.starttls {
				say("454 no")
				continue
			}
			say("220 go")
			s.mu.Unlock()
			s.serve(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{s.cert}, MinVersion: tls.VersionTLS12}), true)
			s.mu.Lock()
			return
		case "AUTH":
			b, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(rest, "PLAIN "))
			s.auth = string(b)
			say("235 ok")
		case "MAIL":
			s.from, s.clear = rest, !secure
			say("250 ok")
		case "RCPT":
			s.to = append(s.to, rest)
			say("250 ok")
		case "DATA":
			say("354 go")
			var b strings.Builder
			for {
				l, err := r.ReadString('\n')
				if err != nil || l == ".\r\n" {
					break
				}
				b.WriteString(l)
			}
			s.body = b.String()
			say("250 ok")
		case "QUIT":
			say("221 bye")
			return
		default:
			say("500 what")
		}
	}
}

func TestMail(t *testing.T) {
	s, roots := newMailServer(t, true)
	doc := "version: 1\nmail:\n  - {server: \"" + s.l.Addr().String() + "\", from: ci@example.com, to: [edge@example.com], username: ci, password_file: pw}\n"
	targets := mustLoad(t, doc, map[string]string{"pw": "hush"})
	notify.SetFast(targets[0], nil, roots)
	if err := targets[0].Send(t.Context(), message()); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clear || s.auth != "\x00ci\x00hush" || !strings.Contains(s.from, "ci@example.com") {
		t.Errorf("clear %v, auth %q, from %q", s.clear, s.auth, s.from)
	}
	if len(s.to) != 2 || !strings.Contains(s.to[0], "edge@") || !strings.Contains(s.to[1], "own@") { // @team is no address
		t.Errorf("recipients %q", s.to)
	}
	m, err := mail.ReadMessage(strings.NewReader(s.body))
	if err != nil {
		t.Fatal(err)
	}
	if m.Header.Get("Bcc") != "" || !strings.Contains(m.Header.Get("Subject"), "would be blocked  Bcc: all") {
		t.Errorf("headers %v", m.Header)
	}
	text, err := io.ReadAll(quotedprintable.NewReader(m.Body))
	if err != nil || !strings.Contains(string(text), "Übel: usr/bin/edged\r\nfix: sign it") {
		t.Errorf("%q, %v", text, err)
	}
}

// Without TLS nothing is sent, and certainly no password.
func TestMail_noTLS(t *testing.T) {
	s, roots := newMailServer(t, false)
	targets := mustLoad(t, "version: 1\nmail: [{server: \""+s.l.Addr().String()+"\", from: ci@example.com, username: ci, password_file: pw}]\n", map[string]string{"pw": "hush"})
	notify.SetFast(targets[0], nil, roots)
	if err := targets[0].Send(t.Context(), message()); err == nil {
		t.Error("sent without TLS")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.auth != "" || s.body != "" {
		t.Errorf("auth %q, body %q", s.auth, s.body)
	}
}

func TestMail_wrongServer(t *testing.T) {
	s, _ := newMailServer(t, true)
	targets := mustLoad(t, "version: 1\nmail: [{server: \""+s.l.Addr().String()+"\", from: ci@example.com}]\n", nil)
	if err := targets[0].Send(t.Context(), message()); err == nil { // its certificate is nobody's
		t.Error("sent to a server that nobody vouches for")
	}
}

func TestCommand(t *testing.T) {
	dir := t.TempDir()
	targets := mustLoad(t, "version: 1\ncommands:\n  - [/bin/sh, -c, \"cat > "+dir+"/out\"]\n  - [/bin/sh, -c, \"echo broken >&2; exit 3\"]\n", nil)
	if err := targets[0].Send(t.Context(), message()); err != nil {
		t.Fatal(err)
	}
	var e struct {
		Type string `json:"type"`
		Data struct {
			Detail map[string]int `json:"detail"`
		} `json:"data"`
	}
	b, err := os.ReadFile(dir + "/out")
	if err != nil || json.Unmarshal(b, &e) != nil || e.Type != "ringwall.csv.blocked" || e.Data.Detail["hosts"] != 9812 {
		t.Errorf("%s, %v", b, err)
	}
	if err := targets[1].Send(t.Context(), message()); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("error %v", err)
	}
}

// fakeTarget counts, and fails while it is down.
type fakeTarget struct {
	name string
	sent int
	down bool
}

func (f *fakeTarget) Name() string { return f.name }

func (f *fakeTarget) Send(context.Context, *notify.Message) error {
	if f.down {
		return errors.New("down")
	}
	f.sent++
	return nil
}

func TestNotifier_tellsOnce(t *testing.T) {
	a, b := &fakeTarget{name: "a"}, &fakeTarget{name: "b", down: true}
	now := start
	file := filepath.Join(t.TempDir(), "state.json")
	tell := func(fingerprint string) error {
		// A new one each time: another run of the program.
		n := notify.Notifier{Targets: []notify.Target{a, b}, State: file, Again: 24 * time.Hour, Now: func() time.Time { return now }}
		m := message()
		m.Fingerprint = fingerprint
		_, err := n.Notify(t.Context(), m)
		return err
	}
	want := func(when string, sentA, sentB int) {
		t.Helper()
		if a.sent != sentA || b.sent != sentB {
			t.Errorf("%s: %d and %d, want %d and %d", when, a.sent, b.sent, sentA, sentB)
		}
	}
	if err := tell("f1"); err == nil {
		t.Error("a target that is down is no error")
	}
	want("first", 1, 0)
	b.down = false
	if err := tell("f1"); err != nil {
		t.Error(err)
	}
	want("who was down is told", 1, 1)
	_ = tell("f1")
	want("the same", 1, 1)
	_ = tell("f2")
	want("another problem", 2, 2)
	now = now.Add(25 * time.Hour)
	_ = tell("f2")
	want("a day later", 3, 3)
	n := notify.Notifier{State: file, Now: func() time.Time { return now }}
	if err := n.Resolve("edged"); err != nil {
		t.Error(err)
	}
	_ = tell("f2")
	want("it was well in between", 4, 4)

	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := tell("f2"); !errors.Is(err, errs.Invalid) {
		t.Errorf("damaged state: %v", err)
	}
	want("rather twice than never", 5, 5)
	if err := tell("f2"); err != nil {
		t.Errorf("and it is whole again: %v", err)
	}
	want("made anew", 5, 5)
}

func TestNotifier_manyAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state.json")
	var mu sync.Mutex
	sent := 0
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			f := &fakeTarget{name: "a"}
			n := notify.Notifier{Targets: []notify.Target{f}, State: file, Now: func() time.Time { return start }}
			if _, err := n.Notify(t.Context(), message()); err != nil {
				t.Error(err)
			}
			mu.Lock()
			sent += f.sent
			mu.Unlock()
		})
	}
	wg.Wait()
	if sent != 1 {
		t.Errorf("told %d times", sent)
	}
}

func TestLoad_refuses(t *testing.T) {
	for name, tc := range map[string]struct{ doc, want string }{
		"nothing":        {"version: 1\n", "names no target"},
		"unknown key":    {"version: 1\nslack: []\n", "unknown key"},
		"plain http":     {"version: 1\nwebhooks: [{url: \"http://example.com/\"}]\n", "https"},
		"password":       {"version: 1\nwebhooks: [{url: \"https://u:p@example.com/\"}]\n", "https"},
		"two addresses":  {"version: 1\nwebhooks: [{url: \"https://a.example/\", url_file: pw}]\n", "one of them"},
		"no secret":      {"version: 1\nwebhooks: [{url_file: nowhere}]\n", "no such file"},
		"open secret":    {"version: 1\nwebhooks: [{url_file: open}]\n", "chmod 600"},
		"tls none":       {"version: 1\nmail: [{server: \"mail.example:25\", from: a@b.example, tls: none}]\n", "this machine only"},
		"no port":        {"version: 1\nmail: [{server: mail.example, from: a@b.example}]\n", "host:port"},
		"from":           {"version: 1\nmail: [{server: \"mail.example:25\", from: nobody}]\n", "no mail address"},
		"half a login":   {"version: 1\nmail: [{server: \"mail.example:25\", from: a@b.example, username: u}]\n", "belong together"},
		"relative":       {"version: 1\ncommands: [[page, me]]\n", "no absolute path"},
		"a second file":  {"version: 1\n---\nversion: 1\n", "second YAML document"},
		"header trick":   {"version: 1\nmail: [{server: \"mail.example:25\", from: \"a@b.example\\nBcc: c@d.example\"}]\n", "line of"},
		"secret in argv": {"version: 1\nwebhooks: [{token: x}]\n", "unknown key"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_ = os.WriteFile(filepath.Join(dir, "pw"), []byte("x\n"), 0o600)
			_ = os.WriteFile(filepath.Join(dir, "open"), []byte("https://x.example/\n"), 0o644)
			_, err := notify.Parse(filepath.Join(dir, "n.yaml"), []byte(tc.doc))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestOwners(t *testing.T) {
	code := "# comment\n* @all\n*.py @python\n/usr/lib/edged/ @edge a@example.com # why\ndocs/** @docs\n[Section]\n/etc/** \n"
	simple := "a@example.com\n@b\nset noparent\n"
	k8s := "reviewers:\n  - r\napprovers:\n  - x\n  - y\nlabels:\n  - z\n"
	for _, tc := range []struct {
		doc   string
		paths []string
		want  string
	}{
		{code, []string{"usr/bin/x"}, "@all"},
		{code, []string{"usr/share/x.py"}, "@python"},
		{code, []string{"usr/lib/edged/x.py"}, "@edge a@example.com"},
		{code, []string{"x/usr/lib/edged/x"}, "@all"},
		{code, []string{"docs/a/b", "usr/bin/x"}, "@docs @all"},
		{code, []string{"etc/passwd"}, ""}, // nobody, said last
		{code, nil, "@all"},
		{simple, []string{"anything"}, "a@example.com @b"},
		{k8s, []string{"anything"}, "x y"},
		{"", []string{"x"}, ""},
	} {
		o, err := notify.ParseOwners([]byte(tc.doc))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(o.Of(tc.paths), " "); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.paths, got, tc.want)
		}
	}
}

func FuzzParseOwners(f *testing.F) {
	f.Add("* @all\n/a/**/b*.? @x\n", "a/c/b.o")
	f.Add("approvers:\n- x\n", "")
	f.Fuzz(func(t *testing.T, doc, path string) {
		o, err := notify.ParseOwners([]byte(doc))
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		got := o.Of([]string{path})
		for i, n := range got {
			if slices.Contains(got[:i], n) {
				t.Fatalf("%q twice", n)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nwebhooks: [{url: \"https://a.example/\"}]\nmail: [{server: \"m:25\", from: a@b.c}]\ncommands: [[/bin/x]]\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		targets, err := notify.Parse("/nonexistent/n.yaml", doc)
		if err == nil && len(targets) == 0 {
			t.Fatal("no target and no error")
		}
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatal(err)
		}
	})
}
