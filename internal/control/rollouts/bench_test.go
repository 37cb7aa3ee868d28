package rollouts_test

import (
	"context"
	"testing"
	"time"

	"ringwall/internal/rollout"
)

// BenchmarkRound_10000 is a round of a rollout of 10,000 hosts that all have the
// change, as it is while the last ring bakes.
func BenchmarkRound_10000(b *testing.B) {
	w := newWorld(b, 10_000, newKeys(b))
	w.begin(`,"rings":[{"name":"all","percent":100,"bake":{"time":"100h"}}]`)
	begin := time.Now()
	for w.status(change).Phase != rollout.Running {
		w.tick(time.Second)
	}
	b.Logf("placed after %v", time.Since(begin))
	for w.status(change).Baking.IsZero() {
		at := time.Now()
		w.tick(time.Second)
		b.Logf("a round of %v", time.Since(at))
	}
	for b.Loop() {
		if err := w.round(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}
