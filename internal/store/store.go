// Package store keeps the server's state in SQL: one text for two engines,
// SQLite in a directory (the default) and PostgreSQL for several replicas. It
// holds no rules: who may do what, and what a document means, is decided above.
//
// Times are stored in microseconds since 1970, UTC; what is compared by byte
// (keys, types) is in lower case.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// Store is a database. It may be used by several goroutines.
type Store struct {
	db      *sql.DB
	dialect dialect
	file    string // of SQLite
	now     func() time.Time
}

// Open opens the database of a URL and brings its schema up to date:
//
//	sqlite:DIRECTORY      a file in a directory, which is made if need be
//	postgres://…          as libpq has it; PostgreSQL 15 or later
//
// A database of a later version of Ringwall is errs.Conflict. A directory on a
// network file system is errs.Unsupported: SQLite loses data there.
func Open(ctx context.Context, url string) (*Store, error) {
	s, err := open(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	return s, nil
}

func open(ctx context.Context, url string) (*Store, error) {
	s, err := connect(url)
	if err != nil {
		return nil, err
	}
	if err := s.migrate(ctx, latest); err != nil {
		return nil, errors.Join(s.clean(err, url), s.db.Close())
	}
	if s.file != "" {
		err = os.Chmod(s.file, 0o600)
	}
	return s, err
}

func connect(url string) (*Store, error) {
	s := &Store{now: time.Now}
	var err error
	if dir, ok := strings.CutPrefix(url, "sqlite:"); ok {
		s.dialect, s.file = onSQLite(), filepath.Join(dir, "control.db")
		if err := prepareDir(dir); err != nil {
			return nil, err
		}
		s.db, err = sql.Open(s.dialect.driver, sqliteName(s.file))
	} else if strings.HasPrefix(url, "postgres://") || strings.HasPrefix(url, "postgresql://") {
		s.dialect = onPostgres()
		s.db, err = sql.Open(s.dialect.driver, url)
	} else {
		return nil, fmt.Errorf("neither sqlite:DIRECTORY nor postgres://…: %w", errs.Invalid)
	}
	if err != nil {
		return nil, s.clean(err, url)
	}
	s.db.SetMaxOpenConns(16)
	s.db.SetMaxIdleConns(8) // of two, which is the default, most would be made anew for each transaction
	return s, nil
}

// clean keeps a password in the URL out of messages.
func (s *Store) clean(err error, url string) error {
	if err != nil && strings.Contains(err.Error(), url) {
		return errors.New(strings.ReplaceAll(err.Error(), url, "the database"))
	}
	return err
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// Engine is the name of the engine: sqlite or postgres.
func (s *Store) Engine() string { return s.dialect.name }

// Backup writes a copy of an SQLite database, consistent while others write,
// to a file that does not exist. Of PostgreSQL it is errs.Unsupported: use its
// own tools.
func (s *Store) Backup(ctx context.Context, file string) error {
	if s.file == "" {
		return fmt.Errorf("back up PostgreSQL with pg_dump or its archive of write-ahead logs: %w", errs.Unsupported)
	}
	if _, err := os.Lstat(file); err == nil {
		return fmt.Errorf("back up to %s: it exists: %w", file, errs.Conflict)
	}
	if _, err := s.db.ExecContext(ctx, "VACUUM INTO $1", file); err != nil {
		return fmt.Errorf("back up to %s: %w", file, err)
	}
	return os.Chmod(file, 0o600)
}

// Tx is a transaction. Its methods are used by one goroutine.
type Tx struct {
	tx       *sql.Tx
	now      time.Time
	clock    string // see dialect
	readOnly bool   // SQLite's driver does not hold readers to it
}

func (t *Tx) mayWrite() error {
	if t.readOnly {
		return errors.New("store: a write in a reading transaction")
	}
	return nil
}

const maxTries = 20

// Write runs fn in a transaction that sees and changes the newest state: writers
// follow one another. fn may run several times, and must do nothing but use tx.
// The transaction is committed if fn returns nil.
func (s *Store) Write(ctx context.Context, fn func(*Tx) error) error {
	return s.in(ctx, &sql.TxOptions{}, func(tx *Tx) error {
		// whoever holds this row is the one writer
		if _, err := tx.tx.ExecContext(ctx, "UPDATE revision SET last = last WHERE one = 1"); err != nil {
			return err
		}
		return fn(tx)
	})
}

// Read runs fn in a transaction that sees one state and cannot change it.
func (s *Store) Read(ctx context.Context, fn func(*Tx) error) error {
	return s.in(ctx, &sql.TxOptions{ReadOnly: true, Isolation: s.dialect.snapshot}, fn)
}

func (s *Store) in(ctx context.Context, o *sql.TxOptions, fn func(*Tx) error) error {
	for try := 1; ; try++ {
		err := s.once(ctx, o, fn)
		if err == nil || try == maxTries || !s.dialect.retryable(err) {
			return err
		}
		pause := time.Duration(rand.Int64N(int64(time.Millisecond) << min(try, 8))) //nolint:gosec // no secret
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

func (s *Store) once(ctx context.Context, o *sql.TxOptions, fn func(*Tx) error) error {
	tx, err := s.db.BeginTx(ctx, o)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	if err := fn(&Tx{tx: tx, now: s.now().UTC().Truncate(time.Microsecond), clock: s.dialect.clock, readOnly: o.ReadOnly}); err != nil {
		return err
	}
	return tx.Commit()
}

// Now is the time that the transaction's writes have.
func (t *Tx) Now() time.Time { return t.now }
