package enforce

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// canaryMark ends the listed program; the unlisted one has random bytes there.
const canaryMark = "ringwall canary 1"

// canaryProgram is a static ELF program for the architecture (GOARCH) that
// exits with 0, followed by tail. Nothing else is in it, so that it runs on any
// system and its digest is known when a policy is compiled. nil: no program for
// this architecture.
func canaryProgram(arch, tail string) []byte {
	var machine uint16
	var code []byte
	switch arch {
	case "amd64": // xor edi,edi; mov eax,60; syscall
		machine, code = 62, []byte{0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05}
	case "arm64": // mov x0,#0; mov x8,#93; svc #0
		machine, code = 183, []byte{0x00, 0x00, 0x80, 0xd2, 0xa8, 0x0b, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4}
	default:
		return nil
	}
	const start, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code))
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	le := binary.LittleEndian
	b = le.AppendUint16(b, 2) // ET_EXEC
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, start+headers) // entry
	b = le.AppendUint64(b, 64)            // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // read, execute
	for _, v := range []uint64{0, start, start, size, size, 0x10000} {
		b = le.AppendUint64(b, v)
	}
	return append(append(b, code...), tail...)
}

// CanaryDigest is the digest of the program that a canary expects to run, for
// the architecture of this build. Each compiled table lists it for
// integrity.KindExec and integrity.KindLibrary; it does nothing but exit.
func CanaryDigest() integrity.Digest {
	return sha256.Sum256(canaryProgram(runtime.GOARCH, canaryMark))
}

// IsCanary says that an event was raised by a canary of this engine, and not by
// somebody else's program: the digest of each canary is fresh.
func (e *Engine) IsCanary(ev Event) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !ev.Digest.IsZero() && e.canaries[ev.Digest]
}

// Canary shows that the kernel decides: it starts a fresh program that no policy
// lists and one that every policy lists, inside the scope. Where programs are
// enforced the first must be refused with EPERM and the second must run. Where
// they are audited, or a break-glass permit is in force, both must run and the
// kernel must have counted the first. On success Status claims that mode.
//
// It fails closed: any other outcome is an error, and takes the claim back.
func (e *Engine) Canary(ctx context.Context) error {
	mode, err := e.canary(ctx)
	now, clockErr := sinceBoot()
	if err == nil {
		err = clockErr
	}
	if err != nil {
		now, mode = 0, integrity.ModeOff
	}
	changed := e.change(func(st *engineSteering) {
		st.CanaryNs, st.CanaryMode = uint64(now), uint32(mode)
	})
	if err != nil {
		return fmt.Errorf("canary: %w", err)
	}
	return changed
}

func (e *Engine) canary(ctx context.Context) (integrity.Mode, error) {
	st, err := e.Status()
	if err != nil {
		return 0, err
	}
	mode := st.Modes[integrity.KindExec]
	if mode == integrity.ModeOff {
		return 0, fmt.Errorf("no policy for programs is in force: %w", errs.Conflict)
	}
	refuses := mode == integrity.ModeEnforce && st.RelaxedUntil == 0 // else it runs, up to its first mapping where libraries are enforced
	dir, err := e.canaryDir()
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	listed, fresh := filepath.Join(dir, "listed"), filepath.Join(dir, "unlisted")
	program := canaryProgram(runtime.GOARCH, canaryMark)
	if program == nil {
		return 0, fmt.Errorf("no program for %s: %w", runtime.GOARCH, errs.Unsupported)
	}
	if err := os.WriteFile(listed, program, 0o700); err != nil { //nolint:gosec // a program, in a private directory
		return 0, fmt.Errorf("write the listed program: %w", err)
	}
	program = canaryProgram(runtime.GOARCH, rand.Text())
	if err := os.WriteFile(fresh, program, 0o700); err != nil { //nolint:gosec // as above
		return 0, fmt.Errorf("write the unlisted program: %w", err)
	}
	e.expect(sha256.Sum256(program))
	if err := e.start(ctx, listed); err != nil {
		return 0, fmt.Errorf("the listed program does not run: %w: %w", err, errs.Conflict)
	}
	before, err := e.Counters()
	if err != nil {
		return 0, err
	}
	err = e.start(ctx, fresh)
	after, countErr := e.Counters()
	switch {
	case countErr != nil:
		return 0, countErr
	case refuses && err == nil:
		return 0, fmt.Errorf("an unlisted program ran: nothing is enforced: %w", errs.Conflict)
	case refuses && (!errors.Is(err, unix.EPERM) || after.Refused == before.Refused):
		return 0, fmt.Errorf("an unlisted program failed, but was not refused by policy: %w: %w", err, errs.Conflict)
	case !refuses && err != nil && st.Modes[integrity.KindLibrary] != integrity.ModeEnforce:
		return 0, fmt.Errorf("an unlisted program does not run although it is only audited: %w: %w", err, errs.Conflict)
	case !refuses && after.Audited == before.Audited:
		return 0, fmt.Errorf("an unlisted program ran and was not noticed: %w", errs.Conflict)
	case !refuses:
		return integrity.ModeAudit, nil
	}
	return mode, nil
}

// expect remembers the digest of a canary, and of a bounded number before it.
func (e *Engine) expect(d integrity.Digest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.canaries == nil || len(e.canaries) >= 64 {
		e.canaries = map[integrity.Digest]bool{}
	}
	e.canaries[d] = true
}

// start runs a program inside the scope. A file that was just written may still
// be held by the child of another goroutine that is about to execute; such a
// moment passes.
func (e *Engine) start(ctx context.Context, path string) error {
	for try := 0; ; try++ {
		c := exec.CommandContext(ctx, path)
		c.Env = []string{} // nothing of ours is its business
		c.Dir = "/"
		scope, err := e.intoScope(c)
		if err != nil {
			return err
		}
		err = c.Run()
		scope.Close()
		busy := errors.Is(err, unix.ETXTBSY) || errors.Is(err, unix.EPERM) && hasWriter(path)
		if !busy || try == 20 {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// hasWriter asks for a read lease, which the kernel grants only if nobody has
// the file open for writing.
func hasWriter(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	return errors.Is(err, unix.EAGAIN)
}

// intoScope makes c start inside the engine's cgroup. Close the result after
// the command has been started.
func (e *Engine) intoScope(c *exec.Cmd) (*os.File, error) {
	if e.opts.ScopeCgroup == "" {
		return nil, nil // Close of a nil *os.File is an error, not a panic
	}
	dir, err := os.Open(e.opts.ScopeCgroup)
	if err != nil {
		return nil, fmt.Errorf("scope: %w", err)
	}
	c.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return dir, nil
}

// canaryDir makes a private directory where programs can be started.
func (e *Engine) canaryDir() (string, error) {
	places := []string{e.opts.CanaryDir, "/var/lib/ringwall", "/var/tmp", "/tmp", "/dev/shm"}
	for _, place := range places {
		var fs unix.Statfs_t
		if place == "" || unix.Statfs(place, &fs) != nil || fs.Flags&(unix.ST_NOEXEC|unix.ST_RDONLY) != 0 {
			continue
		}
		if fs.Blocks != 0 && fs.Bavail < 16 {
			continue // full: the proof must not wait for somebody to clean up
		}
		dir, err := os.MkdirTemp(place, "canary-") // mode 0700
		if err != nil {
			continue
		}
		return dir, nil
	}
	return "", fmt.Errorf("no writable directory with room and without noexec among %v: %w", places[1:], errs.Unsupported)
}
