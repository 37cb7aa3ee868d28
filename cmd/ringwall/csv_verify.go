package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

type csvOptions struct {
	cells    cellFlags
	release  string
	archive  string
	baseline []string
	outputs  []string
	strict   bool
	maxAge   time.Duration
	at       string
	gates    csvGates
	notify   csvNotify

	keys, passphraseFile, verifier string
}

// csvFormats are the forms of a report.
func csvFormats() []string { return []string{"text", "json", "sarif", "junit", "markdown", "svr"} }

func newCSVVerifyCommand(e *env) *cobra.Command {
	var o csvOptions
	c := &cobra.Command{
		Use:   "verify ARTEFACT --cells FILE | --policy FILE",
		Short: "Verify a build against every policy that is live",
		Long: `Reads a build (a directory, an archive, a package) to its end and asks each cell
about every program, library, script, module and maintainer script in it. A cell
is hosts that decide alike: a ring, a policy and what stands behind its rules.

Give the build's release record with --release; without it the build counts as
unsigned. A package that hosts take from an archive is asked about with
--from-archive. --baseline says what hosts have besides: the root of an
installed tree, or a list of paths such as dpkg -L prints; without it nobody can
say whether an interpreter or library is missing.

The cells of a fleet stand in a file, whose names are relative to it:

  version: 1
  taken: 2031-05-01T12:00:00Z      # see --max-age
  rings: [canary, prod]            # in the order of roll-outs
  cells:
    - {ring: canary, hosts: 12, policy: base-91.yaml, releases: [releases]}
    - {ring: prod, hosts: 9812, policy: base-90.yaml, packages: [debs], archive: debian}
    - {policy: base-92.yaml}       # a policy that no host runs yet

Other keys of a cell: supplements, agent, classifier, kernel, module_keys,
efi_db, efi_dbx, efi_sbat.

--output takes several forms at once: FORMAT or FORMAT=FILE, FORMAT being text,
json, sarif (2.1.0), junit, markdown or svr. svr is a signed verdict, an in-toto
statement that names the policies it is about; it needs --keys with an attester's
key. ringwall csv explain CSV001 says what a check is about.

JSON: {"version", "at", "inventory", "artefact": {"name", "format", "sha256",
"package", "version", "archive"}, "release", "catalogue", "files", "bytes", "contents",
"kinds", "rings", "cells": [{"ring", "hosts", "policy", "epoch",
"policy_sha256", "supplements", "agent", "kernel", "allowed", "blocked", "logged", "unasked",
"findings", "outcome", "not_live", "unloadable"}], "findings": [{"id",
"severity": "note|warn|hold|block", "cause", "fix", "members": [{"paths",
"sha256", "origin"}], "cells", "hosts"}], "unchecked", "hosts", "hosts_blocked",
"outcome"}`,
		Example: `  ringwall csv verify edged_4.7.0_amd64.deb --release releases/edged_4.7.0_amd64.release.json --policy base.yaml
  ringwall csv verify ./dist --release edged_4.7.0.release.json --cells cells.yaml --rings canary,prod --strict
  ringwall csv verify ./dist --cells cells.yaml --output text --output sarif=csv.sarif --output junit=csv.xml
  ringwall csv verify nginx_1.22.1-9_amd64.deb --from-archive debian --policy base.yaml --baseline /`,
		Args: exactly("ARTEFACT"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	o.cells.flags(c)
	f := c.Flags()
	f.StringVar(&o.release, "release", "", "the build's release record `FILE`")
	f.StringVar(&o.archive, "from-archive", "", "the build is a package of this archive `NAME`, taken at its word")
	f.StringArrayVar(&o.baseline, "baseline", nil, "what hosts have besides: a root directory or a list of paths, `PATH`; repeat")
	f.StringArrayVar(&o.outputs, "output", nil, "write the report as `FORMAT[=FILE]`; repeat (text, json, sarif, junit, markdown, svr)")
	f.BoolVar(&o.strict, "strict", false, "warnings are exit code 2")
	f.DurationVar(&o.maxAge, "max-age", 24*time.Hour, "an inventory older than this decides nothing; 0: any age will do")
	f.StringVar(&o.at, "at", "", "verify for this `TIME` instead of now (2031-05-01T12:00:00Z)")
	f.StringVar(&o.keys, "keys", "", "for svr: the authority's `DIR`, with the keys attest-ca and tsa")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.verifier, "verifier", "", "for svr: who verifies, as a `URI` such as spiffe://fleet.example/attest/csv")
	o.gates.flags(c)
	o.notify.flags(c)
	complete(c, "output", csvFormats()...)
	return c
}

// output is one form of the report and where it goes.
type output struct{ format, file string }

// parseOutputs reads --output. At most one goes to standard output.
func parseOutputs(specs []string) ([]output, error) {
	if len(specs) == 0 {
		return []output{{format: "text"}}, nil
	}
	var out []output
	toStdout := 0
	for _, s := range specs {
		format, file, named := strings.Cut(s, "=")
		if !slices.Contains(csvFormats(), format) || named && file == "" {
			return nil, usage(fmt.Errorf("--output %s: want FORMAT or FORMAT=FILE, with one of %s", s, strings.Join(csvFormats(), ", ")))
		}
		if file == "-" {
			file = ""
		}
		if file == "" {
			toStdout++
		}
		out = append(out, output{format, file})
	}
	if toStdout > 1 {
		return nil, usage(errors.New("--output: only one form can go to standard output; name a file for the others"))
	}
	return out, nil
}

func (o *csvOptions) run(ctx context.Context, e *env, path string) error {
	if e.getenv("GOGC") == "" { // a tenth more time for a fifth less memory
		debug.SetGCPercent(50)
	}
	outputs, err := parseOutputs(o.outputs)
	if err != nil {
		return err
	}
	now, err := o.time(e)
	if err != nil {
		return err
	}
	if o.release != "" && o.archive != "" {
		return usage(errors.New("a build is signed or comes from an archive: give --release or --from-archive"))
	}
	sign, err := o.signer(e, outputs)
	if err != nil {
		return err
	}
	gates, err := o.gates.ask(now)
	if err != nil {
		return err
	}
	targets, owners, err := o.notify.load()
	if err != nil {
		return err
	}
	v, err := o.cells.inventory(ctx, e)
	if err != nil {
		return err
	}
	baseline, err := baselineOf(o.baseline)
	if err != nil {
		return err
	}
	var release *csv.SignedRelease
	if o.release != "" {
		if release, err = readCandidate(o.release); err != nil {
			return err
		}
	}
	a, err := openArtefact(ctx, e, path)
	if err != nil {
		return fmt.Errorf("artefact: %w", err)
	}
	defer a.Close()
	m := newMeter(e, a, path)
	r, err := csv.Verify(ctx, csv.Candidate{
		Source: m, Subject: func() csv.Subject { return subjectOf(a) }, Release: release, Archive: o.archive,
	}, v, csv.Options{Now: now, MaxAge: o.maxAge, Baseline: baseline, Gates: gates, Progress: m.say})
	m.end()
	if err != nil {
		return err
	}
	for _, out := range outputs {
		if err := o.write(e, r, out, sign); err != nil { //nolint:contextcheck // a verdict goes to no log
			return codedError{csv.ExitInternal, fmt.Errorf("report as %s: %w", out.format, err)}
		}
	}
	if err := o.notify.tell(ctx, e, targets, owners, r, o.strict); err != nil {
		// The build's fate does not hang on a mail server's.
		e.notef("ringwall: %v", err)
	}
	return o.verdict(r, path)
}

func (o *csvOptions) time(e *env) (time.Time, error) {
	if o.at == "" {
		return e.now(), nil
	}
	t, err := time.Parse(time.RFC3339, o.at)
	if err != nil {
		return t, usage(fmt.Errorf("--at %q: want UTC, such as 2031-05-01T12:00:00Z", o.at))
	}
	return t, nil
}

// verdict is the exit code, with a line of why.
func (o *csvOptions) verdict(r *csv.Report, path string) error {
	code := r.Exit(o.strict)
	switch code {
	case csv.ExitBlock:
		return codedError{code, fmt.Errorf("%s would be blocked", path)}
	case csv.ExitHold:
		return codedError{code, fmt.Errorf("%s: cannot be decided", path)}
	case csv.ExitWarnings:
		return codedError{code, fmt.Errorf("%s: there are warnings", path)}
	}
	return nil
}

// signer makes the signer of a verdict before anything long begins.
func (o *csvOptions) signer(e *env, outputs []output) (*pki.Signer, error) {
	if !slices.ContainsFunc(outputs, func(x output) bool { return x.format == "svr" }) {
		if o.keys != "" {
			return nil, usage(errors.New("--keys is for --output svr"))
		}
		return nil, nil //nolint:nilnil // nothing is signed
	}
	if o.keys == "" {
		return nil, usage(errors.New("--output svr needs --keys"))
	}
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return nil, err
	}
	if o.verifier == "" {
		o.verifier = defaultIdentity(a, pki.PurposeAttest)
	}
	return a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: o.verifier, Now: e.now()})
}

func (o *csvOptions) write(e *env, r *csv.Report, out output, sign *pki.Signer) error {
	var b bytes.Buffer
	var err error
	switch out.format {
	case "text":
		r.WriteText(printableWriter{&b}, shown)
	case "json":
		err = r.WriteJSON(&b)
	case "sarif":
		err = r.WriteSARIF(&b, readBuildVersion().Version)
	case "junit":
		err = r.WriteJUnit(&b)
	case "markdown":
		r.WriteMarkdown(&b)
	case "svr":
		var bundle []byte
		if bundle, err = csv.SignVerdict(sign, r, o.verifier); err == nil {
			b.Write(bundle)
		}
	}
	if err != nil {
		return err
	}
	if out.file != "" {
		return host.WriteFile(out.file, b.Bytes(), 0o644)
	}
	_, err = e.stdout.Write(b.Bytes())
	return err
}

// meter shows how far a verification is: a bar on a terminal, nothing elsewhere
// (an artefact that takes long tells so itself).
type meter struct {
	*artefact
	e     *env
	total int64 // bytes in it; 0: not known
	tty   bool
	drawn time.Time
	wrote bool
}

const barWidth = 24

func newMeter(e *env, a *artefact, path string) *meter {
	m := &meter{artefact: a, e: e}
	if f, ok := e.stderr.(*os.File); ok && !e.quiet {
		st, err := f.Stat()
		m.tty = err == nil && st.Mode()&os.ModeCharDevice != 0
	}
	if m.tty && a.Format == builds.FormatDir { // of an archive nobody knows what is in it
		_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil {
					m.total += info.Size()
				}
			}
			return nil
		})
	}
	return m
}

// Walk implements codesign.Source.
func (m *meter) Walk(visit func(codesign.Member, io.Reader) error) error {
	if m.tty {
		m.told = m.e.now().Add(24 * time.Hour) // the bar says it
	}
	return m.artefact.Walk(func(x codesign.Member, r io.Reader) error {
		m.draw(x.Path)
		return visit(x, r)
	})
}

func (m *meter) draw(name string) {
	now := m.e.now()
	if !m.tty || now.Sub(m.drawn) < 100*time.Millisecond {
		return
	}
	m.drawn = now
	bar, far := "", m.Progress()
	if m.total > 0 {
		n := int(min(far.Bytes*barWidth/m.total, barWidth))
		bar = "[" + strings.Repeat("#", n) + strings.Repeat(".", barWidth-n) + "] "
	}
	if runes := []rune(name); len(runes) > 40 {
		name = "…" + string(runes[len(runes)-39:])
	}
	m.line(fmt.Sprintf("%s%d files, %d MiB  %s", bar, far.Members, far.Bytes>>20, name))
}

func (m *meter) line(s string) {
	m.wrote = true
	fmt.Fprintf(m.e.stderr, "\r\x1b[K%s", printable(strings.ReplaceAll(s, "\n", " ")))
}

func (m *meter) say(what string) {
	if m.tty {
		m.line(what)
	}
}

// end wipes the line.
func (m *meter) end() {
	if m.wrote {
		fmt.Fprint(m.e.stderr, "\r\x1b[K")
	}
}
