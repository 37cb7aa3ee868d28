package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// Bounds of what becomes an image.
const (
	maxEntries = 2 << 20
	maxContent = 256 << 30
)

// staged is a private copy of what goes into an image, so that what is listed
// in the catalogue and what is in the image are the same bytes.
type staged struct {
	root    *os.Root // no name and no link leads out of it
	lines   []string // one for each entry
	modes   map[string]fs.FileMode
	digests map[string]string    // SHA-256 of files
	links   map[[2]uint64]string // first name of a file with several, by device and inode
	bytes   int64
}

// stage copies a directory or a tar archive into dir, which is empty and
// nobody else's. Owners and extended attributes are not copied: everything in
// the image is root's. Devices, FIFOs and sockets are refused. identity is a
// digest of names, modes and contents that does not depend on their order.
func stage(ctx context.Context, source, dir string) (identity [32]byte, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return identity, err
	}
	defer root.Close()
	s := &staged{root: root, modes: map[string]fs.FileMode{".": 0o755}, digests: map[string]string{}, links: map[[2]uint64]string{}}
	st, err := os.Stat(source)
	if err != nil {
		return identity, err
	}
	if st.IsDir() {
		err = s.copyDir(ctx, os.DirFS(source))
	} else {
		err = s.copyTar(ctx, source)
	}
	if err != nil {
		return identity, err
	}
	return s.finish()
}

func (s *staged) note(name string, mode fs.FileMode, rest string) error {
	if len(s.lines) == maxEntries {
		return fmt.Errorf("more than %d files: %w", maxEntries, errs.Invalid)
	}
	s.lines = append(s.lines, fmt.Sprintf("%q %o %s\n", name, uint32(mode), rest))
	return nil
}

func (s *staged) copyDir(ctx context.Context, fsys fs.FS) error {
	return fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case d.IsDir():
			return s.directory(name, mode)
		case mode&fs.ModeSymlink != 0:
			target, err := fs.ReadLink(fsys, name)
			if err != nil {
				return err
			}
			return s.symlink(name, target)
		case mode.IsRegular():
			if first := s.first(name, info); first != "" {
				return s.link(name, mode, first)
			}
			f, err := fsys.Open(name)
			if err != nil {
				return err
			}
			return errors.Join(s.file(name, mode, info.Size(), f), f.Close())
		default:
			return unsupported(name, mode)
		}
	})
}

// first is an earlier name of the same file.
func (s *staged) first(name string, info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Nlink < 2 {
		return ""
	}
	id := [2]uint64{st.Dev, st.Ino}
	if f := s.links[id]; f != "" {
		return f
	}
	s.links[id] = name
	return ""
}

func unsupported(name string, mode fs.FileMode) error {
	return fmt.Errorf("%q is of type %v, which an image does not hold: %w", name, mode.Type(), errs.Unsupported)
}

// copyTar unpacks an archive in two passes: codesign's reader, which is strict
// about what an archive may be, gives no directories.
func (s *staged) copyTar(ctx context.Context, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	err = codesign.TarSource(contextReader{ctx, f}).Walk(func(m codesign.Member, content io.Reader) error {
		if err := s.root.MkdirAll(path.Dir(m.Path), 0o755); err != nil {
			return err
		}
		switch {
		case m.Hard:
			return s.link(m.Path, m.Mode, m.Link)
		case m.Mode.IsRegular():
			return s.file(m.Path, m.Mode, m.Size, content)
		case m.Mode&fs.ModeSymlink != 0:
			return s.symlink(m.Path, m.Link)
		}
		return unsupported(m.Path, m.Mode)
	})
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	plain, err := codesign.Decompress(contextReader{ctx, f})
	if err != nil {
		return err
	}
	defer plain.Close()
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return s.implied()
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		if h.Typeflag != tar.TypeDir {
			continue
		}
		name, err := codesign.CleanPath(h.Name)
		if err != nil {
			return err
		}
		if _, twice := s.modes[name]; twice && name != "." {
			return fmt.Errorf("%q appears twice: %w", name, errs.Invalid)
		}
		if err := s.root.MkdirAll(name, 0o755); err != nil {
			return err
		}
		s.modes[name] = h.FileInfo().Mode()
	}
}

// implied notes every directory, those that the archive does not name included.
func (s *staged) implied() error {
	return fs.WalkDir(s.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		mode, ok := s.modes[name]
		if !ok {
			mode = 0o755
		}
		return s.directory(name, mode)
	})
}

// permissions are the bits of a mode that an image keeps.
func permissions(m fs.FileMode) fs.FileMode {
	return m & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
}

func (s *staged) directory(name string, mode fs.FileMode) error {
	if err := s.root.MkdirAll(name, 0o755); err != nil {
		return err
	}
	s.modes[name] = permissions(mode) // set at the end: it may not be writable
	return s.note(name, s.modes[name]|fs.ModeDir, "")
}

func (s *staged) symlink(name, target string) error {
	if err := s.root.Symlink(target, name); err != nil {
		return err
	}
	return s.note(name, fs.ModeSymlink, fmt.Sprintf("%q", target))
}

func (s *staged) link(name string, mode fs.FileMode, first string) error {
	if err := s.root.Link(first, name); err != nil {
		return err
	}
	s.digests[name] = s.digests[first]
	return s.note(name, permissions(mode), s.digests[first])
}

func (s *staged) file(name string, mode fs.FileMode, size int64, r io.Reader) error {
	if s.bytes += size; s.bytes > maxContent {
		return fmt.Errorf("more than %d bytes: %w", int64(maxContent), errs.Invalid)
	}
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, size+1))
	if err == nil {
		err = f.Chmod(permissions(mode))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if n != size {
		return fmt.Errorf("%q changed while it was read: %w", name, errs.Conflict)
	}
	s.digests[name] = hex.EncodeToString(h.Sum(nil))
	return s.note(name, permissions(mode), s.digests[name])
}

// finish sets the directories' modes, deepest first.
func (s *staged) finish() (identity [32]byte, err error) {
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(s.modes))) {
		if err := s.root.Chmod(name, permissions(s.modes[name])); err != nil {
			return identity, err
		}
	}
	slices.Sort(s.lines)
	return sha256.Sum256([]byte(strings.Join(s.lines, ""))), nil
}
