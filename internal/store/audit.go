package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/audit"
)

const auditColumns = "seq, at_us, actor, action, target, outcome, reason, detail, prev, hash"

func scanAudit(row interface{ Scan(...any) error }) (*audit.Record, error) {
	var r audit.Record
	var at int64
	var prev, hash []byte
	if err := row.Scan(&r.Seq, &at, &r.Actor, &r.Action, &r.Target, &r.Outcome, &r.Reason, &r.Detail, &prev, &hash); err != nil {
		return nil, err
	}
	if len(prev) != len(r.Prev) || len(hash) != len(r.Hash) {
		return nil, fmt.Errorf("stored audit record %d: hashes of %d and %d bytes", r.Seq, len(prev), len(hash))
	}
	r.At, r.Prev, r.Hash = time.UnixMicro(at).UTC(), audit.Hash(prev), audit.Hash(hash)
	return &r, nil
}

// AuditEnd is the end of the chain.
func (t *Tx) AuditEnd(ctx context.Context) (audit.Checkpoint, error) {
	r, err := scanAudit(t.tx.QueryRowContext(ctx, "SELECT "+auditColumns+" FROM audit ORDER BY seq DESC LIMIT 1"))
	if errors.Is(err, sql.ErrNoRows) {
		return audit.Checkpoint{}, nil
	}
	if err != nil {
		return audit.Checkpoint{}, err
	}
	return r.Checkpoint(), nil
}

// AppendAudit seals a record onto the chain, in the transaction of what it is
// about.
func (t *Tx) AppendAudit(ctx context.Context, r *audit.Record) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	end, err := t.AuditEnd(ctx)
	if err != nil {
		return err
	}
	r.At = t.now
	if err := r.Seal(end); err != nil {
		return err
	}
	_, err = t.tx.ExecContext(ctx, "INSERT INTO audit ("+auditColumns+") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
		int64(r.Seq), r.At.UnixMicro(), r.Actor, r.Action, r.Target, string(r.Outcome), r.Reason, r.Detail, r.Prev[:], r.Hash[:]) //nolint:gosec // counts from 1
	return err
}

// Audit returns the records after a number, in order; at most limit.
func (t *Tx) Audit(ctx context.Context, after uint64, limit int) ([]audit.Record, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT "+auditColumns+" FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2", int64(after), limit) //nolint:gosec // counts from 1
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []audit.Record
	for rows.Next() {
		r, err := scanAudit(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, *r)
	}
	return out, rows.Err()
}
