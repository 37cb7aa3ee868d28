package httpapi

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"
)

// Limits bound what one actor may ask of the server, so that a script that went
// mad, or a stolen token, does not take it from everybody else.
type Limits struct {
	PerSecond float64 // requests, over time
	Burst     int     // at once
	Open      int     // requests under way, streams included
}

// defaultLimits are far above what people and well-behaved programs do.
func defaultLimits() Limits { return Limits{PerSecond: 200, Burst: 2000, Open: 128} }

// WithLimits sets other limits than the usual ones.
func WithLimits(l Limits) Option { return func(a *API) { a.limits.Limits = l } }

// limiter counts by actor, or by address where nobody is authenticated.
type limiter struct {
	Limits
	now func() time.Time

	mu      sync.Mutex
	of      map[string]*bucket
	sweepAt int // as many buckets make it look for those that say nothing
}

type bucket struct {
	left float64
	last time.Time
	open int
}

const fewBuckets = 1024

func newLimiter(l Limits, now func() time.Time) *limiter {
	return &limiter{Limits: l, now: now, of: map[string]*bucket{}, sweepAt: fewBuckets}
}

// enter counts a request of somebody; leave ends it.
func (l *limiter) enter(who string) (leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	b := l.of[who]
	if b == nil {
		l.sweep(now)
		b = &bucket{left: float64(l.Burst), last: now}
		l.of[who] = b
	}
	if d := now.Sub(b.last); d > 0 {
		b.left = math.Min(float64(l.Burst), b.left+d.Seconds()*l.PerSecond)
	}
	b.last = now
	if b.open >= l.Open {
		return nil, tooMany(time.Second, "%d requests are under way already", b.open)
	}
	if b.left < 1 {
		return nil, tooMany(time.Duration((1-b.left)/l.PerSecond*float64(time.Second)), "more than %g requests a second", l.PerSecond)
	}
	b.left--
	b.open++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		b.open--
	}, nil
}

// sweep forgets buckets that are full again: they say nothing. So the memory is
// bounded by who was here within seconds.
func (l *limiter) sweep(now time.Time) {
	if len(l.of) < l.sweepAt {
		return
	}
	full := time.Duration(float64(l.Burst) / l.PerSecond * float64(time.Second))
	for who, b := range l.of {
		if b.open == 0 && now.Sub(b.last) > full {
			delete(l.of, who)
		}
	}
	l.sweepAt = max(fewBuckets, 2*len(l.of))
}

// statusError is an answer that no kind of error stands for.
type statusError struct {
	status int
	code   string
	after  time.Duration // for Retry-After; 0: none
	err    error
}

// Error implements error.
func (e *statusError) Error() string { return e.err.Error() }

// Unwrap is the error itself.
func (e *statusError) Unwrap() error { return e.err }

var errTooMany = errors.New("too many requests")

func tooMany(after time.Duration, format string, args ...any) error {
	return &statusError{http.StatusTooManyRequests, "TooManyRequests", max(after, time.Second), fmt.Errorf(format+": %w", append(args, errTooMany)...)}
}
