package artefact

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// readDir yields a directory tree. Links are recorded, not followed.
func readDir(root string, visit func(codesign.Member, io.Reader) error) error {
	if err := dirWalk(root, ".", visit); err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	return nil
}

func dirWalk(root, rel string, visit func(codesign.Member, io.Reader) error) error {
	entries, err := os.ReadDir(filepath.Join(root, rel))
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := path.Join(rel, e.Name())
		switch {
		case e.IsDir():
			err = dirWalk(root, p, visit)
		case e.Type().IsRegular():
			err = dirFile(filepath.Join(root, p), p, visit)
		default:
			err = dirOther(filepath.Join(root, p), p, visit)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dirFile opens first and looks then, so that both are of one file.
func dirFile(full, rel string, visit func(codesign.Member, io.Reader) error) error {
	f, err := os.OpenFile(full, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s was a file just now: %w", full, errs.Conflict)
	}
	m := codesign.Member{Path: rel, Mode: st.Mode(), Size: st.Size(), Alone: true}
	if st.Mode()&0o111 != 0 {
		if m.Caps, err = hasCaps(f); err != nil {
			return fmt.Errorf("capabilities of %s: %w", full, err)
		}
	}
	return visit(m, f)
}

// hasCaps says whether a file has capabilities (capabilities(7)). A file system
// without extended attributes has none.
func hasCaps(f *os.File) (bool, error) {
	_, err := unix.Fgetxattr(int(f.Fd()), "security.capability", nil)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, syscall.ENODATA), errors.Is(err, syscall.ENOTSUP):
		return false, nil
	}
	return false, err
}

func dirOther(full, rel string, visit func(codesign.Member, io.Reader) error) error {
	st, err := os.Lstat(full)
	if err != nil {
		return err
	}
	m := codesign.Member{Path: rel, Mode: st.Mode()}
	if st.Mode()&fs.ModeSymlink != 0 {
		if m.Link, err = os.Readlink(full); err != nil {
			return err
		}
	}
	return visit(m, nil)
}
