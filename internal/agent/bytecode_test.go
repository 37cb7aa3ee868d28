package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// snake is a host with Python and some modules that a package brought.
type snake struct {
	*lab
	program string
	lib     string // a directory of modules
	rules   string // of its policy
}

// newSnake makes the distribution's Python and modules a package's content.
// rules are further lines of the policy.
func newSnake(t *testing.T, rules string, modules map[string]string) *snake {
	t.Helper()
	found, err := filepath.Glob("/usr/bin/python3.[0-9]*[0-9]")
	target, lerr := os.Readlink("/usr/bin/python3")
	if err != nil || len(found) == 0 || lerr != nil || os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: needs root and Debian's python3")
	}
	s := &snake{lab: newLab(t), program: filepath.Join("/usr/bin", target)}
	s.lib = filepath.Join(s.dir, "lib")
	// the interpreter runs as another user, who must come as far as the run directory
	if err := errors.Join(os.Chmod(filepath.Dir(s.dir), 0o755), os.MkdirAll(filepath.Join(s.lib, "__pycache__"), 0o755)); err != nil {
		t.Fatal(err)
	}
	s.usrLib = filepath.Join(s.dir, "usr-lib")
	for _, n := range host.HomeFiles() {
		if b, err := os.ReadFile(filepath.Join("/usr/lib", filepath.Base(s.program), n)); err == nil {
			to := filepath.Join(s.usrLib, filepath.Base(s.program), n)
			if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	}
	ring, err := os.ReadFile("/usr/share/keyrings/debian-archive-keyring.gpg")
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	s.rules = "  archives:\n    - name: debian\n      keyring: " + base64.StdEncoding.EncodeToString(ring) +
		"\nbaseline: 1\nallow:\n  - rule: packages\n    package: {archive: debian, names: [\"*\"]}\n" + rules
	s.prepare(s.policy(5, "enforce", s.rules))
	for name, text := range modules {
		s.write(name, text)
		if err := os.WriteFile(s.pyc(name), []byte("as dpkg left it"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.install(modules)
	return s
}

func (s *snake) path(name string) string { return filepath.Join(s.lib, name) }
func (s *snake) pyc(name string) string {
	return host.BytecodePath(s.path(name), pythonTag(s.program))
}

func (s *snake) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// install stores a package with Python and the modules, as if it were verified.
func (s *snake) install(modules map[string]string) {
	s.t.Helper()
	stage := s.t.TempDir()
	add := func(path string, content []byte, mode os.FileMode) {
		to := filepath.Join(stage, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, content, mode)); err != nil {
			s.t.Fatal(err)
		}
	}
	file := func(path string, mode os.FileMode) {
		if b, err := os.ReadFile(path); err == nil {
			add(path, b, mode)
		}
	}
	file(s.program, 0o755)
	for _, n := range host.HomeFiles() {
		file(filepath.Join(s.usrLib, filepath.Base(s.program), n), 0o644)
	}
	for n, text := range modules {
		add(s.path(n), []byte(text), 0o644)
	}
	built, err := codesign.Build(codesign.DirSource(os.DirFS(stage)), codesign.Options{AllFiles: true})
	if err != nil {
		s.t.Fatal(err)
	}
	st, err := OpenState(s.state())
	if err != nil {
		s.t.Fatal(err)
	}
	p := &storedPackage{Archive: "debian", Package: "python3", Version: "1", Architecture: "all", Deb: sha256.Sum256(built.Catalogue), Added: s.now().Unix()}
	if err := st.addPackage(p, built.Catalogue, built.Names); err != nil {
		s.t.Fatal(err)
	}
}

// settled waits until the agent has nothing left to compile.
func (s *snake) settled() BytecodeStatus {
	s.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		st := s.status().Bytecode
		if st.State == bytecodeDone {
			return st
		}
		if time.Now().After(end) {
			s.t.Fatalf("byte code: %+v", st)
		}
	}
}

// authorised says whether the kernel would let an interpreter read a file.
func (s *snake) authorised(path string) bool {
	s.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.kernel.live().Allows(integrity.Key{Digest: sha256.Sum256(b)}, integrity.KindScript)
}

// imports has Python import modules and print what each says of itself and
// where it came from.
func (s *snake) imports(names ...string) string {
	s.t.Helper()
	run := "import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\nfor m in sys.argv[2:]: m = __import__(m); print(m.who)"
	out, err := exec.CommandContext(s.t.Context(), s.program, append([]string{"-I", "-v", "-c", run, s.lib}, names...)...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestBytecode_madeForWhatPackagesBrought(t *testing.T) {
	modules := map[string]string{"one.py": "who = 'one'\n", "two.py": "who = 'two'\n", "broken.py": "def f(:\n"}
	s := newSnake(t, "", modules)
	defer syscall.Umask(syscall.Umask(0o077)) // as under the service manager
	s.write("own.py", "who = 'own'\n")
	if err := os.WriteFile(s.pyc("own.py"), []byte("as it was"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.start()
	if st := s.settled(); st.Made != 2 || st.Left != 1 || st.Pending != 0 {
		t.Errorf("%+v", st)
	}
	for _, n := range []string{"one.py", "two.py"} {
		if !s.authorised(s.pyc(n)) {
			t.Errorf("the byte code of %s is not authorised", n)
		}
		if s.authorised(s.pyc(n)) && !s.authorised(s.path(n)) {
			t.Errorf("%s is not authorised", n)
		}
	}
	for _, n := range []string{"own.py", "broken.py"} {
		if s.authorised(s.pyc(n)) {
			t.Errorf("the byte code of %s is authorised", n)
		}
	}
	out := s.imports("one", "two")
	for _, n := range []string{"one.py", "two.py"} {
		if !strings.Contains(out, "matches "+s.path(n)) || !strings.Contains(out, "code object from '"+s.pyc(n)+"'") {
			t.Errorf("Python does not use the byte code of %s:\n%s", n, out)
		}
	}
	if l := s.agent.loaded.compiled; l != nil {
		d := s.digest(s.pyc("one.py"))
		o := l.Object(integrity.KindScript, integrity.Key{Digest: d})
		if v := l.Evaluate(&o, s.now()); !v.Allow || v.Rule != "packages" || len(o.Memberships) != 1 || o.Memberships[0].Origin.Package != "python3" {
			t.Errorf("who vouches for byte code: %+v, %+v", v, o)
		}
	}
}

func (s *snake) digest(path string) integrity.Digest {
	s.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// pass has the agent look again, as it does after a while.
func (s *snake) pass() BytecodeStatus {
	s.t.Helper()
	b := &bytecode{a: s.agent, log: s.agent.log, lib: s.usrLib}
	if err := b.pass(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	return s.status().Bytecode
}

// What somebody plants, edits or exchanges gets nowhere and is put right.
func TestBytecode_plantedOrEdited(t *testing.T) {
	s := newSnake(t, "", map[string]string{"one.py": "who = 'one'\n"})
	s.start()
	s.settled()
	good := s.digest(s.pyc("one.py"))
	b, err := os.ReadFile(s.pyc("one.py"))
	if err != nil {
		t.Fatal(err)
	}
	evil := bytes.Replace(b, []byte("one"), []byte("bad"), 1)
	if err := os.WriteFile(s.pyc("one.py"), evil, 0o644); err != nil {
		t.Fatal(err)
	}
	if s.authorised(s.pyc("one.py")) {
		t.Fatal("edited byte code is authorised")
	}
	s.pass()
	if got := s.digest(s.pyc("one.py")); got != good {
		t.Errorf("not put right: %v", got)
	}
	if err := os.Remove(s.pyc("one.py")); err != nil {
		t.Fatal(err)
	}
	s.pass()
	if got := s.digest(s.pyc("one.py")); got != good {
		t.Errorf("not made again: %v", got)
	}
	// the source is edited: its byte code is left, and Python sees that it is old
	s.write("one.py", "who = 'bad'\n")
	if st := s.pass(); st.Pending != 0 {
		t.Errorf("%+v", st)
	}
	if s.digest(s.pyc("one.py")) != good {
		t.Error("byte code was made of a source that no package brought")
	}
}

// A source that changes between compiling and filing gives nothing, and what
// was compiled under another policy is thrown away.
func TestBytecode_changesMeanwhile(t *testing.T) {
	s := newSnake(t, "", map[string]string{"one.py": "who = 'one'\n"})
	s.start()
	s.settled()
	a := s.agent
	b := &bytecode{a: a, log: a.log, lib: s.usrLib, left: map[string]host.Stamp{}}
	if err := os.Remove(s.pyc("one.py")); err != nil {
		t.Fatal(err)
	}
	compiled := func() (uint64, []work) {
		l, regime, why := b.ready()
		if why != "" {
			t.Fatal(why)
		}
		w := &pythons{a: a, l: l, running: map[string]*host.PythonCompiler{}}
		defer w.close()
		made, _, err := b.compile(t.Context(), w, []string{s.path("one.py")})
		if err != nil || len(made) != 1 {
			t.Fatalf("%v, %v", made, err)
		}
		return regime, made
	}
	regime, made := compiled()
	s.write("one.py", "who = 'two'\n")
	made[0].data = append(made[0].data, 0) // so that it is no copy of what is authorised
	made[0].Digest = sha256.Sum256(made[0].data)
	if err := b.commit(t.Context(), regime, made); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.pyc("one.py")); err == nil || s.kernel.live().Allows(integrity.Key{Digest: made[0].Digest}, integrity.KindScript) {
		t.Errorf("a source that changed gave something: %v", err)
	}
	s.write("one.py", "who = 'one'\n")
	regime, made = compiled()
	a.mu.Lock()
	a.regime++
	a.mu.Unlock()
	if err := b.commit(t.Context(), regime, made); !errors.Is(err, errs.Conflict) {
		t.Errorf("compiled under another policy: %v", err)
	}
}

// Nothing is compiled where others could reach into the compiler.
func TestBytecode_onlyUnderEnforcement(t *testing.T) {
	for name, rules := range map[string]string{
		"scripts in audit":  "modes: {script: audit}\n",
		"ptrace in audit":   "modes: {ptrace: audit}\n",
		"no byte code rule": "interpreters:\n  - {name: python, bytecode: []}\n",
	} {
		t.Run(name, func(t *testing.T) {
			s := newSnake(t, rules, map[string]string{"one.py": "who = 'one'\n"})
			s.start()
			time.Sleep(300 * time.Millisecond)
			if st := s.status().Bytecode; st.State != bytecodeWaiting || st.Made != 0 || st.Why == "" {
				t.Errorf("%+v", st)
			}
			if b, err := os.ReadFile(s.pyc("one.py")); err != nil || string(b) != "as dpkg left it" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// A restarted agent has the byte code authorised from the start, and believes
// what is written about it only where the kernel has guarded that all along.
func TestBytecode_restart(t *testing.T) {
	s := newSnake(t, "", map[string]string{"one.py": "who = 'one'\n"})
	s.start()
	s.settled()
	s.stop()
	n := len(s.kernel.applied)
	s.start()
	s.kernel.mu.Lock()
	first := s.kernel.applied[n]
	s.kernel.mu.Unlock()
	k := integrity.Key{Digest: s.digest(s.pyc("one.py"))}
	if !first.Allows(k, integrity.KindScript) {
		t.Error("a restart leaves a gap in which byte code is refused")
	}
	if st := s.settled(); st.Made != 1 {
		t.Errorf("%+v", st)
	}
	s.stop()
	// as after a boot: a file that anybody may have written
	evil := []byte("planted")
	if err := os.WriteFile(s.pyc("one.py"), evil, 0o644); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(s.run(), fileModules)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var list []module
	if err := json.Unmarshal(b, &list); err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	list[0].Digest = sha256.Sum256(evil)
	if b, err = json.Marshal(list); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s.kernel = newFakeKernel()
	s.start()
	s.kernel.mu.Lock()
	first = s.kernel.applied[0]
	s.kernel.mu.Unlock()
	if first.Allows(integrity.Key{Digest: sha256.Sum256(evil)}, integrity.KindScript) {
		t.Error("after a boot the agent believes a file")
	}
	s.settled()
	if s.digest(s.pyc("one.py")) != k.Digest {
		t.Error("after a boot the byte code is not made again")
	}
}

// A policy that denies a source, or its package, takes its byte code along.
func TestBytecode_denied(t *testing.T) {
	s := newSnake(t, "", map[string]string{"one.py": "who = 'one'\n", "two.py": "who = 'two'\n"})
	s.start()
	s.settled()
	one, two := integrity.Key{Digest: s.digest(s.pyc("one.py"))}, integrity.Key{Digest: s.digest(s.pyc("two.py"))}
	p := s.rules + "deny:\n  - rule: bad\n    sha256: [" + s.digest(s.path("one.py")).String() + "]\n"
	var st Status
	if err := s.client().Call(t.Context(), "policy", PolicyRequest{Policy: s.policy(6, "enforce", p), Force: true}, &st); err != nil {
		t.Fatal(err)
	}
	if tab := s.kernel.live(); tab.Allows(one, integrity.KindScript) || !tab.Allows(two, integrity.KindScript) {
		t.Error("byte code of a denied source is authorised, or of another one is not")
	}
}
