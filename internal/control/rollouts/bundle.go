package rollouts

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// bundle is a manifest with all that it names, read and compiled by the code
// that hosts have.
type bundle struct {
	manifest *codesign.Manifest
	signed   []byte // the manifest
	document []byte // the signed policy
	base     *integrity.Policy
	compiled *integrity.Compiled
	releases map[integrity.Digest]string // by record or supplement: what it is
}

const (
	maxPolicy    = 8 << 20   // bytes of a signed policy or record
	maxCatalogue = 320 << 20 // bytes
	maxItems     = 50_000    // releases and supplements of a manifest
)

// loadBundle reads a manifest to its last chunk, as a host would: whatever a
// host would refuse is an error of a kind in errs. The one thing that differs
// is trust: here the policy vouches for itself, and hosts ask the one in force.
func loadBundle(ctx context.Context, c Content, digest integrity.Digest, now time.Time) (*bundle, error) {
	b := &bundle{releases: map[integrity.Digest]string{}}
	var err error
	if b.manifest, b.signed, err = c.Manifest(ctx, digest); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", digest, err)
	}
	if b.document, err = c.Chunk(ctx, b.manifest.Policy, maxPolicy); err != nil {
		return nil, fmt.Errorf("policy %s: %w", b.manifest.Policy, err)
	}
	if b.base, err = readPolicy(b.document); err != nil {
		return nil, err
	}
	if b.base.Epoch != b.manifest.Epoch {
		return nil, invalid("the manifest is of epoch %d, its policy of %d", b.manifest.Epoch, b.base.Epoch)
	}
	roots := codesign.Roots(b.base, codesign.SignsPolicy)
	if _, err := codesign.VerifyManifest(b.signed, roots); err != nil {
		return nil, fmt.Errorf("its own policy does not trust its signer: %w", err)
	}
	items, err := b.items(ctx, c)
	if err != nil {
		return nil, err
	}
	policy, err := b.join(ctx, c, items)
	if err != nil {
		return nil, err
	}
	sources, err := b.sources(ctx, c, items, policy)
	if err != nil {
		return nil, err
	}
	b.compiled, err = integrity.Compile(policy, sources, integrity.CompileOptions{Now: now})
	return b, err
}

// readPolicy reads a signed policy that trusts its own signer.
func readPolicy(document []byte) (*integrity.Policy, error) {
	_, yaml, err := pki.UnverifiedPayload(document, maxPolicy)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p, err := integrity.ParsePolicy(yaml)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if p.Supplements != "" {
		return nil, invalid("policy %s is a supplement", p.Name)
	}
	if _, err := codesign.VerifyPolicy(document, codesign.Roots(p, codesign.SignsPolicy)); err != nil {
		return nil, fmt.Errorf("policy %s does not trust its own signer: %w", p.Name, err)
	}
	return p, nil
}

func (b *bundle) items(ctx context.Context, c Content) ([]codesign.Item, error) {
	var out []codesign.Item
	for _, d := range b.manifest.Index {
		part, err := c.Chunk(ctx, d, codesign.MaxIndexPart)
		if err != nil {
			return nil, fmt.Errorf("list of releases %s: %w", d, err)
		}
		items, err := codesign.ReadIndex(part)
		if err != nil {
			return nil, fmt.Errorf("list of releases %s: %w", d, err)
		}
		if out = append(out, items...); len(out) > maxItems {
			return nil, invalid("more than %d releases and supplements", maxItems)
		}
	}
	return out, nil
}

func (b *bundle) join(ctx context.Context, c Content, items []codesign.Item) (*integrity.Policy, error) {
	roots := codesign.Roots(b.base, codesign.SignsSupplement)
	var supplements []*integrity.Policy
	for _, it := range items {
		if it.Supplement == nil {
			continue
		}
		raw, err := c.Chunk(ctx, *it.Supplement, maxPolicy)
		if err != nil {
			return nil, fmt.Errorf("supplement %s: %w", it.Supplement, err)
		}
		signed, err := codesign.VerifyPolicy(raw, roots)
		if err != nil {
			return nil, fmt.Errorf("supplement %s: %w", it.Supplement, err)
		}
		p, err := integrity.ParsePolicy(signed.YAML)
		if err != nil {
			return nil, fmt.Errorf("supplement %s: %w", it.Supplement, err)
		}
		if p.Supplements != b.base.Name {
			return nil, invalid("supplement %s adds to %q, the policy is %s", p.Name, p.Supplements, b.base.Name)
		}
		b.releases[*it.Supplement] = fmt.Sprintf("supplement %s, epoch %d", p.Name, p.Epoch)
		supplements = append(supplements, p)
	}
	if len(supplements) == 0 {
		return b.base, nil
	}
	return integrity.Join(b.base, supplements...)
}

func (b *bundle) sources(ctx context.Context, c Content, items []codesign.Item, p *integrity.Policy) ([]integrity.Source, error) {
	var out []integrity.Source
	for _, it := range items {
		if it.Release == nil {
			continue
		}
		record, err1 := c.Chunk(ctx, it.Release.Record, maxPolicy)
		catalogue, err2 := c.Chunk(ctx, it.Release.Catalogue, maxCatalogue)
		var names []byte
		var err3 error
		if it.Release.Names != nil {
			names, err3 = c.Chunk(ctx, *it.Release.Names, maxCatalogue)
		}
		if err := errors.Join(err1, err2, err3); err != nil {
			return nil, fmt.Errorf("release %s: %w", it.Release.Record, err)
		}
		r, list, err := codesign.VerifyTrusted(record, catalogue, p)
		if err != nil {
			return nil, fmt.Errorf("release %s: %w", it.Release.Record, err)
		}
		src, err := codesign.ReleaseSource(r, list, names)
		if err != nil {
			return nil, fmt.Errorf("release %s: %w", it.Release.Record, err)
		}
		b.releases[it.Release.Record] = r.Product + " " + r.Version
		out = append(out, src)
	}
	return out, nil
}

// believes says whether hosts that have this bundle would take another one: its
// policy and manifest are signed by whom this policy trusts.
func (b *bundle) believes(other *bundle) error {
	roots := codesign.Roots(b.base, codesign.SignsPolicy)
	if _, err := codesign.VerifyManifest(other.signed, roots); err != nil {
		return err
	}
	_, err := codesign.VerifyPolicy(other.document, roots)
	return err
}

// problemOf is an error as what is in the way; false for one that is no fault
// of what was uploaded.
func problemOf(err error) (Problem, bool) {
	for _, k := range []struct {
		kind error
		code string
	}{{errs.NotFound, "missing"}, {errs.Untrusted, "untrusted"}, {errs.Invalid, "malformed"}, {errs.Denied, "refused"}, {errs.Unsupported, "unsupported"}, {errs.Conflict, "conflict"}} {
		if errors.Is(err, k.kind) {
			return Problem{Code: k.code, Text: clip(err.Error(), maxText)}, true
		}
	}
	return Problem{}, false
}
