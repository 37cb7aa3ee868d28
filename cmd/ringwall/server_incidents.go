package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/control/incidents"
	"ringwall/internal/incident"
	"ringwall/internal/notify"
	"ringwall/internal/resource"
	"ringwall/internal/syslog"
)

// onCall tells people of incidents, through the targets of a configuration.
type onCall struct {
	targets []notify.Target
	now     func() time.Time

	mu   sync.Mutex
	told map[string]time.Time // target and notice; so that one target that fails does not make the others hear twice
}

// openOnCall reads whom to tell; "" for nobody.
// collectors get everything too.
func openOnCall(file string, collectors []notify.Target, now func() time.Time) (incidents.Notifier, error) {
	targets := collectors
	if file != "" {
		people, err := notify.Load(file)
		if err != nil {
			return nil, err
		}
		targets = append(targets, people...)
	}
	if len(targets) == 0 {
		return nil, nil //nolint:nilnil // nobody, which the engine says in its log
	}
	return &onCall{targets: targets, now: now, told: map[string]time.Time{}}, nil
}

// toldFor is how long it is remembered who has heard of a notice.
const toldFor = 2 * time.Hour

// Notify implements incidents.Notifier. It fails when one of the targets does.
func (o *onCall) Notify(ctx context.Context, i *incidents.Stored, scope resource.ID, n incidents.Outgoing) error {
	m := o.message(i, scope)
	m.Alert.Page, m.Alert.Level, m.Alert.Changed = n.Page, n.Level, n.State != ""
	if n.State != "" {
		m.Alert.State = alertState(n.State)
	}
	if n.Text != i.Title {
		m.Title += ": " + n.Text
	}
	errs := make([]error, len(o.targets))
	var wg sync.WaitGroup
	for k, t := range o.targets {
		key := fmt.Sprintf("%s\n%v\n%d", t.Name(), n.Notice, n.At.UnixNano())
		if o.heard(key) {
			continue
		}
		wg.Go(func() {
			if err := t.Send(ctx, m); err != nil {
				errs[k] = fmt.Errorf("%s: %w", t.Name(), err)
				return
			}
			o.hears(key)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (o *onCall) heard(key string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, ok := o.told[key]
	return ok
}

func (o *onCall) hears(key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.now()
	for k, at := range o.told {
		if now.Sub(at) > toldFor {
			delete(o.told, k)
		}
	}
	o.told[key] = now
}

// Refresh implements incidents.Refresher.
func (o *onCall) Refresh(ctx context.Context, i *incidents.Stored, scope resource.ID) error {
	var all []error
	for _, t := range o.targets {
		if r, ok := t.(notify.Refresher); ok {
			all = append(all, r.Refresh(ctx, o.message(i, scope)))
		}
	}
	return errors.Join(all...)
}

func alertState(s incident.State) notify.AlertState {
	switch s {
	case incident.Open:
		return notify.Firing
	case incident.Resolved, incident.Closed:
		return notify.Over
	}
	return notify.Acknowledged
}

// message says in few lines what somebody who was just woken needs.
func (o *onCall) message(i *incidents.Stored, scope resource.ID) *notify.Message {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s, %s, on %d hosts, below %s\n", i.Title, i.State, i.Severity, i.HostCount(), scope)
	if len(i.Alerts) > 0 {
		s := &i.Alerts[0].Sample
		if s.Kind != incident.KindNotice {
			fmt.Fprintf(&b, "\npath    %s\nsha256  %s\nsigner  %s\nstarted by %s", s.Path, s.SHA256, cmp.Or(s.Signer, incident.Unsigned), s.Parent)
		}
		fmt.Fprintf(&b, "\nfirst on %s\n", cmp.Or(s.Name, s.Host))
	}
	cause, why := i.Suggest()
	fmt.Fprintf(&b, "\nprobably %s: %s\n\n  ringwall incident show %s\n  ringwall incident ack %s\n", cause, why, i.ID, i.ID)
	return &notify.Message{
		Type: "ringwall.incident", Source: "urn:ringwall:incidents", Subject: i.ID, Fingerprint: i.ID,
		Title: "[" + string(i.Severity) + "] " + i.Title, Text: b.String(), At: o.now(),
		Alert: &notify.Alert{
			Key: i.ID, State: alertState(i.State), Severity: string(i.Severity), Since: i.OpenedAt, Labels: map[string]string{"scope": scope.String()},
		},
	}
}

// addIncidents adds the engine that turns blocks into incidents, and the loop
// that tells people of them.
func (p *serverParts) addIncidents(file string, now func() time.Time) error {
	people, err := openOnCall(file, p.collectors, now)
	if err != nil {
		return err
	}
	p.incidents = incidents.New(p.door, incidents.Options{Notifier: people, Log: p.log, Now: now, Observe: p.metrics.incident, Open: p.metrics.openIncidents})
	p.loop(func(ctx context.Context) { _ = p.incidents.Run(ctx) })
	p.lead("incidents", func(ctx context.Context, f control.Fence) error { return p.incidents.Tell(ctx, p.door.Under(f)) })
	return nil
}

// incidentCollector gives incidents to a collector of logs, as OCSF's Incident Finding
// (class 2005).
type incidentCollector struct {
	name string
	to   *syslog.Sender
}

// Name implements notify.Target.
func (c *incidentCollector) Name() string { return c.name }

// Send implements notify.Target.
func (c *incidentCollector) Send(ctx context.Context, m *notify.Message) error {
	a := m.Alert
	if a == nil {
		return nil
	}
	const (
		created, updated, closed  = 1, 2, 3 // activity_id
		fresh, underWay, resolved = 1, 2, 4 // status_id
	)
	activity, status := updated, fresh
	switch {
	case a.State == notify.Over:
		activity, status = closed, resolved
	case a.State == notify.Acknowledged:
		status = underWay
	case a.Page && a.Level == 0:
		activity = created
	}
	e := syslog.Event{
		Class: syslog.IncidentFinding, Activity: activity, Severity: map[string]int{"critical": 5, "high": 4, "warning": 3}[a.Severity], Time: m.At,
		UID: fmt.Sprintf("%s/%d", a.Key, m.At.UnixMicro()), Text: m.Title,
		Fields: map[string]any{
			"finding_info_list": []any{map[string]any{"uid": a.Key, "title": m.Title, "created_time": a.Since.UnixMilli(), "desc": m.Text}},
			"status_id":         status, "status": string(a.State), "start_time": a.Since.UnixMilli(),
			"resources": []any{map[string]any{"uid": a.Labels["scope"]}},
		},
	}
	e.Severity = max(e.Severity, 1) // informational
	message, err := e.Message()
	if err != nil {
		return err
	}
	return c.to.Send(ctx, message)
}
