package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

const (
	// overlap is how far a reader of what others wrote looks back: a transaction
	// may become visible after a later one.
	overlap = 5 * time.Second
	// ChunkPart is the size of a stored part of a chunk, in bytes.
	ChunkPart = 1 << 20
	// inAtOnce is how many things a list in a statement names.
	inAtOnce = 200
)

const grantColumns = "host, resource, certificate, key, old_key, assigned, assigned_us, written_us"

func scanGrant(row interface{ Scan(...any) error }) (g fleet.Grant, written int64, err error) {
	var id string
	var key, old, assigned []byte
	var at int64
	if err = row.Scan(&g.Host, &id, &g.Certificate, &key, &old, &assigned, &at, &written); err != nil {
		return g, 0, err
	}
	if g.Resource, err = resource.ParseID(id); err != nil {
		return g, 0, fmt.Errorf("stored host %s: %w", g.Host, err)
	}
	copy(g.Key[:], key)
	copy(g.OldKey[:], old)
	copy(g.Assigned[:], assigned)
	if at != 0 {
		g.AssignedAt = time.UnixMicro(at).UTC()
	}
	return g, written, nil
}

// orNull is a digest as a column that may be null.
func orNull(d integrity.Digest) any {
	if d.IsZero() {
		return nil
	}
	return d[:]
}

// Grant returns what a host was given; errs.NotFound for a host that there never
// was.
func (t *Tx) Grant(ctx context.Context, host string) (*fleet.Grant, error) {
	g, _, err := scanGrant(t.tx.QueryRowContext(ctx, "SELECT "+grantColumns+" FROM fleet_host WHERE host = $1", host))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("host %s: %w", host, errs.NotFound)
	}
	return &g, err
}

// PutGrant stores a host's keys. What is meant for it is Assign's.
func (t *Tx) PutGrant(ctx context.Context, g *fleet.Grant) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, bulk("INSERT INTO fleet_host (host, resource, certificate, key, old_key, assigned_us, written_us) VALUES ", 1, 5, ", 0, "+t.clock,
		" ON CONFLICT (host) DO UPDATE SET certificate = excluded.certificate, key = excluded.key, old_key = excluded.old_key, written_us = excluded.written_us"),
		g.Host, g.Resource.String(), g.Certificate, g.Key[:], orNull(g.OldKey))
	return err
}

// Assign says which manifest is meant for hosts; the zero digest takes it away.
// Hosts that there never were are left out.
func (t *Tx) Assign(ctx context.Context, manifest integrity.Digest, hosts []string) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	for len(hosts) > 0 {
		n := min(len(hosts), inAtOnce)
		args := []any{orNull(manifest), t.now.UnixMicro()}
		for _, h := range hosts[:n] {
			args = append(args, h)
		}
		_, err := t.tx.ExecContext(ctx, "UPDATE fleet_host SET assigned = $1, assigned_us = $2, written_us = "+t.clock+" WHERE host IN "+tuple(3, n), args...) //nolint:gosec // the dialect's own text
		if err != nil {
			return err
		}
		hosts = hosts[n:]
	}
	return nil
}

// tuple is "($from, …)" with n parameters.
func tuple(from, n int) string {
	b := []byte{'('}
	for i := range n {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(append(b, '$'), int64(from+i), 10)
	}
	return string(append(b, ')'))
}

// rows is how many tuples of some width one statement may have. SQLite's driver
// looks each parameter up among all of them, so that long statements are slow
// there; on PostgreSQL each statement is a journey.
func (d *dialect) rows(width int) int {
	const few, many = 100, 5000 // parameters
	if d.name == "sqlite" {
		return max(1, few/width)
	}
	return many / width
}

// bulk is a statement with n tuples of width parameters each between head and
// tail, and a fixed end in each of them.
func bulk(head string, n, width int, end, tail string) string {
	var b strings.Builder
	b.WriteString(head)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		t := tuple(1+i*width, width)
		b.WriteString(t[:len(t)-1] + end + ")")
	}
	b.WriteString(tail)
	return b.String()
}

// GrantsSince returns what changed since a mark that an earlier call returned; 0
// for everything. Something may come twice.
func (s *Store) GrantsSince(ctx context.Context, mark int64) (out []fleet.Grant, next int64, err error) {
	err = s.Read(ctx, func(tx *Tx) error {
		out, next = nil, mark
		rows, err := tx.tx.QueryContext(ctx, "SELECT "+grantColumns+" FROM fleet_host WHERE written_us > $1 ORDER BY written_us", mark-overlap.Microseconds())
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			g, written, err := scanGrant(rows)
			if err != nil {
				return err
			}
			out, next = append(out, g), max(next, written)
		}
		return rows.Err()
	})
	return out, next, err
}

// SavePresence stores what a process heard of hosts. It is no change of the tree
// and waits for no other writer of it.
func (s *Store) SavePresence(ctx context.Context, node string, all []fleet.Presence) error {
	for len(all) > 0 {
		n := min(len(all), s.dialect.rows(5))
		args := make([]any, 0, 5*n)
		for i := range all[:n] {
			p := &all[i]
			report, err := json.Marshal(&p.Report)
			if err != nil {
				return err
			}
			labels, err := json.Marshal(p.Labels)
			if err != nil {
				return err
			}
			args = append(args, p.Host, node, p.Seen.UnixMicro(), string(report), string(labels))
		}
		err := s.in(ctx, &sql.TxOptions{}, func(tx *Tx) error {
			_, err := tx.tx.ExecContext(ctx, bulk("INSERT INTO fleet_presence (host, node, seen_us, report, labels, written_us) VALUES ", n, 5, ", "+tx.clock,
				` ON CONFLICT (host) DO UPDATE SET node = excluded.node, seen_us = excluded.seen_us, report = excluded.report, labels = excluded.labels, written_us = excluded.written_us
				WHERE excluded.seen_us >= fleet_presence.seen_us`), args...)
			return err
		})
		if err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// PresenceSince returns what other processes than node heard since a mark; 0 and
// "" for everything. Something may come twice.
func (s *Store) PresenceSince(ctx context.Context, node string, mark int64) (out []fleet.Presence, next int64, err error) {
	err = s.Read(ctx, func(tx *Tx) error {
		out, next = nil, mark
		rows, err := tx.tx.QueryContext(ctx, "SELECT host, seen_us, report, labels, written_us FROM fleet_presence WHERE written_us > $1 AND node <> $2", mark-overlap.Microseconds(), node)
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }()
		for rows.Next() {
			var p fleet.Presence
			var seen, written int64
			var report, labels string
			if err := rows.Scan(&p.Host, &seen, &report, &labels, &written); err != nil {
				return err
			}
			p.Seen = time.UnixMicro(seen).UTC()
			if err := errors.Join(json.Unmarshal([]byte(report), &p.Report), json.Unmarshal([]byte(labels), &p.Labels)); err != nil {
				return fmt.Errorf("stored report of %s: %w", p.Host, err)
			}
			out, next = append(out, p), max(next, written)
		}
		return rows.Err()
	})
	return out, next, err
}

// PutChunkPart stores a part of a chunk, whose digest the caller has compared.
// Parts are numbered from 0, and all but the last have ChunkPart bytes.
func (t *Tx) PutChunkPart(ctx context.Context, sha256 integrity.Digest, part int, data []byte) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "INSERT INTO fleet_chunk_part (sha256, part, data) VALUES ($1, $2, $3) ON CONFLICT (sha256, part) DO NOTHING", sha256[:], part, append([]byte{}, data...))
	return err
}

// PutChunk says that all parts of a chunk are stored.
func (t *Tx) PutChunk(ctx context.Context, sha256 integrity.Digest, size int64) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "INSERT INTO fleet_chunk (sha256, size, added_us) VALUES ($1, $2, $3) ON CONFLICT (sha256) DO NOTHING", sha256[:], size, t.now.UnixMicro())
	return err
}

// ChunkSize is the size of a chunk in bytes; errs.NotFound if it is not there, or
// not all of it.
func (t *Tx) ChunkSize(ctx context.Context, sha256 integrity.Digest) (int64, error) {
	var n int64
	err := t.tx.QueryRowContext(ctx, "SELECT size FROM fleet_chunk WHERE sha256 = $1", sha256[:]).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, fmt.Errorf("chunk %v: %w", sha256, errs.NotFound)
	}
	return n, err
}

// Chunk reads from a chunk, from an offset on, at most limit bytes, and returns
// its whole size. An offset at the end or after it reads nothing.
func (t *Tx) Chunk(ctx context.Context, sha256 integrity.Digest, offset int64, limit int) (data []byte, size int64, err error) {
	if size, err = t.ChunkSize(ctx, sha256); err != nil {
		return nil, 0, err
	}
	if offset < 0 || offset >= size || limit <= 0 {
		return nil, size, nil
	}
	end := min(size, offset+int64(limit))
	rows, err := t.tx.QueryContext(ctx, "SELECT data FROM fleet_chunk_part WHERE sha256 = $1 AND part >= $2 AND part <= $3 ORDER BY part", sha256[:], offset/ChunkPart, (end-1)/ChunkPart)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var part []byte
		if err := rows.Scan(&part); err != nil {
			return nil, 0, err
		}
		data = append(data, part...)
	}
	if err := rows.Err(); err != nil {
		return nil, 0, err
	}
	skip := offset % ChunkPart
	if int64(len(data)) < skip+end-offset {
		return nil, 0, fmt.Errorf("chunk %v: stored parts have %d bytes, want %d: %w", sha256, len(data), skip+end-offset, errs.Invalid)
	}
	return data[skip : skip+end-offset], size, nil
}

// MissingChunks are those of some digests of which there is no chunk.
func (t *Tx) MissingChunks(ctx context.Context, all []integrity.Digest) ([]integrity.Digest, error) {
	have := map[integrity.Digest]bool{}
	for rest := all; len(rest) > 0; {
		n := min(len(rest), inAtOnce)
		args := make([]any, n)
		for i := range n {
			args[i] = rest[i][:]
		}
		if err := t.chunksOf(ctx, tuple(1, n), args, have); err != nil {
			return nil, err
		}
		rest = rest[n:]
	}
	var missing []integrity.Digest
	for _, d := range all {
		if !have[d] {
			missing, have[d] = append(missing, d), true
		}
	}
	return missing, nil
}

func (t *Tx) chunksOf(ctx context.Context, in string, args []any, have map[integrity.Digest]bool) error {
	rows, err := t.tx.QueryContext(ctx, "SELECT sha256 FROM fleet_chunk WHERE sha256 IN "+in, args...) //nolint:gosec // parameters only
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&b); err != nil {
			return err
		}
		var d integrity.Digest
		copy(d[:], b)
		have[d] = true
	}
	return rows.Err()
}

// FindByName returns a document of a type by its name, wherever it stands;
// errs.NotFound if there is none. It is for names that are digests: of two with
// one name it returns either.
func (t *Tx) FindByName(ctx context.Context, kind, name string) (*resource.Document, error) {
	kind, name = strings.ToLower(kind), strings.ToLower(name)
	if name == "" || strings.ContainsAny(name, `%_/\`) {
		return nil, fmt.Errorf("%s %.80q: %w", kind, name, errs.NotFound)
	}
	d, err := scan(t.tx.QueryRowContext(ctx, "SELECT "+columns+" FROM document WHERE kind = $1 AND key LIKE $2 LIMIT 1", kind, "%/"+name))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("%s %s: %w", kind, name, errs.NotFound)
	}
	return d, err
}
