package incidents

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
)

// Types of documents.
const (
	TypeIncident = "Ringwall.Incidents/incidents"
	TypeSilence  = "Ringwall.Incidents/silences"
)

// Stored is what the document of an incident holds.
type Stored struct {
	incident.Incident
	Comments []Comment `json:"comments,omitempty"`
	// Outbox is what people have not been told yet.
	Outbox []Outgoing `json:"outbox,omitempty"`
}

// Comment is what somebody has to say.
type Comment struct {
	At   time.Time `json:"at"`
	By   string    `json:"by"`
	Text string    `json:"text"`
}

// Outgoing is a notice on its way.
type Outgoing struct {
	incident.Notice
	At    time.Time `json:"at"`              // since when it waits
	Tries int       `json:"tries,omitempty"` // that failed
	Next  time.Time `json:"next,omitzero"`   // no try before
}

const (
	maxComments = 1000
	maxComment  = 4000 // bytes
	maxOutbox   = 50   // of one incident; the oldest updates go, pages stay
)

// Silence keeps what is known from paging for a while. It is still counted.
type Silence struct {
	SHA256 string    `json:"sha256,omitempty"`
	Signer string    `json:"signer,omitempty"`
	Path   string    `json:"path,omitempty"` // all below it, if it ends with a slash
	Reason string    `json:"reason"`
	Until  time.Time `json:"until"`
}

// MaxSilence is how long a silence may last.
const MaxSilence = 14 * 24 * time.Hour

// matches reports whether an event is silenced. Every field that is there must fit.
func (s *Silence) matches(e *incident.Event) bool {
	switch {
	case s.SHA256 != "" && !strings.EqualFold(s.SHA256, e.SHA256):
		return false
	case s.Signer != "" && s.Signer != e.Signer:
		return false
	case strings.HasSuffix(s.Path, "/") && !strings.HasPrefix(e.Path, s.Path):
		return false
	case s.Path != "" && !strings.HasSuffix(s.Path, "/") && s.Path != e.Path:
		return false
	}
	return true
}

// Observe is told how long a step of an incident took since it was opened: page,
// acknowledge, mitigate or resolve.
type Observe func(step string, took time.Duration)

// Kinds are the types that the door must know. now is the clock that people's
// actions are stamped with; observe may be nil.
func Kinds(now func() time.Time, observe Observe) []control.Kind {
	all := actions(now)
	if observe != nil {
		for step, at := range map[string]func(*Stored) time.Time{
			"acknowledge": func(s *Stored) time.Time { return s.AcknowledgedAt },
			"mitigate":    func(s *Stored) time.Time { return s.MitigatedAt },
			"resolve":     func(s *Stored) time.Time { return s.ResolvedAt },
		} {
			a := all[step]
			a.Done = func(_ context.Context, d *resource.Document) {
				if s, err := read(d); err == nil { // it was just written
					observe(step, at(s).Sub(s.OpenedAt))
				}
			}
			all[step] = a
		}
	}
	return []control.Kind{
		{Type: TypeIncident, Check: checkIncident, Actions: all},
		{Type: TypeSilence, Check: checkSilence(now)},
	}
}

// checkIncident lets nobody take back what an incident has on record: not even
// an owner of everything edits evidence.
func checkIncident(_ context.Context, _ control.Tx, old, d *resource.Document) error {
	now, err := read(d)
	if err != nil {
		return err
	}
	if now.ID != d.ID.Name() {
		return fmt.Errorf("an incident's id is its name, not %.80q: %w", now.ID, errs.Invalid)
	}
	if old == nil {
		return nil
	}
	before, err := read(old)
	if err != nil {
		return err
	}
	if len(now.Timeline) < len(before.Timeline) || !slices.Equal(now.Timeline[:len(before.Timeline)], before.Timeline) ||
		len(now.Alerts) < len(before.Alerts) || len(now.Comments) < len(before.Comments) || !now.OpenedAt.Equal(before.OpenedAt) {
		return fmt.Errorf("what is on record of an incident can only grow: %w", errs.Denied)
	}
	return nil
}

func checkSilence(now func() time.Time) func(context.Context, control.Tx, *resource.Document, *resource.Document) error {
	return func(_ context.Context, _ control.Tx, _, d *resource.Document) error {
		s, err := readSilence(d)
		switch {
		case err != nil:
			return err
		case s.SHA256 == "" && s.Signer == "" && s.Path == "":
			return fmt.Errorf("a silence says sha256, signer or path: %w", errs.Invalid)
		case s.Reason == "" || len(s.Reason) > maxComment:
			return fmt.Errorf("a silence has a reason, of at most %d bytes: %w", maxComment, errs.Invalid)
		case !s.Until.After(now()) || s.Until.Sub(now()) > MaxSilence:
			return fmt.Errorf("a silence ends, within %v: %w", MaxSilence, errs.Invalid)
		}
		return nil
	}
}

func readSilence(d *resource.Document) (*Silence, error) {
	var s Silence
	return &s, strict(d, &s)
}

func read(d *resource.Document) (*Stored, error) {
	var s Stored
	return &s, strict(d, &s)
}

func strict(d *resource.Document, v any) error {
	dec := json.NewDecoder(bytes.NewReader(d.Properties))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%s: properties: %w: %w", d.ID, err, errs.Invalid)
	}
	return nil
}

func write(d *resource.Document, s *Stored) error {
	b, err := json.Marshal(s)
	d.Properties = b
	return err
}

// add puts notices into the outbox. An update replaces one that is not told yet;
// pages and changes of state all stay.
func (s *Stored) add(notices []incident.Notice, at time.Time) {
	for _, n := range notices {
		if !n.Page && n.State == "" {
			s.Outbox = slices.DeleteFunc(s.Outbox, func(o Outgoing) bool { return !o.Page && o.State == "" && o.Tries == 0 })
		}
		if len(s.Outbox) == maxOutbox {
			s.Outbox = s.Outbox[1:]
		}
		s.Outbox = append(s.Outbox, Outgoing{Notice: n, At: at})
	}
}

// actions are what people do to an incident.
func actions(now func() time.Time) map[string]control.Action {
	act := func(do func(s *Stored, by string, body json.RawMessage) error) control.Action {
		return control.Action{Do: func(_ context.Context, _ control.Tx, by control.Actor, d *resource.Document, body json.RawMessage) (any, error) {
			s, err := read(d)
			if err != nil {
				return nil, err
			}
			if err := do(s, by.Name, body); err != nil {
				return nil, err
			}
			return s, write(d, s)
		}}
	}
	// told tells whoever was told of the incident what became of it.
	told := func(s *Stored, format string, a ...any) {
		s.add([]incident.Notice{{Incident: s.ID, Text: fmt.Sprintf(format, a...), State: s.State}}, now())
	}
	return map[string]control.Action{
		"acknowledge": act(func(s *Stored, by string, body json.RawMessage) error {
			var q struct {
				Minutes int `json:"minutes"`
			}
			if err := request(body, &q); err != nil {
				return err
			}
			if q.Minutes < 0 || q.Minutes > 24*60 {
				return fmt.Errorf("acknowledge for %d minutes (at most a day): %w", q.Minutes, errs.Invalid)
			}
			if err := s.Acknowledge(by, now(), time.Duration(q.Minutes)*time.Minute); err != nil {
				return err
			}
			told(s, "acknowledged by %s", by)
			return nil
		}),
		"mitigate": act(func(s *Stored, by string, body json.RawMessage) error {
			text, err := requestText(body)
			if err != nil {
				return err
			}
			if err := s.Mitigate(by, text, now()); err != nil {
				return err
			}
			told(s, "mitigated by %s: %s", by, text)
			return nil
		}),
		"resolve": act(func(s *Stored, by string, body json.RawMessage) error {
			if err := request(body, &struct{}{}); err != nil {
				return err
			}
			if err := s.Resolve(by, now()); err != nil {
				return err
			}
			told(s, "resolved by %s", by)
			return nil
		}),
		"triage": act(func(s *Stored, by string, body json.RawMessage) error {
			var q struct {
				Cause  incident.Cause  `json:"cause"`
				Impact incident.Impact `json:"impact"`
			}
			if err := request(body, &q); err != nil {
				return err
			}
			return s.Triage(by, q.Cause, q.Impact, now())
		}),
		"close": act(func(s *Stored, by string, body json.RawMessage) error {
			if err := request(body, &struct{}{}); err != nil {
				return err
			}
			return s.Close(by, now())
		}),
		"comment": act(func(s *Stored, by string, body json.RawMessage) error {
			text, err := requestText(body)
			if err != nil {
				return err
			}
			if len(s.Comments) == maxComments {
				return fmt.Errorf("the incident has %d comments already: %w", maxComments, errs.Conflict)
			}
			s.Comments = append(s.Comments, Comment{now().UTC(), by, text})
			return nil
		}),
	}
}

func request(body json.RawMessage, v any) error {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("the request: %w: %w", err, errs.Invalid)
	}
	return nil
}

func requestText(body json.RawMessage) (string, error) {
	var q struct {
		Text string `json:"text"`
	}
	if err := request(body, &q); err != nil {
		return "", err
	}
	if q.Text == "" || len(q.Text) > maxComment {
		return "", fmt.Errorf("say something, of at most %d bytes, as text: %w", maxComment, errs.Invalid)
	}
	return q.Text, nil
}
