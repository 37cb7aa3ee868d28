package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"ringwall/internal/audit"
	"ringwall/internal/errs"
)

// AuditAfter returns the audit records after a number, in order, at most limit.
func (s *Store) AuditAfter(ctx context.Context, after uint64, limit int) ([]audit.Record, error) {
	var out []audit.Record
	err := s.Read(ctx, func(tx *Tx) (err error) {
		out, err = tx.Audit(ctx, after, limit)
		return err
	})
	return out, err
}

// AuditEnd is the end of the audit log.
func (s *Store) AuditEnd(ctx context.Context) (audit.Checkpoint, error) {
	var out audit.Checkpoint
	err := s.Read(ctx, func(tx *Tx) (err error) {
		out, err = tx.AuditEnd(ctx)
		return err
	})
	return out, err
}

// Outbox returns how far a reader of the audit log has come, and what it keeps
// beside; zero for one that never said.
func (s *Store) Outbox(ctx context.Context, name string) (position uint64, state string, err error) {
	err = s.Read(ctx, func(tx *Tx) error {
		position, state = 0, ""
		err := tx.tx.QueryRowContext(ctx, "SELECT position, state FROM outbox WHERE name = $1", name).Scan(&position, &state)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	if err != nil {
		return 0, "", fmt.Errorf("outbox %s: %w", name, err)
	}
	return position, state, nil
}

// SetOutbox keeps how far a reader has come. It never goes back: errs.Conflict.
func (s *Store) SetOutbox(ctx context.Context, name string, position uint64, state string) error {
	err := s.Write(ctx, func(tx *Tx) error {
		done, err := tx.tx.ExecContext(ctx, `INSERT INTO outbox (name, position, state, at_us) VALUES ($1, $2, $3, $4)
			ON CONFLICT (name) DO UPDATE SET position = excluded.position, state = excluded.state, at_us = excluded.at_us
			WHERE outbox.position <= excluded.position`,
			name, int64(position), state, tx.now.UnixMicro()) //nolint:gosec // counts from 1
		if err != nil {
			return err
		}
		if n, err := done.RowsAffected(); err != nil || n != 1 {
			return errors.Join(err, fmt.Errorf("it is past %d already: %w", position, errs.Conflict))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("outbox %s: %w", name, err)
	}
	return nil
}
