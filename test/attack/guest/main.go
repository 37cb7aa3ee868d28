// Command guest runs the attack suite in a Debian guest and writes the results.
// Without -profile the guest has no Ringwall: the baseline that protected runs
// are compared with. Start it in the root of the repository.
//
//	go run ./test/attack/guest -kernel 6.12 -o stock.jsonl
//	go run ./test/attack/guest -kernel 6.12 -profile strict -o strict.jsonl
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// packages of the guest: what the suite's techniques abuse.
func packages() []string {
	return append(vm.Full(), "bsdutils", "git", "logrotate", "openssh-client", "openssl", "vim-tiny", "libpam-modules")
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("guest", flag.ContinueOnError)
	kernel := f.String("kernel", "6.12", "kernel of the guest")
	out := f.String("o", "", "write results here as JSON lines")
	options := f.String("options", "", "further options of evaluate run")
	profile := f.String("profile", "", "run under Ringwall with this policy: strict or server, of docs/examples")
	before := f.String("before", "", "script to run in the guest first, for instance to set protection up")
	limit := f.Duration("limit", 30*time.Minute, "time for the whole run")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *out == "" {
		return fmt.Errorf("-o FILE is missing: %w", errs.Invalid)
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	kit, err := os.MkdirTemp("", "attack-kit-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(kit)
	if said, err := exec.CommandContext(ctx, "go", "run", "ringwall/test/attack/build", "-o", kit).CombinedOutput(); err != nil {
		return fmt.Errorf("build the kit: %w\n%s", err, said)
	}
	if *before != "" {
		raw, err := os.ReadFile(*before)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(kit, "before"), raw, 0o755); err != nil {
			return err
		}
	}
	// one image for both kernels that Debian 12 offers
	var kernels []vm.Kernel
	for _, name := range []string{"6.1", "6.12"} {
		k, err := vm.FindKernel(ctx, name)
		if err != nil {
			return err
		}
		kernels = append(kernels, k)
	}
	at := slices.IndexFunc(kernels, func(k vm.Kernel) bool { return k.Name == *kernel })
	if at < 0 {
		return fmt.Errorf("-kernel %s: want 6.1 or 6.12: %w", *kernel, errs.Invalid)
	}
	image, err := vm.DebianImage(ctx, vm.Options{Packages: packages(), Kernels: kernels})
	if err != nil {
		return err
	}
	if *profile != "" {
		if err := protect(ctx, kit, *profile, image); err != nil {
			return fmt.Errorf("prepare Ringwall: %w", err)
		}
	}
	ctx, cut := context.WithCancel(ctx)
	defer cut()
	results := &splitter{to: os.Stdout, atEnd: func() { time.AfterFunc(grace, cut) }}
	cmdline := ""
	if *profile != "" {
		cmdline = "module.sig_enforce=1" // as the baseline asks; kmod decompresses 6.12's modules itself
	}
	res, err := vm.RunDebian(ctx, vm.DebianGuest{
		Cmdline: cmdline,
		Image:   image, Kernel: kernels[at], Payload: kit, Output: results, Machine: vm.Machine{MemMiB: 2048},
		Script: script(*profile != "", *options), Unmask: []string{"proc-sys-fs-binfmt_misc.automount"},
	})
	if err != nil && results.complete {
		fmt.Fprintln(os.Stderr, "guest: it gave its results and did not stop by itself:", err)
		err, res.Exit = nil, results.exit
	}
	// what was found before a guest went down is worth keeping
	if results.kept.Len() > 0 {
		err = errors.Join(err, os.WriteFile(filepath.Clean(*out), results.kept.Bytes(), 0o644))
	}
	switch {
	case err != nil:
		return err
	case res.Exit != 0:
		return fmt.Errorf("the evaluator ended with %d", res.Exit)
	case results.kept.Len() == 0:
		return fmt.Errorf("no results: %w", errs.NotFound)
	}
	return nil
}

// mark stands before each line of the results in the guest's output, endMark
// after them before the evaluator's exit code.
const (
	mark    = "ATTACK-RESULT "
	endMark = "ATTACK-END "
)

// grace is how long a guest may take to stop after that: some attacks leave
// file systems behind that cannot be synchronised.
const grace = 20 * time.Second

func script(protected bool, options string) string {
	protection := ""
	if protected {
		protection, options = protectScript, protectedOptions+options
	}
	return strings.Join([]string{
		"#!/bin/sh",
		protection,
		"id -u 1000 >/dev/null 2>&1 || useradd -m -u 1000 attacker",
		"test ! -x /payload/before || /payload/before || exit 1",
		"/payload/evaluate run -o /root/results " + options,
		"rc=$?",
		"sed 's/^/" + mark + "/' /root/results",
		"echo " + endMark + "$rc",
		"exit $rc",
	}, "\n") + "\n"
}

// splitter passes the guest's output on and keeps the lines with results.
type splitter struct {
	to       io.Writer
	atEnd    func()
	line     []byte
	kept     bytes.Buffer
	complete bool
	exit     int
}

func (s *splitter) Write(p []byte) (int, error) {
	for _, b := range p {
		s.line = append(s.line, b)
		if b != '\n' {
			continue
		}
		if rest, ok := bytes.CutPrefix(s.line, []byte(mark)); ok {
			s.kept.Write(bytes.ReplaceAll(rest, []byte("\r"), nil))
		} else if rest, ok := bytes.CutPrefix(s.line, []byte(endMark)); ok {
			code, err := strconv.Atoi(string(bytes.TrimSpace(rest)))
			s.complete, s.exit = err == nil, code
			s.atEnd()
		} else if _, err := s.to.Write(s.line); err != nil {
			return 0, err
		}
		s.line = s.line[:0]
	}
	return len(p), nil
}
