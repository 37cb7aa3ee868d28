package vm

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/test/vm/internal/guest"
)

// TestCPIO unpacks an archive with a program that this project did not write.
func TestCPIO(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: cpio is not installed")
	}
	src, dst := t.TempDir(), t.TempDir()
	for name, content := range map[string]string{"a": "one", "d/b": "two!", "d/e/empty": ""} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o751); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../a", filepath.Join(src, "d/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(src, "nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	c := newCPIO(&b)
	c.file("/bin/tool", 0o755, "tool")
	c.file("bin/tool", 0o755, "second is ignored")
	if err := c.add(File{Host: src, Guest: "/in"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cpio", "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dst, &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, want := range map[string]string{"in/a": "one", "in/d/b": "two!", "in/d/e/empty": "", "in/d/link": "one", "bin/tool": "tool", "usr/bin/tool": "tool"} {
		got, err := os.ReadFile(filepath.Join(dst, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	if st, err := os.Stat(filepath.Join(dst, "in/a")); err != nil || st.Mode().Perm() != 0o751 {
		t.Errorf("mode: %v %v", st, err)
	}
	if st, err := os.Stat(filepath.Join(dst, "in/nothing")); err != nil || !st.IsDir() {
		t.Errorf("empty directory: %v %v", st, err)
	}
}

func TestCPIO_libraries(t *testing.T) {
	var b bytes.Buffer
	c := newCPIO(&b)
	if err := c.add(File{Host: "/usr/bin/env", Guest: "/bin/env"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"usr/bin/env", "usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/libc.so.6"} {
		if !c.has(want) {
			t.Errorf("%s is missing", want)
		}
	}
}

func TestParseFiles(t *testing.T) {
	got, err := ParseFiles("/a:/b,,/c")
	if want := []File{{"/a", "/b"}, {"/c", "/c"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := ParseFiles("/a:b"); !errors.Is(err, errs.Invalid) {
		t.Errorf("a relative path in the guest: %v", err)
	}
}

func TestFollower(t *testing.T) {
	long := strings.Repeat("x", maxLine+100)
	for _, c := range []struct {
		name, in, out string
		exit          int
		exited        bool
	}{
		{"frame after a line", "hello\n" + guest.Frame("N", guest.VerbExit, "3"), "hello\n", 3, true},
		{"frame inside a line", "hello" + guest.Frame("N", guest.VerbExit, "3"), "hello", 3, true},
		{"another's frame", guest.Frame("M", guest.VerbExit, "0"), guest.Frame("M", guest.VerbExit, "0"), 0, false},
		{"no frame", "hello\n", "hello\n", 0, false},
		{"long line", long + "\n" + guest.Frame("N", guest.VerbExit, "1"), long + "\n", 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			f := follower{nonce: "N", output: &out}
			if err := f.follow(strings.NewReader(c.in)); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.out || f.result.Exit != c.exit || f.exited != c.exited {
				t.Errorf("output %.40q, exit %d %v", out.String(), f.result.Exit, f.exited)
			}
		})
	}
}

// FuzzFollower: whatever a guest without the nonce writes, it cannot report an
// exit code, and every byte reaches the output.
func FuzzFollower(f *testing.F) {
	f.Add([]byte("hello\n\x00N exit 0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		fo := follower{nonce: "a word that is not in the input, as it is random", output: &out}
		if err := fo.follow(bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		if fo.exited || !bytes.Equal(out.Bytes(), b) {
			t.Errorf("exited %v, output %q", fo.exited, out.Bytes())
		}
	})
}
