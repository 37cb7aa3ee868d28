package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// csvPolicies are how many policies one build is asked about at once: a fleet
// runs some, in rings, and those before them.
const csvPolicies = 20

// measureCSV runs `ringwall csv verify` of a signed build with memoryFiles
// programs against csvPolicies policies.
func measureCSV(ctx context.Context, o options, add func(name string, value float64, unit string)) (peakMiB float64, err error) {
	dir, err := os.MkdirTemp("", "ringwall-bench-csv-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	binary := o.ringwall
	if binary == "" {
		binary = filepath.Join(dir, "ringwall")
		c := exec.CommandContext(ctx, "go", "build", "-o", binary, "./cmd/ringwall")
		if said, err := c.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build ringwall (run this at the root of the source tree): %w: %s", err, said)
		}
	}
	if err := scripts(filepath.Join(dir, "build")); err != nil {
		return 0, err
	}
	run := func(args ...string) (*exec.Cmd, error) {
		c := exec.CommandContext(ctx, binary, append([]string{"-q"}, args...)...)
		c.Dir = dir
		if said, err := c.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ringwall %s: %w: %.600s", args[0], err, said)
		}
		return c, nil
	}
	for _, args := range [][]string{
		{"key", "init", "keys", "--name", "Bench"},
		{"policy", "init", "--keys", "keys", "--name", "base", "--archive", "none", "-o", "base.yaml"},
		{"sign", "build", "--keys", "keys", "--product", "build", "--version", "1"},
	} {
		if _, err := run(args...); err != nil {
			return 0, err
		}
	}
	base, err := os.ReadFile(filepath.Join(dir, "base.yaml"))
	if err != nil {
		return 0, err
	}
	verify := []string{"csv", "verify", "build", "--release", "build_1.release.json"}
	for i := range csvPolicies {
		name := fmt.Sprintf("p%d.yaml", i)
		text := strings.Replace(string(base), "\nname: base", fmt.Sprintf("\nname: base%d", i), 1)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return 0, err
		}
		verify = append(verify, "--policy", name)
	}
	c, err := run(verify...)
	if err != nil {
		return 0, err
	}
	u, ok := c.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	peakMiB = float64(u.Maxrss) / 1024
	add("csv.files", memoryFiles, "files")
	add("csv.policies", csvPolicies, "policies")
	add("csv.verify", (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds(), "CPU s")
	add("csv.peak", peakMiB, "MiB")
	return peakMiB, nil
}

// scripts makes a tree of memoryFiles different programs.
func scripts(dir string) error {
	for i := range memoryFiles {
		sub := filepath.Join(dir, fmt.Sprintf("d%d", i/1000))
		if i%1000 == 0 {
			if err := os.MkdirAll(sub, 0o750); err != nil {
				return err
			}
		}
		var b bytes.Buffer
		fmt.Fprintf(&b, "#!/bin/sh\necho %d\n", i)
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%d.sh", i)), b.Bytes(), 0o700); err != nil { //nolint:gosec // a program
			return err
		}
	}
	return nil
}
