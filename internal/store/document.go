package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Revision is the newest of the tree; 0 before the first write.
func (t *Tx) Revision(ctx context.Context) (uint64, error) {
	var n uint64
	err := t.tx.QueryRowContext(ctx, "SELECT last FROM revision WHERE one = 1").Scan(&n)
	return n, err
}

func (t *Tx) nextRevision(ctx context.Context) (uint64, error) {
	var n uint64
	err := t.tx.QueryRowContext(ctx, "UPDATE revision SET last = last + 1 WHERE one = 1 RETURNING last").Scan(&n)
	return n, err
}

const columns = "id, type, location, tags, properties, created_by, created_us, modified_by, modified_us, revision"

func scan(row interface{ Scan(...any) error }, more ...any) (*resource.Document, error) {
	var d resource.Document
	var id, tags, properties string
	var created, modified int64
	err := row.Scan(append([]any{&id, &d.Type, &d.Location, &tags, &properties, &d.System.CreatedBy, &created, &d.System.ModifiedBy, &modified, &d.Revision}, more...)...)
	if err != nil {
		return nil, err
	}
	if d.ID, err = resource.ParseID(id); err != nil {
		return nil, fmt.Errorf("stored document: %w", err)
	}
	if err := json.Unmarshal([]byte(tags), &d.Tags); err != nil {
		return nil, fmt.Errorf("stored tags of %s: %w", id, err)
	}
	if len(d.Tags) == 0 {
		d.Tags = nil
	}
	if properties != "" {
		d.Properties = json.RawMessage(properties)
	}
	d.System.CreatedAt, d.System.ModifiedAt = time.UnixMicro(created).UTC(), time.UnixMicro(modified).UTC()
	return &d, nil
}

// Get returns a document; errs.NotFound if there is none.
func (t *Tx) Get(ctx context.Context, id resource.ID) (*resource.Document, error) {
	d, err := scan(t.tx.QueryRowContext(ctx, "SELECT "+columns+" FROM document WHERE key = $1", id.Key()))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("%s: %w", id, errs.NotFound)
	}
	return d, err
}

// Put stores a document on somebody's behalf, and returns it as it is stored.
// A condition that does not hold is errs.Conflict.
func (t *Tx) Put(ctx context.Context, d resource.Document, by string, when resource.When) (*resource.Document, error) {
	if err := errors.Join(t.mayWrite(), d.Check()); err != nil {
		return nil, err
	}
	old, err := t.Get(ctx, d.ID)
	switch {
	case errors.Is(err, errs.NotFound):
		old = nil
	case err != nil:
		return nil, err
	}
	if err := holds(old, d.ID, when); err != nil {
		return nil, err
	}
	if d.Revision, err = t.nextRevision(ctx); err != nil {
		return nil, err
	}
	d.System = resource.SystemData{CreatedBy: by, CreatedAt: t.now, ModifiedBy: by, ModifiedAt: t.now}
	if old != nil {
		d.ID = old.ID // its spelling stays
		d.System.CreatedBy, d.System.CreatedAt = old.System.CreatedBy, old.System.CreatedAt
	}
	row, err := values(&d)
	if err != nil {
		return nil, err
	}
	_, err = t.tx.ExecContext(ctx, `INSERT INTO document (key, kind, `+columns+`) VALUES ($11, $12, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
		ON CONFLICT (key) DO UPDATE SET type = excluded.type, location = excluded.location, tags = excluded.tags, properties = excluded.properties,
		modified_by = excluded.modified_by, modified_us = excluded.modified_us, revision = excluded.revision`,
		append(row, d.ID.Key(), strings.ToLower(d.Type))...)
	if err != nil {
		return nil, err
	}
	return &d, t.record(ctx, &d, false, row)
}

// Delete removes a document and returns what it was. One that others are below
// is errs.Conflict.
func (t *Tx) Delete(ctx context.Context, id resource.ID, by string, when resource.When) (*resource.Document, error) {
	if err := t.mayWrite(); err != nil {
		return nil, err
	}
	d, err := t.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := holds(d, id, when); err != nil {
		return nil, err
	}
	low, high := below(id)
	var child string
	err = t.tx.QueryRowContext(ctx, "SELECT id FROM document WHERE key > $1 AND key < $2 LIMIT 1", low, high).Scan(&child)
	if err == nil {
		return nil, fmt.Errorf("%s is not empty, %s is below it: %w", id, child, errs.Conflict)
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return nil, err
	}
	if d.Revision, err = t.nextRevision(ctx); err != nil {
		return nil, err
	}
	d.System.ModifiedBy, d.System.ModifiedAt = by, t.now
	row, err := values(d)
	if err != nil {
		return nil, err
	}
	if _, err := t.tx.ExecContext(ctx, "DELETE FROM document WHERE key = $1", id.Key()); err != nil {
		return nil, err
	}
	return d, t.record(ctx, d, true, row)
}

func holds(old *resource.Document, id resource.ID, when resource.When) error {
	switch {
	case when.Absent && old != nil:
		return fmt.Errorf("%s exists already: %w", id, errs.Conflict)
	case when.Revision != 0 && old == nil:
		return fmt.Errorf("%s does not exist any more: %w", id, errs.Conflict)
	case when.Revision != 0 && old.Revision != when.Revision:
		return fmt.Errorf("%s was changed by %s at %s: read it again: %w", id, old.System.ModifiedBy, old.System.ModifiedAt.Format(time.RFC3339), errs.Conflict)
	}
	return nil
}

// values are a document's columns.
func values(d *resource.Document) ([]any, error) {
	tags, err := json.Marshal(d.Tags)
	if err != nil {
		return nil, err
	}
	return []any{
		d.ID.String(), d.Type, d.Location, string(tags), string(d.Properties),
		d.System.CreatedBy, d.System.CreatedAt.UnixMicro(), d.System.ModifiedBy, d.System.ModifiedAt.UnixMicro(), int64(d.Revision), //nolint:gosec // counts from 1
	}, nil
}

// record adds a change to the feed.
func (t *Tx) record(ctx context.Context, d *resource.Document, deleted bool, row []any) error {
	_, err := t.tx.ExecContext(ctx, `INSERT INTO change (deleted, key, `+columns+`) VALUES ($11, $12, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`,
		append(slices.Clip(row), deleted, d.ID.Key())...)
	return err
}

// below are the bounds of the keys below an id: a slash and what follows it in
// ASCII.
func below(id resource.ID) (low, high string) { return id.Key() + "/", id.Key() + "0" }

// List returns a page of documents in the order of their keys. It is the last
// page if it is shorter than the limit.
func (t *Tx) List(ctx context.Context, q resource.Query) ([]resource.Document, error) {
	if q.Limit < 1 || q.Limit > resource.MaxPage {
		return nil, fmt.Errorf("list: %d documents a page (1 to %d): %w", q.Limit, resource.MaxPage, errs.Invalid)
	}
	low, high := below(q.Below)
	where, args := "(key = $1 OR (key > $2 AND key < $3)) AND key > $4", []any{q.Below.Key(), low, high, q.After}
	if q.Type != "" {
		where, args = where+" AND kind = $6", append(args, q.Limit, strings.ToLower(q.Type))
	} else {
		args = append(args, q.Limit)
	}
	rows, err := t.tx.QueryContext(ctx, "SELECT "+columns+" FROM document WHERE "+where+" ORDER BY key LIMIT $5", args...) //nolint:gosec // of texts that stand above
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []resource.Document
	for rows.Next() {
		d, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, *d)
	}
	return out, rows.Err()
}

// Changes returns the changes after a revision, in order, without gaps; at most
// limit. errs.NotFound if the feed does not go back so far.
func (t *Tx) Changes(ctx context.Context, after uint64, limit int) ([]resource.Change, error) {
	rows, err := t.tx.QueryContext(ctx, "SELECT "+columns+", deleted FROM change WHERE revision > $1 ORDER BY revision LIMIT $2", int64(after), limit) //nolint:gosec // counts from 1
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []resource.Change
	for rows.Next() {
		var c resource.Change
		d, err := scan(rows, &c.Deleted)
		if err != nil {
			return nil, err
		}
		c.Revision, c.Document = d.Revision, *d
		out = append(out, c)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if len(out) > 0 && out[0].Revision != after+1 {
		return nil, fmt.Errorf("the feed begins at revision %d, not after %d: list everything and watch from then: %w", out[0].Revision, after, errs.NotFound)
	}
	return out, nil
}

// Compact forgets changes up to a revision.
func (t *Tx) Compact(ctx context.Context, upTo uint64) error {
	if err := t.mayWrite(); err != nil {
		return err
	}
	_, err := t.tx.ExecContext(ctx, "DELETE FROM change WHERE revision <= $1", int64(upTo)) //nolint:gosec // counts from 1
	return err
}
