// Package rollouts brings manifests to hosts by the rules of package rollout:
// the documents that people write, what they may do to them, and the engine
// that admits hosts, watches them and takes the change back.
//
// The engine is level-triggered. Every round it reads what is stored and what
// hosts report, asks the rules, and makes at most one transition of each
// rollout: one write through the door, with its audit record, that fails if
// anybody wrote meanwhile or another replica has the lease. What hosts are
// given follows from what is stored, so it is given again by whoever comes
// after a crash, and never more than what is stored.
package rollouts

import (
	"context"

	"ringwall/internal/codesign"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Fleet is the hosts as the engine needs them.
type Fleet interface {
	// Hosts is a snapshot of every host below a scope.
	Hosts(ctx context.Context, below resource.ID) ([]fleet.Host, error)
	// Assign stores what is meant for hosts. The same may come again.
	Assign(ctx context.Context, as []fleet.Assignment) error
}

// Content is what operators uploaded.
type Content interface {
	// Manifest returns a manifest and its signed document; errs.NotFound if it
	// was not uploaded.
	Manifest(ctx context.Context, digest integrity.Digest) (*codesign.Manifest, []byte, error)
	// Chunk returns a whole chunk by its SHA-256; errs.NotFound if it was not
	// uploaded.
	Chunk(ctx context.Context, digest integrity.Digest) ([]byte, error)
}

// Inventory is what was seen to run.
type Inventory interface {
	// Executables visits each distinct executable below a scope.
	Executables(ctx context.Context, below resource.ID, visit func(Executable) error) error
	// Coverage is the share of what some hosts run, each weighed by its hosts,
	// that others run as well: 0 to 1.
	Coverage(ctx context.Context, of, by []string) (float64, error)
}

// Executable is one distinct content of an inventory.
type Executable struct {
	Kind   string
	SHA256 integrity.Digest
	Path   string // one of its paths
	Signer string
	Hosts  int // that ran it
}

// Incidents tells the open incidents below a scope that belong to an epoch.
type Incidents func(ctx context.Context, below resource.ID, epoch uint64) ([]string, error)

// Records are the methods of a store's transaction that keep what is remembered
// of hosts, beside control.Tx. A rollout is named by its document's key.
type Records interface {
	RolloutHosts(ctx context.Context, of string) ([]rollout.Record, error)
	PutRolloutHosts(ctx context.Context, of string, records []rollout.Record) error
	RolloutHits(ctx context.Context, of string) ([]rollout.Hit, error)
	AddRolloutHits(ctx context.Context, of string, hits []rollout.Hit) error
	ForgetRollout(ctx context.Context, of string) error
}
