package main

import (
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func (s *fleetServer) metrics(t *testing.T) string {
	t.Helper()
	_, rest, ok := strings.Cut(s.said(), "metrics on ")
	if !ok {
		t.Fatalf("no metrics: %s", s.said())
	}
	url, _, _ := strings.Cut(rest, "\n")
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%d, %v: %s", resp.StatusCode, err, b)
	}
	return string(b)
}

func TestServer_metrics(t *testing.T) {
	t.Parallel()
	s := startServer(t, "--metrics", "127.0.0.1:0", "--syslog", "tcp://127.0.0.1:1")
	s.admin()
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(4, "admin", "", "resource", "get", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09591")
	s.published()
	got := s.metrics(t)
	for _, want := range []string{
		`ringwall_http_requests_total{code="201",route="PUT /"} 1`,
		`ringwall_http_requests_total{code="404",route="GET /"} 1`,
		`ringwall_http_request_duration_seconds_count{route="PUT /"} 1`,
		`ringwall_http_requests_in_flight 0`,
		`ringwall_feed_watchers 0`,
		`ringwall_database_up 1`,
		`ringwall_lease_held{lease="syslog tcp://127.0.0.1:1"} 1`,
		`ringwall_database_transaction_seconds_count{kind="write"}`,
		`ringwall_outbox_position{outbox="syslog tcp://127.0.0.1:1"} 0`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing: %s", want)
		}
	}
	records := regexp.MustCompile(`(?m)^ringwall_audit_records (\d+)$`).FindStringSubmatch(got)
	published := regexp.MustCompile(`(?m)^ringwall_outbox_position\{outbox="audit-log [0-9a-f]+"\} (\d+)$`).FindStringSubmatch(got)
	waiting := regexp.MustCompile(`(?m)^ringwall_outbox_waiting_seconds\{outbox="syslog [^"]+"\} ([0-9.e-]+)$`).FindStringSubmatch(got)
	if records == nil || published == nil || records[1] != published[1] || waiting == nil || waiting[1] == "0" {
		t.Errorf("records %v, published %v, waiting %v", records, published, waiting)
	}
	if strings.Contains(got, "0b1f6471") {
		t.Error("a label holds what a client chose")
	}
	if promtool, err := exec.LookPath("promtool"); err != nil {
		t.Log("NAMES NOT LINTED: no promtool here; fix: apt-get install prometheus")
	} else {
		lint := exec.Command(promtool, "check", "metrics")
		lint.Stdin = strings.NewReader(got)
		if out, err := lint.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	for _, bad := range []string{"x", "0.0.0.0:9477", ":9477", "192.0.2.1:1"} {
		if code, _, msg := s.run("admin", "", "server", "--data", t.TempDir(), "--listen", "127.0.0.1:0", "--metrics", bad); code != 2 {
			t.Errorf("--metrics %s: exit code %d, %s", bad, code, msg)
		}
	}
}

// The alert rules that the page gives are what Prometheus takes, and they name
// metrics that exist.
func TestMonitorPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/ops/monitor-a-server.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(page), "```yaml\n")
	rules, _, ok2 := strings.Cut(rest, "```\n")
	if !ok || !ok2 {
		t.Fatal("the page has no rules")
	}
	var said lockedBuffer
	e := &env{stdin: strings.NewReader(""), stdout: &said, stderr: &said, now: time.Now, getenv: func(string) string { return "" }}
	o := serverOptions{data: t.TempDir(), audit: auditOptions{syslogFormat: "json"}}
	parts, err := openServer(t.Context(), o.url(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = parts.close() })
	if err := o.assemble(t.Context(), e, parts); err != nil {
		t.Fatal(err)
	}
	descs := make(chan *prometheus.Desc, 1000)
	parts.metrics.registry.Describe(descs)
	close(descs)
	known := map[string]bool{}
	for d := range descs {
		_, rest, _ := strings.Cut(d.String(), `fqName: "`)
		name, _, _ := strings.Cut(rest, `"`)
		known[name] = true
	}
	for _, name := range regexp.MustCompile(`ringwall_[a-z_]+`).FindAllString(string(page), -1) {
		if !known[strings.TrimSuffix(name, "_bucket")] {
			t.Errorf("the page names %s, which does not exist", name)
		}
	}
	for name := range known {
		if strings.HasPrefix(name, "ringwall_") && !strings.Contains(string(page), name) {
			t.Errorf("the page lacks %s", name)
		}
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("RULES NOT TESTED: no promtool here; fix: apt-get install prometheus")
	}
	file := t.TempDir() + "/rules.yml"
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
