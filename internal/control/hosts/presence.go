package hosts

import (
	"context"
	"time"

	"ringwall/internal/fleet"
)

const (
	flushEvery  = 10 * time.Second       // of what was seen
	urgentEvery = 500 * time.Millisecond // of what hosts report anew
	sweepEvery  = 5 * time.Second
)

// keepPresence stores what hosts say, in batches, and notices who is silent.
// What was seen and not stored when a process dies comes again with the next
// heartbeat.
func (s *Service) keepPresence(ctx context.Context) {
	lastFlush, lastSweep := s.Now(), s.Now()
	s.every(ctx, urgentEvery, "presence", func(ctx context.Context) error {
		now := s.Now()
		if now.Sub(lastSweep) >= sweepEvery || now.Before(lastSweep) {
			lastSweep = now
			s.sweep(ctx, now)
		}
		all := now.Sub(lastFlush) >= flushEvery || now.Before(lastFlush)
		if all {
			lastFlush = now
		}
		return s.flush(ctx, all)
	})
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	_ = s.flush(end, true) // as far as it goes
}

// flush stores reports that changed, or everything that was seen.
func (s *Service) flush(ctx context.Context, everything bool) error {
	var out []fleet.Presence
	var from []*host
	for _, h := range s.all() {
		h.mu.Lock()
		if h.urgent || everything && h.dirty {
			out = append(out, fleet.Presence{Host: h.v.ID, Seen: h.v.Seen, Report: h.v.Report, Labels: h.own})
			from = append(from, h)
			h.urgent, h.dirty = false, false
		}
		h.mu.Unlock()
	}
	if len(out) == 0 {
		return nil
	}
	err := s.Store.SavePresence(ctx, s.node, out)
	if err != nil {
		for _, h := range from {
			h.mu.Lock()
			h.urgent = true
			h.mu.Unlock()
		}
	}
	return err
}

// sweep signals hosts that were not heard of for three periods.
func (s *Service) sweep(ctx context.Context, now time.Time) {
	var lost []fleet.Signal
	for _, h := range s.all() {
		h.mu.Lock()
		if h.v.Online && now.Sub(h.v.Seen) >= lostAfter {
			old := h.v
			h.v.Online = false
			v := h.v
			h.mu.Unlock()
			s.reported(&old, &v)
			if !v.Revoked {
				lost = append(lost, fleet.Signal{Host: v.ID, Name: SignalLost, Text: "no heartbeat since " + v.Seen.Format(time.RFC3339), At: now})
			}
			continue
		}
		h.mu.Unlock()
	}
	if len(lost) > 0 {
		s.signal(ctx, lost...)
	}
}

// Signals that the server itself makes.
const (
	SignalLost      = "lost"          // no heartbeat
	SignalGap       = "gap"           // records are missing
	SignalMalformed = "malformed"     // records that were not understood
	SignalSpool     = "spool-renewed" // the host counts anew: what it had not sent is gone
	SignalFlood     = "flood"         // more executables than any host should have
)

// keepEvents is how long events are kept.
const keepEvents = 30 * 24 * time.Hour

// prune forgets old events.
func (s *Service) prune(ctx context.Context) {
	s.every(ctx, time.Hour, "prune", func(ctx context.Context) error {
		return s.Events.PruneEvents(ctx, s.Now().Add(-keepEvents))
	})
}
