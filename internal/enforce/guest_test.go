package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// TestMain also serves as the child processes that the tests start: the role
// is in the environment.
func TestMain(m *testing.M) {
	if role := os.Getenv("ENFORCE_TEST_ROLE"); role != "" {
		os.Exit(playRole(role))
	}
	os.Exit(m.Run())
}

// needKernel skips, loudly, where the kernel cannot enforce. Every test that
// calls it runs in the QEMU guests of test/vm.
func needKernel(t *testing.T) {
	t.Helper()
	if err := Support().Err(); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
}

// tinyELF is a static program of some 140 bytes that exits with code.
func tinyELF(code byte) []byte {
	prog := []byte{0x31, 0xff, 0x40, 0xb7, code, 0xb8, 60, 0, 0, 0, 0x0f, 0x05} // xor edi,edi; mov dil,code; mov eax,60; syscall
	b := make([]byte, 0x78, 0x100)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[0x10:], 2)
	le.PutUint16(b[0x12:], 62)
	le.PutUint32(b[0x14:], 1)
	le.PutUint64(b[0x18:], 0x400078)
	le.PutUint64(b[0x20:], 0x40)
	le.PutUint16(b[0x34:], 0x40)
	le.PutUint16(b[0x36:], 0x38)
	le.PutUint16(b[0x38:], 1)
	le.PutUint32(b[0x40:], 1)
	le.PutUint32(b[0x44:], 5)
	le.PutUint64(b[0x50:], 0x400000)
	le.PutUint64(b[0x58:], 0x400000)
	size := uint64(0x78 + len(prog))
	le.PutUint64(b[0x60:], size)
	le.PutUint64(b[0x68:], size)
	le.PutUint64(b[0x70:], 0x1000)
	return append(b, prog...)
}

// lab is an engine confined to one cgroup, with the test program listed.
type lab struct {
	t      *testing.T
	e      *Engine
	dir    string
	cgroup string
	table  integrity.Table
	events chan Event
}

func newLab(t *testing.T) *lab {
	t.Helper()
	needKernel(t)
	l := &lab{t: t, dir: t.TempDir(), events: make(chan Event, 1024)}
	l.cgroup = filepath.Join("/sys/fs/cgroup", fmt.Sprintf("rw-%d", time.Now().UnixNano()))
	if err := os.Mkdir(l.cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(l.cgroup) })
	e, err := Open(Options{ScopeCgroup: l.cgroup})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	l.e = e
	l.table = integrity.Table{Epoch: 7, Entries: map[integrity.Key]integrity.Entry{}}
	for k := range l.table.Modes {
		l.table.Modes[k] = integrity.ModeEnforce
	}
	l.table.Process = integrity.ProcessRules{Memory: integrity.ModeEnforce, Ptrace: integrity.ModeEnforce, BlockWrites: integrity.ModeEnforce, CodeWrites: integrity.ModeEnforce}
	l.allow(l.read("/proc/self/exe"), 0, 0)
	l.apply()
	go func() { _ = e.Events(t.Context(), func(ev Event) { l.events <- ev }) }()
	return l
}

func (l *lab) read(path string) []byte {
	l.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

func (l *lab) allow(content []byte, roles integrity.Role, interpreter uint8) integrity.Digest {
	d := integrity.Digest(sha256.Sum256(content))
	l.table.Entries[integrity.Key{Digest: d}] = integrity.Entry{
		Kinds: integrity.SetOf(integrity.KindExec, integrity.KindLibrary, integrity.KindScript, integrity.KindModule), Roles: roles, Interpreter: interpreter,
	}
	return d
}

func (l *lab) apply() {
	l.t.Helper()
	if err := l.e.Apply(&l.table); err != nil {
		l.t.Fatal(err)
	}
}

// file writes content into the lab's directory and returns its path.
func (l *lab) file(name string, content []byte) string {
	l.t.Helper()
	p := filepath.Join(l.dir, name)
	if err := os.WriteFile(p, content, 0o755); err != nil {
		l.t.Fatal(err)
	}
	return p
}

// run executes a command inside the scope.
func (l *lab) run(argv ...string) error { return l.command(argv...).Run() }

func (l *lab) command(argv ...string) *exec.Cmd {
	l.t.Helper()
	fd, err := unix.Open(l.cgroup, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = unix.Close(fd) })
	c := exec.Command(argv[0], argv[1:]...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	return c
}

// role runs this test program inside the scope as a child with a role.
func (l *lab) role(role string, args ...string) error {
	c := l.command(append([]string{"/proc/self/exe"}, args...)...)
	c.Env = append(os.Environ(), "ENFORCE_TEST_ROLE="+role)
	return c.Run()
}

// event waits for the next event with this reason.
func (l *lab) event(want Reason) Event {
	l.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case ev := <-l.events:
			if ev.Reason == want {
				return ev
			}
			l.t.Logf("other event: %v %v %s", ev.Kind, ev.Reason, ev.Path)
		case <-deadline:
			l.t.Fatalf("no %v event", want)
		}
	}
}

func refused(err error) bool { return err != nil }
