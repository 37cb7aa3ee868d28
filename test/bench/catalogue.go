package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// What the catalogue of a large tree costs beside `sha256sum` of the same files,
// in processor seconds of one run on this machine. No guest: nothing here
// depends on the kernel.

// The goals: a catalogue computes two digests of every file and must not cost
// more than sha256sum computes one for (with the processor's SHA instructions,
// which Debian 12's sha256sum does not use: half of that), within bounded memory.
const (
	goalRatioSHA  = 0.5
	goalRatio     = 1.1
	goalMemoryMiB = 200 // for 100,000 files
	memoryFiles   = 100_000
)

// catalogued is what one process says of its walk.
type catalogued struct {
	Files, Code, Records int
	Bytes                int64
	CPU                  time.Duration // user and system
	PeakMiB              float64
}

// catalogueRole is the process that is measured: all files of a tree, each with
// both digests.
func catalogueRole(tree string, all bool, out io.Writer) error {
	a, err := artefact.Open(tree, artefact.Options{Depth: -1})
	if err != nil {
		return err
	}
	b, err := codesign.Build(a, codesign.Options{AllFiles: all})
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(catalogued{Files: b.Files, Code: b.Code, Records: b.Records, Bytes: b.Bytes})
}

// measureCatalogue runs the part "catalogue".
func measureCatalogue(ctx context.Context, o options, out, log io.Writer) error {
	tree, err := filepath.EvalSymlinks(o.tree)
	if err != nil {
		return err
	}
	list, err := regularFiles(tree)
	if err != nil {
		return err
	}
	fmt.Fprintf(log, "%s: %d files; one round to warm the cache up\n", tree, bytes.Count(list, []byte{0}))
	var facts []Fact
	add := func(name string, value float64, unit string) { facts = append(facts, Fact{name, value, unit}) }
	var sums, code, all []time.Duration
	var ofCode, ofAll catalogued
	for round := range o.plan.real + 1 {
		sum, err := sha256sum(ctx, list)
		if err != nil {
			return err
		}
		if ofAll, err = catalogueProcess(ctx, tree, "catalogue-all"); err != nil {
			return err
		}
		if ofCode, err = catalogueProcess(ctx, tree, "catalogue"); err != nil {
			return err
		}
		fmt.Fprintf(log, "round %d: sha256sum %v, catalogue of all files %v, of code %v\n", round, sum, ofAll.CPU, ofCode.CPU)
		if round > 0 {
			sums, code, all = append(sums, sum), append(code, ofCode.CPU), append(all, ofAll.CPU)
		}
	}
	ratio := func(a []time.Duration) float64 { return middle(a).Seconds() / middle(sums).Seconds() }
	add("catalogue.files", float64(ofAll.Files), "files")
	add("catalogue.code", float64(ofCode.Code), "files")
	add("catalogue.size", float64(ofAll.Bytes)/(1<<20), "MiB")
	add("catalogue.sha256sum", middle(sums).Seconds(), "CPU s")
	add("catalogue.all", middle(all).Seconds(), "CPU s")
	add("catalogue.default", middle(code).Seconds(), "CPU s")
	add("catalogue.ratio.all", ratio(all), "of sha256sum")
	add("catalogue.ratio", ratio(code), "of sha256sum")
	add("catalogue.peak.all", ofAll.PeakMiB, "MiB")
	add("catalogue.peak", ofCode.PeakMiB, "MiB")
	csvPeak, err := measureCSV(ctx, o, add)
	if err != nil {
		return err
	}
	return reportCatalogue(o, facts, measured{code: ofCode, all: ofAll, codeRatio: ratio(code), allRatio: ratio(all), csvPeakMiB: csvPeak}, out)
}

// measured is what has goals.
type measured struct {
	code, all           catalogued
	codeRatio, allRatio float64
	csvPeakMiB          float64
}

func reportCatalogue(o options, facts []Fact, m measured, out io.Writer) error {
	for _, f := range facts {
		fmt.Fprintf(out, "%-24s %12.3f  %s\n", f.Name, f.Value, f.Unit)
	}
	if o.json != "" {
		b, err := json.MarshalIndent(Report{Facts: facts}, "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.json, append(b, '\n'), 0o644); err != nil { //nolint:gosec // no secret
			return err
		}
	}
	goal := goalRatio
	if hasSHA() {
		goal = goalRatioSHA
	}
	var missed []string
	for _, x := range []struct {
		what  string
		ratio float64
		c     catalogued
	}{{"catalogue", m.codeRatio, m.code}, {"catalogue of all files", m.allRatio, m.all}} {
		if x.ratio > goal*(1+o.margin) {
			missed = append(missed, fmt.Sprintf("%s costs %.3f of sha256sum, goal %.2f", x.what, x.ratio, goal))
		}
		if limit := goalMemoryMiB * max(1, float64(x.c.Files)/memoryFiles); x.c.PeakMiB > limit {
			missed = append(missed, fmt.Sprintf("%s: %.0f MiB of memory for %d files, goal %.0f", x.what, x.c.PeakMiB, x.c.Files, limit))
		}
	}
	if m.csvPeakMiB > goalMemoryMiB {
		missed = append(missed, fmt.Sprintf("csv verify: %.0f MiB of memory, goal %d", m.csvPeakMiB, goalMemoryMiB))
	}
	for _, m := range missed {
		fmt.Fprintln(out, "MISSED", m)
	}
	if o.gate && len(missed) > 0 {
		return fmt.Errorf("%w: %v", errGoal, missed)
	}
	return nil
}

// hasSHA says whether this processor has SHA-256 instructions.
func hasSHA() bool {
	b, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && (bytes.Contains(b, []byte(" sha_ni")) || bytes.Contains(b, []byte(" sha2")))
}

// regularFiles lists the regular files of a tree, each name ended by a zero byte.
func regularFiles(tree string) ([]byte, error) {
	var b bytes.Buffer
	err := filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			b.WriteString(p)
			b.WriteByte(0)
		}
		return err
	})
	if err == nil && b.Len() == 0 {
		err = fmt.Errorf("no files in %s: %w", tree, errs.NotFound)
	}
	return b.Bytes(), err
}

func sha256sum(ctx context.Context, list []byte) (time.Duration, error) {
	c := exec.CommandContext(ctx, "xargs", "-0", "-n", "5000", "sha256sum", "--")
	c.Stdin = bytes.NewReader(list)
	var said bytes.Buffer
	c.Stderr = &said
	if err := c.Run(); err != nil {
		return 0, fmt.Errorf("sha256sum: %w: %.300s", err, said.String())
	}
	return c.ProcessState.UserTime() + c.ProcessState.SystemTime(), nil
}

func catalogueProcess(ctx context.Context, tree, role string) (catalogued, error) {
	self, err := os.Executable()
	if err != nil {
		return catalogued{}, err
	}
	c := exec.CommandContext(ctx, self, "-role", role, "-tree", tree)
	var said bytes.Buffer
	c.Stderr = &said
	b, err := c.Output()
	if err != nil {
		return catalogued{}, fmt.Errorf("%s: %w: %.300s", role, err, said.String())
	}
	var r catalogued
	if err := json.Unmarshal(b, &r); err != nil {
		return r, err
	}
	r.CPU = c.ProcessState.UserTime() + c.ProcessState.SystemTime()
	u, ok := c.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return r, errors.ErrUnsupported
	}
	r.PeakMiB = float64(u.Maxrss) / 1024
	return r, nil
}

func middle(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}
