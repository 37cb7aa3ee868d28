package enforce

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// shellRule and pythonRule are options as those programs have them.
func shellRule() integrity.Interpreter {
	return integrity.Interpreter{
		Name: "test", Inline: integrity.ModeEnforce, Stdin: integrity.StdinTTY | integrity.StdinNull,
		InlineFlags: "c", ArgFlags: "oO", StdinFlags: "s", ArgLong: []string{"--rcfile", "--init-file"},
	}
}

func pythonRule() integrity.Interpreter {
	return integrity.Interpreter{
		Name: "test", Inline: integrity.ModeEnforce, Stdin: integrity.StdinTTY | integrity.StdinNull, Reads: integrity.ReadsCode,
		InlineFlags: "c", ArgFlags: "WX", InlineLong: []string{"--eval", "--source-text"}, ArgLong: []string{"--import"}, CodeSuffix: []string{".py"},
	}
}

// The interpreter rules, played by this test program: it is given the
// arguments and then opens its last one like an interpreter.
func TestInterpreter(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	listed := l.file("listed.py", []byte("print(1)"))
	l.allow([]byte("print(1)"), 0, 0)
	plain := l.file("plain", []byte("print(1)"))
	l.measure(listed, plain)
	data, unlisted := l.file("data.txt", []byte("unlisted data")), l.file("unlisted.py", []byte("print(2)"))
	link := l.dir + "/link"
	if err := os.Symlink(unlisted, link); err != nil {
		t.Fatal(err)
	}
	strict := pythonRule()
	strict.Reads = integrity.ReadsStrict
	strict.DataPaths = []string{"/dev/", "/proc/", "/sys/", filepath.Dir(l.dir) + "/"}
	tight := strict
	tight.DataPaths = []string{"/dev/", "/proc/", "/sys/"}
	long := strings.Repeat("x", 700)
	for _, c := range []struct {
		name  string
		rule  integrity.Interpreter
		works bool
		args  []string
	}{
		{"listed script", pythonRule(), true, []string{listed}},
		{"listed script of any suffix", pythonRule(), true, []string{plain}},
		{"unlisted script", pythonRule(), false, []string{unlisted}},
		{"unlisted script through a link", pythonRule(), false, []string{link}},
		{"named file of any suffix is code", pythonRule(), false, []string{data}},
		{"inline code", pythonRule(), false, []string{"-c", "code"}},
		{"inline code in a cluster", pythonRule(), false, []string{"-Ic", "code"}},
		{"inline code, long", pythonRule(), false, []string{"--eval=code"}},
		{"inline code, long and abbreviated", pythonRule(), false, []string{"--source", "code"}},
		{"inline code, abbreviated with a value", pythonRule(), false, []string{"--s=code"}},
		{"two dashes and two letters of another option", pythonRule(), true, []string{"--in", listed}},
		{"an option that only begins the same", pythonRule(), true, []string{"--evaluate", listed}},
		{"option with an argument, then the script", pythonRule(), true, []string{"-W", "c", listed}},
		{"option with its argument attached", pythonRule(), true, []string{"-Wc", listed}},
		{"option whose argument is long", pythonRule(), true, []string{"-W", long, listed}},
		{"long argument in the script's place", pythonRule(), false, []string{long, "/dev/null"}},
		{"cluster longer than what is read", pythonRule(), false, []string{"-IIIIIIIIIIIIIIIIc", "code"}},
		{"long option with an argument, then the script", pythonRule(), false, []string{"--import", "x", data}},
		{"after two dashes", pythonRule(), false, []string{"--", data}},
		{"more arguments than are read", pythonRule(), false, append(strings.Split(strings.Repeat("-I ", 30), " ")[:30], "-c", "code")},
		{"plus is no option of python", pythonRule(), true, []string{"+x", data}},
		{"code suffix that was not named", pythonRule(), false, []string{listed, unlisted}},
		{"data that was not named", pythonRule(), true, []string{listed, data}},
		{"strict: listed script", strict, true, []string{listed}},
		{"strict: data path", strict, true, []string{listed, data}},
		{"strict: outside the data paths", tight, false, []string{listed, data}},
		{"strict: named data is still code", strict, false, []string{data}},
		{"shell: script", shellRule(), false, []string{data}},
		{"shell: -oc takes the next word, then code", shellRule(), false, []string{"-oc", "posix", "code"}},
		{"shell: -o word script", shellRule(), true, []string{"-o", "c", plain}},
		{"shell: +o word script", shellRule(), false, []string{"+o", "c", data}},
		{"shell: +ec code", shellRule(), false, []string{"+ec", "code"}},
		{"shell: dash alone ends the options", shellRule(), false, []string{"-", data}},
		{"shell: after two dashes", shellRule(), false, []string{"--", data}},
		{"shell: rcfile is not the script", shellRule(), true, []string{"--rcfile", "x", plain}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.table.Interpreters = []integrity.Interpreter{c.rule}
			l.apply()
			l.drain()
			err := l.role("read", c.args...)
			if (err == nil) != c.works {
				t.Errorf("works: %v (%v), want %v", err == nil, err, c.works)
				l.logEvents()
			}
		})
	}
	t.Run("relative name, absolute open", func(t *testing.T) {
		l.table.Interpreters = []integrity.Interpreter{shellRule()}
		l.apply()
		c := l.roleCommand("read-absolute", "data.txt")
		c.Dir = l.dir
		if err := c.Run(); err == nil {
			t.Error("an unlisted script was opened by its absolute name")
		}
	})
	streams(l)
}

// streams tests what stands in for standard input.
func streams(l *lab) {
	l.t.Helper()
	set := func(r integrity.Interpreter) {
		l.table.Interpreters = []integrity.Interpreter{r}
		l.apply()
		l.drain()
	}
	withPipe := pythonRule()
	withPipe.Stdin |= integrity.StdinPipe
	fifo := l.dir + "/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		l.t.Fatal(err)
	}
	writer, err := os.OpenFile(fifo, os.O_RDWR, 0) // or opening to read would wait
	if err != nil {
		l.t.Fatal(err)
	}
	defer writer.Close()
	for _, c := range []struct {
		name  string
		rule  integrity.Interpreter
		works bool
		args  []string
	}{
		{"code from a pipe", pythonRule(), false, nil},
		{"code from a pipe that is allowed", withPipe, true, []string{}},
		{"pipe as /dev/stdin", pythonRule(), false, []string{"/dev/stdin"}},
		{"pipe as /dev/fd/0", pythonRule(), false, []string{"/dev/fd/0"}},
		{"pipe as /dev/stdin that is allowed", withPipe, true, []string{"/dev/stdin"}},
		{"fifo", pythonRule(), false, []string{fifo}},
		{"fifo that is allowed", withPipe, true, []string{fifo}},
	} {
		l.t.Run(c.name, func(t *testing.T) {
			set(c.rule)
			cmd := l.roleCommand("read", c.args...)
			if len(c.args) == 0 {
				cmd = l.roleCommand("nothing")
			}
			r, w := io.Pipe()
			w.Close()
			cmd.Stdin = r // not a file: exec makes a pipe
			err := cmd.Run()
			if (err == nil) != c.works {
				t.Errorf("works: %v (%v), want %v", err == nil, err, c.works)
				l.logEvents()
			}
			if !c.works {
				if ev := l.event(Stdin); ev.Interpreter == 0 {
					t.Errorf("event %+v", ev)
				}
			}
		})
	}
}

// A script that an interpreter is reading cannot be changed under it; once
// nobody reads it, it can.
func TestInterpreter_scriptIsKept(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	script := l.file("script", []byte("print(3)"))
	l.allow([]byte("print(3)"), 0, 0)
	l.measure(script)
	l.table.Interpreters = []integrity.Interpreter{pythonRule()}
	l.apply()
	c := l.roleCommand("read-and-wait", script)
	c.Stdout = nil
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the interpreter did not start: %v", err)
	}
	if err := l.role("write", script); !refusedWith(err, 1) {
		t.Errorf("the script was opened for writing while it is read: %v", err)
	}
	l.event(CodeWrite)
}

func refusedWith(err error, code int) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == code
}
