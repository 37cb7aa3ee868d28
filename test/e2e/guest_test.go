package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// TestGuests takes whole Debian systems through their scripts. One image, with
// all kernels, and one set of signed packages serve all of them.
//
// The userland lives on every kernel of RINGWALL_KERNELS. Robustness is about
// the agent and the disk, not about the kernel: the first one will do.
func TestGuests(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots a whole Debian, which takes minutes (-short)")
	}
	names := kernels()
	h := setUp(t, names)
	for i, name := range names {
		k, ok := h.kernels[name]
		t.Run("userland/"+name, func(t *testing.T) {
			skipMissing(t, ok, name)
			h.take(t, k, "userland.sh", 1)
		})
		if i > 0 {
			continue
		}
		t.Run("robustness/"+name, func(t *testing.T) {
			skipMissing(t, ok, name)
			h.take(t, k, "robustness.sh", robustnessReboots)
		})
	}
}

// robustnessReboots is how often robustness.sh restarts its guest.
const robustnessReboots = 5

// kernels are those of RINGWALL_KERNELS, as in ./check.
func kernels() []string {
	if k := strings.Fields(os.Getenv("RINGWALL_KERNELS")); len(k) > 0 {
		return k
	}
	return []string{"6.1", "6.12"}
}

func skipMissing(t *testing.T, ok bool, kernel string) {
	t.Helper()
	if !ok {
		t.Skipf("SKIPPED, NOT TESTED: the package sources have no kernel %s", kernel)
	}
}

// house is what all guests share.
type house struct {
	image   vm.Image
	kernels map[string]vm.Kernel // those that there are
	payload string               // parts and what demo/prepare.sh made
}

// setUp makes the image, the binaries and a host's state, with every package of
// the image, by the quickstart's own script.
func setUp(t *testing.T, names []string) *house {
	t.Helper()
	h := &house{kernels: map[string]vm.Kernel{}}
	o := vm.Options{Packages: append(vm.Full(), "golang-go"), Pool: vm.SmallPool()}
	for _, n := range names {
		k, err := vm.FindKernel(t.Context(), n)
		if errors.Is(err, errs.Unsupported) {
			continue // the subtest says so
		}
		if err != nil {
			t.Fatal(err)
		}
		h.kernels[n] = k
		if !slices.ContainsFunc(o.Kernels, func(x vm.Kernel) bool { return x.Release == k.Release }) {
			o.Kernels = append(o.Kernels, k)
		}
	}
	var err error
	h.image, err = vm.DebianImage(t.Context(), o)
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.prepare(t)
	return h
}

func (h *house) prepare(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	h.payload = filepath.Join(dir, "payload")
	parts, lists := filepath.Join(h.payload, "parts"), filepath.Join(dir, "root/var/lib/apt")
	if err := errors.Join(os.MkdirAll(parts, 0o755), os.MkdirAll(lists, 0o755), os.Symlink(h.image.Lists, filepath.Join(lists, "lists"))); err != nil {
		t.Fatal(err)
	}
	command(t, nil, "../../build", filepath.Join(parts, "ringwall"))
	command(t, []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-o", filepath.Join(parts, "probe"), "./probe")
	command(t, nil, "cp", "../../demo/tour.sh", "../../demo/prepare.sh", parts)
	// prepare.sh signs two programs of the quickstart; any will do here
	command(t, nil, "cp", "/bin/true", filepath.Join(parts, "greeter"))
	command(t, nil, "cp", "/bin/true", filepath.Join(parts, "attack"))
	command(t, []string{"RINGWALL_ROOT=" + filepath.Join(dir, "root"), "RINGWALL_DEBS=" + h.image.Debs, "RINGWALL_ORIGINS=Debian, Debian Backports"},
		"sh", filepath.Join(parts, "prepare.sh"), parts, filepath.Join(h.payload, "prepared"))
}

// take runs a script, which follows start.sh, in a guest with that kernel.
func (h *house) take(t *testing.T, k vm.Kernel, script string, reboots int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
	defer cancel()
	var text []byte
	for _, f := range []string{"start.sh", script} {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, b...)
	}
	out := &lines{t: t}
	r, err := vm.RunDebian(ctx, vm.DebianGuest{
		Image: h.image, Kernel: k, Payload: h.payload, Script: string(text), Reboots: reboots, Output: out,
		Env:     []string{"RINGWALL_RUNNER=" + vm.RunnerPath, fmt.Sprintf("RINGWALL_REBOOT=%d", vm.ExitReboot)},
		Machine: vm.Machine{CPUs: 2, MemMiB: 2048},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.Line())
	if r.Exit != 0 || out.ok == 0 {
		t.Errorf("exit %d after %d results", r.Exit, out.ok)
	}
	// what is guarded must not get in the way of a restart
	for line := range strings.Lines(r.Console) {
		if strings.Contains(line, "Failed to unmount") || strings.Contains(line, "Failed unmounting") {
			t.Errorf("at a restart: %s", line)
		}
	}
}

func command(t *testing.T, env []string, argv ...string) {
	t.Helper()
	c := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	c.Env = append(os.Environ(), env...)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// lines logs a guest's output line by line and fails the test for FAIL.
type lines struct {
	t    *testing.T
	part string
	ok   int
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
		switch {
		case strings.HasPrefix(line, "FAIL"):
			l.t.Error(line)
		case strings.HasPrefix(line, "ok "):
			l.ok++
			fallthrough
		default:
			l.t.Log(line)
		}
	}
}
