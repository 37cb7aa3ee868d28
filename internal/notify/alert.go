package notify

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"sync"
	"time"
)

// wanted is a target that gets not all about alerts: pages from a level of
// escalation on, changes of state, and updates if it wants them.
type wanted struct {
	Target
	level   int
	updates bool
}

// Send implements Target.
func (w *wanted) Send(ctx context.Context, m *Message) error {
	if a := m.Alert; a != nil && (a.Level < w.level || !a.Page && !a.Changed && !w.updates) {
		return nil
	}
	return w.Target.Send(ctx, m)
}

// Refresher is a target that takes what it is not told again for over.
type Refresher interface {
	// Refresh tells again that an alert goes on.
	Refresh(ctx context.Context, m *Message) error
}

// alertmanager gives alerts to Prometheus' Alertmanager, API v2, which groups,
// silences and routes them. It has no notion of an acknowledgement: an
// acknowledged alert has a label that routes can mute.
type alertmanager struct {
	poster

	mu       sync.Mutex
	severity map[string]string // of alerts that go on, by key
}

// forgets is how long an alert lasts without being said again: some refreshes
// may be lost.
const forgets = 5 * time.Minute

// told remembers the severity that was told, and returns the one before.
func (a *alertmanager) told(key, severity string, over bool) (before string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before = a.severity[key]
	if over {
		delete(a.severity, key)
		return before
	}
	if a.severity == nil {
		a.severity = map[string]string{}
	}
	a.severity[key] = severity
	return before
}

// Send implements Target.
func (a *alertmanager) Send(ctx context.Context, m *Message) error { return a.Refresh(ctx, m) }

// Refresh implements Refresher.
func (a *alertmanager) Refresh(ctx context.Context, m *Message) error {
	if m.Alert == nil {
		return nil
	}
	type alert struct {
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
		StartsAt    time.Time         `json:"startsAt"`
		EndsAt      time.Time         `json:"endsAt"`
	}
	out := alert{Labels: map[string]string{}, StartsAt: m.Alert.Since.UTC(), EndsAt: m.At.Add(forgets).UTC()}
	maps.Copy(out.Labels, m.Alert.Labels)
	out.Labels["alertname"], out.Labels["incident"], out.Labels["severity"] = "RingwallIncident", m.Alert.Key, m.Alert.Severity
	out.Annotations = map[string]string{"summary": oneLine(m.Title), "description": m.Text, "state": string(m.Alert.State)}
	if m.Alert.State == Over {
		out.EndsAt = m.At.UTC()
	}
	// The labels are the alert: when it got worse it is another, and the milder one ends.
	list := []alert{out}
	if before := a.told(m.Alert.Key, m.Alert.Severity, m.Alert.State == Over); before != "" && before != m.Alert.Severity {
		milder := out
		milder.Labels = maps.Clone(out.Labels)
		milder.Labels["severity"], milder.EndsAt = before, m.At.UTC()
		list = append(list, milder)
	}
	body, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("encode alert: %w", err)
	}
	return a.send(ctx, "/api/v2/alerts", "application/json", body)
}

// pagerduty gives alerts to PagerDuty, Events API v2, and to what understands it.
type pagerduty struct {
	poster
	key string
}

const pagerdutyURL = "https://events.pagerduty.com/v2/enqueue"

// Send implements Target. Without an alert there is nothing to follow.
func (p *pagerduty) Send(ctx context.Context, m *Message) error {
	if m.Alert == nil {
		return nil
	}
	type payload struct {
		Summary   string `json:"summary"`
		Source    string `json:"source"`
		Severity  string `json:"severity"`
		Timestamp string `json:"timestamp"`
		Details   any    `json:"custom_details,omitempty"`
	}
	event := struct {
		RoutingKey string   `json:"routing_key"`
		Action     string   `json:"event_action"`
		DedupKey   string   `json:"dedup_key"`
		Payload    *payload `json:"payload,omitempty"`
	}{RoutingKey: p.key, DedupKey: clip(m.Alert.Key, 255)}
	switch m.Alert.State {
	case Acknowledged:
		event.Action = "acknowledge"
	case Over:
		event.Action = "resolve"
	default:
		event.Action = "trigger"
		event.Payload = &payload{
			Summary: clip(oneLine(m.Title), 1024), Source: m.Source, Severity: pagerdutySeverity(m.Alert.Severity),
			Timestamp: m.At.UTC().Format(time.RFC3339), Details: map[string]any{"text": m.Text, "labels": m.Alert.Labels},
		}
	}
	body, err := json.Marshal(event)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	return p.send(ctx, "", "application/json", body)
}

// pagerdutySeverity is one of the four words that PagerDuty knows.
func pagerdutySeverity(s string) string {
	switch s {
	case "critical", "warning", "info":
		return s
	}
	return "error"
}

// clip cuts a text to at most n bytes, between characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 {
		n--
	}
	return s[:n]
}
