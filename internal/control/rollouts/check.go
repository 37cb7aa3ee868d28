package rollouts

import (
	"time"

	"ringwall/internal/integrity"
)

// Check is what the server found before anybody approves: whether hosts can
// take the manifest at all, what it changes, and whom it would hit.
type Check struct {
	At    time.Time   `json:"at"`
	Hosts int         `json:"hosts"`
	Rings []RingCheck `json:"rings,omitempty"`
	// Problems keep the rollout from being approved.
	Problems []Problem `json:"problems,omitempty"`
	// Changes are what the policy does otherwise than the one that most hosts
	// have; Releases what is authorised more and less.
	Changes  []integrity.Change `json:"changes,omitempty"`
	Releases ReleaseChanges     `json:"releases,omitzero"`
	WhatIf   WhatIf             `json:"what_if,omitzero"`
	Base     string             `json:"base,omitempty"` // the manifest that was compared with
}

// RingCheck is a ring with what it can show.
type RingCheck struct {
	Ring
	Count int `json:"count"`
	// Detectable is the smallest share of hosts that a change must break so that
	// the ring, with those before it, has one of them with 95 % probability.
	Detectable float64 `json:"detectable"`
}

// Problem is what is in the way.
type Problem struct {
	Code string `json:"code"` // stable, for programs
	Text string `json:"text"`
}

// ReleaseChanges counts releases and supplements, and names some.
type ReleaseChanges struct {
	Added   int      `json:"added,omitempty"`
	Removed int      `json:"removed,omitempty"`
	Names   []string `json:"names,omitempty"` // "+ edged 4.8.0", at most maxListed
}

// WhatIf is what the manifest decides of what was recorded.
type WhatIf struct {
	Asked   int `json:"asked,omitempty"`   // distinct executables
	Allowed int `json:"allowed,omitempty"` // under the manifest
	// Unknown are contents that no release of either manifest, no package and no
	// rule by digest knows: they are refused before and after.
	Unknown int    `json:"unknown,omitempty"`
	Flips   []Flip `json:"flips,omitempty"` // at most maxListed
	More    int    `json:"more,omitempty"`  // flips that are not listed
	Hosts   int    `json:"hosts,omitempty"` // that the worst of them ran on
}

// Flip is a content that was allowed and would not be.
type Flip struct {
	Kind   string           `json:"kind"`
	SHA256 integrity.Digest `json:"sha256"`
	Path   string           `json:"path,omitempty"`
	Hosts  int              `json:"hosts"`
	Reason string           `json:"reason"`
	Waived string           `json:"waived,omitempty"` // why
}

const maxListed = 200
