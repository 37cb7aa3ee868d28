package store

import (
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/fleet"
)

type itemID [16]byte

func itemOf(x *fleet.Execution) (id itemID) {
	h := sha256.New()
	h.Write(x.SHA256[:])
	var n [8]byte
	for _, s := range []string{x.Kind, x.Path, x.Signer} {
		binary.BigEndian.PutUint64(n[:], uint64(len(s))) // no two lists of fields hash alike
		h.Write(n[:])
		h.Write([]byte(s))
	}
	copy(id[:], h.Sum(nil))
	return id
}

// hostBytes is a host's id, which is 32 hex digits.
func hostBytes(id string) ([]byte, error) {
	b, err := hex.DecodeString(id)
	if err != nil || len(b) != 16 {
		return nil, fmt.Errorf("host id %.80q: %w", id, errs.Invalid)
	}
	return b, nil
}

// RecordRuns stores what one host ran, and how far it is stored now; all of it or
// nothing. fresh is how many of the executables nobody had seen before.
func (e *Events) RecordRuns(ctx context.Context, all []fleet.Execution, p fleet.Position) (fresh int, err error) {
	host, err := hostBytes(p.Host)
	if err != nil {
		return 0, err
	}
	ids := make([]itemID, len(all))
	order := make([]int, 0, len(all))
	known := map[itemID]bool{}
	for i := range all {
		if ids[i] = itemOf(&all[i]); !known[ids[i]] { // a statement must not meet a row twice
			known[ids[i]], order = true, append(order, i)
		}
	}
	// in one order, so that replicas do not wait for each other
	slices.SortFunc(order, func(a, b int) int { return slices.Compare(ids[a][:], ids[b][:]) })
	err = e.in(ctx, e.main, func(tx *sql.Tx) error {
		fresh = 0
		for rest := order; len(rest) > 0; {
			n := min(len(rest), e.dialect.rows(6))
			items, seen := make([]any, 0, 6*n), make([]any, 0, 4*n)
			for _, i := range rest[:n] {
				x := &all[i]
				items = append(items, ids[i][:], x.SHA256[:], x.Kind, x.Path, x.Signer, x.At.UnixMicro())
				seen = append(seen, host, ids[i][:], x.At.UnixMicro(), x.At.Truncate(time.Hour).UnixMicro())
			}
			made, err := tx.ExecContext(ctx, bulk("INSERT INTO fleet_item (id, sha256, kind, path, signer, first_us) VALUES ", n, 6, "", " ON CONFLICT (id) DO NOTHING"), items...)
			if err != nil {
				return err
			}
			count, err := made.RowsAffected()
			if err != nil {
				return err
			}
			fresh += int(count)
			_, err = tx.ExecContext(ctx, bulk("INSERT INTO fleet_seen (host, item, first_us, last_us) VALUES ", n, 4, "",
				" ON CONFLICT (host, item) DO UPDATE SET last_us = excluded.last_us WHERE fleet_seen.last_us < excluded.last_us"), seen...)
			if err != nil {
				return err
			}
			rest = rest[n:]
		}
		return savePositions(ctx, tx, &e.dialect, []fleet.Position{p})
	})
	if err != nil {
		return 0, fmt.Errorf("store %d executions: %w", len(all), err)
	}
	return fresh, nil
}

// tally is what some hosts ran of one executable.
type tally struct {
	hosts       int
	first, last int64
}

// runsOf counts, for hosts, on how many each executable ran since a time.
func (e *Events) runsOf(ctx context.Context, hosts []string, since time.Time) (map[itemID]*tally, error) {
	out := map[itemID]*tally{}
	from := int64(0)
	if !since.IsZero() {
		from = since.Truncate(time.Hour).UnixMicro()
	}
	for rest := hosts; len(rest) > 0; {
		n := min(len(rest), inAtOnce)
		args := []any{from}
		for _, h := range rest[:n] {
			b, err := hostBytes(h)
			if err != nil {
				return nil, err
			}
			args = append(args, b)
		}
		if err := e.tally(ctx, tuple(2, n), args, out); err != nil {
			return nil, err
		}
		rest = rest[n:]
	}
	return out, nil
}

func (e *Events) tally(ctx context.Context, in string, args []any, out map[itemID]*tally) error {
	rows, err := e.main.QueryContext(ctx, "SELECT item, COUNT(*), MIN(first_us), MAX(last_us) FROM fleet_seen WHERE last_us >= $1 AND host IN "+in+" GROUP BY item", args...) //nolint:gosec // parameters only
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var b sql.RawBytes
		var t tally
		if err := rows.Scan(&b, &t.hosts, &t.first, &t.last); err != nil {
			return err
		}
		var id itemID
		copy(id[:], b)
		if had := out[id]; had != nil {
			t = tally{had.hosts + t.hosts, min(had.first, t.first), max(had.last, t.last)}
		}
		out[id] = &t
	}
	return rows.Err()
}

// Inventory returns what ran on some hosts since a time (zero: ever), on most
// hosts first; at most limit, 0 for all.
func (e *Events) Inventory(ctx context.Context, hosts []string, since time.Time, limit int) ([]fleet.Item, error) {
	counts, err := e.runsOf(ctx, hosts, since)
	if err != nil {
		return nil, fmt.Errorf("read the inventory: %w", err)
	}
	ids := make([]itemID, 0, len(counts))
	for id := range counts {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b itemID) int {
		return cmp.Or(cmp.Compare(counts[b].hosts, counts[a].hosts), slices.Compare(a[:], b[:]))
	})
	if limit > 0 && len(ids) > limit {
		ids = ids[:limit]
	}
	byID := make(map[itemID]fleet.Item, len(ids))
	for rest := ids; len(rest) > 0; {
		n := min(len(rest), inAtOnce)
		args := make([]any, n)
		for i := range n {
			args[i] = rest[i][:]
		}
		if err := e.items(ctx, tuple(1, n), args, byID); err != nil {
			return nil, fmt.Errorf("read the inventory: %w", err)
		}
		rest = rest[n:]
	}
	out := make([]fleet.Item, 0, len(ids))
	for _, id := range ids {
		it, ok := byID[id]
		if !ok {
			continue
		}
		c := counts[id]
		it.Hosts, it.First, it.Last = c.hosts, time.UnixMicro(c.first).UTC(), time.UnixMicro(c.last).UTC()
		out = append(out, it)
	}
	slices.SortStableFunc(out, func(a, b fleet.Item) int {
		return cmp.Or(cmp.Compare(b.Hosts, a.Hosts), strings.Compare(a.Path, b.Path))
	})
	return out, nil
}

func (e *Events) items(ctx context.Context, in string, args []any, out map[itemID]fleet.Item) error {
	rows, err := e.main.QueryContext(ctx, "SELECT id, sha256, kind, path, signer FROM fleet_item WHERE id IN "+in, args...) //nolint:gosec // parameters only
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var b, sum []byte
		var it fleet.Item
		if err := rows.Scan(&b, &sum, &it.Kind, &it.Path, &it.Signer); err != nil {
			return err
		}
		var id itemID
		copy(id[:], b)
		copy(it.SHA256[:], sum)
		out[id] = it
	}
	return rows.Err()
}

// Coverage says how much of what ran on some hosts (since a time) ran on others
// (since another). Without anything on the first it is the zero value, which
// covers nothing.
func (e *Events) Coverage(ctx context.Context, of []string, ofSince time.Time, by []string, bySince time.Time) (fleet.Coverage, error) {
	var c fleet.Coverage
	want, err := e.runsOf(ctx, of, ofSince)
	if err != nil {
		return c, fmt.Errorf("coverage: %w", err)
	}
	have, err := e.runsOf(ctx, by, bySince)
	if err != nil {
		return c, fmt.Errorf("coverage: %w", err)
	}
	for id, t := range want {
		c.Items++
		c.Uses += t.hosts
		if have[id] != nil {
			c.Covered++
			c.UsesCovered += t.hosts
		}
	}
	return c, nil
}
