package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// agentAttacks are techniques against Ringwall itself: groups 34 to 42. Each
// ends with an unlisted program, started again and again for a while so that
// a window that opens during a restart is seen: it ran, or the door held.
func agentAttacks() []technique {
	on := func(id string, group int, as who, title string, attack func(*attempt) error) technique {
		return technique{
			ID: id, Group: group, As: as, Agent: true, Host: true, Title: title, Stop: byGuard, Limit: 60,
			Ran: "an unlisted program ran during or after the attack", Run: thenExec(attack),
		}
	}
	all := []technique{
		on("bpf-detach", 34, asRoot, "all BPF links detached by id", detachLinks),
		on("bpf-maps", 34, asRoot, "all BPF maps overwritten by id", overwriteMaps),
		on("bpf-pin-fd", 34, asRoot, "maps opened by their pins and overwritten", overwritePins),
		on("bpf-unpin", 34, asRoot, "pins removed, agent killed", func(a *attempt) error {
			return errors.Join(removeBelow(a.Pins), a.signal(syscall.SIGKILL))
		}),
		on("bpf-umount", 34, asRoot, "bpffs unmounted, agent killed", func(a *attempt) error {
			return errors.Join(unix.Unmount(a.Pins, unix.MNT_DETACH), unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH), a.signal(syscall.SIGKILL))
		}),
		on("agent-kill", 35, asBoth, "SIGKILL", func(a *attempt) error { return a.signal(syscall.SIGKILL) }),
		on("agent-term", 35, asBoth, "SIGTERM", func(a *attempt) error { return a.signal(syscall.SIGTERM) }),
		on("agent-pidfd", 35, asRoot, "SIGKILL by pidfd", killByPidfd),
		on("agent-sigio", 35, asRoot, "SIGKILL by F_SETSIG: the kernel sends it", killByFasync),
		on("agent-rlimit", 35, asRoot, "processor time limit: the kernel kills", killByLimit),
		on("agent-cgroup-kill", 35, asRoot, "cgroup.kill", func(a *attempt) error { return a.agentCgroup("cgroup.kill", "1") }),
		on("agent-oom", 35, asRoot, "memory limit of its cgroup", func(a *attempt) error {
			return errors.Join(os.WriteFile(a.agentProc("oom_score_adj"), []byte("1000"), 0), a.agentCgroup("memory.max", "4096"))
		}),
		on("agent-sysrq-oom", 35, asRoot, "OOM killer called by sysrq", func(a *attempt) error {
			return errors.Join(os.WriteFile(a.agentProc("oom_score_adj"), []byte("1000"), 0), os.WriteFile("/proc/sysrq-trigger", []byte("f"), 0))
		}),
		on("agent-stop", 36, asBoth, "SIGSTOP", func(a *attempt) error { return a.signal(syscall.SIGSTOP) }),
		on("agent-freeze", 36, asRoot, "cgroup.freeze", func(a *attempt) error { return a.agentCgroup("cgroup.freeze", "1") }),
		on("agent-move", 36, asRoot, "moved into another cgroup and frozen there", moveAndFreeze),
		on("agent-slice", 36, asRoot, "the cgroup above its own frozen", freezeAbove),
		on("agent-ptrace", 36, asBoth, "ptrace", func(a *attempt) error { return unix.PtraceSeize(a.AgentPID) }),
		on("agent-mem", 36, asRoot, "its memory opened for writing", func(a *attempt) error {
			f, err := os.OpenFile(a.agentProc("mem"), os.O_RDWR, 0)
			if err == nil {
				f.Close()
			}
			return err
		}),
		on("agent-steal-fd", 36, asRoot, "its BPF descriptors copied by pidfd_getfd", stealDescriptors),
		on("agent-namespace", 36, asRoot, "entered its mount namespace and unmounted its pins", func(a *attempt) error {
			return a.run("nsenter", "-t", fmt.Sprint(a.AgentPID), "-m", "umount", "-l", a.Pins)
		}),
		on("agent-fds", 37, asRoot, "its descriptor limit set to nothing", func(a *attempt) error {
			none := unix.Rlimit{}
			return unix.Prlimit(a.AgentPID, unix.RLIMIT_NOFILE, &none, nil)
		}),
		on("agent-pids", 37, asRoot, "pids.max of its cgroup", func(a *attempt) error { return a.agentCgroup("pids.max", "1") }),
		on("exhaust-fds", 37, asBoth, "all descriptors used up", exhaustDescriptors),
		{ID: "exhaust-memory", Group: 37, As: asRoot, Agent: true, Title: "program started where the kernel finds no memory for its notes", Stop: byDecision, Run: starvedExec, Limit: 60},
		on("flood", 38, asBoth, "three thousand refused starts, then the attack", flood),
		on("unit-stop", 39, asRoot, "unit stopped", func(a *attempt) error { return a.run("systemctl", "stop", a.AgentUnit) }),
		on("unit-mask", 39, asRoot, "unit masked and killed", func(a *attempt) error {
			return errors.Join(a.run("systemctl", "mask", "--runtime", a.AgentUnit), a.run("systemctl", "kill", "-s", "KILL", a.AgentUnit))
		}),
		on("state-edit", 39, asRoot, "state files overwritten, agent restarted", func(a *attempt) error {
			return a.withCopy(func() error { return errors.Join(spoilBelow(a.State), a.restart()) })
		}),
		on("state-remove", 39, asRoot, "state removed, agent restarted", func(a *attempt) error {
			return a.withCopy(func() error { return errors.Join(removeBelow(a.State), a.restart()) })
		}),
		on("state-rename", 39, asRoot, "state directory renamed, agent restarted", func(a *attempt) error {
			err := os.Rename(a.State, a.State+"-moved")
			if err == nil {
				defer os.Rename(a.State+"-moved", a.State)
			}
			return errors.Join(err, a.restart())
		}),
		on("state-mount", 39, asRoot, "empty file system over the state, agent restarted", func(a *attempt) error {
			err := unix.Mount("none", a.State, "tmpfs", 0, "")
			if err == nil {
				defer unix.Unmount(a.State, unix.MNT_DETACH)
			}
			return errors.Join(err, a.restart())
		}),
		on("state-parent-mount", 39, asRoot, "empty file system over /var/lib, agent restarted", func(a *attempt) error {
			err := unix.Mount("none", filepath.Dir(a.State), "tmpfs", 0, "")
			if err == nil {
				defer unix.Unmount(filepath.Dir(a.State), unix.MNT_DETACH)
			}
			return errors.Join(err, a.restart())
		}),
		on("ftrace-off", 39, asRoot, "kernel.ftrace_enabled=0", func(a *attempt) error {
			return os.WriteFile("/proc/sys/kernel/ftrace_enabled", []byte("0"), 0)
		}),
		on("ftrace-off-sysctl", 39, asRoot, "the same through a bind mount", func(a *attempt) error {
			if err := os.WriteFile(a.path("f"), nil, 0o600); err != nil {
				return err
			}
			if err := bind("/proc/sys/kernel/ftrace_enabled", a.path("f")); err != nil {
				return err
			}
			defer unix.Unmount(a.path("f"), unix.MNT_DETACH)
			return os.WriteFile(a.path("f"), []byte("0"), 0)
		}),
		on("policy-older", 41, asRoot, "older signed policy offered", func(a *attempt) error {
			if a.Rollback == "" {
				return unavailable("no -rollback command")
			}
			return a.run(strings.Fields(a.Rollback)...)
		}),
		on("clock-back", 42, asRoot, "clock set back two years", func(a *attempt) error {
			now := time.Now()
			tv := unix.NsecToTimeval(now.AddDate(-2, 0, 0).UnixNano())
			if err := unix.Settimeofday(&tv); err != nil {
				return err
			}
			err := a.restart()
			back := unix.NsecToTimeval(time.Now().Add(now.Sub(now.AddDate(-2, 0, 0))).UnixNano())
			return errors.Join(err, unix.Settimeofday(&back))
		}),
	}
	return all
}

// thenExec attacks and then tries an unlisted program: for two seconds, and
// for up to eight while there is no agent.
func thenExec(attack func(*attempt) error) func(*attempt) error {
	return func(a *attempt) error {
		p, err := a.program("p")
		if err != nil {
			return err
		}
		if err := a.findAgain(); err != nil {
			return err
		}
		defer a.putBack()
		err = attack(a)
		if errors.Is(err, errs.Unsupported) {
			return err
		}
		start := time.Now()
		for time.Since(start) < 2*time.Second || time.Since(start) < 8*time.Second && findAgent("/proc") == 0 {
			e := a.run(p)
			if a.ran() {
				return nil
			}
			if err == nil {
				err = e
			}
			time.Sleep(100 * time.Millisecond)
		}
		return err
	}
}

// findAgain looks for the agent: an attack before this one may have had it
// restarted. One that does not come back is attacked in its absence.
func (a *attempt) findAgain() error {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if pid := findAgent("/proc"); pid != 0 {
			a.AgentPID = pid
			return nil
		}
	}
	return a.run("systemctl", "start", a.AgentUnit)
}

// putBack undoes what an attack that worked has done to the agent. Where the
// attack was refused, there is nothing to undo and most of this is refused, too.
func (a *attempt) putBack() {
	if a.As != asRoot {
		return
	}
	_ = os.WriteFile("/proc/sys/kernel/ftrace_enabled", []byte("1"), 0)
	// masking a unit is systemd's business and works while the agent goes on
	if to, err := os.Readlink("/run/systemd/system/" + a.AgentUnit); err == nil && to == os.DevNull {
		_ = a.run("systemctl", "unmask", "--runtime", a.AgentUnit)
	}
	if pid := findAgent("/proc"); pid != 0 {
		a.AgentPID = pid
		_ = syscall.Kill(pid, syscall.SIGCONT)
		_ = a.agentCgroup("cgroup.freeze", "0")
		_ = a.agentCgroup("memory.max", "max")
		_ = a.agentCgroup("pids.max", "max")
		return
	}
	_ = a.run("systemctl", "reset-failed", a.AgentUnit)
	_ = a.run("systemctl", "start", a.AgentUnit)
}

func (a *attempt) agentProc(name string) string {
	return filepath.Join("/proc", strconv.Itoa(a.AgentPID), name)
}

func (a *attempt) signal(s syscall.Signal) error { return syscall.Kill(a.AgentPID, s) }

func (a *attempt) restart() error {
	return errors.Join(a.signal(syscall.SIGKILL), a.run("systemctl", "restart", a.AgentUnit))
}

func (a *attempt) agentCgroup(file, value string) error {
	raw, err := os.ReadFile(a.agentProc("cgroup"))
	if err != nil {
		return err
	}
	_, own, _ := strings.Cut(strings.TrimSpace(string(raw)), "0::")
	return os.WriteFile(filepath.Join("/sys/fs/cgroup", own, file), []byte(value), 0)
}

func moveAndFreeze(a *attempt) error {
	box := "/sys/fs/cgroup/attack-freezer-" + a.Token
	if err := os.Mkdir(box, 0o755); err != nil {
		return err
	}
	raw, err := os.ReadFile(a.agentProc("cgroup"))
	if err != nil {
		return err
	}
	_, own, _ := strings.Cut(strings.TrimSpace(string(raw)), "0::")
	pid := []byte(strconv.Itoa(a.AgentPID))
	defer func() {
		_ = os.WriteFile(box+"/cgroup.freeze", []byte("0"), 0)
		_ = os.WriteFile(filepath.Join("/sys/fs/cgroup", own, "cgroup.procs"), pid, 0)
		_ = os.Remove(box)
	}()
	err = os.WriteFile(box+"/cgroup.procs", pid, 0)
	if err := errors.Join(err, os.WriteFile(box+"/cgroup.freeze", []byte("1"), 0)); err != nil {
		return err
	}
	p, err := a.program("frozen")
	if err != nil {
		return err
	}
	return exec.Command(p).Run()
}

// freezeAbove freezes the slice that the agent's unit is in, having left it first.
func freezeAbove(a *attempt) error {
	raw, err := os.ReadFile(a.agentProc("cgroup"))
	if err != nil {
		return err
	}
	_, own, _ := strings.Cut(strings.TrimSpace(string(raw)), "0::")
	above := filepath.Dir(own)
	if above == "/" {
		return unavailable("nothing above the agent's cgroup")
	}
	box := "/sys/fs/cgroup/attack-outside-" + a.Token
	if err := os.Mkdir(box, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(box+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	freeze := filepath.Join("/sys/fs/cgroup", above, "cgroup.freeze")
	if err := os.WriteFile(freeze, []byte("1"), 0); err != nil {
		return err
	}
	// the evaluator may be in there, too: it must not stay frozen
	defer os.WriteFile(freeze, []byte("0"), 0)
	p, err := a.program("frozen")
	if err != nil {
		return err
	}
	return exec.Command(p).Run()
}

// withCopy puts the state directory's files back after fn.
func (a *attempt) withCopy(fn func() error) error {
	if err := os.CopyFS(a.path("state"), os.DirFS(a.State)); err != nil {
		return fmt.Errorf("copy the state: %w", err)
	}
	err := fn()
	back := filepath.WalkDir(a.path("state"), func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		to := filepath.Join(a.State, strings.TrimPrefix(p, a.path("state")))
		raw, err := os.ReadFile(p)
		if now, e := os.ReadFile(to); err != nil || e == nil && string(now) == string(raw) {
			return err
		}
		return errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, raw, 0o600))
	})
	return errors.Join(err, back)
}

func removeBelow(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

func spoilBelow(dir string) error {
	var problems error
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			problems = errors.Join(problems, os.WriteFile(p, []byte("{}"), 0))
		}
		return err
	})
	return errors.Join(err, problems)
}

func killByPidfd(a *attempt) error {
	fd, err := unix.PidfdOpen(a.AgentPID, 0)
	if err != nil {
		return err
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
}

// killByFasync makes a pipe's news a signal of our choice to the agent (fcntl(2), F_SETSIG).
func killByFasync(a *attempt) error {
	var p [2]int
	if err := unix.Pipe2(p[:], 0); err != nil {
		return err
	}
	for _, c := range []struct{ cmd, arg int }{
		{unix.F_SETOWN, a.AgentPID}, {unix.F_SETSIG, int(unix.SIGKILL)}, {unix.F_SETFL, unix.O_ASYNC | unix.O_NONBLOCK},
	} {
		if _, err := unix.FcntlInt(uintptr(p[0]), c.cmd, c.arg); err != nil {
			return fmt.Errorf("fcntl %d: %w", c.cmd, err)
		}
	}
	_, err := unix.Write(p[1], []byte("x"))
	return err
}

func killByLimit(a *attempt) error {
	now := unix.Rlimit{}
	return unix.Prlimit(a.AgentPID, unix.RLIMIT_CPU, &now, nil)
}

func stealDescriptors(a *attempt) error {
	pidfd, err := unix.PidfdOpen(a.AgentPID, 0)
	if err != nil {
		return err
	}
	got, last := 0, error(nil)
	for fd := range 64 {
		mine, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			last = err
			continue
		}
		got++
		last = errors.Join(zeroMap(mine), last)
	}
	if got == 0 {
		return fmt.Errorf("pidfd_getfd: %w", last)
	}
	return last
}

func exhaustDescriptors(a *attempt) error {
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	// keep a few: os/exec needs them to start anything at all
	var held []int
	for range limit.Cur {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		held = append(held, fd)
	}
	for _, fd := range held[max(0, len(held)-12):] {
		unix.Close(fd)
	}
	return nil
}

// starvedExec starts the payload in a cgroup with next to no memory.
func starvedExec(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	const top = "/sys/fs/cgroup"
	if err := os.WriteFile(top+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
		return unavailable("%v", err)
	}
	box := top + "/attack-starved-" + a.Token
	if err := os.Mkdir(box, 0o755); err != nil {
		return err
	}
	defer os.Remove(box)
	var last error
	// from too little to start anything up to enough for a tiny program
	for kib := 64; kib <= 1024 && !a.ran(); kib += 32 {
		if err := os.WriteFile(box+"/memory.max", []byte(fmt.Sprint(kib<<10)), 0); err != nil {
			return err
		}
		dir, err := os.Open(box)
		if err != nil {
			return err
		}
		cmd := exec.Command(p)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		last = cmd.Run()
		dir.Close()
	}
	return last
}

func flood(a *attempt) error {
	p, err := a.program("flood")
	if err != nil {
		return err
	}
	for range 3000 {
		_ = exec.Command(p).Run()
		if a.ran() {
			return nil
		}
	}
	return nil
}

// bpfCall is bpf(2) with a zero-padded attribute.
func bpfCall(cmd uintptr, attr *[128]byte) (int, error) {
	r, _, e := unix.Syscall(unix.SYS_BPF, cmd, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if e != 0 {
		return -1, e
	}
	return int(r), nil
}

func putWord(attr *[128]byte, at int, v uint32) { *(*uint32)(unsafe.Pointer(&attr[at])) = v }
func word(attr *[128]byte, at int) uint32       { return *(*uint32)(unsafe.Pointer(&attr[at])) }

// eachBPF opens every object of a kind by id. next and open are commands of bpf(2).
func eachBPF(next, open uintptr, fn func(fd int) error) error {
	var problems error
	for id := uint32(0); ; {
		var attr [128]byte
		putWord(&attr, 0, id)
		if _, err := bpfCall(next, &attr); err != nil {
			return problems
		}
		id = word(&attr, 4)
		attr = [128]byte{}
		putWord(&attr, 0, id)
		fd, err := bpfCall(open, &attr)
		if err != nil {
			problems = fmt.Errorf("open object %d: %w", id, err)
			continue
		}
		if err := fn(fd); err != nil {
			problems = fmt.Errorf("object %d: %w", id, err)
		}
		unix.Close(fd)
	}
}

func detachLinks(*attempt) error {
	const linkByID, nextLink, detach = 30, 31, 34
	return eachBPF(nextLink, linkByID, func(fd int) error {
		var attr [128]byte
		putWord(&attr, 0, uint32(fd))
		_, err := bpfCall(detach, &attr)
		return err
	})
}

func overwriteMaps(*attempt) error {
	const nextMap, mapByID = 12, 14
	return eachBPF(nextMap, mapByID, zeroMap)
}

func overwritePins(a *attempt) error {
	const objectGet = 7
	var problems error
	err := filepath.WalkDir(a.Pins, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := append([]byte(p), 0)
		var attr [128]byte
		*(*uint64)(unsafe.Pointer(&attr[0])) = uint64(uintptr(unsafe.Pointer(&name[0])))
		fd, err := bpfCall(objectGet, &attr)
		if err != nil {
			problems = fmt.Errorf("%s: %w", p, err)
			return nil
		}
		problems = errors.Join(problems, zeroMap(fd))
		unix.Close(fd)
		return nil
	})
	return errors.Join(err, problems)
}

// zeroMap sets a map's first element to zeros.
func zeroMap(fd int) error {
	const update = 2
	key, value := make([]byte, 512), make([]byte, 65536)
	var attr [128]byte
	putWord(&attr, 0, uint32(fd))
	*(*uint64)(unsafe.Pointer(&attr[8])) = uint64(uintptr(unsafe.Pointer(&key[0])))
	*(*uint64)(unsafe.Pointer(&attr[16])) = uint64(uintptr(unsafe.Pointer(&value[0])))
	_, err := bpfCall(update, &attr)
	return err
}
