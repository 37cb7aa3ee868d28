package store

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

//go:embed migrations/*.sql
var migrations embed.FS

// latest stands for every migration that there is.
const latest = math.MaxInt

// migrate brings the schema up to date: forward only, all steps in one
// transaction, so that a failure leaves what was there. Replicas that start at
// once do it one after the other. An applied migration is never edited: code
// must run before and after each. upTo is the last one that is applied.
func (s *Store) migrate(ctx context.Context, upTo int) error {
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
		return s.steps(ctx, tx, files, upTo)
	})
}

// steps applies what the database has not had yet. Numbers may be left out.
func (s *Store) steps(ctx context.Context, tx *Tx, files []string, upTo int) error {
	have, err := tx.applied(ctx)
	if err != nil {
		return err
	}
	known := 0
	for _, file := range files {
		digits, name, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(file, "migrations/"), ".sql"), "_")
		number, err := strconv.Atoi(digits)
		if err != nil || number <= known {
			return fmt.Errorf("migration %s: not numbered in sequence", file)
		}
		known = number
		if slices.Contains(have, number) || number > upTo {
			continue
		}
		if err := s.step(ctx, tx, number, name, file); err != nil {
			return fmt.Errorf("migration %s: %w", file, err)
		}
	}
	if len(have) > 0 && have[len(have)-1] > known {
		return fmt.Errorf("the database has schema %d, this version of Ringwall knows %d: use the version that wrote it, or a later one: %w", have[len(have)-1], known, errs.Conflict)
	}
	return nil
}

// applied are the numbers of the migrations that the database has had, in order.
func (t *Tx) applied(ctx context.Context) ([]int, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT number FROM migration ORDER BY number")
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []int
	for rows.Next() {
		var n int
		if err := rows.Scan(&n); err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, rows.Err()
}

func (s *Store) step(ctx context.Context, tx *Tx, number int, name, file string) error {
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
