package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// kernelCode are techniques that get code into the kernel, or have the kernel start it: groups 31 to 34.
func kernelCode() []technique {
	const loaded = "the module is in /proc/modules"
	changed := func(id, title, stop string, run func(a *attempt, m module) error) technique {
		return technique{ID: id, Group: 31, As: asRoot, Title: title, Stop: stop, Ran: loaded, Run: withModule(run)}
	}
	helper := func(id, title string, run func(*attempt) error) technique {
		return technique{ID: id, Group: 33, As: asRoot, Title: title, Stop: byExec, Run: run}
	}
	return []technique{
		changed("module-file", "changed module by finit_module", byModule, func(a *attempt, m module) error { return m.finit(m.path) }),
		changed("module-memory", "changed module by init_module", byModule, func(a *attempt, m module) error {
			return unix.InitModule(m.raw, "")
		}),
		changed("module-memfd", "changed module in a memfd", byModule, func(a *attempt, m module) error {
			fd, err := memfdOf(m.raw, 0)
			if err != nil {
				return err
			}
			return unix.FinitModule(fd, "", 0)
		}),
		changed("module-insmod", "insmod", byModule, func(a *attempt, m module) error { return a.run("insmod", m.path) }),
		changed("module-force", "finit_module that ignores versions", byModule, func(a *attempt, m module) error {
			f, err := os.Open(m.path)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.FinitModule(int(f.Fd()), "", unix.MODULE_INIT_IGNORE_VERMAGIC|unix.MODULE_INIT_IGNORE_MODVERSIONS)
		}),
		changed("module-xz", "compressed module that the kernel unpacks", byModule, compressedModule),
		{ID: "modprobe-install", Group: 31, As: asRoot, Title: "modprobe with an install command", Stop: byArgument, Run: func(a *attempt) error {
			if err := os.Mkdir(a.path("conf"), 0o755); err != nil {
				return err
			}
			if _, err := a.write("conf/x.conf", "install attack_"+a.Token+" "+a.code("sh")); err != nil {
				return err
			}
			return a.run("modprobe", "-C", a.path("conf"), "attack_"+a.Token)
		}},
		{ID: "kexec-file", Group: 32, As: asRoot, Title: "changed kernel by kexec_file_load", Stop: byKexec, Ran: "a kernel is loaded", Limit: 60, Run: kexecFile},
		{ID: "kexec-memory", Group: 32, As: asRoot, Title: "code by kexec_load", Stop: byKexec, Ran: "a kernel is loaded", Run: kexecMemory},
		helper("helper-core", "core_pattern starts an unlisted program", corePattern(false)),
		helper("helper-core-shell", "core_pattern starts a shell with an unlisted script", corePattern(true)),
		helper("helper-modprobe", "the kernel's modprobe is an unlisted program", modprobePath),
		helper("helper-uevent", "uevent_helper", ueventHelper),
		helper("helper-cgroup", "release_agent of a cgroup v1 hierarchy", releaseAgent),
		helper("helper-request-key", "/sbin/request-key", requestKey),
		{ID: "bpf-load", Group: 34, As: asBoth, Title: "BPF program loaded (socket filter)", Stop: byBPF, Ran: "the kernel accepted the program", Run: func(a *attempt) error { return loadBPF(a, 1) }},
		{ID: "bpf-load-trace", Group: 34, As: asRoot, Title: "BPF program loaded (kprobe)", Stop: byBPF, Ran: "the kernel accepted the program", Run: func(a *attempt) error { return loadBPF(a, 2) }},
	}
}

// module is a real module of the running kernel with bytes appended: it works
// and nobody has authorised it.
type module struct {
	name, path string
	raw        []byte
}

func (m module) finit(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// moduleNames need no other module and drive no hardware.
func moduleNames() []string {
	return []string{"dummy", "ifb", "nlmon", "zlib_deflate", "bsd_comp", "crc8", "ts_kmp", "libcrc32c", "cordic"}
}

func findModule(root string, loaded string) (path string, err error) {
	want := map[string]bool{}
	for _, n := range moduleNames() {
		if !strings.Contains(loaded, n+" ") {
			want[n] = true
		}
	}
	found := ""
	err = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _, _ := strings.Cut(d.Name(), ".ko")
		if found == "" && !d.IsDir() && strings.Contains(d.Name(), ".ko") && want[strings.ReplaceAll(name, "-", "_")] {
			found = p
			return filepath.SkipAll
		}
		return nil
	})
	if err != nil || found == "" {
		return "", unavailable("no module to change below %s: %v", root, err)
	}
	return found, nil
}

// maxModule bounds the unpacked size of a module.
const maxModule = 16 << 20

func (a *attempt) changedModule() (module, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return module{}, err
	}
	loaded, err := os.ReadFile("/proc/modules")
	if err != nil {
		return module{}, unavailable("%v", err)
	}
	path, err := findModule("/lib/modules/"+unix.ByteSliceToString(u.Release[:])+"/kernel", string(loaded))
	if err != nil {
		return module{}, err
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return module{}, err
	}
	if strings.HasSuffix(path, ".xz") {
		r, err := xz.NewReader(bytes.NewReader(raw))
		if err != nil {
			return module{}, err
		}
		raw, err = io.ReadAll(io.LimitReader(r, maxModule))
		if err != nil {
			return module{}, err
		}
	}
	raw = append(raw, []byte("changed by the attack suite "+a.Token)...)
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	m := module{name: strings.ReplaceAll(name, "-", "_"), path: a.path("changed.ko"), raw: raw}
	return m, os.WriteFile(m.path, raw, 0o644)
}

func withModule(run func(a *attempt, m module) error) func(*attempt) error {
	return func(a *attempt) error {
		m, err := a.changedModule()
		if err != nil {
			return err
		}
		err = run(a, m)
		loaded, e := os.ReadFile("/proc/modules")
		if e != nil || !strings.Contains("\n"+string(loaded), "\n"+m.name+" ") {
			return errors.Join(err, errors.New("not in /proc/modules"))
		}
		return errors.Join(a.observed(), unix.DeleteModule(m.name, unix.O_NONBLOCK))
	}
}

func compressedModule(a *attempt, m module) error {
	const inKernel = 4 // MODULE_INIT_COMPRESSED_FILE
	var b bytes.Buffer
	// the kernel's decoder knows no CRC64
	w, err := xz.WriterConfig{CheckSum: xz.CRC32, DictCap: 1 << 20}.NewWriter(&b)
	if err != nil {
		return err
	}
	if _, err := w.Write(m.raw); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	p := a.path("changed.ko.xz")
	if err := os.WriteFile(p, b.Bytes(), 0o644); err != nil {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", inKernel)
}

func kexecLoaded(a *attempt) error {
	raw, err := os.ReadFile("/sys/kernel/kexec_loaded")
	if err != nil || strings.TrimSpace(string(raw)) != "1" {
		return errors.New("no kernel is loaded")
	}
	return a.observed()
}

func kexecFile(a *attempt) error {
	images, err := filepath.Glob("/boot/vmlinuz-*")
	if err != nil || len(images) == 0 {
		return unavailable("no /boot/vmlinuz-*")
	}
	raw, err := os.ReadFile(images[len(images)-1])
	if err != nil {
		return err
	}
	// the kernel's own signature no longer covers it; it is a kernel still
	raw = append(raw, []byte(a.Token)...)
	p := a.path("vmlinuz")
	if err := os.WriteFile(p, raw, 0o644); err != nil {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	const noInitramfs, unload = 4, 1
	line := [1]byte{}
	_, _, e := unix.Syscall6(unix.SYS_KEXEC_FILE_LOAD, f.Fd(), ^uintptr(0), 1, uintptr(unsafe.Pointer(&line[0])), noInitramfs, 0)
	if e != 0 {
		return fmt.Errorf("kexec_file_load: %w", e)
	}
	err = kexecLoaded(a)
	_, _, _ = unix.Syscall6(unix.SYS_KEXEC_FILE_LOAD, ^uintptr(0), ^uintptr(0), 0, 0, unload, 0)
	return err
}

func kexecMemory(a *attempt) error {
	code := make([]byte, 4096)
	segment := struct{ buf, size, mem, memsize uintptr }{uintptr(unsafe.Pointer(&code[0])), 4096, 64 << 20, 4096}
	const x86 = 62 << 16
	_, _, e := unix.Syscall6(unix.SYS_KEXEC_LOAD, 64<<20, 1, uintptr(unsafe.Pointer(&segment)), x86, 0, 0)
	runtime.KeepAlive(code)
	if e != 0 {
		return fmt.Errorf("kexec_load: %w", e)
	}
	err := kexecLoaded(a)
	_, _, _ = unix.Syscall6(unix.SYS_KEXEC_LOAD, 0, 0, 0, x86, 0, 0)
	return err
}

// setKernel writes a kernel setting and returns how to put it back.
func setKernel(path, value string) (func(), error) {
	old, err := os.ReadFile(path)
	if err != nil {
		return nil, unavailable("%v", err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return nil, err
	}
	return func() { _ = os.WriteFile(path, bytes.TrimSpace(old), 0) }, nil
}

func corePattern(shell bool) func(*attempt) error {
	return func(a *attempt) error {
		p, err := a.program("p")
		if err != nil {
			return err
		}
		value := "|" + p
		if shell {
			if p, err = a.write("s", a.code("sh")); err != nil {
				return err
			}
			value = "|/bin/sh " + p
		}
		if len(value) > 127 {
			return unavailable("scratch directory's name is too long for core_pattern")
		}
		back, err := setKernel("/proc/sys/kernel/core_pattern", value)
		if err != nil {
			return err
		}
		defer back()
		// a child that aborts; RLIMIT_CORE 0 keeps no core from a pipe, but 1 does
		big := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &big); err != nil {
			return err
		}
		if err := a.run(a.inKit("abort")); err == nil {
			return errors.New("the child did not crash")
		}
		return a.await(3 * time.Second)
	}
}

func modprobePath(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	back, err := setKernel("/proc/sys/kernel/modprobe", p)
	if err != nil {
		return err
	}
	defer back()
	// protocol families without a module: each makes the kernel ask for one
	for family := 50; family > 20 && !a.ran(); family-- {
		if fd, err := unix.Socket(family, unix.SOCK_RAW, 0); err == nil {
			unix.Close(fd)
		}
	}
	return a.await(2 * time.Second)
}

func ueventHelper(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	back, err := setKernel("/sys/kernel/uevent_helper", p)
	if err != nil {
		return err
	}
	defer back()
	if err := os.WriteFile("/sys/class/mem/null/uevent", []byte("change"), 0); err != nil {
		return err
	}
	return a.await(2 * time.Second)
}

func releaseAgent(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	m := a.path("cg")
	if err := os.Mkdir(m, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("none", m, "cgroup", 0, "none,name=attack"); err != nil {
		return unavailable("cgroup v1: %v", err)
	}
	defer unix.Unmount(m, unix.MNT_DETACH)
	box := filepath.Join(m, "x")
	if err := errors.Join(os.Mkdir(box, 0o755), os.WriteFile(filepath.Join(m, "release_agent"), []byte(p), 0),
		os.WriteFile(filepath.Join(box, "notify_on_release"), []byte("1"), 0)); err != nil {
		return err
	}
	own := []byte(fmt.Sprint(os.Getpid()))
	if err := errors.Join(os.WriteFile(filepath.Join(box, "cgroup.procs"), own, 0), os.WriteFile(filepath.Join(m, "cgroup.procs"), own, 0)); err != nil {
		return err
	}
	defer os.Remove(box)
	return a.await(2 * time.Second)
}

// requestKey: the kernel starts /sbin/request-key in its own mount namespace, so this one is put down on the host.
func requestKey(a *attempt) error {
	const helper = "/sbin/request-key"
	if _, err := os.Lstat(helper); err == nil {
		return unavailable("%s is there already", helper)
	}
	if err := a.payload("payload", helper); err != nil {
		return err
	}
	defer os.Remove(helper)
	if _, err := unix.RequestKey("user", "attack:"+a.Token, "x", unix.KEY_SPEC_SESSION_KEYRING); errors.Is(err, unix.ENOSYS) {
		return unavailable("request_key: %v", err)
	}
	return a.await(2 * time.Second)
}

// loadBPF loads "return 0" as a program of the given type.
func loadBPF(a *attempt, kind uint32) error {
	code := [2]uint64{0x00000000000000b7, 0x0000000000000095} // mov r0, 0; exit
	licence := []byte("GPL\x00")
	attr := struct {
		kind, count       uint32
		code, licence     uint64
		logLevel, logSize uint32
		log               uint64
		version, flags    uint32
	}{kind: kind, count: 2, code: uint64(uintptr(unsafe.Pointer(&code[0]))), licence: uint64(uintptr(unsafe.Pointer(&licence[0])))}
	const progLoad = 5
	fd, _, e := unix.Syscall(unix.SYS_BPF, progLoad, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(&code)
	runtime.KeepAlive(licence)
	if e != 0 {
		return fmt.Errorf("bpf(BPF_PROG_LOAD): %w", e)
	}
	unix.Close(int(fd))
	return a.observed()
}
