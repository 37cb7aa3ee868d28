package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
)

// pushLoop sends what is spooled, blocks first. A record is on its way as soon as
// it is written.
func (l *link) pushLoop(ctx context.Context) {
	fails := 0
	for ctx.Err() == nil {
		l.mu.Lock()
		c, turn, blocks, inv := l.conn, l.turn, l.blocks, l.inv
		l.mu.Unlock()
		if c == nil || blocks == nil {
			l.sleep(ctx, turn, time.Minute)
			continue
		}
		sent, pause, err := l.push(ctx, c, blocks, inv)
		switch {
		case err != nil:
			fails++
			l.a.log.DebugContext(ctx, "send records", slog.Any("error", err))
			pause = l.backoff(fails)
		case sent && pause == 0:
			fails = 0
			continue
		default:
			fails = 0
		}
		l.rest(ctx, turn, pause, blocks, inv, err != nil)
	}
}

// rest waits for something to send; after a failure, for the time.
func (l *link) rest(ctx context.Context, turn <-chan struct{}, pause time.Duration, blocks, inv *spool, failed bool) {
	if failed || pause > 0 {
		t := time.NewTimer(pause)
		defer t.Stop()
		alive := l.alive
		if !failed {
			alive = nil
		}
		select {
		case <-t.C:
		case <-alive:
		case <-ctx.Done():
		}
		return
	}
	var more <-chan struct{}
	if inv != nil {
		more = inv.wake
	}
	select {
	case <-blocks.wake:
	case <-more:
	case <-turn:
	case <-ctx.Done():
	}
}

// push sends one batch, and says whether there was one and how long to pause.
func (l *link) push(ctx context.Context, c *conn, lanes ...*spool) (sent bool, pause time.Duration, err error) {
	for _, s := range lanes {
		if s == nil {
			continue
		}
		first, records, err := s.batch()
		if errors.Is(err, errs.Untrusted) {
			return false, 0, errors.Join(err, s.reset())
		}
		if err != nil {
			return false, 0, err
		}
		if len(records) == 0 {
			continue
		}
		pause, err := l.send(ctx, c, s, first, records)
		return true, pause, err
	}
	return false, 0, nil
}

func (l *link) send(ctx context.Context, c *conn, s *spool, first uint64, records []*agentpb.Record) (time.Duration, error) {
	ctx, stop := context.WithTimeout(ctx, callWait)
	defer stop()
	began := time.Now()
	resp, err := c.Ingest(ctx, connect.NewRequest(&agentpb.IngestRequest{Stream: s.stream[:], Lane: s.lane, First: first, Records: records}))
	if err != nil {
		return 0, fmt.Errorf("ingest: %w", err)
	}
	l.a.answered(began)
	last := first + uint64(len(records)) - 1
	durable := min(resp.Msg.GetDurable(), last) // of what it never got it keeps nothing
	s.ack(durable)
	if durable < first && resp.Msg.GetRetryUs() <= 0 {
		return 0, fmt.Errorf("ingest: the server kept none of %d records: %w", len(records), errs.Conflict)
	}
	return min(max(time.Duration(resp.Msg.GetRetryUs())*time.Microsecond, 0), maxBackoff), nil
}

// isolate makes the network as the server wants it, again and again: whoever is
// root here may have changed it. While the agent does not know where the server is
// reached it cuts nothing off, since nobody could release the host again; that
// shows as a problem.
func (l *link) isolate(ctx context.Context) {
	l.mu.Lock()
	j, was := l.joined, l.isolated
	l.mu.Unlock()
	want := j != nil && j.Isolated
	if !want && !was && l.cleared {
		return
	}
	err := l.setIsolation(ctx, j, want)
	l.mu.Lock()
	if err == nil {
		l.isolated, l.cleared = want, !want
	}
	l.isolation = err
	l.mu.Unlock()
	switch {
	case err != nil && want:
		l.a.log.ErrorContext(ctx, "isolate this host", slog.Any("error", err)) // and in the state that the server is told
	case err == nil && want != was && want:
		l.a.pipe.notice(noticeIsolated, "the server isolates this host: it talks to the server and to itself only")
	case err == nil && want != was:
		l.a.pipe.notice(noticeIsolated, "the server released this host from isolation")
	}
	if want != was {
		l.changed(false)
	}
}

func (l *link) setIsolation(ctx context.Context, j *joined, want bool) error {
	set := l.a.opts.Isolate
	switch {
	case set == nil && !want:
		return nil
	case set == nil:
		return fmt.Errorf("this agent cannot: %w", errs.Unsupported)
	case !want:
		return set(ctx, nil)
	case l.a.state.Settings().Scope != "":
		return fmt.Errorf("it governs a cgroup only: %w", errs.Unsupported)
	}
	var to []netip.AddrPort
	for _, s := range j.Addresses {
		if a, err := netip.ParseAddrPort(s); err == nil {
			to = append(to, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
		}
	}
	if len(to) == 0 {
		return fmt.Errorf("the server's address is not known: %w", errs.Conflict)
	}
	return set(ctx, to)
}
