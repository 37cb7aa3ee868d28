package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
)

// progressEvery is how often a long walk says how far it is.
const progressEvery = 5 * time.Second

// artefact is a build on disk as a codesign.Source: a directory, a tar archive
// or a Debian package. Walking it also hashes it as a whole, tells how far it
// is, and stops when the context ends.
type artefact struct {
	path   string
	source codesign.Source
	file   *os.File // nil for a directory

	ctx     context.Context //nolint:containedctx // one walk is one call
	e       *env
	sum     hash.Hash // of the file
	listing []string  // of the directory
	files   int
	bytes   int64
	told    time.Time
}

// openArtefact opens a build for one walk.
func openArtefact(ctx context.Context, e *env, path string) (*artefact, error) {
	a := &artefact{path: path, ctx: ctx, e: e, sum: sha256.New(), told: e.now()}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		a.source = codesign.DirSource(os.DirFS(path))
		return a, nil
	}
	if a.file, err = os.Open(path); err != nil {
		return nil, err
	}
	if a.source, err = codesign.OpenSource(a.reader(a.file, a.sum)); err != nil {
		_ = a.file.Close()
		return nil, err
	}
	return a, nil
}

func (a *artefact) Close() error {
	if a.file == nil {
		return nil
	}
	return a.file.Close()
}

// name is what the artefact is called in records.
func (a *artefact) name() string {
	if abs, err := filepath.Abs(a.path); err == nil {
		return filepath.Base(abs)
	}
	return filepath.Base(a.path)
}

// deb is what a Debian package says of itself, once walked.
func (a *artefact) deb() (codesign.DebControl, bool) {
	d, ok := a.source.(*codesign.Deb)
	if !ok {
		return codesign.DebControl{}, false
	}
	return d.Control, true
}

// digest is the SHA-256 of the file, or of the directory's listing, once walked.
func (a *artefact) digest() integrity.Digest {
	if a.file != nil {
		return integrity.Digest(a.sum.Sum(nil))
	}
	slices.Sort(a.listing)
	h := sha256.New()
	for _, l := range a.listing {
		_, _ = io.WriteString(h, l)
	}
	return integrity.Digest(h.Sum(nil))
}

// Walk implements codesign.Source.
func (a *artefact) Walk(visit func(codesign.Member, io.Reader) error) error {
	err := a.source.Walk(func(m codesign.Member, content io.Reader) error {
		a.files++
		if a.file != nil {
			return visit(m, content)
		}
		if content == nil {
			a.listing = append(a.listing, fmt.Sprintf("%q %06o %q\n", m.Path, uint32(m.Mode), m.Link))
			return visit(m, nil)
		}
		h := sha256.New()
		r := a.reader(content, h)
		if err := visit(m, r); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, r); err != nil { // the digest is of all of it
			return err
		}
		a.listing = append(a.listing, fmt.Sprintf("%q %06o %x\n", m.Path, uint32(m.Mode), h.Sum(nil)))
		return nil
	})
	if err == nil && a.file != nil {
		_, err = io.Copy(io.Discard, a.reader(a.file, a.sum))
	}
	return err
}

func (a *artefact) reader(r io.Reader, sum hash.Hash) io.Reader { return &artefactReader{a, r, sum} }

type artefactReader struct {
	a   *artefact
	r   io.Reader
	sum hash.Hash
}

func (r *artefactReader) Read(p []byte) (int, error) {
	a := r.a
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.r.Read(p)
	r.sum.Write(p[:n])
	a.bytes += int64(n)
	if now := a.e.now(); now.Sub(a.told) >= progressEvery {
		a.told = now
		a.e.notef("%s: %d files, %d MiB read …", a.path, a.files, a.bytes>>20)
	}
	return n, err
}
