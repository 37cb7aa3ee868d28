package hypervisor

import (
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"

	"ringwall/internal/errs"
)

// Initramfs writes a kernel's first file system, in the "newc" format of cpio
// (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's
// source). Directories come by themselves, and the first error sticks. Used by
// one goroutine.
type Initramfs struct {
	w    io.Writer
	n    int64
	ino  int
	done map[string]bool
	err  error
}

// NewInitramfs begins an archive.
func NewInitramfs(w io.Writer) *Initramfs {
	return &Initramfs{w: w, done: map[string]bool{".": true}}
}

// Dir adds a directory and those above it. tmp is for
// everybody, as it is on a disk.
func (a *Initramfs) Dir(name string) {
	name = clean(name)
	if a.err != nil || a.done[name] {
		return
	}
	a.Dir(path.Dir(name))
	a.done[name] = true
	mode := uint32(0o040755)
	if name == "tmp" {
		mode = 0o041777
	}
	a.entry(name, mode, 0, nil)
}

// Symlink adds a symbolic link.
func (a *Initramfs) Symlink(name, target string) {
	if name, ok := a.start(name); ok {
		a.entry(name, 0o120777, int64(len(target)), strings.NewReader(target))
	}
}

// Has says whether a name is there.
func (a *Initramfs) Has(name string) bool { return a.done[clean(name)] }

// Err is the first error so far.
func (a *Initramfs) Err() error { return a.err }

// File adds a regular file.
func (a *Initramfs) File(name string, perm fs.FileMode, content []byte) {
	if name, ok := a.start(name); ok {
		a.entry(name, 0o100000|uint32(perm.Perm()), int64(len(content)), strings.NewReader(string(content)))
	}
}

// Copy adds a regular file of this machine, following links.
func (a *Initramfs) Copy(name, from string) {
	name, ok := a.start(name)
	if !ok {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", from, errs.Invalid)
	}
	if err != nil {
		a.err = err
		return
	}
	a.entry(name, 0o100000|uint32(st.Mode().Perm()), st.Size(), f)
}

// Close ends the archive and returns the first error. It does not close the
// writer.
func (a *Initramfs) Close() error {
	a.entry("TRAILER!!!", 0, 0, nil)
	if a.err != nil {
		return fmt.Errorf("initramfs: %w", a.err)
	}
	return nil
}

// clean makes a name the archive's own form, without a slash in front.
func clean(name string) string {
	if name = strings.TrimPrefix(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

// start prepares the parent directory; it says no where the name is taken.
func (a *Initramfs) start(name string) (string, bool) {
	name = clean(name)
	if a.err != nil {
		return name, false
	}
	if a.done[name] {
		a.err = fmt.Errorf("%s is there twice: %w", name, errs.Invalid)
		return name, false
	}
	a.Dir(path.Dir(name))
	a.done[name] = true
	return name, a.err == nil
}

func (a *Initramfs) entry(name string, mode uint32, size int64, content io.Reader) {
	if a.err != nil {
		return
	}
	if size > math.MaxUint32 {
		a.err = fmt.Errorf("%s: %d bytes are too many for an initramfs: %w", name, size, errs.Invalid)
		return
	}
	a.ino++
	// ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
	a.text(fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0))
	a.text(name + "\x00")
	a.pad()
	if content != nil && a.err == nil {
		n, err := io.CopyN(a.w, content, size)
		a.n += n
		if err != nil {
			a.err = fmt.Errorf("%s: %w", name, err)
		}
	}
	a.pad()
}

func (a *Initramfs) text(s string) {
	if a.err == nil {
		_, a.err = io.WriteString(a.w, s)
		a.n += int64(len(s))
	}
}

func (a *Initramfs) pad() { a.text("\x00\x00\x00"[:(4-a.n%4)%4]) }
