package notify_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/notify"
	"ringwall/internal/testkit"
)

// received collects the bodies that a server gets.
type received struct {
	mu     sync.Mutex
	bodies []string
}

func (r *received) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	b, _ := io.ReadAll(q.Body)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bodies = append(r.bodies, string(b))
	w.WriteHeader(http.StatusAccepted)
}

func (r *received) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.bodies...)
}

// wait returns the first body that has all parts.
func (r *received) wait(t *testing.T, parts ...string) string {
	t.Helper()
	for range 1000 {
	next:
		for _, b := range r.all() {
			for _, p := range parts {
				if !strings.Contains(b, p) {
					continue next
				}
			}
			return b
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("nothing with %q came: %q", parts, r.all())
	return ""
}

func alert(change ...func(*notify.Message)) *notify.Message {
	m := message()
	m.At = time.Now()
	m.Alert = &notify.Alert{
		Key: "inc-20310501-abcdef", State: notify.Firing, Severity: "warning", Since: m.At.Add(-time.Minute),
		Labels: map[string]string{"scope": "/subscriptions/x"}, Page: true,
	}
	for _, c := range change {
		c(m)
	}
	return m
}

func over(m *notify.Message) {
	m.Alert.State, m.Alert.Page, m.Alert.Changed = notify.Over, false, true
}

// A real Alertmanager takes an alert, one that gets worse, and its end.
func TestAlertmanager(t *testing.T) {
	var got received
	hook := httptest.NewServer(&got)
	defer hook.Close()
	target := mustLoad(t, fmt.Sprintf("version: 1\nalertmanagers: [{url: %q}]\n", testkit.StartAlertmanager(t, hook.URL)), nil)[0]
	if err := target.Send(t.Context(), message()); err != nil {
		t.Errorf("what is no alert: %v", err)
	}
	if err := target.Send(t.Context(), alert()); err != nil {
		t.Fatal(err)
	}
	got.wait(t, `"status":"firing"`, "inc-20310501-abcdef", `"severity":"warning"`, "RingwallIncident")
	worse := func(m *notify.Message) { m.Alert.Severity = "high" }
	if err := target.Send(t.Context(), alert(worse)); err != nil {
		t.Fatal(err)
	}
	got.wait(t, `"status":"firing"`, `"severity":"high"`)
	if err := target.Send(t.Context(), alert(worse, over)); err != nil {
		t.Fatal(err)
	}
	got.wait(t, `"receiver":"test","status":"resolved"`) // the whole group
	if r, ok := target.(notify.Refresher); !ok || r.Refresh(t.Context(), alert()) != nil {
		t.Errorf("refresh %v", ok)
	}
}

func TestPagerDuty(t *testing.T) {
	var got received
	server := httptest.NewServer(&got)
	defer server.Close()
	target := mustLoad(t, fmt.Sprintf("version: 1\npagerduty: [{key_file: key, url: %q, level: 1}]\n", server.URL), map[string]string{"key": "r0uting"})[0]
	level := func(m *notify.Message) { m.Alert.Level = 1 }
	for _, m := range []*notify.Message{
		message(), // no alert
		alert(),   // not escalated yet
		alert(level, func(m *notify.Message) { m.Title = strings.Repeat("ü", 2000) }),
		alert(level, func(m *notify.Message) { m.Alert.Page = false }), // an update
		alert(level, func(m *notify.Message) { m.Alert.State = notify.Acknowledged }),
		alert(level, over),
	} {
		if err := target.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	type event struct {
		Key     string `json:"routing_key"`
		Action  string `json:"event_action"`
		Dedup   string `json:"dedup_key"`
		Payload *struct{ Summary, Severity, Source string }
	}
	var actions []string
	for _, b := range got.all() {
		var e event
		if err := json.Unmarshal([]byte(b), &e); err != nil {
			t.Fatal(err)
		}
		if e.Key != "r0uting" || e.Dedup != "inc-20310501-abcdef" {
			t.Errorf("%+v", e)
		}
		if e.Payload != nil && (len(e.Payload.Summary) > 1024 || e.Payload.Severity != "warning" || strings.ContainsRune(e.Payload.Summary, '\uFFFD')) {
			t.Errorf("%+v", e.Payload)
		}
		actions = append(actions, e.Action)
	}
	if fmt.Sprint(actions) != "[trigger acknowledge resolve]" {
		t.Errorf("actions %v", actions)
	}
	if strings.Contains(target.Name(), "r0uting") {
		t.Errorf("the name %q holds the key", target.Name())
	}
}

// A real mail server takes pages and the end, and no updates.
func TestMail_alert(t *testing.T) {
	m := testkit.StartMailServer(t)
	target := mustLoad(t, fmt.Sprintf("version: 1\nmail: [{server: %q, from: ringwall@example.com, to: [oncall@%s], tls: none}]\n", m.Address, m.Domain), nil)[0]
	var err error
	own := func(m *notify.Message) { m.Owners = nil }
	for _, msg := range []*notify.Message{alert(own), alert(own, func(m *notify.Message) { m.Alert.Page, m.Title = false, "an update" }), alert(own, over, func(m *notify.Message) { m.Title = "over" })} {
		err = errors.Join(err, target.Send(t.Context(), msg))
	}
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(m.Wait(t, 2), "\n")
	if !strings.Contains(got, "would be blocked") || !strings.Contains(got, "Subject: over") || strings.Contains(got, "an update") {
		t.Errorf("mails:\n%s", got)
	}
}
