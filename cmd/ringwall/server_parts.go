package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"ringwall/internal/control"
	"ringwall/internal/control/attestation"
	"ringwall/internal/control/hosts"
	"ringwall/internal/control/incidents"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/httpapi"
	"ringwall/internal/notify"
	"ringwall/internal/store"
)

// serverParts is what runs beside the tree in a server: each part adds its
// routes, its loops and its metrics before the server starts.
type serverParts struct {
	store   *store.Store
	door    *control.Door
	log     *slog.Logger
	metrics *serverMetrics
	// leader runs loops of which there must be one in the fleet.
	leader    *control.Leader
	incidents *incidents.Engine
	// collectors of logs are told of incidents as people are.
	collectors []notify.Target
	hosts      *hosts.Service
	rollouts   *rollouts.Engine
	attester   hosts.Attester // nil: hosts are not attested
	// attestation is the gate that others ask; nil: hosts are not attested.
	attestation *attestation.Service

	tls  *tls.Config
	keys httpapi.SigningKeys // of the built-in issuer

	closers []func() error // of what is open beside the store
	routes  []httpapi.Route
	loops   []func(ctx context.Context)
}

func newServerParts(s *store.Store, log *slog.Logger) *serverParts {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	m := newServerMetrics(s)
	return &serverParts{
		store: s, log: log, metrics: m,
		leader: &control.Leader{
			Leases: s, Term: control.DefaultTerm, Log: log, Held: m.held,
			// drawn anew at each start: a process never takes another's holding for its own
			Owner: fmt.Sprintf("%s/%d/%s", host, os.Getpid(), rand.Text()),
		},
	}
}

// close closes what is open, the last first.
func (p *serverParts) close() (err error) {
	for _, c := range slices.Backward(p.closers) {
		err = errors.Join(err, c())
	}
	return errors.Join(err, p.store.Close())
}

// loop adds what runs in every replica until ctx ends.
func (p *serverParts) loop(run func(ctx context.Context)) { p.loops = append(p.loops, run) }

// lead adds what runs in one replica at a time; see control.Leader.Run.
func (p *serverParts) lead(lease string, run func(ctx context.Context, f control.Fence) error) {
	p.metrics.held(lease, false)
	p.loop(func(ctx context.Context) { _ = p.leader.Run(ctx, lease, run) })
}

// start starts the loops; what it returns ends them and waits for their end.
func (p *serverParts) start(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, run := range p.loops {
		wg.Go(func() { run(ctx) })
	}
	return func() {
		cancel()
		wg.Wait()
	}
}
