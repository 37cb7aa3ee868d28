package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/kernelsig"
)

// codedError is an error of a command with exit codes of its own.
type codedError struct {
	code int
	err  error
}

func (c codedError) Error() string { return c.err.Error() }
func (c codedError) Unwrap() error { return c.err }

func newCSVCommand(e *env) *cobra.Command {
	c := newGroup("csv", groupSign, "Would this build run on every host that it will reach?",
		`Code-signing verification, the last test of a build. It asks every policy that
is live somewhere about every executable part of a build, before the build ships,
and says what would be blocked where, why, and what to do about it.

Exit codes, other than those of other commands:

   0  it would run everywhere (perhaps with warnings)
   1  something would be blocked
   2  there are warnings, and --strict was given
   3  the command was typed wrongly
   4  it cannot be decided: a policy, an inventory or evidence is missing or stale
   5  this program failed

A pipeline stops on anything but 0.`,
		newCSVVerifyCommand(e),
		newCSVRunCommand(e),
		newCSVGuestCommand(e),
		newCSVExplainCommand(e),
		newCSVDiffCommand(e),
		newCSVConfirmCommand(e),
	)
	for _, sub := range append(c.Commands(), c) {
		sub.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
			return codedError{csv.ExitUsage, explainFlag(c, err)}
		})
		args, run := sub.Args, sub.RunE
		sub.Args = func(c *cobra.Command, a []string) error {
			if err := args(c, a); err != nil {
				return codedError{csv.ExitUsage, err}
			}
			return nil
		}
		sub.RunE = func(c *cobra.Command, a []string) error { return csvError(run(c, a)) }
	}
	return c
}

// csvError gives an error the exit code that CSV's commands promise. What
// nobody foresaw is a hold, too: only a report says that a build passes.
func csvError(err error) error {
	var coded codedError
	var u usageError
	switch {
	case err == nil || errors.As(err, &coded):
		return err
	case errors.As(err, &u):
		return codedError{csv.ExitUsage, err}
	case errors.Is(err, context.Canceled):
		return codedError{csv.ExitInternal, err}
	case errors.Is(err, errs.Invalid), errors.Is(err, errs.NotFound), errors.Is(err, errs.Untrusted), errors.Is(err, errs.Unsupported),
		errors.Is(err, errs.Conflict), errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return codedError{csv.ExitHold, err}
	}
	return codedError{csv.ExitInternal, err}
}

// cellFlags say where a build goes.
type cellFlags struct {
	cells          string
	rings          []string
	policies       []string
	supplements    []string
	releases       []string
	packages       []string
	archive        string
	moduleKeys, db []string
	dbx            []string
	sbat           string
}

func (f *cellFlags) flags(c *cobra.Command) {
	s := c.Flags()
	s.StringVar(&f.cells, "cells", "", "the fleet's cells: a YAML `FILE` (see ringwall csv verify --help)")
	s.StringSliceVar(&f.rings, "rings", nil, "only these `RINGS` of the cells, such as canary,internal (default: all)")
	s.StringArrayVar(&f.policies, "policy", nil, "a policy's YAML `FILE`; repeat for each that hosts run")
	s.StringArrayVar(&f.supplements, "supplement", nil, "with --policy: a supplemental policy's YAML `FILE`; repeat")
	s.StringArrayVar(&f.releases, "host-release", nil, "with --policy: a release record `FILE` that hosts have already, or a directory of them; repeat")
	s.StringArrayVar(&f.packages, "host-package", nil, "with --policy: a Debian package `FILE` that hosts have, or a directory of them; repeat")
	s.StringVar(&f.archive, "host-archive", "", "the `NAME` of the archive that the hosts' packages come from (default: the policy's only one)")
	s.StringArrayVar(&f.moduleKeys, "module-key", nil, "with --policy: a certificate `FILE` that the hosts' kernels take module signatures from; repeat")
	s.StringArrayVar(&f.db, "efi-db", nil, "with --policy: a `FILE` of the firmware's db, a certificate or an .esl list; repeat")
	s.StringArrayVar(&f.dbx, "efi-dbx", nil, "with --policy: a `FILE` of the firmware's dbx, a certificate or an .esl list; repeat")
	s.StringVar(&f.sbat, "efi-sbat", "", "with --policy: a `FILE` with the firmware's SBAT level")
	_ = c.MarkFlagFilename("cells", "yaml", "yml")
	_ = c.MarkFlagFilename("policy", "yaml", "yml")
}

// inventory returns the cells that the flags name.
func (f *cellFlags) inventory(ctx context.Context, e *env) (*csv.Inventory, error) {
	switch {
	case (f.cells == "") == (len(f.policies) == 0):
		return nil, usage(errors.New("give --cells or --policy, one of them"))
	case f.cells != "" && len(f.supplements)+len(f.releases)+len(f.packages)+len(f.moduleKeys)+len(f.db)+len(f.dbx)+len(f.sbat) > 0:
		return nil, usage(errors.New("with --cells, what hosts have stands in its file"))
	case f.cells == "" && len(f.rings) > 0:
		return nil, usage(errors.New("--rings needs --cells"))
	}
	var from csv.Cells
	if f.cells != "" {
		from = &fileCells{file: f.cells, e: e}
	} else {
		from = &policyCells{f, e}
	}
	v, err := from.Cells(ctx, f.rings)
	if errors.Is(err, errs.NotFound) && len(f.rings) > 0 {
		return nil, usage(err)
	}
	return v, err
}

// policyCells are policies that are named on the command line: no rings, no
// hosts.
type policyCells struct {
	f *cellFlags
	e *env
}

// Cells implements csv.Cells.
func (p *policyCells) Cells(context.Context, []string) (*csv.Inventory, error) {
	v := &csv.Inventory{}
	cache := packageCache{}
	for _, policy := range p.f.policies {
		c, err := cellOf(p.e, cache, ".", csv.CellSpec{
			Policy: policy, Supplements: p.f.supplements, Releases: p.f.releases, Packages: p.f.packages, Archive: p.f.archive,
			ModuleKeys: p.f.moduleKeys, DB: p.f.db, DBX: p.f.dbx, SBAT: p.f.sbat,
		})
		if err != nil {
			return nil, err
		}
		v.Cells = append(v.Cells, c)
	}
	return v, nil
}

// fileCells are a file's.
type fileCells struct {
	file string
	e    *env
}

// Cells implements csv.Cells.
func (f *fileCells) Cells(_ context.Context, rings []string) (*csv.Inventory, error) {
	doc, err := readBounded(f.file, maxPolicyFile)
	if err != nil {
		return nil, fmt.Errorf("cells: %w", err)
	}
	parsed, err := csv.ParseCells(f.file, doc)
	if err != nil { // all of its problems, in a line
		return nil, fmt.Errorf("%s: %w", strings.ReplaceAll(err.Error(), "\n", "; "), errs.Invalid)
	}
	v := &csv.Inventory{Taken: parsed.Taken, Rings: parsed.Rings}
	cache := packageCache{}
	for _, spec := range parsed.Cells {
		c, err := cellOf(f.e, cache, filepath.Dir(f.file), spec)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.file, err)
		}
		v.Cells = append(v.Cells, c)
	}
	return v.Select(rings)
}

// cellOf is a cell whose files lie in a directory. Its policy is read when it
// is asked.
func cellOf(e *env, cache packageCache, dir string, s csv.CellSpec) (csv.Cell, error) {
	in := func(names []string) []string {
		out := make([]string, len(names))
		for i, n := range names {
			if out[i] = n; !filepath.IsAbs(n) {
				out[i] = filepath.Join(dir, n)
			}
		}
		return out
	}
	q := whatIf{
		policy: in([]string{s.Policy})[0], supplements: in(s.Supplements), releases: in(s.Releases), packages: in(s.Packages), archive: s.Archive,
	}
	c := csv.Cell{
		Ring: s.Ring, Hosts: s.Hosts, Agent: s.Agent, Classifier: s.Classifier, Kernel: s.Kernel,
		Key:  fmt.Sprintf("%q %q %q %q %q %d %q %q %q %q", q.policy, q.supplements, q.releases, q.packages, s.Archive, s.Classifier, s.ModuleKeys, s.DB, s.DBX, s.SBAT),
		Load: func(ctx context.Context) (*csv.Live, error) { return q.live(ctx, e, cache) },
	}
	for _, f := range in(s.ModuleKeys) {
		certs, err := readCertificates(f)
		if err != nil {
			return c, err
		}
		c.ModuleKeys = append(c.ModuleKeys, certs...)
	}
	var err error
	if c.DB, err = readSignatureDB(in(s.DB)); err != nil {
		return c, err
	}
	if c.DBX, err = readSignatureDB(in(s.DBX)); err != nil {
		return c, err
	}
	if s.SBAT == "" {
		return c, nil
	}
	text, err := readBounded(in([]string{s.SBAT})[0], maxBundleFile)
	if err != nil {
		return c, fmt.Errorf("SBAT level: %w", err)
	}
	c.SBAT, err = kernelsig.ParseSBAT(text)
	return c, err
}

// readSignatureDB reads certificates, and signature lists: one .esl file alone,
// since two lists of the firmware are never joined.
func readSignatureDB(files []string) (*kernelsig.SignatureDB, error) {
	if len(files) == 0 {
		return nil, nil //nolint:nilnil // nobody said
	}
	db := &kernelsig.SignatureDB{}
	for _, f := range files {
		if strings.HasSuffix(f, ".esl") {
			if len(files) > 1 {
				return nil, fmt.Errorf("%s: a signature list stands alone: join them with cat: %w", f, errs.Invalid)
			}
			b, err := readBounded(f, maxBundleFile)
			if err != nil {
				return nil, fmt.Errorf("signature list: %w", err)
			}
			if db, err = kernelsig.ParseSignatureLists(b); err != nil {
				return nil, fmt.Errorf("%s: %w", f, err)
			}
			return db, nil
		}
		certs, err := readCertificates(f)
		if err != nil {
			return nil, err
		}
		db.Certificates = append(db.Certificates, certs...)
	}
	return db, nil
}

// readCertificates reads PEM, or one certificate in DER.
func readCertificates(file string) ([]*x509.Certificate, error) {
	b, err := readBounded(file, maxBundleFile)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if !strings.Contains(string(b), "-----BEGIN") {
		c, err := x509.ParseCertificate(b)
		if err != nil {
			return nil, fmt.Errorf("certificate %s: %w: %w", file, err, errs.Invalid)
		}
		return []*x509.Certificate{c}, nil
	}
	var out []*x509.Certificate
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %s: %w: %w", file, err, errs.Invalid)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("certificate %s: none in it: %w", file, errs.Invalid)
	}
	return out, nil
}

// live is the policy with what its hosts have.
func (q *whatIf) live(ctx context.Context, e *env, cache packageCache) (*csv.Live, error) {
	p, err := loadPolicy(q.policy)
	if err != nil {
		return nil, err
	}
	supplements, err := digestsOf(q.supplements)
	if err != nil {
		return nil, err
	}
	if p, err = joinFiles(p, q.supplements); err != nil {
		return nil, err
	}
	sources, err := loadSources(q.releases, p)
	if err != nil {
		return nil, err
	}
	packages, err := cache.load(ctx, e, q, p)
	if err != nil {
		return nil, err
	}
	return &csv.Live{Policy: p, Sources: append(sources, packages...), Supplements: supplements}, nil
}

// digestsOf returns the digests of policies.
func digestsOf(files []string) ([]integrity.Digest, error) {
	var out []integrity.Digest
	for _, f := range files {
		p, err := loadPolicy(f)
		if err != nil {
			return nil, err
		}
		out = append(out, p.Digest)
	}
	return out, nil
}

// packageCache keeps what packages hold, since cells share most of them.
type packageCache map[string][]integrity.Source

func (c packageCache) load(ctx context.Context, e *env, q *whatIf, p *integrity.Policy) ([]integrity.Source, error) {
	if len(q.packages) == 0 {
		return nil, nil
	}
	name := q.archive
	if name == "" && len(p.Trust.Archives) == 1 {
		name = p.Trust.Archives[0].Name
	}
	key := fmt.Sprintf("%s %q", name, q.packages)
	if s, ok := c[key]; ok {
		return s, nil
	}
	s, err := q.loadPackages(ctx, e, p)
	if err != nil {
		return nil, err
	}
	c[key] = s
	return s, nil
}

// readCandidate reads a release's three files without believing them.
func readCandidate(file string) (*csv.SignedRelease, error) {
	stem, ok := strings.CutSuffix(file, extRelease)
	if !ok {
		return nil, usage(fmt.Errorf("--release %s: want a file that ends in %s", file, extRelease))
	}
	var r csv.SignedRelease
	var err error
	if r.Bundle, err = readBounded(file, maxBundleFile); err != nil {
		return nil, fmt.Errorf("release: %w", err)
	}
	if r.Catalogue, err = readBounded(stem+extCatalogue, maxCatalogueFile); err == nil {
		r.Names, err = readBounded(stem+extNames, maxCatalogueFile)
	}
	if err != nil {
		return nil, hint(fmt.Errorf("release %s: %w", file, err), "a release's three files lie side by side")
	}
	return &r, nil
}

// baselineOf is what hosts have besides: roots of installed trees, and lists of
// paths.
func baselineOf(paths []string) (csv.Baseline, error) {
	if len(paths) == 0 {
		return nil, nil //nolint:nilnil // no baseline is a valid answer
	}
	var out []csv.Baseline
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, fmt.Errorf("baseline: %w", err)
		}
		if st.IsDir() {
			out = append(out, csv.TreeBaseline(os.DirFS(p)))
			continue
		}
		f, err := os.Open(p)
		if err != nil {
			return nil, fmt.Errorf("baseline: %w", err)
		}
		b, err := csv.ListBaseline(f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		out = append(out, b)
	}
	return csv.JoinBaselines(out...), nil
}

// subjectOf says what an artefact is, once it has been walked.
func subjectOf(a *artefact) csv.Subject {
	s := csv.Subject{Name: a.name(), Format: string(a.Format), Digest: a.digest()}
	if p, ok := a.pkg(); ok {
		s.Package, s.Version = p.Name, p.Version
	}
	return s
}

var _ codesign.Source = (*artefact)(nil)
