package incidents_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/control/incidents"
	"ringwall/internal/errs"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

const group = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web"

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

func admin() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "admin"} }

// pager remembers what it was given.
type pager struct {
	mu    sync.Mutex
	fail  error
	pages []incident.Notice
	other []incident.Notice
	come  chan struct{}
}

func (p *pager) Notify(_ context.Context, _ *incidents.Stored, _ resource.ID, o incidents.Outgoing) error {
	n := o.Notice
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case p.come <- struct{}{}:
	default:
	}
	if p.fail != nil {
		return p.fail
	}
	if n.Page {
		p.pages = append(p.pages, n)
	} else {
		p.other = append(p.other, n)
	}
	return nil
}

func (p *pager) paged() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pages)
}

// clock can be set.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

type lab struct {
	t     *testing.T
	door  *control.Door
	pager *pager
	clock *clock

	mu    sync.Mutex
	steps []string // that were observed
}

func (l *lab) observe(step string, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps = append(l.steps, fmt.Sprint(step, " ", took.Round(time.Minute)))
}

func newLab(t *testing.T) *lab {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	l := &lab{t: t, pager: &pager{come: make(chan struct{}, 1)}, clock: &clock{t: time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)}}
	l.door, err = control.New(shelf{s}, incidents.Kinds(l.clock.now, l.observe)...)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range []string{group[:strings.Index(group, "/resourceGroups")], group} {
		if _, err := l.door.Put(t.Context(), admin(), resource.Document{ID: id(g)}, resource.When{}, false); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// engine starts one; it ends with the test, or when stop is called.
func (l *lab) engine() (e *incidents.Engine, stop func()) {
	l.t.Helper()
	ctx, cancel := context.WithCancel(l.t.Context())
	e = incidents.New(l.door, incidents.Options{
		Notifier: l.pager, Log: slog.New(slog.DiscardHandler), Now: l.clock.now, Gather: 5 * time.Millisecond, Observe: l.observe,
	})
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	wg.Go(func() { _ = e.Tell(ctx, l.door) })
	stop = func() { cancel(); wg.Wait() }
	l.t.Cleanup(stop)
	return e, stop
}

func (l *lab) block(n int, change ...func(*incident.Event)) incident.Event {
	ev := incident.Event{
		ID: fmt.Sprintf("event-%d", n), Scope: group, Host: fmt.Sprintf("host-%05d", n), Kind: "exec", Path: "/tmp/x", SHA256: strings.Repeat("ab", 32),
		Parent: "/usr/sbin/nginx", Rule: "default", Reason: "not-listed", Mode: "enforce", Count: 1, At: l.clock.now(),
	}
	for _, c := range change {
		c(&ev)
	}
	return ev
}

func (l *lab) list() []*incidents.Stored {
	l.t.Helper()
	docs, _, err := l.door.List(l.t.Context(), admin(), resource.Query{Type: incidents.TypeIncident, Limit: resource.MaxPage})
	if err != nil {
		l.t.Fatal(err)
	}
	var out []*incidents.Stored
	for _, d := range docs {
		var s incidents.Stored
		if err := json.Unmarshal(d.Properties, &s); err != nil {
			continue // see TestEngine_unreadable
		}
		out = append(out, &s)
	}
	return out
}

func (l *lab) act(name, action, body string) error {
	_, err := l.door.Invoke(l.t.Context(), admin(), id(group+"/providers/"+incidents.TypeIncident+"/"+name), action, json.RawMessage(body))
	return err
}

// wait waits until what is right is so: engines work beside the test.
func wait(t *testing.T, what string, right func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !right(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// Five thousand hosts at once are one incident and one page.
func TestEngine_storm(t *testing.T) {
	l := newLab(t)
	e, _ := l.engine()
	var wg sync.WaitGroup
	failed := make(chan error, 5000)
	for n := range 5000 {
		wg.Go(func() { failed <- e.Blocks(t.Context(), []incident.Event{l.block(n)}) })
	}
	wg.Wait()
	for range 5000 {
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
	got := l.list()
	if len(got) != 1 || got[0].HostCount() != 5000 || got[0].Alerts[0].Count != 5000 || got[0].Severity != incident.High {
		t.Fatalf("%d incidents, %d hosts", len(got), got[0].HostCount())
	}
	wait(t, "everything is told", func() bool { return len(l.list()[0].Outbox) == 0 })
	if l.pager.paged() != 1 {
		t.Errorf("%d pages, want 1", l.pager.paged())
	}
	if got := l.list()[0]; got.PagedAt.IsZero() {
		t.Error("when it was paged is not known")
	}
	// The same events once more count nothing.
	if err := e.Blocks(t.Context(), []incident.Event{l.block(7), l.block(8)}); err != nil {
		t.Fatal(err)
	}
	if got := l.list()[0].Alerts[0].Count; got != 5000 {
		t.Errorf("%d blocks after the same events, want 5000", got)
	}
}

func TestEngine_life(t *testing.T) {
	l := newLab(t)
	e, _ := l.engine()
	if err := e.Blocks(t.Context(), []incident.Event{l.block(1)}); err != nil {
		t.Fatal(err)
	}
	name := l.list()[0].ID
	wait(t, "the page", func() bool { return !l.list()[0].PagedAt.IsZero() })
	l.clock.add(incident.EscalateAfter + time.Minute)
	wait(t, "the escalation", func() bool { return l.pager.paged() == 2 })
	for _, c := range []struct {
		action, body string
		want         error
	}{
		{"close", `{}`, errs.Conflict},
		{"acknowledge", `{"minutes":30}`, nil},
		{"acknowledge", `{"minutes":3000}`, errs.Invalid},
		{"acknowledge", `{"hours":1}`, errs.Invalid},
		{"comment", `{"text":"a test of ours"}`, nil},
		{"comment", `{"text":""}`, errs.Invalid},
		{"triage", `{"cause":"alien","impact":"none"}`, errs.Invalid},
		{"triage", `{"cause":"attack","impact":"none"}`, nil},
		{"mitigate", `{"text":"host isolated"}`, nil},
		{"resolve", `{}`, nil},
		{"close", `{}`, nil},
		{"comment", `{"text":"afterwards"}`, nil},
		{"acknowledge", `{}`, errs.Conflict},
	} {
		if err := l.act(name, c.action, c.body); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s %s: error %v, want %v", c.action, c.body, err, c.want)
		}
	}
	got := l.list()[0]
	if got.State != incident.Closed || got.Owner != "admin" || got.Cause != incident.Attack || len(got.Comments) != 2 {
		t.Errorf("%+v", got)
	}
	wait(t, "the outbox is empty", func() bool { return len(l.list()[0].Outbox) == 0 })
	if want := "[page 0s acknowledge 16m0s mitigate 16m0s resolve 16m0s]"; fmt.Sprint(l.steps) != want {
		t.Errorf("observed %v, want %s", l.steps, want)
	}
	// What happens after that is another incident.
	if err := e.Blocks(t.Context(), []incident.Event{l.block(2)}); err != nil {
		t.Fatal(err)
	}
	if n := len(l.list()); n != 2 {
		t.Errorf("%d incidents, want 2", n)
	}
}

// A receiver that is down, and a server that is killed meanwhile, lose no page.
func TestEngine_pageSurvives(t *testing.T) {
	l := newLab(t)
	l.pager.fail = errors.New("unreachable")
	e, stop := l.engine()
	if err := e.Blocks(t.Context(), []incident.Event{l.block(1)}); err != nil {
		t.Fatal(err)
	}
	<-l.pager.come
	wait(t, "a failed try is stored", func() bool { o := l.list()[0].Outbox; return len(o) > 0 && o[0].Tries > 0 })
	stop()
	if err := e.Blocks(context.Background(), nil); err != nil {
		t.Error(err)
	}
	l.pager.fail = nil
	l.clock.add(2 * time.Minute)
	l.engine()
	wait(t, "the page", func() bool { return l.pager.paged() == 1 })
}

func TestEngine_silence(t *testing.T) {
	l := newLab(t)
	silence := func(name, properties string) error {
		_, err := l.door.Put(t.Context(), admin(), resource.Document{
			ID: id(group + "/providers/" + incidents.TypeSilence + "/" + name), Properties: json.RawMessage(properties),
		}, resource.When{}, false)
		return err
	}
	for _, bad := range []string{
		`{}`, `{"reason":"x","until":"2031-05-02T00:00:00Z"}`, `{"path":"/tmp/","until":"2031-05-02T00:00:00Z"}`,
		`{"path":"/tmp/","reason":"x","until":"2031-04-02T00:00:00Z"}`, `{"path":"/tmp/","reason":"x","until":"2032-04-02T00:00:00Z"}`,
	} {
		if err := silence("bad", bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: error %v, want invalid", bad, err)
		}
	}
	if err := silence("test", `{"path":"/tmp/","reason":"load test","until":"2031-05-01T13:00:00Z"}`); err != nil {
		t.Fatal(err)
	}
	e, _ := l.engine()
	other := func(ev *incident.Event) { ev.Path, ev.SHA256 = "/srv/x", strings.Repeat("cd", 32) }
	if err := e.Blocks(t.Context(), []incident.Event{l.block(1), l.block(2, other)}); err != nil {
		t.Fatal(err)
	}
	wait(t, "everything is told", func() bool {
		return !slices.ContainsFunc(l.list(), func(s *incidents.Stored) bool { return len(s.Outbox) > 0 })
	})
	if len(l.list()) != 2 || l.pager.paged() != 1 {
		t.Errorf("%d incidents, %d pages, want 2 and 1", len(l.list()), l.pager.paged())
	}
}

// Two servers on one database make one incident of one thing.
func TestEngine_two(t *testing.T) {
	l := newLab(t)
	a, _ := l.engine()
	b, _ := l.engine()
	var wg sync.WaitGroup
	for n := range 200 {
		e := a
		if n%2 == 1 {
			e = b
		}
		wg.Go(func() {
			if err := e.Blocks(t.Context(), []incident.Event{l.block(n)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := l.list(); len(got) != 1 || got[0].Alerts[0].Count != 200 {
		t.Fatalf("%d incidents, %d blocks", len(got), got[0].Alerts[0].Count)
	}
}

// Nobody edits evidence, whatever their role.
func TestKinds_evidence(t *testing.T) {
	l := newLab(t)
	e, stop := l.engine()
	if err := e.Blocks(t.Context(), []incident.Event{l.block(1)}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the page", func() bool { return len(l.list()[0].Outbox) == 0 })
	stop()
	s := l.list()[0]
	where := id(group + "/providers/" + incidents.TypeIncident + "/" + s.ID)
	put := func(change func(*incidents.Stored)) error {
		c := *s
		c.Timeline = slices.Clone(s.Timeline)
		change(&c)
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.door.Put(t.Context(), admin(), resource.Document{ID: where, Properties: b}, resource.When{}, true)
		return err
	}
	if err := put(func(*incidents.Stored) {}); err != nil {
		t.Errorf("the same: %v", err)
	}
	for name, c := range map[string]func(*incidents.Stored){
		"a line changed": func(s *incidents.Stored) { s.Timeline[0].What = "nothing happened" },
		"a line dropped": func(s *incidents.Stored) { s.Timeline = s.Timeline[1:] },
		"an alert gone":  func(s *incidents.Stored) { s.Alerts = nil },
		"another time":   func(s *incidents.Stored) { s.OpenedAt = s.OpenedAt.Add(time.Hour) },
	} {
		if err := put(c); !errors.Is(err, errs.Denied) {
			t.Errorf("%s: error %v, want denied", name, err)
		}
	}
}

// A document that another version wrote keeps nothing else from being counted.
func TestEngine_unreadable(t *testing.T) {
	l := newLab(t)
	err := l.door.Act(t.Context(), control.Engine("test", "*"), incidents.TypeIncident, "write", id(group), func(tx control.Tx, _ *audit.Record) error {
		_, err := tx.Put(t.Context(), resource.Document{
			ID: id(group + "/providers/" + incidents.TypeIncident + "/inc-new"), Type: incidents.TypeIncident, Properties: json.RawMessage(`{"id":"inc-new","state":7}`),
		}, "a newer version", resource.When{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	e, _ := l.engine()
	if err := e.Blocks(t.Context(), []incident.Event{l.block(1)}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the page", func() bool { return l.pager.paged() == 1 })
}
