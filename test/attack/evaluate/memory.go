package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// toolTechnique is one that the C tool carries out in the scratch directory.
func toolTechnique(id string, group int, name, title, stop string) technique {
	return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: stop, Run: func(a *attempt) error { return a.tool(name, a.Dir) }}
}

// onDemo is one that the C tool carries out on the authorised demo library.
func onDemo(id string, group int, name, title, stop string) technique {
	return technique{ID: id, Group: group, As: asBoth, Title: title, Stop: stop, Run: func(a *attempt) error { return a.tool(name, a.inKit("librwdemo.so")) }}
}

// memory are techniques that turn memory into code: groups 16 to 20 and 46.
func memory() []technique {
	return []technique{
		toolTechnique("map-data", 16, "data-x", "data file mapped executable", byMap),
		toolTechnique("map-data-shared", 16, "data-shared-x", "data file mapped shared and executable", byMap),
		toolTechnique("map-data-later", 16, "data-r-x", "data file mapped, then made executable", byMemory),
		toolTechnique("map-fixed", 16, "fixed", "data file mapped over the program's own code", byMap),
		toolTechnique("map-remap", 16, "remap", "shared mapping grown by mremap, then made executable", byMemory),
		toolTechnique("imply-file", 16, "imply-file", "READ_IMPLIES_EXEC, data file", byPersonality),
		toolTechnique("imply-anon", 16, "imply-anon", "READ_IMPLIES_EXEC, anonymous memory", byPersonality),
		toolTechnique("imply-brk", 16, "imply-brk", "READ_IMPLIES_EXEC, memory by brk", byPersonality),
		toolTechnique("memfd-map-shared", 17, "memfd-shared", "memfd mapped shared and executable", byMap),
		toolTechnique("memfd-map-private", 17, "memfd-private", "memfd mapped executable", byMap),
		toolTechnique("memfd-map-sealed", 17, "memfd-sealed", "sealed memfd mapped executable", byMap),
		toolTechnique("memfd-map-dual", 17, "dual-map", "memfd mapped twice, writable and executable", byMap),
		toolTechnique("memfd-secret", 17, "secret", "memfd_secret mapped executable", byMap),
		toolTechnique("sysv-shm", 17, "sysv", "System V shared memory with SHM_EXEC", byMap),
		{ID: "shm-file-map", Group: 17, As: asBoth, Title: "data file in /dev/shm mapped executable", Stop: byMap, Run: func(a *attempt) error {
			dir := "/dev/shm/rw-" + a.Token
			defer os.RemoveAll(dir)
			return errors.Join(os.Mkdir(dir, 0o755), a.tool("data-x", dir))
		}},
		toolTechnique("anon-rwx", 18, "anon-rwx", "anonymous memory, all permissions", byMemory),
		toolTechnique("anon-shared-rwx", 18, "anon-shared-rwx", "shared anonymous memory, all permissions", byMemory),
		toolTechnique("anon-rw-rx", 18, "anon-rw-rx", "anonymous memory, written, then executable", byMemory),
		toolTechnique("anon-shared-rw-rx", 18, "anon-shared-rw-rx", "shared anonymous memory, written, then executable", byMemory),
		toolTechnique("dev-zero", 18, "dev-zero", "/dev/zero mapped with all permissions", byMemory),
		toolTechnique("stack-x", 18, "stack-x", "stack made executable", byMemory),
		toolTechnique("heap-x", 18, "heap-x", "heap made executable", byMemory),
		toolTechnique("pkey-mprotect", 18, "pkey-mprotect", "anonymous memory by pkey_mprotect", byMemory),
		{ID: "anon-static", Group: 18, As: asBoth, Title: "anonymous memory in a static program", Stop: byMemory, Run: func(a *attempt) error {
			return a.run(a.inKit("attack-static"), "anon-rwx", a.Token, a.Marker)
		}},
		{ID: "python-shellcode", Group: 18, As: asBoth, Title: "machine code in an authorised Python script (ctypes)", Stop: byMemory, Run: func(a *attempt) error {
			return a.run("python3", a.listed("shellcode.py"), a.Token, a.Marker)
		}},
		onDemo("cow-library", 19, "cow-library", "private copy of a trusted library, patched, then executable", byMemory),
		onDemo("flip-library", 19, "flip-library", "trusted library's code made writable, patched, made executable again", byMemory),
		onDemo("rwx-library", 20, "rwx-library", "trusted library mapped writable and executable", byMemory),
		{ID: "userfault-library", Group: 19, As: asBoth, Title: "userfaultfd puts a page under a trusted library on tmpfs", Stop: byMemory, Run: userfault},
		toolTechnique("uring-map", 46, "uring-map", "data file opened by io_uring, mapped executable", byMap),
		toolTechnique("uring-poll-map", 46, "uring-poll", "the same, opened by the kernel's polling thread", byMap),
	}
}

func userfault(a *attempt) error {
	lib := "/dev/shm/rw-" + a.Token
	defer os.Remove(lib)
	if err := copyFile(a.inKit("librwdemo.so"), lib); err != nil {
		return err
	}
	return a.tool("userfault", lib)
}

// debugging are techniques that write into a process: groups 21 and 22.
func debugging() []technique {
	return []technique{
		toolTechnique("mem-self", 21, "own-mem", "own code written by /proc/self/mem", byDebug),
		toolTechnique("mem-thread", 21, "thread-mem", "own code written by /proc/thread-self/mem", byDebug),
		toolTechnique("mem-child", 21, "child-mem", "a child's code written by /proc/PID/mem", byDebug),
		toolTechnique("ptrace-attach", 22, "ptrace-attach", "a child's code written by ptrace (attach)", byDebug),
		toolTechnique("ptrace-seize", 22, "ptrace-seize", "a child's code written by ptrace (seize)", byDebug),
		toolTechnique("ptrace-traceme", 22, "ptrace-traceme", "a child asks to be traced", byDebug),
		{ID: "gdb-write", Group: 22, As: asBoth, Title: "a program's code written by gdb", Stop: byDebug, Run: gdbWrite},
		toolTechnique("vm-write", 22, "vm-write", "a child's code written by process_vm_writev", byDebug),
	}
}

func gdbWrite(a *attempt) error {
	n, err := strconv.ParseUint(a.Token[:8], 16, 32)
	if err != nil {
		return err
	}
	// mov eax, n; ret: the same as the C tool's put_code
	code := fmt.Sprintf("set {unsigned char[6]}innocent = {0xb8,%#x,%#x,%#x,%#x,0xc3}", n&0xff, n>>8&0xff, n>>16&0xff, n>>24)
	return a.run("gdb", "-nx", "-batch", "-ex", "break innocent", "-ex", "run", "-ex", "delete", "-ex", code, "-ex", "continue",
		"--args", a.inKit("attack"), "innocent", a.Token, a.Marker)
}

// writers are techniques that change authorised code while it is mapped, or below its file system: groups 23 and 24.
func writers() []technique {
	onCopy := func(id, name, title string) technique {
		return technique{ID: id, Group: 23, As: asBoth, Title: title, Stop: byWrite, Run: func(a *attempt) error {
			lib := a.path("lib.so")
			return errors.Join(copyFile(a.inKit("librwdemo.so"), lib), a.tool(name, lib, lib))
		}}
	}
	return []technique{
		onCopy("write-old-fd", "change-old-fd", "written through a descriptor opened before it was mapped"),
		onCopy("write-old-map", "change-old-map", "written through a mapping made before it was mapped executable"),
		onCopy("write-new-fd", "change-new-fd", "opened for writing while it is mapped"),
		onCopy("write-truncate", "change-truncate", "shrunk and grown again while it is mapped"),
		{ID: "write-hardlink", Group: 23, As: asBoth, Title: "written through another hard link", Stop: byWrite, Run: func(a *attempt) error {
			return errors.Join(copyFile(a.inKit("librwdemo.so"), a.path("lib.so")), os.Link(a.path("lib.so"), a.path("link.so")),
				a.tool("change-new-fd", a.path("lib.so"), a.path("link.so")))
		}},
		{ID: "write-own-program", Group: 23, As: asBoth, Title: "the running program's own file written", Stop: byWrite, Run: func(a *attempt) error {
			p := a.path("own")
			return errors.Join(copyFile(a.inKit("attack"), p), a.run(p, "own-file", a.Token, a.Marker, p))
		}},
		{ID: "write-shm", Group: 23, As: asBoth, Title: "library in /dev/shm written while it is mapped", Stop: byWrite, Run: func(a *attempt) error {
			lib := "/dev/shm/rw-" + a.Token
			defer os.Remove(lib)
			return errors.Join(copyFile(a.inKit("librwdemo.so"), lib), a.tool("change-old-map", lib, lib))
		}},
		{ID: "write-under-overlay", Group: 23, As: asBoth, Mounts: true, Title: "library on an overlay, written in its layer", Stop: byWrite, Run: writeUnderOverlay("change-new-fd")},
		{ID: "write-old-under-overlay", Group: 23, As: asBoth, Mounts: true, Title: "the same by a descriptor opened before", Stop: byWrite, Run: writeUnderOverlay("change-old-fd")},
		{ID: "image-write", Group: 24, As: asRoot, Mounts: true, Title: "image file written below a mounted file system", Stop: byVersion, Run: belowMount(func(image, device string) string { return image })},
		{ID: "device-write", Group: 24, As: asRoot, Mounts: true, Title: "block device written below a mounted file system", Stop: byBlock, Run: belowMount(func(image, device string) string { return device })},
		{ID: "swap-write", Group: 24, As: asRoot, Mounts: true, Title: "library's page changed while it is swapped out", Stop: byBlock, Run: swapWrite},
		{ID: "dev-mem", Group: 24, As: asRoot, Title: "physical memory opened for writing (/dev/mem)", Stop: byBlock, Ran: "memory beyond the first MiB could be mapped writable", Run: devMem},
	}
}

func writeUnderOverlay(name string) func(*attempt) error {
	return func(a *attempt) error {
		if err := os.Mkdir(a.path("lower"), 0o755); err != nil {
			return err
		}
		if err := copyFile(a.inKit("librwdemo.so"), a.path("lower/lib.so")); err != nil {
			return err
		}
		if err := a.overlay(a.path("lower"), a.path("merged")); err != nil {
			return err
		}
		return a.tool(name, a.path("merged/lib.so"), a.path("lower/lib.so"))
	}
}

// belowMount runs an authorised program on a mounted image, changes its content below the file system and runs it again.
func belowMount(through func(image, device string) string) func(*attempt) error {
	return func(a *attempt) error {
		image := a.path("image.ext4")
		if err := copyFile(a.inKit("image.ext4"), image); err != nil {
			return err
		}
		device, undo, err := a.mountImage(image, "ext4", 0)
		if err != nil {
			return err
		}
		defer undo()
		victim := a.path("m/victim")
		if err := copyFile("/bin/true", victim); err != nil {
			return err
		}
		unix.Sync()
		if err := a.run(victim); err != nil {
			return err
		}
		raw, err := a.evilBytes(victim)
		if err != nil {
			return err
		}
		good, err := os.ReadFile("/bin/true")
		if err != nil {
			return err
		}
		target := through(image, device)
		whole, err := os.ReadFile(image)
		if err != nil {
			return err
		}
		at := indexOf(whole, string(good[:4096]))
		if at < 0 {
			return errors.New("the program was not found in the image")
		}
		f, err := os.OpenFile(target, os.O_WRONLY|unix.O_SYNC, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(raw[:4096], int64(at))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		// the page cache forgets what it does not have to keep
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return err
		}
		return a.run(victim)
	}
}

// swapWrite swaps to a loop device and changes the file below it.
func swapWrite(a *attempt) error {
	const size, page = 8 << 20, 4096
	raw := make([]byte, size)
	// the header that mkswap(8) writes: version 1, last page, magic at the end of the first page
	binary.LittleEndian.PutUint32(raw[1024:], 1)
	binary.LittleEndian.PutUint32(raw[1028:], size/page-1)
	copy(raw[page-10:], "SWAPSPACE2")
	below := a.path("below")
	if err := os.WriteFile(below, raw, 0o600); err != nil {
		return err
	}
	device, err := loop(below)
	if err != nil {
		return err
	}
	defer clearLoop(device)
	name := append([]byte(device), 0)
	if _, _, e := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(&name[0])), 0, 0); e != 0 {
		return fmt.Errorf("swapon: %w", e)
	}
	defer unix.Syscall(unix.SYS_SWAPOFF, uintptr(unsafe.Pointer(&name[0])), 0, 0)
	lib := "/dev/shm/rw-" + a.Token
	defer os.Remove(lib)
	// no reading ahead: it would fetch the page before it is changed
	back, err := setKernel("/proc/sys/vm/page-cluster", "0")
	if err != nil {
		return err
	}
	defer back()
	return a.inCgroup(func(box string) error {
		return a.tool("swapped", lib, below, box+"/memory.reclaim", a.inKit("librwdemo.so"))
	})
}

// inCgroup runs fn in a cgroup with a memory controller, which an attempt's own may not have.
func (a *attempt) inCgroup(fn func(box string) error) error {
	const top = "/sys/fs/cgroup"
	old, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	_, own, found := strings.Cut(strings.TrimSpace(string(old)), "0::")
	if err := os.WriteFile(top+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil || !found {
		return unavailable("memory controller: %v", err)
	}
	box := top + "/attack-box-" + a.Token
	if err := os.Mkdir(box, 0o755); err != nil {
		return err
	}
	defer os.Remove(box)
	if err := os.WriteFile(box+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	err = fn(box)
	return errors.Join(err, os.WriteFile(filepath.Join(top, own, "cgroup.procs"), []byte("0"), 0))
}

func devMem(a *attempt) error {
	fd, err := unix.Open("/dev/mem", unix.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		return fmt.Errorf("/dev/mem: %w", err)
	}
	defer unix.Close(fd)
	m, err := unix.Mmap(fd, 16<<20, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map physical memory: %w", err)
	}
	return errors.Join(unix.Munmap(m), a.observed())
}
