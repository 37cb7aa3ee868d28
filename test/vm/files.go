package vm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"ringwall/internal/errs"
)

// File is a file or directory of the host and its place in the guest.
// Directories are copied with everything below them. The shared libraries that
// a program needs come along.
type File struct {
	Host  string
	Guest string // absolute; "" is the same path as on the host
}

// ParseFiles reads "host:guest,host,…", the form of RINGWALL_ADD.
func ParseFiles(list string) ([]File, error) {
	var files []File
	for item := range strings.SplitSeq(list, ",") {
		if item == "" {
			continue
		}
		host, guest, _ := strings.Cut(item, ":")
		abs, err := filepath.Abs(host)
		if err != nil {
			return nil, err
		}
		if guest == "" {
			guest = abs
		}
		if !filepath.IsAbs(guest) {
			return nil, fmt.Errorf("%q: the path in the guest must be absolute: %w", item, errs.Invalid)
		}
		files = append(files, File{Host: abs, Guest: guest})
	}
	return files, nil
}

// add puts f into the archive.
func (c *cpio) add(f File) error {
	if f.Guest == "" {
		f.Guest = f.Host
	}
	st, err := os.Stat(f.Host)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		c.copy(f.Guest, f.Host)
		return errors.Join(c.Err(), c.addLibraries(f.Host))
	}
	return filepath.WalkDir(f.Host, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(f.Host, p)
		if err != nil {
			return err
		}
		to := filepath.Join(f.Guest, rel)
		switch {
		case d.IsDir():
			c.dir(to)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			c.symlink(to, target)
		case d.Type().IsRegular():
			c.copy(to, p)
			if err := c.addLibraries(p); err != nil {
				return err
			}
		}
		return c.Err()
	})
}

// libraryDirs is where Debian keeps shared libraries.
var libraryDirs = []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"}

// addLibraries adds the loader and the libraries of a dynamically linked ELF
// file. A library that this machine does not have is left out: the program may
// bring it along.
func (c *cpio) addLibraries(host string) error {
	f, err := elf.Open(host)
	if err != nil {
		return nil // not ELF: nothing to add
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return err
		}
		if name := strings.TrimRight(string(b), "\x00"); !c.has(name) {
			c.copy(name, name)
		}
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	for _, l := range libs {
		for _, d := range libraryDirs {
			p := filepath.Join(d, l)
			if _, err := os.Stat(p); err != nil {
				continue
			}
			if !c.has(p) {
				c.copy(p, p)
				if err := c.addLibraries(p); err != nil {
					return err
				}
			}
			break
		}
	}
	return c.Err()
}
