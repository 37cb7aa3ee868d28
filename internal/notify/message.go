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
}

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
		Data: eventData{m.Title, m.Text, owners, m.Fingerprint, m.Data},
	})
	if err != nil {
		return nil, fmt.Errorf("encode event: %w", err)
	}
	return b, nil
}
