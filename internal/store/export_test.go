package store

import (
	"context"
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
