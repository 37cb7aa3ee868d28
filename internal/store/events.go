package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/fleet"
)

// Events is where what hosts report is stored: apart from the tree, so that
// neither slows the other down.
//
// On SQLite that is a file for each day, events-YYYYMMDD.db, and inventory.db,
// beside control.db: forgetting a day is deleting its file. They are written with
// synchronous NORMAL: what was acknowledged survives the death of the process,
// and a power cut can take the last moments of it. On PostgreSQL it is a table a
// day in the same database, with its durability.
type Events struct {
	dialect dialect
	dir     string // of SQLite
	main    *sql.DB
	serial  atomic.Uint64

	mu   sync.Mutex
	days map[string]*sql.DB // open ones, by day; of PostgreSQL all are main
}

// OpenEvents opens what Open's URL keeps of events. The database itself must have
// been opened by Open before, which makes it.
func OpenEvents(ctx context.Context, url string) (*Events, error) {
	e := &Events{days: map[string]*sql.DB{}}
	if dir, ok := strings.CutPrefix(url, "sqlite:"); ok {
		e.dialect, e.dir = onSQLite(), dir
		db, err := e.openFile(ctx, "inventory.db", "inventory")
		if err != nil {
			return nil, fmt.Errorf("open events: %w", err)
		}
		e.main = db
		return e, nil
	}
	e.dialect = onPostgres()
	db, err := sql.Open(e.dialect.driver, url)
	if err != nil {
		return nil, fmt.Errorf("open events: %w", (&Store{}).clean(err, url))
	}
	db.SetMaxOpenConns(8)
	db.SetMaxIdleConns(8)
	e.main = db
	return e, nil
}

// openFile opens an SQLite file with the tables of migration 0004.
func (e *Events) openFile(ctx context.Context, name, what string) (*sql.DB, error) {
	file := filepath.Join(e.dir, name)
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600) // SQLite's files beside it get its mode
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return nil, err
	}
	db, err := sql.Open(e.dialect.driver, strings.Replace(sqliteName(file), "synchronous%28FULL%29", "synchronous%28NORMAL%29", 1))
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(4)
	db.SetMaxIdleConns(2)
	text, err := migrations.ReadFile("migrations/0004_events.sql")
	if err == nil {
		tables := strings.NewReplacer("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", "CREATE INDEX ", "CREATE INDEX IF NOT EXISTS ").Replace(e.dialect.types.Replace(string(text)))
		_, err = db.ExecContext(ctx, tables)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s of %s: %w", name, what, err), db.Close())
	}
	return db, nil
}

// Close closes everything.
func (e *Events) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	err := e.main.Close()
	for _, db := range e.days {
		if db != e.main {
			err = errors.Join(err, db.Close())
		}
	}
	return err
}

func dayOf(t time.Time) string { return t.UTC().Format("20060102") }

// day opens a day's events. Days that there never were are made only if made is
// set; else it is errs.NotFound.
func (e *Events) day(ctx context.Context, day string, made bool) (*sql.DB, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if db := e.days[day]; db != nil {
		return db, nil
	}
	db := e.main
	if e.dir != "" {
		if !made {
			if _, err := os.Lstat(filepath.Join(e.dir, "events-"+day+".db")); err != nil {
				return nil, fmt.Errorf("events of %s: %w", day, errs.NotFound)
			}
		}
		var err error
		if db, err = e.openFile(ctx, "events-"+day+".db", day); err != nil {
			return nil, err
		}
	} else if !made {
		days, err := e.list(ctx)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(days, day) {
			return nil, fmt.Errorf("events of %s: %w", day, errs.NotFound)
		}
	}
	for _, stmt := range []string{
		"CREATE TABLE IF NOT EXISTS event_" + day + ` (host @KEY NOT NULL, stream @BYTES NOT NULL, number BIGINT NOT NULL, received_us BIGINT NOT NULL, at_us BIGINT NOT NULL,
			what TEXT NOT NULL, name TEXT NOT NULL, sha256 @BYTES, path TEXT NOT NULL, body @BYTES NOT NULL, PRIMARY KEY (host, stream, number))`,
		"CREATE INDEX IF NOT EXISTS event_" + day + "_received ON event_" + day + " (received_us)",
	} {
		_, err := db.ExecContext(ctx, e.dialect.types.Replace(stmt))
		if err != nil && e.dir == "" { // another replica made it at the same moment
			_, err = db.ExecContext(ctx, e.dialect.types.Replace(stmt))
		}
		if err != nil {
			return nil, err
		}
	}
	e.days[day] = db
	return db, nil
}

// list are the days that there are, the newest first.
func (e *Events) list(ctx context.Context) ([]string, error) {
	var out []string
	if e.dir != "" {
		files, err := filepath.Glob(filepath.Join(e.dir, "events-????????.db"))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			out = append(out, strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), "events-"), ".db"))
		}
	} else {
		rows, err := e.main.QueryContext(ctx, "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema() AND tablename LIKE 'event\\_________'")
		if err != nil {
			return nil, err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var name string
			if err := rows.Scan(&name); err != nil {
				return nil, err
			}
			out = append(out, strings.TrimPrefix(name, "event_"))
		}
		if err := rows.Err(); err != nil {
			return nil, err
		}
	}
	out = slices.DeleteFunc(out, func(day string) bool { _, err := time.Parse("20060102", day); return err != nil })
	slices.Sort(out)
	slices.Reverse(out)
	return out, nil
}

// in runs fn in a transaction, again when the database asks for it.
func (e *Events) in(ctx context.Context, db *sql.DB, fn func(*sql.Tx) error) error {
	s := &Store{db: db, dialect: e.dialect, now: time.Now}
	return s.in(ctx, &sql.TxOptions{}, func(tx *Tx) error { return fn(tx.tx) })
}

// orderedID is a name that sorts by time and, within one process, by order.
func (e *Events) orderedID(at time.Time) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return fmt.Sprintf("%016x%016x%x", at.UnixMicro(), e.serial.Add(1), b)
}

// AppendEvents stores a batch: events of one day, how far their hosts are stored
// now, and what is to be handed on of it by a process; all of it or nothing.
// Events that are there already are left out.
func (e *Events) AppendEvents(ctx context.Context, at time.Time, all []fleet.Event, positions []fleet.Position, node string, outbox []byte) error {
	day := dayOf(at)
	db, err := e.day(ctx, day, true)
	if err != nil {
		return fmt.Errorf("store events: %w", err)
	}
	err = e.in(ctx, db, func(tx *sql.Tx) error {
		for rest := all; len(rest) > 0; {
			n := min(len(rest), e.dialect.rows(10))
			args := make([]any, 0, 10*n)
			for i := range rest[:n] {
				v := &rest[i]
				args = append(args, v.Host, v.Stream, int64(v.Number), v.Received.UnixMicro(), v.At.UnixMicro(), v.What, v.Name, orNull(v.SHA256), v.Path, append([]byte{}, v.Body...)) //nolint:gosec // bounded by the caller
			}
			_, err := tx.ExecContext(ctx, bulk("INSERT INTO event_"+day+" (host, stream, number, received_us, at_us, what, name, sha256, path, body) VALUES ", n, 10, "",
				" ON CONFLICT (host, stream, number) DO NOTHING"), args...)
			if err != nil {
				return err
			}
			rest = rest[n:]
		}
		if err := savePositions(ctx, tx, &e.dialect, positions); err != nil {
			return err
		}
		if len(outbox) == 0 {
			return nil
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO fleet_outbox (id, node, at_us, body) VALUES ($1, $2, $3, $4)", e.orderedID(at), node, at.UnixMicro(), outbox)
		return err
	})
	if err != nil {
		return fmt.Errorf("store %d events: %w", len(all), err)
	}
	return nil
}

func savePositions(ctx context.Context, tx *sql.Tx, d *dialect, all []fleet.Position) error {
	// in one order, so that replicas do not wait for each other
	all = slices.SortedStableFunc(slices.Values(all), func(a, b fleet.Position) int { return strings.Compare(a.Host, b.Host) })
	for rest := all; len(rest) > 0; {
		n := min(len(rest), d.rows(4))
		args := make([]any, 0, 4*n)
		for _, p := range rest[:n] {
			args = append(args, p.Host, p.Lane, p.Stream, int64(p.UpTo)) //nolint:gosec // bounded by the caller
		}
		_, err := tx.ExecContext(ctx, bulk("INSERT INTO fleet_position (host, lane, stream, up_to) VALUES ", n, 4, "",
			` ON CONFLICT (host, lane) DO UPDATE SET stream = excluded.stream, up_to = excluded.up_to
			WHERE fleet_position.stream <> excluded.stream OR fleet_position.up_to < excluded.up_to`), args...)
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// Position is how far a lane of a host is stored; errs.NotFound if nothing of it
// is.
func (e *Events) Position(ctx context.Context, host string, lane int) (*fleet.Position, error) {
	dbs := []*sql.DB{e.main}
	if e.dir != "" && lane == fleet.LaneBlocks {
		var err error
		if dbs, err = e.each(ctx); err != nil {
			return nil, err
		}
	}
	for _, db := range dbs {
		p := fleet.Position{Host: host, Lane: lane}
		var upTo int64
		err := db.QueryRowContext(ctx, "SELECT stream, up_to FROM fleet_position WHERE host = $1 AND lane = $2", host, lane).Scan(&p.Stream, &upTo)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		p.UpTo = uint64(upTo) //nolint:gosec // was stored from one
		return &p, err
	}
	return nil, fmt.Errorf("position of %s: %w", host, errs.NotFound)
}

// each are the databases of all days, the newest first.
func (e *Events) each(ctx context.Context) ([]*sql.DB, error) {
	days, err := e.list(ctx)
	if err != nil {
		return nil, err
	}
	var out []*sql.DB
	for _, d := range days {
		db, err := e.day(ctx, d, false)
		if errors.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, db)
	}
	return out, nil
}

// Undelivered returns the oldest batches that were not handed on: those of a
// process, and others' from before a time.
func (e *Events) Undelivered(ctx context.Context, node string, before time.Time, limit int) (ids []string, bodies [][]byte, err error) {
	dbs := []*sql.DB{e.main}
	if e.dir != "" {
		if dbs, err = e.each(ctx); err != nil {
			return nil, nil, err
		}
		slices.Reverse(dbs)
	}
	for _, db := range dbs {
		if ids, bodies, err = undelivered(ctx, db, node, before, limit, ids, bodies); err != nil || len(ids) >= limit {
			return ids, bodies, err
		}
	}
	return ids, bodies, nil
}

func undelivered(ctx context.Context, db *sql.DB, node string, before time.Time, limit int, ids []string, bodies [][]byte) ([]string, [][]byte, error) {
	rows, err := db.QueryContext(ctx, "SELECT id, body FROM fleet_outbox WHERE node = $1 OR at_us < $2 ORDER BY id LIMIT $3", node, before.UnixMicro(), limit-len(ids))
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var id string
		var body []byte
		if err := rows.Scan(&id, &body); err != nil {
			return nil, nil, err
		}
		ids, bodies = append(ids, id), append(bodies, body)
	}
	return ids, bodies, rows.Err()
}

// Delivered forgets a batch that was handed on.
func (e *Events) Delivered(ctx context.Context, id string) error {
	dbs := []*sql.DB{e.main}
	if e.dir != "" {
		var err error
		if dbs, err = e.each(ctx); err != nil {
			return err
		}
	}
	for _, db := range dbs {
		r, err := db.ExecContext(ctx, "DELETE FROM fleet_outbox WHERE id = $1", id)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n > 0 {
			return err
		}
	}
	return nil
}

// QueryEvents returns events, the newest first.
func (e *Events) QueryEvents(ctx context.Context, q fleet.EventQuery) ([]fleet.Event, error) {
	days, err := e.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	if q.Until.IsZero() {
		q.Until = time.Now()
	}
	var out []fleet.Event
	for _, d := range days {
		if d < dayOf(q.Since) || d > dayOf(q.Until) || len(out) >= q.Limit {
			continue
		}
		db, err := e.day(ctx, d, false)
		if errors.Is(err, errs.NotFound) {
			continue
		}
		if err == nil {
			out, err = queryDay(ctx, db, d, &q, out)
		}
		if err != nil {
			return nil, fmt.Errorf("read events of %s: %w", d, err)
		}
	}
	return out, nil
}

func queryDay(ctx context.Context, db *sql.DB, day string, q *fleet.EventQuery, out []fleet.Event) ([]fleet.Event, error) {
	where, args := "received_us >= $1 AND received_us <= $2", []any{q.Since.UnixMicro(), q.Until.UnixMicro(), q.Limit - len(out)}
	for _, c := range []struct {
		column string
		value  any
		asked  bool
	}{
		{"host", q.Host, q.Host != ""},
		{"sha256", q.SHA256[:], !q.SHA256.IsZero()},
		{"what", q.What, q.What != ""},
	} {
		if c.asked {
			args = append(args, c.value)
			where += fmt.Sprintf(" AND %s = $%d", c.column, len(args))
		}
	}
	rows, err := db.QueryContext(ctx, "SELECT host, stream, number, received_us, at_us, what, name, sha256, path, body FROM event_"+day+" WHERE "+where+ //nolint:gosec // of texts that stand above, and a day
		" ORDER BY received_us DESC, host, number DESC LIMIT $3", args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var v fleet.Event
		var number, received, at int64
		var sum []byte
		if err := rows.Scan(&v.Host, &v.Stream, &number, &received, &at, &v.What, &v.Name, &sum, &v.Path, &v.Body); err != nil {
			return nil, err
		}
		v.Number, v.Received, v.At = uint64(number), time.UnixMicro(received).UTC(), time.UnixMicro(at).UTC() //nolint:gosec // was stored from one
		copy(v.SHA256[:], sum)
		out = append(out, v)
	}
	return out, rows.Err()
}

// RecordSignals stores signals, for replicas and for those who come later.
func (e *Events) RecordSignals(ctx context.Context, all []fleet.Signal) error {
	for rest := all; len(rest) > 0; {
		n := min(len(rest), e.dialect.rows(5))
		args := make([]any, 0, 5*n)
		for _, s := range rest[:n] {
			args = append(args, e.orderedID(s.At), s.At.UnixMicro(), s.Host, s.Name, s.Text)
		}
		if _, err := e.main.ExecContext(ctx, bulk("INSERT INTO fleet_signal (id, at_us, host, name, text) VALUES ", n, 5, "", ""), args...); err != nil {
			return fmt.Errorf("store %d signals: %w", len(all), err)
		}
		rest = rest[n:]
	}
	return nil
}

// SignalsSince returns signals since a time, the oldest first.
func (e *Events) SignalsSince(ctx context.Context, since time.Time) ([]fleet.Signal, error) {
	rows, err := e.main.QueryContext(ctx, "SELECT at_us, host, name, text FROM fleet_signal WHERE at_us >= $1 ORDER BY at_us, id", since.UnixMicro())
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []fleet.Signal
	for rows.Next() {
		var s fleet.Signal
		var at int64
		if err := rows.Scan(&at, &s.Host, &s.Name, &s.Text); err != nil {
			return nil, err
		}
		s.At = time.UnixMicro(at).UTC()
		out = append(out, s)
	}
	return out, rows.Err()
}

// PruneEvents forgets the days before the day of a time, and signals before it.
func (e *Events) PruneEvents(ctx context.Context, before time.Time) error {
	days, err := e.list(ctx)
	if err != nil {
		return fmt.Errorf("forget events: %w", err)
	}
	for _, d := range days {
		if d < dayOf(before) {
			if err := e.drop(ctx, d); err != nil {
				return fmt.Errorf("forget events of %s: %w", d, err)
			}
		}
	}
	_, err = e.main.ExecContext(ctx, "DELETE FROM fleet_signal WHERE at_us < $1", before.UnixMicro())
	return err
}

func (e *Events) drop(ctx context.Context, day string) error {
	if e.dir == "" {
		e.mu.Lock()
		delete(e.days, day)
		e.mu.Unlock()
		_, err := e.main.ExecContext(ctx, "DROP TABLE IF EXISTS event_"+day)
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if db := e.days[day]; db != nil {
		delete(e.days, day)
		if err := db.Close(); err != nil {
			return err
		}
	}
	name := filepath.Join(e.dir, "events-"+day+".db")
	for _, end := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(name + end); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
