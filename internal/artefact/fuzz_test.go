package artefact_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/artefact"
	"ringwall/internal/errs"
)

// seeds are small artefacts of every format, as far as their tools are here.
func seeds(f *testing.F) {
	f.Helper()
	dir := filepath.Join(f.TempDir(), "tree")
	for name, body := range map[string]string{"a.sh": sh, "d/b": strings.Repeat("words ", 3000), "d/c.py": "import os\n", "d/empty": ""} {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(body), 0o755)); err != nil {
			f.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("d/b", filepath.Join(dir, "link")), os.Link(filepath.Join(dir, "a.sh"), filepath.Join(dir, "hard"))); err != nil {
		f.Fatal(err)
	}
	for _, how := range []string{
		"tar -cf OUT .", "tar -czf OUT .", "zip -qry OUT .", "mksquashfs . OUT -quiet -no-progress -comp gzip", "mksquashfs . OUT -quiet -no-progress -comp zstd",
		"mksquashfs . OUT -quiet -no-progress -noI -noD -noF -noX", "mkfs.erofs --quiet OUT .", "find . | cpio --quiet -o -H newc > OUT",
		"find . | cpio --quiet -o -H newc | gzip > OUT",
	} {
		file := filepath.Join(f.TempDir(), "x.zip")
		c := exec.Command("sh", "-c", strings.ReplaceAll(how, "OUT", file))
		c.Dir = dir
		if c.Run() != nil {
			continue // the tool is not here
		}
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		if !strings.Contains(how, "mkfs.erofs") {
			f.Add(b)
			continue
		}
		f.Add(b[:min(len(b), 64<<10)])
	}
	f.Add(tarOf(f, file{"in.jar", string(zipOf(f, file{"a.sh", sh, 0o755})), 0o644}))
	f.Add(rpmOf(nil))
	f.Add(uki(map[string]string{".linux": "MZ kernel", ".cmdline": "quiet"}))
}

// FuzzOpen is every parser at once, as who signs a build calls them: whatever
// comes in, the answer is members or an error of a kind.
func FuzzOpen(f *testing.F) {
	seeds(f)
	dir := f.TempDir()
	f.Setenv("PATH", "") // no fsck.erofs: it is not what is tested
	f.Fuzz(func(t *testing.T, b []byte) {
		p := filepath.Join(dir, "x")
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := artefact.Open(p, artefact.Options{Depth: 3})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) && !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.NotFound) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

// The formats that a fuzzer does not find by itself, each behind its magic.
func fuzzFormat(f *testing.F, magic string, at int, seed []byte) {
	f.Helper()
	f.Add(seed)
	dir := f.TempDir()
	f.Setenv("PATH", "")
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < at+len(magic) {
			return
		}
		b = bytes.Clone(b)
		copy(b[at:], magic)
		p := filepath.Join(dir, "x")
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := artefact.Open(p, artefact.Options{Depth: -1})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func FuzzSquashfs(f *testing.F) {
	fuzzFormat(f, "hsqs", 0, packed(f, "mksquashfs . OUT -quiet -no-progress -noI -noD -noF -noX"))
}

func FuzzErofs(f *testing.F) {
	fuzzFormat(f, "\xe2\xe1\xf5\xe0", 1024, packed(f, "mkfs.erofs --quiet OUT ."))
}

func FuzzInitramfs(f *testing.F) {
	fuzzFormat(f, "070701", 0, packed(f, "find . | cpio --quiet -o -H newc > OUT"))
}

func FuzzZip(f *testing.F) { fuzzFormat(f, "PK\x03\x04", 0, zipOf(f, file{"a.sh", sh, 0o755})) }

func FuzzRPM(f *testing.F) { fuzzFormat(f, "\xed\xab\xee\xdb", 0, rpmOf(nil)) }

func FuzzUKI(f *testing.F) { fuzzFormat(f, "MZ", 0, uki(map[string]string{".linux": "MZ kernel"})) }

// FuzzOCI feeds an index and a layer.
func FuzzOCI(f *testing.F) {
	f.Add([]byte(`{"manifests":[]}`), layerOf(f, item{name: "a/.wh..wh..opq"}, item{name: "l", link: "/a", kind: '2'}, item{name: "l/x", body: "x"}))
	f.Fuzz(func(t *testing.T, index, layer []byte) {
		m := newImage(t)
		m.image("amd64", "", sampleLayers(t)[0], layer)
		dir := m.done()
		if len(index)%2 == 1 {
			if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		a, err := artefact.Open(dir, artefact.Options{Depth: -1})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) && !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.NotFound) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

// packed is a small tree in a tool's format, or nothing where there is no tool.
func packed(f *testing.F, how string) []byte {
	f.Helper()
	dir := f.TempDir()
	file := filepath.Join(f.TempDir(), "out")
	for name, body := range map[string]string{"a.sh": sh, "b": strings.Repeat("words ", 900)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o755); err != nil {
			f.Fatal(err)
		}
	}
	c := exec.Command("sh", "-c", strings.ReplaceAll(how, "OUT", file))
	c.Dir = dir
	if err := c.Run(); err != nil {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	return b
}
