package testkit

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TPM is a software TPM (swtpm) of a test's own, with its state on the disk; it
// ends with the test.
type TPM struct {
	Dir  string // of its state
	Path string // of its socket

	t   testing.TB
	cmd *exec.Cmd
}

// StartTPM makes one and starts it. It skips the test, loudly, where there is no
// swtpm.
func StartTPM(t testing.TB) *TPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no swtpm here; fix: apt-get install swtpm")
	}
	dir, err := os.MkdirTemp("", "rwtpm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	e := &TPM{t: t, Dir: dir, Path: filepath.Join(dir, "tpm")}
	t.Cleanup(func() {
		e.Stop()
		_ = os.RemoveAll(dir)
	})
	e.Start()
	return e
}

// Start switches it on, as a boot does: Startup(CLEAR).
func (e *TPM) Start() {
	e.t.Helper()
	_ = os.Remove(e.Path)
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.Dir, "--server", "type=unixio,path="+e.Path, "--flags", "not-need-init,startup-clear")
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	for range 200 {
		if c, err := net.Dial("unix", e.Path); err == nil { // the file exists a while before anyone listens
			_ = c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	e.t.Fatal("swtpm does not start")
}

// Stop switches it off, without a Shutdown.
func (e *TPM) Stop() {
	if e.cmd != nil {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait()
		_ = os.Remove(e.Path)
		e.cmd = nil
	}
}
