package host

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// WriteFile replaces a file so that after a crash at any moment the name holds
// either all of the old content or all of the new: it writes a temporary file
// in the same directory, syncs it, renames it over the name, and syncs the
// directory. The directory must exist. A symbolic link of that name is
// replaced, not followed.
//
// It fails closed: an error means that the new content may not survive.
func WriteFile(name string, data []byte, mode fs.FileMode) error {
	return durable{}.write(name, bytes.NewReader(data), mode)
}

// WriteFileFrom is WriteFile for content that is read from r to its end.
func WriteFileFrom(name string, r io.Reader, mode fs.FileMode) error {
	return durable{}.write(name, r, mode)
}

// RemoveFile removes a name and makes that durable. A name that does not exist
// is no error.
func RemoveFile(name string) error {
	if err := os.Remove(name); err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return syncDir(filepath.Dir(name))
}

// durable is the writer with a place to fail, for tests of crashes.
type durable struct {
	// step is called before each step with its name; an error stops there, as
	// a crash would: nothing is cleaned up.
	step func(string) error
}

func (d durable) at(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}

func (d durable) write(name string, r io.Reader, mode fs.FileMode) (err error) {
	if name == "" || filepath.Base(name) == "." || filepath.Base(name) == "/" {
		return fmt.Errorf("write %q: not a file name: %w", name, errs.Invalid)
	}
	if err := d.at("create"); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	tmp, crashed := f.Name(), false
	defer func() {
		if err == nil {
			return
		}
		err = fmt.Errorf("write %s: %w", name, err)
		_ = f.Close()
		if !crashed {
			_ = os.Remove(tmp)
		}
	}()
	crash := func(step string) error {
		if e := d.at(step); e != nil {
			crashed = true
			return e
		}
		return nil
	}
	if err := crash("fill"); err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	if err := f.Chmod(mode.Perm()); err != nil {
		return err
	}
	if err := crash("sync"); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := crash("rename"); err != nil {
		return err
	}
	if err := os.Rename(tmp, name); err != nil {
		return err
	}
	if err := crash("syncdir"); err != nil {
		return err
	}
	crashed = true // the temporary name is gone: nothing to clean up
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// readBounded reads a file of at most limit bytes; a bigger one is invalid.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO in its place is empty, not waited for
	if err != nil {
		return nil, kindOf(err)
	}
	defer f.Close()
	return readAllBounded(f, name, limit)
}

func readAllBounded(r io.Reader, name string, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes: %w", name, limit, errs.Invalid)
	}
	return b, nil
}

// kindOf gives an error of the operating system one of our kinds, where one fits.
func kindOf(err error) error {
	switch {
	case err == nil:
		return nil
	case os.IsNotExist(err):
		return fmt.Errorf("%w: %w", err, errs.NotFound)
	case os.IsPermission(err):
		return fmt.Errorf("%w: %w", err, errs.Denied)
	}
	return err
}
