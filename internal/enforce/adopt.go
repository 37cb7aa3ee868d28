package enforce

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// AdoptSelf gives this process the agent's role. It must come before Protect;
// an agent started later gets the role from its content at execve.
func (e *Engine) AdoptSelf() error {
	return e.adopt(os.Getpid(), engineTask{Roles: uint16(integrity.RoleAgent)})
}

func (e *Engine) adopt(pid int, t engineTask) error {
	start, err := startTicks(pid)
	if err != nil {
		return err
	}
	if err := e.objs.Adopted.Put(uint32(pid), engineAdoption{Start: start, Task: t}); err != nil {
		return fmt.Errorf("adopt process %d: %w", pid, err)
	}
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	return e.change(func(st *engineSteering) { st.AdoptedUntilNs = uint64(now) })
}

// Running is a process that was there before enforcement.
type Running struct {
	PID    int
	Exe    string
	Digest integrity.Digest
	Listed bool // its program is authorised by the table in force
}

// Adopt gives processes that run already the roles and interpreter rules of
// their programs, and returns them all, so that the agent can report those
// that would not be allowed to start. Kernel threads have no program and are
// left out.
func (e *Engine) Adopt(ctx context.Context) ([]Running, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	digests := map[[2]uint64]integrity.Digest{}
	var out []Running
	for _, dir := range dirs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		d, err := exeDigest(pid, digests)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a kernel thread, or gone
		}
		if err != nil {
			return nil, err
		}
		exe, _ := os.Readlink(dir + "/exe")
		r := Running{PID: pid, Exe: exe, Digest: d}
		entry, err := e.Lookup(integrity.Key{Space: integrity.SpaceSHA256, Digest: d})
		if err == nil {
			r.Listed = true
			if entry.Roles != 0 || entry.Interpreter != 0 {
				err = e.adopt(pid, engineTask{Roles: uint16(entry.Roles), Interpreter: entry.Interpreter})
				if err != nil && !errors.Is(err, errs.NotFound) {
					return nil, err
				}
			}
		}
		out = append(out, r)
	}
	return out, nil
}

// exeDigest hashes the program of a process; seen remembers by device and inode.
func exeDigest(pid int, seen map[[2]uint64]integrity.Digest) (integrity.Digest, error) {
	var d integrity.Digest
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return d, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return d, fmt.Errorf("program of process %d: %w", pid, err)
	}
	key := [2]uint64{st.Dev, st.Ino}
	if d, ok := seen[key]; ok {
		return d, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, fmt.Errorf("program of process %d: %w", pid, err)
	}
	h.Sum(d[:0])
	seen[key] = d
	return d, nil
}

// startTicks is field 22 of /proc/PID/stat: the start time in clock ticks.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", pid, errs.NotFound)
	}
	n, err := parseStart(b)
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", pid, err)
	}
	return n, nil
}

// parseStart reads the start time from a stat line, see proc(5).
func parseStart(stat []byte) (uint64, error) {
	// the name in parentheses may hold anything
	_, rest, ok := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("stat line of %d fields: %w", len(fields), errs.Invalid)
	}
	n, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("start time %q: %w", fields[19], errs.Invalid)
	}
	return n, nil
}
