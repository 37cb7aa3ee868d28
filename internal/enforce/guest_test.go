package enforce

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

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
		if os.Getenv("RINGWALL_GUEST") != "" {
			t.Fatal(err) // a guest is there for these tests
		}
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
}

// tinyELF is a static program that exits with 0.
func tinyELF() []byte { return canaryProgram(runtime.GOARCH, "tiny") }

// lab is an engine confined to one cgroup, with the test program listed. All
// tests share one engine, because loading takes seconds in an emulated guest.
type lab struct {
	t      *testing.T
	e      *Engine
	dir    string
	cgroup string
	group  *os.File // its directory
	table  integrity.Table
	events chan Event
	pause  *sync.Mutex // held: events are not read
}

// testPins is where it is pinned.
const testPins = "/run/ringwall-test/bpf"

// sharedEngine opens the engine that most tests use; it stays until the test
// program ends.
var sharedEngine = sync.OnceValues(func() (*lab, error) {
	l := &lab{cgroup: "/sys/fs/cgroup/rw-lab", events: make(chan Event, 1<<14), pause: &sync.Mutex{}}
	if err := os.Mkdir(l.cgroup, 0o755); err != nil {
		return nil, err
	}
	var err error
	if l.group, err = os.Open(l.cgroup); err != nil {
		return nil, err
	}
	start := time.Now()
	e, err := Open(Options{ScopeCgroup: l.cgroup, PinDir: testPins})
	if err != nil {
		return nil, err
	}
	fmt.Printf("engine of %d programs opened in %v\n", len(e.links), time.Since(start).Round(time.Millisecond))
	for name, link := range e.links {
		if info, err := link.Info(); err == nil && os.Getenv("ENFORCE_TEST_VERIFIER") != "" {
			if p, err := ebpf.NewProgramFromID(info.Program); err == nil {
				if pi, err := p.Info(); err == nil {
					n, _ := pi.VerifiedInstructions()
					fmt.Printf("%-22s %7d verified\n", name, n)
				}
				p.Close()
			}
		}
	}
	l.e = e
	go func() {
		_ = e.Events(context.Background(), func(ev Event) {
			l.pause.Lock()
			defer l.pause.Unlock()
			select {
			case l.events <- ev:
			default: // nobody looks at them
			}
		})
	}()
	return l, e.AdoptSelf()
})

func newLab(t *testing.T) *lab {
	t.Helper()
	needKernel(t)
	shared, err := sharedEngine()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, e: shared.e, dir: t.TempDir(), cgroup: shared.cgroup, group: shared.group, events: shared.events, pause: shared.pause, table: strictTable()}
	l.allow(l.read("/proc/self/exe"), 0, 0)
	l.apply()
	l.drain()
	return l
}

// strictTable enforces everything and lists nothing but the canary.
func strictTable() integrity.Table {
	t := integrity.Table{Epoch: 7, Entries: map[integrity.Key]integrity.Entry{}}
	for k := range t.Modes {
		t.Modes[k] = integrity.ModeEnforce
	}
	t.Process = integrity.ProcessRules{Memory: integrity.ModeEnforce, Ptrace: integrity.ModeEnforce, BlockWrites: integrity.ModeEnforce, CodeWrites: integrity.ModeEnforce}
	t.Entries[integrity.Key{Digest: CanaryDigest()}] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindExec, integrity.KindLibrary)}
	return t
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

// measure makes the kernel know the content of files, as the agent must where
// an interpreter's open comes too early for that.
func (l *lab) measure(paths ...string) {
	l.t.Helper()
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Cleanup(func() { f.Close() })
		if err := l.e.Measure(f); err != nil {
			l.t.Fatal(err)
		}
	}
}

// run executes a command inside the scope.
func (l *lab) run(argv ...string) error { return l.command(argv...).Run() }

func (l *lab) command(argv ...string) *exec.Cmd {
	l.t.Helper()
	c := exec.Command(argv[0], argv[1:]...)
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(l.group.Fd())}
	return c
}

// role runs this test program inside the scope as a child with a role.
func (l *lab) role(role string, args ...string) error { return l.roleCommand(role, args...).Run() }

func (l *lab) roleCommand(role string, args ...string) *exec.Cmd {
	c := l.command(append([]string{"/proc/self/exe"}, args...)...)
	c.Env = append(os.Environ(), "ENFORCE_TEST_ROLE="+role)
	return c
}

// logEvents shows what the kernel said lately.
func (l *lab) logEvents() {
	time.Sleep(200 * time.Millisecond)
	for {
		select {
		case ev := <-l.events:
			l.t.Logf("event: %v %v refused=%v errno=%d path=%q detail=%q", ev.Kind, ev.Reason, ev.Refused, ev.Errno, ev.Path, ev.Detail)
		default:
			return
		}
	}
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
