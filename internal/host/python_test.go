package host_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// pythonHome makes a home of the distribution's Python as the agent does.
func pythonHome(t *testing.T) host.PythonHome {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: needs root, to start the interpreter as another user")
	}
	found, err := filepath.Glob("/usr/bin/python3.[0-9]*[0-9]")
	if err != nil || len(found) == 0 {
		t.Skip("SKIPPED, NOT TESTED: needs Debian's python3")
	}
	b, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "python-home-") // t.TempDir has a parent that others cannot enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := host.PythonHome{Program: found[0], Digest: sha256.Sum256(b), Home: dir}
	lib := filepath.Join(dir, "lib", h.Version())
	for _, d := range []string{lib + "/encodings", lib + "/lib-dynload", dir} {
		if err := errors.Join(os.MkdirAll(d, 0o755), os.Chmod(d, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range host.HomeFiles() {
		if b, err := os.ReadFile(filepath.Join("/usr/lib", h.Version(), n)); err == nil {
			if err := os.WriteFile(filepath.Join(lib, n), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "compile.py"), []byte(host.PythonScript()), 0o644); err != nil {
		t.Fatal(err)
	}
	return h
}

func startPython(t *testing.T, h host.PythonHome) *host.PythonCompiler {
	t.Helper()
	c, err := host.StartPython(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// What is made is what Python loads in place of the source, with the source's
// own name in its tracebacks.
func TestPythonCompiler_pythonLoadsIt(t *testing.T) {
	h := pythonHome(t)
	c := startPython(t, h)
	dir := t.TempDir()
	src := filepath.Join(dir, "mod.py")
	// of equal length: the time and the size are all that Python compares
	source, other := "who = 'source'\ndef f(): raise KeyError\n", "who = 'code!!'\ndef f(): raise KeyError\n"
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "__pycache__"), 0o755), os.WriteFile(src, []byte(source), 0o644)); err != nil {
		t.Fatal(err)
	}
	s, err := host.ReadPython(src)
	if err != nil {
		t.Fatal(err)
	}
	code, err := c.Compile(t.Context(), src, []byte(other))
	if err != nil {
		t.Fatal(err)
	}
	name := host.BytecodePath(src, c.Tag)
	data := host.Bytecode(c.Magic, s, code)
	if _, err := host.WriteBytecode(name, data); err != nil {
		t.Fatal(err)
	}
	run := "import sys, traceback; sys.path.insert(0, sys.argv[1]); import mod\ntry: mod.f()\nexcept KeyError: print(mod.who, mod.__cached__, traceback.format_exc())"
	out, err := exec.CommandContext(t.Context(), h.Program, "-I", "-B", "-c", run, dir).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "code!! "+name) || !strings.Contains(string(out), `File "`+src+`", line 2`) {
		t.Errorf("%v: %s", err, out)
	}
	if again := must(c.Compile(t.Context(), src, []byte(other))); !bytes.Equal(again, code) {
		t.Error("the same source gives other code the second time")
	}
	if fresh := must(startPython(t, h).Compile(t.Context(), src, []byte(other))); !bytes.Equal(fresh, code) {
		t.Error("the same source gives other code in another process")
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		return []byte(err.Error())
	}
	return b
}

func TestPythonCompiler_refuses(t *testing.T) {
	h := pythonHome(t)
	c := startPython(t, h)
	for name, text := range map[string]string{
		"no Python": "def f(:", "a NUL byte": "x = 1\x00", "an unknown encoding": "# coding: nonesuch\n",
		"what is too deep": strings.Repeat("(", 5000) + strings.Repeat(")", 5000),
	} {
		if _, err := c.Compile(t.Context(), "/x.py", []byte(text)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Compile(t.Context(), "/x.py", []byte("# coding: latin-1\nx = '\xe4'\n")); err != nil {
		t.Errorf("after errors, in another encoding: %v", err)
	}
}

// What is started must be the interpreter that was meant, and see no library
// but the one in its home.
func TestStartPython_isolated(t *testing.T) {
	h := pythonHome(t)
	wrong := h
	wrong.Digest[0]++
	if _, err := host.StartPython(t.Context(), wrong); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another digest: %v", err)
	}
	ask := h
	if err := os.WriteFile(filepath.Join(h.Home, "compile.py"), []byte(`
import os, posix, sys
said = ("%s %s %s %s" % (os.getuid(), os.getcwd(), sorted(os.environ), [p for p in sys.path if not p.startswith(sys.argv[0].rpartition("/")[0])])).encode()
said = b"magc" + said.translate(None, b"/.")
posix.write(1, b"\0" + len(said).to_bytes(4, "big") + said)
posix.read(0, 1)
`), 0o644); err != nil {
		t.Fatal(err)
	}
	c := startPython(t, ask)
	if c.Tag != "65534  ['LC_CTYPE'] []" && c.Tag != "65534  [] []" {
		t.Errorf("uid, directory, environment, foreign paths: %q", c.Tag)
	}
}

func TestWriteBytecode_onlyWhereRootAlone(t *testing.T) {
	dir := t.TempDir()
	open, linked := filepath.Join(dir, "open"), filepath.Join(dir, "linked")
	good := filepath.Join(dir, "good")
	if err := errors.Join(os.Mkdir(open, 0o755), os.Chmod(open, 0o777), os.Mkdir(good, 0o755), os.Symlink(good, linked)); err != nil {
		t.Fatal(err)
	}
	if _, err := host.WriteBytecode(open+"/a.pyc", nil); !errors.Is(err, errs.Denied) {
		t.Errorf("a directory for everyone: %v", err)
	}
	if _, err := host.WriteBytecode(linked+"/a.pyc", nil); err == nil {
		t.Error("through a link")
	}
	if _, err := host.WriteBytecode(dir+"/none/a.pyc", nil); !errors.Is(err, errs.NotFound) {
		t.Errorf("no directory: %v", err)
	}
	// a link of that name is replaced, and what it leads to left alone
	precious := filepath.Join(dir, "precious")
	if err := errors.Join(os.WriteFile(precious, []byte("old"), 0o600), os.Symlink(precious, good+"/a.pyc")); err != nil {
		t.Fatal(err)
	}
	first, err := host.WriteBytecode(good+"/a.pyc", []byte("new"))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "old" {
		t.Errorf("behind the link: %q, %v", b, err)
	}
	st, err := os.Lstat(good + "/a.pyc")
	if err != nil || st.Mode() != 0o644 {
		t.Errorf("%v, %v", st, err)
	}
	if now, err := host.StampOf(good + "/a.pyc"); err != nil || now != first {
		t.Errorf("stamp %+v, want %+v: %v", now, first, err)
	}
	if again, err := host.WriteBytecode(good+"/a.pyc", []byte("new")); err != nil || again != first {
		t.Errorf("the same content: another file %v, %v", again, err)
	}
	if left, err := os.ReadDir(good); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestBytecodePath(t *testing.T) {
	for in, want := range map[string]string{
		"/usr/lib/python3.11/json/__init__.py": "/usr/lib/python3.11/json/__pycache__/__init__.cpython-311.pyc",
		"/a.b.py":                              "/__pycache__/a.b.cpython-311.pyc",
		"/a.pyw":                               "", "/.py": "", "/a": "",
	} {
		if got := host.BytecodePath(in, "cpython-311"); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestReadPlain(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/real", 0o755), os.WriteFile(dir+"/real/a.py", []byte("x"), 0o644), os.Symlink("real", dir+"/link"), os.Symlink("a.py", dir+"/real/b.py")); err != nil {
		t.Fatal(err)
	}
	if b, st, err := host.ReadPlain(dir+"/real/a.py", 1); err != nil || string(b) != "x" || st.Size != 1 {
		t.Errorf("%q, %+v, %v", b, st, err)
	}
	for _, n := range []string{dir + "/link/a.py", dir + "/real/b.py", dir + "/real", dir + "/real/../real/a.py", "a.py", "/"} {
		if _, _, err := host.ReadPlain(n, 1); err == nil {
			t.Errorf("%s: read", n)
		}
	}
	if _, _, err := host.ReadPlain(dir+"/none", 1); !errors.Is(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	if _, _, err := host.ReadPlain(dir+"/real/a.py", 0); !errors.Is(err, errs.Invalid) {
		t.Errorf("too long: %v", err)
	}
}
