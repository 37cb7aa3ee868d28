package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Init is process 1 of the initramfs. It never returns: it reports and stops
// the machine, whatever happens.
func Init() {
	c, err := boot()
	code := 0
	if err == nil {
		if c.Debian != nil {
			err = switchRoot(c)
		} else {
			code, err = run(c)
		}
	}
	// Nothing may write after the last frame.
	_ = unix.Kill(-1, unix.SIGKILL)
	if err != nil {
		_ = Send(c.Nonce, VerbError, err.Error())
	} else {
		_ = Send(c.Nonce, VerbExit, strconv.Itoa(code))
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

// Send writes one frame to the host and waits until it left the port.
func Send(nonce, verb, arg string) error {
	f, err := os.OpenFile(Report, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		// The console is better than silence; the host shows it on failure.
		fmt.Println(verb, arg)
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(Frame(nonce, verb, arg)); err != nil {
		return err
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
}

func boot() (Config, error) {
	// Without devtmpfs there is no port to report to, so it comes first.
	if err := mount("devtmpfs", "/dev", "devtmpfs", 0, ""); err != nil {
		return Config{}, err
	}
	if err := rawPort(); err != nil {
		return Config{}, err
	}
	c, err := ReadConfig()
	if err != nil {
		return c, err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return c, err
	}
	for _, m := range c.Modules {
		if err := loadModule(filepath.Join(ModuleDir, m)); err != nil {
			return c, err
		}
	}
	if err := os.RemoveAll(ModuleDir); err != nil {
		return c, err
	}
	return c, Send(c.Nonce, VerbBoot, unix.ByteSliceToString(u.Release[:]))
}

// rawPort makes the report port pass bytes through unchanged.
func rawPort() error {
	f, err := os.OpenFile(Report, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	t.Cflag |= unix.CLOCAL
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	// A module for hardware that is absent, or one that is built in here, is
	// no reason to stop: what really needs it will say so.
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}

// mountAll mounts what a test may expect of a Linux system.
func mountAll() error {
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		kind, target, data string
		flags              uintptr
		optional           bool
	}{
		{kind: "proc", target: "/proc", flags: quiet},
		{kind: "sysfs", target: "/sys", flags: quiet},
		{kind: "securityfs", target: "/sys/kernel/security", flags: quiet},
		{kind: "bpf", target: "/sys/fs/bpf", flags: quiet, data: "mode=700"},
		{kind: "tracefs", target: "/sys/kernel/tracing", flags: quiet, optional: true},
		{kind: "debugfs", target: "/sys/kernel/debug", flags: quiet, optional: true},
		{kind: "cgroup2", target: "/sys/fs/cgroup", flags: quiet},
		{kind: "devpts", target: "/dev/pts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=620,ptmxmode=666"},
		{kind: "tmpfs", target: "/dev/shm", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
		{kind: "tmpfs", target: "/run", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=755"},
	} {
		if err := mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil && !m.optional {
			return err
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

// run starts the program, reaps until it ends, and returns its exit code; a
// death by signal n is 128+n, as in a shell.
func run(c Config) (int, error) {
	if err := mountAll(); err != nil {
		return 0, err
	}
	if err := loopbackUp(); err != nil {
		return 0, err
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return 0, err
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(Report, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, err
	}
	up, err := uptime()
	if err != nil {
		return 0, err
	}
	if err := Send(c.Nonce, VerbReady, up); err != nil {
		return 0, err
	}
	p, err := os.StartProcess(c.Argv[0], c.Argv, &os.ProcAttr{
		Dir: c.Dir, Env: c.Env, Files: []*os.File{null, out, out},
		Sys: &unix.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case pid == p.Pid && ws.Exited():
			return ws.ExitStatus(), nil
		case pid == p.Pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		}
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// uptime is the time since the kernel started, in seconds.
func uptime() (string, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return "", err
	}
	return strconv.FormatFloat(time.Duration(t.Nano()).Seconds(), 'f', 2, 64), nil
}
