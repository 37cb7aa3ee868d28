package resource

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ringwall/internal/errs"
)

// Document is a managed thing in the tree.
type Document struct {
	ID         ID
	Type       string // as its maker spells it, such as "Ringwall.Integrity/policies"
	Location   string
	Tags       map[string]string
	Properties json.RawMessage // an object; null when it has none
	// Revision is the tree's when the document was last written; 0: not stored yet.
	Revision uint64
	System   SystemData
}

// SystemData says who made a document and who changed it last.
type SystemData struct {
	CreatedBy  string
	CreatedAt  time.Time
	ModifiedBy string
	ModifiedAt time.Time
}

// Bounds of a document.
const (
	MaxProperties = 4 << 20 // bytes
	maxTags       = 50
	maxTagName    = 512 // bytes
	maxTagValue   = 256 // bytes
	maxLocation   = 64  // bytes
)

// ETag names the state of a document, for If-Match.
func (d *Document) ETag() string { return strconv.Quote(strconv.FormatUint(d.Revision, 16)) }

// Created reports whether the last write made the document, and did not change one.
func (d *Document) Created() bool { return d.System.ModifiedAt.Equal(d.System.CreatedAt) }

// ParseETag reads what ETag returned.
func ParseETag(s string) (revision uint64, err error) {
	hex, ok := strings.CutPrefix(s, `"`)
	hex, ok2 := strings.CutSuffix(hex, `"`)
	n, err := strconv.ParseUint(hex, 16, 64)
	if !ok || !ok2 || err != nil || n == 0 {
		return 0, fmt.Errorf("etag %.40q: %w", s, errs.Invalid)
	}
	return n, nil
}

// Check says whether a document can be stored; the error is errs.Invalid.
func (d *Document) Check() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("resource %s: "+format+": %w", append(append([]any{d.ID}, a...), errs.Invalid)...)
	}
	switch {
	case d.ID.Key() == "":
		return bad("the root is no resource")
	case !strings.EqualFold(d.Type, d.ID.Type()):
		return bad("type is %.80q, its id is of a %s", d.Type, d.ID.Type())
	case len(d.Location) > maxLocation || !utf8.ValidString(d.Location):
		return bad("location is too long or not UTF-8")
	case len(d.Tags) > maxTags:
		return bad("%d tags (at most %d)", len(d.Tags), maxTags)
	case len(d.Properties) > MaxProperties:
		return bad("properties of %d bytes (at most %d)", len(d.Properties), MaxProperties)
	case len(d.Properties) > 0 && (!json.Valid(d.Properties) || !utf8.Valid(d.Properties)):
		return bad("properties are not JSON")
	}
	for k, v := range d.Tags {
		if k == "" || len(k) > maxTagName || len(v) > maxTagValue || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return bad("tag %.80q is empty, too long or not UTF-8", k)
		}
	}
	return nil
}

type wireSystem struct {
	CreatedBy  string    `json:"createdBy"`
	CreatedAt  time.Time `json:"createdAt"`
	ModifiedBy string    `json:"lastModifiedBy"`
	ModifiedAt time.Time `json:"lastModifiedAt"`
}

// MarshalJSON writes the envelope of Azure Resource Manager.
func (d Document) MarshalJSON() ([]byte, error) {
	w := struct {
		ID         ID                `json:"id"`
		Name       string            `json:"name"`
		Type       string            `json:"type"`
		Location   string            `json:"location,omitempty"`
		Tags       map[string]string `json:"tags,omitempty"`
		ETag       string            `json:"etag,omitempty"`
		Properties json.RawMessage   `json:"properties,omitempty"`
		System     *wireSystem       `json:"systemData,omitempty"`
	}{ID: d.ID, Name: d.ID.Name(), Type: d.Type, Location: d.Location, Tags: d.Tags, Properties: d.Properties}
	if d.Revision != 0 {
		w.ETag, w.System = d.ETag(), (*wireSystem)(&d.System)
	}
	return json.Marshal(w)
}

// When is the condition of a write; the zero value is none.
type When struct {
	Absent   bool   // only if there is no such document
	Revision uint64 // only if it is still this one; 0: whichever
}

// Change is one step of the feed. Revisions of the feed have no gaps.
type Change struct {
	Revision uint64
	Deleted  bool
	Document Document // after the change; of a deletion, the last one
}

// Query selects documents.
type Query struct {
	Below ID     // it and everything below it
	Type  string // in any case; "" for all
	After string // the key of the last one of the page before
	Limit int    // 1 to MaxPage
}

// MaxPage is the longest page of a list.
const MaxPage = 1000
