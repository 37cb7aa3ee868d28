package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// Bounds of the store of content.
const (
	maxChunks  = 4 << 30  // bytes of all
	leaveSpace = 64 << 20 // bytes of the file system
)

// fetcher asks the server for content from an offset on; size is that of the
// whole. Nothing that it says is believed but for the digest.
type fetcher func(ctx context.Context, d integrity.Digest, offset uint64) (data []byte, size uint64, err error)

// chunk reads stored content. It was compared with its digest before it got its
// name; who uses a part that nothing else verifies compares it again.
func (s *State) chunk(d integrity.Digest, limit int64) ([]byte, error) {
	return readFile(s.path(dirChunks, d.String()), limit)
}

// obtain makes sure that content is stored, and returns it. What the server sends
// wrong says nothing about the manifest: that is errLater. It is written under
// another name, synced, and gets its own once its digest is right: there is no
// half chunk, whenever the machine stops.
func (s *State) obtain(ctx context.Context, d integrity.Digest, limit int64, fetch fetcher) ([]byte, error) {
	b, err := s.chunk(d, limit)
	if err == nil && sha256.Sum256(b) == d {
		return b, nil
	}
	if err := s.download(ctx, d, limit, fetch); err != nil {
		return nil, fmt.Errorf("fetch %v: %w: %w", d, err, errLater)
	}
	return s.chunk(d, limit)
}

func (s *State) download(ctx context.Context, d integrity.Digest, limit int64, fetch fetcher) error {
	r := &fetching{ctx: ctx, d: d, limit: limit, fetch: fetch, room: s.room}
	if err := r.next(); err != nil {
		return err
	}
	return writeVerified(s.path(dirChunks, d.String()), r, d)
}

// writeVerified is host.WriteFileFrom for content whose digest is known: anything
// else leaves nothing behind.
func writeVerified(name string, r io.Reader, want integrity.Digest) error {
	h := sha256.New()
	return host.WriteFileFrom(name, &verified{r: io.TeeReader(r, h), sum: func() integrity.Digest { return integrity.Digest(h.Sum(nil)) }, want: want}, 0o600)
}

// verified gives an error in place of the end of content that is not the wanted.
type verified struct {
	r    io.Reader
	sum  func() integrity.Digest
	want integrity.Digest
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	if errors.Is(err, io.EOF) && v.sum() != v.want {
		return n, fmt.Errorf("the server sent other content: %w", errs.Untrusted)
	}
	return n, err
}

// fetching reads content from the server piece by piece.
type fetching struct {
	ctx    context.Context //nolint:containedctx // of one download
	d      integrity.Digest
	limit  int64
	fetch  fetcher
	room   func(size int64) error
	data   []byte
	offset uint64
	size   uint64
	begun  bool
}

func (f *fetching) next() error {
	data, size, err := f.fetch(f.ctx, f.d, f.offset)
	if err != nil {
		return err
	}
	if !f.begun {
		f.begun, f.size = true, size
		if size > uint64(f.limit) { //nolint:gosec // limits are positive
			return fmt.Errorf("%d bytes, at most %d: %w", size, f.limit, errs.Invalid)
		}
		if err := f.room(int64(size)); err != nil { //nolint:gosec // bounded above
			return err
		}
	}
	if size != f.size || uint64(len(data)) > f.size-f.offset || len(data) == 0 && f.offset < f.size {
		return fmt.Errorf("the server's pieces do not fit together: %w", errs.Untrusted)
	}
	f.data = data
	f.offset += uint64(len(data))
	return nil
}

// Read implements io.Reader.
func (f *fetching) Read(p []byte) (int, error) {
	if len(f.data) == 0 {
		if f.offset >= f.size {
			return 0, io.EOF
		}
		if err := f.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.data)
	f.data = f.data[n:]
	return n, nil
}

// room refuses content for which there is none, before it is fetched: a manifest
// must not fill the disk that the host needs.
func (s *State) room(size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.path(dirChunks), &st); err != nil {
		return fmt.Errorf("look for space: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free-size < leaveSpace { //nolint:gosec // sizes of file systems
		return fmt.Errorf("%d bytes, and %d are free: %w", size, free, unix.ENOSPC)
	}
	var have int64
	es, err := os.ReadDir(s.path(dirChunks))
	if err != nil {
		return err
	}
	for _, e := range es {
		if i, err := e.Info(); err == nil {
			have += i.Size()
		}
	}
	if have+size > maxChunks {
		return fmt.Errorf("%d bytes on top of %d, at most %d: %w", size, have, int64(maxChunks), errs.Invalid)
	}
	return nil
}

// obtainAll fetches what a manifest names and the host does not have: the policy,
// which it returns, the list, and the content of the items.
func (s *State) obtainAll(ctx context.Context, m *codesign.Manifest, fetch fetcher) ([]byte, error) {
	policy, err := s.obtain(ctx, m.Policy, maxBundle, fetch)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return policy, s.obtainItems(ctx, m.Index, fetch)
}

func (s *State) obtainItems(ctx context.Context, index []integrity.Digest, fetch fetcher) error {
	n := 0
	for _, d := range index {
		part, err := s.obtain(ctx, d, codesign.MaxIndexPart, fetch)
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		items, err := codesign.ReadIndex(part)
		if err != nil {
			return err
		}
		if n += len(items); n > maxItems {
			return fmt.Errorf("list: more than %d releases and supplements: %w", maxItems, errs.Invalid)
		}
		for i := range items {
			for d, limit := range itemChunks(&items[i]) {
				if err := s.ensure(ctx, d, limit, fetch); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ensure is obtain for content that need not be read: its signature covers it, and
// a stored chunk was compared with its digest before.
func (s *State) ensure(ctx context.Context, d integrity.Digest, limit int64, fetch fetcher) error {
	if st, err := os.Stat(s.path(dirChunks, d.String())); err == nil && st.Mode().IsRegular() {
		return nil
	}
	if err := s.download(ctx, d, limit, fetch); err != nil {
		return fmt.Errorf("fetch %v: %w: %w", d, err, errLater)
	}
	return nil
}

func itemChunks(it *codesign.Item) map[integrity.Digest]int64 {
	if it.Supplement != nil {
		return map[integrity.Digest]int64{*it.Supplement: maxBundle}
	}
	out := map[integrity.Digest]int64{it.Release.Record: maxBundle, it.Release.Catalogue: maxCatalogue}
	if it.Release.Names != nil {
		out[*it.Release.Names] = maxCatalogue
	}
	return out
}

// sound removes what a manifest names and the disk damaged, so that it is fetched
// again, and says whether there was anything.
func (s *State) sound(b *bundle) bool {
	good := true
	check := func(d integrity.Digest) {
		name := s.path(dirChunks, d.String())
		if got, err := hashFile(name); err != nil || got != d {
			good = false
			_ = os.RemoveAll(name) // what cannot be removed cannot be fetched either, and that is told
		}
	}
	for _, d := range b.Index {
		check(d)
		part, err := s.chunk(d, codesign.MaxIndexPart)
		if err != nil {
			continue // the rest is looked at once it is there again
		}
		items, err := codesign.ReadIndex(part)
		if err != nil {
			continue
		}
		for i := range items {
			for d := range itemChunks(&items[i]) {
				check(d)
			}
		}
	}
	return good
}

// collect removes content that neither the confirmed manifest, the one before
// nor the one that is tried names. What cannot be read keeps everything.
func (s *State) collect() error {
	keep := map[string]bool{}
	for _, f := range []string{fileBundle, fileBundleCopy, fileBundlePrev, fileTrial} {
		b, err := s.readBundle(f)
		if errors.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		keep[b.Policy.String()] = true
		for _, d := range b.Index {
			keep[d.String()] = true
			part, err := s.chunk(d, codesign.MaxIndexPart)
			if err != nil {
				return err
			}
			items, err := codesign.ReadIndex(part)
			if err != nil {
				return err
			}
			for i := range items {
				for d := range itemChunks(&items[i]) {
					keep[d.String()] = true
				}
			}
		}
	}
	es, err := os.ReadDir(s.path(dirChunks))
	if err != nil {
		return err
	}
	var all error
	for _, e := range es {
		half, _ := filepath.Match(".*.tmp-*", e.Name())
		if !half && !keep[e.Name()] && !strings.HasPrefix(e.Name(), ".") {
			all = errors.Join(all, os.RemoveAll(s.path(dirChunks, e.Name())))
		}
	}
	return all
}
