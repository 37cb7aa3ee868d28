package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"ringwall/internal/attest"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// bundleCatalogues makes what hosts were given the reference for what they
// measured: the catalogues of every release in the manifests that stand in the
// tree for a host's place, beside those of a directory. A release counts only if
// its record verifies under the authority, because whoever may upload a manifest
// need not be whom hosts believe. A manifest that is deleted explains nothing any
// more.
type bundleCatalogues struct {
	p     *serverParts
	roots pki.TrustRoots
	dir   *catalogueDir // nil: none

	mu        sync.Mutex
	revision  uint64 // of the tree, that manifests is of
	manifests []placed
	releases  map[integrity.Digest][]*codesign.Catalogue // by manifest
	unions    map[string]*catalogues
}

// placed is a manifest with the place that it is for.
type placed struct {
	below  resource.ID
	digest integrity.Digest
}

// maxUnions is how many different sets of manifests are kept put together.
const maxUnions = 64

// get gives the catalogues for a host.
func (b *bundleCatalogues) get(ctx context.Context, host string) (attest.Catalogues, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var where resource.ID
	err := b.p.store.Read(ctx, func(tx *store.Tx) error {
		g, err := tx.Grant(ctx, host)
		if err != nil {
			return err
		}
		where = g.Resource
		return b.list(ctx, tx)
	})
	if err != nil {
		return nil, fmt.Errorf("catalogues for host %s: %w", host, err)
	}
	all := &catalogues{verity: map[integrity.Digest]bool{}}
	key := ""
	if b.dir != nil {
		if all, err = b.dir.get(); err != nil {
			return nil, err
		}
		key = strings.Join(all.names, " ")
	}
	var mine []integrity.Digest
	for _, m := range b.manifests {
		if m.below.Contains(where) {
			mine = append(mine, m.digest)
			key += " " + m.digest.String()
		}
	}
	if u := b.unions[key]; u != nil {
		return u, nil
	}
	u := &catalogues{names: slices.Clone(all.names), contents: slices.Clone(all.contents), verity: map[integrity.Digest]bool{}}
	for d := range all.verity {
		u.verity[d] = true
	}
	for _, m := range mine {
		cats, err := b.of(ctx, m)
		if err != nil {
			return nil, err
		}
		for _, c := range cats {
			u.include(c)
		}
	}
	if len(b.unions) >= maxUnions {
		clear(b.unions)
	}
	b.unions[key] = u
	return u, nil
}

// include adds a catalogue, once.
func (c *catalogues) include(cat *codesign.Catalogue) {
	name := "sha256:" + cat.Digest().String()
	if slices.Contains(c.names, name) {
		return
	}
	c.names, c.contents = append(c.names, name), append(c.contents, cat)
	for _, r := range cat.All() {
		if !r.Verity.IsZero() {
			c.verity[r.Verity] = true
		}
	}
}

// list reads which manifests there are, when the tree has changed.
func (b *bundleCatalogues) list(ctx context.Context, tx *store.Tx) error {
	now, err := tx.Revision(ctx)
	if err != nil || now == b.revision {
		return err
	}
	var all []placed
	q := resource.Query{Type: fleet.TypeManifest, Limit: resource.MaxPage}
	for {
		page, err := tx.List(ctx, q)
		if err != nil {
			return err
		}
		for i := range page {
			d, err := integrity.ParseDigest(page[i].ID.Name())
			if err != nil {
				return err
			}
			all = append(all, placed{page[i].ID.Parent(), d})
		}
		if len(page) < q.Limit {
			break
		}
		q.After = page[len(page)-1].ID.Key()
	}
	b.manifests, b.revision = all, now
	return nil
}

// of gives the catalogues of a manifest's releases, read once.
func (b *bundleCatalogues) of(ctx context.Context, manifest integrity.Digest) ([]*codesign.Catalogue, error) {
	if cats, ok := b.releases[manifest]; ok {
		return cats, nil
	}
	m, _, err := b.p.hosts.Manifest(ctx, manifest)
	if err != nil {
		return nil, err
	}
	var out []*codesign.Catalogue
	for _, part := range m.Index {
		raw, err := b.p.hosts.Chunk(ctx, part, maxCatalogueFile)
		if err != nil {
			return nil, err
		}
		items, err := codesign.ReadIndex(raw)
		if err != nil {
			return nil, err
		}
		for _, item := range items {
			if item.Release == nil {
				continue
			}
			record, err := b.p.hosts.Chunk(ctx, item.Release.Record, maxBundleFile)
			blob, err2 := b.p.hosts.Chunk(ctx, item.Release.Catalogue, maxCatalogueFile)
			if err := errors.Join(err, err2); err != nil {
				return nil, err
			}
			_, cat, err := codesign.VerifyRelease(record, blob, b.roots)
			if errors.Is(err, errs.Untrusted) || errors.Is(err, errs.Invalid) {
				b.p.log.WarnContext(ctx, "release_explains_nothing", slog.String("manifest", manifest.String()), slog.Any("error", err))
				continue
			}
			if err != nil {
				return nil, err
			}
			out = append(out, cat)
		}
	}
	b.releases[manifest] = out
	return out, nil
}
