package hosts

import (
	"sync"
	"sync/atomic"
	"time"
)

// Limits bound what one host may cost. What is over a bound is refused for a
// while and counted, never lost: a host keeps what was not acknowledged.
type Limits struct {
	Calls    Rate // of all sorts
	Blocks   Rate // records of blocks, notices and signals
	Runs     Rate // records of executions
	Chunks   Rate // bytes
	Enrols   Rate // of all hosts together
	NewItems Rate // executables that nobody saw before
}

// Rate is how many a second, in the long run, and how many at once.
type Rate struct {
	PerSecond float64
	Burst     float64
}

// DefaultLimits are far above what a sound host needs.
func DefaultLimits() Limits {
	return Limits{
		Calls:    Rate{200, 5_000}, // the first manifest of a host may have thousands of chunks
		Blocks:   Rate{200, 10_000},
		Runs:     Rate{500, 50_000},
		Chunks:   Rate{64 << 20, 1 << 30},
		Enrols:   Rate{100, 500},
		NewItems: Rate{20, 20_000},
	}
}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits()
	for _, p := range []struct{ have, or *Rate }{
		{&l.Calls, &d.Calls},
		{&l.Blocks, &d.Blocks},
		{&l.Runs, &d.Runs},
		{&l.Chunks, &d.Chunks},
		{&l.Enrols, &d.Enrols},
		{&l.NewItems, &d.NewItems},
	} {
		if *p.have == (Rate{}) {
			*p.have = *p.or
		}
	}
	return l
}

// bucket is a token bucket; the zero value is full.
type bucket struct {
	mu    sync.Mutex
	spent float64
	at    time.Time
}

// take takes n, or says how long to wait for it. More than a burst at once never
// fits: it is taken as a burst.
func (b *bucket) take(r Rate, n float64, now time.Time) (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d := now.Sub(b.at).Seconds(); d > 0 {
		b.spent = max(0, b.spent-d*r.PerSecond)
	}
	b.at = now
	n = min(n, r.Burst)
	if over := b.spent + n - r.Burst; over > 0 {
		return time.Duration(over/r.PerSecond*float64(time.Second)) + time.Millisecond
	}
	b.spent += n
	return 0
}

// use is what one host used of its bounds.
type use struct {
	calls, blocks, runs, chunks, items bucket

	limited   atomic.Uint64 // calls that were put off
	malformed atomic.Uint64 // records that were not understood
}

// Counters say what was refused since the start of this process.
type Counters struct {
	Enrolled   uint64 `json:"enrolled"`
	BadTokens  uint64 `json:"bad_tokens"`  // join tokens that are none, are over or were used
	Unknown    uint64 `json:"unknown"`     // certificates of nobody, revoked or replaced
	Limited    uint64 `json:"limited"`     // calls over a bound
	Malformed  uint64 `json:"malformed"`   // records that were not understood
	Gaps       uint64 `json:"gaps"`        // in the numbers of records
	Records    uint64 `json:"records"`     // stored
	Duplicates uint64 `json:"duplicates"`  // records that came again
	Waits      uint64 `json:"waits"`       // calls of Wait
	Waiting    int64  `json:"waiting"`     // held now
	SinkErrors uint64 `json:"sink_errors"` // batches of blocks that must be handed on again
}

type counters struct {
	enrolled, badTokens, unknown, limited, malformed, gaps, records, duplicates, waits, sinkErrors atomic.Uint64
	waiting                                                                                        atomic.Int64
}

// Counters returns them.
func (s *Service) Counters() Counters {
	c := &s.counters
	return Counters{
		Enrolled: c.enrolled.Load(), BadTokens: c.badTokens.Load(), Unknown: c.unknown.Load(), Limited: c.limited.Load(), Malformed: c.malformed.Load(),
		Gaps: c.gaps.Load(), Records: c.records.Load(), Duplicates: c.duplicates.Load(), Waits: c.waits.Load(), Waiting: c.waiting.Load(), SinkErrors: c.sinkErrors.Load(),
	}
}

// charge takes n whether or not it fits, and reports whether it went over now.
func (b *bucket) charge(r Rate, n float64, now time.Time) (over bool) {
	b.take(r, 0, now)
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.spent > r.Burst
	b.spent = min(b.spent+n, 2*r.Burst)
	return !was && b.spent > r.Burst
}
