package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

type verifyOptions struct {
	trust, content, extract string
	policy, breakglass      bool
}

// verifiedRelease is what a release record says, once believed.
type verifiedRelease struct {
	File        string         `json:"file"`
	Product     string         `json:"product"`
	Version     string         `json:"version"`
	Epoch       uint32         `json:"epoch"`
	Revision    string         `json:"revision"`
	Release     string         `json:"release"`
	Authority   string         `json:"authority"`
	Identity    string         `json:"identity"`
	Certificate string         `json:"certificate"` // fingerprint
	SignedAt    time.Time      `json:"signed_at"`
	NotAfter    *time.Time     `json:"not_after,omitempty"`
	Artefacts   []artefactJSON `json:"artefacts"`
	Gates       []gateJSON     `json:"gates"`
	Policy      string         `json:"policy,omitempty"` // SHA-256 of the release policy
	Ring        string         `json:"ring,omitempty"`
	Breakglass  string         `json:"breakglass,omitempty"` // the reason
	Log         *loggedJSON    `json:"log,omitempty"`        // nil: whom is trusted names no log
	Records     int            `json:"records"`
	Content     *contentCheck  `json:"content,omitempty"`
}

// loggedJSON is where a release stands in a transparency log.
type loggedJSON struct {
	Name  string `json:"name"`
	Index uint64 `json:"index"`
	Size  uint64 `json:"size"` // of the log when the proof was made
}

type artefactJSON struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

type gateJSON struct {
	Name     string    `json:"name"`
	Attester string    `json:"attester"`
	Evidence string    `json:"evidence"`
	At       time.Time `json:"at"`
}

// contentCheck compares what was signed with what is there.
type contentCheck struct {
	Path        string       `json:"path"`
	Same        bool         `json:"same"`     // all that is executable, and all links
	Artefact    bool         `json:"artefact"` // the very artefact that was signed
	Differences []difference `json:"differences"`
}

// difference is one name that was signed with other content than is there.
type difference struct {
	Change string `json:"change"` // added, removed or changed
	Path   string `json:"path"`
	Signed string `json:"signed,omitempty"`
	Found  string `json:"found,omitempty"`
}

func newVerifyCommand(e *env) *cobra.Command {
	var o verifyOptions
	c := &cobra.Command{
		Use:     "verify FILE --trust DIR|POLICY",
		GroupID: groupSign,
		Short:   "Verify a release or a signed policy",
		Long: `Verifies a release record (NAME.release.json, with NAME.cat and NAME.names beside
it) or a signed policy (NAME.policy.json): signature, certificate, timestamp,
catalogue and names. Whom to believe stands in an authority's directory or in
the trust section of a policy.

With --content it also reads a directory, tar archive or Debian package again
and reports every difference from what was signed; any is exit code 1. Data
files count when they were signed with --all-files.

JSON of a release: {"file", "product", "version", "epoch", "revision", "release",
"authority", "identity", "certificate", "signed_at", "not_after", "artefacts",
"gates", "policy", "ring", "breakglass", "log": {"name", "index",
"size"}, "records", "content": {"path", "same", "artefact", "differences":
[{"change": "added|removed|changed", "path", "signed", "found"}]}}
JSON of a policy: {"file", "name", "epoch", "supplements", "sha256", "authority",
"identity", "certificate", "signed_at"}`,
		Example: `  ringwall verify edged_4.7.0.release.json --trust keys
  ringwall verify edged_4.7.0.release.json --trust base.yaml --content /opt/edged
  ringwall verify base.policy.json --trust keys --extract base.yaml`,
		Args: exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			if o.policy || strings.HasSuffix(args[0], extPolicy) {
				return o.verifyPolicy(e, args[0])
			}
			return o.verifyRelease(c.Context(), e, args[0])
		},
	}
	f := c.Flags()
	f.StringVar(&o.trust, "trust", "", "whom to believe: an authority's `DIR`, or a policy's YAML")
	f.StringVar(&o.content, "content", "", "compare with the directory, tar archive or package at `PATH`")
	f.BoolVar(&o.breakglass, "breakglass", false, "FILE is of a build that was signed past its gates")
	f.BoolVar(&o.policy, "policy", false, "FILE is a signed policy, whatever its name")
	f.StringVar(&o.extract, "extract", "", "write the YAML of a signed policy to `FILE`")
	require(c, "trust")
	return c
}

func (o *verifyOptions) verifyRelease(ctx context.Context, e *env, file string) error {
	if o.extract != "" {
		return usage(errors.New("--extract is for signed policies"))
	}
	purpose, verify := pki.PurposeBuild, codesign.VerifyRelease
	if o.breakglass {
		purpose, verify = pki.PurposeBreakglass, codesign.VerifyBreakglass
	}
	roots, err := loadRoots(o.trust, purpose)
	if err != nil {
		return err
	}
	r, err := loadReleaseAs(file, func(record, catalogue []byte) (*codesign.Release, *codesign.Catalogue, error) {
		return verify(record, catalogue, roots)
	})
	if err != nil {
		return err
	}
	out := describeRelease(r)
	if o.content != "" {
		if out.Content, err = compareContent(ctx, e, r, o.content); err != nil {
			return fmt.Errorf("compare with %s: %w", o.content, err)
		}
	}
	if err := e.emit(out, out.write); err != nil {
		return err
	}
	if c := out.Content; c != nil && !c.Same {
		return fmt.Errorf("%s is not what was signed, %d differences: %w", o.content, len(c.Differences), errs.Denied)
	}
	return nil
}

func describeRelease(r *loadedRelease) *verifiedRelease {
	out := &verifiedRelease{
		File: r.file, Product: r.Product, Version: r.Version, Epoch: r.Epoch, Revision: r.Revision, Release: r.Record.String(),
		Authority: r.CA, Identity: r.Identity, Certificate: r.CertFingerprint.String(), SignedAt: r.SignedAt,
		Artefacts: []artefactJSON{}, Gates: []gateJSON{}, Records: r.catalogue.Len(),
	}
	if !r.NotAfter.IsZero() {
		out.NotAfter = &r.NotAfter
	}
	if !r.Policy.IsZero() {
		out.Policy = r.Policy.String()
	}
	out.Ring, out.Breakglass = r.Ring, r.Breakglass
	if l := r.Logged; l != nil {
		out.Log = &loggedJSON{l.Log, l.Index, l.Size}
	}
	for _, a := range r.Artefacts {
		out.Artefacts = append(out.Artefacts, artefactJSON{a.Name, a.Digest.String()})
	}
	for _, g := range r.Gates {
		out.Gates = append(out.Gates, gateJSON{g.Name, g.Attester, g.Evidence.String(), g.At})
	}
	return out
}

func (v *verifiedRelease) write(w io.Writer) {
	fmt.Fprintf(w, "%s %s, epoch %d: signed by %s\n", v.Product, v.Version, v.Epoch, v.Identity)
	fmt.Fprintf(w, "  authority    %s\n  signed at    %s\n", v.Authority, v.SignedAt.UTC().Format(time.RFC3339))
	if v.NotAfter != nil {
		fmt.Fprintf(w, "  use by       %s\n", v.NotAfter.UTC().Format(time.RFC3339))
	}
	if v.Revision != "" {
		fmt.Fprintf(w, "  revision     %s\n", v.Revision)
	}
	fmt.Fprintf(w, "  release      %s\n  certificate  %s\n", v.Release, v.Certificate)
	if v.Log != nil {
		fmt.Fprintf(w, "  log          %s, entry %d of %d\n", shown(v.Log.Name), v.Log.Index, v.Log.Size)
	}
	for _, a := range v.Artefacts {
		fmt.Fprintf(w, "  artefact     %s %s\n", a.SHA256, shown(a.Name))
	}
	for _, g := range v.Gates {
		fmt.Fprintf(w, "  gate         %s, passed at %s, says %s\n", g.Name, g.At.UTC().Format(time.RFC3339), g.Attester)
	}
	switch {
	case v.Policy == "":
		fmt.Fprintf(w, "  gates        none: the release was signed without a release policy\n")
	case v.Breakglass != "":
		fmt.Fprintf(w, "  BREAK-GLASS  signed past its gates: %s\n", v.Breakglass)
		fallthrough
	default:
		fmt.Fprintf(w, "  policy       %s\n", v.Policy)
	}
	if v.Ring != "" {
		fmt.Fprintf(w, "  ring         no further than %s\n", v.Ring)
	}
	fmt.Fprintf(w, "  catalogue    %d contents\n", v.Records)
	c := v.Content
	if c == nil {
		return
	}
	switch {
	case c.Artefact:
		fmt.Fprintf(w, "%s is the very artefact that was signed\n", shown(c.Path))
	case c.Same:
		fmt.Fprintf(w, "%s holds the same code\n", shown(c.Path))
	}
	for _, d := range c.Differences {
		fmt.Fprintf(w, "%-8s %s\n", d.Change, shown(d.Path))
		if d.Signed != "" {
			fmt.Fprintf(w, "  signed %s\n", d.Signed)
		}
		if d.Found != "" {
			fmt.Fprintf(w, "  found  %s\n", d.Found)
		}
	}
}

// compareContent catalogues what is at path by the rules that the release was
// made by, and compares.
func compareContent(ctx context.Context, e *env, r *loadedRelease, path string) (*contentCheck, error) {
	if got := r.catalogue.Classifier(); got != codesign.ClassifierVersion {
		return nil, fmt.Errorf("the release was made by classifier %d, this binary has %d: %w", got, codesign.ClassifierVersion, errs.Unsupported)
	}
	src, err := openArtefact(ctx, e, path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	b, err := codesign.Build(src, codesign.Options{AllFiles: listsData(r.catalogue)})
	if err != nil {
		return nil, err
	}
	c, err := codesign.ParseCatalogue(b.Catalogue)
	if err != nil {
		return nil, err
	}
	t, err := codesign.ParseNames(b.Names, c)
	if err != nil {
		return nil, err
	}
	out := &contentCheck{Path: path, Differences: compareNames(contents(r.catalogue, r.table), contents(c, t))}
	out.Same = len(out.Differences) == 0
	out.Artefact = out.Same && slices.ContainsFunc(r.Artefacts, func(a codesign.Artefact) bool { return a.Digest == src.digest() })
	return out, nil
}

func listsData(c *codesign.Catalogue) bool {
	for _, r := range c.All() {
		if r.Flags&codesign.FlagData != 0 {
			return true
		}
	}
	return false
}

// contents says of every name what it is: digest and kinds, or link target. A
// name with more than one content (compressed modules) gets all of them.
func contents(c *codesign.Catalogue, t *codesign.NameTable) map[string]string {
	out := map[string]string{}
	add := func(name, what string) {
		if have := out[name]; have != "" {
			what = have + " + " + what
		}
		out[name] = what
	}
	for i, r := range c.All() { // in order of digest, so that what is joined compares
		what := r.Digest.String() + " " + r.Kinds.String()
		if f := flagNames(r.Flags); f != "" {
			what += ", " + f
		}
		for _, n := range t.Names[i] {
			if n.Origin != codesign.OriginSigned { // no part of the artefact
				add(n.Location(), what)
			}
		}
	}
	for _, n := range t.Others {
		if n.Target != "" {
			add(n.Location(), "link to "+shown(n.Target))
		} else {
			add(n.Location(), n.Mode.String())
		}
	}
	return out
}

func compareNames(signed, found map[string]string) []difference {
	out := []difference{}
	for name, was := range signed {
		switch is, ok := found[name]; {
		case !ok:
			out = append(out, difference{Change: "removed", Path: name, Signed: was})
		case is != was:
			out = append(out, difference{Change: "changed", Path: name, Signed: was, Found: is})
		}
	}
	for name, is := range found {
		if _, ok := signed[name]; !ok {
			out = append(out, difference{Change: "added", Path: name, Found: is})
		}
	}
	slices.SortFunc(out, func(a, b difference) int { return strings.Compare(a.Path, b.Path) })
	return out
}

// verifiedPolicy is who signed which policy.
type verifiedPolicy struct {
	File        string    `json:"file"`
	Name        string    `json:"name"`
	Epoch       uint64    `json:"epoch"`
	Supplements string    `json:"supplements"`
	SHA256      string    `json:"sha256"` // of the YAML
	Authority   string    `json:"authority"`
	Identity    string    `json:"identity"`
	Certificate string    `json:"certificate"`
	SignedAt    time.Time `json:"signed_at"`
}

func (o *verifyOptions) verifyPolicy(e *env, file string) error {
	if o.content != "" {
		return usage(errors.New("--content is for releases"))
	}
	roots, err := loadRoots(o.trust, pki.PurposePolicy)
	if err != nil {
		return err
	}
	bundle, err := readBounded(file, maxBundleFile)
	if err != nil {
		return fmt.Errorf("policy: %w", err)
	}
	s, err := codesign.VerifyPolicy(bundle, roots)
	if err != nil {
		return fmt.Errorf("policy %s: %w", file, err)
	}
	p, err := integrity.ParseNamed(file, s.YAML)
	if err != nil {
		return err
	}
	if o.extract != "" {
		if exists(o.extract) {
			return fmt.Errorf("%s is there already: %w", o.extract, errs.Conflict)
		}
		if err := host.WriteFile(o.extract, s.YAML, 0o644); err != nil {
			return err
		}
	}
	out := verifiedPolicy{
		File: file, Name: p.Name, Epoch: p.Epoch, Supplements: p.Supplements, SHA256: s.Digest.String(), Authority: s.CA,
		Identity: s.Identity, Certificate: s.CertFingerprint.String(), SignedAt: s.SignedAt,
	}
	return e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "policy %s, epoch %d: signed by %s\n", out.Name, out.Epoch, out.Identity)
		if out.Supplements != "" {
			fmt.Fprintf(w, "  adds to      %s\n", out.Supplements)
		}
		fmt.Fprintf(w, "  authority    %s\n  signed at    %s\n", out.Authority, out.SignedAt.UTC().Format(time.RFC3339))
		fmt.Fprintf(w, "  sha256       %s\n  certificate  %s\n", out.SHA256, out.Certificate)
	})
}
