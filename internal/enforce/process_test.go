package enforce

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// ringOpen opens a file through io_uring, from a worker thread if async.
func ringOpen(path string, async bool) error {
	var params [120]byte // struct io_uring_params
	fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params[0])), 0)
	if e != 0 {
		return e
	}
	u32 := func(at int) uint32 { return *(*uint32)(unsafe.Pointer(&params[at])) }
	// offsets of sq_off (40) and cq_off (80) in struct io_uring_params
	sqTail, sqArray, cqTail, cqes := u32(44), u32(64), u32(84), u32(100)
	ring, err := unix.Mmap(int(fd), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	sqe, err := unix.Mmap(int(fd), 0x10000000, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	sqe[0] = 18 // IORING_OP_OPENAT
	if async {
		sqe[1] = 1 << 4 // IOSQE_ASYNC
	}
	at := int32(unix.AT_FDCWD)
	*(*int32)(unsafe.Pointer(&sqe[4])) = at
	*(*uint64)(unsafe.Pointer(&sqe[16])) = uint64(uintptr(unsafe.Pointer(name)))
	*(*uint32)(unsafe.Pointer(&ring[sqArray])) = 0
	*(*uint32)(unsafe.Pointer(&ring[sqTail])) = 1
	if _, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, fd, 1, 1, 1, 0, 0); e != 0 {
		return e
	}
	if *(*uint32)(unsafe.Pointer(&ring[cqTail])) != 1 {
		return unix.EIO
	}
	if res := *(*int32)(unsafe.Pointer(&ring[cqes+8])); res < 0 {
		return unix.Errno(-res)
	}
	return nil
}

func TestIOUring(t *testing.T) {
	l := newLab(t)
	l.allow(l.read("/proc/self/exe"), 0, 1)
	l.table.Interpreters = []integrity.Interpreter{pythonRule()}
	l.apply()
	listed, unlisted := l.file("listed.py", []byte("print(4)")), l.file("unlisted.py", []byte("print(5)"))
	l.allow([]byte("print(4)"), 0, 0)
	l.apply()
	l.measure(listed, unlisted)
	for _, way := range []string{"ring", "ring-async"} {
		if err := l.role(way, listed); err != nil {
			t.Errorf("%s: a listed script: %v", way, err)
			l.logEvents()
		}
		l.drain()
		if err := l.role(way, listed, unlisted); !refusedWith(err, 1) {
			t.Errorf("%s: an unlisted script: %v", way, err)
		}
		l.event(Unlisted)
	}
}

// systemWide takes the scope off for the rest of the test. Everything that the
// guest runs is this test program.
func (l *lab) systemWide() {
	l.t.Helper()
	var was engineSteering
	if err := l.e.change(func(st *engineSteering) { was = *st; st.ScopeCgroup, st.ScopeLevel = 0, 0 }); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = l.e.change(func(st *engineSteering) { st.ScopeCgroup, st.ScopeLevel = was.ScopeCgroup, was.ScopeLevel })
	})
}

// Programs that the kernel starts by itself are judged like all others.
func TestUserModeHelper(t *testing.T) {
	l := newLab(t)
	crash := bytes.Replace(elf(64, 6), []byte{0x31, 0xff, 0xb8}, []byte{0x0f, 0x0b, 0xb8}, 1) // an undefined instruction
	l.allow(crash, 0, 0)
	l.apply()
	crasher := l.file("crasher", crash)
	l.systemWide()
	for setting, trigger := range map[string]func(){
		"/proc/sys/kernel/modprobe":     func() { _, _ = unix.Socket(unix.AF_X25, unix.SOCK_SEQPACKET, 0) },
		"/proc/sys/kernel/core_pattern": func() { _ = l.run(crasher) },
	} {
		helper := l.file("helper"+strings.ReplaceAll(setting, "/", "-"), append(tinyELF(), setting...))
		was := l.read(setting)
		value := helper
		if strings.Contains(setting, "core") {
			value = "|" + helper
		}
		if err := os.WriteFile(setting, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
		l.drain()
		trigger()
		if ev := l.event(Unlisted); ev.Path != helper || !ev.Refused {
			t.Errorf("%s: event %+v", setting, ev)
		}
		if err := os.WriteFile(setting, was, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A modprobe that decompresses by itself hands the module over from memory.
func TestModules(t *testing.T) {
	l := newLab(t)
	if err := l.role("init-module"); !refusedWith(err, 1) {
		t.Errorf("without the role: %v", err)
	}
	l.event(FromMemory)
	l.allow(l.read("/proc/self/exe"), integrity.RoleModules, 0)
	l.apply()
	signed := func(v uint32) {
		if err := l.e.change(func(st *engineSteering) { st.SignedModules = v }); err != nil {
			t.Fatal(err)
		}
	}
	defer signed(signedModules())
	for v, want := range map[uint32]int{0: 1, 1: 2} { // 2: the kernel finds that it is no module
		signed(v)
		if err := l.role("init-module"); !refusedWith(err, want) {
			t.Errorf("with the role, signatures %d: %v, want exit code %d", v, err, want)
		}
	}
	fake := l.file("fake.ko", append([]byte("\x7fELF"), make([]byte, 4096)...))
	l.drain()
	if err := l.role("finit-module", fake); !refusedWith(err, 1) {
		t.Errorf("an unlisted module file: %v", err)
	}
	if ev := l.event(Unlisted); ev.Kind != integrity.KindModule {
		t.Errorf("event %+v", ev)
	}
	l.allow(l.read(fake), 0, 0)
	l.apply()
	if err := l.role("finit-module", fake); !refusedWith(err, 2) {
		t.Errorf("a listed module file: %v", err)
	}
}

// The real insmod, where the guest has it: Debian 12's decompresses .ko.xz by
// itself and uses init_module(2). RINGWALL_ADD brings it and a module along.
func TestInsmod(t *testing.T) {
	l := newLab(t)
	if err := l.e.change(func(st *engineSteering) { st.SignedModules = 1 }); err != nil {
		t.Fatal(err)
	}
	const kmod = "/usr/bin/kmod"
	modules, _ := filepath.Glob("/lib/modules/*/kernel/drivers/net/dummy.ko*")
	if _, err := os.Stat(kmod); err != nil || len(modules) == 0 {
		t.Skipf("SKIPPED, NOT TESTED: the guest has no %s or no module", kmod)
	}
	for _, pattern := range []string{"/lib/x86_64-linux-gnu/*", "/usr/lib/x86_64-linux-gnu/*", "/lib64/*"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
				l.allow(l.read(f), 0, 0)
				l.measure(f)
			}
		}
	}
	module := modules[0]
	rule := integrity.Interpreter{Name: "kmod", Reads: integrity.ReadsStrict, Stdin: 31, DataPaths: []string{"/proc/", "/sys/", "/etc/"}}
	l.table.Interpreters = []integrity.Interpreter{rule}
	insmod := func() error {
		c := l.command(kmod, module)
		c.Args[0] = "insmod"
		return c.Run()
	}
	l.allow(l.read(kmod), 0, 1)
	listed := l.allow(l.read(module), 0, 0)
	key := integrity.Key{Digest: listed}
	l.table.Entries[key] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindModule)}
	l.apply()
	l.measure(module)
	if err := insmod(); err == nil {
		t.Error("insmod without the role read a module")
	}
	_ = unix.DeleteModule("dummy", 0)
	l.allow(l.read(kmod), integrity.RoleModules, 1)
	l.apply()
	if err := insmod(); err != nil {
		t.Errorf("listed, with the role: %v", err)
		l.logEvents()
	}
	_ = unix.DeleteModule("dummy", 0)
	delete(l.table.Entries, key)
	l.apply()
	if err := insmod(); err == nil {
		t.Error("an unlisted module was loaded")
	}
}

// Each hook that may be called without a file gets called so: some kernels
// crash on a test that their verifier took for needless.
func TestHooksWithoutFile(t *testing.T) {
	l := newLab(t)
	for range 3 {
		_ = l.role("memory", "anonymous") // mmap_file
		_ = l.role("init-module")         // kernel_load_data
	}
	dir := l.mount("none", "propagation", "tmpfs", 0, "")
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil { // sb_mount without a device
		t.Error(err)
	}
	if err := unix.Rename(l.file("a", nil), l.dir+"/negative"); err != nil { // a target without an inode
		t.Error(err)
	}
	if f, err := os.CreateTemp(l.dir, "gone"); err == nil { // chmod of an unlinked file
		_ = os.Remove(f.Name())
		_ = f.Chmod(0o600)
		f.Close()
	}
}

// flood makes the kernel raise n events as fast as it can.
func flood(n int) int {
	for range n {
		if f, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0); err == nil {
			f.Close()
			return 1
		}
	}
	return 0
}

// Events that find no room are lost, and counted; verdicts are not.
func TestEventFlood(t *testing.T) {
	l := newLab(t)
	before, err := l.e.Counters()
	if err != nil {
		t.Fatal(err)
	}
	l.pause.Lock()
	const n = 12000
	if err := l.role("flood", fmt.Sprint(n)); err != nil {
		l.pause.Unlock()
		t.Fatal("something was not refused", err)
	}
	after, err := l.e.Counters()
	l.drain()
	l.pause.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	drops := after.Dropped - before.Dropped
	if after.Refused-before.Refused < n || after.Raised-before.Raised < n || drops == 0 {
		t.Fatalf("counters before %+v, after %+v", before, after)
	}
	// one more event tells the last number
	_ = l.role("proc-mem")
	var first, last, got uint64
	for last <= after.Raised {
		select {
		case ev := <-l.events:
			if ev.Seq <= before.Raised {
				continue
			}
			if first == 0 {
				first = ev.Seq
			}
			last = ev.Seq
			got++
		case <-time.After(30 * time.Second):
			t.Fatalf("events end at %d, raised %d", last, after.Raised)
		}
	}
	// the reader may have taken one before it was held up
	if missing := last - before.Raised - got; missing < drops || missing > drops+1 {
		t.Errorf("%d events are missing, %d were counted as lost", missing, drops)
	}
	t.Logf("%d of %d events were lost and counted", drops, n)
}

// relayRole starts a process that the engine knows nothing of: a child of one
// without roles. It says "x", waits for input and then makes memory executable.
func relayRole() int {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "ENFORCE_TEST_ROLE=told")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := c.Run(); err != nil {
		return c.ProcessState.ExitCode()
	}
	return 0
}

func toldRole() int {
	fmt.Print("x")
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return 10
	}
	return code(memoryRole("anonymous"))
}

// Programs that ran before the engine get the roles of their content.
func TestAdopt(t *testing.T) {
	for _, adopt := range []bool{false, true} {
		l := newLab(t)
		c := l.roleCommand("relay")
		c.Stdout = nil
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		l.allow(l.read("/proc/self/exe"), integrity.RoleJIT, 0)
		l.apply()
		if adopt {
			running, err := l.e.Adopt(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			listed := map[bool]int{}
			for _, r := range running {
				listed[r.Listed]++
			}
			if listed[true] < 2 || listed[false] < 1 { // the two children; process 1
				t.Errorf("running: %+v", running)
			}
		}
		if _, err := in.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := c.Wait(); (err == nil) != adopt {
			t.Errorf("adopted %v: %v", adopt, err)
		}
	}
}
