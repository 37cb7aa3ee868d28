package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

type csvConfirm struct {
	trust, verifier, ring string
	policies, supplements []string
	maxAge                time.Duration
}

// confirmed is what a verdict that counts says.
type confirmed struct {
	Artefact  string              `json:"artefact"` // SHA-256
	Verifier  string              `json:"verifier"`
	At        time.Time           `json:"at"`
	Inventory time.Time           `json:"inventory"`
	Outcome   csv.Severity        `json:"outcome"`
	Policies  []csv.VerdictPolicy `json:"policies"`
}

func newCSVConfirmCommand(e *env) *cobra.Command {
	var o csvConfirm
	c := &cobra.Command{
		Use:   "confirm VERDICT ARTEFACT --trust DIR|POLICY --policy FILE",
		Short: "Before deploying: does a signed verdict cover this build and these policies?",
		Long: `For whoever ships: reads a verdict that csv verify --output svr signed, and asks
whether it is about this very artefact, made by somebody who may, not too old, and
whether each policy given (the one that the hosts run now) is among those that it
passed under, with the supplements given and no others. A policy that is newer than
the verdict is not: verify again.

Whom to believe stands in an authority's directory, or in the trust section of a
product's release policy; --verifier says whose verdict it must be.

Exit code 0: ship it. 1: the verdict does not cover this. 4: it is not trusted, or
too old.

JSON: {"artefact", "verifier", "at", "inventory", "outcome", "policies":
[{"ring", "name", "epoch", "sha256", "supplements", "outcome"}]}`,
		Example: `  ringwall csv confirm csv.svr.json edged_4.7.0_amd64.deb --trust keys --policy base.yaml --ring prod`,
		Args:    exactly("VERDICT", "ARTEFACT"),
		RunE:    func(c *cobra.Command, args []string) error { return o.run(c, e, args[0], args[1]) },
	}
	f := c.Flags()
	f.StringVar(&o.trust, "trust", "", "whom to believe: an authority's `DIR`, or a release policy's YAML")
	f.StringArrayVar(&o.supplements, "supplement", nil, "the YAML `FILE` of a supplement that these hosts run; repeat")
	f.StringArrayVar(&o.policies, "policy", nil, "the YAML `FILE` of a policy that the hosts run; repeat")
	f.StringVar(&o.ring, "ring", "", "the `RING` that it goes to (default: a verdict without rings)")
	f.StringVar(&o.verifier, "verifier", "", "whose verdict it must be, as a `URI` (default: anybody's whom --trust lets attest)")
	f.DurationVar(&o.maxAge, "max-age", 24*time.Hour, "an inventory older than this counts no more; 0: any age will do")
	return c
}

func (o *csvConfirm) run(c *cobra.Command, e *env, file, artefact string) error {
	if o.trust == "" || len(o.policies) == 0 {
		return usage(errors.New("ringwall csv confirm: --trust and --policy are needed"))
	}
	roots, err := attestRoots(o.trust)
	if err != nil {
		return err
	}
	bundle, err := readBounded(file, maxBundleFile)
	if err != nil {
		return fmt.Errorf("verdict: %w", err)
	}
	v, err := csv.VerifyVerdict(bundle, roots)
	if err != nil {
		return err
	}
	if o.verifier != "" && v.Verifier != o.verifier {
		return fmt.Errorf("the verdict is by %s, not by %s: %w", v.Verifier, o.verifier, errs.Untrusted)
	}
	if age := e.now().Sub(v.Inventory); o.maxAge > 0 && age > o.maxAge {
		return codedError{csv.ExitHold, fmt.Errorf("the verdict knows the fleet of %s, more than %v ago: verify again", v.Inventory.UTC().Format(time.RFC3339), o.maxAge)}
	}
	a, err := openArtefact(c.Context(), e, artefact)
	if err != nil {
		return fmt.Errorf("artefact: %w", err)
	}
	defer a.Close()
	if a.Digest.IsZero() { // a directory: its listing is known once it was walked
		if err := a.Walk(func(codesign.Member, io.Reader) error { return nil }); err != nil {
			return fmt.Errorf("artefact: %w", err)
		}
	}
	supplements, err := digestsOf(o.supplements)
	if err != nil {
		return err
	}
	for _, name := range o.policies {
		p, err := loadPolicy(name)
		if err != nil {
			return err
		}
		if err := v.Covers(a.digest(), p.Digest, o.ring, supplements...); err != nil {
			return codedError{csv.ExitBlock, err}
		}
	}
	out := confirmed{v.Artefact.String(), v.Verifier, v.At, v.Inventory, v.Outcome, v.Policies}
	return e.emit(out, func(w io.Writer) {
		fmt.Fprintf(w, "%s may ship: verified by %s at %s\n", shown(artefact), v.Verifier, v.At.UTC().Format(time.RFC3339))
	})
}

// attestRoots are those whose verdicts count.
func attestRoots(path string) (pki.TrustRoots, error) {
	st, err := os.Stat(path)
	if err != nil {
		return pki.TrustRoots{}, fmt.Errorf("trust: %w", err)
	}
	if st.IsDir() {
		return loadRoots(path, pki.PurposeAttest)
	}
	doc, err := readBounded(path, maxPolicyFile)
	if err != nil {
		return pki.TrustRoots{}, fmt.Errorf("trust: %w", err)
	}
	p, err := gate.ParsePolicy(path, doc)
	if err != nil {
		return pki.TrustRoots{}, err
	}
	return p.Trust, nil
}
