package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"ringwall/internal/agent"
	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/control/incidents"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/enforce"
	"ringwall/internal/errs"
	"ringwall/internal/image"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
	"ringwall/internal/store"
	"ringwall/internal/transparency"
)

// kernel is the engine as the agent sees it.
type kernel struct{ *enforce.Engine }

// Protect guards what Guard was told.
func (k kernel) Protect() error { return k.Engine.Protect() }

// openEngine is the one place that picks the kernel engine for the agent.
func openEngine(o enforce.Options) (agent.Enforcer, agent.Watcher, error) {
	e, err := enforce.Open(o)
	if err != nil {
		return nil, nil, err
	}
	if err := e.AdoptSelf(); err != nil {
		return nil, nil, errors.Join(err, e.Close())
	}
	return kernel{e}, e, nil
}

// signerInput is an artefact as the signer sees it.
type signerInput struct{ *artefact }

// Name implements signer.Input.
func (i signerInput) Name() string { return i.name() }

// Digest implements signer.Input.
func (i signerInput) Digest() integrity.Digest { return i.digest() }

// Package implements signer.Input.
func (i signerInput) Package() (name, version, architecture string, ok bool) {
	p, ok := i.pkg()
	return p.Name, p.Version, p.Architecture, ok
}

// openInput is how the signer opens artefacts.
func openInput(e *env) func(ctx context.Context, path string) (signer.Input, error) {
	return func(ctx context.Context, path string) (signer.Input, error) {
		a, err := openArtefact(ctx, e, path)
		if err != nil {
			return nil, err
		}
		return signerInput{a}, nil
	}
}

// measureVolume reads a dm-verity image to its end; nil: it is none.
func measureVolume(ctx context.Context, path string) (*signer.Volume, error) {
	if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() {
		return nil, nil //nolint:nilnil,nilerr // a directory, or an image in a registry
	}
	if _, err := image.Open(path); errors.Is(err, errs.Invalid) {
		return nil, nil //nolint:nilnil // no image, as Signer.Volume has it
	}
	v, err := image.Check(ctx, path)
	if err != nil {
		return nil, err
	}
	return &signer.Volume{Root: v.Root, SHA256: v.SHA256}, nil
}

// openPolicies takes one release policy, or a directory of them.
func openPolicies(path string) (signer.Policies, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("release policy: %w", err)
	}
	if st.IsDir() {
		return signer.PolicyDir(path), nil
	}
	p, err := signer.LoadPolicy(path)
	if err != nil {
		return nil, err
	}
	return signer.OnePolicy{Only: p}, nil
}

// openLog opens the transparency log to append to; without a directory there
// is none, which an authority that has one does not allow.
func openLog(a *pki.Authority, dir string) (pki.Recorder, func() error, error) {
	nothing := func() error { return nil }
	switch {
	case dir == "" && a.Log == nil:
		return nil, nothing, nil
	case dir == "":
		return nil, nothing, hint(fmt.Errorf("the authority has a transparency log, and nothing is believed that is not in it: %w", errs.NotFound), "--log DIR says where it is")
	case a.Log == nil || a.LogKey == nil:
		return nil, nothing, fmt.Errorf("transparency log %s: the authority has no log key here: %w", dir, errs.NotFound)
	}
	l, err := transparency.Open(dir, a.Log.LogKey, a.LogKey)
	if err != nil {
		return nil, nothing, err
	}
	return l, l.Close, nil
}

// openStamper returns the timestamp authority at a URL, or nil for the
// authority's own.
func openStamper(a *pki.Authority, url string) (pki.Stamper, error) {
	if url == "" {
		return nil, nil //nolint:nilnil // nil is the authority's own
	}
	return transparency.NewTSAClient(url, a.Roots(pki.PurposeBuild).TSAs)
}

// managed is the database as the door sees it.
type managed struct{ *store.Store }

// Write implements control.Store.
func (m managed) Write(ctx context.Context, fn func(control.Tx) error) error {
	return m.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

// Read implements control.Store.
func (m managed) Read(ctx context.Context, fn func(control.Tx) error) error {
	return m.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

// openServer opens the server's database, and what a server joins to it.
func openServer(ctx context.Context, url string, log *slog.Logger) (*serverParts, error) {
	s, err := store.Open(ctx, url)
	if err != nil {
		return nil, err
	}
	p := newServerParts(s, log)
	if p.door, err = control.New(p.metrics.store(managed{s}), serverKinds(p.metrics)...); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return p, nil
}

// serverKinds are the types of documents of the server's parts.
func serverKinds(m *serverMetrics) []control.Kind {
	return slices.Concat(incidents.Kinds(time.Now, m.incident), withOrders(hosts.Kinds()), rollouts.Kinds(time.Now))
}

func backupDatabase(ctx context.Context, url, file string) error {
	s, err := store.Open(ctx, url)
	if err != nil {
		return err
	}
	return errors.Join(s.Backup(ctx, file), s.Close())
}
