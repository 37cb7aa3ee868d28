package enforce

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// MustMeasure reports whether authorised scripts have to be measured before an
// interpreter opens them, see Measure: this kernel cannot hash at that moment.
func (e *Engine) MustMeasure() bool {
	_, early := e.links["rw_open_early"]
	return early
}

// Measure has the kernel compute and keep the digest of an open regular file.
// Kernels before 6.9 cannot do so at the moment at which an interpreter opens a
// file: there a script that was not executed or mapped before must be measured
// first, and so must whatever a strict interpreter reads, its libraries too.
// The kernel forgets when it drops the inode from memory; holding f open
// prevents that. The caller needs the agent's role.
//
// It wraps errs.Conflict if the content cannot be pinned down: somebody has it
// open for writing, or the file system is not stable.
func (e *Engine) Measure(f *os.File) error {
	var failed error
	c, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("measure %s: %w", f.Name(), err)
	}
	if err := c.Control(func(fd uintptr) {
		// rw_measure in bpf/interpreter.h does its work when a lock is asked for
		if failed = unix.Flock(int(fd), unix.LOCK_SH|unix.LOCK_NB); failed == nil {
			failed = unix.Flock(int(fd), unix.LOCK_UN)
		}
	}); err != nil {
		return fmt.Errorf("measure %s: %w", f.Name(), err)
	}
	if failed != nil {
		return fmt.Errorf("measure %s: %w: %w", f.Name(), failed, errs.Conflict)
	}
	return nil
}
