package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// csvExplanation is what there is to say about a check or a content.
type csvExplanation struct {
	Check    *csv.Check       `json:"check,omitempty"`
	Cells    []csvCellVerdict `json:"cells,omitempty"`
	Findings []csvFindingIn   `json:"findings,omitempty"`
}

// csvCellVerdict is what one cell's policy says of a content.
type csvCellVerdict struct {
	Ring  string `json:"ring"`
	Hosts int    `json:"hosts"`
	Name  string `json:"policy"`
	Epoch uint64 `json:"epoch"`
	Error string `json:"error,omitempty"`
	verdict
}

// csvFindingIn is a finding of a report, with its cells by name.
type csvFindingIn struct {
	csv.Finding
	Where []string `json:"where"`
}

func newCSVExplainCommand(e *env) *cobra.Command {
	var f cellFlags
	var report string
	c := &cobra.Command{
		Use:   "explain CHECK | PATH | DIGEST",
		Short: "Say what a check is about, or what happens to one file and why",
		Long: `CHECK is an id such as CSV006: what it looks for and what to do.

With --report FILE (what --output json wrote) PATH is a name in the build, or
DIGEST the beginning of a SHA-256: every finding about it.

With --cells or --policy PATH is a file on this machine, or DIGEST a whole
SHA-256: what each cell's policy says of it, by which rule. A release that
vouches for it is given by --host-release.

JSON: {"check": {"id", "name", "title", "help"}} or {"cells": [{"ring", "hosts",
"policy", "epoch", "error", as in policy explain}]} or {"findings": [{as in csv
verify, "where"}]}`,
		Example: `  ringwall csv explain CSV006
  ringwall csv explain usr/bin/edged --report csv.json
  ringwall csv explain ./edged --cells cells.yaml --rings prod`,
		Args: exactly("CHECK, PATH or DIGEST"),
		RunE: func(c *cobra.Command, args []string) error {
			return runCSVExplain(c.Context(), e, &f, report, args[0])
		},
	}
	f.flags(c)
	c.Flags().StringVar(&report, "report", "", "a report `FILE` of csv verify --output json")
	return c
}

func runCSVExplain(ctx context.Context, e *env, f *cellFlags, report, what string) error {
	asked := f.cells != "" || len(f.policies) > 0
	switch {
	case report != "" && asked:
		return usage(errors.New("give --report, or cells to ask, not both"))
	case report != "":
		return explainReport(e, report, what)
	case asked:
		return explainCells(ctx, e, f, what)
	}
	c, err := csv.CheckOf(csv.ID(what))
	if err != nil {
		return usage(hint(err, "for a file or digest give --report, --cells or --policy"))
	}
	return e.emit(csvExplanation{Check: &c}, func(w io.Writer) {
		fmt.Fprintf(w, "%s %s\n%s\n\n%s\n", c.ID, c.Name, c.Title, c.Help)
	})
}

func explainReport(e *env, file, what string) error {
	in, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	defer in.Close()
	r, err := csv.ReadReport(in)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	out := csvExplanation{Findings: []csvFindingIn{}}
	digest := strings.TrimPrefix(what, "sha256:")
	about := func(m csv.MemberRef) bool {
		return slices.Contains(m.Paths, what) || len(digest) >= 8 && strings.HasPrefix(m.SHA256, digest)
	}
	for _, f := range r.Findings {
		if !strings.EqualFold(string(f.ID), what) {
			f.Members = slices.DeleteFunc(f.Members, func(m csv.MemberRef) bool { return !about(m) })
			if len(f.Members) == 0 {
				continue
			}
		}
		x := csvFindingIn{Finding: f, Where: []string{}}
		for _, n := range f.Cells {
			c := r.Cells[n]
			x.Where = append(x.Where, fmt.Sprintf("ring %s, policy %s %d, %d hosts", c.Ring, c.Policy, c.Epoch, c.Hosts))
		}
		out.Findings = append(out.Findings, x)
	}
	if err := e.emit(out, func(w io.Writer) {
		for _, f := range out.Findings {
			fmt.Fprintf(w, "%s %s: %s\n", f.Severity, f.ID, f.Cause)
			for _, m := range f.Members {
				for _, p := range m.Paths {
					fmt.Fprintf(w, "  %s\n", shown(p))
				}
				fmt.Fprintf(w, "    sha256 %s\n", m.SHA256)
			}
			for _, x := range f.Where {
				fmt.Fprintf(w, "  %s\n", x)
			}
			fmt.Fprintf(w, "  fix: %s\n", f.Fix)
		}
	}); err != nil {
		return err
	}
	if len(out.Findings) == 0 {
		return codedError{csv.ExitHold, fmt.Errorf("the report finds nothing about %s: %w", what, errs.NotFound)}
	}
	return nil
}

func explainCells(ctx context.Context, e *env, f *cellFlags, what string) error {
	type content struct {
		digest integrity.Digest
		kinds  integrity.KindSet
	}
	var contents []content
	if d, err := integrity.ParseDigest(what); err == nil && !exists(what) {
		contents = []content{{d, integrity.Unclassified}}
	} else {
		found, err := measure(oneFile{what}, codesign.Options{AllFiles: true})
		if err != nil {
			return err
		}
		for _, m := range found {
			kinds := m.Kinds
			if m.Flags&codesign.FlagData != 0 {
				kinds = integrity.Unclassified
			}
			contents = append(contents, content{m.Digest, kinds})
		}
	}
	v, err := f.inventory(ctx, e)
	if err != nil {
		return err
	}
	out := csvExplanation{Cells: []csvCellVerdict{}}
	denied := false
	for _, cell := range v.Cells {
		row := csvCellVerdict{Ring: cell.Ring, Hosts: cell.Hosts}
		live, err := cell.Load(ctx)
		var c *integrity.Compiled
		if err == nil {
			row.Name, row.Epoch = live.Policy.Name, live.Policy.Epoch
			c, err = integrity.Compile(live.Policy, live.Sources, integrity.CompileOptions{Now: e.now()})
		}
		if err != nil {
			row.Error = err.Error()
			out.Cells = append(out.Cells, row)
			continue
		}
		for _, x := range contents {
			for _, k := range integrity.Kinds() {
				if x.kinds.Has(k) {
					row.verdict, _ = judge(c, integrity.Key{Digest: x.digest}, k, e.now())
					denied = denied || !row.Allow
					out.Cells = append(out.Cells, row)
				}
			}
		}
	}
	if err := e.emit(out, func(w io.Writer) { writeCellVerdicts(w, out.Cells) }); err != nil {
		return err
	}
	if i := slices.IndexFunc(out.Cells, func(c csvCellVerdict) bool { return c.Error != "" }); i >= 0 {
		return codedError{csv.ExitHold, fmt.Errorf("%s: %s", what, out.Cells[i].Error)}
	}
	if denied {
		return codedError{csv.ExitBlock, fmt.Errorf("%s would be refused somewhere", what)}
	}
	return nil
}

func writeCellVerdicts(w io.Writer, cells []csvCellVerdict) {
	for _, c := range cells {
		where := "policy " + c.Name + " " + fmt.Sprint(c.Epoch)
		if c.Ring != "" {
			where = fmt.Sprintf("ring %s, %s, %d hosts", c.Ring, where, c.Hosts)
		}
		if c.Error != "" {
			fmt.Fprintf(w, "?     %s: %s\n", where, c.Error)
			continue
		}
		word := "ALLOW"
		if !c.Allow {
			word = "DENY"
		}
		fmt.Fprintf(w, "%-5s %s: as %s, %s: %s\n", word, where, c.Kind, c.Effect, c.Reason)
	}
}
