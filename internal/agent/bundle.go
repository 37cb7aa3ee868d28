package agent

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// A host in a fleet is given manifests: one policy each, with the releases and
// supplements that go with it. What a manifest brings stays apart from what was
// handed in on the host itself: a policy is always compiled with what its own
// manifest lists, so that going back to the policy before goes back whole, and
// nothing has to be undone on the disk. See docs/design/agent-link.md.

// Names below the state directory.
const (
	dirFleet       = "fleet"
	dirChunks      = "chunks" // content by its SHA-256, of the manifests below
	fileBundle     = dirFleet + "/bundle.json"
	fileBundleCopy = dirFleet + "/bundle.copy.json"
	fileBundlePrev = dirFleet + "/bundle.previous.json"
	fileTrial      = dirFleet + "/trial.json"   // the manifest that is being tried
	fileOutcome    = dirFleet + "/outcome.json" // of the last manifest
)

// Bounds of what a manifest may bring.
const (
	maxBundleRecord = 64 << 10
	maxItems        = 50_000
)

// bundle is what a manifest gives a host, as the state keeps it. Nothing in it is
// believed for lying there: the policy and each item prove themselves when they
// are loaded, and each part is compared with its digest.
type bundle struct {
	Manifest integrity.Digest   `json:"manifest"` // SHA-256 of the signed document
	Epoch    uint64             `json:"epoch"`
	Policy   integrity.Digest   `json:"policy"` // SHA-256 of the signed policy
	Index    []integrity.Digest `json:"index"`
	Tightens bool               `json:"tightens,omitempty"`
	Since    int64              `json:"since_us"` // begun, by the host's clock
}

func (b *bundle) isZero() bool { return b == nil || b.Manifest.IsZero() }

func (s *State) readBundle(file string) (*bundle, error) {
	raw, err := readFile(s.path(file), maxBundleRecord)
	if err != nil {
		return nil, err
	}
	return parseBundle(raw)
}

func parseBundle(raw []byte) (*bundle, error) {
	b := &bundle{}
	if err := pki.UnmarshalStrict(raw, b, maxBundleRecord); err != nil {
		return nil, fmt.Errorf("record of a manifest: %w", err)
	}
	if b.Manifest.IsZero() || b.Policy.IsZero() || b.Epoch == 0 || len(b.Index) > codesign.MaxIndex {
		return nil, fmt.Errorf("record of a manifest: incomplete: %w", errs.Invalid)
	}
	return b, nil
}

func (s *State) writeBundle(file string, b *bundle) error { return s.writeJSON(file, b) }

func (s *State) writeJSON(file string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return host.WriteFile(s.path(file), append(raw, '\n'), 0o600)
}

// bundleOf is the manifest that a signed policy came with, or nil. A policy that
// was handed in on the host itself is used with what the last confirmed manifest
// brought.
func (s *State) bundleOf(policy []byte) (b *bundle, own bool) {
	d := integrity.Digest(sha256.Sum256(policy))
	var last *bundle
	for _, f := range []string{fileBundle, fileBundleCopy, fileTrial, fileBundlePrev} {
		b, err := s.readBundle(f)
		if err != nil {
			if !errors.Is(err, errs.NotFound) {
				s.noteDamage("%s is damaged: %v", f, err)
			}
			continue
		}
		if b.Policy == d {
			return b, true
		}
		if last == nil && (f == fileBundle || f == fileBundleCopy) {
			last = b
		}
	}
	return last, false
}

// items are the releases and supplements that a manifest lists. What cannot be
// read authorises nothing and is told.
func (s *State) items(l *loaded) []codesign.Item {
	if l.given.isZero() {
		return nil
	}
	var out []codesign.Item
	for _, d := range l.given.Index {
		part, err := s.chunk(d, codesign.MaxIndexPart)
		if err == nil && integrity.Digest(sha256.Sum256(part)) != d {
			err = fmt.Errorf("it is damaged: %w", errs.Untrusted)
		}
		var list []codesign.Item
		if err == nil {
			list, err = codesign.ReadIndex(part)
		}
		if err == nil && len(out)+len(list) > maxItems {
			err = fmt.Errorf("more than %d releases and supplements: %w", maxItems, errs.Invalid)
		}
		if err != nil {
			l.skipGiven("part "+d.String()+" of the manifest's list", err)
			continue
		}
		out = append(out, list...)
	}
	return out
}

// givenRelease is the source of a release that came by a manifest.
func (s *State) givenRelease(it *codesign.ReleaseItem, p *integrity.Policy) (integrity.Source, error) {
	var none integrity.Source
	record, err := s.chunk(it.Record, maxBundle)
	if err != nil {
		return none, err
	}
	catalogue, err := s.chunk(it.Catalogue, maxCatalogue)
	if err != nil {
		return none, err
	}
	var names []byte
	if it.Names != nil {
		if names, err = s.chunk(*it.Names, maxCatalogue); err != nil {
			return none, err
		}
	}
	r, c, err := codesign.VerifyTrusted(record, catalogue, p)
	if err != nil {
		return none, err
	}
	return codesign.ReleaseSource(r, c, names)
}

// givenSources adds the releases of the manifest to those of the host itself.
func (s *State) givenSources(l *loaded, have []integrity.Source) []integrity.Source {
	known := map[integrity.Digest]bool{}
	for i := range have {
		known[have[i].Origin.Release] = true
	}
	for _, it := range l.items {
		if it.Release == nil {
			continue
		}
		src, err := s.givenRelease(it.Release, l.policy)
		if err != nil {
			l.skipGiven("release "+it.Release.Record.String(), err)
			continue
		}
		if !known[src.Origin.Release] {
			known[src.Origin.Release] = true
			have = append(have, l.note(src))
		}
	}
	return have
}

// givenSupplements adds the supplements of the manifest to those of the host
// itself. Of two with one name the higher epoch counts.
func (s *State) givenSupplements(l *loaded, base *integrity.Policy, roots pki.TrustRoots, have []*integrity.Policy) []*integrity.Policy {
	for _, it := range l.items {
		if it.Supplement == nil {
			continue
		}
		raw, err := s.chunk(*it.Supplement, maxBundle)
		var p *integrity.Policy
		if err == nil {
			p, err = verifySupplement(raw, roots, base.Name)
		}
		if err != nil {
			l.skipGiven("supplement "+it.Supplement.String(), err)
			continue
		}
		i := slices.IndexFunc(have, func(x *integrity.Policy) bool { return x.Name == p.Name })
		switch {
		case i < 0:
			have = append(have, p)
		case have[i].Epoch < p.Epoch:
			have[i] = p
		}
	}
	return have
}

// healBundle writes the record of the confirmed manifest and its copy as they
// should be.
func (s *State) healBundle() {
	for _, f := range [][2]string{{fileBundle, fileBundleCopy}, {fileBundleCopy, fileBundle}} {
		b, err := s.readBundle(f[0])
		if err != nil {
			continue
		}
		if _, err := s.readBundle(f[1]); err != nil {
			_ = s.writeBundle(f[1], b) // the next start tries again
		}
		return
	}
}

// commitBundle makes the manifest of a confirmed policy the confirmed one. It may
// be called again after a crash at any step.
func (s *State) commitBundle(policy []byte) error {
	trial, err := s.readBundle(fileTrial)
	if err != nil {
		if errors.Is(err, errs.NotFound) {
			return nil
		}
		return host.RemoveFile(s.path(fileTrial)) // damaged: of no use
	}
	if trial.Policy != sha256.Sum256(policy) {
		return host.RemoveFile(s.path(fileTrial))
	}
	if old, err := s.readBundle(fileBundle); err == nil && old.Manifest != trial.Manifest {
		if err := s.writeBundle(fileBundlePrev, old); err != nil {
			return err
		}
	}
	for _, f := range []string{fileBundleCopy, fileBundle} {
		if err := s.writeBundle(f, trial); err != nil {
			return err
		}
	}
	return host.RemoveFile(s.path(fileTrial))
}
