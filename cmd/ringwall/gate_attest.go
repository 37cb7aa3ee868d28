package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

type gateAttestOptions struct {
	keys, passphraseFile, identity, tsa   string
	certificate, key                      string
	from, format, gate, product, revision string
	out, database, predicate, repo, link  string
	authors, reviewers                    []string
	ring, reason, until                   string
	source, force                         bool
}

// attested is a piece of evidence that was made.
type attested struct {
	File     string    `json:"file"`
	Kind     gate.Kind `json:"kind"`
	Type     string    `json:"type"` // of the predicate
	Gate     string    `json:"gate,omitempty"`
	Artefact string    `json:"artefact,omitempty"` // SHA-256
	Revision string    `json:"revision,omitempty"`
	Identity string    `json:"identity"`
	Summary  string    `json:"summary"`
	Notes    []string  `json:"notes"`
}

func newGateAttestCommand(e *env) *cobra.Command {
	var o gateAttestOptions
	c := &cobra.Command{
		Use:   "attest KIND [ARTEFACT] --keys DIR --from REPORT",
		Short: "Make signed evidence of a tool's report",
		Long: `Reads what a tool printed, and signs what it says about an artefact: an in-toto
statement in a Sigstore bundle. The kinds, and what they are made from:

  test      go test -json, or a JUnit report
  scan      a SARIF log of static analysis
  vulns     a CycloneDX document with vulnerabilities (--database: how old the
            scanner's data is)
  vex       an OpenVEX document: which vulnerabilities do not matter
  review    --author and --reviewer, or the trailers (Reviewed-by, Co-authored-by)
            of the commit --revision in --repo
  surface   an attack-surface report: {"new": [...], "approved": [{"item", "by"}]}
  approval  one approver's word for a break-glass release (--ring, --reason, --until)
  custom    any predicate as JSON, of type --type: SLSA provenance, svr, your own

With --keys alone the attester is certified on the spot, by the key attest-ca. A
machine that checks should not have that key, which could speak for any attester:
give it a certificate for its own identity (ringwall gate attester), and then
--certificate, --key and --tsa; --keys needs no keys in it then.

What is attested is about the artefact, made from --revision; with --source about
the source revision alone, for what is known before anything is built. The report
is not judged here: that tests failed is evidence, too.

JSON: {"file", "kind", "type", "gate", "artefact", "revision", "identity",
"summary", "notes"}`,
		Example: `  go test -json ./... | ringwall gate attest test edged.deb --from - --keys keys --revision "$(git rev-parse HEAD)"
  ringwall gate attest scan edged.deb --from gosec.sarif --gate sast --keys keys --revision "$REV"
  ringwall gate attest review --source --repo . --revision "$REV" --keys keys --identity spiffe://fleet.example/attest/forge
  ringwall gate attest approval edged.deb --product edged --ring canary --reason "INC-4711" --until 4h --keys keys`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 2 && !o.source || len(args) == 1 && o.source {
				return nil
			}
			if len(args) > 0 && o.source {
				return fmt.Errorf("%s: with --source it is about a revision, not about %q", c.CommandPath(), args[1])
			}
			return exactly("KIND", "ARTEFACT")(c, args)
		},
		ValidArgs: []string{"test", "scan", "vulns", "vex", "review", "surface", "approval", "custom"},
		RunE:      func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args) },
	}
	f := c.Flags()
	f.StringVar(&o.keys, "keys", "", "the authority's `DIR`, with the keys attest-ca and tsa")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.certificate, "certificate", "", "the attester's certificate `FILE`, PEM")
	f.StringVar(&o.key, "key", "", "its key's `FILE`, PEM")
	f.StringVar(&o.identity, "identity", "", "who attests, as a `URI` (default: spiffe://FLEET.internal/attest/main)")
	f.StringVar(&o.tsa, "tsa", "", "timestamp authority's `URL` (default: the authority's own)")
	f.StringVar(&o.from, "from", "", "the report's `FILE` (- for standard input)")
	f.StringVar(&o.format, "format", "", "of a test report: go or junit (default: by its first character)")
	f.StringVar(&o.gate, "gate", "", "`NAME` of the gate that it is for (default: any of its kind)")
	f.StringVar(&o.product, "product", "", "`NAME` of the product")
	f.StringVar(&o.revision, "revision", "", "the `REVISION` that the artefact was built from; a git commit")
	f.BoolVar(&o.source, "source", false, "it is about the source revision, not about an artefact")
	f.StringVar(&o.database, "database", "", "`TIME` at which the scanner's vulnerability database was updated")
	f.StringVar(&o.predicate, "type", "", "predicate type `URI`, for custom")
	f.StringArrayVar(&o.authors, "author", nil, "`PERSON` who wrote the change: Name <mail>, a URI, or a name; repeat")
	f.StringArrayVar(&o.reviewers, "reviewer", nil, "`PERSON` who reviewed it; repeat")
	f.StringVar(&o.repo, "repo", "", "take authors and reviewers from the commit --revision in the git repository `DIR`")
	f.StringVar(&o.link, "link", "", "`URL` of the review")
	f.StringVar(&o.ring, "ring", "", "`RING` that is approved")
	f.StringVar(&o.reason, "reason", "", "why it is approved, as `TEXT`")
	f.StringVar(&o.until, "until", "4h", "how long it is approved for, as a `DURATION`")
	f.StringVarP(&o.out, "out", "o", "", "write to `FILE` (default: evidence/KIND-….evidence.json)")
	f.BoolVar(&o.force, "force", false, "overwrite a file that is there already")
	require(c, "keys")
	complete(c, "format", "go", "junit")
	return c
}

func (o *gateAttestOptions) run(ctx context.Context, e *env, args []string) error {
	kind := gate.Kind(args[0])
	report, err := o.report(ctx, e, kind)
	if err != nil {
		return err
	}
	subject := gate.Subject{Gate: o.gate, Product: o.product, Revision: o.revision}
	if o.source {
		if o.revision == "" {
			return usage(errors.New("--source needs --revision"))
		}
		subject.Commit = o.revision
	} else if subject.Name, subject.SHA256, _, err = measureArtefact(ctx, e, args[1]); err != nil {
		return err
	}
	statement, err := gate.EncodeStatement(subject, report.Type, report.Predicate)
	if err != nil {
		return err
	}
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return err
	}
	s, err := o.signer(e, a)
	if err != nil {
		return err
	}
	stamper, err := openStamper(a, o.tsa)
	if err != nil {
		return err
	}
	if stamper != nil {
		s.Stamper = stamper
	}
	bundle, err := gate.Sign(s, statement)
	if err != nil {
		return err
	}
	roots := a.Roots(pki.PurposeAttest)
	roots.Logs = nil // evidence is not logged; what it lets through is
	v, err := gate.Open(bundle, roots)
	if err != nil {
		return err
	}
	return o.save(e, v, report, bundle)
}

// signer certifies an attester, or takes the one that was certified before.
func (o *gateAttestOptions) signer(e *env, a *pki.Authority) (*pki.Signer, error) {
	if o.certificate == "" && o.key == "" {
		if o.identity == "" {
			o.identity = defaultIdentity(a, pki.PurposeAttest)
		}
		return a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: o.identity, Now: e.now()})
	}
	if o.certificate == "" || o.key == "" || o.identity != "" {
		return nil, usage(errors.New("--certificate and --key go together, and say the identity"))
	}
	pems, err := readAll(o.certificate, o.key)
	if err != nil {
		return nil, err
	}
	s := &pki.Signer{Purpose: pki.PurposeAttest, Stamper: a.TSA}
	if s.Leaf, err = pki.DecodeCertificate(pems[0]); err != nil {
		return nil, fmt.Errorf("%s: %w", o.certificate, err)
	}
	if s.Key, err = pki.DecodeKey(pems[1], nil); err != nil {
		return nil, fmt.Errorf("%s: %w", o.key, err)
	}
	return s, nil
}

func (o *gateAttestOptions) save(e *env, v *gate.Evidence, report *gate.Report, bundle []byte) error {
	out := attested{
		File: o.out, Kind: v.Kind, Type: v.Type, Gate: v.Gate, Revision: v.Revision, Identity: v.Identity, Summary: report.Summary, Notes: append([]string{}, report.Notes...),
	}
	if !v.SHA256.IsZero() {
		out.Artefact = v.SHA256.String()
	}
	if out.File == "" {
		// the name differs for all that differs, so that runs do not overwrite each other
		name := strings.Trim(string(v.Kind)+"-"+v.Gate, "-") + "-" + v.Digest.String()[:12]
		out.File = filepath.Join("evidence", name+signer.EvidenceSuffix)
	}
	if !o.force && exists(out.File) {
		return hint(fmt.Errorf("%s is there already: %w", out.File, errs.Conflict), "--force overwrites it")
	}
	if err := os.MkdirAll(filepath.Dir(out.File), 0o755); err != nil { //nolint:gosec // what is published
		return err
	}
	if err := host.WriteFile(out.File, bundle, 0o644); err != nil {
		return err
	}
	return e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "attested %s as %s: %s\n", out.Kind, out.Identity, out.Summary)
		for _, n := range out.Notes {
			fmt.Fprintf(w, "  note: %s\n", n)
		}
		fmt.Fprintf(w, "  %s\n", shown(out.File))
	})
}

// report reads what shall be attested.
func (o *gateAttestOptions) report(ctx context.Context, e *env, kind gate.Kind) (*gate.Report, error) {
	switch kind {
	case gate.KindReview:
		return o.review(ctx, e)
	case gate.KindApproval:
		return o.approval(e)
	case gate.KindTest, gate.KindScan, gate.KindVulns, gate.KindVEX, gate.KindSurface, gate.KindCustom:
	default:
		return nil, usage(fmt.Errorf("kind %q: want test, scan, vulns, vex, review, surface, approval or custom", kind))
	}
	if o.from == "" {
		return nil, usage(errors.New("--from is missing: the report"))
	}
	data, err := readReport(e, o.from)
	if err != nil {
		return nil, err
	}
	switch kind {
	case gate.KindTest:
		if o.format == "junit" || o.format == "" && bytes.HasPrefix(bytes.TrimLeft(data, "\ufeff \t\r\n"), []byte("<")) {
			return gate.ReadJUnit(bytes.NewReader(data))
		}
		if o.format != "" && o.format != "go" {
			return nil, usage(fmt.Errorf("--format %q: want go or junit", o.format))
		}
		return gate.ReadGoTest(bytes.NewReader(data))
	case gate.KindScan:
		return gate.ReadSARIF(data)
	case gate.KindVEX:
		return gate.ReadOpenVEX(data)
	case gate.KindSurface:
		return gate.ReadSurface(data)
	case gate.KindVulns:
		at, err := time.Parse(time.RFC3339, o.database)
		if err != nil {
			return nil, usage(fmt.Errorf("--database %q: want when the scanner's data was updated, such as 2031-05-01T12:00:00Z", o.database))
		}
		return gate.ReadCycloneDX(data, at)
	}
	if o.predicate == "" {
		return nil, usage(errors.New("--type is missing: the predicate's URI"))
	}
	return gate.ReadPredicate(o.predicate, data)
}

func readReport(e *env, file string) ([]byte, error) {
	if file != "-" {
		return readBounded(file, gate.MaxReport)
	}
	b, err := io.ReadAll(io.LimitReader(e.stdin, gate.MaxReport+1))
	if err == nil && len(b) > gate.MaxReport {
		err = fmt.Errorf("more than %d bytes: %w", gate.MaxReport, errs.Invalid)
	}
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return b, nil
}

func (o *gateAttestOptions) approval(e *env) (*gate.Report, error) {
	d, err := time.ParseDuration(o.until)
	if err != nil || d <= 0 || o.ring == "" || o.reason == "" || o.product == "" {
		return nil, usage(errors.New("an approval needs --product, --ring, --reason and --until, such as 4h"))
	}
	return gate.NewApproval(gate.Approval{Product: o.product, Ring: o.ring, Reason: o.reason, NotAfter: e.now().Add(d)})
}

func (o *gateAttestOptions) review(ctx context.Context, e *env) (*gate.Report, error) {
	var authors, reviewers []gate.Person
	if o.repo != "" {
		if o.revision == "" {
			return nil, usage(errors.New("--repo needs --revision"))
		}
		var err error
		if authors, reviewers, err = commitPeople(ctx, o.repo, o.revision); err != nil {
			return nil, err
		}
	}
	for _, x := range []struct {
		in []string
		to *[]gate.Person
	}{{o.authors, &authors}, {o.reviewers, &reviewers}} {
		for _, s := range x.in {
			p, err := gate.ParsePerson(s)
			if err != nil {
				return nil, err
			}
			*x.to = append(*x.to, p)
		}
	}
	switch {
	case len(authors) == 0:
		return nil, usage(errors.New("--author is missing (or --repo, to take it from the commit)"))
	case len(reviewers) == 0:
		return nil, usage(errors.New("--reviewer is missing; the commit has no Reviewed-by"))
	}
	return gate.NewReview(slices.Compact(authors), slices.Compact(reviewers), o.link, e.now())
}

// commitPeople reads who wrote and reviewed a commit, with git's own words for
// author and committer, and the trailers of its message.
func commitPeople(ctx context.Context, repo, revision string) (authors, reviewers []gate.Person, err error) {
	if strings.HasPrefix(revision, "-") {
		return nil, nil, usage(fmt.Errorf("--revision %q", revision))
	}
	c := exec.CommandContext(ctx, "git", "-C", repo, "log", "-1", "--no-show-signature", "--format=%an <%ae>%x00%H%x00%B", revision, "--")
	var complaint bytes.Buffer
	c.Stderr = &complaint
	out, err := c.Output()
	if err != nil {
		return nil, nil, fmt.Errorf("git log of %s: %w: %.300s", revision, err, bytes.TrimSpace(complaint.Bytes()))
	}
	parts := strings.SplitN(string(out), "\x00", 3)
	if len(parts) != 3 || parts[1] != revision {
		return nil, nil, fmt.Errorf("revision %s is no full commit id of %s: %w", revision, repo, errs.Invalid)
	}
	author, err := gate.ParsePerson(parts[0])
	if err != nil {
		return nil, nil, err
	}
	also, reviewers, err := gate.ParseTrailers(parts[2])
	return append([]gate.Person{author}, also...), reviewers, err
}
