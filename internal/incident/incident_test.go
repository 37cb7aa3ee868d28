package incident_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/incident"
)

func start() time.Time { return time.Date(2031, 1, 1, 3, 0, 0, 0, time.UTC) }

func after(m int) time.Time { return start().Add(time.Duration(m) * time.Minute) }

func block(host string, at int, change ...func(*incident.Event)) *incident.Event {
	e := &incident.Event{
		ID: fmt.Sprint(host, at), Scope: "/subscriptions/x", Host: host, Kind: "exec", SHA256: strings.Repeat("ab", 32), Path: "/tmp/evil",
		Parent: "/bin/sh", Reason: "unlisted", Mode: "enforce", Epoch: 7, Count: 1, At: after(at),
	}
	for _, c := range change {
		c(e)
	}
	return e
}

func pages(ns []incident.Notice) (n int) {
	for _, x := range ns {
		if x.Page {
			n++
		}
	}
	return n
}

func TestKeyOf(t *testing.T) {
	a := incident.KeyOf(block("a", 0))
	for name, e := range map[string]*incident.Event{
		"another host":      block("b", 9),
		"another name":      block("a", 0, func(e *incident.Event) { e.Path = "/var/tmp/x77" }),
		"scope's case":      block("a", 0, func(e *incident.Event) { e.Scope = "/Subscriptions/X" }),
		"another policy":    block("a", 0, func(e *incident.Event) { e.Epoch, e.Flip = 8, true }),
		"another program":   block("a", 0, func(e *incident.Event) { e.Parent = "/usr/sbin/cron" }),
		"more often":        block("a", 0, func(e *incident.Event) { e.Count = 900 }),
		"signer of content": block("a", 0, func(e *incident.Event) { e.Signer = "spiffe://x/y" }),
	} {
		if incident.KeyOf(e) != a {
			t.Errorf("%s makes another alert", name)
		}
	}
	for name, e := range map[string]*incident.Event{
		"content": block("a", 0, func(e *incident.Event) { e.SHA256 = strings.Repeat("cd", 32) }),
		"kind":    block("a", 0, func(e *incident.Event) { e.Kind = "library" }),
		"place":   block("a", 0, func(e *incident.Event) { e.Path = "/usr/bin/ls" }),
		"reason":  block("a", 0, func(e *incident.Event) { e.Reason = "denied" }),
		"scope":   block("a", 0, func(e *incident.Event) { e.Scope = "/subscriptions/y" }),
	} {
		if incident.KeyOf(e) == a {
			t.Errorf("another %s is the same alert", name)
		}
	}
}

// Five thousand hosts are one incident and one page.
func TestStorm(t *testing.T) {
	var open []*incident.Incident
	paged, updates := 0, 0
	for n := range 5000 {
		e := block(fmt.Sprintf("host-%04d", n), 0, func(e *incident.Event) { e.At = start().Add(time.Duration(n) * time.Millisecond) })
		i := incident.Find(e, open)
		var ns []incident.Notice
		if i == nil {
			i, ns = incident.New("INC-1", e)
			open = append(open, i)
		} else {
			ns = i.Add(e)
		}
		paged += pages(ns)
		updates += len(ns) - pages(ns)
	}
	i := open[0]
	if len(open) != 1 || paged != 1 || i.Severity != incident.High || i.Alerts[0].Count != 5000 || len(i.Alerts[0].Hosts) != 5000 || i.Alerts[0].More != 0 {
		t.Errorf("%d incidents, %d pages, %s, %+v", len(open), paged, i.Severity, i.Alerts[0].More)
	}
	if updates > 5000 || len(i.Timeline) > 1000 {
		t.Errorf("%d updates, %d lines of history", updates, len(i.Timeline))
	}
}

func TestFind(t *testing.T) {
	flip := func(epoch uint64) func(*incident.Event) {
		return func(e *incident.Event) { e.Flip, e.Epoch = true, epoch }
	}
	lib := func(e *incident.Event) { e.Kind = "library" }
	other := func(e *incident.Event) { e.SHA256 = strings.Repeat("cd", 32) }
	one, _ := incident.New("one", block("a", 0))
	rollout, _ := incident.New("rollout", block("a", 0, flip(7), other))
	open := []*incident.Incident{one, rollout}
	for name, tc := range map[string]struct {
		e    *incident.Event
		want *incident.Incident
	}{
		"its alert, days later":       {block("b", 5000), one},
		"the same content, soon":      {block("b", 20, lib), one},
		"the same content, too late":  {block("b", 40, lib), nil},
		"something else":              {block("b", 1, other, lib), nil},
		"a flip of that rollout":      {block("b", 1, flip(7), lib), rollout},
		"a flip of another rollout":   {block("b", 1, flip(8), lib), nil},
		"an attack during a rollout":  {block("b", 1, lib), one},
		"the same content, elsewhere": {block("b", 1, lib, func(e *incident.Event) { e.Scope = "/subscriptions/y" }), nil},
	} {
		if got := incident.Find(tc.e, open); got != tc.want {
			t.Errorf("%s: %+v", name, got)
		}
	}
	one.State = incident.Closed
	if got := incident.Find(block("a", 1), open); got != nil {
		t.Errorf("a closed incident: %+v", got)
	}
}

func TestLife(t *testing.T) {
	i, ns := incident.New("INC-1", block("a", 0))
	if pages(ns) != 1 || i.Severity != incident.Warning {
		t.Fatalf("%+v, %+v", ns, i)
	}
	if ns := i.Add(block("a", 1)); len(ns) != 0 {
		t.Errorf("a repetition tells %+v", ns)
	}
	if ns := i.Tick(after(10)); len(ns) != 0 {
		t.Errorf("too early: %+v", ns)
	}
	if ns := i.Tick(after(16)); pages(ns) != 1 || ns[0].Level != 1 {
		t.Errorf("nobody acknowledges: %+v", ns)
	}
	if err := i.Acknowledge("ana", after(20), 0); err != nil {
		t.Fatal(err)
	}
	if ns := i.Add(block("b", 21)); pages(ns) != 0 || len(ns) != 1 {
		t.Errorf("another host after the acknowledgement: %+v", ns)
	}
	if ns := i.Tick(after(79)); len(ns) != 0 {
		t.Errorf("while acknowledged: %+v", ns)
	}
	if ns := i.Tick(after(80)); pages(ns) != 1 || i.State != incident.Open {
		t.Errorf("the acknowledgement ends: %+v, %s", ns, i.State)
	}
	if err := i.Acknowledge("bob", after(81), time.Hour); err != nil || i.Owner != "bob" || !i.AcknowledgedAt.Equal(after(20)) {
		t.Errorf("%v, owner %s, first acknowledged %v", err, i.Owner, i.AcknowledgedAt)
	}
	var worse []incident.Notice
	for n := range 30 {
		worse = append(worse, i.Add(block(fmt.Sprint("c", n), 82))...)
	}
	if pages(worse) != 1 || i.Severity != incident.High {
		t.Errorf("it gets worse: %d pages, %s", pages(worse), i.Severity)
	}
	if err := i.Close("bob", after(83)); !errors.Is(err, errs.Conflict) {
		t.Errorf("closed before it is over: %v", err)
	}
	if err := errors.Join(i.Mitigate("bob", "digest denied", after(90))); err != nil {
		t.Fatal(err)
	}
	if ns := i.Add(block("a", 91)); len(ns) != 0 {
		t.Errorf("a late event: %+v", ns)
	}
	if ns := i.Add(block("new", 95)); pages(ns) != 1 || i.State != incident.Open {
		t.Errorf("it goes on: %+v, %s", ns, i.State)
	}
	if err := errors.Join(i.Mitigate("bob", "hosts isolated", after(96)), i.Resolve("bob", after(97))); err != nil {
		t.Fatal(err)
	}
	if err := i.Close("bob", after(98)); !errors.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "triage") {
		t.Errorf("closed without triage: %v", err)
	}
	if c, why := i.Suggest(); c != incident.Attack || why == "" {
		t.Errorf("suggests %s", c)
	}
	if err := i.Triage("bob", "nothing", incident.NoImpact, after(98)); !errors.Is(err, errs.Invalid) {
		t.Error(err)
	}
	if err := errors.Join(i.Triage("bob", incident.Attack, incident.Confirmed, after(98)), i.Close("bob", after(99))); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"acknowledge": i.Acknowledge("x", after(100), 0), "mitigate": i.Mitigate("x", "", after(100)), "resolve": i.Resolve("x", after(100)),
		"triage": i.Triage("x", incident.Test, incident.NoImpact, after(100)), "close": i.Close("x", after(100)),
	} {
		if !errors.Is(err, errs.Conflict) {
			t.Errorf("%s a closed incident: %v", name, err)
		}
	}
}

func TestSeverity(t *testing.T) {
	audit := func(e *incident.Event) { e.Mode = "audit" }
	i, ns := incident.New("1", block("a", 0, audit))
	if pages(ns) != 0 || i.Severity != incident.Info || !strings.Contains(i.Title, "would be blocked") {
		t.Errorf("audit mode: %+v, %s, %s", ns, i.Severity, i.Title)
	}
	if ns := i.Tick(after(1000)); len(ns) != 0 {
		t.Errorf("audit mode escalates: %+v", ns)
	}
	flip := func(e *incident.Event) { e.Flip = true }
	i, _ = incident.New("2", block("a", 0, flip))
	if i.Severity != incident.High || i.Epoch != 7 {
		t.Errorf("a flip: %s", i.Severity)
	}
	if i.Add(block("b", 0, flip)); i.Severity != incident.Critical {
		t.Errorf("flips on two hosts: %s", i.Severity)
	}
	if c, _ := i.Suggest(); c != incident.FalsePositive {
		t.Errorf("a flip is probably %s", c)
	}
}

func TestPathClass(t *testing.T) {
	for path, want := range map[string]string{
		"/tmp/x": "temporary", "/dev/shm/x": "temporary", "/home/ana/x": "home", "/usr/local/bin/x": "local", "/usr/bin/x": "system", "/lib64/x": "system",
		"/var/lib/x": "state", "memfd:x": "memory", "": "memory", "/data/x": "other",
	} {
		if got := incident.PathClass(path); got != want {
			t.Errorf("%q is %s, want %s", path, got, want)
		}
	}
}

// What nobody signed has nothing in common but that.
func TestFind_unsigned(t *testing.T) {
	one, _ := incident.New("one", block("a", 0, func(e *incident.Event) { e.Signer = incident.Unsigned }))
	other := block("a", 0, func(e *incident.Event) { e.Signer, e.SHA256 = incident.Unsigned, strings.Repeat("cd", 32) })
	if incident.Find(other, []*incident.Incident{one}) != nil {
		t.Error("two unsigned programs are one incident")
	}
	if cause, _ := one.Suggest(); cause != incident.Attack {
		t.Errorf("unsigned code in /tmp is %s", cause)
	}
}

func TestNotice(t *testing.T) {
	notice := func(code string) *incident.Event {
		return block("a", 0, func(e *incident.Event) {
			e.Kind, e.Reason, e.Rule, e.Path, e.SHA256, e.Mode, e.Name = incident.KindNotice, code, "what the host says", "", "", "audit", "web-1"
		})
	}
	if notice("policy").Matters() || notice("fleet-link").Matters() || !notice("canary").Matters() || !block("a", 0).Matters() {
		t.Error("what matters is wrong")
	}
	i, told := incident.New("one", notice("canary"))
	if i.Title != "canary: what the host says" || i.Severity != incident.Warning || pages(told) != 1 || i.Alerts[0].Hosts[0] != "web-1" {
		t.Errorf("%q, %s, %d pages", i.Title, i.Severity, pages(told))
	}
	if incident.Find(notice("permit"), []*incident.Incident{i}) != nil {
		t.Error("two notices are one incident")
	}
}
