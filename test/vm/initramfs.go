package vm

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

// cpio writes an archive in the "newc" format that the kernel unpacks as its
// first file system (Documentation/driver-api/early-userspace/buffer-format.rst
// in the kernel source). The first error sticks.
type cpio struct {
	w    io.Writer
	n    int64
	ino  int
	done map[string]bool
	err  error
}

// merged are the directories that Debian 12 keeps below /usr.
var merged = []string{"bin", "sbin", "lib", "lib64"}

func newCPIO(w io.Writer) *cpio {
	c := &cpio{w: w, done: map[string]bool{".": true}}
	for _, d := range merged {
		c.dir("usr/" + d)
		c.symlink(d, "usr/"+d)
	}
	return c
}

// clean makes an absolute or relative name the archive's own form.
func clean(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return "."
	}
	first, rest, _ := strings.Cut(name, "/")
	for _, d := range merged {
		if first == d && rest != "" {
			return "usr/" + name
		}
	}
	return name
}

func (c *cpio) dir(name string) {
	name = clean(name)
	if c.err != nil || c.done[name] {
		return
	}
	c.dir(path.Dir(name))
	c.done[name] = true
	mode := uint32(0o040755)
	if name == "tmp" {
		mode = 0o041777
	}
	c.entry(name, mode, 0, nil)
}

func (c *cpio) symlink(name, target string) {
	if name, ok := c.start(name); ok {
		c.entry(name, 0o120777, int64(len(target)), strings.NewReader(target))
	}
}

func (c *cpio) file(name string, perm fs.FileMode, content string) {
	if name, ok := c.start(name); ok {
		c.entry(name, 0o100000|uint32(perm.Perm()), int64(len(content)), strings.NewReader(content))
	}
}

// copy adds a regular file of the host, following links.
func (c *cpio) copy(name, host string) {
	name, ok := c.start(name)
	if !ok {
		return
	}
	f, err := os.Open(host)
	if err != nil {
		c.err = err
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		c.err = err
		return
	}
	if !st.Mode().IsRegular() {
		c.err = fmt.Errorf("%s is not a regular file: %w", host, errs.Invalid)
		return
	}
	c.entry(name, 0o100000|uint32(st.Mode().Perm()), st.Size(), f)
}

// start prepares the parent directory; it says no where the name is taken.
func (c *cpio) start(name string) (string, bool) {
	name = clean(name)
	if c.err != nil || c.done[name] {
		return name, false
	}
	c.dir(path.Dir(name))
	c.done[name] = true
	return name, c.err == nil
}

func (c *cpio) entry(name string, mode uint32, size int64, content io.Reader) {
	if c.err != nil {
		return
	}
	if size > math.MaxUint32 {
		c.err = fmt.Errorf("%s: %d bytes are too many for an initramfs: %w", name, size, errs.Invalid)
		return
	}
	c.ino++
	// ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
	c.text(fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0))
	c.text(name + "\x00")
	c.pad()
	if content != nil && c.err == nil {
		n, err := io.CopyN(c.w, content, size)
		c.n += n
		if err != nil {
			c.err = fmt.Errorf("%s: %w", name, err)
		}
	}
	c.pad()
}

func (c *cpio) text(s string) {
	if c.err == nil {
		_, c.err = io.WriteString(c.w, s)
		c.n += int64(len(s))
	}
}

func (c *cpio) pad() { c.text("\x00\x00\x00"[:(4-c.n%4)%4]) }

// close ends the archive and returns the first error.
func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, 0, nil)
	return c.err
}
