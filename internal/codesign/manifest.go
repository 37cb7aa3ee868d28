package codesign

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const (
	manifestPayloadType = "application/vnd.ringwall.manifest+json"
	manifestVersion     = 1
	// MaxManifest is the longest signed manifest, in bytes.
	MaxManifest = 256 << 10
	// MaxIndex is how many parts a manifest's list of releases may have.
	MaxIndex = 256
	// MaxIndexPart is the longest part of it, in bytes.
	MaxIndexPart = 4 << 20
)

// Manifest says what a host should have: one policy, and the releases and
// supplements that go with it. All of it is named by digest, in parts that never
// change, so that a host fetches only what it does not have. It is signed with
// the policy's purpose, away from the server: the server chooses which host gets
// which manifest and when, and can make none.
//
// Its epoch is its policy's. Going back is a manifest with a higher epoch and
// the content before, signed together with the change that it undoes.
type Manifest struct {
	Scope     string    // id in the resource tree below which hosts may take it, "/" for all
	Epoch     uint64    // of its policy
	NotBefore time.Time // UTC, whole seconds
	NotAfter  time.Time // until when a host may begin to use it; what is in force stays
	Policy    integrity.Digest
	// Index are the digests of the parts of the list of releases and
	// supplements, in order. A change of one release changes one part.
	Index []integrity.Digest
	// Undoes is the manifest that this one takes back, zero for one that goes
	// forward: a host that has neither that one nor this one refuses it.
	Undoes integrity.Digest
	// Tightens: a host does not go back by itself from it, although its own
	// checks fail. For emergencies only.
	Tightens bool

	// Known once verified.
	Digest   integrity.Digest // SHA-256 of the signed document
	Identity string           // who signed
	SignedAt time.Time
}

// Item is a release or a supplement in a part of the index. Its parts are
// named by the SHA-256 of their bytes.
type Item struct {
	Release    *ReleaseItem      `json:"release,omitempty"`
	Supplement *integrity.Digest `json:"supplement,omitempty"`
}

// ReleaseItem are the digests of a release's files.
type ReleaseItem struct {
	Record    integrity.Digest  `json:"record"`
	Catalogue integrity.Digest  `json:"catalogue"`
	Names     *integrity.Digest `json:"names,omitempty"`
}

type wireManifest struct {
	Version   int                `json:"version"`
	Scope     string             `json:"scope"`
	Epoch     uint64             `json:"epoch"`
	NotBefore string             `json:"not_before"`
	NotAfter  string             `json:"not_after"`
	Policy    integrity.Digest   `json:"policy"`
	Index     []integrity.Digest `json:"index"`
	Undoes    *integrity.Digest  `json:"undoes,omitempty"`
	Tightens  bool               `json:"tightens,omitempty"`
}

// SignManifest signs a manifest.
func SignManifest(s *pki.Signer, m Manifest) ([]byte, error) {
	b, err := signManifest(s, &m)
	if err != nil {
		return nil, fmt.Errorf("sign manifest of epoch %d: %w", m.Epoch, err)
	}
	return b, nil
}

func signManifest(s *pki.Signer, m *Manifest) ([]byte, error) {
	if s.Purpose != pki.PurposePolicy {
		return nil, fmt.Errorf("with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	w := wireManifest{
		Version: manifestVersion, Scope: m.Scope, Epoch: m.Epoch, NotBefore: formatTime(m.NotBefore), NotAfter: formatTime(m.NotAfter),
		Policy: m.Policy, Index: append([]integrity.Digest{}, m.Index...), Tightens: m.Tightens,
	}
	if m.Undoes != (integrity.Digest{}) {
		w.Undoes = &m.Undoes
	}
	payload, err := json.Marshal(w)
	if err != nil {
		return nil, err
	}
	if _, err := readManifest(payload); err != nil {
		return nil, err
	}
	b, err := s.Sign(manifestPayloadType, payload)
	if err == nil && len(b) > MaxManifest {
		err = fmt.Errorf("%d bytes (at most %d): %w", len(b), MaxManifest, errs.Invalid)
	}
	return b, err
}

// VerifyManifest checks a signed manifest's signature and form. Whether a host
// may take it (scope, time, epoch, what it undoes) is the host's to decide.
func VerifyManifest(bundle []byte, roots pki.TrustRoots) (*Manifest, error) {
	if len(bundle) > MaxManifest {
		return nil, fmt.Errorf("manifest: %d bytes (at most %d): %w", len(bundle), MaxManifest, errs.Invalid)
	}
	v, err := pki.VerifyBundle(bundle, roots, pki.PurposePolicy)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if v.PayloadType != manifestPayloadType {
		return nil, fmt.Errorf("manifest: payload type %q: %w", v.PayloadType, errs.Untrusted)
	}
	m, err := readManifest(v.Payload)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	m.Digest, m.Identity, m.SignedAt = sha256.Sum256(bundle), v.Identity, v.SignedAt
	return m, nil
}

// UnverifiedManifest reads what a signed manifest says, for whoever hands it on
// and cannot or need not tell whether to believe it.
func UnverifiedManifest(bundle []byte) (*Manifest, error) {
	if len(bundle) > MaxManifest {
		return nil, fmt.Errorf("manifest: %d bytes (at most %d): %w", len(bundle), MaxManifest, errs.Invalid)
	}
	kind, payload, err := pki.UnverifiedPayload(bundle, MaxManifest)
	if err == nil && kind != manifestPayloadType {
		err = fmt.Errorf("payload type %q: %w", kind, errs.Invalid)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	m, err := readManifest(payload)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	m.Digest = sha256.Sum256(bundle)
	return m, nil
}

func readManifest(payload []byte) (*Manifest, error) {
	var w wireManifest
	if err := pki.UnmarshalStrict(payload, &w, MaxManifest); err != nil {
		return nil, err
	}
	bad := func(what string) (*Manifest, error) { return nil, fmt.Errorf("%s: %w", what, errs.Invalid) }
	from, err := parseTime(w.NotBefore)
	if err != nil {
		return nil, err
	}
	to, err := parseTime(w.NotAfter)
	if err != nil {
		return nil, err
	}
	switch {
	case w.Version != manifestVersion:
		return bad(fmt.Sprintf("version %d", w.Version))
	case !printable(w.Scope, 1, 2048) || w.Scope[0] != '/':
		return bad("scope is no id")
	case w.Epoch == 0:
		return bad("epoch is 0")
	case !to.After(from):
		return bad("ends before it begins")
	case w.Policy == integrity.Digest{}:
		return bad("no policy")
	case len(w.Index) > MaxIndex:
		return bad(fmt.Sprintf("%d parts of the index (at most %d)", len(w.Index), MaxIndex))
	case slices.Contains(w.Index, integrity.Digest{}):
		return bad("a part of the index has no digest")
	}
	m := &Manifest{Scope: w.Scope, Epoch: w.Epoch, NotBefore: from, NotAfter: to, Policy: w.Policy, Index: w.Index, Tightens: w.Tightens}
	if w.Undoes != nil {
		if m.Undoes = *w.Undoes; m.Undoes == (integrity.Digest{}) {
			return bad("undoes nothing")
		}
	}
	return m, nil
}

// indexPart is how many items one part has on average, at most: a change of one
// release costs a host one part of a few KiB.
const indexPart = 24

// WriteIndex splits items into parts by the first bits of their digests, so that
// a change moves one part, and returns the parts in order.
func WriteIndex(items []Item) ([][]byte, error) {
	parts := 1
	for parts < MaxIndex && len(items) > parts*indexPart {
		parts *= 2
	}
	split := make([][]Item, parts)
	for _, it := range items {
		d, err := it.key()
		if err != nil {
			return nil, err
		}
		at := int(d[0]) * parts / 256
		split[at] = append(split[at], it)
	}
	var out [][]byte
	for _, s := range split {
		if len(s) == 0 {
			continue
		}
		slices.SortFunc(s, func(a, b Item) int {
			ka, _ := a.key() // checked above
			kb, _ := b.key()
			return slices.Compare(ka[:], kb[:])
		})
		b, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		if len(b) > MaxIndexPart {
			return nil, fmt.Errorf("index of %d items: a part has %d bytes (at most %d): %w", len(items), len(b), MaxIndexPart, errs.Invalid)
		}
		out = append(out, b)
	}
	return out, nil
}

func (i *Item) key() (integrity.Digest, error) {
	switch {
	case i.Release != nil && i.Supplement == nil && i.Release.Record != integrity.Digest{} && i.Release.Catalogue != integrity.Digest{}:
		return i.Release.Record, nil
	case i.Supplement != nil && i.Release == nil && *i.Supplement != integrity.Digest{}:
		return *i.Supplement, nil
	}
	return integrity.Digest{}, fmt.Errorf("index: an item is neither a release nor a supplement: %w", errs.Invalid)
}

// ReadIndex reads one part of an index whose digest was compared.
func ReadIndex(part []byte) ([]Item, error) {
	var items []Item
	if err := pki.UnmarshalStrict(part, &items, MaxIndexPart); err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	for i := range items {
		if _, err := items[i].key(); err != nil {
			return nil, err
		}
	}
	return items, nil
}
