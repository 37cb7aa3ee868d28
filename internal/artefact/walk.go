package artefact

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// Bounds of a walk over all levels of archives in archives.
const (
	maxMembers   = 4 << 20
	nestedFree   = 1 << 30 // bytes that may come out before nestedRatio counts
	nestedRatio  = 1000
	maxPlace     = 4096
	spoolMemory  = 4 << 20 // what is larger goes to a file without a name
	maxZipScript = 1 << 30
)

// walk is one pass over an artefact, at one level of nesting.
type walk struct {
	a     *Artefact
	visit func(codesign.Member, io.Reader) error
	state *walkState // of all levels
	depth int        // archives above this one
	place string     // the location of the archive that is being read; empty at the top
	head  []byte
	in    memberReader
}

// walkState is what the levels of a walk share.
type walkState struct {
	members  int
	out, top int64 // bytes of all members, and of those at the top
	// fatal is what no Options.Unread may wave through: the visitor's error, an
	// exhausted bound, an ended context.
	fatal error
}

func (w *walk) fail(err error) error {
	if w.state.fatal == nil {
		w.state.fatal = err
	}
	return err
}

// below is the level for what is in the archive at a place.
func (w *walk) below(place string) *walk {
	return &walk{a: w.a, visit: w.visit, state: w.state, depth: w.depth + 1, place: place}
}

// read walks what is in src.
func (w *walk) read(f Format, src *io.SectionReader) error {
	whole := func() io.Reader {
		_, _ = src.Seek(0, io.SeekStart) // cannot fail
		return &topReader{a: w.a, r: src}
	}
	switch f {
	case FormatTar:
		return codesign.TarSource(whole()).Walk(w.member)
	case FormatDeb:
		d := codesign.DebSource(whole())
		err := d.Walk(w.member)
		if w.depth == 0 && err == nil {
			w.a.pkg = Package{Name: d.Control.Package, Version: d.Control.Version, Architecture: d.Control.Architecture}
		}
		return err
	case FormatZip:
		return readZip(src, w.member)
	case FormatInitramfs:
		return readInitramfs(src, w.member)
	case FormatRPM:
		p, err := readRPM(src, w.member)
		if w.depth == 0 && err == nil {
			w.a.pkg = p
		}
		return err
	case FormatUKI:
		return readUKI(src, w.member)
	case FormatSquashfs:
		return readSquashfs(src, w.member)
	case FormatErofs:
		return readErofs(w.a.options.Context, src, w.member)
	}
	return fmt.Errorf("format %s: %w", f, errs.Unsupported)
}

// member hands a member to the visitor and looks into it when it is an archive.
func (w *walk) member(m codesign.Member, r io.Reader) error {
	if err := w.count(&m); err != nil {
		return w.fail(err)
	}
	if w.place != "" {
		m.Nested, m.Origin = true, w.place+"!"
	}
	if r == nil || w.a.options.Depth < 0 {
		return w.give(m, r)
	}
	if w.head == nil {
		w.head = make([]byte, codesign.HeadSize)
	}
	n, err := io.ReadFull(r, w.head[:min(m.Size, codesign.HeadSize)])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	head := w.head[:n]
	f, unsupported := sniff(head)
	if f == formatNone {
		w.in = memberReader{a: w.a, head: head, r: r}
		if err := w.give(m, &w.in); err != nil || unsupported == nil {
			return err
		}
		return w.unread(location(&m), unsupported)
	}
	src, done, err := w.random(head, r, m.Size)
	if err != nil {
		return err
	}
	defer done()
	if err := w.give(m, &memberReader{a: w.a, r: io.NewSectionReader(src, 0, src.Size())}); err != nil {
		return err
	}
	return w.nested(f, location(&m), src)
}

func (w *walk) give(m codesign.Member, r io.Reader) error {
	if err := w.visit(m, r); err != nil {
		return w.fail(err)
	}
	return nil
}

// count keeps the walk within its bounds.
func (w *walk) count(m *codesign.Member) error {
	s := w.state
	s.members++
	s.out += m.Size
	if w.depth == 0 {
		s.top += m.Size
		w.a.read.Bytes += m.Size
	}
	in := s.top
	if w.a.file != nil {
		in = w.a.opened.size
	}
	switch {
	case s.members > maxMembers:
		return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
	case m.Size < 0 || s.out > codesign.MaxTotal || s.out > nestedFree+nestedRatio*in && w.depth > 0:
		return fmt.Errorf("%q: archives in archives unpack to more than %d times the whole: %w", m.Path, nestedRatio, errs.Invalid)
	case len(w.place) > maxPlace:
		return fmt.Errorf("%.80q…: a path of more than %d bytes: %w", w.place, maxPlace, errs.Invalid)
	}
	w.a.read.Members = s.members
	return w.a.tick(0)
}

// location names a member for people, and as the origin of what is in it.
func location(m *codesign.Member) string {
	return codesign.Name{Path: m.Path, Origin: m.Origin}.Location()
}

// nested walks an archive that is a member.
func (w *walk) nested(f Format, place string, src *io.SectionReader) error {
	f, err := sniffDeep(f, src)
	if err == nil && f != formatNone {
		if w.depth+1 > w.a.options.Depth {
			err = fmt.Errorf("more than %d archives within each other: %w", w.a.options.Depth, errs.Invalid)
		} else {
			err = w.below(place).read(f, src)
		}
	}
	return w.unread(place, err)
}

// UnreadError is an archive within the artefact that cannot be read, while
// there is no Options.Unread to decide about it.
type UnreadError struct {
	Place string
	Err   error
}

// Error implements error.
func (u *UnreadError) Error() string { return u.Place + ": " + u.Err.Error() }

// Unwrap leads to the kind.
func (u *UnreadError) Unwrap() error { return u.Err }

// unread decides about an archive that cannot be read.
func (w *walk) unread(place string, err error) error {
	switch {
	case err == nil:
		return nil
	case w.state.fatal != nil:
		return w.state.fatal
	case w.a.options.Unread == nil || !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported):
		return w.fail(&UnreadError{Place: place, Err: err})
	}
	if err := w.a.options.Unread(place, err); err != nil {
		return w.fail(err)
	}
	return nil
}

// random makes content readable at any place: as it is, in memory or in a file.
func (w *walk) random(head []byte, r io.Reader, size int64) (*io.SectionReader, func(), error) {
	if f, ok := r.(*os.File); ok {
		return io.NewSectionReader(f, 0, size), func() {}, nil
	}
	whole := io.LimitReader(&memberReader{a: w.a, head: head, r: r}, size+1)
	if size <= spoolMemory {
		b := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead))
		if _, err := b.ReadFrom(whole); err != nil {
			return nil, nil, err
		}
		return io.NewSectionReader(bytes.NewReader(b.Bytes()), 0, int64(b.Len())), func() {}, nil
	}
	f, err := os.CreateTemp("", "ringwall-artefact-")
	if err != nil {
		return nil, nil, w.fail(err)
	}
	_ = os.Remove(f.Name()) // it lives as long as it is open
	n, err := io.Copy(f, whole)
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return io.NewSectionReader(f, 0, n), func() { _ = f.Close() }, nil
}

// memberReader reads a member of which the beginning has been looked at.
type memberReader struct {
	a    *Artefact
	head []byte
	r    io.Reader
}

func (m *memberReader) Read(p []byte) (int, error) {
	if len(m.head) > 0 {
		n := copy(p, m.head)
		m.head = m.head[n:]
		return n, nil
	}
	if err := m.a.tick(0); err != nil {
		return 0, err
	}
	return m.r.Read(p)
}

// topReader reads an archive, or a whole file, from its beginning to its end.
type topReader struct {
	a     *Artefact
	r     io.Reader
	count bool // what it reads is progress
}

func (t *topReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	read := 0
	if t.count {
		read = n
	}
	if ended := t.a.tick(read); ended != nil {
		return 0, ended
	}
	return n, err
}

// tick counts bytes, tells how far it is, and ends with the context.
func (a *Artefact) tick(n int) error {
	if err := a.options.Context.Err(); err != nil {
		return err
	}
	a.read.Bytes += int64(n)
	if a.options.Progress != nil {
		if a.ticks++; a.ticks&63 != 0 { // asking for the time costs more than a small file
			return nil
		}
		if now := time.Now(); now.Sub(a.told) >= progressEvery {
			a.told = now
			a.options.Progress(a.read)
		}
	}
	return nil
}
