package codesign

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Options say how to make a catalogue.
type Options struct {
	// AllFiles lists every regular file, also those that are no code, for
	// hosts whose interpreters may open authorised files only. Files that are
	// no code get the kind script and FlagData.
	AllFiles bool
}

// Built is the catalogue of an artefact.
type Built struct {
	Catalogue []byte // cat1
	Names     []byte // nam1
	Records   int
	Files     int   // regular files
	Code      int   // of them, those that are code
	Bytes     int64 // of all regular files; of what is no code, only the beginning is read where that is enough
	Kinds     map[integrity.Kind]int
}

// Build reads a source to its end and lists its executable content.
func Build(s Source, o Options) (*Built, error) {
	b := &builder{
		options: o, hasher: NewHasher(), buf: make([]byte, 256<<10),
		files: make(map[place]*content), names: make(map[integrity.Digest][]Name),
		out: &Built{Kinds: make(map[integrity.Kind]int)},
	}
	if err := s.Walk(b.visit); err != nil {
		return nil, fmt.Errorf("build catalogue: %w", err)
	}
	if err := b.finish(); err != nil {
		return nil, fmt.Errorf("build catalogue: %w", err)
	}
	return b.out, nil
}

type builder struct {
	options Options
	hasher  *Hasher
	buf     []byte
	files   map[place]*content // for hard links; nil: none can come
	records []Record
	names   map[integrity.Digest][]Name
	others  []Name
	out     *Built
}

// place is where a member was found.
type place struct{ origin, path string }

// content is what is known of a regular file besides its name and mode.
type content struct {
	digest, verity integrity.Digest
	looks          sniffed
	inner          integrity.Digest // of compressed modules and firmware
	mode           fs.FileMode
}

func (b *builder) visit(m Member, r io.Reader) error {
	at := place{m.Origin, m.Path}
	if _, dup := b.files[at]; dup {
		return fmt.Errorf("%q appears twice: %w", m.Path, errs.Invalid)
	}
	switch {
	case m.Hard:
		c, ok := b.files[place{m.Origin, m.Link}]
		if !ok || c == nil {
			return fmt.Errorf("%q is a hard link to %q, which does not come before it: %w", m.Path, m.Link, errs.Invalid)
		}
		if c.inner.IsZero() && Classify(m.Path, c.mode, nil).Compressed != "" {
			return fmt.Errorf("%q names compressed kernel code that %q does not: %w", m.Path, m.Link, errs.Unsupported)
		}
		b.files[at] = c
		b.add(m, *c)
		return nil
	case !m.Mode.IsRegular():
		b.others = append(b.others, Name{Path: m.Path, Mode: m.Mode, Origin: m.Origin, Target: m.Link})
		return nil
	case r == nil:
		return fmt.Errorf("%q has no content: %w", m.Path, errs.Invalid)
	}
	c, err := b.measure(m, r)
	if err != nil {
		return fmt.Errorf("%q: %w", m.Path, err)
	}
	b.files[at] = nil
	if !m.Alone {
		b.files[at] = &c
	}
	b.out.Files++
	b.out.Bytes += m.Size
	b.add(m, c)
	return nil
}

// measure reads the content once: its beginning, which says what it is, and
// then all of it, unless nothing will ever ask for the digest.
func (b *builder) measure(m Member, r io.Reader) (content, error) {
	first := b.buf[:HeadSize]
	if b.options.AllFiles { // all of it will be read: small files at once
		first = b.buf
	}
	n, err := io.ReadAtLeast(r, first, int(min(m.Size, HeadSize)))
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return content{}, err
	}
	first = first[:n]
	c := content{looks: sniff(first[:min(n, HeadSize)]), mode: m.Mode}
	class := classOf(m.Path, m.Mode, c.looks)
	if class.Kinds|m.Kinds == 0 && m.Alone && !b.options.AllFiles {
		return c, nil
	}
	b.hasher.Reset()
	total := int64(n)
	if class.Compressed != "" {
		// The kernel decompresses modules and firmware itself, so both the
		// file and what is inside must be known.
		counted := &Input{r: io.TeeReader(io.MultiReader(bytes.NewReader(bytes.Clone(first)), r), b.hasher)}
		if c.inner, err = innerDigest(counted, class.Compressed); err != nil {
			return content{}, err
		}
		total = counted.n
	} else {
		_, _ = b.hasher.Write(first) // never fails
		rest, err := io.CopyBuffer(b.hasher, onlyReader{r}, b.buf)
		if err != nil {
			return content{}, err
		}
		total += rest
	}
	if total != m.Size {
		return content{}, fmt.Errorf("%d bytes read, %d expected; it changed: %w", total, m.Size, errs.Conflict)
	}
	c.digest, c.verity = b.hasher.Sums()
	return c, nil
}

// onlyReader hides WriteTo, which would ignore the buffer.
type onlyReader struct{ io.Reader }

// innerDigest returns the SHA-256 of what is inside, and reads to the end.
func innerDigest(r io.Reader, want string) (integrity.Digest, error) {
	first := make([]byte, 6)
	n, err := io.ReadFull(r, first)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return integrity.Digest{}, err
	}
	if got := Compression(first[:n]); got != want {
		return integrity.Digest{}, fmt.Errorf("named .%s but holds %q: %w", want, got, errs.Invalid)
	}
	whole := io.MultiReader(bytes.NewReader(first[:n]), r)
	d, err := decompress(whole)
	if err != nil {
		return integrity.Digest{}, err
	}
	h := sha256.New() // what is inside is no file, and has no fs-verity digest
	_, err = io.Copy(h, d)
	err = errors.Join(err, d.Close())
	if err != nil {
		return integrity.Digest{}, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
	}
	if _, err := io.Copy(io.Discard, whole); err != nil {
		return integrity.Digest{}, err
	}
	return integrity.Digest(h.Sum(nil)), nil
}

// add records a name for content.
func (b *builder) add(m Member, c content) {
	class := classOf(m.Path, m.Mode, c.looks)
	class.Kinds |= m.Kinds
	class.Flags |= flagsOf(m)
	if class.Kinds != 0 {
		b.out.Code++
		for _, k := range integrity.Kinds() {
			if class.Kinds.Has(k) {
				b.out.Kinds[k]++
			}
		}
	} else {
		if !b.options.AllFiles {
			return
		}
		class.Kinds, class.Flags = integrity.SetOf(integrity.KindScript), class.Flags|FlagData
	}
	name := Name{Path: m.Path, Mode: m.Mode, Origin: m.Origin}
	b.records = append(b.records, Record{Digest: c.digest, Verity: c.verity, Kinds: class.Kinds, Flags: class.Flags})
	b.names[c.digest] = append(b.names[c.digest], name)
	if !c.inner.IsZero() {
		b.records = append(b.records, Record{Digest: c.inner, Kinds: class.Kinds, Flags: class.Flags | FlagInner})
		b.names[c.inner] = append(b.names[c.inner], name)
	}
}

// flagsOf says what the source knows of a member.
func flagsOf(m Member) Flags {
	var f Flags
	if m.Install {
		f |= FlagInstall
	}
	if m.Caps {
		f |= FlagCaps
	}
	if m.Nested {
		f |= FlagNested
	}
	return f
}

func (b *builder) finish() error {
	var err error
	if b.out.Catalogue, err = EncodeCatalogue(b.records); err != nil {
		return err
	}
	c, err := ParseCatalogue(b.out.Catalogue)
	if err != nil {
		return err
	}
	b.out.Records = c.Len()
	t := &NameTable{Catalogue: c.Digest(), Others: b.others}
	for _, r := range c.All() {
		ns := b.names[r.Digest]
		sort.Slice(ns, func(i, j int) bool { return ns[i].Path < ns[j].Path })
		t.Names = append(t.Names, ns)
	}
	sort.Slice(t.Others, func(i, j int) bool { return t.Others[i].Path < t.Others[j].Path })
	b.out.Names, err = t.Encode()
	return err
}
