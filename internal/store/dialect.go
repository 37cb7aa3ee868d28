package store

import (
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"ringwall/internal/errs"
)

// dialect is all that the engines differ in.
type dialect struct {
	name, driver string
	types        *strings.Replacer // of the migrations
	snapshot     sql.IsolationLevel
	// clock is the time in microseconds since 1970.
	clock string
	// lock keeps others from migrating at the same time.
	lock      string
	retryable func(error) bool
}

func onSQLite() dialect {
	return dialect{
		name: "sqlite", driver: "sqlite",
		types:     strings.NewReplacer("@KEY", "TEXT", "@BYTES", "BLOB"),
		clock:     "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
		retryable: sqliteRetryable,
	}
}

func onPostgres() dialect {
	return dialect{
		name: "postgres", driver: "pgx",
		types:     strings.NewReplacer("@KEY", `TEXT COLLATE "C"`, "@BYTES", "BYTEA"),
		snapshot:  sql.LevelRepeatableRead,
		clock:     "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)",
		lock:      "SELECT pg_advisory_xact_lock(7245610837)",
		retryable: postgresRetryable,
	}
}

func sqliteRetryable(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	code := e.Code() & 0xff
	return code == sqlite3.SQLITE_BUSY || code == sqlite3.SQLITE_LOCKED
}

// postgresRetryable is a serialisation failure or a deadlock, class 40.
func postgresRetryable(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && strings.HasPrefix(e.Code, "40")
}

// Broken reports an error of the database or of the way to it, not of what was
// asked.
func Broken(err error) bool {
	if _, ok := errors.AsType[*sqlite.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[*pgconn.PgError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok { // a refused connection too
		return true
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, sql.ErrConnDone)
}

// sqliteName is the driver's name of a file. Every commit is on the disk before
// it is acknowledged (synchronous FULL).
func sqliteName(file string) string {
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {"journal_mode(WAL)", "synchronous(FULL)", "busy_timeout(10000)", "foreign_keys(1)", "trusted_schema(0)"}}
	return "file:" + (&url.URL{Path: file}).EscapedPath() + "?" + q.Encode()
}

// prepareDir makes the directory of an SQLite database, for its owner only.
func prepareDir(dir string) error {
	if dir == "" {
		return fmt.Errorf("sqlite: without a directory: %w", errs.Invalid)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if name := networkFS(st.Type); name != "" {
		return fmt.Errorf("%s is on %s, where SQLite loses data: use a local disk, or PostgreSQL: %w", dir, name, errs.Unsupported)
	}
	return nil
}

// networkFS names a file system that is not of this machine, by its magic
// number (statfs(2)); "" for others.
func networkFS(magic int64) string {
	switch uint32(magic) { //nolint:gosec // 32 bits on every architecture
	case 0x6969:
		return "NFS"
	case 0xff534d42, 0xfe534d42, 0x517b:
		return "SMB"
	case 0x01021997:
		return "9p"
	case 0x00c36400:
		return "Ceph"
	case 0x0bd00bd0:
		return "Lustre"
	case 0x47504653:
		return "GPFS"
	case 0x5346414f:
		return "AFS"
	case 0x65735546:
		return "FUSE"
	}
	return ""
}
