package artefact_test

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func zipOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, f := range files {
		h := &zip.FileHeader{Name: f.name, Method: zip.Deflate}
		h.SetMode(os.FileMode(f.mode))
		to, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := to.Write([]byte(f.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

const sh = "#!/bin/sh\n"

func TestWalk_nested(t *testing.T) {
	jar := zipOf(t, file{"META-INF/MANIFEST.MF", "Manifest", 0o644}, file{"run.sh", sh, 0o755})
	inner := gz(t, tarOf(t, file{"lib/x.jar", string(jar), 0o644}, file{"doc", "words", 0o644}))
	app := "#!/usr/bin/python3\n" + string(zipOf(t, file{"__main__.py", "print()", 0o644}))
	outer := tarOf(t, file{"usr/share/inner.tgz", string(inner), 0o644}, file{"usr/bin/app", app, 0o755},
		file{"doc.gz", string(gz(t, []byte("no archive"))), 0o644})
	want := map[string]string{
		"usr/share/inner.tgz": "0644 " + sum(string(inner)), "usr/bin/app": "0755 " + sum(app), "doc.gz": "0644 " + sum(string(gz(t, []byte("no archive")))),
		"usr/bin/app!/__main__.py":                             "0644 " + sum("print()") + " nested",
		"usr/share/inner.tgz!/lib/x.jar":                       "0644 " + sum(string(jar)) + " nested",
		"usr/share/inner.tgz!/doc":                             "0644 " + sum("words") + " nested",
		"usr/share/inner.tgz!/lib/x.jar!/META-INF/MANIFEST.MF": "0644 " + sum("Manifest") + " nested",
		"usr/share/inner.tgz!/lib/x.jar!/run.sh":               "0755 " + sum(sh) + " nested",
	}
	p := save(t, "outer.tar", outer)
	if d := cmp.Diff(want, members(t, open(t, p, artefact.Options{}))); d != "" {
		t.Error(d)
	}
	if got := members(t, open(t, p, artefact.Options{Depth: -1})); len(got) != 3 {
		t.Errorf("not to look in: %v", got)
	}
	// The same in a directory, where files are read in place.
	dir := t.TempDir()
	run(t, dir, "tar", "-xf", p)
	if d := cmp.Diff(want, members(t, open(t, dir, artefact.Options{}))); d != "" {
		t.Errorf("directory: %s", d)
	}
	b, err := codesign.Build(open(t, p, artefact.Options{}), codesign.Options{})
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
	found := 0
	for i, r := range c.All() {
		if n.Names[i][0].Location() == "usr/share/inner.tgz!/lib/x.jar!/run.sh" {
			found++
			if r.Flags != codesign.FlagNested || r.Kinds != integrity.SetOf(integrity.KindScript) || n.Names[i][0].Path != "run.sh" {
				t.Errorf("%+v %+v", r, n.Names[i])
			}
		}
	}
	if found != 1 {
		t.Error("no record of what is nested")
	}
}

// A name for the kernel's eyes hides nothing.
func TestWalk_nestedKernelNames(t *testing.T) {
	inner := string(gz(t, tarOf(t, file{"run.sh", sh, 0o755})))
	got := members(t, open(t, save(t, "x.tar", tarOf(t, file{"lib/modules/6.1/a.ko.gz", inner, 0o644}, file{"lib/firmware/b.gz", inner, 0o644})), artefact.Options{}))
	if len(got) != 4 || got["lib/modules/6.1/a.ko.gz!/run.sh"] == "" || got["lib/firmware/b.gz!/run.sh"] == "" {
		t.Errorf("%v", got)
	}
}

func TestWalk_nestedDepth(t *testing.T) {
	b := []byte(sh)
	name := "run.sh"
	for i := range 10 {
		b = tarOf(t, file{name, string(b), 0o755})
		name = fmt.Sprintf("%d.tar", i)
	}
	p := save(t, "x.tar", b)
	_, err := walk(open(t, p, artefact.Options{}))
	if !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "more than 8 archives") {
		t.Errorf("ten archives within each other: %v", err)
	}
	if got := members(t, open(t, p, artefact.Options{Depth: 9})); len(got) != 10 {
		t.Errorf("%v", got)
	}
	// Who wants to go on is told what was not read.
	var told []string
	a := open(t, p, artefact.Options{Depth: 2, Unread: func(place string, err error) error {
		told = append(told, place)
		return nil
	}})
	if got := members(t, a); len(got) != 3 || len(told) != 1 || told[0] != "8.tar!/7.tar!/6.tar" {
		t.Errorf("%v, told %v", got, told)
	}
}

func TestWalk_unread(t *testing.T) {
	broken := string(zipOf(t, file{"a.sh", sh, 0o755})[:60])
	p := save(t, "x.tar", tarOf(t, file{"broken.jar", broken, 0o644}, file{"z.7z", "7z\xbc\xaf\x27\x1c rest", 0o644}, file{"run.sh", sh, 0o755}))
	if _, err := walk(open(t, p, artefact.Options{})); !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "broken.jar") {
		t.Errorf("a broken archive: %v", err)
	}
	told := map[string]error{}
	a := open(t, p, artefact.Options{Unread: func(place string, err error) error { told[place] = err; return nil }})
	got := members(t, a)
	if len(got) != 3 || !errors.Is(told["broken.jar"], errs.Invalid) || !errors.Is(told["z.7z"], errs.Unsupported) {
		t.Errorf("%v, told %v", got, told)
	}
	stop := errors.New("stop")
	a = open(t, p, artefact.Options{Unread: func(string, error) error { return stop }})
	if _, err := walk(a); !errors.Is(err, stop) {
		t.Errorf("Unread's own error: %v", err)
	}
	// The visitor's error is the walk's, at any depth, and is not asked about.
	deep := save(t, "y.tar", tarOf(t, file{"in.tar", string(tarOf(t, file{"run.sh", sh, 0o755})), 0o644}))
	a = open(t, deep, artefact.Options{Unread: func(string, error) error { return nil }})
	visited := 0
	if err := a.Walk(func(m codesign.Member, _ io.Reader) error {
		if visited++; m.Nested {
			return fmt.Errorf("visitor: %w", errs.Invalid)
		}
		return nil
	}); err == nil || visited != 2 {
		t.Errorf("%v after %d", err, visited)
	}
}

// Small on disk, endless when unpacked.
func TestWalk_bombs(t *testing.T) {
	zeros := string(make([]byte, 100<<20))
	layer := file{"0.zip", string(zipOf(t, file{"zeros", zeros, 0o644})), 0o644}
	for i := range 4 { // 16^4 times 100 MiB
		var fs []file
		for j := range 16 {
			fs = append(fs, file{fmt.Sprintf("%d-%d.zip", i, j), layer.body, 0o644})
		}
		layer = file{"x.zip", string(zipOf(t, fs...)), 0o644}
	}
	for name, b := range map[string][]byte{
		"zip of zips": []byte(layer.body), "zip": zipOf(t, file{"zeros", zeros, 0o644}),
		"tar.gz": gz(t, tarOf(t, file{"zeros", zeros, 0o644})), "gzip twice": gz(t, gz(t, tarOf(t, file{"zeros", zeros, 0o644}))),
	} {
		a, err := artefact.Open(save(t, "bomb", b), artefact.Options{Unread: func(string, error) error { return nil }})
		if err == nil {
			_, err = walk(a)
			_ = a.Close()
		}
		if !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) {
			t.Errorf("%s (%d bytes): %v", name, len(b), err)
		}
	}
}

// A single program is an artefact, and so is a script; what is not read says
// how to go on.
func TestOpen_files(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, self, artefact.Options{})
	if got := members(t, a); a.Format != artefact.FormatFile || len(got) != 1 {
		t.Errorf("%s %v", a.Format, got)
	}
	if a := open(t, save(t, "run.sh", []byte(sh)), artefact.Options{}); a.Format != artefact.FormatFile {
		t.Errorf("script: %s", a.Format)
	}
	if a := open(t, save(t, "app", append([]byte(sh), zipOf(t, file{"__main__.py", "", 0o644})...)), artefact.Options{}); a.Format != artefact.FormatZip {
		t.Errorf("zipapp: %s", a.Format)
	}
	ext4 := make([]byte, 64<<10)
	copy(ext4[1024+56:], "\x53\xef")
	iso := make([]byte, 64<<10)
	copy(iso[0x8001:], "CD001")
	for name, c := range map[string]struct {
		b    []byte
		want error
		text string
	}{
		"ext4": {ext4, errs.Unsupported, "mount -o ro,loop"}, "iso": {iso, errs.Unsupported, "ISO 9660"},
		"7z": {[]byte("7z\xbc\xaf\x27\x1c"), errs.Unsupported, "7-Zip"}, "qcow2": {[]byte("QFI\xfb\x00\x00\x00\x03"), errs.Unsupported, "qemu-nbd"},
		"text": {[]byte("words"), errs.Invalid, "neither"}, "empty": {nil, errs.Invalid, "empty"},
		"text.gz": {gz(t, []byte("words")), errs.Invalid, "neither"}, "zip.gz": {gz(t, zipOf(t, file{"a", "b", 0o644})), errs.Unsupported, "decompress it"},
	} {
		_, err := artefact.Open(save(t, "x."+name, c.b), artefact.Options{})
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := artefact.Open(filepath.Join(t.TempDir(), "nothing"), artefact.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}
