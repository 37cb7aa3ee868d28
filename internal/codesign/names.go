package codesign

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/klauspost/compress/zstd"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// The nam1 format: zstd over a header, the names of every record of a
// catalogue in the catalogue's order, and the names that have no content
// (links, devices). Hosts do not need it; people do.
const (
	namMagic      = "RWNAM1\n\x00"
	maxNames      = 256 << 20 // bytes, decompressed
	maxPath       = 4096
	maxOrigins    = 1 << 20 // every archive in an artefact is one
	maxNameWindow = 8 << 20
)

// Name is one place where content was found.
type Name struct {
	Path   string
	Mode   fs.FileMode
	Origin string // which part of the artefact: "data", "control", …; empty for a directory; see Member
	Target string // for links
}

// Location is where content lies, for people: the path, and for what is in an
// archive within the artefact also where that is.
func (n Name) Location() string {
	if strings.HasSuffix(n.Origin, "!") {
		return n.Origin + "/" + n.Path
	}
	return n.Path
}

// NameTable says where the content of a catalogue's records was found.
type NameTable struct {
	Catalogue integrity.Digest
	Names     [][]Name // by record
	Others    []Name   // links and special files: they have no content
}

// Encode returns the nam1 blob.
func (t *NameTable) Encode() ([]byte, error) {
	var origins []string
	numbers := make(map[string]uint64)
	origin := func(s string) uint64 {
		n, ok := numbers[s]
		if !ok {
			n = uint64(len(origins))
			numbers[s] = n
			origins = append(origins, s)
		}
		return n
	}
	var body []byte
	str := func(s string) { body = append(binary.AppendUvarint(body, uint64(len(s))), s...) }
	name := func(n *Name) {
		str(n.Path)
		body = binary.AppendUvarint(body, uint64(n.Mode))
		body = binary.AppendUvarint(body, origin(n.Origin))
		str(n.Target)
	}
	for _, ns := range t.Names {
		body = binary.AppendUvarint(body, uint64(len(ns)))
		for i := range ns {
			name(&ns[i])
		}
	}
	body = binary.AppendUvarint(body, uint64(len(t.Others)))
	for i := range t.Others {
		name(&t.Others[i])
	}
	if len(origins) > maxOrigins || len(body) > maxNames/2 {
		return nil, fmt.Errorf("name table: too large: %w", errs.Invalid)
	}
	tail := body
	body = append(append([]byte(namMagic), t.Catalogue[:]...), binary.AppendUvarint(nil, uint64(len(t.Names)))...)
	body = binary.AppendUvarint(body, uint64(len(origins)))
	for _, o := range origins {
		str(o)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return nil, fmt.Errorf("name table: %w", err)
	}
	defer enc.Close()
	return enc.EncodeAll(append(body, tail...), nil), nil
}

// ParseNames reads a nam1 blob that belongs to the catalogue.
func ParseNames(blob []byte, c *Catalogue) (*NameTable, error) {
	t, err := parseNames(blob, c)
	if err != nil {
		return nil, fmt.Errorf("name table: %w", err)
	}
	return t, nil
}

func parseNames(blob []byte, c *Catalogue) (*NameTable, error) {
	dec, err := zstd.NewReader(bytes.NewReader(blob), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxNameWindow),
		zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	defer dec.Close()
	// Paths compress well, but not like this: more than 200:1 is a bomb.
	limit := min(int64(maxNames), 1<<20+200*int64(len(blob)))
	body, err := io.ReadAll(io.LimitReader(dec, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("decompresses to more than %d bytes: %w", limit, errs.Invalid)
	}
	r := &nameReader{b: body}
	if string(r.take(8)) != namMagic {
		return nil, fmt.Errorf("no nam1 header: %w", errs.Invalid)
	}
	t := &NameTable{}
	copy(t.Catalogue[:], r.take(32))
	if want := c.Digest(); t.Catalogue != want {
		return nil, fmt.Errorf("belongs to catalogue %v, not %v: %w", t.Catalogue, want, errs.Untrusted)
	}
	if n := r.number(); n != uint64(c.Len()) { //nolint:gosec // a length
		return nil, fmt.Errorf("%d records, the catalogue has %d: %w", n, c.Len(), errs.Invalid)
	}
	origins := make([]string, r.count(maxOrigins))
	for i := range origins {
		origins[i] = r.text()
	}
	t.Names = make([][]Name, c.Len())
	for i := range t.Names {
		t.Names[i] = r.names(origins)
	}
	t.Others = r.names(origins)
	if r.bad || len(r.b) > 0 {
		return nil, fmt.Errorf("malformed: %w", errs.Invalid)
	}
	return t, nil
}

// nameReader reads from b; once something does not fit, bad stays set and
// everything reads as empty.
type nameReader struct {
	b   []byte
	bad bool
}

func (r *nameReader) take(n int) []byte {
	if n > len(r.b) {
		r.b, r.bad = nil, true
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *nameReader) number() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.b, r.bad = nil, true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count reads a number of things that take at least a byte each.
func (r *nameReader) count(limit int) int {
	n := r.number()
	if n > uint64(limit) || n > uint64(len(r.b)) { //nolint:gosec // both are lengths
		r.b, r.bad = nil, true
		return 0
	}
	return int(n) //nolint:gosec // bounded
}

func (r *nameReader) text() string { return string(r.take(r.count(maxPath))) }

func (r *nameReader) names(origins []string) []Name {
	n := r.count(len(r.b))
	out := make([]Name, 0, min(n, 1024))
	for range n {
		m := Name{Path: r.text()}
		mode, o := r.number(), r.number()
		m.Target = r.text()
		if r.bad || mode > 1<<32-1 || o >= uint64(len(origins)) {
			r.b, r.bad = nil, true
			return nil
		}
		m.Mode, m.Origin = fs.FileMode(mode), origins[o]
		out = append(out, m)
	}
	return out
}

// CleanPath returns a member's path in the one form that is used everywhere:
// relative, without "." or "..". Anything that would leave the artefact is
// refused (errs.Invalid). The artefact's top is ".".
func CleanPath(p string) (string, error) {
	q := strings.TrimPrefix(p, "/")
	for strings.HasPrefix(q, "./") {
		q = strings.TrimLeft(q[2:], "/")
	}
	q = strings.TrimSuffix(q, "/")
	if q == "" {
		return ".", nil
	}
	if len(q) > maxPath || strings.ContainsRune(q, 0) {
		return "", fmt.Errorf("path %.80q: %w", p, errs.Invalid)
	}
	for part := range strings.SplitSeq(q, "/") {
		if (part == "." && q != ".") || part == ".." || part == "" {
			return "", fmt.Errorf("path %.80q: %w", p, errs.Invalid)
		}
	}
	return q, nil
}
