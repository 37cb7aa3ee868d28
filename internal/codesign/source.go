package codesign

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Member is one entry of an artefact.
type Member struct {
	Path   string      // relative, clean
	Mode   fs.FileMode // type and permissions
	Size   int64       // of a regular file
	Link   string      // a symbolic link's target as it is written, or a hard link's target as a clean path
	Hard   bool        // a hard link: Mode is regular, there is no content, Link is an earlier member
	Origin string      // which part of the artefact it came from; of a nested member, the archive's place, ending in "!"

	Kinds   integrity.KindSet // what it is used as besides what Classify sees
	Install bool              // a script that the package manager runs
	Caps    bool              // it has file capabilities (security.capability)
	Nested  bool              // it lies in an archive that is a member itself
	Alone   bool              // no later member is a hard link to it
}

// OriginSigned is the origin of kernel modules with the signature that the
// signer made in the same run. They are no part of the artefact.
const OriginSigned = "signed for the kernel"

// Source yields the members of an artefact, each path of an origin once, with
// the content of regular files. It yields every member or an error. A Source made from a
// stream can be walked once.
type Source interface {
	// Walk calls visit for every member. The reader is nil for anything but
	// regular files, valid until visit returns, and need not be drained.
	Walk(visit func(m Member, content io.Reader) error) error
}

// Bounds of what a Source reads, against archives made to exhaust.
const (
	maxMembers   = 4 << 20
	maxLinkBytes = 4096
	endMarker    = 1024 // two blocks of zeros end a tar archive
)

// Bounds of what comes out of compressed bytes.
const (
	MaxTotal  = 256 << 30 // bytes
	MaxRatio  = 250
	RatioFree = 64 << 20 // bytes that may come out before the ratio counts
)

// DirSource yields a directory tree. Symbolic links are recorded, not followed.
func DirSource(fsys fs.FS) Source { return dirSource{fsys} }

type dirSource struct{ fsys fs.FS }

func (d dirSource) Walk(visit func(Member, io.Reader) error) error {
	err := fs.WalkDir(d.fsys, ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		m := Member{Path: p, Mode: info.Mode()}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			if m.Link, err = fs.ReadLink(d.fsys, p); err != nil {
				return err
			}
			return visit(m, nil)
		case !info.Mode().IsRegular():
			return visit(m, nil)
		}
		m.Size, m.Alone = info.Size(), true
		f, err := d.fsys.Open(p)
		if err != nil {
			return err
		}
		return errors.Join(visit(m, f), f.Close())
	})
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	return nil
}

// TarSource yields a tar archive, plain or compressed with gzip, xz, zstd or
// bzip2.
func TarSource(r io.Reader) Source { return &tarSource{r: r} }

// LayerSource is TarSource for a layer of an image: directories are members too,
// since one may take the place of what a lower layer has.
func LayerSource(r io.Reader) Source { return &tarSource{r: r, dirs: true} }

type tarSource struct {
	r       io.Reader
	dirs    bool
	prefix  string // put before every path
	origin  string
	members int
	claimed int64 // sum of the members' sizes
}

func (s *tarSource) Walk(visit func(Member, io.Reader) error) error {
	if err := s.walk(visit); err != nil {
		return fmt.Errorf("read tar: %w", err)
	}
	return nil
}

func (s *tarSource) walk(visit func(Member, io.Reader) error) error {
	d, err := decompress(s.r)
	if err != nil {
		return err
	}
	defer d.Close()
	pos := &Input{r: d}
	tr := tar.NewReader(pos)
	seen := make(map[string]bool)
	for {
		// Drained here, so that what Next reads is padding and header only.
		if _, err := io.Copy(io.Discard, tr); err != nil { //nolint:gosec // decompress bounds ratio and size
			return d.blame(err)
		}
		before := pos.n
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if pos.n-before < endMarker { // archive/tar takes a cut for the end
				return fmt.Errorf("no end marker, the archive is cut: %w", errs.Invalid)
			}
			return onlyZeros(d)
		}
		if err != nil {
			return d.blame(err)
		}
		if s.members++; s.members > maxMembers {
			return fmt.Errorf("more than %d members: %w", maxMembers, errs.Invalid)
		}
		m, skip, err := s.member(h)
		if err != nil {
			return err
		}
		if m.Mode.IsDir() && s.dirs && m.Path != "." {
			if err := visit(m, nil); err != nil {
				return err
			}
		}
		if skip {
			continue
		}
		// Sparse files may claim any size for a few bytes.
		if s.claimed += m.Size; m.Size > MaxTotal || s.claimed > MaxTotal || isSparse(h) && s.claimed > RatioFree+MaxRatio*pos.n {
			return fmt.Errorf("%q: %d bytes are claimed: %w", m.Path, m.Size, errs.Invalid)
		}
		if seen[m.Path] {
			return fmt.Errorf("%q appears twice: %w", m.Path, errs.Invalid)
		}
		seen[m.Path] = true
		var content io.Reader
		if m.Mode.IsRegular() && !m.Hard {
			content = memberReader{tr, d.blame}
		}
		if err := visit(m, content); err != nil {
			return err
		}
	}
}

// member turns a header into a Member; directories and comments are skipped.
func (s *tarSource) member(h *tar.Header) (m Member, skip bool, err error) {
	if h.Typeflag == tar.TypeXGlobalHeader {
		for k := range h.PAXRecords {
			if k != "comment" {
				return m, false, fmt.Errorf("global record %.40q: %w", k, errs.Invalid)
			}
		}
		return m, true, nil
	}
	p, err := CleanPath(h.Name)
	if err != nil {
		return m, false, err
	}
	m = Member{Path: s.prefix + p, Mode: h.FileInfo().Mode(), Size: h.Size, Origin: s.origin}
	for _, k := range []string{"SCHILY.xattr.security.capability", "LIBARCHIVE.xattr.security.capability"} { // GNU tar's and bsdtar's
		_, has := h.PAXRecords[k]
		m.Caps = m.Caps || has
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return m, true, nil
	case tar.TypeReg, '\x00', tar.TypeGNUSparse: // '\x00': the old format's regular file
		m.Mode = m.Mode.Perm() | m.Mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)
	case tar.TypeLink:
		t, err := CleanPath(h.Linkname)
		if err != nil {
			return m, false, err
		}
		m.Hard, m.Link, m.Size = true, s.prefix+t, 0
		m.Mode = m.Mode.Perm() | m.Mode&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)
	case tar.TypeSymlink:
		m.Link = h.Linkname
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return m, false, fmt.Errorf("%q has unknown type %q: %w", m.Path, h.Typeflag, errs.Invalid)
	}
	if p == "." || len(m.Link) > maxLinkBytes {
		return m, false, fmt.Errorf("%q: unusable name or link: %w", m.Path, errs.Invalid)
	}
	return m, false, nil
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// onlyZeros reads to the end. Some readers of tar go on after the end marker,
// so anything but padding there is refused.
func onlyZeros(r io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if !allZero(buf[:n]) {
			return fmt.Errorf("data after the end of the archive: %w", errs.Invalid)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// OpenSource tells a .deb from a tar archive by its first bytes.
func OpenSource(r io.Reader) (Source, error) {
	var head [8]byte
	n, err := io.ReadFull(r, head[:])
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("open artefact: %w", err)
	}
	whole := io.MultiReader(strings.NewReader(string(head[:n])), r)
	if string(head[:n]) == arMagic {
		return DebSource(whole), nil
	}
	return TarSource(whole), nil
}
