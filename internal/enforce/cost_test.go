package enforce

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// costRole does one thing many times and prints the nanoseconds of each: the
// lower quartile of small blocks, most of which no interrupt falls into.
func costRole(what, path string) int {
	// as a child of a child: one that has no roles to lose
	if role, ok := strings.CutPrefix(what, "relay-"); ok {
		c := exec.Command("/proc/self/exe", path)
		c.Env = append(os.Environ(), "ENFORCE_TEST_ROLE="+role)
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		if c.Run() != nil {
			return 1
		}
		return 0
	}
	blocks, n, do := 400, 50, func() error {
		// without the runtime's poller
		fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
		if err != nil {
			return err
		}
		return syscall.Close(fd)
	}
	if what == "cost-exec" {
		blocks, n, do = 200, 1, func() error {
			p, err := os.StartProcess(path, []string{path, "argument"}, &os.ProcAttr{})
			if err == nil {
				_, err = p.Wait()
			}
			return err
		}
	}
	runtime.LockOSThread()
	took := make([]time.Duration, blocks)
	for i := range took {
		start := time.Now()
		for range n {
			if err := do(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		took[i] = time.Since(start) / time.Duration(n)
	}
	slices.Sort(took)
	fmt.Print(took[blocks/4].Nanoseconds())
	return 0
}

// What an open and an execve cost with the engine in place, against the same
// boot without it. In a guest whose clock counts instructions; alone:
//
//	RINGWALL_ICOUNT=1 go test -exec vmexec -run TestCost ./internal/enforce
func TestCost(t *testing.T) {
	if os.Getenv("RINGWALL_ICOUNT") == "" {
		t.Skip("a ratio needs a clock that counts instructions: RINGWALL_ICOUNT=1")
	}
	needKernel(t)
	run := func(c *exec.Cmd, role string) float64 {
		t.Helper()
		var out bytes.Buffer
		c.Env, c.Stdout = append(os.Environ(), "ENFORCE_TEST_ROLE=relay-"+role), &out
		if err := c.Run(); err != nil {
			t.Fatalf("%s: %v", role, err)
		}
		ns, err := strconv.ParseFloat(out.String(), 64)
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"data": []byte("data"), "program": tinyELF()} {
		if err := os.WriteFile(dir+"/"+name, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	goals := map[string]struct {
		file string
		goal float64
	}{"cost-open": {"/data", 1.01}, "cost-exec": {"/program", 1.03}}
	before := map[string]float64{}
	for role, g := range goals {
		before[role] = run(exec.Command("/proc/self/exe", dir+g.file), role)
	}
	l := newLab(t)
	l.allow(tinyELF(), 0, 0)
	l.apply()
	for role, g := range goals {
		after := run(l.command("/proc/self/exe", dir+g.file), role)
		ratio := after / before[role]
		t.Logf("%s: %.0f instructions, %.0f without the engine: %.3f (goal %.2f)", role, after, before[role], ratio, g.goal)
		if ratio > g.goal+0.02 {
			t.Errorf("%s costs %.3f of the baseline, goal %.2f", role, ratio, g.goal)
		}
	}
}
