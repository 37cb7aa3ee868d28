package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/control/incidents"
	"ringwall/internal/incident"
	"ringwall/internal/notify"
	"ringwall/internal/resource"
	"ringwall/internal/testkit"
)

// putIncident stores a block, as the server would.
func (s *fleetServer) putIncident(name string, at time.Time) {
	s.t.Helper()
	i, notices := incident.New(name, &incident.Event{
		ID: "1", Scope: testGroup, Host: "web-1", Kind: "exec", Path: "/tmp/\x1b[31mminer", SHA256: strings.Repeat("ab", 32), Parent: "/usr/sbin/nginx",
		Rule: "default", Reason: "not-listed", Mode: "enforce", Count: 3, At: at.UTC(),
	})
	stored := incidents.Stored{Incident: *i}
	for _, n := range notices {
		stored.Outbox = append(stored.Outbox, incidents.Outgoing{Notice: n, At: i.OpenedAt})
	}
	doc, err := json.Marshal(map[string]any{"properties": stored})
	if err != nil {
		s.t.Fatal(err)
	}
	s.must(0, "admin", string(doc), "resource", "put", testGroup+"/providers/"+incidents.TypeIncident+"/"+name, "--file", "-")
}

// TestIncident is a night on call: a page by mail, and what a person types.
func TestIncident(t *testing.T) {
	mail := testkit.StartMailServer(t)
	file := filepath.Join(t.TempDir(), "notify.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "version: 1\nmail: [{server: %q, from: ringwall@example.com, to: [oncall@%s], tls: none}]\n", mail.Address, mail.Domain), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, "--notify", file)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	if got := s.must(0, "admin", "", "incident", "list"); !strings.Contains(got, "nothing is going on") {
		t.Error(got)
	}

	const name = "inc-20310501-k3f9ab"
	s.putIncident(name, time.Now())
	if got := mail.Wait(t, 1)[0]; !strings.Contains(got, "Subject: =?utf-8?q?") && !strings.Contains(got, "Subject: [warning]") || !strings.Contains(got, "ringwall incident ack "+name) {
		t.Errorf("the page:\n%s", got)
	}

	if got := s.must(0, "admin", "", "incident", "list"); !strings.Contains(got, name) || !strings.Contains(got, "open") || strings.Contains(got, "\x1b") {
		t.Errorf("%q", got)
	}
	for _, c := range []struct {
		exit int
		args []string
		want string
	}{
		{0, []string{"show", name}, "nginx"},
		{0, []string{"show", "inc-20310501"}, "incident triage " + name + " --cause attack"},
		{4, []string{"show", "inc-1999"}, "there is no incident"},
		{0, []string{"ack", name}, "acknowledged by break-glass"},
		{2, []string{"ack", name, "--for", "48h"}, "--for"},
		{0, []string{"comment", name, "known to nobody"}, "acknowledged"},
		{6, []string{"close", name}, "resolve it first"},
		{0, []string{"triage", name, "--cause", "attack", "--impact", "none"}, "acknowledged"},
		{0, []string{"mitigate", name, "host isolated"}, "mitigated"},
		{0, []string{"resolve", name}, "resolved"},
		{0, []string{"close", name}, "closed"},
		{0, []string{"list"}, "nothing is going on"},
		{0, []string{"list", "--all"}, name},
		{0, []string{"show", name}, "time to mitigate"},
		{0, []string{"silence", testGroup, "known", "--path", "/srv/", "--reason", "a test"}, `"reason": "a test"`},
	} {
		code, out, errOut := s.run("admin", "", append([]string{"incident"}, c.args...)...)
		if code != c.exit || !strings.Contains(out+errOut, c.want) {
			t.Errorf("incident %q: exit %d, want %d with %q\n%s%s", c.args, code, c.exit, c.want, out, errOut)
		}
	}
	if got := mail.Wait(t, 4); len(got) != 4 { // the page, acknowledged, mitigated, resolved
		t.Errorf("%d mails", len(got))
	}
}

// Incidents reach a collector of logs in OCSF's form.
func TestIncident_syslog(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	lines := make(chan string, 100)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		in := bufio.NewScanner(conn)
		in.Split(bufio.ScanWords)
		var all strings.Builder
		for in.Scan() {
			all.WriteString(in.Text() + " ")
			if _, found, _ := strings.Cut(all.String(), `"class_uid":2005`); strings.Contains(found, "severity_id") {
				lines <- all.String()
				all.Reset()
			}
		}
	}()
	s := startServer(t, "--syslog", "tcp://"+l.Addr().String())
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590", "--file", "-")
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	s.putIncident("inc-20310501-k3f9ab", time.Now())
	select {
	case got := <-lines:
		if !strings.Contains(got, `"activity_id":1`) || !strings.Contains(got, `"severity_id":3`) || !strings.Contains(got, `"uid":"inc-20310501-k3f9ab"`) {
			t.Error(got)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the collector got nothing")
	}
}

// heard is a target that remembers what it was told, and can be away.
type heard struct {
	name   string
	away   bool
	titles []string
}

func (h *heard) Name() string { return h.name }

func (h *heard) Send(_ context.Context, m *notify.Message) error {
	if h.away {
		return errors.New("away")
	}
	h.titles = append(h.titles, m.Title)
	return nil
}

// A target that is away makes no other hear twice, and the same words at another
// time are another notice: the end of a second acknowledgement pages as well.
func TestOnCall(t *testing.T) {
	now := time.Now()
	a, b := &heard{name: "a"}, &heard{name: "b", away: true}
	o := &onCall{targets: []notify.Target{a, b}, now: func() time.Time { return now }, told: map[string]time.Time{}}
	i, _ := incident.New("inc-1", &incident.Event{Scope: testGroup, Host: "h", Kind: "exec", Path: "/tmp/x", Mode: "enforce", Count: 1, At: now})
	scope, err := resource.ParseID(testGroup)
	if err != nil {
		t.Fatal(err)
	}
	tell := func(at time.Time) error {
		return o.Notify(t.Context(), &incidents.Stored{Incident: *i}, scope, incidents.Outgoing{Notice: incident.Notice{Incident: i.ID, Page: true, Text: "over"}, At: at})
	}
	if tell(now) == nil {
		t.Error("a target that is away is no error")
	}
	b.away = false
	if err := errors.Join(tell(now), tell(now), tell(now.Add(time.Minute))); err != nil {
		t.Fatal(err)
	}
	if len(a.titles) != 2 || len(b.titles) != 2 {
		t.Errorf("told %d and %d times, want 2 and 2", len(a.titles), len(b.titles))
	}
}
