package enforce

import (
	"errors"
	"io"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// playRole is what a child process of these tests does. Exit code 0 means that
// the thing worked.
func playRole(role string) int {
	args := os.Args[1:]
	switch role {
	case "mmap-exec": // map a file executable
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		return code(mapFile(f, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE))
	case "mmap-wx":
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		return code(mapFile(f, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE))
	case "anon-exec":
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return code(err)
	case "anon-wx":
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return 10
		}
		return code(unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC))
	case "mprotect-file":
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		b, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		if err != nil {
			return 11
		}
		b[100] = 0x90
		return code(unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC))
	case "memfd":
		return code(execMemfd(args[0]))
	case "proc-mem":
		f, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
		if err == nil {
			f.Close()
		}
		return code(err)
	case "code-write": // map a library, then open it for writing
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		if mapFile(f, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE) != nil {
			return 11
		}
		w, err := os.OpenFile(args[0], os.O_RDWR, 0)
		if err == nil {
			w.Close()
		}
		return code(err)
	case "traceme":
		_, _, e := syscall.RawSyscall(unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0)
		if e != 0 {
			return 1
		}
		return 0
	case "read": // open a file the way an interpreter does
		f, err := os.Open(args[len(args)-1])
		if err == nil {
			f.Close()
		}
		return code(err)
	case "init-module":
		return code(unix.InitModule(append([]byte("\x7fELF"), make([]byte, 4096)...), ""))
	}
	return 99
}

// code tells a refusal (1) from a success (0) and from another error (2).
func code(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.ETXTBSY):
		return 1
	}
	return 2
}

func mapFile(f *os.File, prot, flags int) error {
	_, err := unix.Mmap(int(f.Fd()), 0, 4096, prot, flags)
	return err
}

func execMemfd(path string) error {
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, b); err != nil {
		return err
	}
	return unix.Exec("/proc/self/fd/"+itoa(fd), []string{"x"}, nil)
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + itoa(n%10)
}

func TestEngine(t *testing.T) {
	l := newLab(t)
	good, evil := tinyELF(0), append(tinyELF(0), "unlisted"...)
	l.allow(good, 0, 0)
	l.apply()

	t.Run("listed program runs", func(t *testing.T) {
		if err := l.run(l.file("good", good)); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("unlisted program is refused, with an event", func(t *testing.T) {
		path := l.file("evil", evil)
		if err := l.run(path); !errors.Is(err, unix.EPERM) {
			t.Fatalf("ran, or another error: %v", err)
		}
		ev := l.event(Unlisted)
		if ev.Path != path || ev.Kind != integrity.KindExec || !ev.Refused || ev.Epoch != 7 || len(ev.Ancestors) == 0 {
			t.Errorf("event %+v", ev)
		}
		if ev.Digest != l.digest(evil) {
			t.Errorf("digest %v", ev.Digest)
		}
	})
	t.Run("content counts, not the inode", func(t *testing.T) {
		path := l.file("changing", good)
		if err := l.run(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		l.file("changing", evil)
		if err := l.run(path); !refused(err) {
			t.Error("changed content ran")
		}
	})
	t.Run("revocation acts at the next exec", func(t *testing.T) {
		path := l.file("revoked", good)
		if err := l.run(path); err != nil {
			t.Fatal(err)
		}
		k := integrity.Key{Digest: l.digest(good)}
		was := l.table.Entries[k]
		delete(l.table.Entries, k)
		l.apply()
		if err := l.run(path); !refused(err) {
			t.Error("revoked content ran")
		}
		l.table.Entries[k] = was
		l.apply()
		if err := l.run(path); err != nil {
			t.Error(err)
		}
	})
	goodLib, evilLib := l.file("good.so", good), l.file("evil.so", evil)
	for _, c := range []struct {
		role, arg string
		works     bool
	}{
		{"mmap-exec", goodLib, true},
		{"mmap-exec", evilLib, false},
		{"mmap-wx", goodLib, false},
		{"anon-exec", "", false},
		{"anon-wx", "", false},
		{"mprotect-file", goodLib, false},
		{"memfd", goodLib, false},
		{"proc-mem", "", false},
		{"code-write", goodLib, false},
		{"traceme", "", false},
		{"init-module", "", false},
	} {
		t.Run(c.role+" works="+map[bool]string{true: "yes", false: "no"}[c.works], func(t *testing.T) {
			err := l.role(c.role, c.arg)
			var exit interface{ ExitCode() int }
			got := 0
			if errors.As(err, &exit) {
				got = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]int{true: 0, false: 1}[c.works]; got != want {
				t.Errorf("exit code %d, want %d", got, want)
			}
		})
	}
	t.Run("a writer open before the mapping", func(t *testing.T) {
		path := l.file("busy.so", good)
		w, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if err := l.role("mmap-exec", path); !refused(err) {
			t.Error("mapped although a writer was there")
		}
	})
	t.Run("audit lets it pass and says so", func(t *testing.T) {
		l.table.Modes[integrity.KindExec] = integrity.ModeAudit
		l.table.Modes[integrity.KindLibrary] = integrity.ModeAudit
		l.apply()
		defer func() {
			l.table.Modes[integrity.KindExec] = integrity.ModeEnforce
			l.table.Modes[integrity.KindLibrary] = integrity.ModeEnforce
			l.apply()
		}()
		l.drain()
		if err := l.run(l.file("evil2", evil)); err != nil {
			t.Fatal(err)
		}
		if ev := l.event(Unlisted); ev.Refused {
			t.Error("event says refused")
		}
	})
	t.Run("out of scope nothing changes", func(t *testing.T) {
		p, err := os.StartProcess(l.file("evil3", evil), []string{"x"}, &os.ProcAttr{})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := p.Wait(); err != nil || !st.Success() {
			t.Error(st, err)
		}
	})
	c, err := l.e.Counters()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("counters %+v", c)
	if c.Dropped != 0 || c.HashErrors != 0 {
		t.Errorf("counters %+v", c)
	}
}

// The interpreter rules, played by this test program: it opens files like one.
func TestInterpreter(t *testing.T) {
	l := newLab(t)
	self := l.read("/proc/self/exe")
	l.allow(self, 0, 1)
	data := l.file("data.txt", []byte("unlisted data"))
	listed := l.file("listed.py", []byte("print(1)"))
	l.allow([]byte("print(1)"), 0, 0)
	unlisted := l.file("unlisted.py", []byte("print(2)"))
	link := l.dir + "/link"
	if err := os.Symlink(unlisted, link); err != nil {
		t.Fatal(err)
	}
	rule := integrity.Interpreter{
		Name: "test", Inline: integrity.ModeEnforce, Stdin: integrity.StdinTTY | integrity.StdinNull, Reads: integrity.ReadsCode,
		InlineFlags: "c", ArgFlags: "W", StdinFlags: "s", InlineLong: []string{"--eval"}, ArgLong: []string{"--import"}, CodeSuffix: []string{".py"},
	}
	set := func(r integrity.Interpreter) {
		l.table.Interpreters = []integrity.Interpreter{r}
		l.apply()
	}
	set(rule)
	strict := rule
	strict.Reads = integrity.ReadsStrict
	strict.DataPaths = []string{l.dir + "/data", "/dev/", "/proc/", "/sys/"}
	check := func(name string, want bool, args ...string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			err := l.role("read", args...)
			if (err == nil) != want {
				t.Errorf("works: %v (%v), want %v", err == nil, err, want)
				if err != nil {
					t.Logf("%+v", <-l.events)
				}
			}
		})
	}
	check("listed script", true, listed)
	check("unlisted script", false, unlisted)
	check("unlisted script through a link", false, link)
	check("named file of any suffix is code", false, data)
	check("inline code", false, "-c", "code")
	check("inline code in a cluster", false, "-Ic", "code")
	check("inline code, long", false, "--eval=code")
	check("option with an argument, then the script", true, "-W", "c", listed)
	c := l.command("/proc/self/exe")
	c.Env = append(os.Environ(), "ENFORCE_TEST_ROLE=read")
	r, w := io.Pipe()
	w.Close()
	c.Stdin = r
	if err := c.Run(); err == nil {
		t.Error("code from a pipe was accepted")
	}
	set(strict)
	check("strict: listed script", true, listed)
	check("strict: named data is still code", false, data)
}

func (l *lab) digest(content []byte) integrity.Digest {
	d := l.allow(content, 0, 0)
	if string(content) != string(tinyELF(0)) {
		delete(l.table.Entries, integrity.Key{Digest: d})
	}
	return d
}

func (l *lab) drain() {
	for {
		select {
		case <-l.events:
		default:
			return
		}
	}
}
