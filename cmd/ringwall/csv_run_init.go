package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/hypervisor"
)

// Where things are in the guest of a trial run.
const (
	guestModules = "/csv.modules" // in the initramfs, in load order by name
	guestInit    = "/ringwall"    // this program, in the initramfs
	guestRoot    = "/sysroot"
	guestBinary  = "/" + installedBinary
	guestDir     = "/var/lib/ringwall-csv" // what came on the payload disk
	guestPlan    = guestDir + "/plan.json"
	payloadDisk  = "ringwall-payload" // serial of the disk
)

// bootGuest is process 1 of the initramfs: it mounts the image, hands over to
// its init where there is one that will do, or runs the trial itself. It never
// returns: it reports and stops the machine, whatever happens.
func bootGuest(e *env) {
	if err := startGuest(e); err != nil {
		report(func(r *reporter) { r.failed("start the guest", err) })
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func startGuest(e *env) error {
	for _, m := range []guestMount{{"devtmpfs", "/dev", 0, ""}, {"proc", "/proc", 0, ""}, {"sysfs", "/sys", 0, ""}} {
		if err := m.mount(); err != nil {
			return err
		}
	}
	modules, err := os.ReadDir(guestModules) // sorted
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := loadGuestModule(filepath.Join(guestModules, m.Name())); err != nil {
			return err
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	report(func(r *reporter) {
		r.send(csv.RunLine{Kernel: unix.ByteSliceToString(u.Release[:]), Step: "the kernel is up: Linux " + unix.ByteSliceToString(u.Release[:])})
	})
	payload, root, err := findDisks(e)
	if err != nil {
		return err
	}
	if err := replaceFile(guestRoot+guestBinary, guestInit); err != nil {
		return err
	}
	if err := switchGuestRoot(); err != nil {
		return err
	}
	if err := unpackPayload(payload); err != nil {
		return fmt.Errorf("payload of the trial, on %s: %w", root, err)
	}
	plan, err := readPlan()
	if err != nil {
		return err
	}
	if init := plan.init(); init != "" {
		if err := writeGuestUnit(); err != nil {
			return err
		}
		return fmt.Errorf("start %s: %w", init, unix.Exec(init, []string{"/sbin/init"}, []string{"HOME=/", "TERM=linux"}))
	}
	return runGuestWithoutInit()
}

// guestMount is one mount, whose kind is its source, too.
type guestMount struct {
	kind, target string
	flags        uintptr
	data         string
}

func (m guestMount) mount() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil { //nolint:gosec // as a system has it
		return err
	}
	if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
	}
	return nil
}

func loadGuestModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	// A module for hardware that is absent, or one that is built in, is no reason
	// to stop: what really needs it will say so.
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
}

// findDisks mounts the image's root file system, on a whole disk or on a
// partition, and returns the payload's device and the root's.
func findDisks(e *env) (payload, root string, err error) {
	var tried []string
	for deadline := e.now().Add(30 * time.Second); e.now().Before(deadline); pause(50 * time.Millisecond) {
		disks, _ := filepath.Glob("/sys/block/vd*")
		payload, tried = "", nil
		var roots []string
		for _, d := range disks {
			dev := "/dev/" + filepath.Base(d)
			if serial, _ := os.ReadFile(d + "/serial"); strings.TrimSpace(string(serial)) == payloadDisk {
				payload = dev
				continue
			}
			parts, _ := filepath.Glob(d + "/" + filepath.Base(d) + "*")
			roots = append(roots, dev)
			for _, p := range parts {
				roots = append(roots, "/dev/"+filepath.Base(p))
			}
		}
		if payload == "" || len(roots) == 0 {
			continue
		}
		for _, dev := range roots {
			why := mountRoot(dev)
			if why == nil {
				return payload, dev, nil
			}
			tried = append(tried, dev+": "+why.Error())
		}
		break
	}
	return "", "", fmt.Errorf("no disk of the guest holds a root file system (%s): %w", strings.Join(tried, "; "), errs.NotFound)
}

func mountRoot(dev string) error {
	if err := os.MkdirAll(guestRoot, 0o755); err != nil { //nolint:gosec // as a system has it
		return err
	}
	var last error
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		if last = unix.Mount(dev, guestRoot, kind, 0, ""); last != nil {
			continue
		}
		if st, err := os.Stat(guestRoot + "/usr/bin"); err == nil && st.IsDir() {
			return nil
		}
		_ = unix.Unmount(guestRoot, 0)
		return fmt.Errorf("no /usr/bin in it: %w", errs.NotFound)
	}
	return last
}

// pause waits a moment for what the kernel does; nobody can cancel a boot.
func pause(d time.Duration) { <-time.After(d) }

// replaceFile puts a copy of a program in a place, whatever was there.
func replaceFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755) //nolint:gosec // a program
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// switchGuestRoot makes the image the root, with what a running system has
// mounted.
func switchGuestRoot() error {
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := os.MkdirAll(guestRoot+d, 0o755); err != nil { //nolint:gosec // as a system has it
			return err
		}
		if err := unix.Mount(d, guestRoot+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := os.Chdir(guestRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return guestMount{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"}.mount()
}

// runGuestWithoutInit stands in for an init: it mounts the rest, starts the
// trial and reaps until that has ended.
func runGuestWithoutInit() error {
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []guestMount{
		{"securityfs", "/sys/kernel/security", quiet, ""},
		{"bpf", "/sys/fs/bpf", quiet, "mode=700"},
		{"cgroup2", "/sys/fs/cgroup", quiet, ""},
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := m.mount(); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !os.IsExist(err) {
			return err
		}
	}
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	p, err := os.StartProcess(guestBinary, []string{guestBinary, "csv", "guest", "--trial"}, &os.ProcAttr{
		Dir: "/", Env: guestEnv(), Files: []*os.File{null, os.Stdout, os.Stderr}, Sys: &unix.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == p.Pid && (ws.Exited() || ws.Signaled()):
			return nil // it has reported by itself
		}
	}
}

func guestEnv() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
}

// writeGuestUnit has systemd start the trial once the system is up.
func writeGuestUnit() error {
	const dir, name = "/run/systemd/system", "ringwall-csv.service"
	if err := os.MkdirAll(dir+"/multi-user.target.wants", 0o755); err != nil { //nolint:gosec // as systemd has it
		return err
	}
	// Type=exec: the job ends at once, so the system counts as started meanwhile.
	// OOMPolicy: the end of a process of the candidate's is not the trial's.
	unit := "[Unit]\nDescription=Trial of a candidate\nAfter=multi-user.target\n" +
		"[Service]\nType=exec\nExecStart=" + guestBinary + " csv guest --trial\n" +
		"KillMode=process\nOOMPolicy=continue\nTasksMax=infinity\nLimitMEMLOCK=infinity\n"
	unit += "Environment=" + strings.Join(guestEnv(), "\nEnvironment=") + "\n"
	if err := os.WriteFile(dir+"/"+name, []byte(unit), 0o644); err != nil { //nolint:gosec // as systemd has it
		return err
	}
	return os.Symlink("../"+name, dir+"/multi-user.target.wants/"+name)
}

// reporter writes lines to the host.
type reporter struct {
	f   *os.File
	err error
}

// report opens the port, and closes it for whoever reports next.
func report(say func(*reporter)) {
	r := openReport()
	say(r)
	r.close()
}

// openReport finds the port by its name, which the kernel learns a moment after
// the device. Without one the console must do.
func openReport() *reporter {
	for range 200 {
		ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, p := range ports {
			if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == hypervisor.ReportPort {
				// not os.OpenFile, which would not wait until the host has what is written
				fd, err := unix.Open("/dev/"+filepath.Base(filepath.Dir(p)), unix.O_WRONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					return &reporter{err: fmt.Errorf("report port: %w", err)}
				}
				return &reporter{f: os.NewFile(uintptr(fd), p)}
			}
		}
		pause(20 * time.Millisecond)
	}
	return &reporter{f: os.Stderr}
}

func (r *reporter) send(l csv.RunLine) {
	if r.err != nil {
		return
	}
	l.Version = 1
	b, err := json.Marshal(l)
	if err == nil {
		_, err = r.f.Write(append(b, '\n'))
	}
	r.err = err
}

func (r *reporter) step(format string, a ...any) {
	r.send(csv.RunLine{Step: fmt.Sprintf(format, a...)})
}

func (r *reporter) failed(what string, err error) {
	r.send(csv.RunLine{Failed: &csv.RunFailed{What: what, Output: err.Error()}})
}

func (r *reporter) close() {
	if r.f != nil && r.f != os.Stderr {
		_ = r.f.Close()
	}
}

// lastOutput is the end of what a command said.
func lastOutput(b []byte) string {
	const keep = 2000
	if len(b) > keep {
		b = b[len(b)-keep:]
	}
	return strings.ToValidUTF8(string(b), "?")
}
