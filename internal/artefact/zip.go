package artefact

import (
	"archive/zip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

const maxZipDirectory = 64 << 20 // bytes; some 500,000 members

// readZip yields a zip archive: jars, wheels, zipapps too. What has two
// readings (a name in the directory and another one beside the content) is
// refused, and so is what is encrypted.
func readZip(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	if err := zipWalk(src, visit); err != nil {
		return fmt.Errorf("read zip: %w", err)
	}
	return nil
}

func zipWalk(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	if _, ok := zipEnd(src); !ok {
		return fmt.Errorf("no end of the directory at the end: %w", errs.Invalid)
	}
	in := &zipInput{src: src, left: maxZipDirectory}
	z, err := zip.NewReader(in, src.Size())
	if err != nil && !errors.Is(err, zip.ErrInsecurePath) {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	in.left = -1
	if len(z.File) > maxMembers {
		return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
	}
	seen := make(map[string]bool, len(z.File))
	claimed := int64(0)
	for _, f := range z.File {
		m, dir, err := zipMember(in, f)
		if err != nil {
			return fmt.Errorf("%.200q: %w", f.Name, err)
		}
		if dir {
			continue
		}
		if seen[m.Path] {
			return fmt.Errorf("%.200q appears twice: %w", m.Path, errs.Invalid)
		}
		seen[m.Path] = true
		// Entries may share their compressed bytes, so the sum counts.
		if claimed += m.Size; claimed > codesign.MaxTotal || claimed > codesign.RatioFree+codesign.MaxRatio*src.Size() {
			return fmt.Errorf("%.200q: unpacks to more than %d times the whole: %w", f.Name, codesign.MaxRatio, errs.Invalid)
		}
		if err := zipContent(f, m, visit); err != nil {
			return fmt.Errorf("%.200q: %w", f.Name, err)
		}
	}
	return nil
}

// zipMember checks an entry against its local header.
func zipMember(src *zipInput, f *zip.File) (m codesign.Member, dir bool, err error) {
	p, err := codesign.CleanPath(f.Name)
	if err != nil {
		return m, false, err
	}
	mode := f.Mode()
	if err := zipLocal(src, f); err != nil {
		return m, false, err
	}
	switch {
	case f.Flags&0x1 != 0:
		return m, false, fmt.Errorf("encrypted: %w", errs.Unsupported)
	case f.Method != zip.Store && f.Method != zip.Deflate:
		return m, false, fmt.Errorf("compression method %d: %w", f.Method, errs.Unsupported)
	case mode.IsDir():
		if f.UncompressedSize64 != 0 {
			return m, false, fmt.Errorf("a directory with content: %w", errs.Invalid)
		}
		return m, true, nil
	case p == "." || f.UncompressedSize64 > codesign.MaxTotal:
		return m, false, fmt.Errorf("unusable name or size: %w", errs.Invalid)
	}
	m = codesign.Member{Path: p, Mode: mode, Size: int64(f.UncompressedSize64), Alone: true}
	if !mode.IsRegular() {
		m.Size = 0
	}
	return m, false, nil
}

// zipLocal refuses an entry whose local header says another name or method:
// readers that go by the local headers would see something else.
func zipLocal(src *zipInput, f *zip.File) error {
	if _, err := f.DataOffset(); err != nil {
		return fmt.Errorf("local header: %w: %w", err, errs.Invalid)
	}
	b := make([]byte, 30+len(f.Name))
	if n, _ := src.ReadAt(b, src.last); n < len(b) {
		return fmt.Errorf("local header is cut: %w", errs.Invalid)
	}
	le := binary.LittleEndian
	if string(b[:4]) != "PK\x03\x04" || int(le.Uint16(b[26:])) != len(f.Name) || string(b[30:]) != f.Name || le.Uint16(b[8:]) != f.Method {
		return fmt.Errorf("its local header says something else: %w", errs.Invalid)
	}
	return nil
}

// zipInput bounds what the library reads for the directory, all of which it
// keeps, and remembers where it read last: for File.DataOffset that is the
// local header, whose place the library does not tell.
type zipInput struct {
	src  io.ReaderAt
	left int64 // -1: any number of bytes
	last int64
}

func (z *zipInput) ReadAt(p []byte, at int64) (int, error) {
	z.last = at
	if z.left >= 0 {
		if z.left -= int64(len(p)); z.left < 0 {
			z.left = 0
			return 0, fmt.Errorf("directory of more than %d bytes: %w", maxZipDirectory, errs.Invalid)
		}
	}
	return z.src.ReadAt(p, at)
}

func zipContent(f *zip.File, m codesign.Member, visit func(codesign.Member, io.Reader) error) error {
	switch {
	case m.Mode&fs.ModeSymlink != 0:
		r, err := f.Open()
		if err != nil {
			return fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		b, err := io.ReadAll(io.LimitReader(r, maxPlace+1))
		_ = r.Close()
		if err != nil || len(b) > maxPlace {
			return fmt.Errorf("link: %w: %w", err, errs.Invalid)
		}
		m.Link = string(b)
		return visit(m, nil)
	case !m.Mode.IsRegular():
		return visit(m, nil)
	}
	r, err := f.Open()
	if err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	defer r.Close()
	return visit(m, invalidReader{r})
}

// invalidReader says of a library's errors that the input is to blame.
type invalidReader struct{ r io.Reader }

func (i invalidReader) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, errs.Invalid) {
		err = fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	return n, err
}
