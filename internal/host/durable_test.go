package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

var errCrash = errors.New("power cut")

func TestWriteFileCrash(t *testing.T) {
	for _, step := range []string{"create", "fill", "sync", "rename", "syncdir"} {
		t.Run(step, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "state")
			if err := WriteFile(name, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			d := durable{step: func(s string) error {
				if s == step {
					return errCrash
				}
				return nil
			}}
			if err := d.write(name, strings.NewReader("new"), 0o600); !errors.Is(err, errCrash) {
				t.Fatalf("got %v", err)
			}
			want := "old"
			if step == "syncdir" {
				want = "new"
			}
			if b, err := os.ReadFile(name); err != nil || string(b) != want {
				t.Errorf("after a crash before %s: %q, %v; want %q", step, b, err, want)
			}
			// The next write works whatever the crash left.
			if err := WriteFile(name, []byte("newer"), 0o640); err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(name)
			if err != nil || fi.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v", fi.Mode(), err)
			}
		})
	}
}

func TestWriteFileLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "taken"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "taken", "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "taken"), []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	if err := WriteFile("", nil, 0o600); !errors.Is(err, errs.Invalid) {
		t.Errorf("empty name: %v", err)
	}
	e, err := os.ReadDir(dir)
	if err != nil || len(e) != 1 {
		t.Errorf("left behind: %v, %v", e, err)
	}
}

func TestWriteFileReplacesLink(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	if err := os.WriteFile(target, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(link, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(target); string(b) != "keep" {
		t.Errorf("followed the link: %q", b)
	}
	if err := RemoveFile(link); err != nil {
		t.Fatal(err)
	}
	if err := RemoveFile(link); err != nil {
		t.Errorf("second removal: %v", err)
	}
}
