package signer_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

// service is a server on a real socket, with TLS.
type service struct {
	*world
	server *signer.Server
	url    string
	tls    map[string][]byte
	stop   context.CancelFunc
	done   chan error
}

func newService(t *testing.T) *service {
	t.Helper()
	s := &service{world: newWorld(t), done: make(chan error, 1)}
	var err error
	s.tls, err = signer.TLSFiles([]string{"127.0.0.1"}, map[string]string{
		"ci": "spiffe://fleet.example/ci/edged", "eve": "spiffe://fleet.example/eve", "ops": "spiffe://fleet.example/ops",
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.server = &signer.Server{
		Signer: s.Signer, Spool: filepath.Join(s.dir, "spool"), SpoolMax: 8 << 20, ArtefactMax: 4 << 20,
		Clients: []signer.ClientRule{
			{Name: "ci", Identity: "spiffe://fleet.example/ci/edged", Products: []string{"edged", "other"}},
			{Name: "ops", Identity: "spiffe://fleet.example/ops", Products: []string{"*"}, Breakglass: true},
		},
		Audit: s.Signer.Audit, Log: slog.New(slog.DiscardHandler),
	}
	c, err := signer.TLSConfig(s.tls["server.crt"], s.tls["server.key"], s.tls["tls-ca.crt"])
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.url = "https://" + l.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go func() { s.done <- s.server.Serve(ctx, l, c) }()
	t.Cleanup(func() {
		stop()
		if err := <-s.done; err != nil {
			t.Errorf("serve: %v", err)
		}
		left, err := os.ReadDir(s.server.Spool)
		if err != nil || len(left) != 0 {
			t.Errorf("left in the spool: %v, %v", left, err)
		}
	})
	return s
}

func (s *service) client(t *testing.T, who string) *signer.Client {
	t.Helper()
	c, err := signer.NewClient(s.url, s.tls["client-"+who+".crt"], s.tls["client-"+who+".key"], s.tls["tls-ca.crt"])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestServer_signs(t *testing.T) {
	s := newService(t)
	var sent, of int64
	o := s.order(s.passed(t))
	o.NotAfter = epoch().Add(1000 * time.Hour)
	a, err := s.client(t, "ci").Submit(t.Context(), o, func(n, all int64) { sent, of = n, all })
	if err != nil {
		t.Fatal(err)
	}
	r, c, err := codesign.VerifyRelease(a.Bundle, a.Catalogue, s.authority.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.VerifyNames(a.Names, c); err != nil {
		t.Error(err)
	}
	if a.Result.Release != r.Record.String() || r.Artefacts[0].Name != "edged.tar" || sent != of || sent == 0 || !r.NotAfter.Equal(o.NotAfter) {
		t.Errorf("%+v, sent %d of %d", a.Result, sent, of)
	}
	var events []string
	for _, e := range s.audit {
		if e.Client != "spiffe://fleet.example/ci/edged" || e.ID == "" {
			t.Errorf("audit %+v", e)
		}
		events = append(events, e.Event)
	}
	if strings.Join(events, " ") != "asked signing signed" {
		t.Errorf("audit: %v", events)
	}
}

func TestServer_refuses(t *testing.T) {
	s := newService(t)
	s.put(t, "big.tar", make([]byte, 5<<20))
	for name, tc := range map[string]struct {
		who  string
		edit func(*signer.Order)
		kind error
		text string
	}{
		"a stranger":              {"eve", func(*signer.Order) {}, errs.Denied, "no client of this signer"},
		"another product":         {"ci", func(o *signer.Order) { o.Product = "kernel" }, errs.Denied, "may not ask for product kernel"},
		"no product":              {"ci", func(o *signer.Order) { o.Product = "" }, errs.Invalid, "names no product"},
		"break-glass":             {"ci", func(o *signer.Order) { o.Breakglass = true }, errs.Denied, "may not break glass"},
		"break-glass, unapproved": {"ops", func(o *signer.Order) { o.Breakglass = true }, errs.Denied, "0 of 2 approvals"},
		"no gates passed":         {"ci", func(o *signer.Order) { o.Evidence = nil }, errs.Denied, "on hold; gate unit"},
		"no policy":               {"ci", func(o *signer.Order) { o.Product, o.Ungated = "other", true }, errs.NotFound, "release policy of other"},
		"too large":               {"ci", func(o *signer.Order) { o.Path = filepath.Join(s.dir, "big.tar") }, errs.Invalid, "more than 4194304 bytes"},
		"not an artefact":         {"ci", func(o *signer.Order) { o.Path = filepath.Join(s.dir, "policies/edged.yaml") }, errs.Invalid, ""},
		"a name that climbs":      {"ci", func(o *signer.Order) { o.Name = "../x" }, errs.Invalid, "name"},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(s.audit)
			o := s.order(s.passed(t))
			tc.edit(&o)
			a, err := s.client(t, tc.who).Submit(t.Context(), o, nil)
			if !errors.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.text) || a != nil {
				t.Errorf("%v, want %v: %s", err, tc.kind, tc.text)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if last := s.audit[len(s.audit)-1]; len(s.audit) == before || last.Event != "refused" && last.Event != "failed" || last.Error == "" {
				t.Errorf("audit %+v", last)
			}
		})
	}
}

// A refusal carries the whole decision, so that the client can show the table.
func TestServer_decision(t *testing.T) {
	s := newService(t)
	_, err := s.client(t, "ci").Submit(t.Context(), s.order(s.evidence(t, "ann", gate.TypeTest, `{"result":"PASSED","passedTests":["a"]}`)), nil)
	var refused *signer.Refused
	if !errors.As(err, &refused) {
		t.Fatal(err)
	}
	if d := refused.Decision; d.State != gate.Hold || len(d.Results) != 3 || len(d.Ignored) != 1 || d.Ignored[0].Label != "ann.evidence.json" || refused.Artefact.String() != s.digest.String() {
		t.Errorf("%+v", refused)
	}
}

func TestServer_audit(t *testing.T) {
	s := newService(t)
	s.auditErr = errFull
	if _, err := s.client(t, "ci").Submit(t.Context(), s.order(s.passed(t)), nil); err == nil {
		t.Error("signed without an audit")
	}
	s.auditErr = nil
}

func TestServer_breakglass(t *testing.T) {
	s := newService(t)
	o := s.order(s.approvals(t)...)
	o.Breakglass = true
	a, err := s.client(t, "ops").Submit(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Result.Decision.Breakglass || len(s.alerts) != 1 || s.alerts[0].Client != "spiffe://fleet.example/ops" {
		t.Errorf("%+v, alerts %+v", a.Result, s.alerts)
	}
}

// Who has no certificate, or one of another CA, does not get as far as HTTP.
func TestServer_mutualTLS(t *testing.T) {
	s := newService(t)
	other, err := signer.TLSFiles([]string{"127.0.0.1"}, map[string]string{"ci": "spiffe://fleet.example/ci/edged"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := signer.NewClient(s.url, other["client-ci.crt"], other["client-ci.key"], s.tls["tls-ca.crt"])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(t.Context(), s.order(s.passed(t)), nil); err == nil {
		t.Error("a certificate of another CA is accepted")
	}
	plain := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	if resp, err := plain.Get(s.url + "/healthz"); err == nil {
		resp.Body.Close()
		t.Error("a client without a certificate is served")
	}
	// a client believes its own CAs only
	c, err = signer.NewClient(s.url, s.tls["client-ci.crt"], s.tls["client-ci.key"], other["tls-ca.crt"])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(t.Context(), s.order(s.passed(t)), nil); err == nil {
		t.Error("the client believes a server of another CA")
	}
	if len(s.audit) != 0 {
		t.Errorf("audit %+v", s.audit)
	}
}

// The handler by itself does not trust a connection without a certificate.
func TestServer_handlerFailsClosed(t *testing.T) {
	s := newService(t)
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	if err := m.WriteField("order", `{"product":"edged"}`); err != nil {
		t.Fatal(err)
	}
	m.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Server{Handler: s.server.Handler()}
	go h.Serve(l)
	defer h.Close()
	resp, err := http.Post("http://"+l.Addr().String()+"/v1/sign", m.FormDataContentType(), &b)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %s", resp.Status)
	}
}

// Told to stop, it finishes what it began.
func TestServer_stopsGracefully(t *testing.T) {
	s := newService(t)
	inside, goOn := make(chan struct{}), make(chan struct{})
	audit := s.Signer.Audit
	s.Signer.Audit = func(ctx context.Context, e signer.Entry) error {
		close(inside)
		<-goOn
		return audit(ctx, e)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.client(t, "ci").Submit(t.Context(), s.order(s.passed(t)), nil)
		done <- err
	}()
	<-inside
	s.stop()
	time.Sleep(100 * time.Millisecond)
	close(goOn)
	if err := <-done; err != nil {
		t.Errorf("a request that had begun: %v", err)
	}
}

func TestServer_spoolQuota(t *testing.T) {
	s := newService(t)
	s.server.SpoolMax = 1 << 20
	s.put(t, "big.tar", make([]byte, 3<<20))
	o := s.order(s.passed(t))
	o.Path = filepath.Join(s.dir, "big.tar")
	if _, err := s.client(t, "ci").Submit(t.Context(), o, nil); !errors.Is(err, errs.Conflict) {
		t.Errorf("%v", err)
	}
	if _, err := s.client(t, "ci").Submit(t.Context(), s.order(s.passed(t)), nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestParseConfig(t *testing.T) {
	good := `version: 1
listen: 127.0.0.1:1
tls: {certificate: tls/server.crt, key: tls/server.key, client_cas: /etc/ca.crt}
clients:
  - {name: ci, identity: spiffe://fleet.example/ci, products: [edged]}
keys: keys
policies: policies
state: state
`
	c, err := signer.ParseConfig("signer.yaml", "/etc/ringwall", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if c.Certificate != "/etc/ringwall/tls/server.crt" || c.ClientCAs != "/etc/ca.crt" || c.Spool != "/etc/ringwall/state/spool" || c.ArtefactMax != 4<<30 || c.Clients[0].Breakglass {
		t.Errorf("%+v", c)
	}
	for _, edit := range [][2]string{
		{"listen: 127.0.0.1:1", "listen: localhost"},
		{"keys: keys", "keyz: keys"},
		{"products: [edged]", "products: []"},
		{"identity: spiffe://fleet.example/ci", "identity: ci"},
		{"policies: policies", ""},
		{"clients:\n", "clients:\n  - {name: x, identity: spiffe://fleet.example/ci, products: [edged]}\n"},
	} {
		doc := strings.Replace(good, edit[0], edit[1], 1)
		if _, err := signer.ParseConfig("s", "/", []byte(doc)); doc == good || !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", edit[1], err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("version: 1\ntls: {certificate: a, key: b, client_cas: c}\nclients: [{name: x, identity: \"a://b\", products: [\"*\"]}]\nkeys: k\npolicies: p\nstate: s\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		if c, err := signer.ParseConfig("f", "/d", doc); err == nil && (len(c.Clients) == 0 || c.Keys == "" || c.Policies == "") || err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatalf("%+v, %v", c, err)
		}
	})
}

func TestLines(t *testing.T) {
	name := filepath.Join(t.TempDir(), "alerts")
	l, err := signer.OpenLines(name)
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	told := filepath.Join(t.TempDir(), "told")
	alert := signer.Alerts(l, []string{"sh", "-c", "cat > " + told}, func(err error) { failed = err })
	if err := alert(t.Context(), signer.Entry{Event: "breakglass", Breakglass: "why"}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	broken := signer.Alerts(l, []string{"sh", "-c", "echo no >&2; exit 3"}, func(err error) { failed = err })
	if err := broken(t.Context(), signer.Entry{Event: "breakglass"}); err != nil || failed == nil || !strings.Contains(failed.Error(), "no") {
		t.Errorf("%v, %v", err, failed)
	}
	for file, lines := range map[string]int{name: 2, told: 1} {
		b, err := os.ReadFile(file)
		if err != nil || bytes.Count(b, []byte("\n")) != lines {
			t.Fatalf("%s: %q, %v", file, b, err)
		}
		var e signer.Entry
		if err := json.Unmarshal(bytes.SplitAfter(b, []byte("\n"))[0], &e); err != nil || e.Breakglass != "why" {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if l.Close(); alert(t.Context(), signer.Entry{}) == nil {
		t.Error("an alert that could not be written is no error")
	}
}
