package codesign_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"testing"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

const packages = `Package: a
Version: 1:2.0-1
Architecture: amd64
Description: short
 long
 .
 more
Filename: pool/main/a/a_2.0-1_amd64.deb
Size: 5
SHA256: 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824

Package: b
Version: 1
Architecture: all
Filename: pool/main/b/b_1_all.deb
Size: 0
SHA256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
`

func TestParsePackages(t *testing.T) {
	var got []codesign.Package
	add := func(p codesign.Package) error { got = append(got, p); return nil }
	if err := codesign.ParsePackages(strings.NewReader(packages), add); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Version != "1:2.0-1" || got[0].Filename != "pool/main/a/a_2.0-1_amd64.deb" || got[1].Architecture != "all" {
		t.Errorf("%+v", got)
	}
	if err := codesign.VerifyDeb(strings.NewReader("hello"), got[0]); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"hellO", "hell", "hello!", ""} {
		if err := codesign.VerifyDeb(strings.NewReader(bad), got[0]); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for name, edit := range map[string][2]string{
		"no version":    {"Version: 1\n", ""},
		"field twice":   {"Package: b\n", "Package: b\nPackage: c\n"},
		"no colon":      {"Package: b\n", "Package b\n"},
		"bad size":      {"Size: 5", "Size: -5"},
		"bad digest":    {"2cf24d", "2cf24"},
		"continuation":  {"Package: a", " x\nPackage: a"},
		"line too long": {"short", strings.Repeat("x", 2<<20)},
	} {
		text := strings.Replace(packages, edit[0], edit[1], 1)
		if err := codesign.ParsePackages(strings.NewReader(text), add); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	stop := errors.New("stop")
	if err := codesign.ParsePackages(strings.NewReader(packages), func(codesign.Package) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("visit's error: %v", err)
	}
}

func TestVerifyIndex(t *testing.T) {
	want := codesign.IndexFile{Size: int64(len(packages)), Digest: sha256.Sum256([]byte(packages))}
	n := 0
	parse := func(r io.Reader) error {
		return codesign.ParsePackages(r, func(codesign.Package) error { n++; return nil })
	}
	if err := codesign.VerifyIndex(strings.NewReader(packages), want, parse); err != nil || n != 2 {
		t.Errorf("%d %v", n, err)
	}
	for name, text := range map[string]string{"longer": packages + "\n", "cut": packages[:len(packages)-1], "changed": strings.ToLower(packages)} {
		err := codesign.VerifyIndex(strings.NewReader(text), want, func(io.Reader) error { return nil })
		if !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParsePackages(f *testing.F) {
	f.Add([]byte(packages))
	f.Fuzz(func(t *testing.T, b []byte) {
		err := codesign.ParsePackages(bytes.NewReader(b), func(p codesign.Package) error {
			if p.Package == "" || p.Size < 0 {
				t.Errorf("%+v", p)
			}
			return nil
		})
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func FuzzParseSuite(f *testing.F) {
	f.Add([]byte("Suite: x\nDate: Sat, 10 May 2031 09:00:00 UTC\nSHA256:\n " + strings.Repeat("0", 64) + " 0 a/b\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := codesign.ParseSuite(b)
		if err == nil && len(s.Files) == 0 {
			t.Error("no files")
		}
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
