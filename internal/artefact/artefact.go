package artefact

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Format is how an artefact is packed.
type Format string

// The formats.
const (
	FormatDir Format = "directory"
	FormatTar Format = "tar" // also compressed with gzip, xz, zstd or bzip2
	FormatDeb Format = "deb"
)

// DefaultDepth is how many archives deep Walk looks into archives.
const DefaultDepth = 8

// Options say how to open an artefact. The zero value is safe and looks at
// everything.
type Options struct {
	// Depth is how many archives deep Walk looks into archives; 0 means
	// DefaultDepth, and -1 not at all. An archive below that is an error.
	Depth int
	// Context ends a walk early; nil: never.
	Context context.Context //nolint:containedctx // Walk is codesign.Source's and takes none
	// Progress, if set, is told now and then how far reading is.
	Progress func(Progress)
}

// Progress is how far a walk is.
type Progress struct {
	Members int
	Bytes   int64 // read from the artefact
}

// progressEvery is how often Progress is called.
const progressEvery = time.Second

// Package is what a package says of itself.
type Package struct {
	Name, Version, Architecture string
}

// Artefact is an open build. It implements codesign.Source and can be walked
// more than once, by one goroutine at a time.
type Artefact struct {
	Format Format
	// Name is the last part of the path, for records and people.
	Name string
	// Digest is the SHA-256 of the file. It is zero for a directory.
	Digest integrity.Digest

	options Options
	path    string
	file    *os.File // nil for a directory
	opened  fileState
	pkg     Package
	read    Progress
	told    time.Time
}

// fileState tells whether a file was written to. The change time cannot be set
// by who writes, short of moving the machine's clock.
type fileState struct {
	size   int64
	change syscall.Timespec
}

// Open tells an artefact's format by its content and opens it. The path is that
// of a file or a directory. A format that this package does not read is
// errs.Unsupported, with the way out in the text.
func Open(path string, o Options) (*Artefact, error) {
	a, err := open(path, o)
	if err != nil {
		return nil, fmt.Errorf("open artefact: %w", err)
	}
	return a, nil
}

func open(path string, o Options) (*Artefact, error) {
	if o.Depth == 0 {
		o.Depth = DefaultDepth
	}
	a := &Artefact{path: path, Name: nameOf(path), options: o, told: time.Now()}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		a.Format = FormatDir
		return a, nil
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is neither a file nor a directory: %w", path, errs.Invalid)
	}
	if a.file, err = os.Open(path); err != nil {
		return nil, err
	}
	if err := a.measure(); err != nil {
		_ = a.file.Close()
		return nil, err
	}
	return a, nil
}

func nameOf(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return filepath.Base(path)
}

// measure hashes the file and tells its format.
func (a *Artefact) measure() error {
	var err error
	if a.opened, err = a.state(); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{a.reader(a.whole())}, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("read %s: %w", a.path, err)
	}
	a.Digest = integrity.Digest(h.Sum(nil))
	head := make([]byte, codesign.HeadSize)
	n, err := a.file.ReadAt(head, 0)
	if err != nil && n == 0 {
		return fmt.Errorf("%s is empty: %w", a.path, errs.Invalid)
	}
	a.Format = formatOf(head[:n])
	return nil
}

func formatOf(head []byte) Format {
	if string(head[:min(8, len(head))]) == "!<arch>\n" {
		return FormatDeb
	}
	return FormatTar
}

func (a *Artefact) state() (fileState, error) {
	st, err := a.file.Stat()
	if err != nil {
		return fileState{}, err
	}
	s := fileState{size: st.Size()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		s.change = sys.Ctim
	}
	return s, nil
}

func (a *Artefact) whole() io.Reader { return io.NewSectionReader(a.file, 0, a.opened.size) }

// Package is what a package says of itself, once it has been walked. False for
// anything that is no package.
func (a *Artefact) Package() (Package, bool) { return a.pkg, a.pkg.Name != "" }

// Close releases the file. Walk must not be called any more.
func (a *Artefact) Close() error {
	if a.file == nil {
		return nil
	}
	return a.file.Close()
}

// Walk implements codesign.Source. A file that changes between Open and the
// end of the walk is errs.Conflict, so that Digest and members belong together.
func (a *Artefact) Walk(visit func(codesign.Member, io.Reader) error) error {
	a.read = Progress{}
	err := a.walk(func(m codesign.Member, r io.Reader) error {
		a.read.Members++
		if r == nil {
			return visit(m, nil)
		}
		if a.file == nil {
			r = a.reader(r)
		}
		return visit(m, r)
	})
	if err != nil || a.file == nil {
		return err
	}
	now, err := a.state()
	if err != nil {
		return err
	}
	if now != a.opened {
		return fmt.Errorf("%s changed while it was read: %w", a.path, errs.Conflict)
	}
	return nil
}

func (a *Artefact) walk(visit func(codesign.Member, io.Reader) error) error {
	switch a.Format {
	case FormatDir:
		return codesign.DirSource(os.DirFS(a.path)).Walk(visit)
	case FormatDeb:
		d := codesign.DebSource(a.reader(a.whole()))
		if err := d.Walk(visit); err != nil {
			return err
		}
		a.pkg = Package{Name: d.Control.Package, Version: d.Control.Version, Architecture: d.Control.Architecture}
		return nil
	}
	return codesign.TarSource(a.reader(a.whole())).Walk(visit)
}

// reader counts, tells how far it is, and ends with the context.
func (a *Artefact) reader(r io.Reader) io.Reader { return &watchedReader{a, r} }

type watchedReader struct {
	a *Artefact
	r io.Reader
}

func (w *watchedReader) Read(p []byte) (int, error) {
	a := w.a
	if c := a.options.Context; c != nil && c.Err() != nil {
		return 0, c.Err()
	}
	n, err := w.r.Read(p)
	a.read.Bytes += int64(n)
	if a.options.Progress != nil {
		if now := time.Now(); now.Sub(a.told) >= progressEvery {
			a.told = now
			a.options.Progress(a.read)
		}
	}
	return n, err
}
