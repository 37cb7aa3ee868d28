// Package fleet is what the server knows of hosts and what hosts report, in the
// words that the parts of the server use among each other. It does no I/O.
package fleet

import (
	"time"

	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// Types of documents in the tree.
const (
	TypeHost      = "Ringwall.Fleet/hosts"      // SCOPE/providers/Ringwall.Fleet/hosts/NAME
	TypeJoinToken = "Ringwall.Fleet/joinTokens" //nolint:gosec // named by the token's SHA-256, below the scope that hosts join
	TypeManifest  = "Ringwall.Fleet/manifests"  // named by the signed manifest's SHA-256
	TypeRollout   = "Ringwall.Fleet/rollouts"
	TypeHalt      = "Ringwall.Fleet/halts" // stop the line, below a scope
)

// Host is a host as the server knows it at one moment.
type Host struct {
	ID       string      // never used again for another host
	Resource resource.ID // its document
	Labels   map[string]string
	Critical bool // one of these that a change breaks is enough
	Revoked  bool
	Joined   time.Time

	Online bool      // it waits, or did until a moment ago
	Seen   time.Time // last heard of, by the server's clock
	Report Report

	Assigned   integrity.Digest // the manifest meant for it; zero: none
	AssignedAt time.Time
}

// Stratum is what makes hosts alike for a rollout: each stratum has a host in
// the first ring. The host says it of itself, so it decides nothing else.
func (h *Host) Stratum() string {
	return h.Labels["role"] + "/" + h.Labels["image"] + "/" + h.Labels["kernel"] + "/" + h.Labels["arch"]
}

// Phase is where a host stands with the manifest meant for it.
type Phase string

// The phases; see agentpb.State.
const (
	None        Phase = ""
	Confirmed   Phase = "confirmed"
	Provisional Phase = "provisional"
	Reverted    Phase = "reverted"
	Refused     Phase = "refused"
)

// Report is what a host says of itself. It is believed for what is shown and
// judged, never for what the host is given.
type Report struct {
	At          time.Time        `json:"at"` // received, by the server's clock
	Boot        string           `json:"boot"`
	Phase       Phase            `json:"phase,omitempty"`
	Manifest    integrity.Digest `json:"manifest"` // in force
	Epoch       uint64           `json:"epoch,omitempty"`
	Failed      integrity.Digest `json:"failed"` // with reverted and refused: which
	Reason      string           `json:"reason,omitempty"`
	KernelTable integrity.Digest `json:"kernel_table"` // what the kernel enforces
	Mode        string           `json:"mode,omitempty"`
	Applied     time.Time        `json:"applied,omitzero"` // by the host's clock
	AgentStart  time.Time        `json:"agent_start,omitzero"`
	AgentStarts uint32           `json:"agent_starts,omitempty"` // since the boot
	Agent       string           `json:"agent,omitempty"`        // version
	FailedUnits []string         `json:"failed_units,omitempty"`
	Flips       uint64           `json:"flips,omitempty"`
	Spooled     uint64           `json:"spooled,omitempty"` // bytes
	Dropped     uint64           `json:"dropped,omitempty"` // records lost
	Proven      bool             `json:"proven,omitempty"`  // the last canary passed
	Problem     string           `json:"problem,omitempty"`
	Isolated    bool             `json:"isolated,omitempty"`
}

// Assignment says which manifest is meant for a host; zero: none any more.
type Assignment struct {
	Host     string // id
	Manifest integrity.Digest
}

// Execution is an executable that ran on a host, for the inventory.
type Execution struct {
	Host   string
	Kind   string
	SHA256 integrity.Digest
	Path   string
	Signer string
	Count  uint64
	At     time.Time // received
}

// Signal is something that happened to a host and that a rollout watches beside
// blocks: agent-restart, unit-failed, reverted, lost (no heartbeat), attestation.
type Signal struct {
	Host string
	Name string
	Text string
	At   time.Time // received
}
