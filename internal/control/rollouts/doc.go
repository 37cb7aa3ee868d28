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
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

// Fleet is the hosts as the engine needs them; *hosts.Service is one.
type Fleet interface {
	// Hosts is a snapshot of every host below a scope.
	Hosts(ctx context.Context, below resource.ID) ([]fleet.Host, error)
	// AssignUnder stores what is meant for hosts, as the holder of a lease;
	// errs.Conflict when the holding is over. The same may come again.
	AssignUnder(ctx context.Context, f control.Fence, all []fleet.Assignment) error
	// Signals are those since a time, of all replicas.
	Signals(ctx context.Context, since time.Time) ([]fleet.Signal, error)
}

// Content is what operators uploaded; *hosts.Service has it.
type Content interface {
	// Manifest returns a manifest and its signed document, of which nothing was
	// verified; errs.NotFound if it was not uploaded.
	Manifest(ctx context.Context, digest integrity.Digest) (*codesign.Manifest, []byte, error)
	// Chunk returns a whole chunk of at most limit bytes by its SHA-256;
	// errs.NotFound if it was not uploaded.
	Chunk(ctx context.Context, digest integrity.Digest, limit int) ([]byte, error)
}

// Inventory is what was seen to run; *hosts.Service has it.
type Inventory interface {
	// Inventory returns what ran on the hosts below a scope since a time.
	Inventory(ctx context.Context, below resource.ID, since time.Time, limit int) ([]fleet.Item, error)
	// Coverage says how much of what ran on some hosts ran on others since a time.
	Coverage(ctx context.Context, of, by []string, since time.Time) (fleet.Coverage, error)
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
