package store

import (
	"context"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"
)

// NetworkFS opens networkFS to tests.
var NetworkFS = networkFS

// MakeLater makes the database one of a later version.
func (s *Store) MakeLater(ctx context.Context) error {
	_, err := s.db.ExecContext(ctx, "INSERT INTO migration (number, name, at_us) VALUES (99, 'later', 0)")
	return err
}

// StepClock does to a lease what setting the database's clock does: an end that
// was written by the old clock is by d later or earlier on the new one.
func (s *Store) StepClock(ctx context.Context, lease string, d time.Duration) error {
	_, err := s.db.ExecContext(ctx, "UPDATE lease SET until_us = until_us - $1 WHERE name = $2", d.Microseconds(), lease)
	return err
}

// OpenAt opens a database as the version did whose last migration this was, and
// puts rows into its tables: columns, and values in their order.
func OpenAt(ctx context.Context, url string, migration int, rows func(insert func(table string, columns []string, values []any) error) error) error {
	s, err := connect(url)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.migrate(ctx, migration); err != nil {
		return err
	}
	return rows(func(table string, columns []string, values []any) error {
		places := make([]string, len(columns))
		for i := range places {
			places[i] = fmt.Sprint("$", i+1)
		}
		if table == "revision" { // which begins with its one row
			if _, err := s.db.ExecContext(ctx, "DELETE FROM revision"); err != nil {
				return err
			}
		}
		_, err := s.db.ExecContext(ctx, "INSERT INTO "+table+" ("+strings.Join(columns, ", ")+") VALUES ("+strings.Join(places, ", ")+")", values...)
		return err
	})
}

// Migrations are the numbers of all that there are.
func Migrations() ([]int, error) {
	files, err := fs.Glob(migrations, "migrations/*.sql")
	var out []int
	for _, f := range files {
		n, err := strconv.Atoi(strings.TrimPrefix(f, "migrations/")[:4])
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, err
}

// SetClock gives the process another clock.
func (s *Store) SetClock(now func() time.Time) { s.now = now }
