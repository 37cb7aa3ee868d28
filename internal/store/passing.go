package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/errs"
)

// Bounds of what is kept for a while.
const (
	maxPassing = 256 << 10 // bytes of a value
	sweepMany  = 100       // that are forgotten in one go
)

// Keep keeps a value under a key until a time, in the place of what was there.
// It forgets some of what is over, so that the table stays small.
func (t *Tx) Keep(ctx context.Context, key string, value []byte, until time.Time) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	if len(value) > maxPassing {
		return fmt.Errorf("keep %s: %d bytes (at most %d): %w", key, len(value), maxPassing, errs.Invalid)
	}
	_, err := t.tx.ExecContext(ctx, "DELETE FROM passing WHERE key IN (SELECT key FROM passing WHERE until_us <= $1 ORDER BY until_us LIMIT $2)", t.now.UnixMicro(), sweepMany)
	if err != nil {
		return err
	}
	_, err = t.tx.ExecContext(ctx, `INSERT INTO passing (key, value, until_us) VALUES ($1, $2, $3)
		ON CONFLICT (key) DO UPDATE SET value = excluded.value, until_us = excluded.until_us`, key, append([]byte{}, value...), until.UnixMicro())
	return err
}

// Kept returns a value that Keep kept; errs.NotFound if there is none or its
// time is over.
func (t *Tx) Kept(ctx context.Context, key string) ([]byte, error) {
	var value []byte
	err := t.tx.QueryRowContext(ctx, "SELECT value FROM passing WHERE key = $1 AND until_us > $2", key, t.now.UnixMicro()).Scan(&value)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("%s: %w", key, errs.NotFound)
	}
	return value, err
}

// Forget removes a value before its time. One that is not there is no error.
func (t *Tx) Forget(ctx context.Context, key string) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "DELETE FROM passing WHERE key = $1", key)
	return err
}
