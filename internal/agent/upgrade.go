package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// maxProgram bounds a new agent's binary.
const maxProgram = 512 << 20

type (
	// UpgradeRequest names a file on this host that is to become the agent.
	UpgradeRequest struct {
		File string `json:"file"`
	}
	// UpgradeAnswer says what is installed now. The new agent takes over at once.
	UpgradeAnswer struct {
		Program string `json:"program"`
		SHA256  string `json:"sha256"`
		Was     string `json:"was"` // SHA-256 of the agent that answered
	}
)

// Upgrade replaces the agent's own program, which the kernel lets nobody else
// do, and ends Run, so that the caller can execute the new one (see Upgraded).
// Enforcement goes on meanwhile.
//
// It fails closed: the new program must have the agent's role from the policy in
// force, and the kernel judges it once more when it is executed.
func (a *Agent) Upgrade(_ context.Context, q UpgradeRequest) (UpgradeAnswer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	out, err := a.upgrade(q.File)
	if err != nil {
		return out, fmt.Errorf("upgrade: %w", err)
	}
	a.pipe.notice(noticeUpgrade, "the agent was replaced: sha256 "+out.SHA256+" takes over from "+out.Was)
	a.upgraded = true
	a.stopSoon()
	return out, nil
}

func (a *Agent) upgrade(file string) (UpgradeAnswer, error) {
	to := a.opts.Program
	out := UpgradeAnswer{Program: to, Was: a.self.String()}
	if a.loaded == nil {
		return out, fmt.Errorf("no policy is in force: %w", errs.Conflict)
	}
	if to == "" {
		return out, fmt.Errorf("this agent does not know where its program lies: %w", errs.Unsupported)
	}
	tmp, d, err := a.copyProgram(file)
	if err != nil {
		return out, err
	}
	defer func() { _ = os.Remove(tmp) }() // it may have been moved to its place
	out.SHA256 = d.String()
	e := a.loaded.compiled.Table.Entries[integrity.Key{Digest: d}]
	switch {
	case d == a.self:
		return out, fmt.Errorf("%s is what runs already: %w", file, errs.Conflict)
	case !e.Kinds.Has(integrity.KindExec):
		return out, fmt.Errorf("%s (sha256 %v) is not authorised: hand its release in first with `ringwall host add-release`: %w", file, d, errs.Denied)
	case e.Roles&integrity.RoleAgent == 0:
		return out, fmt.Errorf("%s (sha256 %v) may run, but not as the agent: the policy needs a program rule with `may: [agent]` for the product: %w", file, d, errs.Denied)
	}
	// The copy lies in a directory that only the agent can change. Guarded by
	// itself it can be moved to where others write names.
	if err := a.enforcer.Guard(tmp); err != nil {
		return out, err
	}
	// the old one's inode may be another file's one day
	if err := a.enforcer.Unguard(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return out, err
	}
	if err = os.Rename(tmp, to); errors.Is(err, unix.EXDEV) {
		err = errors.Join(a.enforcer.Unguard(tmp), a.install(tmp, to, d))
	}
	return out, errors.Join(err, a.enforcer.Guard(to))
}

// copyProgram makes a private copy: what is judged is what is installed.
func (a *Agent) copyProgram(file string) (name string, d integrity.Digest, err error) {
	src, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", d, err
	}
	defer src.Close()
	if st, err := src.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxProgram {
		return "", d, fmt.Errorf("%s: no regular file of up to %d bytes: %w", file, maxProgram, errors.Join(err, errs.Invalid))
	}
	dst, err := os.CreateTemp(a.state.path(dirIncoming), "agent-*")
	if err != nil {
		return "", d, err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(dst, h), io.LimitReader(src, maxProgram))
	h.Sum(d[:0])
	if err = errors.Join(err, dst.Chmod(0o755), dst.Sync(), dst.Close()); err != nil {
		_ = os.Remove(dst.Name())
	}
	return dst.Name(), d, err
}

// install is for a program on another file system than the state: it is written
// beside the name, guarded once it has it, and looked at again after that.
func (a *Agent) install(from, to string, want integrity.Digest) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := host.WriteFileFrom(to, src, 0o755); err != nil {
		return err
	}
	if err := a.enforcer.Guard(to); err != nil {
		return err
	}
	// who opened it for writing before that may have written
	if got, err := hashFile(to); err != nil || got != want {
		return errors.Join(err, fmt.Errorf("somebody wrote to %s meanwhile, upgrade again: %w", filepath.Base(to), errs.Conflict))
	}
	return nil
}

// Upgraded says that Run ended for a new program to be executed in its place.
func (a *Agent) Upgraded() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.upgraded
}
