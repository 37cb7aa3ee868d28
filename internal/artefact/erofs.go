package artefact

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/erofs/go-erofs"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

const (
	erofsIncompat   = 80 // in the superblock: u32
	erofsAlgorithms = 84 // u16
	// Features that say how content is compressed. The rest of the image reads
	// the same without them.
	erofsCompression = 0x1 | 0x2 | 0x10 | 0x20
	maxExtract       = 64 << 30
)

// readErofs yields an erofs image. The library does not decompress: such
// content is unpacked by fsck.erofs, where that is installed. Names, modes and
// attributes always come from the image itself.
func readErofs(ctx context.Context, src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	e := &erofsReader{ctx: ctx, src: src, visit: visit}
	err := e.walk()
	if e.work != "" {
		err = errors.Join(err, os.RemoveAll(e.work))
	}
	if err != nil {
		return fmt.Errorf("read erofs: %w", err)
	}
	return nil
}

type erofsReader struct {
	ctx       context.Context //nolint:containedctx // lives for one call
	src       *io.SectionReader
	visit     func(codesign.Member, io.Reader) error
	claimed   int64
	members   int
	work      string // directory to remove
	extracted string // directory in it; empty: nothing is compressed
}

func (e *erofsReader) walk() error {
	img, compressed, err := e.open()
	if err != nil {
		return err
	}
	// First all the names: nothing is unpacked before they are seen to be harmless.
	if err := e.each(img, func(codesign.Member) error { return nil }); err != nil {
		return err
	}
	if compressed {
		if err := e.extract(); err != nil {
			return err
		}
	}
	e.claimed, e.members = 0, 0
	return e.each(img, func(m codesign.Member) error {
		if !m.Mode.IsRegular() {
			return e.visit(m, nil)
		}
		return e.file(img, m)
	})
}

// open opens the image as if nothing in it were compressed.
func (e *erofsReader) open() (img fs.FS, compressed bool, err error) {
	super := make([]byte, 128)
	if n, _ := e.src.ReadAt(super, erofsAt); n < len(super) {
		return nil, false, fmt.Errorf("no superblock: %w", errs.Invalid)
	}
	le := binary.LittleEndian
	features := le.Uint32(super[erofsIncompat:])
	compressed = features&erofsCompression != 0 || le.Uint16(super[erofsAlgorithms:]) != 0
	le.PutUint32(super[erofsIncompat:], features&^erofsCompression)
	le.PutUint16(super[erofsAlgorithms:], 0)
	img, err = erofs.Open(patched{ReaderAt: e.src, at: erofsAt, with: super})
	switch {
	case errors.Is(err, erofs.ErrNotImplemented):
		return nil, false, fmt.Errorf("%w; unpack it and give the directory: %w", err, errs.Unsupported)
	case err != nil:
		return nil, false, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	return img, compressed, nil
}

// patched is a reader of which a part reads as something else.
type patched struct {
	io.ReaderAt
	at   int64
	with []byte
}

func (p patched) ReadAt(b []byte, at int64) (int, error) {
	n, err := p.ReaderAt.ReadAt(b, at)
	for i, x := range p.with {
		if k := p.at + int64(i) - at; k >= 0 && k < int64(n) {
			b[k] = x
		}
	}
	return n, err
}

// each goes through the image's names.
func (e *erofsReader) each(img fs.FS, visit func(codesign.Member) error) (err error) {
	defer func() {
		if p := recover(); p != nil { // the library trusts some numbers of the image
			err = fmt.Errorf("%v: %w", p, errs.Invalid)
		}
	}()
	directories := map[int64]bool{} // by place
	return fs.WalkDir(img, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("%.200q: %w: %w", p, err, errs.Invalid)
		}
		if clean, err := codesign.CleanPath(p); err != nil || clean != p {
			return fmt.Errorf("name %.200q: %w", p, errs.Invalid)
		}
		if e.members++; e.members > maxMembers {
			return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
		}
		info, err := d.Info()
		if err != nil {
			return fmt.Errorf("%.200q: %w: %w", p, err, errs.Invalid)
		}
		m := codesign.Member{Path: p, Mode: info.Mode(), Alone: true}
		st, ok := info.Sys().(*erofs.Stat)
		if d.IsDir() && ok {
			if directories[st.Ino] { // twice as many names with every level
				return fmt.Errorf("%.200q contains itself, or is linked twice: %w", p, errs.Invalid)
			}
			directories[st.Ino] = true
			return nil
		}
		if !ok || st.Mode.Type() != m.Mode.Type() {
			return fmt.Errorf("%.200q: its directory and its inode differ about what it is: %w", p, errs.Invalid)
		}
		m.Mode = st.Mode // the other one lacks the set-user-ID bits
		_, m.Caps = st.Xattrs["security.capability"]
		switch {
		case m.Mode&fs.ModeSymlink != 0:
			if m.Link, err = fs.ReadLink(img, p); err != nil {
				return fmt.Errorf("%.200q: %w: %w", p, err, errs.Invalid)
			}
		case m.Mode.IsRegular():
			m.Size = info.Size()
			if e.claimed += m.Size; m.Size < 0 || e.claimed < 0 || e.claimed > maxExtract || e.claimed > codesign.RatioFree+codesign.MaxRatio*e.src.Size() {
				return fmt.Errorf("%.200q: %d bytes are claimed: %w", p, m.Size, errs.Invalid)
			}
		}
		return visit(m)
	})
}

// file visits a regular file.
func (e *erofsReader) file(img fs.FS, m codesign.Member) error {
	if e.extracted != "" {
		root, err := os.OpenRoot(e.extracted)
		if err != nil {
			return err
		}
		defer root.Close()
		f, err := root.Open(m.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if !st.Mode().IsRegular() || st.Size() != m.Size {
			return fmt.Errorf("%.200q: fsck.erofs unpacks %d bytes, the image says %d: %w", m.Path, st.Size(), m.Size, errs.Invalid)
		}
		return e.visit(m, f)
	}
	f, err := img.Open(m.Path)
	if err != nil {
		return fmt.Errorf("%.200q: %w: %w", m.Path, err, errs.Invalid)
	}
	defer f.Close()
	// a file that ends before its size is an error
	return e.visit(m, invalidReader{cutReader{&io.LimitedReader{R: f, N: m.Size}}})
}

// extract has fsck.erofs unpack the image into a directory of our own.
func (e *erofsReader) extract() error {
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		return fmt.Errorf("it is compressed, and fsck.erofs, which can unpack it, is not installed (apt-get install erofs-utils): %w", errs.Unsupported)
	}
	if e.work, err = os.MkdirTemp("", "ringwall-erofs-"); err != nil {
		return err
	}
	image := filepath.Join(e.work, "image")
	f, err := os.OpenFile(image, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(e.src, 0, e.src.Size()))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	to := filepath.Join(e.work, "tree")
	said, err := exec.CommandContext(e.ctx, tool, "--extract="+to, "--no-preserve", image).CombinedOutput()
	if err != nil {
		return fmt.Errorf("fsck.erofs: %w: %.300s: %w", err, said, errs.Invalid)
	}
	if err := os.Remove(image); err != nil {
		return err
	}
	e.extracted = to
	return nil
}
