package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/errs"
)

// Time decides only who may try to hold a lease; who may write is decided by its
// fence, in the transaction of the write. So no clock can make two holders
// write: a wrong clock costs a change of holders or, at worst, some waiting.
//
// The time is the database's, one clock for all replicas. Should it be set back,
// a row's end lies further ahead than any holder would have written it: such a
// row counts as over, so that nobody waits for more than two terms for a holder
// that is gone.

// AcquireLease makes owner the holder of a lease for a term, and returns the
// fence of this holding: a number higher than any before. While another holds
// it, it is errs.Conflict. Owners are processes: each has a name of its own,
// drawn at its start; one that asks again gets another fence. All contenders for
// a lease must use the same term.
func (s *Store) AcquireLease(ctx context.Context, name, owner string, term time.Duration) (fence uint64, err error) {
	if name == "" || owner == "" || term <= 0 {
		return 0, fmt.Errorf("acquire lease %q for %q for %s: %w", name, owner, term, errs.Invalid)
	}
	err = s.Write(ctx, func(tx *Tx) error {
		now, err := tx.databaseTime(ctx)
		if err != nil {
			return err
		}
		err = tx.tx.QueryRowContext(ctx, `INSERT INTO lease (name, owner, until_us, fence) VALUES ($1, $2, $3, 1)
			ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until_us = excluded.until_us, fence = lease.fence + 1
			WHERE lease.owner = excluded.owner OR lease.until_us <= $4 OR lease.until_us > $3 RETURNING fence`,
			name, owner, now+term.Microseconds(), now).Scan(&fence)
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		var holder string
		if err := tx.tx.QueryRowContext(ctx, "SELECT owner FROM lease WHERE name = $1", name).Scan(&holder); err != nil {
			return err
		}
		return fmt.Errorf("%s holds it: %w", holder, errs.Conflict)
	})
	if err != nil {
		return 0, fmt.Errorf("acquire lease %s: %w", name, err)
	}
	return fence, nil
}

// RenewLease prolongs a holding by a term from now. errs.Conflict: another has
// the lease now, and whoever asks must stop.
func (s *Store) RenewLease(ctx context.Context, name string, fence uint64, term time.Duration) error {
	return s.endLease(ctx, "renew", name, fence, term)
}

// ReleaseLease ends a holding, so that another need not wait for its end.
// errs.Conflict: it ended already.
func (s *Store) ReleaseLease(ctx context.Context, name string, fence uint64) error {
	return s.endLease(ctx, "release", name, fence, 0)
}

// EndLeases ends every holding, for a process that knows that it is the only one
// with this database: what one before it held when it was killed need not be
// waited for. Fences go on growing.
func (s *Store) EndLeases(ctx context.Context) error {
	err := s.Write(ctx, func(tx *Tx) error {
		_, err := tx.tx.ExecContext(ctx, "UPDATE lease SET until_us = 0")
		return err
	})
	if err != nil {
		return fmt.Errorf("end leases: %w", err)
	}
	return nil
}

func (s *Store) endLease(ctx context.Context, what, name string, fence uint64, term time.Duration) error {
	err := s.Write(ctx, func(tx *Tx) error {
		if err := tx.CheckFence(ctx, name, fence); err != nil {
			return err
		}
		now, err := tx.databaseTime(ctx)
		if err != nil {
			return err
		}
		_, err = tx.tx.ExecContext(ctx, "UPDATE lease SET until_us = $1 WHERE name = $2", now+term.Microseconds(), name)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s lease %s: %w", what, name, err)
	}
	return nil
}

// CheckFence fails with errs.Conflict if a lease has had another holder since.
// What else the transaction writes is then not written: it fails closed. A
// holding whose time is over and that nobody took is still one.
func (t *Tx) CheckFence(ctx context.Context, name string, fence uint64) error {
	var now uint64
	err := t.tx.QueryRowContext(ctx, "SELECT fence FROM lease WHERE name = $1", name).Scan(&now)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return fmt.Errorf("lease %s: nobody ever held it: %w", name, errs.Conflict)
	case err == nil && now != fence:
		return fmt.Errorf("lease %s: holding %d is over, %d is the newest: %w", name, fence, now, errs.Conflict)
	}
	return err
}

// databaseTime is the database's clock, in microseconds since 1970, and not the
// time when the transaction began: it may have waited for its turn.
func (t *Tx) databaseTime(ctx context.Context) (int64, error) {
	var us int64
	err := t.tx.QueryRowContext(ctx, "SELECT "+t.clock).Scan(&us)
	return us, err
}
