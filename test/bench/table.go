package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"ringwall/internal/enforce"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// largeReleases are sizes of prepared releases, small to large.
func largeReleases() []int { return []int{100_000, 1_000_000} }

func largeName(n int) string { return fmt.Sprintf("digests-%d", n) }

// engine is the kernel part alone, without an agent, confined to a cgroup.
type engine struct {
	*enforce.Engine
	out    io.Writer
	cgroup *os.File
	listed map[integrity.Key]integrity.Entry
}

func openEngine(out io.Writer) (*engine, error) {
	if err := os.MkdirAll(workDir, 0o755); err != nil { //nolint:gosec // a guest's scratch
		return nil, err
	}
	g, err := cgroup(scopeCgroup)
	if err != nil {
		return nil, err
	}
	e, err := enforce.Open(enforce.Options{ScopeCgroup: scopeCgroup})
	if err != nil {
		return nil, errors.Join(err, g.Close())
	}
	x := &engine{Engine: e, out: out, cgroup: g, listed: map[integrity.Key]integrity.Entry{}}
	for _, f := range []string{buildDir + "/micro", tiny, "/bin/true", library, "/lib64/ld-linux-x86-64.so.2"} {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		x.listed[integrity.Key{Digest: sha256.Sum256(b)}] = entry()
	}
	return x, nil
}

func entry() integrity.Entry {
	return integrity.Entry{Kinds: integrity.SetOf(integrity.KindExec, integrity.KindLibrary)}
}

// table is a policy of n digests, with what the work needs among them.
func (e *engine) table(epoch uint64, n int) *integrity.Table {
	t := &integrity.Table{Epoch: epoch, Entries: make(map[integrity.Key]integrity.Entry, n)}
	for k := range t.Modes {
		t.Modes[k] = integrity.ModeEnforce
	}
	t.Process = integrity.ProcessRules{Memory: integrity.ModeEnforce, Ptrace: integrity.ModeEnforce, BlockWrites: integrity.ModeEnforce, CodeWrites: integrity.ModeEnforce}
	maps.Copy(t.Entries, e.listed)
	for i := len(t.Entries); i < n; i++ {
		t.Entries[integrity.Key{Digest: numbered(i)}] = entry()
	}
	return t
}

func (e *engine) fact(name string, value float64, unit string) error {
	return send(e.out, message{Fact: &Fact{Name: name, Value: value, Unit: unit}})
}

// tables measures large tables and what each program costs.
func tables(ctx context.Context, out io.Writer) error {
	if err := prepareSmall(); err != nil {
		return err
	}
	if err := smallThings(ctx, out, outsideCgroup, "without any program"); err != nil {
		return err
	}
	if err := floor(ctx, out); err != nil {
		return err
	}
	e, err := openEngine(out)
	if err != nil {
		return err
	}
	defer e.Close()
	for i, n := range []int{1000, 100_000, 1_000_000} {
		t := e.table(uint64(i+1), n)
		start := time.Now()
		if err := e.Apply(t); err != nil {
			return err
		}
		took := time.Since(start)
		size, err := tableBytes(n)
		if err != nil {
			return err
		}
		if err := errors.Join(
			e.fact(fmt.Sprintf("table of %d digests: fill and switch", n), float64(took), "instructions"),
			e.fact(fmt.Sprintf("table of %d digests: kernel memory", n), size/(1<<20), "MiB"),
		); err != nil {
			return err
		}
		if err := smallThings(ctx, out, scopeCgroup, fmt.Sprintf("table of %d digests", n)); err != nil {
			return err
		}
	}
	if err := smallThings(ctx, out, outsideCgroup, "programs attached, out of scope"); err != nil {
		return err
	}
	return e.profile(ctx)
}

// floor measures with programs that do nothing on the hooks of an open: what no
// engine that is asked at each open can go below.
func floor(ctx context.Context, out io.Writer) error {
	hooks := []string{"file_open", "file_post_open"}
	attached := 0
	for _, hook := range hooks {
		l, err := attachEmpty(hook)
		if errors.Is(err, ebpf.ErrNotSupported) {
			continue // before 6.9 there is one hook
		}
		if err != nil {
			return fmt.Errorf("an empty program on %s: %w", hook, err)
		}
		defer l.Close()
		attached++
	}
	return smallThings(ctx, out, outsideCgroup, fmt.Sprintf("%d empty programs on the hooks of an open", attached))
}

func attachEmpty(hook string) (link.Link, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, AttachTo: hook, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return link.AttachLSM(link.LSMOptions{Program: p})
}

// prepareSmall makes the file that smallThings reads.
func prepareSmall() error {
	for _, d := range []string{workDir, filepath.Dir(dataFile)} {
		if err := os.MkdirAll(d, 0o755); err != nil { //nolint:gosec // a guest's scratch
			return err
		}
	}
	return os.WriteFile(dataFile, bytes.Repeat([]byte("data\n"), 2000), 0o644) //nolint:gosec // no secret
}

// smallThings measures what needs no Debian, in a guest in which nothing else
// runs; the second of two runs counts.
func smallThings(ctx context.Context, out io.Writer, in, when string) error {
	g, err := cgroup(in)
	if err != nil {
		return err
	}
	defer g.Close()
	for _, w := range workloads(10) {
		if !strings.HasPrefix(w.argv[0], buildDir) {
			continue
		}
		v := 0.0
		for range 2 {
			if v, err = w.run(ctx, g, 0); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
		if err := send(out, message{Fact: &Fact{Name: when + ": " + w.name, Value: v, Unit: "instructions"}}); err != nil {
			return err
		}
	}
	return nil
}

// tableBytes is the kernel's memory for the policy table that holds n digests.
func tableBytes(n int) (float64, error) {
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if err != nil {
			return 0, fmt.Errorf("table of %d digests: %w", n, err)
		}
		id = next
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue // it is gone
		}
		info, err := m.Info()
		_ = m.Close()
		if err != nil {
			return 0, err
		}
		if bytes, ok := info.Memlock(); ok && info.Name == "rw_table" && info.MaxEntries >= uint32(n) {
			return float64(bytes), nil
		}
	}
}

// count is what a program has done.
type count struct {
	runs uint64
	time time.Duration
}

// programs reads the kernel's statistics of every BPF program, by name.
func programs() (map[string]count, error) {
	out := map[string]count{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it is gone
		}
		info, err := p.Info()
		if err != nil {
			_ = p.Close()
			return nil, err
		}
		s, err := p.Stats()
		_ = p.Close()
		if err != nil {
			return nil, err
		}
		c := out[info.Name]
		out[info.Name] = count{c.runs + s.RunCount, c.time + s.Runtime}
	}
}

// profile tells how often each program runs in an operation, and for how long.
// The figures hold the kernel's own cost of counting.
func (e *engine) profile(ctx context.Context) error {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return fmt.Errorf("count runs of programs: %w", err)
	}
	defer stats.Close()
	for _, w := range workloads(10) {
		if !strings.HasPrefix(w.argv[0], buildDir) {
			continue
		}
		// what this work needs is known after the first time
		if _, err := w.run(ctx, e.cgroup, 0); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		before, err := programs()
		if err != nil {
			return err
		}
		if _, err := w.run(ctx, e.cgroup, 0); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		after, err := programs()
		if err != nil {
			return err
		}
		for name, a := range after {
			runs, took := a.runs-before[name].runs, a.time-before[name].time
			// what only starting and ending the measurement runs is left out
			if runs < uint64(w.ops) {
				continue
			}
			if err := errors.Join(
				e.fact(w.name+": "+name+", runs", float64(runs)/float64(w.ops), "per operation"),
				e.fact(w.name+": "+name, float64(took)/float64(runs), "instructions per run"),
			); err != nil {
				return err
			}
		}
	}
	return nil
}

// swaps changes the policy again and again while programs run on another
// processor, and fails at the first verdict that is wrong under both policies.
func swaps(ctx context.Context, out io.Writer) error {
	e, err := openEngine(out)
	if err != nil {
		return err
	}
	defer e.Close()
	bad := filepath.Join(workDir, "unlisted")
	b, err := os.ReadFile(tiny)
	if err != nil {
		return err
	}
	if err := os.WriteFile(bad, append(b, 0), 0o755); err != nil { //nolint:gosec // a program
		return err
	}
	if err := e.Apply(e.table(1, 100)); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var said lockedBuffer
	load := exec.CommandContext(ctx, buildDir+"/micro", "loop", tiny, bad)
	load.Stdout, load.Stderr = &said, &said
	load.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(e.cgroup.Fd())}
	if err := load.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- load.Wait() }()
	epoch := uint64(1)
	for _, x := range []struct{ swaps, digests int }{{200, 100}, {20, 100_000}, {3, 1_000_000}} {
		even, odd := e.table(0, x.digests), e.table(0, x.digests+1)
		before := said.dots()
		for i := range x.swaps {
			t := even
			if i%2 == 1 {
				t = odd
			}
			epoch++
			t.Epoch = epoch
			if err := e.Apply(t); err != nil {
				return err
			}
			select {
			case err := <-ended:
				return fmt.Errorf("after %d swaps the load ended: %w: %s: %w", i, err, said.text(), errs.Conflict)
			default:
			}
		}
		if err := errors.Join(
			e.fact(fmt.Sprintf("policy swaps under load, tables of %d digests", x.digests), float64(x.swaps), "swaps"),
			e.fact("verdicts meanwhile, none wrong (half allow, half refuse)", float64(200*(said.dots()-before)), "verdicts"),
		); err != nil {
			return err
		}
	}
	if said.dots() == 0 {
		return fmt.Errorf("the load did nothing: %w", errs.Conflict)
	}
	stop()
	<-ended
	if s := said.text(); strings.Contains(s, "WRONG") {
		return fmt.Errorf("%s: %w", s, errs.Conflict)
	}
	return nil
}
