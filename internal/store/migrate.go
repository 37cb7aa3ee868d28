package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

//go:embed migrations/*.sql
var migrations embed.FS

// migrate brings the schema up to date: forward only, all steps in one
// transaction, so that a failure leaves what was there. Replicas that start at
// once do it one after the other. An applied migration is never edited: code
// must run before and after each.
func (s *Store) migrate(ctx context.Context) error {
	files, err := fs.Glob(migrations, "migrations/*.sql") // sorted
	if err != nil {
		return err
	}
	return s.in(ctx, &sql.TxOptions{}, func(tx *Tx) error {
		if s.dialect.lock != "" {
			if _, err := tx.tx.ExecContext(ctx, s.dialect.lock); err != nil {
				return err
			}
		}
		if _, err := tx.tx.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS migration (number BIGINT PRIMARY KEY, name TEXT NOT NULL, at_us BIGINT NOT NULL)"); err != nil {
			return err
		}
		var have int
		if err := tx.tx.QueryRowContext(ctx, "SELECT COALESCE(MAX(number), 0) FROM migration").Scan(&have); err != nil {
			return err
		}
		if have > len(files) {
			return fmt.Errorf("the database has schema %d, this version of Ringwall knows %d: use the version that wrote it, or a later one: %w", have, len(files), errs.Conflict)
		}
		for i := have; i < len(files); i++ {
			if err := s.step(ctx, tx, i+1, files[i]); err != nil {
				return fmt.Errorf("migration %s: %w", files[i], err)
			}
		}
		return nil
	})
}

func (s *Store) step(ctx context.Context, tx *Tx, number int, file string) error {
	name := strings.TrimSuffix(strings.TrimPrefix(file, "migrations/"), ".sql")
	digits, name, _ := strings.Cut(name, "_")
	if n, err := strconv.Atoi(digits); err != nil || n != number {
		return errors.New("not numbered in sequence")
	}
	text, err := migrations.ReadFile(file)
	if err != nil {
		return err
	}
	// one statement at a time, as the PostgreSQL driver wants it
	for stmt := range strings.SplitSeq(s.dialect.types.Replace(string(text)), ";\n") {
		if strings.TrimSpace(stmt) == "" {
			continue
		}
		if _, err := tx.tx.ExecContext(ctx, stmt); err != nil {
			return err
		}
	}
	_, err = tx.tx.ExecContext(ctx, "INSERT INTO migration (number, name, at_us) VALUES ($1, $2, $3)", number, name, tx.now.UnixMicro())
	return err
}
