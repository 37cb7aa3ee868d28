package transparency

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Verify reads the whole log up to a checkpoint: every entry, and every tile of
// hashes that others need for their proofs. What is missing, changed, in
// another order or more than there should be is errs.Untrusted.
func (r *Reader) Verify(ctx context.Context, c *pki.Checkpoint) error {
	return r.Each(ctx, c, func(uint64, []byte) error { return nil })
}

// follow adds the entries from f's size up to the checkpoint to f, calls each
// for every one of them, and says whether they are what the checkpoint is about.
// What each is told is not verified before follow has returned nil.
func (r *Reader) follow(ctx context.Context, f *pki.Frontier, c *pki.Checkpoint, each func(index uint64, entry []byte, leaf [32]byte) error) error {
	if f.Size > c.Size {
		return fmt.Errorf("the log had %d entries and now has %d: %w", f.Size, c.Size, errs.Untrusted)
	}
	for f.Size < c.Size {
		at := f.Size / tileWidth
		entries, err := r.bundle(ctx, at, min(tileWidth, c.Size-at*tileWidth))
		if err != nil {
			return err
		}
		for _, e := range entries[f.Size%tileWidth:] {
			leaf := pki.LeafHash(e)
			if err := each(f.Size, e, leaf); err != nil {
				return err
			}
			f.Add(leaf)
		}
	}
	if f.Root() != c.Root {
		return fmt.Errorf("the entries up to %d do not lead to the checkpoint's root: one is missing, changed or in another place: %w", c.Size, errs.Untrusted)
	}
	return nil
}

// bundle returns the first n entries of the bundle with the index.
func (r *Reader) bundle(ctx context.Context, index, n uint64) ([][]byte, error) {
	what := fmt.Sprintf("entries from %d on", index*tileWidth)
	b, err := r.resource(ctx, func(p uint8) string { return layout.EntriesPath(index, p) }, partial(n))
	if err != nil {
		return nil, damaged(fmt.Errorf("%s: %w", what, err))
	}
	var eb api.EntryBundle
	if err := eb.UnmarshalText(b); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", what, err, errs.Untrusted)
	}
	if uint64(len(eb.Entries)) < n {
		return nil, fmt.Errorf("%s: %d of %d are there: %w", what, len(eb.Entries), n, errs.Untrusted)
	}
	return eb.Entries[:n], nil
}

// partial is how a path writes n of a tile's hashes: 0 for all.
func partial(n uint64) uint8 { return uint8(n % tileWidth) } // below 256

// tileCheck compares tiles with what they must be, as leaves come in.
type tileCheck struct {
	levels []tileLevel
}

type tileLevel struct {
	index  uint64 // of the tile that is being filled
	hashes [][32]byte
}

// add takes the next hash of a level. A full tile is compared and becomes one
// hash of the next level.
func (t *tileCheck) add(ctx context.Context, r *Reader, level int, h [32]byte) error {
	if level == len(t.levels) {
		t.levels = append(t.levels, tileLevel{})
	}
	l := &t.levels[level]
	l.hashes = append(l.hashes, h)
	if len(l.hashes) < tileWidth {
		return nil
	}
	if err := l.compare(ctx, r, level); err != nil {
		return err
	}
	f := &pki.Frontier{}
	for _, h := range l.hashes {
		f.Add(h)
	}
	l.index, l.hashes = l.index+1, l.hashes[:0]
	return t.add(ctx, r, level+1, f.Root())
}

// finish compares the tiles that are not full.
func (t *tileCheck) finish(ctx context.Context, r *Reader) error {
	for i := range t.levels {
		if len(t.levels[i].hashes) == 0 {
			continue
		}
		if err := t.levels[i].compare(ctx, r, i); err != nil {
			return err
		}
	}
	return nil
}

func (l *tileLevel) compare(ctx context.Context, r *Reader, level int) error {
	b, err := r.tile(ctx, uint64(level), l.index, partial(uint64(len(l.hashes)))) //nolint:gosec // a level is never negative
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("tile %d of level %d is missing: %w", l.index, level, errs.Untrusted)
	}
	if err != nil {
		return fmt.Errorf("tile %d of level %d: %w", l.index, level, err)
	}
	var want []byte
	for _, h := range l.hashes {
		want = append(want, h[:]...)
	}
	if !bytes.HasPrefix(b, want) {
		return fmt.Errorf("tile %d of level %d holds other hashes than the entries have: %w", l.index, level, errs.Untrusted)
	}
	return nil
}

// Each verifies the whole log up to a checkpoint as Verify does, and calls visit
// for each entry before: what it is told is not verified before Each has
// returned nil.
func (r *Reader) Each(ctx context.Context, c *pki.Checkpoint, visit func(index uint64, entry []byte) error) error {
	var tiles tileCheck
	err := r.follow(ctx, &pki.Frontier{}, c, func(index uint64, entry []byte, leaf [32]byte) error {
		if err := visit(index, entry); err != nil {
			return err
		}
		return tiles.add(ctx, r, 0, leaf)
	})
	if err != nil {
		return err
	}
	return tiles.finish(ctx, r)
}
