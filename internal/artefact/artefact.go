package artefact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Format is how an artefact is packed.
type Format string

// DefaultDepth is how many archives deep Walk looks into archives.
const DefaultDepth = 8

// Options say how to open an artefact. The zero value is safe and looks at
// everything.
type Options struct {
	// Depth is how many archives deep Walk looks into archives; 0 means
	// DefaultDepth, and -1 not at all. An archive below that is an error.
	Depth int
	// Platform picks from an OCI index: "linux/arm64/v8". Empty: all platforms.
	Platform string
	// Layers makes a walk over an image visit each layer for itself, also what
	// upper layers hide, instead of the file system that a container sees.
	Layers bool
	// Unread, if set, is told of an archive within the artefact that cannot be
	// read, and where it lies; the walk goes on unless it returns an error. It may
	// have been read in part. If it is nil, such an archive ends the walk: what
	// cannot be read is not passed over in silence.
	Unread func(location string, err error) error
	// Context ends a walk early; nil: never.
	Context context.Context //nolint:containedctx // Walk is codesign.Source's and takes none
	// Progress, if set, is told now and then how far reading is.
	Progress func(Progress)
}

// Progress is how far a walk is.
type Progress struct {
	Members int
	Bytes   int64 // hashed by Open; of the members that Walk has come to
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
	// Digest is the SHA-256 of the file. It is zero for a directory, and that of
	// the manifest or index for an OCI image.
	Digest integrity.Digest

	options Options
	path    string
	file    *os.File // nil for a directory
	image   *ociReader
	done    func() // removes or closes what image reads; nil: nothing
	opened  fileState
	mode    fs.FileMode
	pkg     Package
	read    Progress
	told    time.Time
	ticks   uint
}

// fileState tells whether a file was written to. The change time cannot be set
// by who writes, short of moving the machine's clock.
type fileState struct {
	size   int64
	change syscall.Timespec
}

// Open tells an artefact's format by its content and opens it. The path is that
// of a file or a directory, or the name of an image in a registry with registry
// and tag or digest ("registry.example/edged:4.7.0"), which is pulled. A format that this package does not read is
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
	if o.Context == nil {
		o.Context = context.Background()
	}
	a := &Artefact{path: path, Name: nameOf(path), options: o, told: time.Now()}
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if ref, ok := parseReference(path); ok {
			a.Name = ref.Context().RepositoryStr()
			return a, a.pull(ref)
		}
	}
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		a.Format = FormatDir
		return a, a.openLayout(path)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is neither a file nor a directory: %w", path, errs.Invalid)
	}
	a.mode = st.Mode()
	if a.file, err = os.Open(path); err != nil {
		return nil, err
	}
	if err := a.measure(); err != nil {
		_ = a.file.Close()
		return nil, err
	}
	return a, nil
}

// openLayout opens a directory as an image if it is one.
func (a *Artefact) openLayout(dir string) error {
	for _, f := range []string{"oci-layout", "index.json"} {
		if _, err := os.Lstat(filepath.Join(dir, f)); err != nil {
			return nil //nolint:nilerr // a directory like any other
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	a.Format = FormatOCI
	if a.image, a.Digest, err = readOCI(ociDir{root}, a.options.Platform); err != nil {
		_ = root.Close()
		return err
	}
	a.done = func() { _ = root.Close() }
	return nil
}

func (a *Artefact) pull(ref name.Reference) error {
	dir, done, err := pull(a.options, ref)
	if err != nil {
		return err
	}
	if err := a.openLayout(dir); err != nil {
		done()
		return err
	}
	closeRoot := a.done
	a.done = func() { closeRoot(); done() }
	return nil
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
	if _, err := io.CopyBuffer(h, &topReader{a: a, r: a.whole(), count: true}, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("read %s: %w", a.path, err)
	}
	a.Digest = integrity.Digest(h.Sum(nil))
	if a.Format, err = formatOf(a.Name, a.whole()); err != nil || a.Format != FormatTar {
		return err
	}
	store, err := indexTar(a.whole())
	if err != nil || store == nil {
		return err
	}
	a.Format = FormatOCI
	image, digest, err := readOCI(store, a.options.Platform)
	if !digest.IsZero() {
		a.Digest = digest
	}
	a.image = image
	return err
}

// formatOf tells what a whole file is.
func formatOf(name string, src *io.SectionReader) (Format, error) {
	head := make([]byte, codesign.HeadSize)
	n, err := src.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	f, err := sniff(head[:n])
	if err == nil && f != formatNone {
		f, err = sniffDeep(f, src)
	}
	if err == nil && f == formatNone {
		f, err = formatOfRest(name, head[:n], src)
	}
	return f, err
}

// formatOfRest is for what has no sign of a container at its beginning.
func formatOfRest(name string, head []byte, src io.ReaderAt) (Format, error) {
	var b [8]byte
	for _, f := range []struct {
		at          int64
		magic, name string
	}{{0x8001, "CD001", "an ISO 9660 image"}, {0x10040, "_BHRfS_M", "a btrfs image"}} {
		if n, _ := src.ReadAt(b[:], f.at); n >= len(f.magic) && string(b[:len(f.magic)]) == f.magic {
			return "", fmt.Errorf("%s is not read here; mount it read-only and give the directory: %w", f.name, errs.Unsupported)
		}
	}
	if codesign.Classify(name, 0o644, head).Kinds != 0 {
		return FormatFile, nil
	}
	if len(head) >= tarBlock && len(bytes.Trim(head, "\x00")) == 0 {
		return FormatTar, nil // of nothing
	}
	return "", fmt.Errorf("%s is neither a package, an archive, an image nor a program: %w", name, errs.Invalid)
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

func (a *Artefact) whole() *io.SectionReader { return io.NewSectionReader(a.file, 0, a.opened.size) }

// Package is what a package says of itself, once it has been walked. False for
// anything that is no package.
func (a *Artefact) Package() (Package, bool) { return a.pkg, a.pkg.Name != "" }

// Size is the length of the file in bytes; 0 for what is no file.
func (a *Artefact) Size() int64 { return a.opened.size }

// Progress is how far the current walk is.
func (a *Artefact) Progress() Progress { return a.read }

// Close releases the file. Walk must not be called any more.
func (a *Artefact) Close() error {
	if a.done != nil {
		a.done()
	}
	if a.file == nil {
		return nil
	}
	return a.file.Close()
}

// Walk implements codesign.Source. A file that changes between Open and the
// end of the walk is errs.Conflict, so that Digest and members belong together.
func (a *Artefact) Walk(visit func(codesign.Member, io.Reader) error) error {
	a.read = Progress{}
	w := &walk{a: a, visit: visit, state: &walkState{}}
	err := a.walk(w)
	if w.state.fatal != nil {
		err = w.state.fatal
	}
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

func (a *Artefact) walk(w *walk) error {
	switch a.Format {
	case FormatDir:
		return readDir(a.path, w.member)
	case FormatOCI:
		return a.image.walk(a.options.Layers, w.member)
	case FormatFile, FormatUKI: // the file itself, and then what is in it
		m := codesign.Member{Path: a.Name, Mode: a.mode, Size: a.opened.size}
		return w.member(m, a.file)
	}
	return w.read(a.Format, a.whole())
}
