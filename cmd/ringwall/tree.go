package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// measured is one content that was found on a disk.
type measured struct {
	codesign.Record
	paths []string // as the source names them
}

// measure lists the code of a source.
func measure(s codesign.Source, o codesign.Options) ([]measured, error) {
	b, err := codesign.Build(s, o)
	if err != nil {
		return nil, err
	}
	c, err := codesign.ParseCatalogue(b.Catalogue)
	if err != nil {
		return nil, err
	}
	t, err := codesign.ParseNames(b.Names, c)
	if err != nil {
		return nil, err
	}
	out := make([]measured, 0, c.Len())
	for i, r := range c.All() {
		m := measured{Record: r}
		for _, n := range t.Names[i] {
			m.paths = append(m.paths, n.Path)
		}
		out = append(out, m)
	}
	return out, nil
}

// oneFile is a single file as a source, under its absolute name.
type oneFile struct{ path string }

// Walk implements codesign.Source.
func (o oneFile) Walk(visit func(codesign.Member, io.Reader) error) error {
	f, err := os.Open(o.path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file: %w", o.path, errs.Invalid)
	}
	abs, err := filepath.Abs(o.path)
	if err != nil {
		return err
	}
	return visit(codesign.Member{Path: strings.TrimPrefix(abs, "/"), Mode: st.Mode(), Size: st.Size()}, f)
}

// tree is the code below a directory, as far as it can be read: links are not
// followed and other file systems are left out. What cannot be read is listed.
type tree struct {
	root   string
	ctx    context.Context //nolint:containedctx // one walk is one call
	e      *env
	files  int // regular files seen
	unread []string
}

// Walk implements codesign.Source.
func (t *tree) Walk(visit func(codesign.Member, io.Reader) error) error {
	top, err := os.Stat(t.root)
	if err != nil {
		return err
	}
	told := t.e.now()
	return filepath.WalkDir(t.root, func(path string, d fs.DirEntry, err error) error {
		if t.ctx.Err() != nil {
			return t.ctx.Err()
		}
		if now := t.e.now(); now.Sub(told) >= progressEvery {
			told = now
			t.e.notef("%d files …", t.files)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // gone since its directory was read
		case err != nil:
			t.unread = append(t.unread, err.Error())
			return nil
		}
		if d.IsDir() {
			if info, err := d.Info(); err == nil && path != t.root && !sameDevice(top, info) {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		t.files++
		rel, err := filepath.Rel(t.root, path)
		if err == nil {
			err = visitCode(path, rel, visit)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.unread = append(t.unread, fmt.Sprintf("%s: %v", path, err))
		}
		return nil
	})
}

// visitCode visits a file when its beginning or name says that it is code: data
// files are many, and may change while they are read.
func visitCode(path, rel string, visit func(codesign.Member, io.Reader) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	head := make([]byte, codesign.HeadSize)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	if codesign.Classify(rel, st.Mode(), head[:n]).Kinds == 0 {
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return visit(codesign.Member{Path: rel, Mode: st.Mode(), Size: st.Size()}, f)
}

// sameDevice says whether two directories lie on one file system; true when it
// cannot be told, so that nothing is left out.
func sameDevice(a, b fs.FileInfo) bool {
	x, ok1 := a.Sys().(*syscall.Stat_t)
	y, ok2 := b.Sys().(*syscall.Stat_t)
	return !ok1 || !ok2 || x.Dev == y.Dev
}
