package store

import (
	"context"
	"fmt"

	"ringwall/internal/errs"
)

// skip is by how much a restored database's counter goes ahead: more than were
// ever given out since its copy was made.
const skip = 1 << 32

// CheckFile looks for damage in the file of an SQLite database. errs.Invalid: it
// is damaged.
func (s *Store) CheckFile(ctx context.Context) error {
	if s.file == "" {
		return nil
	}
	var said string
	if err := s.db.QueryRowContext(ctx, "PRAGMA integrity_check(1)").Scan(&said); err != nil {
		return fmt.Errorf("check database: %w", err)
	}
	if said != "ok" {
		return fmt.Errorf("check database: it is damaged: %s: %w", said, errs.Invalid)
	}
	return nil
}

// Restored makes a database that was restored from a copy go on with revisions
// that were never given out. Otherwise a revision from before could come twice:
// a watcher would take it for one that it has, and a change would overwrite
// another that it never saw. Watchers are told to list everything anew.
func (t *Tx) Restored(ctx context.Context) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "UPDATE revision SET last = last + $1 WHERE one = 1", int64(skip))
	return err
}
