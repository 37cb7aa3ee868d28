package csv

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Baseline is what hosts have besides the build and what their policies'
// sources list.
type Baseline interface {
	// File says whether hosts have a file of that path (no leading slash, merged
	// /usr), and its content if that is known: a zero digest is not.
	File(name string) (d integrity.Digest, ok bool, err error)
	// Library does the same for a shared library, by its soname.
	Library(soname string) (d integrity.Digest, ok bool, err error)
}

// Bounds of a list of paths.
const (
	maxListLine = 8 << 10
	maxListSize = 4 << 20 // lines
	maxLinks    = 40
)

// listBaseline knows names only.
type listBaseline struct {
	files map[string]bool
	names map[string]bool // of files in directories of libraries
}

// ListBaseline reads paths, one a line, such as `dpkg -L` prints and dpkg's own
// *.list files hold.
func ListBaseline(r io.Reader) (Baseline, error) {
	b := &listBaseline{files: map[string]bool{}, names: map[string]bool{}}
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 4<<10), maxListLine)
	for n := 1; sc.Scan(); n++ {
		p := strings.TrimSpace(sc.Text())
		if n > maxListSize {
			return nil, fmt.Errorf("baseline: more than %d lines: %w", maxListSize, errs.Invalid)
		}
		if i := strings.Index(p, " to: /"); i > 0 && strings.Contains(p[:i], "divert") { // what dpkg -L says of dpkg-divert
			p = p[i+len(" to: "):]
		}
		if p == "" {
			continue
		}
		if !path.IsAbs(p) {
			return nil, fmt.Errorf("baseline: line %d: %.80q is no absolute path: %w", n, p, errs.Invalid)
		}
		p = clean(p)
		b.files[p] = true
		if strings.Contains(path.Base(p), ".so") {
			b.names[path.Base(p)] = true
		}
	}
	if err := sc.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = errs.Invalid
		}
		return nil, fmt.Errorf("baseline: %w", err)
	}
	return b, nil
}

// File implements Baseline.
func (b *listBaseline) File(name string) (integrity.Digest, bool, error) {
	return integrity.Digest{}, b.files[clean(name)], nil
}

// Library implements Baseline. Packages ship libfoo.so.1.2 and leave the link
// libfoo.so.1 to ldconfig.
func (b *listBaseline) Library(soname string) (integrity.Digest, bool, error) {
	if b.names[soname] {
		return integrity.Digest{}, true, nil
	}
	for n := range b.names {
		if strings.HasPrefix(n, soname+".") {
			return integrity.Digest{}, true, nil
		}
	}
	return integrity.Digest{}, false, nil
}

// treeBaseline is a root directory.
type treeBaseline struct {
	fsys   fs.FS
	hashed map[string]integrity.Digest
	dirs   []string // of libraries
}

// TreeBaseline is the root directory of an installed system. Links are followed
// within it.
func TreeBaseline(fsys fs.FS) Baseline {
	b := &treeBaseline{fsys: fsys, hashed: map[string]integrity.Digest{}}
	b.dirs = []string{"usr/lib", "lib", "usr/lib64", "lib64", "usr/local/lib"}
	for _, root := range []string{"usr/lib", "lib", "usr/local/lib"} {
		entries, err := fs.ReadDir(fsys, root)
		if err != nil {
			continue // what is not there is not found
		}
		for _, e := range entries {
			if e.IsDir() && strings.Contains(e.Name(), "-linux-") {
				b.dirs = append(b.dirs, root+"/"+e.Name())
			}
		}
	}
	return b
}

// follow returns the regular file that a path leads to.
func (b *treeBaseline) follow(name string) (string, bool, error) {
	left := strings.Split(strings.TrimPrefix(path.Clean("/"+name), "/"), "/")
	at, links := "", 0
	for len(left) > 0 {
		step := left[0]
		left = left[1:]
		if step == "" || step == "." {
			continue
		}
		if step == ".." {
			if at = path.Dir(at); at == "." {
				at = ""
			}
			continue
		}
		next := path.Join(at, step)
		info, err := fs.Lstat(b.fsys, next)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return "", false, nil
		case err != nil:
			return "", false, fmt.Errorf("baseline: %w", err)
		case info.Mode()&fs.ModeSymlink == 0:
			if len(left) == 0 {
				return next, info.Mode().IsRegular(), nil
			}
			if !info.IsDir() {
				return "", false, nil
			}
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", false, nil
		}
		target, err := fs.ReadLink(b.fsys, next)
		if err != nil {
			return "", false, fmt.Errorf("baseline: %w", err)
		}
		if path.IsAbs(target) {
			at = ""
		}
		left = append(strings.Split(target, "/"), left...)
	}
	return "", false, nil
}

// File implements Baseline.
func (b *treeBaseline) File(name string) (integrity.Digest, bool, error) {
	p, ok, err := b.follow(name)
	if err != nil || !ok {
		return integrity.Digest{}, false, err
	}
	if d, ok := b.hashed[p]; ok {
		return d, true, nil
	}
	f, err := b.fsys.Open(p)
	if err != nil {
		return integrity.Digest{}, false, fmt.Errorf("baseline: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return integrity.Digest{}, false, fmt.Errorf("baseline: %s: %w", p, err)
	}
	d := integrity.Digest(h.Sum(nil))
	b.hashed[p] = d
	return d, true, nil
}

// Library implements Baseline.
func (b *treeBaseline) Library(soname string) (integrity.Digest, bool, error) {
	if strings.Contains(soname, "/") {
		return b.File(soname)
	}
	for _, dir := range b.dirs {
		d, ok, err := b.File(dir + "/" + soname)
		if err != nil || ok {
			return d, ok, err
		}
	}
	return integrity.Digest{}, false, nil
}

// joined asks several baselines in turn; a known content is the better answer.
type joined []Baseline

// JoinBaselines is a baseline of several.
func JoinBaselines(bs ...Baseline) Baseline {
	if len(bs) == 1 {
		return bs[0]
	}
	return joined(slices.Clone(bs))
}

func (j joined) first(ask func(Baseline) (integrity.Digest, bool, error)) (integrity.Digest, bool, error) {
	found := false
	for _, b := range j {
		d, ok, err := ask(b)
		if err != nil || ok && !d.IsZero() {
			return d, ok, err
		}
		found = found || ok
	}
	return integrity.Digest{}, found, nil
}

// File implements Baseline.
func (j joined) File(name string) (integrity.Digest, bool, error) {
	return j.first(func(b Baseline) (integrity.Digest, bool, error) { return b.File(name) })
}

// Library implements Baseline.
func (j joined) Library(soname string) (integrity.Digest, bool, error) {
	return j.first(func(b Baseline) (integrity.Digest, bool, error) { return b.Library(soname) })
}
