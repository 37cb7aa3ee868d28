package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Where things are in a running Debian guest. All of it is in /run, so the
// disk image stays what Debian's packages made it.
const (
	RunDir     = "/run/ringwall-vm"
	RunnerPath = RunDir + "/runner" // starts the script; it is a static ELF program
	ScriptPath = RunDir + "/script" // the script, where it is not in the payload
	runnerUnit = "ringwall-vm.service"
)

// ExitReboot is the exit code with which a script asks to be run again after a
// reboot.
const ExitReboot = 194

// Debian makes the first process hand over to the system on the first disk.
type Debian struct {
	Payload bool   // the second disk holds /payload
	Script  string // content of ScriptPath; "" runs /payload/run
	Mask    []string
}

// state is what the runner finds in RunDir.
type state struct {
	Nonce   string
	Program string
	Env     []string
	Boot    int
}

const sysroot = "/sysroot"

// bootsPath counts the boots on the guest's own disk.
const bootsPath = "/var/tmp/ringwall-vm.boots"

// switchRoot mounts the disks and becomes the system's own first process. It
// returns only on failure.
func switchRoot(c Config) error {
	if err := mountDisk("/dev/vda", sysroot, 0); err != nil {
		return err
	}
	if c.Debian.Payload {
		if err := mountDisk("/dev/vdb", sysroot+"/payload", unix.MS_RDONLY); err != nil {
			return err
		}
	}
	if err := mount("tmpfs", sysroot+"/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=25%"); err != nil {
		return err
	}
	n, err := countBoot(sysroot + bootsPath)
	if err != nil {
		return err
	}
	if err := prepareRun(c, n); err != nil {
		return err
	}
	if err := unix.Mount("/dev", sysroot+"/dev", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move /dev: %w", err)
	}
	if err := os.Chdir(sysroot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	const system = "/usr/lib/systemd/systemd"
	err = unix.Exec(system, []string{"/sbin/init"}, []string{"HOME=/", "TERM=linux"})
	return fmt.Errorf("exec %s: %w", system, err)
}

func mountDisk(device, target string, flags uintptr) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(device); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no disk %s", device)
		}
	}
	return mount(device, target, "ext4", flags, "")
}

func countBoot(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	n := 0
	if len(b) > 0 {
		if n, err = strconv.Atoi(string(b)); err != nil {
			return 0, err
		}
	}
	n++
	return n, os.WriteFile(path, []byte(strconv.Itoa(n)), 0o600)
}

// prepareRun puts the runner, its unit and the masks of slow units into /run,
// where systemd looks before it looks into /usr.
func prepareRun(c Config, boot int) error {
	dir := sysroot + RunDir
	units := sysroot + "/run/systemd/system"
	wants := units + "/multi-user.target.wants"
	for _, d := range []string{dir, wants} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	s := state{Nonce: c.Nonce, Program: "/payload/run", Env: c.Env, Boot: boot}
	if c.Debian.Script != "" {
		s.Program = ScriptPath
		if err := os.WriteFile(sysroot+ScriptPath, []byte(c.Debian.Script), 0o755); err != nil {
			return err
		}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/state", b, 0o600); err != nil {
		return err
	}
	if err := copyFile(sysroot+RunnerPath, "/init"); err != nil {
		return err
	}
	for _, m := range c.Debian.Mask {
		if err := os.Symlink("/dev/null", filepath.Join(units, m)); err != nil {
			return err
		}
	}
	// Type=exec: the job ends at once, so the system counts as started while
	// the script runs. OOMPolicy: or the end of a process that the script
	// started would be the runner's, and nobody left to stop the machine.
	unit := "[Unit]\nDescription=Script of the harness\nAfter=multi-user.target\n" +
		"[Service]\nType=exec\nExecStart=" + RunnerPath + "\nKillMode=process\nOOMPolicy=continue\nTasksMax=infinity\nLimitMEMLOCK=infinity\n"
	if err := os.WriteFile(filepath.Join(units, runnerUnit), []byte(unit), 0o644); err != nil {
		return err
	}
	return os.Symlink("../"+runnerUnit, filepath.Join(wants, runnerUnit))
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// Runner runs the script in a Debian guest, reports its exit code and stops
// the machine, or restarts it where the script asks for that.
func Runner() error {
	b, err := os.ReadFile(RunDir + "/state")
	if err != nil {
		return err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	if err := os.Remove(RunDir + "/state"); err != nil {
		return err
	}
	code, err := script(s)
	if err == nil && code == ExitReboot {
		return exec.Command("/usr/bin/systemctl", "--no-block", "reboot").Run()
	}
	if err != nil {
		err = Send(s.Nonce, VerbError, err.Error())
	} else {
		err = Send(s.Nonce, VerbExit, strconv.Itoa(code))
	}
	// The host discards the disk: an orderly shutdown would only take time.
	unix.Sync()
	return errors.Join(err, unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func script(s state) (int, error) {
	if err := rawPort(); err != nil {
		return 0, err
	}
	up, err := uptime()
	if err != nil {
		return 0, err
	}
	if err := Send(s.Nonce, VerbReady, up); err != nil {
		return 0, err
	}
	out, err := os.OpenFile(Report, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	c := exec.Command(s.Program)
	c.Dir = "/root"
	c.Env = append(s.Env, "RINGWALL_BOOT="+strconv.Itoa(s.Boot))
	c.Stdout, c.Stderr = out, out
	err = c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok {
			return 128 + int(ws.Signal()), nil
		}
	}
	return 0, err
}
