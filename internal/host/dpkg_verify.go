package host

import (
	"context"
	"crypto/md5" //nolint:gosec // what dpkg keeps; a finding here is a hint, never a reason to trust
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// FindingKind is what is wrong with a file.
type FindingKind string

// The findings.
const (
	FileChanged FindingKind = "changed" // differs from its package
	FileGone    FindingKind = "gone"    // in a package, not on the disk
	FileUnowned FindingKind = "unowned" // on the disk, in no package
	FileNoSum   FindingKind = "no-sum"  // the package has no checksum for it
)

// Finding is one file that is not as its package brought it.
type Finding struct {
	Kind     FindingKind `json:"kind"`
	Path     string      `json:"path"` // on the disk
	Package  string      `json:"package,omitempty"`
	Conffile bool        `json:"conffile,omitempty"`
	Err      error       `json:"-"` // why it could not be compared; the kind then is changed (fails closed)
}

// VerifyOptions say what to look at.
type VerifyOptions struct {
	// Unowned are the directories (as /usr) in which files of no package are
	// looked for; none: they are not looked for.
	Unowned []string
	// Workers that read files; 0: half of the CPUs, at most 4.
	Workers int
}

// VerifySummary is what was looked at.
type VerifySummary struct {
	Packages int   `json:"packages"`
	Files    int   `json:"files"`
	Bytes    int64 `json:"bytes"`
	Findings int   `json:"findings"`
}

// VerifyMD5 compares the disk with what the packages say and calls visit for
// each difference, one call at a time, in no particular order. MD5 and a
// database that root can write prove nothing: this is for a person who looks
// for what changed, and for a first policy, never for a verdict.
func (d *Dpkg) VerifyMD5(ctx context.Context, o VerifyOptions, visit func(Finding) error) (VerifySummary, error) {
	v := &verifier{db: d, visit: visit, links: newLinks(d.root), owned: make(map[string]bool)}
	workers := o.Workers
	if workers <= 0 {
		workers = max(1, min(4, runtime.GOMAXPROCS(0)/2))
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	jobs := make(chan verifyJob, 64)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			buf := make([]byte, 128<<10)
			for j := range jobs {
				if err := v.check(ctx, j, buf); err != nil {
					stop(err)
				}
			}
		})
	}
	err := v.send(ctx, jobs)
	close(jobs)
	wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = v.unowned(ctx, o.Unowned)
	}
	if err != nil {
		return v.sum, fmt.Errorf("verify packages of %s: %w", d.root, err)
	}
	return v.sum, nil
}

type verifyJob struct {
	pkg  string
	file PackageFile
	disk string // below root, directories resolved
}

type verifier struct {
	db    *Dpkg
	visit func(Finding) error
	links *links
	owned map[string]bool

	mu  sync.Mutex // guards what follows and calls of visit
	sum VerifySummary
}

func (v *verifier) send(ctx context.Context, jobs chan<- verifyJob) error {
	for _, p := range v.db.Packages() {
		files, err := v.db.PackageFiles(p)
		if err != nil {
			return err
		}
		v.mu.Lock()
		v.sum.Packages++
		v.mu.Unlock()
		for _, f := range files {
			disk, err := v.links.parent(f.Disk)
			if err != nil {
				return err
			}
			v.owned[disk] = true
			select {
			case jobs <- verifyJob{p.Name, f, disk}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

func (v *verifier) check(ctx context.Context, j verifyJob, buf []byte) error {
	if ctx.Err() != nil {
		return nil
	}
	f := Finding{Path: j.disk, Package: j.pkg, Conffile: j.file.Conffile}
	name := filepath.Join(v.db.root, j.disk)
	if j.file.MD5 == "" {
		fi, err := os.Lstat(name)
		switch {
		case os.IsNotExist(err):
			f.Kind = FileGone
		case err != nil:
			f.Kind, f.Err = FileChanged, err
		case fi.Mode().IsRegular():
			f.Kind = FileNoSum
		default:
			return nil // a directory or a link: dpkg keeps nothing to compare
		}
		return v.report(f, 0)
	}
	sum, n, err := md5File(ctx, name, buf)
	switch {
	case ctx.Err() != nil:
		return nil
	case os.IsNotExist(err):
		f.Kind = FileGone
	case err != nil:
		f.Kind, f.Err = FileChanged, err
	case sum != j.file.MD5:
		f.Kind = FileChanged
	}
	return v.report(f, n)
}

func (v *verifier) report(f Finding, n int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sum.Files++
	v.sum.Bytes += n
	if f.Kind == "" {
		return nil
	}
	v.sum.Findings++
	return v.visit(f)
}

// unowned walks directories for regular files and links that no package and no
// alternative has.
func (v *verifier) unowned(ctx context.Context, dirs []string) error {
	if len(dirs) == 0 {
		return nil
	}
	alt, err := v.db.Alternatives()
	if err != nil {
		return err
	}
	for _, a := range alt {
		names := []string{a.Link}
		for _, s := range a.Slaves {
			names = append(names, s)
		}
		for _, n := range names {
			disk, err := v.links.parent(n)
			if err != nil {
				return err
			}
			v.owned[disk] = true
		}
	}
	for _, dir := range dirs {
		if !cleanAbs(dir) {
			return fmt.Errorf("directory %q: %w", dir, errs.Invalid)
		}
		start, err := v.links.resolve(dir)
		if err != nil {
			return err
		}
		err = filepath.WalkDir(filepath.Join(v.db.root, start), func(name string, e fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				if os.IsNotExist(err) {
					return nil
				}
				return err
			}
			rel := "/" + strings.TrimPrefix(strings.TrimPrefix(name, filepath.Clean(v.db.root)), "/")
			if e.IsDir() || v.owned[rel] || !e.Type().IsRegular() && e.Type() != fs.ModeSymlink {
				return nil
			}
			return v.report(Finding{Kind: FileUnowned, Path: rel}, 0)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func md5File(ctx context.Context, name string, buf []byte) (string, int64, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return "", 0, errors.Join(err, fmt.Errorf("%s is no regular file: %w", name, errs.Invalid))
	}
	h := md5.New() //nolint:gosec // see the import
	var total int64
	for ctx.Err() == nil {
		n, err := f.Read(buf)
		_, _ = h.Write(buf[:n])
		total += int64(n)
		if err == io.EOF {
			return hex.EncodeToString(h.Sum(nil)), total, nil
		}
		if err != nil {
			return "", total, err
		}
	}
	return "", total, ctx.Err()
}

// links resolves symbolic links in directory names below a root, as a process
// with that root would: absolute targets start at the root, and ".." stops at
// it. Used by one goroutine.
type links struct {
	root  string
	cache map[string]string
}

func newLinks(root string) *links { return &links{root: root, cache: map[string]string{"/": "/"}} }

// parent resolves all of a path but its last element.
func (l *links) parent(p string) (string, error) {
	dir, err := l.resolve(path.Dir(p))
	if err != nil {
		return "", err
	}
	return path.Join(dir, path.Base(p)), nil
}

func (l *links) resolve(p string) (string, error) { return l.walk(path.Clean("/"+p), 0) }

func (l *links) walk(p string, depth int) (string, error) {
	if r, ok := l.cache[p]; ok {
		return r, nil
	}
	if depth > 40 {
		return "", fmt.Errorf("%s: too many symbolic links: %w", p, errs.Invalid)
	}
	dir, err := l.walk(path.Dir(p), depth)
	if err != nil {
		return "", err
	}
	out := path.Join(dir, path.Base(p))
	target, err := os.Readlink(filepath.Join(l.root, out))
	if err == nil {
		if !path.IsAbs(target) {
			target = path.Join(dir, target)
		}
		if out, err = l.walk(path.Clean(target), depth+1); err != nil {
			return "", err
		}
	}
	l.cache[p] = out
	return out, nil
}
