package rollouts

import (
	"context"

	"ringwall/internal/control"
)

// Rounds returns what Run does in each round, for tests that hold the clock.
func (e *Engine) Rounds(f control.Fence) func(context.Context) error {
	r := e.newRun(f)
	return func(ctx context.Context) error {
		for {
			if err := r.round(ctx); err != nil {
				return err
			}
			var busy *checked
			for _, w := range r.state {
				if w.check != nil {
					busy = w.check
				}
			}
			if busy == nil {
				return nil
			}
			<-busy.done
		}
	}
}

// Parsed opens parse to tests.
var Parsed = parse

// ParseSamples opens parseSamples to tests.
var ParseSamples = parseSamples
