package agent

import (
	"sync"
	"time"

	"ringwall/internal/enforce"
	"ringwall/internal/integrity"
)

// flips compares what is refused with the policy before: what that one would have
// let go ahead, this change broke. Both are asked by the one evaluator, so a flip
// is proof and no statistics; content that was refused before as well, such as an
// attacker's, is none.
type flips struct {
	mu     sync.Mutex
	before *loaded
	until  time.Time // by the monotonic clock
	seen   map[flipKey]struct{}
}

// maxFlipKeys bounds what is counted as distinct.
const maxFlipKeys = 4096

type flipKey struct {
	kind integrity.Kind
	key  integrity.Key
}

// compareWith keeps the policy before for a time; nil ends that.
func (p *pipeline) compareWith(before *loaded, d time.Duration) {
	f := &p.flips
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.until, f.seen = before, time.Now().Add(d), map[flipKey]struct{}{}
}

// flipCount is how many distinct contents were refused that were not before.
func (p *pipeline) flipCount() int {
	f := &p.flips
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.seen)
}

// look reports whether the policy before would have let an event's content go
// ahead. An event of another epoch than the one in force says nothing. A content
// that only its mode refuses now, where the policy before reported it, is one
// too: hosts that worked stop working.
func (f *flips) look(e *enforce.Event, now *loaded, at time.Time) bool {
	if e.Kind == 0 || e.Digest.IsZero() || now == nil || e.Epoch != now.policy.Epoch {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.before == nil {
		return false
	}
	if time.Now().After(f.until) {
		f.before, f.seen = nil, nil // of no use any more, and big
		return false
	}
	if f.before.policy.Epoch == e.Epoch {
		return false
	}
	k := integrity.Key{Space: e.Space, Digest: e.Digest}
	o := now.compiled.Object(e.Kind, k)
	if now.compiled.Evaluate(&o, at).Allow {
		return false // refused for another reason than its content
	}
	o = f.before.compiled.Object(e.Kind, k)
	v := f.before.compiled.Evaluate(&o, at)
	if !v.Allow && (!e.Refused || v.Mode == integrity.ModeEnforce) {
		return false
	}
	if len(f.seen) < maxFlipKeys {
		f.seen[flipKey{e.Kind, k}] = struct{}{}
	}
	return true
}
