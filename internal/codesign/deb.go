package codesign

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

const (
	arMagic    = "!<arch>\n"
	maxControl = 1 << 20
)

// Deb is a Debian package as a Source. Its maintainer scripts are members too,
// under DEBIAN/: they run on the host, though dpkg never unpacks them with the
// rest. Control is known once it has been walked.
type Deb struct {
	r       io.Reader
	Control DebControl
}

// DebControl is what a package says about itself.
type DebControl struct {
	Package, Version, Architecture string
}

// DebSource yields a Debian binary package (format 2.0).
func DebSource(r io.Reader) *Deb { return &Deb{r: r} }

// Walk implements Source.
func (d *Deb) Walk(visit func(Member, io.Reader) error) error {
	if err := d.walk(visit); err != nil {
		return fmt.Errorf("read deb: %w", err)
	}
	return nil
}

func (d *Deb) walk(visit func(Member, io.Reader) error) error {
	a, err := newArReader(d.r)
	if err != nil {
		return err
	}
	// dpkg insists on this order and ignores what follows; so that nothing is
	// ignored here, nothing may follow.
	for i, want := range []string{"debian-binary", "control.tar", "data.tar"} {
		name, err := a.next()
		if err != nil {
			return fmt.Errorf("where %s belongs: %w: %w", want, err, errs.Invalid)
		}
		stem, ext := name, ""
		if i > 0 {
			stem, ext = cutTar(name)
		}
		if stem != want {
			return fmt.Errorf("part %.40q where %s belongs: %w", name, want, errs.Invalid)
		}
		switch i {
		case 0:
			err = checkDebVersion(a)
		case 1:
			err = d.walkPart(a, ext, "DEBIAN/", "control", func(m Member, r io.Reader) error {
				if m.Path != "DEBIAN/control" || r == nil {
					return visit(m, r)
				}
				return d.readControl(m, r, visit)
			})
		case 2:
			err = d.walkPart(a, ext, "", "data", visit)
		}
		if err != nil {
			return err
		}
	}
	if name, err := a.next(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("part %.40q after data.tar (%w): %w", name, err, errs.Invalid)
	}
	if d.Control.Package == "" {
		return fmt.Errorf("no control file: %w", errs.Invalid)
	}
	return nil
}

func cutTar(name string) (stem, ext string) {
	stem, ext, _ = strings.Cut(name, ".tar")
	return stem + ".tar", strings.TrimPrefix(ext, ".")
}

func checkDebVersion(r io.Reader) error {
	b, err := io.ReadAll(io.LimitReader(r, 64))
	if err != nil {
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if !strings.HasPrefix(string(b), "2.") || !bytes.HasSuffix(b, []byte("\n")) {
		return fmt.Errorf("format version %.20q: %w", b, errs.Invalid)
	}
	return nil
}

func (d *Deb) walkPart(a *arReader, ext, prefix, origin string, visit func(Member, io.Reader) error) error {
	b := bufio.NewReaderSize(a, 64<<10)
	head, err := b.Peek(6)
	if err != nil {
		return fmt.Errorf("%s.tar: %w: %w", origin, err, errs.Invalid)
	}
	// dpkg goes by the name. Where name and content disagree, it and we would
	// read different things.
	if got := Compression(head); got != ext || (ext != "" && ext != "gz" && ext != "xz" && ext != "zst" && ext != "bz2") {
		return fmt.Errorf("%s.tar.%s holds %q: %w", origin, ext, got, errs.Invalid)
	}
	t := &tarSource{r: b, prefix: prefix, origin: origin}
	if err := t.walk(func(m Member, r io.Reader) error {
		// Only control.tar may say DEBIAN/: a data.tar that does (dpkg would
		// install it) must not pass for a maintainer script.
		if prefix == "" && strings.HasPrefix(m.Path, "DEBIAN/") {
			return fmt.Errorf("data.tar holds %q: %w", m.Path, errs.Invalid)
		}
		if prefix != "" && isMaintainerScript(m.Path) {
			m.Install = true
			if m.Mode.IsRegular() {
				m.Mode |= 0o111 // as dpkg does
			}
		}
		return visit(m, r)
	}); err != nil {
		return fmt.Errorf("%s.tar: %w", origin, err)
	}
	if n, err := io.Copy(io.Discard, b); err != nil || n > 0 {
		return fmt.Errorf("%s.tar: %d bytes after the end (%w): %w", origin, n, err, errs.Invalid)
	}
	return nil
}

func isMaintainerScript(p string) bool {
	switch p {
	case "DEBIAN/preinst", "DEBIAN/postinst", "DEBIAN/prerm", "DEBIAN/postrm", "DEBIAN/config":
		return true
	}
	return false
}

func (d *Deb) readControl(m Member, r io.Reader, visit func(Member, io.Reader) error) error {
	if m.Size > maxControl {
		return fmt.Errorf("control file of %d bytes: %w", m.Size, errs.Invalid)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("control file: %w: %w", err, errs.Invalid)
	}
	err = eachStanza(bytes.NewReader(b), maxControl, func(f map[string]string) error {
		if d.Control.Package != "" {
			return fmt.Errorf("control file has two stanzas: %w", errs.Invalid)
		}
		d.Control = DebControl{Package: f["Package"], Version: f["Version"], Architecture: f["Architecture"]}
		if d.Control.Package == "" || d.Control.Version == "" || d.Control.Architecture == "" {
			return fmt.Errorf("control file lacks Package, Version or Architecture: %w", errs.Invalid)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return visit(m, bytes.NewReader(b))
}

// arReader reads the common ar format, as far as .deb files use it.
type arReader struct {
	r    io.Reader
	left int64 // of the current part
	pad  int64
}

func newArReader(r io.Reader) (*arReader, error) {
	var m [len(arMagic)]byte
	if _, err := io.ReadFull(r, m[:]); err != nil || string(m[:]) != arMagic {
		return nil, fmt.Errorf("not an ar archive: %w", errs.Invalid)
	}
	return &arReader{r: r}, nil
}

// next skips to the next part and returns its name; io.EOF after the last.
func (a *arReader) next() (string, error) {
	if _, err := io.CopyN(io.Discard, a.r, a.left+a.pad); err != nil {
		return "", fmt.Errorf("cut short: %w", errs.Invalid)
	}
	a.left, a.pad = 0, 0
	var h [60]byte
	if _, err := io.ReadFull(a.r, h[:]); err != nil {
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return "", io.EOF
		}
		return "", fmt.Errorf("cut short: %w", errs.Invalid)
	}
	size, err := strconv.ParseUint(strings.TrimRight(string(h[48:58]), " "), 10, 40)
	if err != nil || string(h[58:]) != "`\n" {
		return "", fmt.Errorf("bad ar header: %w", errs.Invalid)
	}
	a.left, a.pad = int64(size), int64(size%2)
	return strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/"), nil
}

// Read reads the current part.
func (a *arReader) Read(p []byte) (int, error) {
	if a.left == 0 {
		return 0, io.EOF
	}
	n, err := a.r.Read(p[:min(int64(len(p)), a.left)])
	a.left -= int64(n)
	if errors.Is(err, io.EOF) && a.left > 0 {
		err = fmt.Errorf("cut short: %w", errs.Invalid)
	} else if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}
