package artefact_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

type file struct {
	name, body string
	mode       int64
}

func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.body)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func save(t testing.TB, name string, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func open(t testing.TB, path string, o artefact.Options) *artefact.Artefact {
	t.Helper()
	a, err := artefact.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return a
}

func TestOpen_walksAgain(t *testing.T) {
	b := tarOf(t, file{"a.py", "import os\n", 0o644}, file{"b", "words", 0o644})
	a := open(t, save(t, "x.tar", b), artefact.Options{})
	if a.Format != artefact.FormatTar || a.Name != "x.tar" || a.Digest != sha256.Sum256(b) {
		t.Errorf("%+v", a)
	}
	var first []byte
	for range 2 {
		built, err := codesign.Build(a, codesign.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && !bytes.Equal(first, built.Catalogue) {
			t.Error("the second walk gives another catalogue")
		}
		first = built.Catalogue
	}
}

func TestWalk_ends(t *testing.T) {
	b := tarOf(t, file{"a", "x", 0o644}, file{"b", "x", 0o644})
	ctx, cancel := context.WithCancel(t.Context())
	a := open(t, save(t, "x.tar", b), artefact.Options{Context: ctx})
	n := 0
	err := a.Walk(func(codesign.Member, io.Reader) error {
		n++
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) || n != 1 {
		t.Errorf("%v after %d members", err, n)
	}
	if p := a.Progress(); p.Members != 2 || a.Size() != int64(len(b)) {
		t.Errorf("%+v", p)
	}
}

// Digest and members must belong together.
func TestWalk_changedFile(t *testing.T) {
	b := tarOf(t, file{"a.py", "import os\n", 0o644})
	p := save(t, "x.tar", b)
	a := open(t, p, artefact.Options{})
	b[512] = 'I'
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	err := a.Walk(func(codesign.Member, io.Reader) error { return nil })
	if !errors.Is(err, errs.Conflict) {
		t.Errorf("a changed file: %v", err)
	}
}
