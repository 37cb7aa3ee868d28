package hosts

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// HostProperties are what the document of a host holds. Labels, Critical and the
// tags are for people to change; the rest changes by enrolment and by actions.
type HostProperties struct {
	ID         string            `json:"hostId"` // never used again for another host
	Joined     time.Time         `json:"joined"`
	Anchor     string            `json:"anchorHost,omitempty"` // the id that the host's own anchor has for it
	Labels     map[string]string `json:"labels,omitempty"`     // they outdo what the host says of itself
	Critical   bool              `json:"critical,omitempty"`   // one of these that a change breaks is enough
	Revoked    time.Time         `json:"revoked,omitzero"`     // for good
	Isolated   bool              `json:"isolated,omitempty"`
	Attest     time.Time         `json:"attestAfter,omitzero"` // attest again if the last time was before
	Resend     time.Time         `json:"resendInventory,omitzero"`
	JoinedWith string            `json:"joinToken,omitempty"` // SHA-256 of the token
}

// TokenProperties are what the document of a join token holds.
type TokenProperties struct {
	Expires  time.Time         `json:"expires"`
	Name     string            `json:"name,omitempty"`     // the only name that a host may join under; "" for any
	Labels   map[string]string `json:"labels,omitempty"`   // that the host gets
	Critical bool              `json:"critical,omitempty"` // that the host gets
	Used     *TokenUse         `json:"used,omitempty"`
}

// TokenUse is who used a join token.
type TokenUse struct {
	At   time.Time        `json:"at"`
	Host resource.ID      `json:"host"`
	Key  integrity.Digest `json:"key"` // SHA-256 of the public key
}

// ManifestProperties are what the document of a manifest holds. All but Bundle is
// read from it, so that people see it; nothing of it was verified.
type ManifestProperties struct {
	Bundle    []byte             `json:"bundle"` // the signed document
	Epoch     uint64             `json:"epoch"`
	NotBefore time.Time          `json:"notBefore"`
	NotAfter  time.Time          `json:"notAfter"`
	Policy    integrity.Digest   `json:"policy"`
	Index     []integrity.Digest `json:"index"`
	Undoes    *integrity.Digest  `json:"undoes,omitempty"`
	Tightens  bool               `json:"tightens,omitempty"`
}

// Bounds of documents.
const (
	maxTokenLife  = 30 * 24 * time.Hour
	maxLabels     = 32
	maxLabelName  = 128 // bytes
	maxLabelValue = 256 // bytes
	maxAnchor     = 253 // bytes
)

// Kinds are the types of documents that this package keeps.
func Kinds() []control.Kind {
	return []control.Kind{
		{Type: fleet.TypeHost, Check: checkHost, Actions: map[string]control.Action{
			"isolate": {Do: hostAction(func(h *HostProperties, _ time.Time) { h.Isolated = true })},
			"release": {Do: hostAction(func(h *HostProperties, _ time.Time) { h.Isolated = false })},
			"revoke": {Do: hostAction(func(h *HostProperties, now time.Time) {
				if h.Revoked.IsZero() {
					h.Revoked = now
				}
			})},
			"attest":          {Do: hostAction(func(h *HostProperties, now time.Time) { h.Attest = now })},
			"resendInventory": {Do: hostAction(func(h *HostProperties, now time.Time) { h.Resend = now })},
		}},
		{Type: fleet.TypeJoinToken, Check: checkToken},
		{Type: fleet.TypeManifest, Check: checkManifest},
	}
}

// read reads the properties of a stored document. What is not known is passed
// over: a later version, of another replica, may have written it.
func read(d *resource.Document, v any) error {
	if err := json.Unmarshal(d.Properties, v); err != nil {
		return fmt.Errorf("properties: %w: %w", err, errs.Invalid)
	}
	return nil
}

// readNew reads the properties of a document that somebody writes: what is not
// known is refused.
func readNew(d *resource.Document, v any) error {
	dec := json.NewDecoder(bytes.NewReader(d.Properties))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("properties: %w: %w", err, errs.Invalid)
	}
	return nil
}

func write(d *resource.Document, v any) (err error) {
	d.Properties, err = json.Marshal(v)
	return err
}

// hostAction is an action on a host that is not revoked.
func hostAction(change func(*HostProperties, time.Time)) func(context.Context, control.Tx, control.Actor, *resource.Document, json.RawMessage) (any, error) {
	return func(_ context.Context, _ control.Tx, _ control.Actor, d *resource.Document, _ json.RawMessage) (any, error) {
		var h HostProperties
		if err := read(d, &h); err != nil {
			return nil, err
		}
		change(&h, time.Now().UTC().Truncate(time.Second))
		return h, write(d, &h)
	}
}

func checkHost(_ context.Context, _ control.Tx, old, d *resource.Document) error {
	if old == nil {
		return fmt.Errorf("hosts come by joining, see ringwall fleet join-token: %w", errs.Denied)
	}
	var was, is HostProperties
	if err := errors.Join(read(old, &was), readNew(d, &is)); err != nil {
		return err
	}
	if err := checkLabels(is.Labels); err != nil {
		return err
	}
	same := is
	same.Labels, same.Critical = was.Labels, was.Critical
	a, err := json.Marshal(was)
	b, err2 := json.Marshal(same)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		return fmt.Errorf("of a host only labels, critical and the tags are changed by writing, the rest by actions such as isolate: %w", errs.Invalid)
	}
	return nil
}

func checkLabels(m map[string]string) error {
	if len(m) > maxLabels {
		return fmt.Errorf("%d labels (at most %d): %w", len(m), maxLabels, errs.Invalid)
	}
	for k, v := range m {
		if k == "" || len(k) > maxLabelName || len(v) > maxLabelValue || !plain(k) || !plain(v) {
			return fmt.Errorf("label %.80q: too long, or with control characters: %w", k, errs.Invalid)
		}
	}
	return nil
}

// plain is a text without control characters.
func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

func checkToken(_ context.Context, _ control.Tx, old, d *resource.Document) error {
	var is TokenProperties
	if err := readNew(d, &is); err != nil {
		return err
	}
	if b, err := hex.DecodeString(d.ID.Name()); err != nil || len(b) != sha256.Size || strings.ToLower(d.ID.Name()) != d.ID.Name() {
		return fmt.Errorf("the name of a join token is its SHA-256 in lower-case hex: %w", errs.Invalid)
	}
	switch {
	case old != nil:
		return fmt.Errorf("a join token is not changed: delete it and make another: %w", errs.Denied)
	case is.Used != nil:
		return fmt.Errorf("a new join token was used by nobody: %w", errs.Invalid)
	case is.Expires.IsZero() || time.Until(is.Expires) > maxTokenLife:
		return fmt.Errorf("a join token expires, within %v: %w", maxTokenLife, errs.Invalid)
	case is.Name != "" && !control.ValidName(is.Name):
		return fmt.Errorf("name %.80q: want letters, digits, dots, dashes: %w", is.Name, errs.Invalid)
	}
	return checkLabels(is.Labels)
}

// chunkTx is what a transaction of the store does for chunks.
type chunkTx interface {
	MissingChunks(ctx context.Context, all []integrity.Digest) ([]integrity.Digest, error)
	Chunk(ctx context.Context, sha256 integrity.Digest, offset int64, limit int) (data []byte, size int64, err error)
	PutChunkPart(ctx context.Context, sha256 integrity.Digest, part int, data []byte) error
	PutChunk(ctx context.Context, sha256 integrity.Digest, size int64) error
}

// of returns what a transaction can do beside the tree.
func of[T any](tx control.Tx) (T, error) {
	t, ok := tx.(T)
	if !ok {
		return t, fmt.Errorf("this store keeps no hosts: %w", errs.Unsupported)
	}
	return t, nil
}

// checkManifest takes a manifest whose parts are all there, so that no host is
// told to fetch what there is not. Whether it is to be believed is for hosts to
// decide: the server has no key that it would verify with.
func checkManifest(ctx context.Context, tx control.Tx, old, d *resource.Document) error {
	var in ManifestProperties
	if err := readNew(d, &in); err != nil {
		return err
	}
	m, err := codesign.UnverifiedManifest(in.Bundle)
	if err != nil {
		return err
	}
	at, err := ManifestID(m)
	if err != nil {
		return err
	}
	if !at.Equal(d.ID) {
		return fmt.Errorf("the manifest of this digest and scope belongs to %s: %w", at, errs.Invalid)
	}
	out := ManifestProperties{
		Bundle: in.Bundle, Epoch: m.Epoch, NotBefore: m.NotBefore, NotAfter: m.NotAfter, Policy: m.Policy, Index: append([]integrity.Digest{}, m.Index...), Tightens: m.Tightens,
	}
	if !m.Undoes.IsZero() {
		out.Undoes = &m.Undoes
	}
	if err := complete(ctx, tx, m); err != nil {
		return err
	}
	return write(d, &out)
}

// ManifestID is where a manifest stands in the tree: below its scope, named by
// its digest.
func ManifestID(m *codesign.Manifest) (resource.ID, error) {
	scope, err := resource.ParseID(m.Scope)
	if err != nil {
		return scope, fmt.Errorf("the manifest's scope: %w", err)
	}
	return below(scope, fleet.TypeManifest, m.Digest.String())
}

// below is the id of a resource of ours in a scope.
func below(scope resource.ID, kind, name string) (resource.ID, error) {
	return resource.ParseID(strings.TrimSuffix(scope.String(), "/") + "/providers/" + kind + "/" + name)
}

// complete says errs.NotFound unless all content of a manifest is stored.
func complete(ctx context.Context, tx control.Tx, m *codesign.Manifest) error {
	chunks, err := of[chunkTx](tx)
	if err != nil {
		return err
	}
	missing, err := chunks.MissingChunks(ctx, append([]integrity.Digest{m.Policy}, m.Index...))
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("%d parts of the manifest were not pushed, such as %v: %w", len(missing), missing[0], errs.NotFound)
	}
	content := map[integrity.Digest]bool{}
	for _, part := range m.Index {
		b, size, err := chunks.Chunk(ctx, part, 0, codesign.MaxIndexPart)
		if err != nil {
			return err
		}
		if size > codesign.MaxIndexPart {
			return fmt.Errorf("part %v of the index has %d bytes (at most %d): %w", part, size, codesign.MaxIndexPart, errs.Invalid)
		}
		items, err := codesign.ReadIndex(b)
		if err != nil {
			return fmt.Errorf("part %v: %w", part, err)
		}
		for i := range items {
			for _, c := range Content(&items[i]) {
				content[c] = true
			}
		}
	}
	if missing, err = chunks.MissingChunks(ctx, slices.Collect(maps.Keys(content))); err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("%d files of the manifest's releases were not pushed, such as %v: %w", len(missing), missing[0], errs.NotFound)
	}
	return nil
}

// Content are the digests of the files of an item of a manifest's index.
func Content(i *codesign.Item) []integrity.Digest {
	switch {
	case i.Supplement != nil:
		return []integrity.Digest{*i.Supplement}
	case i.Release != nil && i.Release.Names != nil:
		return []integrity.Digest{i.Release.Record, i.Release.Catalogue, *i.Release.Names}
	case i.Release != nil:
		return []integrity.Digest{i.Release.Record, i.Release.Catalogue}
	}
	return nil
}
