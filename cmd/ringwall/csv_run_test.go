package main

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestCommandWords(t *testing.T) {
	for in, want := range map[string][]string{
		"edged --version":            {"edged", "--version"},
		`  sh -c 'a "b" | c'  `:      {"sh", "-c", `a "b" | c`},
		`x "" y$(z)*`:                {"x", "", "y$(z)*"},
		`curl -H"Accept: text" "a"b`: {"curl", "-HAccept: text", "ab"},
	} {
		if got, err := commandWords(in); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "  ", `''`, `a 'b`} {
		if got, err := commandWords(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	names := []string{"vmlinuz-6.12.9-amd64", "vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-10-amd64", "vmlinuz-7.3.4+deb13-amd64", "vmlinuz-6.1.0-10-amd64.old"}
	slices.SortFunc(names, compareVersions)
	want := []string{"vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-10-amd64", "vmlinuz-6.1.0-10-amd64.old", "vmlinuz-6.12.9-amd64", "vmlinuz-7.3.4+deb13-amd64"}
	if !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
}

// What goes into the guest comes out of it, and no name leads elsewhere.
func TestUnpackTar(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: gives files to root")
	}
	dir, out := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{"usr/bin/a": 0o755, "usr/b": 0o640} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("bin/a", filepath.Join(dir, "usr/link")); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := addTree(w, dir, "opt"); err != nil {
		t.Fatal(err)
	}
	if err := addBytes(w, []byte("kept inside"), "../../escape"); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "opt/usr/b"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unpackTar(&b, filepath.Join(out, "root")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"opt/usr/bin/a": "usr/bin/a", "opt/usr/link": "usr/bin/a", "hard": "usr/b", "escape": "kept inside"} {
		got, err := os.ReadFile(filepath.Join(out, "root", name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if st, err := os.Stat(filepath.Join(out, "root/opt/usr/bin/a")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode: %v, %v", st, err)
	}
	if es, err := os.ReadDir(out); err != nil || len(es) != 1 {
		t.Errorf("outside: %v, %v", es, err)
	}
}
