package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"time"

	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
)

// progressEvery is how often a long walk says how far it is.
const progressEvery = 5 * time.Second

// artefact is a build on disk or in a registry, for one walk. It tells a
// person how far reading is, and knows what a directory held.
type artefact struct {
	*builds.Artefact
	listing []string  // of a directory
	told    time.Time // how far it is
}

// openArtefact opens a build as it is signed and verified: all of it, with what
// is in archives within it.
func openArtefact(ctx context.Context, e *env, path string) (*artefact, error) {
	return openArtefactAs(ctx, e, path, builds.Options{})
}

func openArtefactAs(ctx context.Context, e *env, path string, o builds.Options) (*artefact, error) {
	a := &artefact{told: e.now()}
	o.Context = ctx
	o.Progress = func(p builds.Progress) {
		if now := e.now(); now.Sub(a.told) >= progressEvery {
			a.told = now
			if p.Members == 0 {
				e.notef("%s: %d MiB hashed …", path, p.Bytes>>20)
			} else {
				e.notef("%s: %d members, %d MiB …", path, p.Members, p.Bytes>>20)
			}
		}
	}
	var err error
	if a.Artefact, err = builds.Open(path, o); err != nil {
		return nil, err
	}
	return a, nil
}

// name is what the artefact is called in records.
func (a *artefact) name() string { return a.Name }

// pkg is what a package says of itself, once walked.
func (a *artefact) pkg() (builds.Package, bool) { return a.Package() }

// digest is the SHA-256 of the file, or of the directory's listing, once walked.
func (a *artefact) digest() integrity.Digest {
	if a.Format != builds.FormatDir {
		return a.Digest
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
	if a.Format != builds.FormatDir {
		return a.Artefact.Walk(visit)
	}
	a.listing = nil
	return a.Artefact.Walk(func(m codesign.Member, content io.Reader) error {
		if m.Nested {
			return visit(m, content)
		}
		if content == nil {
			a.listing = append(a.listing, fmt.Sprintf("%q %06o %q\n", m.Path, uint32(m.Mode), m.Link))
			return visit(m, nil)
		}
		h := sha256.New()
		r := io.TeeReader(content, h)
		if err := visit(m, r); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, r); err != nil { // the digest is of all of it
			return err
		}
		a.listing = append(a.listing, fmt.Sprintf("%q %06o %x\n", m.Path, uint32(m.Mode), h.Sum(nil)))
		return nil
	})
}
