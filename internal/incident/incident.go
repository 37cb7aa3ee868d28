package incident

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/errs"
)

// State is where an incident stands.
type State string

// The states, in order.
const (
	Open         State = "open"
	Acknowledged State = "acknowledged" // somebody works on it, for a while
	Mitigated    State = "mitigated"    // it does no more harm
	Resolved     State = "resolved"     // the cause is gone
	Closed       State = "closed"       // and it is known what it was
)

func (s State) rank() int {
	return slices.Index([]State{Open, Acknowledged, Mitigated, Resolved, Closed}, s)
}

// Severity is how bad it looks, by itself.
type Severity string

// The severities, the mildest first.
const (
	Info     Severity = "info"    // audit mode: nothing was blocked
	Warning  Severity = "warning" // blocked, on few hosts
	High     Severity = "high"    // blocked on many hosts
	Critical Severity = "critical"
)

func (s Severity) rank() int {
	return slices.Index([]Severity{Info, Warning, High, Critical}, s)
}

// Cause is why it happened; triage decides.
type Cause string

// The causes.
const (
	Attack             Cause = "attack"
	FalsePositive      Cause = "false-positive"
	UnauthorisedChange Cause = "unauthorised-change"
	Test               Cause = "test"
	Benign             Cause = "benign"
)

// Impact is what customers felt; triage decides. It is apart from the cause: a
// false positive can hurt a customer, and an attack need not.
type Impact string

// The impacts.
const (
	NoImpact  Impact = "none"
	Suspected Impact = "suspected"
	Confirmed Impact = "confirmed"
)

// How long things last by default.
const (
	GroupWithin     = 30 * time.Minute // alerts of one content within this are one incident
	AckLasts        = time.Hour        // after it the incident is open again
	EscalateAfter   = 15 * time.Minute // without an acknowledgement
	manyHosts       = 20               // makes an incident high
	maxTimeline     = 1000
	maxIncidentKeys = 200
)

// Incident is what a person works on.
type Incident struct {
	ID       string   `json:"id"`
	Title    string   `json:"title"`
	State    State    `json:"state"`
	Severity Severity `json:"severity"`
	Alerts   []Alert  `json:"alerts"`
	Epoch    uint64   `json:"epoch,omitempty"` // of the rollout that caused it: of flips
	Owner    string   `json:"owner,omitempty"`
	Cause    Cause    `json:"cause,omitempty"`
	Impact   Impact   `json:"impact,omitempty"`

	OpenedAt       time.Time `json:"opened_at"`
	PagedAt        time.Time `json:"paged_at,omitzero"`        // the first page was accepted
	LastPage       time.Time `json:"last_page,omitzero"`       // was asked for
	AcknowledgedAt time.Time `json:"acknowledged_at,omitzero"` // first
	AckUntil       time.Time `json:"acknowledged_till,omitzero"`
	MitigatedAt    time.Time `json:"mitigated_at,omitzero"`
	ResolvedAt     time.Time `json:"resolved_at,omitzero"`
	ClosedAt       time.Time `json:"closed_at,omitzero"`
	EscalatedAt    time.Time `json:"escalated_at,omitzero"` // last
	Level          int       `json:"level"`                 // of escalation, from 0

	Timeline []Entry `json:"timeline"` // at most maxTimeline; the oldest stay
	Dropped  int     `json:"dropped,omitempty"`
}

// Entry is one line of an incident's history; it is never changed.
type Entry struct {
	At   time.Time `json:"at"`
	By   string    `json:"by"` // a person, or "ringwall"
	What string    `json:"what"`
}

// Notice is something to tell people.
type Notice struct {
	Incident string `json:"incident"`
	Page     bool   `json:"page"` // wake somebody; else an update of what they have
	Level    int    `json:"level"`
	Text     string `json:"text"`
	// State is what it is now, of a notice that somebody changed it.
	State State `json:"state,omitempty"`
}

func (i *Incident) note(at time.Time, by, format string, a ...any) {
	if len(i.Timeline) == maxTimeline {
		i.Dropped++
		return
	}
	i.Timeline = append(i.Timeline, Entry{at, by, fmt.Sprintf(format, a...)})
}

const self = "ringwall"

// Find is the incident that an event belongs to, among those that are not
// closed: one that has its alert; for a flip the one of that epoch; else one
// about the same content within GroupWithin. nil: none, see New.
func Find(e *Event, open []*Incident) *Incident {
	key := KeyOf(e)
	var best *Incident
	for _, i := range open {
		if i.State == Closed {
			continue
		}
		for k := range i.Alerts {
			if i.Alerts[k].Key == key {
				return i
			}
		}
		if len(i.Alerts) == maxIncidentKeys || e.Flip != (i.Epoch != 0) {
			continue
		}
		if e.Flip && i.Epoch == e.Epoch || !e.Flip && i.about(e) {
			best = i
		}
	}
	return best
}

// about reports whether a recent alert of the incident has the event's content
// or signer.
func (i *Incident) about(e *Event) bool {
	return slices.ContainsFunc(i.Alerts, func(a Alert) bool {
		same := e.SHA256 != "" && a.Sample.SHA256 == e.SHA256 || e.signed() && a.Sample.Signer == e.Signer
		return same && a.Sample.Scope == e.Scope && e.At.Sub(a.Last) <= GroupWithin
	})
}

// New opens an incident for an event.
func New(id string, e *Event) (*Incident, []Notice) {
	i := &Incident{ID: id, State: Open, OpenedAt: e.At, Title: title(e)}
	if e.Flip {
		i.Epoch = e.Epoch
	}
	i.note(e.At, self, "opened: %s", i.Title)
	return i, i.Add(e)
}

func title(e *Event) string {
	if e.Flip {
		return fmt.Sprintf("policy epoch %d denies what the one before allowed", e.Epoch)
	}
	if e.Kind == KindNotice {
		return fmt.Sprintf("%s: %s", e.Reason, e.Rule)
	}
	verb := "blocked"
	if e.Mode != "enforce" {
		verb = "would be blocked"
	}
	return fmt.Sprintf("%s %s: %s (%s)", e.Kind, verb, e.Path, e.Reason)
}

// Add counts an event, and says whom to tell. An incident that is open pages
// once; one that somebody has acknowledged pages again only when it gets worse;
// one that was mitigated or resolved opens again, since it was not.
func (i *Incident) Add(e *Event) []Notice {
	at := slices.IndexFunc(i.Alerts, func(a Alert) bool { return a.Key == KeyOf(e) })
	newAlert := at < 0
	if newAlert {
		i.Alerts = append(i.Alerts, Alert{})
		at = len(i.Alerts) - 1
	}
	newHost := i.Alerts[at].add(e, i.named() < MaxHosts)
	before := i.Severity
	i.Severity = i.severity()
	switch {
	case newAlert && e.Kind == KindNotice:
		i.note(e.At, self, "%s says: %s", e.name(), e.Rule)
	case newAlert:
		i.note(e.At, self, "%s of %s on %s, by %s", e.Kind, e.Path, e.name(), cmp.Or(e.Parent, "an unknown program"))
	case newHost:
		i.note(e.At, self, "also on %s", e.name())
	}
	worse := before != "" && i.Severity.rank() > before.rank()
	switch i.State {
	case Open:
		if before == "" {
			return []Notice{i.page(e.At, i.Title)}
		}
		if worse && e.At.Sub(i.LastPage) < EscalateAfter {
			return []Notice{{Incident: i.ID, Text: "now " + string(i.Severity)}} // who was paged will see it
		}
		if worse {
			return []Notice{i.page(e.At, "now "+string(i.Severity))}
		}
	case Acknowledged:
		if worse {
			return []Notice{i.page(e.At, "now "+string(i.Severity)+", since it was acknowledged")}
		}
	case Mitigated, Resolved:
		if !newHost && !newAlert && e.At.Before(i.quietFrom()) {
			return nil // an event that was under way
		}
		i.State, i.MitigatedAt, i.ResolvedAt = Open, time.Time{}, time.Time{}
		i.note(e.At, self, "open again: it goes on")
		return []Notice{i.page(e.At, "goes on after it was thought to be over")}
	}
	if newHost || newAlert {
		return []Notice{{Incident: i.ID, Text: fmt.Sprintf("%d alerts on %d hosts", len(i.Alerts), i.HostCount())}}
	}
	return nil
}

// quietFrom is how long late events of before a mitigation are expected.
func (i *Incident) quietFrom() time.Time {
	return i.MitigatedAt.Add(2 * time.Minute)
}

func (i *Incident) page(at time.Time, text string) Notice {
	if i.Severity == Info {
		return Notice{Incident: i.ID, Text: text}
	}
	i.LastPage = at
	i.note(at, self, "page, level %d: %s", i.Level, text)
	return Notice{Incident: i.ID, Page: true, Level: i.Level, Text: text}
}

// named is how many names of hosts there are.
func (i *Incident) named() int {
	n := 0
	for k := range i.Alerts {
		n += len(i.Alerts[k].Hosts)
	}
	return n
}

// HostCount is the number of different hosts that are named.
func (i *Incident) HostCount() int {
	if len(i.Alerts) == 1 {
		return len(i.Alerts[0].Hosts)
	}
	all := map[string]bool{}
	for k := range i.Alerts {
		for _, h := range i.Alerts[k].Hosts {
			all[h] = true
		}
	}
	return len(all)
}

func (i *Incident) severity() Severity {
	enforced, flip := false, false
	for k := range i.Alerts {
		s := &i.Alerts[k].Sample
		enforced = enforced || s.Mode == "enforce" || s.Kind == KindNotice
		flip = flip || i.Alerts[k].Flip
	}
	hosts := i.HostCount()
	s := Info
	switch {
	case flip && hosts > 1:
		s = Critical
	case enforced && hosts >= manyHosts || flip:
		s = High
	case enforced:
		s = Warning
	}
	if s.rank() < i.Severity.rank() {
		return i.Severity // it does not get better by itself
	}
	return s
}

// Tick is called from time to time: acknowledgements end, and what nobody
// acknowledges goes up one level.
func (i *Incident) Tick(now time.Time) []Notice {
	if i.State == Acknowledged && !now.Before(i.AckUntil) {
		i.State, i.EscalatedAt = Open, now
		i.note(now, self, "the acknowledgement of %s is over", i.Owner)
		return []Notice{i.page(now, "the acknowledgement is over, and it is not mitigated")}
	}
	if i.State != Open || i.Severity == Info {
		return nil
	}
	since := i.OpenedAt
	if i.EscalatedAt.After(since) {
		since = i.EscalatedAt
	}
	if now.Sub(since) < EscalateAfter {
		return nil
	}
	i.Level++
	i.EscalatedAt = now
	return []Notice{i.page(now, "nobody has acknowledged it")}
}

// Acknowledge makes somebody the owner for a while (AckLasts if it is 0).
// Another owner may take over; the clock of the first acknowledgement stays.
func (i *Incident) Acknowledge(by string, now time.Time, lasts time.Duration) error {
	if i.State != Open && i.State != Acknowledged {
		return i.not("acknowledged")
	}
	if lasts == 0 {
		lasts = AckLasts
	}
	if lasts < 0 || lasts > 24*time.Hour {
		return fmt.Errorf("acknowledge %s for %v (at most a day): %w", i.ID, lasts, errs.Invalid)
	}
	i.State, i.Owner, i.AckUntil = Acknowledged, by, now.Add(lasts)
	if i.AcknowledgedAt.IsZero() {
		i.AcknowledgedAt = now
	}
	i.note(now, by, "acknowledged, until %s", i.AckUntil.UTC().Format(time.RFC3339))
	return nil
}

func (i *Incident) not(what string) error {
	return fmt.Errorf("incident %s is %s and cannot be %s: %w", i.ID, i.State, what, errs.Conflict)
}

// Mitigate says that it does no more harm, by what was done.
func (i *Incident) Mitigate(by, done string, now time.Time) error {
	if i.State.rank() >= Mitigated.rank() {
		return i.not("mitigated")
	}
	i.State, i.MitigatedAt = Mitigated, now
	i.Owner = cmp.Or(i.Owner, by)
	i.note(now, by, "mitigated: %s", done)
	return nil
}

// Resolve says that the cause is gone.
func (i *Incident) Resolve(by string, now time.Time) error {
	if i.State.rank() >= Resolved.rank() {
		return i.not("resolved")
	}
	if i.MitigatedAt.IsZero() {
		i.MitigatedAt = now
	}
	i.State, i.ResolvedAt = Resolved, now
	i.note(now, by, "resolved")
	return nil
}

// Triage says what it was. It can be said again until the incident is closed.
func (i *Incident) Triage(by string, c Cause, m Impact, now time.Time) error {
	if i.State == Closed {
		return i.not("triaged")
	}
	if !slices.Contains([]Cause{Attack, FalsePositive, UnauthorisedChange, Test, Benign}, c) || !slices.Contains([]Impact{NoImpact, Suspected, Confirmed}, m) {
		return fmt.Errorf("triage %s as %.40q with impact %.40q: %w", i.ID, c, m, errs.Invalid)
	}
	i.Cause, i.Impact = c, m
	i.note(now, by, "triage: %s, customer impact %s", c, m)
	return nil
}

// Suggest is what triage would probably say; a person decides.
func (i *Incident) Suggest() (Cause, string) {
	for k := range i.Alerts {
		switch a := &i.Alerts[k]; {
		case a.Sample.Kind == KindNotice:
			return Benign, "nothing was blocked: the host says that something is not as it should be"
		case a.Flip:
			return FalsePositive, "the policy before allowed it: the change of policy is the cause"
		case !a.Sample.signed() && slices.Contains([]string{"temporary", "home", "memory"}, PathClass(a.Sample.Path)):
			return Attack, "unsigned code in a place that users can write to"
		}
	}
	return UnauthorisedChange, "code that no release or package lists"
}

// Close ends it. What it was has to be known.
func (i *Incident) Close(by string, now time.Time) error {
	switch {
	case i.State != Resolved:
		return fmt.Errorf("incident %s is %s; resolve it first: %w", i.ID, i.State, errs.Conflict)
	case i.Cause == "" || i.Impact == "":
		return fmt.Errorf("incident %s has no triage: say what it was first: %w", i.ID, errs.Conflict)
	}
	i.State, i.ClosedAt = Closed, now
	i.note(now, by, "closed")
	return nil
}
