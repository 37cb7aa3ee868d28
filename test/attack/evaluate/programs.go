package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// programs are techniques that start an unlisted program: groups 1 to 3, 10, 11 and 46.
func programs() []technique {
	return []technique{
		{ID: "exec-home", Group: 1, As: asBoth, Title: "program in the home directory", Stop: byExec, Run: execIn("")},
		{ID: "exec-tmp", Group: 1, As: asBoth, Title: "program in /tmp", Stop: byExec, Run: execIn("/tmp")},
		{ID: "exec-var-tmp", Group: 1, As: asBoth, Title: "program in /var/tmp", Stop: byExec, Run: execIn("/var/tmp")},
		{ID: "exec-dev-shm", Group: 1, As: asBoth, Title: "program in /dev/shm", Stop: byExec, Run: execIn("/dev/shm")},
		{ID: "exec-run", Group: 1, As: asRoot, Title: "program in /run", Stop: byExec, Run: execIn("/run")},
		{ID: "exec-local-bin", Group: 1, As: asRoot, Title: "new program in /usr/local/bin", Stop: byExec, Run: execIn("/usr/local/bin")},
		{ID: "exec-usr-bin", Group: 1, As: asRoot, Title: "new program in /usr/bin", Stop: byExec, Run: execIn("/usr/bin")},
		{ID: "exec-dynamic", Group: 1, As: asBoth, Title: "dynamically linked program", Stop: byExec, Run: execKind("payload-dyn")},
		{ID: "exec-32bit", Group: 1, As: asBoth, Title: "32-bit program", Stop: byExec, Run: execKind("payload32")},
		{ID: "exec-interp", Group: 1, As: asBoth, Title: "program whose ELF interpreter is unlisted", Stop: byExec, Run: execOwnInterpreter},
		{ID: "exec-otmpfile", Group: 1, As: asBoth, Title: "file without a name (O_TMPFILE)", Stop: byExec, Run: execTmpfile},
		{ID: "exec-unlinked", Group: 1, As: asBoth, Title: "file whose name was removed, by its descriptor", Stop: byExec, Run: execUnlinked},
		{ID: "exec-fd", Group: 1, As: asBoth, Title: "execveat on a descriptor", Stop: byExec, Run: execDescriptor},
		{ID: "exec-proc-cwd", Group: 1, As: asBoth, Title: "by way of /proc/self/cwd", Stop: byExec, Run: execProcCwd},
		{ID: "exec-symlink", Group: 1, As: asBoth, Title: "by way of a symbolic link", Stop: byExec, Run: execSymlink},
		{ID: "exec-search-path", Group: 1, As: asBoth, Title: "program of a trusted name found first in PATH", Stop: byExec, Run: execSearchPath},
		{ID: "exec-setuid", Group: 1, As: asRoot, Title: "setuid copy started by a user", Stop: byExec, Run: execSetuid},
		{ID: "exec-filecap", Group: 1, As: asRoot, Title: "copy with file capabilities", Stop: byExec, Run: execFileCapability},
		{ID: "ldso-file", Group: 2, As: asBoth, Title: "ld.so FILE", Stop: byMap, Run: loaderFile},
		{ID: "ldso-copy", Group: 2, As: asBoth, Title: "a copy of ld.so runs FILE", Stop: byMap, Run: loaderCopy},
		{ID: "ldso-memfd", Group: 2, As: asBoth, Title: "ld.so runs a memfd", Stop: byMap, Run: loaderMemfd},
		{ID: "ldso-library", Group: 2, As: asBoth, Title: "ld.so runs a shared library", Stop: byMap, Run: loaderLibrary},
		{ID: "memfd-exec", Group: 3, As: asBoth, Title: "memfd, by execveat", Stop: byExec, Run: memfdExec(0, 0)},
		{ID: "memfd-sealed-exec", Group: 3, As: asBoth, Title: "sealed memfd, by execveat", Stop: byExec, Run: memfdExec(unix.MFD_ALLOW_SEALING, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)},
		{ID: "memfd-proc", Group: 3, As: asBoth, Title: "memfd, by /proc/self/fd", Stop: byExec, Run: memfdProc},
		{ID: "memfd-other", Group: 3, As: asBoth, Title: "memfd of another process, by /proc/PID/fd", Stop: byExec, Run: memfdOther},
		{ID: "race-exec", Group: 10, As: asBoth, Title: "names exchanged while a program starts", Stop: byExec, Run: raceExec},
		{ID: "race-dlopen", Group: 10, As: asBoth, Title: "names exchanged while a library is loaded", Stop: byMap, Run: raceLibrary},
		{ID: "handle-exec", Group: 11, As: asRoot, Title: "open_by_handle_at and execveat", Stop: byExec, Run: execHandle},
		{ID: "uring-exec", Group: 46, As: asBoth, Title: "program opened by io_uring", Stop: byExec, Run: func(a *attempt) error {
			p, err := a.program("p")
			if err != nil {
				return err
			}
			return a.tool("uring-exec", p)
		}},
	}
}

// execIn runs a program placed in a directory; empty: the scratch directory, which is HOME.
func execIn(place string) func(*attempt) error {
	return func(a *attempt) error {
		dir := place
		if dir == "" {
			dir = a.Dir
		}
		p := filepath.Join(dir, "rw-"+a.Token)
		defer os.Remove(p)
		if err := a.payload("payload", p); err != nil {
			return err
		}
		return a.run(p)
	}
}

func execKind(kind string) func(*attempt) error {
	return func(a *attempt) error {
		p := a.path("p")
		if err := a.payload(kind, p); err != nil {
			return err
		}
		return a.run(p)
	}
}

// execOwnInterpreter runs a program that names another payload as its ELF interpreter.
func execOwnInterpreter(a *attempt) error {
	raw, err := os.ReadFile(a.inKit("payload-dyn"))
	if err != nil {
		return err
	}
	// a name of the same length, relative to the working directory
	const old, short = "/lib64/ld-linux-x86-64.so.2", "./interpreter-of-the-attack"
	at := indexOf(raw, old+"\x00")
	if at < 0 {
		return fmt.Errorf("no interpreter %s in the payload", old)
	}
	copy(raw[at:], short)
	if err := os.WriteFile(a.path("p"), raw, 0o755); err != nil {
		return err
	}
	if _, err := a.program("interpreter-of-the-attack"); err != nil {
		return err
	}
	return a.start(call{argv: []string{a.path("p")}, dir: a.Dir})
}

func indexOf(raw []byte, text string) int {
	for i := 0; i+len(text) <= len(raw); i++ {
		if string(raw[i:i+len(text)]) == text {
			return i
		}
	}
	return -1
}

// execveat replaces the attempt's process: it returns only on failure.
func execveat(fd int) error {
	empty := [1]byte{}
	name := []byte("payload\x00")
	argv := [2]*byte{&name[0], nil}
	var envp [1]*byte
	_, _, e := syscall.Syscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	return fmt.Errorf("execveat: %w", e)
}

func execTmpfile(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(p)
	if err != nil {
		return err
	}
	w, err := unix.Open(a.Dir, unix.O_TMPFILE|unix.O_RDWR, 0o755)
	if err != nil {
		return unavailable("O_TMPFILE: %v", err)
	}
	if _, err := unix.Write(w, raw); err != nil {
		return err
	}
	r, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", w), unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	unix.Close(w)
	return execveat(r)
}

func execUnlinked(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	fd, err := unix.Open(p, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if err := os.Remove(p); err != nil {
		return err
	}
	return a.run(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd))
}

func execDescriptor(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	fd, err := unix.Open(p, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	return execveat(fd)
}

func execProcCwd(a *attempt) error {
	if _, err := a.program("p"); err != nil {
		return err
	}
	return a.start(call{argv: []string{"/proc/self/cwd/p"}, dir: a.Dir})
}

func execSymlink(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	if err := os.Symlink(p, a.path("true")); err != nil {
		return err
	}
	return a.run(a.path("true"))
}

func execSearchPath(a *attempt) error {
	if _, err := a.program("uname"); err != nil {
		return err
	}
	return a.start(call{argv: []string{"/usr/bin/env", "uname"}, env: []string{"PATH=" + a.Dir + ":/usr/bin:/bin"}})
}

func execSetuid(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	if err := os.Chmod(p, 0o755|os.ModeSetuid); err != nil {
		return err
	}
	if err := syscall.Setreuid(a.UID, a.UID); err != nil {
		return err
	}
	return a.run(p)
}

func execFileCapability(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	// struct vfs_cap_data, version 2: effective, CAP_SYS_ADMIN permitted
	capability := []byte{1, 0, 0, 2, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if err := unix.Setxattr(p, "security.capability", capability, 0); err != nil {
		return unavailable("security.capability: %v", err)
	}
	return a.run(p)
}

const loader = "/lib64/ld-linux-x86-64.so.2"

func loaderFile(a *attempt) error {
	if err := a.payload("payload-dyn", a.path("p")); err != nil {
		return err
	}
	// not executable: for ld.so it is data
	if err := os.Chmod(a.path("p"), 0o644); err != nil {
		return err
	}
	return a.run(loader, a.path("p"))
}

func loaderCopy(a *attempt) error {
	if err := a.payload("payload-dyn", a.path("p")); err != nil {
		return err
	}
	if err := copyFile(loader, a.path("ld")); err != nil {
		return err
	}
	return a.run(a.path("ld"), a.path("p"))
}

func loaderLibrary(a *attempt) error {
	p, err := a.library("lib.so")
	if err != nil {
		return err
	}
	return a.run(loader, "--preload", p, "/bin/true")
}

// memfd is a payload in memory; the descriptor is inherited by children.
func (a *attempt) memfd(kind string, flags int) (int, error) {
	if err := a.payload(kind, a.path("source")); err != nil {
		return 0, err
	}
	raw, err := os.ReadFile(a.path("source"))
	if err != nil {
		return 0, err
	}
	return memfdOf(raw, flags)
}

func memfdOf(raw []byte, flags int) (int, error) {
	fd, err := unix.MemfdCreate("payload", flags)
	if err != nil {
		return 0, unavailable("memfd_create: %v", err)
	}
	if _, err := unix.Write(fd, raw); err != nil {
		return 0, unavailable("write to memfd: %v", err)
	}
	return fd, nil
}

func memfdExec(flags, seals int) func(*attempt) error {
	return func(a *attempt) error {
		fd, err := a.memfd("payload", flags)
		if err != nil {
			return err
		}
		if seals != 0 {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
				return err
			}
		}
		return execveat(fd)
	}
}

func memfdProc(a *attempt) error {
	fd, err := a.memfd("payload", 0)
	if err != nil {
		return err
	}
	return a.run(fmt.Sprintf("/proc/self/fd/%d", fd))
}

func memfdOther(a *attempt) error {
	fd, err := a.memfd("payload", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	return a.run("/usr/bin/env", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd))
}

func loaderMemfd(a *attempt) error {
	fd, err := a.memfd("payload-dyn", 0)
	if err != nil {
		return err
	}
	return a.run(loader, fmt.Sprintf("/proc/self/fd/%d", fd))
}

func raceExec(a *attempt) error {
	evil, err := a.program("evil")
	if err != nil {
		return err
	}
	if err := copyFile("/bin/true", a.path("good")); err != nil {
		return err
	}
	return a.tool("race-exec", a.path("good"), evil)
}

func raceLibrary(a *attempt) error {
	evil, err := a.library("evil")
	if err != nil {
		return err
	}
	if err := copyFile(a.inKit("librwdemo.so"), a.path("good")); err != nil {
		return err
	}
	return a.tool("race-dlopen", a.path("good"), evil)
}

func execHandle(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, p, 0)
	if err != nil {
		return unavailable("name_to_handle_at: %v", err)
	}
	mount, err := unix.Open(a.Dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	fd, err := unix.OpenByHandleAt(mount, handle, unix.O_RDONLY)
	if err != nil {
		return errors.Join(errors.New("open_by_handle_at"), err)
	}
	return execveat(fd)
}
