package hypervisor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"ringwall/internal/errs"
)

// program is the emulator, on the only architecture whose machines are made here.
const program = "qemu-system-x86_64"

// ReportPort is the name of the virtio serial port by which a guest reports:
// what stands in /sys/class/virtio-ports/PORT/name.
const ReportPort = "ringwall.report"

// Machine is one virtual machine. It has no network.
type Machine struct {
	Kernel    string // the boot image's path
	Initramfs string // the path of the first file system's archive
	Cmdline   string // appended to the kernel's command line
	CPUs      int    // 0: 2
	MemMiB    int    // 0: 1024
	Disks     []Disk
}

// Disk is a virtio block device.
type Disk struct {
	Path     string
	Format   string // raw or qcow2
	Serial   string // what stands in /sys/block/DISK/serial; at most 20 bytes
	ReadOnly bool
}

// Result says how a machine ended.
type Result struct {
	Console string // the end of the kernel's messages, at most 64 KiB
}

// Panicked says whether the guest's kernel gave up.
func (r *Result) Panicked() bool { return strings.Contains(r.Console, "Kernel panic - not syncing") }

// Bounds of what a guest may write.
const (
	maxConsole = 64 << 10
	// MaxReport is how many bytes of a guest's report are read; a guest that
	// writes more is stopped.
	MaxReport = 64 << 20
)

// Check says whether machines can be started here, before anything long begins.
func Check() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("virtual machines on %s: %w", runtime.GOARCH, errs.Unsupported)
	}
	for _, p := range []string{program, imageTool} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%s is not installed: %w", p, errs.Unsupported)
		}
	}
	return nil
}

// HaveKVM says whether the processor can run guests at its own speed. Some
// hosts have a /dev/kvm that does not work, so the processor is asked, too.
func HaveKVM() bool {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !(bytes.Contains(cpu, []byte(" vmx ")) || bytes.Contains(cpu, []byte(" svm "))) {
		return false
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	return f.Close() == nil
}

// args is the emulator's command line. Descriptor 3 is the console's.
func (m *Machine) args(kvm bool) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none", "-nic", "none",
		"-machine", "q35", "-cpu", "max", "-smp", strconv.Itoa(cmp.Or(m.CPUs, 2)), "-m", strconv.Itoa(cmp.Or(m.MemMiB, 1024)),
		"-kernel", m.Kernel, "-initrd", m.Initramfs,
		// no_timer_check: on a busy host the kernel takes an emulated timer for a broken one, and panics
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 no_timer_check " + m.Cmdline),
		"-chardev", "file,id=console,path=/dev/fd/3", "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "stdio,id=report,signal=off", "-device", "virtserialport,chardev=report,name=" + ReportPort,
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
		// an emulator that a guest broke out of starts nothing
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
	if kvm {
		args = append(args, "-accel", "kvm")
	} else {
		args = append(args, "-accel", "tcg,thread=multi")
	}
	for i, d := range m.Disks {
		drive := fmt.Sprintf("file=%s,format=%s,if=none,id=d%d,cache=unsafe", comma(d.Path), d.Format, i)
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		device := fmt.Sprintf("virtio-blk-pci,drive=d%d", i)
		if d.Serial != "" {
			device += ",serial=" + comma(d.Serial)
		}
		args = append(args, "-drive", drive, "-device", device)
	}
	return args
}

// comma quotes a value in the emulator's comma-separated options.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// Run starts the machine and hands what the guest writes to its report port to
// report, which sees the end of it when the machine ends. When report returns
// before, the machine is stopped; its error is Run's. A machine that ended is no
// error, whatever the guest did.
func (m *Machine) Run(ctx context.Context, report func(io.Reader) error) (Result, error) {
	r, err := m.run(ctx, report)
	if err != nil {
		return r, fmt.Errorf("virtual machine: %w", err)
	}
	return r, nil
}

func (m *Machine) run(ctx context.Context, report func(io.Reader) error) (Result, error) {
	if err := Check(); err != nil {
		return Result{}, err
	}
	var r Result
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	c := exec.CommandContext(ctx, program, m.args(HaveKVM())...)
	// A guest must not outlive a program that was killed. The kernel ties this to
	// the thread that forked, so the thread stays.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = 5 * time.Second
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	said := &tail{max: maxConsole}
	c.Stderr = said
	out, err := c.StdoutPipe()
	if err != nil {
		return r, err
	}
	// Never written to: at its end the port would count as unplugged, and the
	// guest's writes would wait for ever.
	in, err := c.StdinPipe()
	if err != nil {
		return r, err
	}
	defer in.Close()
	console, theirs, err := os.Pipe()
	if err != nil {
		return r, err
	}
	defer console.Close()
	c.ExtraFiles = []*os.File{theirs}
	err = c.Start()
	_ = theirs.Close()
	if err != nil {
		return r, err
	}
	messages := &tail{max: maxConsole}
	var reading sync.WaitGroup
	reading.Go(func() { _, _ = io.Copy(messages, console) })
	lines := &bounded{r: out, left: MaxReport}
	switch err := report(lines); {
	case err != nil:
		stop(err)
	case !lines.ended:
		stop(errEnough)
	}
	waitErr := c.Wait()
	_ = console.SetReadDeadline(time.Now().Add(time.Second))
	reading.Wait()
	r.Console = messages.String()
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errEnough):
		return r, nil
	case cause != nil:
		return r, cause
	case waitErr != nil:
		return r, fmt.Errorf("%s: %w: %s", program, waitErr, strings.TrimSpace(said.String()))
	}
	return r, nil
}

// errEnough stops a machine whose report is complete.
var errEnough = errors.New("the report is complete")

// bounded reads at most so many bytes; more is an error, not an end.
type bounded struct {
	r     io.Reader
	left  int64
	ended bool
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("the guest reports more than %d bytes: %w", MaxReport, errs.Invalid)
	}
	if errors.Is(err, os.ErrClosed) {
		err = io.EOF
	}
	b.ended = b.ended || errors.Is(err, io.EOF)
	return n, err
}

// tail keeps the end of what is written.
type tail struct {
	max int
	b   []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - t.max; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// String is what is kept.
func (t *tail) String() string { return string(t.b) }
