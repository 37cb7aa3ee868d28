package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/gate"
	"ringwall/internal/signer"
)

// exitHold is the exit code of what waits for evidence, as with csv verify.
const exitHold = 4

func newGateCommand(e *env) *cobra.Command {
	return newGroup("gate", groupSign, "Prove that a build passed its checks, and ask whether it did",
		`A gate is a check that a build must pass before it is signed: tests, review,
static analysis, vulnerabilities, provenance, CSV's verdict. A product's release
policy says which, and whose word counts for each. That a gate was passed is
shown by evidence: a small signed file about this very artefact, made by the
machine that ran the check.

  gate policy init   begin a release policy
  gate attester      certify a machine that checks
  gate attest        on the machine that checks: make evidence of a tool's report
  gate check         would the signer sign it? what is missing?
  sign, signer       sign it, if all gates are passed

No evidence means hold, never pass; evidence that a check failed beats any that
it passed.`,
		newGatePolicyCommand(e), newGateAttesterCommand(e), newGateAttestCommand(e), newGateCheckCommand(e))
}

type gateCheckOptions struct {
	policy, product, revision, ring, state string
	evidence                               []string
	epoch                                  uint32
	breakglass                             bool
}

// checkedGates is the answer of `ringwall gate check`.
type checkedGates struct {
	Artefact string `json:"artefact"`
	SHA256   string `json:"sha256"`
	Product  string `json:"product"`
	Policy   string `json:"policy"`
	*gate.Decision
}

func newGateCheckCommand(e *env) *cobra.Command {
	var o gateCheckOptions
	c := &cobra.Command{
		Use:   "check ARTEFACT --policy FILE --evidence DIR...",
		Short: "Ask whether a build passes its gates",
		Long: `Reads a build and the evidence about it, and asks the release policy as the signer
would. Nothing is signed.

Exit codes: 0 it passes, 1 it fails, 4 it is on hold: something is missing (or a
file does not exist).

JSON: {"artefact", "sha256", "product", "policy", "state": "pass|hold|fail",
"gates": [{"gate", "kind", "state", "code", "text", "fix", "used": [{"attester",
"identity", "at"}]}], "ignored": [{"evidence", "reason"}], "revision", "ring",
"breakglass"}; code is a word that stays the same`,
		Example: `  ringwall gate check edged_4.7.0_amd64.deb --policy edged-release.yaml --evidence evidence
  ringwall gate check ./dist --policy policies --product edged --epoch 12 --evidence ci --evidence review.evidence.json`,
		Args: exactly("ARTEFACT"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.policy, "policy", "", "the product's release policy `FILE`, or a directory of them")
	f.StringArrayVar(&o.evidence, "evidence", nil, "evidence `FILE`, or a directory of *.evidence.json; repeat")
	f.StringVar(&o.product, "product", "", "`NAME` of what was built (default: what the package or the policy says)")
	f.StringVar(&o.revision, "revision", "", "its source's `REVISION` (default: what the evidence says)")
	f.StringVar(&o.ring, "ring", "", "the furthest `RING` that it may go to (default: the policy's last)")
	f.Uint32Var(&o.epoch, "epoch", 1, "its security version")
	f.StringVar(&o.state, "state", "", "the signer's state `DIR`, with the epochs that were signed")
	f.BoolVar(&o.breakglass, "breakglass", false, "ask for a release past the gates")
	require(c, "policy")
	return c
}

func (o *gateCheckOptions) run(ctx context.Context, e *env, path string) error {
	policies, err := openPolicies(o.policy)
	if err != nil {
		return err
	}
	name, digest, product, err := measureArtefact(ctx, e, path)
	if err != nil {
		return err
	}
	if one, ok := policies.(signer.OnePolicy); ok && product == "" {
		product = one.Only.Product
	}
	if o.product != "" {
		product = o.product
	}
	if product == "" {
		return usage(errors.New("it does not say what it is; give --product"))
	}
	p, err := policies.Policy(product)
	if err != nil {
		return err
	}
	evidence, err := signer.LoadEvidence(o.evidence)
	if err != nil {
		return err
	}
	r := gate.Request{Product: product, Epoch: o.epoch, Revision: o.revision, Ring: o.ring, Artefact: digest}
	if o.state != "" {
		if r.Signed, err = (&signer.EpochFile{Path: o.state + "/epochs.json"}).Highest(product); err != nil {
			return err
		}
	}
	d := signer.Decide(p, r, evidence, o.breakglass, e.now())
	out := checkedGates{Artefact: name, SHA256: digest.String(), Product: product, Policy: p.Name, Decision: d}
	if err := e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "%s  %s, policy %s\n", shown(name), product, p.Name)
		writeDecision(w, d)
	}); err != nil {
		return err
	}
	if d.State == gate.Pass {
		return nil
	}
	return refusal(&signer.Refused{Product: product, Decision: d})
}

// measureArtefact reads an artefact to its end for its digest.
func measureArtefact(ctx context.Context, e *env, path string) (name string, digest gate.Digest, product string, err error) {
	a, err := openArtefact(ctx, e, path)
	if err != nil {
		return "", digest, "", err
	}
	defer a.Close()
	err = a.Walk(func(codesign.Member, io.Reader) error { return nil })
	if p, ok := a.pkg(); ok {
		product = p.Name
	}
	return a.name(), gate.Digest(a.digest()), product, err
}

// refusal is the error of a decision, with its exit code.
func refusal(err error) error {
	var r *signer.Refused
	if errors.As(err, &r) && r.Decision.State == gate.Hold {
		return codedError{exitHold, err}
	}
	return err
}

// explainRefusal shows the whole decision where a person reads, before the one
// line that the error is.
func explainRefusal(e *env, err error) error {
	var r *signer.Refused
	if errors.As(err, &r) && !e.json {
		writeDecision(printableWriter{e.stderr}, r.Decision)
	}
	return refusal(err)
}

func writeDecision(w io.Writer, d *gate.Decision) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range d.Results {
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\n", strings.ToUpper(string(r.State)), r.Gate, r.Kind, r.Text)
		if r.Fix != "" && r.State != gate.Pass {
			fmt.Fprintf(t, "\t\t\tfix: %s\n", r.Fix)
		}
	}
	_ = t.Flush()
	for _, i := range d.Ignored {
		fmt.Fprintf(w, "  not counted: %s: %s\n", shown(i.Label), i.Reason)
	}
	switch {
	case d.State != gate.Pass:
		fmt.Fprintf(w, "%s: it is not signed\n", strings.ToUpper(string(d.State)))
	case d.Breakglass:
		fmt.Fprintf(w, "PASS: it may be signed past its gates, for ring %s until %s: %s\n", d.Ring, d.NotAfter.UTC().Format(time.RFC3339), d.Reason)
	default:
		fmt.Fprintf(w, "PASS: it may be signed, for ring %s\n", d.Ring)
	}
}

func newGatePolicyCommand(e *env) *cobra.Command {
	return newGroup("policy", "", "Write and check release policies",
		`A release policy says what a build of one product must pass before it is signed,
and whose evidence counts. docs/design/signing.md explains every key.`,
		newGatePolicyInitCommand(e), newGatePolicyCheckCommand(e), newGatePolicySchemaCommand(e))
}

func newGatePolicyCheckCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "Say everything that is wrong with a release policy",
		Long: `Reads release policies as strictly as the signer does and lists every problem with
its place and what to do; warnings are about what is allowed but rarely meant.

JSON: {"policies": [{"file", "ok", "name", "product", "problems": [{"line",
"column", "path", "text", "fix"}], "warnings"}]}`,
		Example: "  ringwall gate policy check edged-release.yaml",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactly("FILE")(c, args)
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			return checkDocuments(e, "release policies", args, func(d *checkedDocument) error {
				p, err := signer.LoadPolicy(d.File)
				if err != nil {
					return err
				}
				d.Name, d.Product = p.Name, p.Product
				d.about = fmt.Sprintf("release policy %s, for %s", p.Name, p.Product)
				d.Warnings = append(d.Warnings, lintRelease(p)...)
				return nil
			})
		},
	}
}

// lintRelease says what a valid release policy probably does not mean.
func lintRelease(p *gate.Policy) []string {
	var out []string
	has := map[gate.Kind]bool{}
	for _, g := range p.Gates {
		has[g.Kind] = true
	}
	for k, why := range map[gate.Kind]string{
		gate.KindReview:     "nobody needs to have reviewed a build",
		gate.KindTest:       "no test needs to have passed",
		gate.KindProvenance: "it may have been built anywhere",
	} {
		if !has[k] {
			out = append(out, fmt.Sprintf("no gate of kind %s: %s", k, why))
		}
	}
	slices.Sort(out)
	for _, a := range p.Attesters {
		all := len(p.Gates) > 1
		for _, g := range p.Gates {
			all = all && slices.Contains(g.Attesters, a.Name)
		}
		if all {
			out = append(out, fmt.Sprintf("attester %s alone can pass every gate: who has its key needs nobody else", a.Name))
		}
	}
	return out
}

func newGatePolicySchemaCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		Short:   "Print the JSON Schema of release policies, for editors",
		Long:    "The output is JSON Schema 2020-12 in either output format.",
		Example: "  ringwall gate policy schema > release.schema.json",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			if _, err := e.stdout.Write(gate.Schema()); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
}
