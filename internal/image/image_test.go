package image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/image"
)

func tool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no %s here", name)
	}
}

func run(t testing.TB, name string, arg ...string) string {
	t.Helper()
	tool(t, name)
	out, err := exec.Command(name, arg...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(arg, " "), err, out)
	}
	return string(out)
}

func write(t testing.TB, path string, b []byte, mode fs.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// The tree against veritysetup's, at the edges of blocks and levels.
func TestHashTree_veritysetup(t *testing.T) {
	dir := t.TempDir()
	for _, blocks := range []int{1, 2, 3, 127, 128, 129, 255, 256, 257, 128 * 128, 128*128 + 1} {
		for _, salt := range [][]byte{nil, random(32), random(256)} {
			data := random(blocks * image.BlockSize)
			file, hashes := write(t, filepath.Join(dir, "data"), data, 0o600), filepath.Join(dir, "hashes")
			_ = os.Remove(hashes)
			arg := "-"
			if len(salt) > 0 {
				arg = hex.EncodeToString(salt)
			}
			out := run(t, "veritysetup", "format", "--salt="+arg, file, hashes)
			m := regexp.MustCompile(`Root hash:\s*([0-9a-f]{64})`).FindStringSubmatch(out)
			if m == nil {
				t.Fatal(out)
			}
			tree, root, err := image.HashTree(bytes.NewReader(data), uint64(blocks), salt)
			if err != nil || hex.EncodeToString(root[:]) != m[1] {
				t.Fatalf("%d blocks, salt of %d: root %x, veritysetup's %s (%v)", blocks, len(salt), root, m[1], err)
			}
			theirs, err := os.ReadFile(hashes)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(theirs[image.BlockSize:], tree) {
				t.Errorf("%d blocks, salt of %d: the tree is not veritysetup's", blocks, len(salt))
			}
		}
	}
}

func TestHashTree_refuses(t *testing.T) {
	for name, f := range map[string]func() error{
		"no blocks": func() error { _, _, err := image.HashTree(bytes.NewReader(nil), 0, nil); return err },
		"short":     func() error { _, _, err := image.HashTree(bytes.NewReader(make([]byte, 4097)), 2, nil); return err },
		"many":      func() error { _, _, err := image.HashTree(bytes.NewReader(nil), 1<<40, nil); return err },
		"salt":      func() error { _, _, err := image.HashTree(bytes.NewReader(nil), 1, make([]byte, 257)); return err },
	} {
		if err := f(); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// source is a tree with all that an image holds.
func source(t testing.TB, dir string, reverse bool) string {
	t.Helper()
	files := []string{"bin/run", "bin/sub", "lib/data", "lib/empty", "etc/secret"}
	if reverse {
		slices.Reverse(files)
	}
	for _, f := range files {
		b, mode := []byte("#!/bin/sh\necho "+f+"\n"), fs.FileMode(0o755)
		switch f {
		case "lib/data":
			b, mode = bytes.Repeat([]byte("data "), 100000), 0o644
		case "lib/empty":
			b, mode = nil, 0o644
		case "etc/secret":
			mode = 0o600
		case "bin/sub":
			mode = 0o755 | fs.ModeSetuid
		}
		write(t, filepath.Join(dir, f), b, mode)
	}
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "proc"), 0o755), os.MkdirAll(filepath.Join(dir, "sealed"), 0o755),
		os.Symlink("run", filepath.Join(dir, "bin/alias")), os.Symlink("../../../etc/passwd", filepath.Join(dir, "lib/away")),
		os.Link(filepath.Join(dir, "bin/run"), filepath.Join(dir, "bin/same")), os.Chmod(filepath.Join(dir, "sealed"), 0o555),
		os.Chmod(dir, 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func formats() map[string]image.Options {
	return map[string]image.Options{
		"erofs": {}, "erofs lz4": {Compress: true}, "squashfs": {Format: image.Squashfs}, "squashfs zstd": {Format: image.Squashfs, Compress: true},
		"salted": {Salt: []byte("0123456789abcdef"), Time: 1700000000},
	}
}

func build(t testing.TB, from, to string, o image.Options) *image.Checked {
	t.Helper()
	if o.Format == image.Squashfs {
		tool(t, "mksquashfs")
	} else {
		tool(t, "mkfs.erofs")
	}
	b, err := image.Build(t.Context(), from, to, o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The same content is the same image, from wherever it came.
func TestBuild_reproducible(t *testing.T) {
	for name, o := range formats() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			one, two := source(t, filepath.Join(dir, "one"), false), source(t, filepath.Join(dir, "two"), true)
			run(t, "tar", "-C", one, "-cf", filepath.Join(dir, "a.tar"), ".")
			run(t, "tar", "-C", two, "--sort=name", "-czf", filepath.Join(dir, "b.tar.gz"), "sealed", "proc", "lib", "etc", "bin")
			want := build(t, one, filepath.Join(dir, "want.img"), o)
			for i, from := range []string{one, two, filepath.Join(dir, "a.tar"), filepath.Join(dir, "b.tar.gz")} {
				got := build(t, from, filepath.Join(dir, fmt.Sprint(i, ".img")), o)
				if got.SHA256 != want.SHA256 || got.Root != want.Root {
					t.Errorf("%s: another image", from)
				}
			}
			if err := os.WriteFile(filepath.Join(two, "bin/run"), []byte("#!/bin/sh\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			if got := build(t, two, filepath.Join(dir, "other.img"), o); got.Root == want.Root {
				t.Error("other content, same root")
			}
			left, err := filepath.Glob(filepath.Join(dir, ".ringwall*"))
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// listing is what a tree holds, without owners and times.
func listing(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			fmt.Fprintf(&b, "%s -> %s\n", name, target)
		case d.IsDir():
			fmt.Fprintf(&b, "%s %v\n", name, info.Mode())
		default:
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "%s %v %x\n", name, info.Mode(), sha256.Sum256(content))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Other people's tools find in it what went in.
func TestBuild_tools(t *testing.T) {
	for name, o := range formats() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			from := source(t, filepath.Join(dir, "from"), false)
			path := filepath.Join(dir, "img")
			b := build(t, from, path, o)
			root := hex.EncodeToString(b.Root[:])
			offset := fmt.Sprint("--hash-offset=", b.HashOffset())
			run(t, "veritysetup", "verify", offset, path, path, root)
			if out := run(t, "veritysetup", "dump", offset, path); !strings.Contains(out, fmt.Sprint("Data blocks:     \t", b.DataBlocks)) {
				t.Errorf("veritysetup dump:\n%s", out)
			}
			to := filepath.Join(dir, "to")
			if b.Format == image.Squashfs {
				run(t, "unsquashfs", "-q", "-n", "-d", to, path)
			} else {
				run(t, "fsck.erofs", "--extract="+to, path)
			}
			got, want := listing(t, to), listing(t, from)
			if b.Format == image.EROFS { // fsck.erofs drops the bit
				want = strings.ReplaceAll(want, "sub u", "sub -")
			}
			if got != want {
				t.Errorf("holds\n%s\nwant\n%s", got, want)
			}
			// a flipped bit anywhere in data and tree
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, at := range []int64{0, 1100, b.HashOffset() / 2, b.HashOffset() - 1, b.HashOffset() + image.BlockSize, b.Size - 1} {
				bad := bytes.Clone(whole)
				bad[at] ^= 0x10
				f := write(t, filepath.Join(dir, "bad"), bad, 0o600)
				if _, err := image.Check(t.Context(), f); !errors.Is(err, errs.Untrusted) {
					t.Errorf("flipped at %d: %v", at, err)
				}
				if err := exec.Command("veritysetup", "verify", offset, f, f, root).Run(); err == nil && at < b.HashOffset() {
					t.Errorf("flipped at %d: veritysetup took it", at)
				}
			}
			for _, at := range []int64{0, 9, 33, 65, 73, 81, 4000} { // the superblock
				bad := bytes.Clone(whole)
				bad[b.HashOffset()+at] ^= 1
				if c, err := image.Check(t.Context(), write(t, filepath.Join(dir, "bad"), bad, 0o600)); err == nil && c.Root == b.Root {
					t.Errorf("superblock flipped at %d: taken", at)
				}
			}
			for _, bad := range [][]byte{nil, whole[:len(whole)-1], whole[:len(whole)-image.BlockSize], append(bytes.Clone(whole), make([]byte, image.BlockSize)...)} {
				if _, err := image.Open(write(t, filepath.Join(dir, "bad"), bad, 0o600)); !errors.Is(err, errs.Invalid) {
					t.Errorf("%d bytes: %v", len(bad), err)
				}
			}
			if v, err := image.Open(path); err != nil || v.Root != b.Root {
				t.Errorf("%+v %v", v, err)
			}
			c, err := image.Check(t.Context(), path)
			if err != nil || c.Root != b.Root || c.SHA256 != sha256.Sum256(whole) || c.Format != b.Format {
				t.Errorf("%+v %v", c, err)
			}
		})
	}
}

// archive is a tar of one member after another.
func archive(t testing.TB, members ...*tar.Header) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range members {
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return write(t, filepath.Join(t.TempDir(), "in.tar"), b.Bytes(), 0o600)
}

func TestBuild_refuses(t *testing.T) {
	tool(t, "mkfs.erofs")
	outside := t.TempDir()
	fifo := t.TempDir()
	run(t, "mkfifo", filepath.Join(fifo, "pipe"))
	there := write(t, filepath.Join(t.TempDir(), "there"), nil, 0o600)
	full, err := os.ReadFile(archive(t, &tar.Header{Name: "a", Size: 100000}))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		from, to string
		o        image.Options
		kind     error
	}{
		"overwriting":       {from: outside, to: there, kind: errs.Conflict},
		"a FIFO":            {from: fifo, kind: errs.Unsupported},
		"no source":         {from: "/does/not/exist", kind: fs.ErrNotExist},
		"unknown format":    {from: outside, o: image.Options{Format: "ext4"}, kind: errs.Invalid},
		"long salt":         {from: outside, o: image.Options{Salt: make([]byte, 257)}, kind: errs.Invalid},
		"no archive":        {from: there, kind: errs.Invalid},
		"a cut archive":     {from: write(t, filepath.Join(t.TempDir(), "cut"), full[:50000], 0o600), kind: errs.Invalid},
		"a way out":         {from: archive(t, &tar.Header{Name: "../x", Size: 1}), kind: errs.Invalid},
		"a link's way out":  {from: archive(t, &tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: outside}, &tar.Header{Name: "a/x", Size: 1})},
		"a name twice":      {from: archive(t, &tar.Header{Name: "a", Size: 1}, &tar.Header{Name: "a", Size: 1}), kind: errs.Invalid},
		"a device":          {from: archive(t, &tar.Header{Name: "a", Typeflag: tar.TypeChar}), kind: errs.Unsupported},
		"a file's children": {from: archive(t, &tar.Header{Name: "a", Size: 1}, &tar.Header{Name: "a/b", Size: 1})},
		"a bad hard link":   {from: archive(t, &tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}), kind: errs.Invalid},
	} {
		to := c.to
		dir := t.TempDir()
		if to == "" {
			to = filepath.Join(dir, "img")
		}
		_, err := image.Build(t.Context(), c.from, to, c.o)
		if err == nil || c.kind != nil && !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("written outside: %v", left)
	}
}

func TestBuild_stops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	from := source(t, filepath.Join(dir, "from"), false)
	if _, err := image.Build(ctx, from, filepath.Join(dir, "img"), image.Options{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func FuzzOpen(f *testing.F) {
	for _, salt := range [][]byte{nil, []byte("salt")} {
		path := write(f, filepath.Join(f.TempDir(), "fs"), []byte("hsqs"), 0o600)
		if err := image.AppendTree(f.Context(), path, salt); err != nil {
			f.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if v, err := image.Describe(bytes.NewReader(b), int64(len(b))); err != nil || v.Format != image.Squashfs {
			f.Fatal(v, err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := image.Describe(bytes.NewReader(b), int64(len(b)))
		if err == nil && (v.HashOffset() <= 0 || v.HashOffset() >= v.Size || len(v.Salt) > 256) {
			t.Errorf("%+v", v)
		}
	})
}
