package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/rollout"
)

// rolloutRows is how many rows one statement writes. SQLite looks each of its
// values up by name, so that many in one cost more than they save: of 10, 25, 50
// and 200 rows a statement, 10,000 take 0.11, 0.14, 0.27 and 1 s.
const rolloutRows = 16

// RolloutHosts is what is remembered of the hosts of a rollout, in the order of
// their ids. A rollout is named by its document's key.
func (t *Tx) RolloutHosts(ctx context.Context, of string) ([]rollout.Record, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT host, ring, entered_us, admitted_us, applied_us, base FROM rollout_host WHERE rollout = $1 ORDER BY host", of)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []rollout.Record
	for rows.Next() {
		var r rollout.Record
		var entered, admitted, applied int64
		var base string
		if err := rows.Scan(&r.Host, &r.Ring, &entered, &admitted, &applied, &base); err != nil {
			return nil, err
		}
		if err := json.Unmarshal([]byte(base), &r.Base); err != nil {
			return nil, fmt.Errorf("stored host %s of %s: %w", r.Host, of, err)
		}
		r.Entered, r.Admitted, r.Applied = fromMicro(entered), fromMicro(admitted), fromMicro(applied)
		out = append(out, r)
	}
	return out, rows.Err()
}

// PutRolloutHosts writes what is remembered of some hosts of a rollout, in the
// place of what was.
func (t *Tx) PutRolloutHosts(ctx context.Context, of string, records []rollout.Record) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	for part := range slices.Chunk(records, rolloutRows) {
		args := make([]any, 0, 7*len(part))
		for i := range part {
			r := &part[i]
			base, err := json.Marshal(r.Base)
			if err != nil {
				return err
			}
			args = append(args, of, r.Host, r.Ring, micro(r.Entered), micro(r.Admitted), micro(r.Applied), string(base))
		}
		_, err := t.tx.ExecContext(ctx, bulk("INSERT INTO rollout_host (rollout, host, ring, entered_us, admitted_us, applied_us, base) VALUES ", len(part), 7, "", `
			ON CONFLICT (rollout, host) DO UPDATE SET ring = excluded.ring, entered_us = excluded.entered_us,
			admitted_us = excluded.admitted_us, applied_us = excluded.applied_us, base = excluded.base`), args...)
		if err != nil {
			return err
		}
	}
	return nil
}

// RolloutHits are the hits of a rollout, in the order of hosts and signals.
func (t *Tx) RolloutHits(ctx context.Context, of string) ([]rollout.Hit, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT host, signal, at_us, text FROM rollout_hit WHERE rollout = $1 ORDER BY host, signal", of)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []rollout.Hit
	for rows.Next() {
		var h rollout.Hit
		var at int64
		if err := rows.Scan(&h.Host, &h.Signal, &at, &h.Text); err != nil {
			return nil, err
		}
		h.At = fromMicro(at)
		out = append(out, h)
	}
	return out, rows.Err()
}

// AddRolloutHits adds hits. The first of a host and signal stays, so the same
// one may come again.
func (t *Tx) AddRolloutHits(ctx context.Context, of string, hits []rollout.Hit) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	for part := range slices.Chunk(hits, rolloutRows) {
		args := make([]any, 0, 5*len(part))
		for i := range part {
			h := &part[i]
			args = append(args, of, h.Host, h.Signal, micro(h.At), h.Text)
		}
		_, err := t.tx.ExecContext(ctx, bulk("INSERT INTO rollout_hit (rollout, host, signal, at_us, text) VALUES ", len(part), 5, "",
			" ON CONFLICT (rollout, host, signal) DO NOTHING"), args...)
		if err != nil {
			return err
		}
	}
	return nil
}

// ForgetRollout removes all that is remembered of a rollout's hosts.
func (t *Tx) ForgetRollout(ctx context.Context, of string) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	for _, table := range []string{"rollout_host", "rollout_hit"} {
		if _, err := t.tx.ExecContext(ctx, "DELETE FROM "+table+" WHERE rollout = $1", of); err != nil { //nolint:gosec // one of the two above
			return err
		}
	}
	return nil
}

// micro is a time as it is stored; the zero time is 0.
func micro(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicro(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}
