package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm/internal/guest"
)

const qemuProgram = "qemu-system-x86_64"

// qemu is one run of the emulator.
type qemu struct {
	dir     string // for the console's file
	kernel  Kernel
	initrd  string
	cmdline string
	disks   []Disk
	machine Machine
	reboots int  // how often the guest may restart
	bare    bool // nothing of the caller's runs before the system is ready
	nonce   string
	output  io.Writer
}

// newNonce makes the word by which the host knows its own guest's frames.
func newNonce() string { return rand.Text() }

func (q *qemu) args() []string {
	m := q.machine
	if m.CPUs == 0 {
		m.CPUs = 2
	}
	if m.MemMiB == 0 {
		m.MemMiB = 1024
	}
	if m.ICount {
		m.CPUs = 1
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		"-machine", "q35", "-cpu", "max", "-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.MemMiB),
		"-kernel", q.kernel.Image, "-initrd", q.initrd,
		// no_timer_check: on a busy host the kernel takes an emulated timer for a broken one, and panics
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 mitigations=off cryptomgr.notests no_timer_check " + q.cmdline),
		"-chardev", "file,id=console,path=" + q.console(), "-serial", "chardev:console",
		"-chardev", "stdio,id=report,signal=off", "-serial", "chardev:report",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	}
	switch {
	case m.ICount:
		args = append(args, "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off")
	case haveKVM():
		args = append(args, "-accel", "kvm")
	default:
		args = append(args, "-accel", "tcg,thread=multi")
	}
	if m.Firmware != "" {
		args = append(args, "-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+m.Firmware, "-drive", "if=pflash,format=raw,unit=1,file="+m.Variables)
	}
	if m.Network {
		args = append(args, "-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	if q.reboots == 0 {
		args = append(args, "-no-reboot")
	}
	for i, d := range q.disks {
		format := d.Format
		if format == "" {
			format = "raw"
		}
		drive := fmt.Sprintf("file=%s,format=%s,if=none,id=d%d,cache=unsafe", strings.ReplaceAll(d.Path, ",", ",,"), format, i)
		if d.ReadOnly {
			drive += ",readonly=on"
		}
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return args
}

func (q *qemu) console() string { return filepath.Join(q.dir, "console") }

// haveKVM asks the processor too: some hosts have a /dev/kvm that does not
// work.
func haveKVM() bool {
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

// bootTries is how often a guest is started whose kernel panics before anything
// of the caller's runs.
const bootTries = 3

// run starts the emulator and follows it to its end. On a busy host the emulator
// sometimes breaks a kernel while that starts; nothing of ours has run by then,
// so that another start hides no fault of what is tested.
func (q *qemu) run(ctx context.Context) (Result, error) {
	for try := 1; ; try++ {
		r, err := q.once(ctx)
		started := r.Boots > 0 && !(q.bare && r.Boot == 0)
		if err == nil || started || try == bootTries || ctx.Err() != nil || !strings.Contains(r.Console, panicked) {
			return r, err
		}
		_ = os.Remove(q.console()) // the next watcher must not read this one's
		fmt.Fprintf(os.Stderr, "vm: STARTED AGAIN, since the kernel panicked before anything ran: %v\n", err)
	}
}

// panicked begins the kernel's message.
const panicked = "Kernel panic - not syncing"

func (q *qemu) once(ctx context.Context) (Result, error) {
	if _, err := exec.LookPath(qemuProgram); err != nil {
		return Result{}, fmt.Errorf("%s is not installed: %w", qemuProgram, errs.Unsupported)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	c := exec.CommandContext(ctx, qemuProgram, q.args()...)
	// A guest must not outlive a harness that was killed. The kernel ties this
	// to the thread that forked, so the thread stays.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = 5 * time.Second
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var stderr bytes.Buffer
	c.Stderr = &stderr
	report, err := c.StdoutPipe()
	if err != nil {
		return Result{}, err
	}
	started := time.Now()
	if err := c.Start(); err != nil {
		return Result{}, err
	}
	watched := make(chan struct{})
	watching, unwatch := context.WithCancel(ctx)
	go func() {
		defer close(watched)
		q.watch(watching, stop)
	}()
	f := follower{nonce: q.nonce, output: q.output, started: started, reboots: q.reboots}
	followErr := f.follow(report)
	if followErr != nil {
		stop(followErr)
	}
	waitErr := c.Wait()
	unwatch()
	<-watched
	r := f.result
	r.Total = time.Since(started)
	r.Console = tail(q.console(), 64<<10)
	switch {
	case f.exited:
		return r, nil
	case f.failed != "":
		return r, fmt.Errorf("in the guest: %s", f.failed)
	case context.Cause(ctx) != nil:
		err = context.Cause(ctx)
	case waitErr != nil:
		err = fmt.Errorf("%w: %s", waitErr, strings.TrimSpace(stderr.String()))
	default:
		err = errors.New("stopped without an exit code")
	}
	return r, fmt.Errorf("%w; the kernel's last messages:\n%s", err, lastLines(r.Console, 60))
}

// errPanic is why a guest that panicked is stopped.
var errPanic = errors.New("kernel panic")

// watch copies the console to whoever wants it, and stops a guest that
// panicked.
func (q *qemu) watch(ctx context.Context, stop context.CancelCauseFunc) {
	var f *os.File
	defer func() {
		if f != nil {
			_ = f.Close()
		}
	}()
	var last []byte
	for done := false; ; {
		if f == nil {
			f, _ = os.Open(q.console())
		}
		if f != nil {
			b, _ := io.ReadAll(f)
			if q.machine.Console != nil {
				_, _ = q.machine.Console.Write(b)
			}
			last = append(last, b...)
			if bytes.Contains(last, []byte(panicked)) && !done {
				// The rest of the trace follows within this time.
				time.Sleep(time.Second)
				stop(errPanic)
			}
			last = last[max(0, len(last)-64):]
		}
		if done {
			return
		}
		select {
		case <-ctx.Done():
			done = true
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// follower reads the report port: output of the program, and frames.
type follower struct {
	nonce   string
	output  io.Writer
	started time.Time
	reboots int
	result  Result
	exited  bool
	failed  string
}

// maxLine bounds what is held back while a line has no end yet.
const maxLine = 1 << 20

func (f *follower) follow(r io.Reader) error {
	b := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := b.ReadSlice('\n')
		if len(line) > 0 {
			if err := f.line(line); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case err != nil:
			return nil // the end of the emulator
		}
	}
}

func (f *follower) line(line []byte) error {
	before, verb, arg, ok := guest.CutFrame(f.nonce, line)
	if len(before) > 0 && f.output != nil {
		if _, err := f.output.Write(before); err != nil {
			return err
		}
	}
	if !ok {
		return nil
	}
	switch verb {
	case guest.VerbBoot:
		f.result.Release = arg
		f.result.Boots++
		if f.result.Boots > f.reboots+1 {
			return fmt.Errorf("guest restarted more than %d times: %w", f.reboots, errs.Invalid)
		}
	case guest.VerbReady:
		if f.result.Boot == 0 {
			f.result.Boot = time.Since(f.started)
		}
	case guest.VerbError:
		f.failed = arg
	case guest.VerbExit:
		code, err := strconv.Atoi(arg)
		if err != nil {
			return fmt.Errorf("exit code %q: %w", arg, errs.Invalid)
		}
		f.result.Exit, f.exited = code, true
	}
	return nil
}

// tail reads the last n bytes of a file; no file is no bytes.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, n))
	return string(b)
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
