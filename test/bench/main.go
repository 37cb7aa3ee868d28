package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// errGoal is why -gate fails.
var errGoal = errors.New("a goal is missed")

type options struct {
	kernel, ringwall, json string
	gate                   bool
	margin                 float64
	limit                  time.Duration
	plan                   plan
	parts, work, tree      string
}

func run(ctx context.Context, args []string, out, log io.Writer) error {
	var o options
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	role := f.String("role", "", "what to be in a guest: costs, tables or swaps")
	f.StringVar(&o.kernel, "kernel", "6.1", "kernel of the guest: 6.1 or 6.12")
	f.StringVar(&o.ringwall, "ringwall", "", "the ringwall binary; default: build it")
	f.StringVar(&o.json, "json", "", "write the report here as JSON")
	f.BoolVar(&o.gate, "gate", false, "fail if a goal is missed by more than the margin")
	f.Float64Var(&o.margin, "margin", 0.01, "how far a ratio may miss its goal")
	f.DurationVar(&o.limit, "limit", time.Hour, "time for each guest")
	f.IntVar(&o.plan.rounds, "rounds", 4, "rounds of small things in each stretch, the first not counted")
	f.IntVar(&o.plan.real, "real", 3, "rounds of real workloads in each stretch, the first not counted")
	f.IntVar(&o.plan.commands, "commands", 2000, "how many short commands make one workload")
	f.StringVar(&o.parts, "parts", "costs,tables,swaps", "which guests to run; or catalogue, which needs none and runs alone")
	f.StringVar(&o.tree, "tree", "/usr", "the tree that the part catalogue reads")
	f.StringVar(&o.work, "work", "", "keep what the guests are given in this directory, and use what is there already")
	only := f.String("only", "", "workloads to measure, with commas; default: all")
	cfgs := f.String("configs", "", "configurations beside the baseline, with commas; default: all")
	if err := f.Parse(args); err != nil {
		return err
	}
	var err error
	if o.plan.only, err = choose(*only, names(workloads(o.plan.commands))); err != nil {
		return err
	}
	if o.plan.configs, err = choose(*cfgs, configs()); err != nil {
		return err
	}
	switch *role {
	case "":
		if o.parts == "catalogue" {
			return measureCatalogue(ctx, o, out, log)
		}
		return measure(ctx, o, out, log)
	case "catalogue", "catalogue-all":
		return catalogueRole(o.tree, *role == "catalogue-all", out)
	case "costs":
		return (&bench{plan: o.plan, out: out}).run(ctx)
	case "tables":
		return tables(ctx, out)
	case "swaps":
		return swaps(ctx, out)
	}
	return fmt.Errorf("-role %s: %w", *role, errs.Invalid)
}

// choose reads a list of names, which must be among those that there are.
func choose(list string, among []string) ([]string, error) {
	if list == "" {
		return nil, nil
	}
	chosen := strings.Split(list, ",")
	for _, c := range chosen {
		if !slices.Contains(among, c) {
			return nil, fmt.Errorf("%q is not one of %s: %w", c, strings.Join(among, ", "), errs.Invalid)
		}
	}
	return chosen, nil
}

// measure runs the guests and reports.
func measure(ctx context.Context, o options, out, log io.Writer) error {
	c := &collector{to: log}
	k, failed := runGuests(ctx, o, c, log)
	if len(c.samples)+len(c.facts) == 0 {
		return failed
	}
	// what was measured before a failure is worth showing
	r := Report{Kernel: k.Release, Rows: summarise(c.samples, workloads(o.plan.commands)), Facts: c.facts, Samples: c.samples}
	r.Missed = missed(r.Rows, 0)
	if err := r.print(out); err != nil {
		return errors.Join(failed, err)
	}
	if o.json != "" {
		b, err := json.MarshalIndent(r, "", " ")
		if err != nil {
			return errors.Join(failed, err)
		}
		if err := os.WriteFile(o.json, append(b, '\n'), 0o644); err != nil { //nolint:gosec // no secret
			return errors.Join(failed, err)
		}
	}
	if failed != nil {
		return failed
	}
	if m := missed(r.Rows, o.margin); o.gate && len(m) > 0 {
		return fmt.Errorf("%w by more than %.3f: %s", errGoal, o.margin, strings.Join(m, "; "))
	}
	return nil
}

func runGuests(ctx context.Context, o options, c *collector, log io.Writer) (vm.Kernel, error) {
	// One image for both kernels of Debian 12.
	var kernels []vm.Kernel
	var k vm.Kernel
	for _, name := range []string{"6.1", "6.12"} {
		found, err := vm.FindKernel(ctx, name)
		if err != nil {
			return k, err
		}
		kernels = append(kernels, found)
		if name == o.kernel {
			k = found
		}
	}
	if k.Name == "" {
		return k, fmt.Errorf("-kernel %s: want 6.1 or 6.12: %w", o.kernel, errs.Invalid)
	}
	dir, err := o.work, error(nil)
	if dir == "" {
		if dir, err = os.MkdirTemp("", "ringwall-bench-"); err != nil {
			return k, err
		}
		defer os.RemoveAll(dir)
	}
	p := &preparer{ringwall: o.ringwall, dir: filepath.Join(dir, "payload"), out: log}
	if p.ringwall == "" {
		p.ringwall = filepath.Join(dir, "ringwall")
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // nothing secret that lasts
			return k, err
		}
		if said, err := exec.CommandContext(ctx, "./build", p.ringwall).CombinedOutput(); err != nil {
			return k, fmt.Errorf("build ringwall (run this at the root of the source tree): %w: %s", err, said)
		}
	}
	if err := p.build(ctx); err != nil {
		return k, fmt.Errorf("build the payload: %w", err)
	}
	for part := range strings.SplitSeq(o.parts, ",") {
		ctx, cancel := context.WithTimeout(ctx, o.limit)
		var r vm.Result
		switch part {
		case "costs":
			r, err = costs(ctx, o, k, kernels, p, c)
		case "tables":
			r, err = tableGuest(ctx, k, p, c, "tables", vm.Machine{MemMiB: 3072, ICount: true})
		case "swaps":
			r, err = tableGuest(ctx, k, p, c, "swaps", vm.Machine{MemMiB: 2048, CPUs: 2})
		default:
			err = fmt.Errorf("-parts %s: %w", part, errs.Invalid)
		}
		cancel()
		if err != nil {
			return k, fmt.Errorf("%s: %w", part, err)
		}
		fmt.Fprintln(log, r.Line())
		if r.Exit != 0 {
			return k, fmt.Errorf("%s: the guest's part ended with %d: %w", part, r.Exit, errs.Conflict)
		}
	}
	return k, nil
}

// costs runs the Debian guest.
func costs(ctx context.Context, o options, k vm.Kernel, kernels []vm.Kernel, p *preparer, out io.Writer) (vm.Result, error) {
	installed, pool := packages()
	image, err := vm.DebianImage(ctx, vm.Options{Packages: installed, Pool: pool, Kernels: kernels})
	if err != nil {
		return vm.Result{}, err
	}
	if err := p.states(ctx, image); err != nil {
		return vm.Result{}, fmt.Errorf("prepare the host's state: %w", err)
	}
	for _, n := range largeReleases() {
		if err := p.release(n); err != nil {
			return vm.Result{}, fmt.Errorf("release of %d digests: %w", n, err)
		}
	}
	args := fmt.Sprintf("-rounds=%d -real=%d -commands=%d -only=%s -configs=%s", o.plan.rounds, o.plan.real, o.plan.commands, strings.Join(o.plan.only, ","), strings.Join(o.plan.configs, ","))
	return vm.RunDebian(ctx, vm.DebianGuest{
		Image: image, Kernel: k, Payload: p.dir, Output: out, Machine: vm.Machine{MemMiB: 3072, ICount: true},
		Script: "#!/bin/sh\nexec " + buildDir + "/bench -role costs " + args + "\n",
	})
}

// tableGuest runs one of the parts that need no Debian.
func tableGuest(ctx context.Context, k vm.Kernel, p *preparer, out io.Writer, role string, m vm.Machine) (vm.Result, error) {
	return vm.Run(ctx, vm.Guest{
		Kernel: k, Argv: []string{buildDir + "/bench", "-role", role}, Output: out, Machine: m,
		Files: []vm.File{
			{Host: p.path("build/bench"), Guest: buildDir + "/bench"},
			{Host: p.path("build/micro"), Guest: buildDir + "/micro"},
			{Host: p.path("build/tiny"), Guest: tiny},
			{Host: "/bin/true", Guest: "/bin/true"},
			{Host: library},
		},
	})
}
