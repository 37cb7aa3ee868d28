package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	builds "ringwall/internal/artefact"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// whatIf is a policy that is asked what it would decide, with the releases and
// packages that a host of it would have.
type whatIf struct {
	policy, archive, at             string
	supplements, releases, packages []string
}

func (q *whatIf) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&q.policy, "policy", "", "the policy's YAML `FILE`")
	f.StringArrayVar(&q.supplements, "supplement", nil, "a supplemental policy's YAML `FILE`; repeat")
	f.StringArrayVar(&q.releases, "release", nil, "a release record `FILE`, or a directory of them; repeat")
	f.StringArrayVar(&q.packages, "package", nil, "a Debian package `FILE`, or a directory of them, taken at its word; repeat")
	f.StringVar(&q.archive, "archive", "", "the `NAME` of the archive that the packages come from (default: the policy's only one)")
	f.StringVar(&q.at, "at", "", "ask for this `TIME` instead of now (2031-05-01T12:00:00Z)")
}

// load compiles the policy; the time is the one that is asked about.
func (q *whatIf) load(ctx context.Context, e *env) (*integrity.Compiled, time.Time, error) {
	now := e.now()
	if q.at != "" {
		var err error
		if now, err = time.Parse(time.RFC3339, q.at); err != nil {
			return nil, now, usage(fmt.Errorf("--at %q: want UTC, such as 2031-05-01T12:00:00Z", q.at))
		}
	}
	p, err := loadPolicy(q.policy)
	if err != nil {
		return nil, now, err
	}
	if p, err = joinFiles(p, q.supplements); err != nil {
		return nil, now, err
	}
	sources, err := loadSources(q.releases, p)
	if err != nil {
		return nil, now, err
	}
	packages, err := q.loadPackages(ctx, e, p)
	if err != nil {
		return nil, now, err
	}
	c, err := integrity.Compile(p, append(sources, packages...), integrity.CompileOptions{Now: now})
	return c, now, err
}

// loadPackages catalogues packages as if their archive's signature vouched for
// them. A host does not take that for granted.
func (q *whatIf) loadPackages(ctx context.Context, e *env, p *integrity.Policy) ([]integrity.Source, error) {
	if len(q.packages) == 0 {
		return nil, nil
	}
	name := q.archive
	switch {
	case name == "" && len(p.Trust.Archives) == 1:
		name = p.Trust.Archives[0].Name
	case name == "":
		return nil, usage(fmt.Errorf("--archive is missing: policy %s trusts %d archives", p.Name, len(p.Trust.Archives)))
	case !slices.ContainsFunc(p.Trust.Archives, func(a integrity.Archive) bool { return a.Name == name }):
		return nil, fmt.Errorf("archive %q is not one that policy %s trusts: %w", name, p.Name, errs.NotFound)
	}
	var files []string
	for _, f := range q.packages {
		found, err := filesOf(f, ".deb")
		if err != nil {
			return nil, fmt.Errorf("package: %w", err)
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("packages of %s: no file ends in .deb: %w", f, errs.NotFound)
		}
		files = append(files, found...)
	}
	e.notef("%d packages are taken at their word; a host asks their archive's signature.", len(files))
	var out []integrity.Source
	for _, f := range files {
		s, err := packageSource(ctx, e, f, name)
		if err != nil {
			return nil, fmt.Errorf("package %s: %w", f, err)
		}
		out = append(out, s)
	}
	return out, nil
}

func packageSource(ctx context.Context, e *env, file, archive string) (integrity.Source, error) {
	var none integrity.Source
	// a host looks at what dpkg unpacks, not into archives among it
	a, err := openArtefactAs(ctx, e, file, builds.Options{Depth: -1})
	if err != nil {
		return none, err
	}
	defer a.Close()
	b, err := codesign.Build(a, codesign.Options{AllFiles: true})
	if err != nil {
		return none, err
	}
	d, ok := a.pkg()
	if !ok || a.Format != builds.FormatDeb {
		return none, fmt.Errorf("no Debian package: %w", errs.Invalid)
	}
	c, err := codesign.ParseCatalogue(b.Catalogue)
	if err != nil {
		return none, err
	}
	return codesign.CatalogueSource(integrity.Origin{Archive: archive, Package: d.Name, Version: d.Version}, c, b.Names)
}
