package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// plan says what a guest measures. It is given in the environment.
type plan struct {
	rounds   int // of the small things in each stretch, the first not counted
	real     int // of the real workloads, likewise
	commands int
	only     []string // workloads; empty: all
	configs  []string // beside the baseline; empty: all
}

// bench measures in a guest.
type bench struct {
	plan
	out     io.Writer
	list    []workload
	in, off *os.File // cgroups
	stretch map[string]int
	runs    int
	refused int
}

// send writes a result for the host.
func send(out io.Writer, m message) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s%s\n", mark, b)
	return err
}

func (b *bench) fact(name string, value float64, unit string) error {
	return send(b.out, message{Fact: &Fact{Name: name, Value: value, Unit: unit}})
}

func (b *bench) say(format string, a ...any) {
	up := time.Duration(0)
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) == nil {
		up = time.Duration(t.Nano())
	}
	fmt.Fprintf(b.out, "[%6.1fG] %s\n", up.Seconds(), fmt.Sprintf(format, a...))
}

// run measures everything, in the order that puts a stretch of the baseline
// before, between and after the protections.
func (b *bench) run(ctx context.Context) error {
	if err := b.setUp(); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	for _, protect := range []struct {
		configs []string
		measure func(context.Context) error
	}{{[]string{cfgAttached, cfgScope}, b.scoped}, {[]string{cfgHost}, b.wholeHost}, {[]string{cfgFapolicyd, cfgSHA256}, b.peer}} {
		if !slices.ContainsFunc(protect.configs, b.wanted) {
			continue
		}
		if err := b.baseline(ctx); err != nil {
			return err
		}
		if err := protect.measure(ctx); err != nil {
			return err
		}
	}
	if err := b.baseline(ctx); err != nil {
		return err
	}
	if b.refused > 0 {
		return fmt.Errorf("authorised work was refused %d times: its figures are of other work than the baseline's: %w", b.refused, errs.Conflict)
	}
	return nil
}

func (b *bench) wanted(config string) bool {
	return len(b.configs) == 0 || slices.Contains(b.configs, config)
}

func (b *bench) setUp() error {
	b.stretch = map[string]int{}
	for _, w := range workloads(b.commands) {
		if len(b.only) == 0 || slices.Contains(b.only, w.name) {
			b.list = append(b.list, w)
		}
	}
	var err error
	if b.in, err = cgroup(scopeCgroup); err != nil {
		return err
	}
	if b.off, err = cgroup(outsideCgroup); err != nil {
		return err
	}
	if err := os.MkdirAll(workDir, 0o755); err != nil { //nolint:gosec // a mount point
		return err
	}
	if err := unix.Mount("bench", workDir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount %s: %w", workDir, err)
	}
	if err := os.Mkdir(workDir+"/tmp", 0o755); err != nil { //nolint:gosec // a guest's scratch
		return err
	}
	return os.WriteFile(dataFile, []byte(strings.Repeat("a line of data, no code\n", 400)), 0o644) //nolint:gosec // no secret
}

// cgroup makes one and opens its directory.
func cgroup(path string) (*os.File, error) {
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) { //nolint:gosec // a cgroup
		return nil, err
	}
	return os.Open(path)
}

// place is a configuration and the cgroup that its work runs in.
type place struct {
	config string
	cgroup *os.File
}

// measure runs every workload in every place, round by round.
func (b *bench) measure(ctx context.Context, places ...place) error {
	for _, p := range places {
		b.stretch[p.config]++
	}
	for round := range max(b.rounds, b.real) {
		for _, w := range b.list {
			if w.kind == kindReal && round >= b.real || w.kind != kindReal && round >= b.rounds {
				continue
			}
			for _, p := range places {
				b.runs++
				v, err := w.run(ctx, p.cgroup, b.runs)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", w.name, p.config, err)
				}
				s := Sample{Config: p.config, Workload: w.name, Stretch: b.stretch[p.config], Round: round, Instructions: v}
				if err := send(b.out, message{Sample: &s}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *bench) baseline(ctx context.Context) error {
	b.say("baseline")
	return b.measure(ctx, place{cfgNone, b.off})
}

// scoped measures inside and outside the scope of one agent, and what a file
// costs when it is seen for the first time.
func (b *bench) scoped(ctx context.Context) error {
	b.say("Ringwall starts, for one cgroup")
	start := time.Now()
	a, err := startAgent(ctx, payload+"/state-scope")
	if err != nil {
		return err
	}
	if err := b.fact("agent start until enforcement is proven", time.Since(start).Seconds(), "s of the guest's clock, waiting for the disk included"); err != nil {
		return err
	}
	start = time.Now()
	modules, err := a.compiled(ctx, b.say)
	if err != nil {
		return err
	}
	if err := errors.Join(
		b.fact("Python modules that the agent compiled after its start", modules, "files"),
		b.fact("Python modules: until all are authorised", float64(time.Since(start)), "instructions"),
	); err != nil {
		return err
	}
	b.say("attached and in scope")
	var places []place
	for _, p := range []place{{cfgAttached, b.off}, {cfgScope, b.in}} {
		if b.wanted(p.config) {
			places = append(places, p)
		}
	}
	if err := b.measure(ctx, places...); err != nil {
		return err
	}
	if err := b.cold(ctx); err != nil {
		return fmt.Errorf("cold: %w", err)
	}
	return b.endAgent(ctx, a, "one cgroup")
}

func (b *bench) wholeHost(ctx context.Context) error {
	b.say("Ringwall starts, for the whole host")
	a, err := startAgent(ctx, payload+"/state-host")
	if err != nil {
		return err
	}
	if _, err := a.compiled(ctx, b.say); err != nil {
		return err
	}
	b.say("whole host")
	if err := b.measure(ctx, place{cfgHost, b.off}); err != nil {
		return err
	}
	if err := b.large(ctx, a); err != nil {
		return fmt.Errorf("large releases: %w", err)
	}
	return b.endAgent(ctx, a, "whole host")
}

// endAgent notes the agent's size, and that it refused nothing, and removes it.
func (b *bench) endAgent(ctx context.Context, a *agent, what string) error {
	for _, f := range []string{"VmRSS", "VmHWM"} {
		v, err := kibibytes(a.cmd.Process.Pid, f)
		if err != nil {
			return err
		}
		if err := b.fact("agent, "+what+": "+f, v/1024, "MiB"); err != nil {
			return err
		}
	}
	refused, err := a.refusals(ctx)
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		b.say("%d records of refusals, the first: %s", len(refused), refused[0])
		b.refused += len(refused)
	}
	b.say("Ringwall stops")
	return a.stop(ctx)
}

// cold measures the first execution of files that the kernel has in its page
// cache but Ringwall has not seen.
func (b *bench) cold(ctx context.Context) error {
	var first, again, outside []float64
	for i := range coldFiles {
		to := fmt.Sprintf("%s/cold-%d", workDir, i)
		if err := quiet(ctx, "cp", fmt.Sprintf("%s/cold-%d", buildDir, i), to); err != nil {
			return err
		}
		w := workload{name: "cold", ops: 1, argv: []string{to}}
		for _, x := range []struct {
			cgroup *os.File
			into   *[]float64
		}{{b.off, &outside}, {b.in, &first}, {b.in, &again}} {
			v, err := w.run(ctx, x.cgroup, i)
			if err != nil {
				return err
			}
			*x.into = append(*x.into, v)
		}
		if err := os.Remove(to); err != nil {
			return err
		}
	}
	for _, v := range [][]float64{first, again, outside} {
		slices.Sort(v)
	}
	return errors.Join(
		b.fact("first exec of a file, per MiB of it", (median(first)-median(again))/coldMiB, "instructions"),
		b.fact("exec of an 8 MiB file, not governed", median(outside), "instructions"),
		b.fact("exec of an 8 MiB file, governed, second time", median(again), "instructions"),
	)
}

// large hands the agent releases of many digests and measures how long each
// takes to be in force: verified, compiled, put into the kernel, proven.
func (b *bench) large(ctx context.Context, a *agent) error {
	for _, n := range largeReleases() {
		start := time.Now()
		if err := quiet(ctx, ringwall, "host", "add-release", payload+"/"+largeName(n)+".release.json"); err != nil {
			return err
		}
		v, err := kibibytes(a.cmd.Process.Pid, "VmRSS")
		if err != nil {
			return err
		}
		if err := errors.Join(
			b.fact(fmt.Sprintf("agent: release of %d digests, until in force", n), float64(time.Since(start)), "instructions"),
			b.fact(fmt.Sprintf("agent: VmRSS with %d digests more", n), v/1024, "MiB"),
		); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) peer(ctx context.Context) error {
	b.say("fapolicyd is installed")
	if err := installFapolicyd(ctx); err != nil {
		return fmt.Errorf("install fapolicyd: %w", err)
	}
	for _, x := range []struct{ config, integrity string }{{cfgFapolicyd, "none"}, {cfgSHA256, "sha256"}} {
		if !b.wanted(x.config) {
			continue
		}
		b.say("fapolicyd, integrity = %s", x.integrity)
		pid, err := startFapolicyd(ctx, x.integrity)
		if err != nil {
			return fmt.Errorf("fapolicyd: %w", err)
		}
		if err := b.refuses(ctx); err != nil {
			return err
		}
		if err := b.measure(ctx, place{x.config, b.off}); err != nil {
			return err
		}
		if err := stopFapolicyd(ctx, pid); err != nil {
			return fmt.Errorf("stop fapolicyd: %w", err)
		}
	}
	return nil
}

// refuses makes sure that fapolicyd enforces: an idle one costs nothing.
func (b *bench) refuses(ctx context.Context) error {
	name := workDir + "/unlisted"
	if err := quiet(ctx, "sh", "-c", "cat /bin/true >"+name+"; echo >>"+name+"; chmod 755 "+name); err != nil {
		return err
	}
	_, err := workload{ops: 1, argv: []string{name}}.run(ctx, b.off, 0)
	if err == nil {
		return fmt.Errorf("fapolicyd lets an unlisted program run: %w", errs.Conflict)
	}
	return os.Remove(name)
}
