package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
)

// csvGates asks whether the evidence that a release policy wants is there.
type csvGates struct {
	policy   string
	evidence []string
}

func (g *csvGates) flags(c *cobra.Command) {
	c.Flags().StringVar(&g.policy, "release-policy", "", "the product's release policy `FILE`: its gates must pass, too")
	c.Flags().StringArrayVar(&g.evidence, "evidence", nil, "evidence for --release-policy: a `FILE` or a directory of .json files; repeat")
}

// ask is nil when no release policy is given.
func (g *csvGates) ask(now time.Time) (csv.Gates, error) {
	if g.policy == "" {
		if len(g.evidence) > 0 {
			return nil, usage(errors.New("--evidence needs --release-policy"))
		}
		return nil, nil
	}
	doc, err := readBounded(g.policy, maxPolicyFile)
	if err != nil {
		return nil, fmt.Errorf("release policy: %w", err)
	}
	p, err := gate.ParsePolicy(g.policy, doc)
	if err != nil {
		return nil, err
	}
	return func(_ context.Context, s csv.Subject, r *codesign.Release) ([]csv.GateIssue, error) {
		return g.evaluate(p, s, r, now)
	}, nil
}

func (g *csvGates) evaluate(p *gate.Policy, s csv.Subject, r *codesign.Release, now time.Time) ([]csv.GateIssue, error) {
	if r == nil {
		return []csv.GateIssue{{
			Severity: csv.Hold, Cause: "no policy believes a release record of this build, so nobody can say which gates it passed",
			Fix: "sign the build and give its record with --release",
		}}, nil
	}
	files, err := evidenceFiles(g.evidence)
	if err != nil {
		return nil, err
	}
	var evidence []*gate.Evidence
	var out []csv.GateIssue
	for _, f := range files {
		b, err := readBounded(f, maxBundleFile)
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		v, err := gate.Open(b, p.Trust)
		if err != nil {
			out = append(out, csv.GateIssue{
				Severity: csv.Warn, Cause: fmt.Sprintf("evidence %s does not count: %v", filepath.Base(f), err), Fix: "have it made again by an attester that the release policy trusts",
			})
			continue
		}
		v.Label = filepath.Base(f)
		evidence = append(evidence, v)
	}
	d := gate.Evaluate(p, gate.Request{
		Product: r.Product, Version: r.Version, Epoch: r.Epoch, Revision: r.Revision, Artefact: gate.Digest(s.Digest),
	}, evidence, now)
	for _, x := range d.Results {
		if asksForCSV(p, x.Gate) {
			continue // that is this run's own verdict
		}
		severity := map[gate.State]csv.Severity{gate.Fail: csv.Block, gate.Hold: csv.Hold}[x.State]
		if severity != "" {
			out = append(out, csv.GateIssue{Severity: severity, Cause: fmt.Sprintf("gate %s: %s (%s)", x.Gate, x.Text, x.Code), Fix: x.Fix})
		}
	}
	return out, nil
}

// asksForCSV says whether a gate is passed by a verdict of csv verify.
func asksForCSV(p *gate.Policy, name string) bool {
	return slices.ContainsFunc(p.Gates, func(g gate.Gate) bool { return g.Name == name && slices.Contains(g.Properties, csv.PropertyPassed) })
}

func evidenceFiles(paths []string) ([]string, error) {
	var out []string
	for _, p := range paths {
		found, err := filesOf(p, ".json")
		if err != nil {
			return nil, fmt.Errorf("evidence: %w", err)
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("evidence of %s: no file ends in .json: %w", p, errs.NotFound)
		}
		out = append(out, found...)
	}
	slices.Sort(out)
	return out, nil
}
