package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"ringwall/internal/api"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
)

func post(ctx context.Context, c *api.Client, path string) error {
	_, _, err := c.Do(ctx, api.Request{Method: http.MethodPost, Path: path, Body: []byte("{}")})
	return err
}

// approve starts a rollout and has it approved once the server has checked it.
func (m *measurement) approve(ctx context.Context, id string) error {
	if err := post(ctx, m.s.Client, id+"/start"); err != nil {
		return err
	}
	var err error
	for range 300 {
		if err = post(ctx, m.other, id+"/approve"); !errors.Is(err, errs.Conflict) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return err
}

// stopTheLine halts a rollout that admits a few hosts at a time, and looks
// whether anybody still gets the change after that.
func (m *measurement) stopTheLine(ctx context.Context) error {
	next, back, err := m.op.change(ctx, "halted")
	if err != nil {
		return err
	}
	few := max(1, len(m.agents)/100)
	if err := m.rollout(ctx, "halted", next, back, few); err != nil {
		return err
	}
	if err := m.until(ctx, time.Minute, func() bool { return len(m.w.Times(next.digest)) >= few }); err != nil {
		return fmt.Errorf("the rollout does not begin: %w", err)
	}
	at := time.Now()
	if err := m.s.Put(ctx, group+"/providers/"+fleet.TypeHalt+"/now", map[string]string{"reason": "simulated"}); err != nil {
		return err
	}
	time.Sleep(5 * time.Second)
	last := time.Duration(0)
	for _, t := range m.w.Times(next.digest) {
		last = max(last, t.Sub(at))
	}
	m.say("the line was stopped when %d of %d hosts had a change", len(m.w.Times(next.digest)), len(m.agents))
	m.result("last host that still got it, after the halt", ms(last), "goal: < 1 s")
	return nil
}
