package agent

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// clock tells a time that never goes back, across restarts too: whoever can
// set the machine's clock back must not bring an expired permit or exception
// back to life. A clock set forward only makes things expire early, which
// fails closed.
type clock struct {
	path string
	wall func() time.Time

	mu    sync.Mutex
	high  time.Time // the latest time seen
	saved time.Time
}

// The clock may be stepped a little by time synchronisation.
const clockStep = 2 * time.Minute

// openClock always returns a clock; an error says that the latest time seen is
// not known, and then it begins with the machine's (see atLeast).
func openClock(path string, wall func() time.Time) (*clock, error) {
	c := &clock{path: path, wall: wall}
	b, err := readFile(path, 64)
	switch {
	case errors.Is(err, errs.NotFound):
	case err != nil:
		return c, fmt.Errorf("latest time seen: %w", err)
	default:
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return c, fmt.Errorf("latest time seen: %s: %w", path, errs.Invalid)
		}
		c.high = time.Unix(n, 0)
		c.saved = c.high
	}
	return c, nil
}

// now is the machine's time, or the latest time seen if that is later.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.wall(); t.After(c.high) {
		c.high = t
	}
	return c.high
}

// atLeast tells the clock of a time that has certainly passed, for one that does
// not know the latest time seen.
func (c *clock) atLeast(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.saved.IsZero() && t.After(c.high) {
		c.high = t
	}
}

// tick notes the time durably now and then, and returns by how much the
// machine's clock is behind what was seen, if that is no mere step.
func (c *clock) tick() time.Duration {
	now := c.now()
	if now.Sub(c.saved) >= time.Minute {
		if host.WriteFile(c.path, []byte(strconv.FormatInt(now.Unix(), 10)+"\n"), 0o600) == nil {
			c.saved = now
		}
	}
	if back := now.Sub(c.wall()); back > clockStep {
		return back
	}
	return 0
}
