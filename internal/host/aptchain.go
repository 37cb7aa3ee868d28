package host

import (
	"bufio"
	"compress/bzip2"
	"compress/gzip"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"ringwall/internal/errs"
)

const (
	aptListsDir = "var/lib/apt/lists"
	maxAptLists = 10_000
	maxSigned   = 4 << 20
	maxIndex    = 2 << 30
)

// AptLists is what apt last fetched. Nothing of it is verified here: trust comes
// from an OpenPGP signature over a suite's InRelease by a key that the policy
// names, the SHA-256 that it gives for an index, and the one that the index
// gives for a package. Whoever composes these needs no trust in file names.
type AptLists struct {
	Suites []AptSuite
	// Skipped are files that no chain can start from or lead through, with
	// the reason: what only they list cannot be trusted by way of apt.
	Skipped []AptSkipped
}

// AptSuite is one signed index and the package indices beside it.
type AptSuite struct {
	InRelease string // path of the file
	Packages  []AptPackages
}

// AptPackages is a file with an index of packages.
type AptPackages struct {
	Path string
	Name string // as its InRelease lists it, as main/binary-amd64/Packages
	Arch string // amd64, all, …; "" in a flat archive
}

// AptSkipped is a file that was left out.
type AptSkipped struct{ Path, Why string }

// ReadAptLists finds the indices below root. Files that vanish afterwards, as
// apt update replaces them, show as errs.NotFound when they are opened.
func ReadAptLists(root string) (AptLists, error) {
	var out AptLists
	dir := filepath.Join(root, aptListsDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return out, fmt.Errorf("read apt's lists: %w", kindOf(err))
	}
	if len(entries) > maxAptLists {
		return out, fmt.Errorf("read apt's lists: %d files: %w", len(entries), errs.Invalid)
	}
	var names []string
	signed := make(map[string]bool)
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue // lock, partial/, auxfiles/; apt makes no links here
		}
		names = append(names, e.Name())
		if prefix, ok := strings.CutSuffix(e.Name(), "InRelease"); ok {
			signed[prefix] = true
			out.Suites = append(out.Suites, AptSuite{InRelease: filepath.Join(dir, e.Name())})
		}
	}
	for _, n := range names {
		path := filepath.Join(dir, n)
		if prefix, ok := strings.CutSuffix(n, "Release.gpg"); ok && !signed[prefix] {
			out.Skipped = append(out.Skipped, AptSkipped{path, "the archive has a detached signature only, no InRelease"})
		}
		stem, _ := cutCompression(n)
		if stem != "Packages" && !strings.HasSuffix(stem, "_Packages") {
			if strings.Contains(n, "_Packages.") || strings.HasPrefix(n, "Packages.") {
				out.Skipped = append(out.Skipped, AptSkipped{path, "unknown compression"})
			}
			continue
		}
		// More than one prefix may fit (a suite stable and a suite
		// stable/updates): the signed list of names decides.
		found := false
		for i := range out.Suites {
			s := &out.Suites[i]
			rest, ok := strings.CutPrefix(stem, strings.TrimSuffix(filepath.Base(s.InRelease), "InRelease"))
			if !ok {
				continue
			}
			name, err := aptName(rest)
			if err != nil {
				continue
			}
			s.Packages = append(s.Packages, AptPackages{Path: path, Name: name, Arch: indexArch(name)})
			found = true
		}
		if !found {
			out.Skipped = append(out.Skipped, AptSkipped{path, "no InRelease beside it"})
		}
	}
	return out, nil
}

// Signed reads the InRelease file, signature and all.
func (s AptSuite) Signed() ([]byte, error) {
	b, err := readBounded(s.InRelease, maxSigned)
	if err != nil {
		return nil, fmt.Errorf("signed index: %w", err)
	}
	return b, nil
}

// Open gives the content of the index, decompressed, whose SHA-256 the
// InRelease lists. It is bounded in memory and length; close it.
func (p AptPackages) Open() (io.ReadCloser, error) {
	f, err := os.Open(p.Path)
	if err != nil {
		return nil, fmt.Errorf("open index: %w", kindOf(err))
	}
	_, ext := cutCompression(p.Path)
	r, err := openIndex(bufio.NewReaderSize(f, 64<<10), ext)
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open index %s: %w", p.Path, err)
	}
	return indexFile{io.LimitReader(r, maxIndex), f, r}, nil
}

type indexFile struct {
	io.Reader
	file    *os.File
	decoder io.Reader
}

func (x indexFile) Close() error {
	if d, ok := x.decoder.(*zstd.Decoder); ok {
		d.Close()
	}
	return x.file.Close()
}

// openIndex decodes one of apt's compressions (APT::Compressor); "" is none.
func openIndex(r io.Reader, ext string) (io.Reader, error) {
	var d io.Reader
	var err error
	switch ext {
	case "":
		return r, nil
	case ".lz4":
		return newLZ4Reader(r), nil
	case ".gz":
		d, err = gzip.NewReader(r)
	case ".xz":
		d, err = xz.NewReader(r)
	case ".bz2":
		return bzip2.NewReader(r), nil
	case ".zst":
		d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
	default:
		return nil, fmt.Errorf("compression %s: %w", ext, errs.Unsupported)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	return d, nil
}

func cutCompression(name string) (stem, ext string) {
	for _, ext := range []string{".lz4", ".gz", ".xz", ".bz2", ".zst"} {
		if s, ok := strings.CutSuffix(name, ext); ok {
			return s, ext
		}
	}
	return name, ""
}

// aptName undoes what apt makes of a path in a file name: it escapes special
// characters, the underscore among them, as %xx, then writes / as _.
func aptName(s string) (string, error) {
	n, err := url.PathUnescape(strings.ReplaceAll(s, "_", "/"))
	if err != nil || !cleanAbs("/"+n) {
		return "", fmt.Errorf("name of an index %q: %w", s, errs.Invalid)
	}
	return n, nil
}

// indexArch is the architecture in component/binary-ARCH/Packages.
func indexArch(name string) string {
	_, arch, ok := strings.Cut(filepath.Dir(name), "/binary-")
	if !ok || strings.Contains(arch, "/") {
		return ""
	}
	return arch
}
