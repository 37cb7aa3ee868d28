package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// TestUserland boots a Debian system under enforcement; see userland.sh.
func TestUserland(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots a whole Debian, which takes minutes (-short)")
	}
	for _, name := range strings.Fields(kernels()) {
		t.Run(name, func(t *testing.T) { userland(t, name) })
	}
}

// kernels are those of RINGWALL_KERNELS, as in ./check.
func kernels() string {
	if k := os.Getenv("RINGWALL_KERNELS"); k != "" {
		return k
	}
	return "6.1 6.12"
}

func userland(t *testing.T, kernel string) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	k, err := vm.FindKernel(ctx, kernel)
	skipUnsupported(t, err)
	image, err := vm.DebianImage(ctx, vm.Options{Packages: vm.Full(), Pool: vm.SmallPool(), Kernels: []vm.Kernel{k}})
	skipUnsupported(t, err)
	payload := prepare(t, image)
	script, err := os.ReadFile("userland.sh")
	if err != nil {
		t.Fatal(err)
	}
	out := &lines{t: t}
	r, err := vm.RunDebian(ctx, vm.DebianGuest{
		Image: image, Kernel: k, Payload: payload, Script: string(script), Reboots: 1, Output: out,
		Env:     []string{"RINGWALL_RUNNER=" + vm.RunnerPath, fmt.Sprintf("RINGWALL_REBOOT=%d", vm.ExitReboot)},
		Machine: vm.Machine{CPUs: 2, MemMiB: 3072},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.Line())
	if r.Exit != 0 {
		t.Errorf("exit %d", r.Exit)
	}
}

func skipUnsupported(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// prepare makes what the guest gets: the binary and a host's state, with every
// package of the image, by the quickstart's own scripts.
func prepare(t *testing.T, image vm.Image) string {
	t.Helper()
	dir := t.TempDir()
	parts := filepath.Join(dir, "payload", "parts")
	if err := os.MkdirAll(parts, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, nil, "../../build", filepath.Join(parts, "ringwall"))
	command(t, nil, "cp", "../../demo/tour.sh", "../../demo/prepare.sh", parts)
	// prepare.sh signs two programs of the quickstart; any will do here
	command(t, nil, "cp", "/bin/true", filepath.Join(parts, "greeter"))
	command(t, nil, "cp", "/bin/true", filepath.Join(parts, "attack"))
	lists := filepath.Join(dir, "root", "var/lib/apt")
	if err := errors.Join(os.MkdirAll(lists, 0o755), os.Symlink(image.Lists, filepath.Join(lists, "lists"))); err != nil {
		t.Fatal(err)
	}
	command(t, []string{"RINGWALL_ROOT=" + filepath.Join(dir, "root"), "RINGWALL_DEBS=" + image.Debs},
		"sh", filepath.Join(parts, "prepare.sh"), parts, filepath.Join(dir, "payload", "prepared"))
	return filepath.Join(dir, "payload")
}

func command(t *testing.T, env []string, argv ...string) {
	t.Helper()
	c := exec.Command(argv[0], argv[1:]...)
	c.Env = append(os.Environ(), env...)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// lines logs a guest's output line by line and fails the test for FAIL.
type lines struct {
	t    *testing.T
	part string
}

func (l *lines) Write(b []byte) (int, error) {
	l.part += string(b)
	for {
		line, rest, ok := strings.Cut(l.part, "\n")
		if !ok {
			return len(b), nil
		}
		l.part = rest
		line = strings.TrimRight(line, "\r")
		if strings.HasPrefix(line, "FAIL") {
			l.t.Error(line)
		} else {
			l.t.Log(line)
		}
	}
}
