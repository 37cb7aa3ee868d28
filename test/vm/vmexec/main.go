// Command vmexec runs a program in a QEMU guest and ends with its exit code:
//
//	go test -exec vmexec ./internal/enforce
//
// The environment variables that steer it are in ../README.md.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// exitBroken says that the program did not get to end.
const exitBroken = 125

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprintln(stderr, "usage: vmexec PROGRAM [ARGUMENT...]")
		return 2
	}
	name := os.Getenv("RINGWALL_KERNEL")
	if name == "" {
		name = "6.1"
	}
	k, err := vm.FindKernel(ctx, name)
	if name == vm.Newest && errors.Is(err, errs.Unsupported) {
		line := fmt.Sprintf("vm: kernel %s SKIPPED, NOT TESTED: %v", name, err)
		fmt.Fprintln(stderr, line)
		record(stderr, args[0], line)
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "vm:", err)
		return exitBroken
	}
	g, timeout, err := fromEnvironment(k, args)
	if err != nil {
		fmt.Fprintln(stderr, "vm:", err)
		return exitBroken
	}
	g.Output = stdout
	if os.Getenv("RINGWALL_VERBOSE") != "" {
		g.Machine.Console = stderr
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not done after %v", timeout))
	defer cancel()
	r, err := vm.Run(ctx, g)
	if err != nil {
		fmt.Fprintln(stderr, "vm:", err)
		record(stderr, args[0], fmt.Sprintf("vm: kernel %s BROKEN", name))
		return exitBroken
	}
	if oops := oopses(r.Console); oops != "" {
		fmt.Fprintf(stderr, "vm: the kernel complained:\n%s\n", oops)
	}
	fmt.Fprintln(stderr, r.Line())
	record(stderr, args[0], r.Line())
	return r.Exit
}

// fromEnvironment makes the guest that the caller asked for.
func fromEnvironment(k vm.Kernel, args []string) (g vm.Guest, timeout time.Duration, err error) {
	program, err := filepath.Abs(args[0])
	if err != nil {
		return g, 0, err
	}
	wd, err := os.Getwd()
	if err != nil {
		return g, 0, err
	}
	var problems []error
	number := func(name string, def int) int {
		s := os.Getenv(name)
		if s == "" {
			return def
		}
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			problems = append(problems, fmt.Errorf("%s=%q is no positive number: %w", name, s, errs.Invalid))
		}
		return n
	}
	g = vm.Guest{
		Kernel: k, Cmdline: os.Getenv("RINGWALL_CMDLINE"), Dir: wd,
		Argv:    append([]string{"/test/" + filepath.Base(program)}, args[1:]...),
		Env:     environment(os.Environ()),
		Files:   []vm.File{{Host: program, Guest: "/test/" + filepath.Base(program)}},
		Modules: strings.FieldsFunc(os.Getenv("RINGWALL_MODULES"), func(r rune) bool { return r == ',' }),
		Machine: vm.Machine{
			CPUs: number("RINGWALL_CPUS", 0), MemMiB: number("RINGWALL_MEM", 0), ICount: os.Getenv("RINGWALL_ICOUNT") == "1",
		},
	}
	timeout = time.Duration(number("RINGWALL_TIMEOUT", testSeconds(args[1:]))) * time.Second
	if _, err := os.Stat("testdata"); err == nil {
		g.Files = append(g.Files, vm.File{Host: filepath.Join(wd, "testdata")})
	}
	more, err := vm.ParseFiles(os.Getenv("RINGWALL_ADD"))
	if err != nil {
		problems = append(problems, err)
	}
	g.Files = append(g.Files, more...)
	return g, timeout, errors.Join(problems...)
}

// testSeconds is how long a run may take where nobody said: what a Go test
// allows itself and the time to boot, which is less than what go test waits.
func testSeconds(args []string) int {
	for _, a := range args {
		if v, ok := strings.CutPrefix(a, "-test.timeout="); ok {
			if d, err := time.ParseDuration(v); err == nil && d > 0 {
				return int(d.Seconds()) + 45
			}
		}
	}
	return 600
}

// environment picks what the program under test may see of the caller's.
func environment(all []string) []string {
	named := strings.Split(os.Getenv("RINGWALL_ENV"), ",")
	var env []string
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		keep := strings.HasPrefix(name, "RINGWALL_")
		for _, n := range append(named, "GODEBUG", "GOMAXPROCS", "GOTRACEBACK", "GORACE") {
			keep = keep || name == n
		}
		if keep {
			env = append(env, e)
		}
	}
	return env
}

// oopses are the lines of the kernel's messages that tell of a bug in it.
func oopses(console string) string {
	var found bytes.Buffer
	left := 0
	for line := range strings.Lines(console) {
		if strings.Contains(line, "BUG:") || strings.Contains(line, "Oops") || strings.Contains(line, "WARNING:") {
			left = 30
		}
		if left > 0 {
			left--
			found.WriteString(line)
		}
	}
	return found.String()
}

// record appends a line to the file of RINGWALL_VM_LOG: go test shows nothing
// of what a passing package printed.
func record(stderr io.Writer, program, line string) {
	path := os.Getenv("RINGWALL_VM_LOG")
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		_, err = fmt.Fprintf(f, "%s %s\n", strings.TrimSuffix(filepath.Base(program), ".test"), line)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		fmt.Fprintln(stderr, "vm:", err)
	}
}
