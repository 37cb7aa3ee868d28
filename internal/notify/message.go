package notify

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Message is something that its owners should do something about.
type Message struct {
	Type    string // of event, for programs: "ringwall.csv.blocked"
	Source  string // URI reference of what sends it
	Subject string // what it is about; the same name means the same thing
	// Fingerprint is equal for the same problem. A changed one is news.
	Fingerprint string
	Title       string   // one line
	Text        string   // for people; holds the fix
	Owners      []string // addresses, or names as in @team
	Data        any      // for programs; JSON
	At          time.Time
	// Alert is for receivers that follow something from its beginning to its end;
	// nil: the message is news, once.
	Alert *Alert
}

// Alert is where something stands that goes on for a while.
type Alert struct {
	Key      string            `json:"key"` // names it for as long as it lasts
	State    AlertState        `json:"state"`
	Severity string            `json:"severity"` // critical, high, warning or info
	Since    time.Time         `json:"since"`
	Labels   map[string]string `json:"labels,omitempty"` // few, and the same in every message about it
	// Page is to wake somebody; Level grows when nobody answers. A message that is
	// neither a page nor a change of state goes only to those who want updates.
	Page    bool `json:"page"`
	Level   int  `json:"level"`
	Changed bool `json:"changed"`
}

// AlertState is the state of an Alert.
type AlertState string

// The states.
const (
	Firing       AlertState = "firing"
	Acknowledged AlertState = "acknowledged"
	Over         AlertState = "over"
)

// Target is somewhere to send messages to.
type Target interface {
	// Send delivers one message. It returns when it is delivered or is not going
	// to be; its errors hold no secrets.
	Send(ctx context.Context, m *Message) error
	// Name tells targets apart in state and errors; it holds no secrets.
	Name() string
}

// cloudEvent is CloudEvents 1.0 in its JSON format (structured mode).
type cloudEvent struct {
	SpecVersion string    `json:"specversion"`
	ID          string    `json:"id"`
	Source      string    `json:"source"`
	Type        string    `json:"type"`
	Subject     string    `json:"subject,omitempty"`
	Time        string    `json:"time"`
	ContentType string    `json:"datacontenttype"`
	Data        eventData `json:"data"`
}

type eventData struct {
	Title       string   `json:"title"`
	Text        string   `json:"text"`
	Owners      []string `json:"owners"`
	Fingerprint string   `json:"fingerprint"`
	Detail      any      `json:"detail,omitempty"`
	Alert       *Alert   `json:"alert,omitempty"`
}

// cloudEventType is the media type of one event in structured mode.
const cloudEventType = "application/cloudevents+json"

// event encodes a message. The id is that of one sending: with the source it is
// unique, and a receiver may drop what it has seen.
func (m *Message) event() ([]byte, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	owners := m.Owners
	if owners == nil {
		owners = []string{}
	}
	b, err := json.Marshal(cloudEvent{
		SpecVersion: "1.0", ID: hex.EncodeToString(id[:]), Source: m.Source, Type: m.Type, Subject: m.Subject,
		Time: m.At.UTC().Format(time.RFC3339Nano), ContentType: "application/json",
		Data: eventData{m.Title, m.Text, owners, m.Fingerprint, m.Data, m.Alert},
	})
	if err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	return b, nil
}
