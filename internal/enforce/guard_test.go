package enforce

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// target is what the attacks of TestGuard aim at, handed over by environment.
type target struct {
	dir    string // guarded; holds the file policy
	pid    int    // the agent
	cgroup string // the agent's
	pins   string
	mapID  int
}

func (g target) env() []string {
	return append(os.Environ(), "ENFORCE_TEST_ROLE=attack", "G_DIR="+g.dir, "G_PID="+strconv.Itoa(g.pid), "G_CGROUP="+g.cgroup, "G_PINS="+g.pins, "G_MAP="+strconv.Itoa(g.mapID))
}

func targetFromEnv() target {
	pid, _ := strconv.Atoi(os.Getenv("G_PID"))
	id, _ := strconv.Atoi(os.Getenv("G_MAP"))
	return target{dir: os.Getenv("G_DIR"), pid: pid, cgroup: os.Getenv("G_CGROUP"), pins: os.Getenv("G_PINS"), mapID: id}
}

func openFor(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

// fileAttacks change guarded state.
func fileAttacks(g target) map[string]func() error {
	policy, outside := g.dir+"/policy", filepath.Dir(g.dir)+"/outside"
	return map[string]func() error{
		"open for writing":      func() error { return openFor(policy, unix.O_WRONLY) },
		"open and truncate":     func() error { return openFor(policy, unix.O_RDONLY|unix.O_TRUNC) },
		"create":                func() error { return openFor(g.dir+"/new", unix.O_CREAT|unix.O_WRONLY) },
		"create unnamed":        func() error { return openFor(g.dir, unix.O_TMPFILE|unix.O_WRONLY) },
		"unlink":                func() error { return unix.Unlink(policy) },
		"rename away":           func() error { return unix.Rename(policy, outside+"2") },
		"rename over":           func() error { return unix.Rename(outside, policy) },
		"rename the directory":  func() error { return unix.Rename(g.dir, g.dir+"2") },
		"rename one above":      func() error { return unix.Rename(filepath.Dir(g.dir), filepath.Dir(g.dir)+"2") },
		"link out":              func() error { return unix.Link(policy, outside+"3") },
		"link in":               func() error { return unix.Link(outside, g.dir+"/link") },
		"symlink":               func() error { return unix.Symlink("/", g.dir+"/symlink") },
		"mknod":                 func() error { return unix.Mknod(g.dir+"/node", unix.S_IFIFO|0o600, 0) },
		"mkdir":                 func() error { return unix.Mkdir(g.dir+"/sub", 0o700) },
		"chmod":                 func() error { return unix.Chmod(policy, 0o777) },
		"chmod the directory":   func() error { return unix.Chmod(g.dir, 0o777) },
		"chown":                 func() error { return unix.Chown(policy, 1, 1) },
		"truncate":              func() error { return unix.Truncate(policy, 0) },
		"setxattr":              func() error { return unix.Setxattr(policy, "trusted.x", []byte("x"), 0) },
		"removexattr":           func() error { return unix.Removexattr(policy, "trusted.x") },
		"chattr":                func() error { return setFlags(policy) },
		"mount over":            func() error { return unix.Mount("x", g.dir, "tmpfs", 0, "") },
		"mount over one above":  func() error { return unix.Mount("x", filepath.Dir(g.dir), "tmpfs", 0, "") },
		"bind over, as private": func() error { return unix.Mount("/", filepath.Dir(g.dir), "", unix.MS_BIND|unix.MS_PRIVATE, "") },
		"unmount it all":        func() error { return unix.Unmount(filepath.Dir(filepath.Dir(g.dir)), unix.MNT_DETACH) },
		"pivot_root":            func() error { return unix.PivotRoot("/tmp", "/tmp") },
		"unlink a pin":          func() error { return unix.Unlink(g.pins + "/" + engineMapControl) },
		"rename a pin":          func() error { return unix.Rename(g.pins+"/link_rw_exec", g.pins+"/x") },
		"unmount the pins":      func() error { return unix.Unmount(g.pins, unix.MNT_DETACH) },
		"mount over the pins":   func() error { return unix.Mount("x", g.pins, "tmpfs", 0, "") },
		"open a map by its pin": func() error { _, err := ebpf.LoadPinnedMap(g.pins+"/"+engineMapControl, nil); return err },
		"open a map by its id":  func() error { _, err := ebpf.NewMapFromID(ebpf.MapID(g.mapID)); return err },
		"switch ftrace off":     func() error { return openFor("/proc/sys/kernel/ftrace_enabled", unix.O_WRONLY) },
	}
}

// processAttacks act on the agent's process.
func processAttacks(g target) map[string]func() error {
	proc := fmt.Sprintf("/proc/%d", g.pid)
	return map[string]func() error{
		"kill":           func() error { return unix.Kill(g.pid, unix.SIGKILL) },
		"stop":           func() error { return unix.Kill(g.pid, unix.SIGSTOP) },
		"terminate":      func() error { return unix.Kill(g.pid, unix.SIGTERM) },
		"seize":          func() error { return unix.PtraceSeize(g.pid) },
		"write memory":   func() error { return writeMemory(g.pid) },
		"take a file":    func() error { return takeFile(g.pid) },
		"prlimit":        func() error { return unix.Prlimit(g.pid, unix.RLIMIT_CPU, &unix.Rlimit{Cur: 1, Max: 1}, nil) },
		"nice":           func() error { return unix.Setpriority(unix.PRIO_PROCESS, g.pid, 19) },
		"affinity":       func() error { var s unix.CPUSet; s.Set(0); return unix.SchedSetaffinity(g.pid, &s) },
		"ioprio":         func() error { return ioprio(g.pid) },
		"oom_score_adj":  func() error { return openFor(proc+"/oom_score_adj", unix.O_WRONLY) },
		"comm of thread": func() error { return openFor(fmt.Sprintf("%s/task/%d/comm", proc, g.pid), unix.O_WRONLY) },
		"cgroup.kill":    func() error { return openFor(g.cgroup+"/cgroup.kill", unix.O_WRONLY) },
		"cgroup.freeze":  func() error { return openFor(g.cgroup+"/cgroup.freeze", unix.O_WRONLY) },
		"cgroup.procs":   func() error { return openFor(g.cgroup+"/cgroup.procs", unix.O_WRONLY) },
		"cgroup limit":   func() error { return openFor(g.cgroup+"/cgroup.max.depth", unix.O_WRONLY) },
		"cgroup above":   func() error { return openFor(filepath.Dir(g.cgroup)+"/cgroup.freeze", unix.O_WRONLY) },
	}
}

func setFlags(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := uint32(0)
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x40086602, uintptr(unsafe.Pointer(&flags)))
	if e != 0 {
		return e
	}
	return nil
}

func writeMemory(pid int) error {
	b := make([]byte, 1)
	_, err := unix.ProcessVMWritev(pid, []unix.Iovec{{Base: &b[0], Len: 1}}, []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&b[0])), Len: 1}}, 0)
	return err
}

func takeFile(pid int) error {
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	_, err = unix.PidfdGetfd(p, 1, 0)
	return err
}

func ioprio(pid int) error {
	_, _, e := unix.Syscall(unix.SYS_IOPRIO_SET, 1, uintptr(pid), 3<<13)
	if e != 0 {
		return e
	}
	return nil
}

// attackRole is the child's side. The attack's name is the last argument.
func attackRole() int {
	g, name := targetFromEnv(), os.Args[len(os.Args)-1]
	for _, all := range []map[string]func() error{fileAttacks(g), processAttacks(g)} {
		if do := all[name]; do != nil {
			err := do()
			if err != nil {
				fmt.Fprintln(os.Stderr, name+":", err)
			}
			return code(err)
		}
	}
	return 98
}

// guarded puts the guards up around a fresh state directory and this process.
func guarded(t *testing.T) (*lab, target) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), integrity.RoleAgent, 0)
	l.apply()
	g := target{dir: l.mount("state", "mounted", "tmpfs", 0, "") + "/above/state", pid: os.Getpid(), cgroup: "/sys/fs/cgroup/rw-above/rw-agent", pins: testPins}
	for _, dir := range []string{g.dir, g.cgroup} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(g.cgroup+"/cgroup.procs", []byte("0"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{"state/policy": "original", "outside": "evil"} {
		if err := os.WriteFile(filepath.Dir(g.dir)+"/"+path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Setxattr(g.dir+"/policy", "trusted.x", []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	info, err := l.e.objs.Control.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	g.mapID = int(id)
	if err := l.e.Guard(g.dir); err != nil {
		t.Fatal(err)
	}
	if err := l.e.Protect(); err != nil {
		t.Fatal(err)
	}
	return l, g
}

// attack runs a child, outside the scope: the guards hold there too.
func (g target) attack(set func(*exec.Cmd), args ...string) error {
	c := exec.Command("/proc/self/exe", args...)
	c.Env = g.env()
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	if set != nil {
		set(c)
	}
	if err := c.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, said.Bytes())
	}
	return nil
}

func TestGuard(t *testing.T) {
	l, g := guarded(t)
	for kind, all := range map[string]map[string]func() error{"file": fileAttacks(g), "process": processAttacks(g)} {
		for name := range all {
			t.Run(kind+" "+name, func(t *testing.T) {
				if err := g.attack(nil, "sign", name); !refusedWith(err, 1) {
					t.Errorf("not refused: %v", err)
				}
			})
		}
	}
	if b := l.read(g.dir + "/policy"); string(b) != "original" {
		t.Errorf("the guarded file holds %q", b)
	}
	t.Run("chosen signal for a descriptor", func(t *testing.T) {
		l.drain()
		if err := g.attack(func(c *exec.Cmd) { c.Env = append(c.Env, "ENFORCE_TEST_ROLE=sigio") }); err != nil {
			t.Fatal(err)
		}
		l.event(GuardSignal) // and this process is still there to see it
	})
	t.Run("reading is allowed", func(t *testing.T) {
		if err := g.attack(func(c *exec.Cmd) { c.Env = append(c.Env, "ENFORCE_TEST_ROLE=inspect") }); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"open for writing", "create", "chmod", "mkdir", "symlink", "open a map by its pin", "oom_score_adj"} {
		t.Run("the agent may "+name, func(t *testing.T) {
			if err := g.attack(nil, "agent", name); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("no agent in another mount namespace", func(t *testing.T) {
		err := g.attack(func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS} }, "agent", "open for writing")
		if !refusedWith(err, 1) {
			t.Errorf("not refused: %v", err)
		}
	})
	t.Run("no agent in a chroot", func(t *testing.T) {
		root := l.dir + "/root"
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("/", root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unmount(root, unix.MNT_DETACH) }()
		err := g.attack(func(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Chroot: root} }, "agent", "open for writing")
		if !refusedWith(err, 1) {
			t.Errorf("not refused: %v", err)
		}
	})
	t.Run("no agent under a debugger", func(t *testing.T) { traced(t, g) })
	t.Run("unguarded again", func(t *testing.T) {
		if err := l.e.Unguard(g.dir); err != nil {
			t.Fatal(err)
		}
		if err := g.attack(nil, "sign", "open for writing"); err != nil {
			t.Error(err)
		}
		if err := l.e.Guard(g.dir); err != nil {
			t.Fatal(err)
		}
	})
}

// traced starts the agent as the child of a debugger.
func traced(t *testing.T, g target) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := os.StartProcess("/proc/self/exe", []string{"exe", "agent", "open for writing"}, &os.ProcAttr{
		Env: g.env(), Sys: &syscall.SysProcAttr{Ptrace: true}, Files: []*os.File{nil, os.Stdout, os.Stderr},
	})
	if err != nil {
		t.Fatal(err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(p.Pid, &ws, 0, nil); err != nil || !ws.Stopped() {
		t.Fatalf("not traced: %v %v", ws, err)
	}
	if err := unix.PtraceDetach(p.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(p.Pid, &ws, 0, nil); err != nil {
		t.Fatal(err)
	}
	if ws.ExitStatus() != 1 {
		t.Errorf("exit %d, want a refusal", ws.ExitStatus())
	}
}

// sigioRole has the kernel send SIGKILL to the agent for a pipe.
func sigioRole() int {
	g := targetFromEnv()
	var p [2]int
	if unix.Pipe2(p[:], 0) != nil {
		return 10
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETOWN, g.pid); err != nil {
		return 11
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETSIG, int(unix.SIGKILL)); err != nil {
		return 12
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETFL, unix.O_ASYNC); err != nil {
		return 13
	}
	if _, err := unix.Write(p[1], []byte("x")); err != nil {
		return 14
	}
	return 0
}

func inspectRole() int {
	s, err := Inspect(targetFromEnv().pins)
	if err != nil || !s.Protected || len(s.Programs) < 30 || s.Epoch != 7 || s.Counters.Refused == 0 {
		fmt.Fprintf(os.Stderr, "%+v %v\n", s, err)
		return 1
	}
	return 0
}

func TestStatusAndCanary(t *testing.T) {
	l := newLab(t)
	l.table.PolicyDigest = [32]byte{1, 2, 3}
	l.apply()
	expect := func(want State) {
		t.Helper()
		s, err := l.e.Status()
		if err != nil {
			t.Fatal(err)
		}
		if s.State() != want {
			t.Errorf("state %s, want %s: %+v", s.State(), want, s)
		}
	}
	if err := l.e.Canary(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(StateEnforcing)
	if ev := l.event(Unlisted); !l.e.IsCanary(ev) {
		t.Errorf("not known as a canary: %+v", ev)
	}
	if l.e.IsCanary(Event{}) {
		t.Error("an event without a digest is a canary")
	}
	s, err := l.e.Status()
	if err != nil {
		t.Fatal(err)
	}
	if s.Policy != l.table.PolicyDigest || s.Entries != uint64(len(l.table.Entries)) || time.Since(s.Applied) > time.Hour || s.ScopeCgroup == 0 {
		t.Errorf("status %+v", s)
	}
	l.table.Modes[1] = 1
	l.apply()
	expect(StateUnproven)
	if err := l.e.Canary(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(StateAuditing)
	l.table.Modes[1] = 2
	l.apply()
	if err := l.e.Relax(time.Hour); err != nil {
		t.Fatal(err)
	}
	expect(StateRelaxed)
	if err := l.e.Canary(t.Context()); err != nil {
		t.Error(err)
	}
	if err := l.run(l.file("relaxed", append(tinyELF(), "unlisted"...))); err != nil {
		t.Errorf("break-glass: %v", err)
	}
	if err := l.e.Relax(0); err != nil {
		t.Fatal(err)
	}
	expect(StateUnproven)
	// a policy that forgets the canary cannot be proved
	clear(l.table.Entries)
	l.allow(l.read("/proc/self/exe"), 0, 0)
	l.apply()
	if err := l.e.Canary(t.Context()); err == nil {
		t.Error("a canary passed although its program is not listed")
	}
	// where nothing is enforced the canary must say so
	blind := &Engine{opts: Options{ScopeCgroup: "/sys/fs/cgroup"}, objs: l.e.objs}
	if err := blind.Canary(t.Context()); err == nil {
		t.Error("a canary passed outside the scope")
	}
	expect(StateUnproven)
}

func TestSupport_whileEnforcing(t *testing.T) {
	l := newLab(t)
	if err := l.role("support"); err != nil {
		t.Error(err)
	}
}

func TestImaHash(t *testing.T) {
	for cmdline, want := range map[string]int{
		"": 0, "quiet ima_hash=sha256": 0, "ima_hash=sha512 quiet\n": 1, "ima_hash=sha1 ima_hash=sha256": 0, "ima_hash=": 1, "x_ima_hash=md5": 0,
	} {
		if got := imaHash(cmdline); len(got) != want {
			t.Errorf("%q: %v, want %d", cmdline, got, want)
		}
	}
}

func TestOpen_unsupported(t *testing.T) {
	if Support().Err() == nil {
		t.Skip("this kernel can enforce")
	}
	if _, err := Open(Options{}); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("opened, or another error: %v", err)
	}
}
