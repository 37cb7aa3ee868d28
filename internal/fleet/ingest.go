package fleet

import (
	"time"

	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// Grant is what the server gave a host: its keys, and the manifest meant for it.
type Grant struct {
	Host        string
	Resource    resource.ID
	Certificate []byte           // DER, the newest
	Key         integrity.Digest // SHA-256 of the newest certificate's public key
	OldKey      integrity.Digest // of the one before, until the newest is used; zero: none
	Assigned    integrity.Digest // zero: none
	AssignedAt  time.Time
}

// Presence is when a host was heard of last, and what it said. It is kept apart
// from what people and the server decide, since it changes all the time.
type Presence struct {
	Host   string
	Seen   time.Time
	Report Report
	Labels map[string]string // that the host says of itself
}

// Lanes of what hosts send; see agentpb.Lane.
const (
	LaneBlocks    = 1
	LaneInventory = 2
)

// Position is how far one lane of a host is stored. Numbers count within a
// stream, from 1.
type Position struct {
	Host   string
	Lane   int
	Stream []byte // 16 bytes
	UpTo   uint64
}

// Event is a record of the lane of blocks as it is stored.
type Event struct {
	Host     string
	Stream   []byte
	Number   uint64
	Received time.Time // by the server's clock
	At       time.Time // by the host's clock: evidence only
	What     string    // block, notice, signal, lost
	Name     string    // the reason of a block, the code of a notice, the name of a signal
	SHA256   integrity.Digest
	Path     string
	Body     []byte // the record as it came, protobuf
}

// EventQuery selects events, the newest first.
type EventQuery struct {
	Host   string           // "" for all
	SHA256 integrity.Digest // zero for all
	What   string           // "" for all
	Since  time.Time
	Until  time.Time // zero: now
	Limit  int
}

// Item is an executable of the inventory: one content, of one kind, at one path.
type Item struct {
	SHA256 integrity.Digest `json:"sha256"`
	Kind   string           `json:"kind"`
	Path   string           `json:"path"`
	Signer string           `json:"signer,omitempty"`
	First  time.Time        `json:"first_seen"`
	Last   time.Time        `json:"last_seen"` // to the hour
	Hosts  int              `json:"hosts"`     // below the scope that was asked about
}

// Coverage says how much of what runs on some hosts ran on others too.
type Coverage struct {
	Items   int `json:"items"`   // distinct contents on the hosts asked about
	Covered int `json:"covered"` // that ran on the others too
	// Uses are pairs of host and content, so that what runs on many hosts weighs
	// more.
	Uses        int `json:"uses"`
	UsesCovered int `json:"uses_covered"`
}
