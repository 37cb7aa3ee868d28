package enforce

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

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
	case "support": // 0: Ringwall is named as what is in the way
		p := support(testPins)
		if len(p) != 1 || p[0].What != "Ringwall" {
			fmt.Println(p)
			return 1
		}
		return 0
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
	case "map-and-write", "mmap-and-read": // map one file executable, then open another
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		if mapFile(f, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE) != nil {
			return 11
		}
		how := os.O_RDONLY
		if role == "map-and-write" {
			how = os.O_RDWR
		}
		w, err := os.OpenFile(args[1], how, 0)
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
	case "attack":
		return attackRole()
	case "sigio":
		return sigioRole()
	case "inspect":
		return inspectRole()
	case "memory":
		return code(memoryRole(args[0]))
	case "personality", "personality-query":
		persona := uintptr(0xffffffff)
		if role == "personality" {
			persona = 0x0400000
		}
		if _, _, e := syscall.RawSyscall(unix.SYS_PERSONALITY, persona, 0, 0); e != 0 {
			return 1
		}
		return 0
	case "ring", "ring-async":
		return code(ringOpen(args[len(args)-1], role == "ring-async"))
	case "flood":
		n, _ := strconv.Atoi(args[0])
		return flood(n)
	case "finit-module":
		f, err := os.Open(args[0])
		if err != nil {
			return 10
		}
		return code(unix.FinitModule(int(f.Fd()), "", 0))
	case "agent":
		return agentRole()
	case "cost-open", "cost-exec", "relay-cost-open", "relay-cost-exec":
		return costRole(role, args[0])
	case "relay":
		return relayRole()
	case "told":
		return toldRole()
	case "fuse":
		fuseServer(os.NewFile(3, "fuse"), canaryProgram("amd64", canaryMark))
		return 0
	case "nothing":
		return 0
	case "read-absolute":
		dir, err := os.Getwd()
		if err != nil {
			return 10
		}
		f, err := os.Open(dir + "/" + args[0])
		if err == nil {
			f.Close()
		}
		return code(err)
	case "read-and-wait": // say so, then hold the file open
		f, err := os.Open(args[0])
		if err != nil {
			return code(err)
		}
		fmt.Print("x")
		time.Sleep(time.Hour)
		f.Close()
	case "write":
		f, err := os.OpenFile(args[0], os.O_WRONLY, 0)
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
	good, evil := tinyELF(), append(tinyELF(), "unlisted"...)
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
		if ev.Digest != integrity.Digest(sha256.Sum256(evil)) {
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
		k := integrity.Key{Digest: integrity.Digest(sha256.Sum256(good))}
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
