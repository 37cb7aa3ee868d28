package enforce

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// Ways around the interpreter rules that the attack suite found.
func TestInterpreter_evasion(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	l.allow([]byte("print(1)"), 0, 0)
	plain, data := l.file("plain", []byte("print(1)")), l.file("data.txt", []byte("unlisted data"))
	l.measure(plain)
	python := pythonRule()
	python.ArgLong = []string{"--check-hash-based-pycs"}
	python.Environment = []string{"PYTHONINLINE", "LUA_INIT*"}
	awk := integrity.Interpreter{Name: "test", Inline: integrity.ModeEnforce, Stdin: 31, ScriptFlags: "f", ArgFlags: "F", Word: integrity.WordCode}
	maker := integrity.Interpreter{Name: "test", Inline: integrity.ModeEnforce, Stdin: 31, ScriptFlags: "f", Word: integrity.WordOther}
	many := append(strings.Split(strings.Repeat("x ", 300), " ")[:300], plain)
	for _, c := range []struct {
		name  string
		rule  integrity.Interpreter
		works bool
		env   string
		args  []string
	}{
		{"long option of many bytes takes an argument", python, false, "", []string{"--check-hash-based-pycs", "default", data}},
		{"unknown long option, perhaps its argument, inline code", python, false, "", []string{"--diagnostic-dir", "d", "-c", "code"}},
		{"unknown long option, the script, its own words", python, true, "", []string{"--quiet", plain, "x", "-c", plain}},
		{"known option, then the script and its own options", python, true, "", []string{"-X", "dev", plain, "-c", plain}},
		{"shell: long option with one dash", shellRule(), false, "", []string{"-init-file", plain, "-c", "code"}},
		{"variable with code", python, false, "PYTHONINLINE=1", []string{plain}},
		{"variable that begins so", python, false, "LUA_INIT_5_4=x", []string{plain}},
		{"variable after many arguments", python, false, "PYTHONINLINE=1", append([]string{plain}, many...)},
		{"variable that only begins the same", python, true, "PYTHONINLINE2=1", []string{plain}},
		{"word is code", awk, false, "", []string{"code"}},
		{"word is code, after an option", awk, false, "", []string{"-F", ":", "code", plain}},
		{"script by option", awk, true, "", []string{"-f", plain}},
		{"script by option, then data", awk, true, "", []string{"-f", plain, plain}},
		{"script by option, joined", awk, true, "", []string{"-f" + plain, plain}},
		{"unlisted script by option", awk, false, "", []string{"-f", data}},
		{"two scripts", awk, false, "", []string{"-f", plain, "-f", data}},
		{"word means something else", maker, true, "", []string{"target", plain}},
		{"word means something else, then a script", maker, false, "", []string{"target", "-f", data}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.table.Interpreters = []integrity.Interpreter{c.rule}
			l.apply()
			l.drain()
			cmd := l.roleCommand("read", c.args...)
			cmd.Env = append(cmd.Env, "OTHER="+strings.Repeat("y", 700), c.env)
			err := cmd.Run()
			if (err == nil) != c.works {
				t.Errorf("works: %v (%v), want %v", err == nil, err, c.works)
				l.logEvents()
			}
		})
	}
}

// What an interpreter wrote for itself is not there, and no event is raised.
func TestInterpreter_bytecode(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	l.allow([]byte("print(1)"), 0, 0)
	plain := l.file("plain", []byte("print(1)"))
	l.dirs("__pycache__")
	cache, planted := l.file("__pycache__/m.pyc", []byte("code")), l.file("m.pyc", []byte("code"))
	l.measure(plain, cache, planted)
	rule := pythonRule()
	rule.CodeSuffix, rule.Bytecode = []string{".py", ".pyc"}, []string{".pyc"}
	l.table.Interpreters = []integrity.Interpreter{rule}
	l.apply()
	before, err := l.e.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.role("read", plain, cache); err == nil {
		t.Error("byte code that nobody authorised was read")
	}
	after, err := l.e.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if after.Quiet != before.Quiet+1 || after.Refused != before.Refused {
		t.Errorf("counters %+v, before %+v", after, before)
	}
	if err := l.role("read", plain, planted); err == nil {
		t.Error("byte code in another place was read")
	}
	l.event(Unlisted)
	if err := l.role("read", cache); err == nil {
		t.Error("byte code that was named was read")
	}
	l.event(Unlisted)
}

// An interpreter by other means than execve.
func TestInterpreter_mapped(t *testing.T) {
	l := newLab(t)
	l.table.Interpreters = []integrity.Interpreter{pythonRule()}
	digest := l.allow([]byte("an interpreter, as far as the policy knows"), 0, 1)
	image := l.file("image", []byte("an interpreter, as far as the policy knows"))
	script := l.file("unlisted.py", []byte("print(2)"))
	l.measure(image, script)
	kinds := func(k ...integrity.Kind) {
		l.table.Entries[integrity.Key{Digest: digest}] = integrity.Entry{Kinds: integrity.SetOf(k...), Interpreter: 1}
		l.apply()
		l.drain()
	}
	kinds(integrity.KindExec, integrity.KindLibrary)
	if err := l.role("mmap-exec", image); !refusedWith(err, 1) {
		t.Errorf("a program that is an interpreter was mapped by another: %v", err)
	}
	l.event(Arguments)
	kinds(integrity.KindLibrary)
	if err := l.role("mmap-and-read", image, script); !refusedWith(err, 1) {
		t.Errorf("a process with an interpreter's library read an unlisted script: %v", err)
	}
	l.event(Unlisted)
	if err := l.role("mmap-and-read", image, image); err != nil {
		t.Errorf("the same with data: %v", err)
	}
}

// A pipe that an authorised script reads code from, and one that is allowed.
func TestInterpreter_streams(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	l.allow([]byte("print(1)"), 0, 0)
	plain := l.file("plain", []byte("print(1)"))
	l.measure(plain)
	fifo := l.dir + "/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	strict := pythonRule()
	strict.Reads, strict.DataPaths = integrity.ReadsStrict, []string{"/dev/", "/proc/", "/sys/"}
	l.table.Interpreters = []integrity.Interpreter{strict}
	l.apply()
	l.drain()
	if err := l.role("read", plain, fifo); err == nil {
		t.Error("a strict interpreter opened a FIFO that was not named")
	}
	l.event(Stdin)
	// where inline code is refused and an input allowed, its use is told
	strict.Stdin |= integrity.StdinPipe
	l.table.Interpreters = []integrity.Interpreter{strict}
	l.apply()
	l.drain()
	c := l.roleCommand("nothing")
	if c.Stdin, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Run(); err != nil {
		t.Errorf("an input that is allowed: %v", err)
	}
	if ev := l.event(Stdin); ev.Refused {
		t.Errorf("event %+v", ev)
	}
}

// userfaultfd supplies pages of an authorised library: it needs a role.
func TestUserfault(t *testing.T) {
	l := newLab(t)
	if err := l.role("memory", "userfaultfd, alone"); !refusedWith(err, 1) {
		t.Errorf("userfaultfd without a role: %v", err)
	}
	l.event(Userfault)
	l.allow(l.read("/proc/self/exe"), integrity.RoleJIT, 0)
	l.apply()
	if err := l.role("memory", "userfaultfd, alone"); err != nil {
		t.Errorf("userfaultfd with the role: %v", err)
	}
}

// Code that runs through an overlay cannot be changed in its layer.
func TestIdentity_layerInUse(t *testing.T) {
	l := newLab(t)
	l.dirs("lower", "upper", "work")
	content := canaryProgram("amd64", canaryMark)
	below := l.file("lower/lib", content)
	over := l.mount("o", "over", "overlay", 0, "lowerdir="+l.dir+"/lower,upperdir="+l.dir+"/upper,workdir="+l.dir+"/work")
	l.drain()
	if err := l.role("map-and-write", over+"/lib", below); !refusedWith(err, 1) {
		t.Errorf("the layer's file was opened for writing while it is mapped through the overlay: %v", err)
		l.logEvents()
	}
	l.event(CodeWrite)
}

// A package manager's freedom is root's: a user may start apt-get with hooks of his own.
func TestInterpreter_packages(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), integrity.RolePackages, 1)
	l.table.Interpreters = []integrity.Interpreter{pythonRule()}
	l.apply()
	l.drain()
	if err := l.role("nothing", "-c", "code"); err != nil {
		t.Errorf("code that a package manager hands to an interpreter: %v", err)
	}
	if ev := l.event(Inline); ev.Refused {
		t.Errorf("event %+v", ev)
	}
	c := l.roleCommand("nothing", "-c", "code")
	c.SysProcAttr.Credential = &syscall.Credential{Uid: 1000, Gid: 1000}
	if err := c.Run(); !refusedWith(err, -1) {
		t.Errorf("the same by a user: %v", err)
	}
	if ev := l.event(Inline); !ev.Refused || ev.UID != 1000 {
		t.Errorf("event %+v", ev)
	}
}
