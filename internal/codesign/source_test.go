package codesign_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

type entry struct {
	name, body, link string
	mode             int64
	kind             byte
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.body)), Linkname: e.link, Typeflag: e.kind}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func compress(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how {
	case "gz":
		w = gzip.NewWriter(&b)
	case "xz":
		w, err = xz.NewWriter(&b)
	case "zst":
		w, err = zstd.NewWriter(&b)
	default:
		return data
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type part struct {
	name string
	data []byte
}

func ar(parts ...part) []byte {
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for _, p := range parts {
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", p.name, 0, 0, 0, "100644", len(p.data))
		b.Write(p.data)
		if len(p.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

const control = "Package: edged\nVersion: 4.7.0-1\nArchitecture: amd64\nDescription: x\n more\n"

func deb(t testing.TB, how string, data []byte, scripts ...entry) []byte {
	t.Helper()
	ext := ""
	if how != "" {
		ext = "." + how
	}
	c := tarOf(t, append([]entry{{name: "./control", body: control, mode: 0o644}}, scripts...)...)
	return ar(part{"debian-binary", []byte("2.0\n")}, part{"control.tar" + ext, compress(t, how, c)},
		part{"data.tar" + ext, compress(t, how, data)})
}

func build(t testing.TB, s codesign.Source, o codesign.Options) (*codesign.Catalogue, *codesign.NameTable, *codesign.Built) {
	t.Helper()
	b, err := codesign.Build(s, o)
	if err != nil {
		t.Fatal(err)
	}
	c, err := codesign.ParseCatalogue(b.Catalogue)
	if err != nil {
		t.Fatal(err)
	}
	n, err := codesign.ParseNames(b.Names, c)
	if err != nil {
		t.Fatal(err)
	}
	return c, n, b
}

func has(c *codesign.Catalogue, content string) codesign.Record {
	r, _ := c.Lookup(sha256.Sum256([]byte(content)))
	return r
}

// One tree as directory, as tar in every compression and as deb is one
// catalogue.
func TestBuild_sameContentSameCatalogue(t *testing.T) {
	prog, lib := elf(2, 1), elf(3, 1)
	entries := []entry{
		{name: "./", mode: 0o755, kind: tar.TypeDir},
		{name: "./usr/bin/edged", body: prog, mode: 0o755},
		{name: "./usr/lib/libe.so", body: lib, mode: 0o644},
		{name: "./usr/share/e/a.py", body: "import os\n", mode: 0o644},
		{name: "./usr/share/doc/e", body: "words", mode: 0o644},
		{name: "./usr/bin/link", link: "edged", mode: 0o777, kind: tar.TypeSymlink},
	}
	data := tarOf(t, entries...)
	dir := t.TempDir()
	for _, e := range entries {
		p := filepath.Join(dir, e.name)
		var err error
		switch e.kind {
		case tar.TypeDir:
		case tar.TypeSymlink:
			err = os.Symlink(e.link, p)
		default:
			err = errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(e.body), fs.FileMode(e.mode)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	want, names, stats := build(t, codesign.DirSource(os.DirFS(dir)), codesign.Options{})
	if stats.Files != 4 || stats.Code != 3 || want.Len() != 3 || len(names.Others) != 1 || names.Others[0].Target != "edged" {
		t.Errorf("%+v, others %+v", stats, names.Others)
	}
	if has(want, prog).Kinds != integrity.SetOf(integrity.KindExec) || has(want, lib).Kinds != integrity.SetOf(integrity.KindLibrary) ||
		has(want, "words").Kinds != 0 || has(want, prog).Verity != plainVerity([]byte(prog)) {
		t.Error("wrong kinds or digests")
	}
	for _, how := range []string{"", "gz", "xz", "zst"} {
		for _, s := range []codesign.Source{
			codesign.TarSource(bytes.NewReader(compress(t, how, data))), codesign.DebSource(bytes.NewReader(deb(t, how, data))),
		} {
			if c, _, _ := build(t, s, codesign.Options{}); c.Digest() != want.Digest() {
				t.Errorf("%q %T: another catalogue", how, s)
			}
		}
	}
	all, _, _ := build(t, codesign.DirSource(os.DirFS(dir)), codesign.Options{AllFiles: true})
	if r := has(all, "words"); all.Len() != 4 || r.Flags != codesign.FlagData || r.Kinds != integrity.SetOf(integrity.KindScript) {
		t.Errorf("all files: %+v", r)
	}
}

func TestBuild_deb(t *testing.T) {
	data := tarOf(t, entry{name: "./usr/bin/x", body: elf(2), mode: 0o4755})
	post := "#!/bin/sh\nset -e\n"
	d := codesign.DebSource(bytes.NewReader(deb(t, "xz", data,
		entry{name: "./postinst", body: post, mode: 0o644}, entry{name: "./md5sums", body: "x", mode: 0o644},
		entry{name: "./preinst", body: "binary", mode: 0o755})))
	c, names, _ := build(t, d, codesign.Options{})
	if d.Control != (codesign.DebControl{Package: "edged", Version: "4.7.0-1", Architecture: "amd64"}) {
		t.Errorf("%+v", d.Control)
	}
	if r := has(c, post); r.Kinds != integrity.SetOf(integrity.KindScript) || r.Flags != codesign.FlagInstall {
		t.Errorf("maintainer script: %+v", r)
	}
	if r := has(c, "binary"); r.Kinds != integrity.SetOf(integrity.KindScript) || r.Flags != codesign.FlagInstall {
		t.Errorf("maintainer script without #!: %+v", r)
	}
	if r := has(c, elf(2)); r.Flags != codesign.FlagSetID {
		t.Errorf("setuid: %+v", r)
	}
	for i, r := range c.All() {
		if r.Digest == sha256.Sum256([]byte(post)) && (names.Names[i][0].Path != "DEBIAN/postinst" || names.Names[i][0].Origin != "control") {
			t.Errorf("%+v", names.Names[i])
		}
	}
}

func TestBuild_compressedModules(t *testing.T) {
	inner := elf(1) + strings.Repeat("module", 100_000)
	for _, how := range []string{"xz", "zst", "gz"} {
		outer := string(compress(t, how, []byte(inner)))
		data := tarOf(t, entry{name: "lib/modules/6.1/a.ko." + how, body: outer, mode: 0o644},
			entry{name: "lib/modules/6.1/b.ko." + how, link: "lib/modules/6.1/a.ko." + how, kind: tar.TypeLink, mode: 0o644})
		c, n, _ := build(t, codesign.TarSource(bytes.NewReader(data)), codesign.Options{})
		o, i := has(c, outer), has(c, inner)
		if o.Kinds != integrity.SetOf(integrity.KindModule) || o.Flags != 0 || i.Kinds != o.Kinds || i.Flags != codesign.FlagInner || !i.Verity.IsZero() {
			t.Errorf("%s: %+v %+v", how, o, i)
		}
		if len(n.Names[0]) != 2 || len(n.Names[1]) != 2 {
			t.Errorf("%s: %+v", how, n.Names)
		}
		for name, bad := range map[string]string{"cut": outer[:len(outer)-9], "not compressed": inner} {
			data := tarOf(t, entry{name: "lib/modules/6.1/a.ko." + how, body: bad, mode: 0o644})
			if _, err := codesign.Build(codesign.TarSource(bytes.NewReader(data)), codesign.Options{}); !errors.Is(err, errs.Invalid) {
				t.Errorf("%s %s: %v", how, name, err)
			}
		}
	}
}

func TestBuild_hardLinks(t *testing.T) {
	data := tarOf(t, entry{name: "a", body: "words", mode: 0o644}, entry{name: "b.py", link: "./a", kind: tar.TypeLink, mode: 0o644})
	c, n, _ := build(t, codesign.TarSource(bytes.NewReader(data)), codesign.Options{})
	if has(c, "words").Kinds != integrity.SetOf(integrity.KindScript) || n.Names[0][0].Path != "b.py" {
		t.Error("a hard link's name is not classified")
	}
}

func TestSource_refuses(t *testing.T) {
	reg := entry{name: "a", body: "x", mode: 0o644}
	good := tarOf(t, reg)
	c := tarOf(t, entry{name: "control", body: control, mode: 0o644})
	bin := part{"debian-binary", []byte("2.0\n")}
	debOf := func(parts ...part) []byte { return ar(parts...) }
	bomb := compress(t, "gz", make([]byte, 128<<20))
	for name, b := range map[string][]byte{
		"climbs":             tarOf(t, entry{name: "../a", body: "x", mode: 0o644}),
		"climbs inside":      tarOf(t, entry{name: "a/../../b", body: "x", mode: 0o644}),
		"twice":              tarOf(t, reg, reg),
		"twice, spelt ./":    tarOf(t, reg, entry{name: "./a", body: "y", mode: 0o644}),
		"link to nothing":    tarOf(t, entry{name: "b", link: "a", kind: tar.TypeLink}),
		"link climbs":        tarOf(t, reg, entry{name: "b", link: "../a", kind: tar.TypeLink}),
		"unknown type":       tarOf(t, entry{name: "b", kind: 'Z'}),
		"cut":                good[:600],
		"data after end":     append(bytes.Clone(good), tarOf(t, entry{name: "b", body: "y", mode: 0o755})...),
		"not tar":            []byte(strings.Repeat("hello", 1000)),
		"gzip cut":           compress(t, "gz", good)[:40],
		"bomb":               bomb,
		"ar junk":            []byte("!<arch>\njunk"),
		"deb: no parts":      debOf(),
		"deb: version 3":     debOf(part{"debian-binary", []byte("3.0\n")}, part{"control.tar", c}, part{"data.tar", good}),
		"deb: no data":       debOf(bin, part{"control.tar", c}),
		"deb: order":         debOf(bin, part{"data.tar", good}, part{"control.tar", c}),
		"deb: extra part":    debOf(bin, part{"control.tar", c}, part{"data.tar", good}, part{"data.tar", good}),
		"deb: signature":     debOf(bin, part{"_gpgorigin", []byte("x")}, part{"control.tar", c}, part{"data.tar", good}),
		"deb: name lies":     debOf(bin, part{"control.tar", c}, part{"data.tar.xz", compress(t, "gz", good)}),
		"deb: no control":    debOf(bin, part{"control.tar", good}, part{"data.tar", good}),
		"deb: fake script":   debOf(bin, part{"control.tar", c}, part{"data.tar", tarOf(t, entry{name: "DEBIAN/postinst", body: "x", mode: 0o755})}),
		"deb: two stanzas":   debOf(bin, part{"control.tar", tarOf(t, entry{name: "control", body: control + "\n" + control, mode: 0o644})}, part{"data.tar", good}),
		"deb: size negative": []byte(strings.Replace(string(debOf(bin, part{"control.tar", c}, part{"data.tar", good})), "4         `", "-4        `", 1)),
	} {
		s, err := codesign.OpenSource(bytes.NewReader(b))
		if err == nil {
			_, err = codesign.Build(s, codesign.Options{})
		}
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type failing struct{ fstest.MapFS }

func (f failing) Open(name string) (fs.File, error) {
	if name == "secret" {
		return nil, fs.ErrPermission
	}
	return f.MapFS.Open(name)
}

func TestDirSource_unreadableIsAnError(t *testing.T) {
	m := fstest.MapFS{"secret": {Data: []byte("x"), Mode: 0o600}, "a": {Data: []byte("x"), Mode: 0o755}}
	if _, err := codesign.Build(codesign.DirSource(failing{m}), codesign.Options{}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("unreadable file: %v", err)
	}
}

// Real packages: every regular file that dpkg-deb unpacks, and every file of
// the control part, has the digest that we read from the stream.
func TestDebSource_dpkg(t *testing.T) {
	debs := realDebs(t)
	for _, path := range debs {
		t.Run(filepath.Base(path), func(t *testing.T) {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got := make(map[string][32]byte)
			links := make(map[string]string)
			d := codesign.DebSource(f)
			err = d.Walk(func(m codesign.Member, r io.Reader) error {
				switch {
				case m.Hard:
					got[m.Path] = got[m.Link]
				case m.Mode&fs.ModeSymlink != 0:
					links[m.Path] = m.Link
				case r != nil:
					h := sha256.New()
					if _, err := io.Copy(h, r); err != nil {
						return err
					}
					got[m.Path] = [32]byte(h.Sum(nil))
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for _, a := range [][]string{{"-x", path, dir}, {"-e", path, filepath.Join(dir, "DEBIAN")}} {
				if out, err := exec.Command("dpkg-deb", a...).CombinedOutput(); err != nil {
					t.Fatalf("dpkg-deb: %v: %s", err, out)
				}
			}
			files := compareTree(t, dir, got, links)
			t.Logf("%s %s: %d files and links agree", d.Control.Package, d.Control.Version, files)
		})
	}
}

func compareTree(t *testing.T, dir string, got map[string][32]byte, links map[string]string) int {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		n++
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if e.Type()&fs.ModeSymlink != 0 {
			if l, err := os.Readlink(p); err != nil || l != links[rel] {
				t.Errorf("%s -> %s (%v), read as %q", rel, l, err, links[rel])
			}
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if got[rel] != sha256.Sum256(b) {
			t.Errorf("%s: digest differs", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n != len(got)+len(links) {
		t.Errorf("dpkg-deb unpacks %d files and links, we read %d", n, len(got)+len(links))
	}
	return n
}

// realDebs downloads a few small packages with apt, or skips.
func realDebs(t *testing.T) []string {
	t.Helper()
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed; real packages are not tested", tool)
		}
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil { // apt downloads as another user
		t.Fatal(err)
	}
	c := exec.Command("apt-get", "-q", "download", "hello", "dash", "lua5.4", "nginx-common", "perl-base")
	c.Dir, c.WaitDelay = dir, time.Second
	if out, err := c.CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: apt-get download: %v: %.300s; real packages are not tested", err, out)
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) < 3 {
		t.Fatalf("%v %v", debs, err)
	}
	return debs
}

func FuzzOpenSource(f *testing.F) {
	data := tarOf(f, entry{name: "a.py", body: "x", mode: 0o644}, entry{name: "l", link: "a.py", kind: tar.TypeSymlink})
	f.Add(data)
	f.Add(deb(f, "", data))
	f.Add(deb(f, "gz", data))
	f.Add(compress(f, "xz", data))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := codesign.OpenSource(bytes.NewReader(b))
		if err == nil {
			_, err = codesign.Build(s, codesign.Options{AllFiles: true})
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Conflict) && !errors.Is(err, errs.Unsupported) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

// BenchmarkBuild and BenchmarkPlainSHA256 belong in one run: their ratio is
// what a catalogue costs over hashing.
func BenchmarkBuild(b *testing.B) {
	m := fstest.MapFS{}
	body := []byte(elf(2) + strings.Repeat("0123456789abcdef", 8<<10))
	for i := range 128 {
		c := bytes.Clone(body)
		c[len(c)-1] = byte(i)
		m[fmt.Sprintf("bin/%03d", i)] = &fstest.MapFile{Data: c, Mode: 0o755}
	}
	b.SetBytes(int64(128 * len(body)))
	for b.Loop() {
		if _, err := codesign.Build(codesign.DirSource(m), codesign.Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
