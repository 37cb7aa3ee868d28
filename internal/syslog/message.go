// Package syslog tells other people's log collectors what happened: messages of
// RFC 5424 over UDP, TCP, TLS and local sockets, with a record as its JSON or as
// an event of OCSF.
//
// A collector gets each message at least once: Sender returns when the
// receiver's kernel has acknowledged it, and after a broken connection sends the
// last ones again. Only UDP has no way to know. Whoever must lose nothing keeps
// its own position and moves it when Send has returned.
package syslog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
)

// Severity is as RFC 5424, section 6.2.1 numbers it.
type Severity int

// The severities that are in use here.
const (
	Alert   Severity = 1
	Error   Severity = 3
	Warning Severity = 4
	Notice  Severity = 5
	Info    Severity = 6
)

const (
	facility = 13 // "log audit"
	// maxMessage is how long a message may be before a record's detail is left
	// out: what rsyslog takes unless it is told otherwise.
	maxMessage = 8 << 10
)

// Message is one message. What it is about stands in Text, mostly JSON; there
// is no structured data. ID is short and without spaces, such as "audit".
type Message struct {
	Severity Severity
	Time     time.Time
	ID       string
	Text     []byte
}

// Encode is the message as RFC 5424 has it. Text is UTF-8 without a byte order
// mark, which readers of JSON stumble over; line ends in it become spaces.
func (m *Message) Encode() []byte {
	host, err := os.Hostname()
	if err != nil {
		host = "-"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "<%d>1 %s %s ringwall %d %s - ", facility*8+int(m.Severity), m.Time.UTC().Format("2006-01-02T15:04:05.000000Z"),
		field(host, 255), os.Getpid(), field(m.ID, 32))
	b.Write(bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\r' || r == 0 {
			return ' '
		}
		return r
	}, m.Text))
	return b.Bytes()
}

// field is what a header may hold: printable ASCII without spaces.
func field(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), limit)]
}

// Record is an audit record as a message: as JSON, or as an event of OCSF. A
// detail that would make it longer than collectors take is left out; the
// record's hash stands for it.
func Record(r *audit.Record, ocsf bool) (Message, error) {
	m, err := record(r, ocsf)
	if err == nil && len(m.Text) > maxMessage && r.Detail != "" {
		short := *r
		short.Detail = `"left out: longer than a message may be"`
		m, err = record(&short, ocsf)
	}
	if err != nil {
		return m, fmt.Errorf("message of audit record %d: %w", r.Seq, err)
	}
	return m, nil
}

func record(r *audit.Record, ocsf bool) (Message, error) {
	if ocsf {
		e := AuditEvent(r)
		return e.Message()
	}
	text, err := json.Marshal(r)
	return Message{Severity: severity(r.Outcome), Time: r.At, ID: "audit", Text: text}, err
}

func severity(o audit.Outcome) Severity {
	switch o {
	case audit.Refused:
		return Warning
	case audit.Failed:
		return Notice
	case audit.Done:
	}
	return Info
}

// Checkpoint is the message that binds the audit log up to a record: kept by the
// collector, it shows later that the log was cut off or written anew.
func Checkpoint(last audit.Checkpoint, note []byte, at time.Time) Message {
	text, _ := json.Marshal(struct { // never fails: strings
		Last string `json:"last"`
		Note string `json:"checkpoint"`
	}{last.String(), string(note)})
	return Message{Severity: Info, Time: at, ID: "checkpoint", Text: text}
}

// OCSF class numbers (schema.ocsf.io).
const (
	DetectionFinding = 2004
	IncidentFinding  = 2005
	APIActivity      = 6003
)

// Event is an event of the Open Cybersecurity Schema Framework. Other classes
// than the audit log's are made by whoever knows what they are about.
type Event struct {
	Class    int // such as DetectionFinding
	Activity int // of the class: 1 is mostly create, 2 update, 3 close; 99 is other
	// Severity is OCSF's: 1 informational, 2 low, 3 medium, 4 high, 5 critical.
	Severity int
	Time     time.Time
	UID      string // of this event
	Text     string // for people
	// Fields are the attributes of the class, by their names in the schema. They
	// cannot replace those above.
	Fields map[string]any
}

const ocsfVersion = "1.3.0"

// JSON is the event in OCSF's form.
func (e *Event) JSON() ([]byte, error) {
	if e.Class < 1000 || e.Class > 99999 || e.Activity < 0 || e.Activity > 99 || e.Severity < 0 || e.Severity > 6 {
		return nil, fmt.Errorf("OCSF event of class %d, activity %d, severity %d: %w", e.Class, e.Activity, e.Severity, errs.Invalid)
	}
	out := map[string]any{}
	maps.Copy(out, e.Fields)
	maps.Copy(out, map[string]any{
		"class_uid": e.Class, "category_uid": e.Class / 1000, "activity_id": e.Activity, "type_uid": e.Class*100 + e.Activity,
		"severity_id": e.Severity, "time": e.Time.UnixMilli(), "message": e.Text,
		"metadata": map[string]any{
			"version": ocsfVersion, "uid": e.UID,
			"product": map[string]any{"name": "Ringwall", "vendor_name": "Ringwall"},
		},
	})
	return json.Marshal(out)
}

// Message is the event as a message.
func (e *Event) Message() (Message, error) {
	text, err := e.JSON()
	level := map[int]Severity{2: Notice, 3: Warning, 4: Error, 5: Alert, 6: Alert}[e.Severity]
	if level == 0 {
		level = Info
	}
	return Message{Severity: level, Time: e.Time, ID: "ocsf", Text: text}, err
}

// AuditEvent is an audit record as API Activity (6003). Where a request came
// from is not in the record, so that the source is the server's own name of it.
func AuditEvent(r *audit.Record) Event {
	activity, status, level := 99, 1, 1
	switch {
	case strings.HasSuffix(r.Action, "/read"):
		activity = 2
	case strings.HasSuffix(r.Action, "/write"):
		activity = 3
	case strings.HasSuffix(r.Action, "/delete"):
		activity = 4
	}
	if r.Outcome != audit.Done {
		status, level = 2, 2
	}
	if r.Outcome == audit.Refused {
		level = 3
	}
	service, _, _ := strings.Cut(r.Action, "/")
	return Event{
		Class: APIActivity, Activity: activity, Severity: level, Time: r.At, UID: strconv.FormatUint(r.Seq, 10),
		Text: fmt.Sprintf("%s: %s on %s: %s", r.Actor, r.Action, r.Target, r.Outcome),
		Fields: map[string]any{
			"actor":         map[string]any{"user": map[string]any{"name": r.Actor}},
			"api":           map[string]any{"operation": r.Action, "service": map[string]any{"name": service}},
			"src_endpoint":  map[string]any{"name": r.Actor},
			"resources":     []any{map[string]any{"uid": r.Target}},
			"status_id":     status,
			"status":        string(r.Outcome),
			"status_detail": r.Reason,
			"unmapped":      map[string]any{"seq": r.Seq, "prev": r.Prev, "hash": r.Hash, "detail": r.Detail},
		},
	}
}
