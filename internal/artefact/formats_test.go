package artefact_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/artefact"
	"ringwall/internal/codesign"
)

// members says of every member what it is: digest or link, mode, flags.
func members(t testing.TB, a *artefact.Artefact) map[string]string {
	t.Helper()
	got, err := walk(a)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func walk(a codesign.Source) (map[string]string, error) {
	got := make(map[string]string)
	digests := make(map[string]string)
	err := a.Walk(func(m codesign.Member, r io.Reader) error {
		name := codesign.Name{Path: m.Path, Origin: m.Origin}.Location()
		what := fmt.Sprintf("%04o", m.Mode.Perm())
		switch {
		case m.Hard:
			what += " " + digests[m.Link]
		case m.Mode&fs.ModeSymlink != 0:
			what = "-> " + m.Link
		case !m.Mode.IsRegular():
			what = m.Mode.Type().String()
		default:
			h := sha256.New()
			n, err := io.Copy(h, r)
			if err != nil {
				return err
			}
			if n != m.Size {
				return fmt.Errorf("%s: %d bytes, %d said", name, n, m.Size)
			}
			digests[m.Path] = hex.EncodeToString(h.Sum(nil))
			what += " " + digests[m.Path]
		}
		for _, f := range []struct {
			on   bool
			name string
		}{{m.Mode&fs.ModeSetuid != 0, " setuid"}, {m.Caps, " caps"}, {m.Install, " install"}, {m.Nested, " nested"}} {
			if f.on {
				what += f.name
			}
		}
		if _, twice := got[name]; twice {
			return errors.New(name + " twice")
		}
		got[name] = what
		return nil
	})
	return got, err
}

// run runs a tool, or skips.
func run(t testing.TB, dir string, argv ...string) {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Skipf("SKIPPED, NOT CHECKED: %s is not installed", argv[0])
	}
	c := exec.Command(argv[0], argv[1:]...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
}

// sampleTree makes a tree with one of everything.
func sampleTree(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	big := bytes.Repeat([]byte("0123456789abcdef"), 20_000)
	noise := make([]byte, 300_001)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		name string
		body []byte
		mode fs.FileMode
	}{
		{"usr/bin/script", []byte("#!/bin/sh\n"), 0o755},
		{"usr/bin/setuid", []byte("#!/bin/sh\nid\n"), 0o755 | fs.ModeSetuid},
		{"usr/bin/caps", []byte("#!/bin/sh\nping\n"), 0o755},
		{"usr/lib/big", big, 0o644},
		{"usr/lib/noise", noise, 0o640},
		{"usr/lib/both", append(bytes.Clone(noise[:140_000]), big...), 0o644},
		{"usr/lib/empty", nil, 0o644},
		{"usr/lib/zeros", make([]byte, 500_000), 0o644},
		{"usr/lib/ümläut €", []byte("words"), 0o600},
		{"usr/lib/a/b/c/d/e/f/g", []byte("deep"), 0o644},
	} {
		p := filepath.Join(dir, f.name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, f.body, 0o600), os.Chmod(p, f.mode)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("../lib/big", filepath.Join(dir, "usr/bin/link")), os.Mkdir(filepath.Join(dir, "many"), 0o755),
		os.Link(filepath.Join(dir, "usr/lib/noise"), filepath.Join(dir, "usr/lib/alias"))); err != nil {
		t.Fatal(err)
	}
	for i := range 700 { // more than one run of names, more than one block of inodes
		if err := os.WriteFile(filepath.Join(dir, "many", fmt.Sprintf("%s-%d", strings.Repeat("n", i%40), i)), fmt.Append(nil, i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if os.Getuid() == 0 {
		run(t, dir, "setcap", "cap_net_raw+ep", "usr/bin/caps")
	}
	return dir
}

// One tree, packed by other people's tools into everything: the same members.
func TestFormats_oneTree(t *testing.T) {
	dir := sampleTree(t)
	want := members(t, open(t, dir, artefact.Options{}))
	if os.Getuid() == 0 && !strings.Contains(want["usr/bin/caps"], "caps") {
		t.Errorf("capabilities of a directory's file: %s", want["usr/bin/caps"])
	}
	if !strings.Contains(want["usr/bin/setuid"], "setuid") || want["usr/bin/link"] != "-> ../lib/big" || len(want) != 712 {
		t.Fatalf("%d members, %s", len(want), want["usr/bin/setuid"])
	}
	out := t.TempDir()
	noCaps := map[string]string{}
	for n, w := range want {
		noCaps[n] = strings.TrimSuffix(w, " caps")
	}
	for _, c := range []struct {
		name   string
		format artefact.Format
		make   string // in the tree; OUT is the file
		want   map[string]string
	}{
		{"tar", artefact.FormatTar, "tar --xattrs --xattrs-include=security.* -cf OUT .", want},
		{"tar.gz", artefact.FormatTar, "tar -czf OUT .", noCaps},
		{"tar.xz", artefact.FormatTar, "tar -cJf OUT .", noCaps},
		{"tar.zst", artefact.FormatTar, "tar --zstd -cf OUT .", noCaps},
		{"tar.bz2", artefact.FormatTar, "tar -cjf OUT .", noCaps},
		{"tar-v7", artefact.FormatTar, "tar --format=ustar -cf OUT .", noCaps},
		{"sq.gzip", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -comp gzip", want},
		{"sq.xz", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -comp xz -b 256K", want},
		{"sq.zstd", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -comp zstd -b 4096", want},
		{"sq.lz4", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -comp lz4 -b 1M", want},
		{"sq.lzma", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -comp lzma", want},
		{"sq.plain", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -noI -noD -noF -noX -always-use-fragments", want},
		{"sq.nofrag", artefact.FormatSquashfs, "mksquashfs . OUT -quiet -no-progress -no-fragments -no-sparse", want},
		{"erofs", artefact.FormatErofs, "mkfs.erofs --quiet OUT .", want},
		{"erofs.lz4", artefact.FormatErofs, "mkfs.erofs --quiet -zlz4hc OUT .", want},
		{"erofs.frag", artefact.FormatErofs, "mkfs.erofs --quiet -zlz4 -Eztailpacking,legacy-compress OUT .", want},
		{"a.zip", artefact.FormatZip, "zip -qry OUT .", noCaps},
		{"stored.zip", artefact.FormatZip, "zip -qry0 OUT .", noCaps},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(out, c.name)
			run(t, dir, "sh", "-c", strings.ReplaceAll(c.make, "OUT", file)+" >/dev/null")
			a := open(t, file, artefact.Options{})
			if a.Format != c.format {
				t.Errorf("taken for %s", a.Format)
			}
			if d := cmp.Diff(c.want, members(t, a)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestInitramfs_segments(t *testing.T) {
	dir := sampleTree(t)
	early := filepath.Join(t.TempDir(), "early")
	if err := errors.Join(os.MkdirAll(filepath.Join(early, "kernel/x86/microcode"), 0o755), os.WriteFile(filepath.Join(early, "kernel/x86/microcode/AuthenticAMD.bin"), []byte("microcode"), 0o644)); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"kernel/x86/microcode/AuthenticAMD.bin": "0644 " + sum("microcode")}
	for n, w := range members(t, open(t, dir, artefact.Options{})) {
		want[n] = strings.TrimSuffix(w, " caps")
	}
	out := t.TempDir()
	cpio := "find . | cpio --quiet -o -H newc"
	for name, how := range map[string]string{
		"plain": "cat", "gz": "gzip -9", "xz": "xz --check=crc32", "zst": "zstd -q", "lz4": "lz4 -l -c", "lz4 frame": "lz4 -c", "lzma": "lzma", "bz2": "bzip2",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(out, name)
			run(t, early, "sh", "-c", cpio+" > '"+file+"'")
			run(t, dir, "sh", "-c", cpio+" | "+how+" >> '"+file+"'")
			a := open(t, file, artefact.Options{})
			if a.Format != artefact.FormatInitramfs {
				t.Errorf("taken for %s", a.Format)
			}
			if d := cmp.Diff(want, members(t, a)); d != "" {
				t.Error(d)
			}
		})
	}
	// Compressed segments that others follow, with and without zeros between.
	for _, how := range []string{"gzip", "xz --check=crc32", "zstd -q"} {
		file := filepath.Join(out, "many")
		run(t, dir, "sh", "-c", "("+cpio+" | "+how+"; printf '\\0\\0\\0') > "+file)
		run(t, early, "sh", "-c", "("+cpio+" | "+how+") >> "+file)
		run(t, early, "sh", "-c", "head -c $((4 - $(stat -c %s "+file+") % 4)) /dev/zero >> "+file)
		if d := cmp.Diff(want, members(t, open(t, file, artefact.Options{}))); d != "" {
			t.Errorf("%s: %s", how, d)
		}
	}
}

func sum(s string) string {
	d := sha256.Sum256([]byte(s))
	return hex.EncodeToString(d[:])
}
