package main

import (
	"errors"

	"ringwall/internal/agent"
	"ringwall/internal/enforce"
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
