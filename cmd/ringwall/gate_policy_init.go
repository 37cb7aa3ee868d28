package main

import (
	"crypto/x509"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

func newGatePolicyInitCommand(e *env) *cobra.Command {
	var keys, product string
	c := &cobra.Command{
		Use:   "init --keys DIR --product NAME",
		Short: "Print a release policy to begin with",
		Long: `Prints a release policy that trusts the authority's attesters, with gates for
tests, review and static analysis, and more to uncomment. Change the identities to
those of your own pipeline before you use it.

The output is YAML in either output format.`,
		Example: "  ringwall gate policy init --keys keys --product edged > edged-release.yaml",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			a, err := pki.LoadCertificates(keys)
			if err != nil {
				return err
			}
			ca := a.Issuers[pki.PurposeAttest]
			if ca == nil {
				return hint(fmt.Errorf("%s has no CA for attesters: %w", keys, errs.NotFound), "an authority of an earlier version is extended with ringwall key")
			}
			if strings.Trim(product, "abcdefghijklmnopqrstuvwxyz0123456789+-.") != "" || product == "" {
				return usage(fmt.Errorf("--product %q is no product: want up to 64 of a-z, digits, plus, dash and dot", product))
			}
			text := releaseTemplate(defaultIdentity(a, pki.PurposeAttest), product, ca.Cert, a.TSA.Cert)
			if _, err := gate.ParsePolicy("release policy", []byte(text)); err != nil {
				return usage(err)
			}
			if _, err := io.WriteString(e.stdout, text); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`")
	f.StringVar(&product, "product", "", "`NAME` of the product, as in its release records")
	require(c, "keys", "product")
	_ = c.MarkFlagDirname("keys")
	return c
}

func releaseTemplate(identity, product string, ca, tsa *x509.Certificate) string {
	pem := func(c *x509.Certificate) string {
		return strings.ReplaceAll(strings.TrimSpace(string(pki.EncodeCertificate(c))), "\n", "\n        ")
	}
	base := strings.TrimSuffix(identity, "main")
	return fmt.Sprintf(`# What a build of %[1]s must pass before it is signed.
# ringwall gate policy check finds mistakes; docs/design/signing.md explains every key.
version: 1
name: %[1]s-release
product: %[1]s
min_epoch: 1
rings: [canary, internal, prod] # where its releases go, in order

trust:
  authorities:
    - name: attest
      certificate: |
        %[2]s
  timestamps:
    - name: tsa
      certificate: |
        %[3]s

# Whose word counts: the identity in the certificate that signs the evidence.
attesters:
  - {name: ci, authority: attest, identity: %[4]sci}
  - {name: forge, authority: attest, identity: %[4]sforge}

# No evidence is hold, never pass; a failure beats every success.
gates:
  - name: unit
    kind: test
    attesters: [ci]
    at_least: 1
    max_age: 24h
  - name: review
    kind: review
    attesters: [forge]
    about: source   # of the revision that the artefact was built from
    reviewers: 1    # who did not write it
    max_age: 90d
  - name: sast
    kind: scan
    attesters: [ci]
    at_most: {warning: any, note: any} # and no errors: what is not named may not occur
    max_age: 24h
#  - name: vulnerabilities
#    kind: vulns
#    attesters: [ci]
#    at_most: {medium: 10, low: any, none: any}
#    database_age: 48h
#  - name: built
#    kind: provenance
#    attesters: [ci]
#    builders: ["https://ci.example/runner"]
#    source: "git+https://git.example/%[1]s"
#  - name: csv
#    kind: verification
#    attesters: [ci]
#    properties: [RINGWALL_CSV_PASSED]
#    max_age: 1h

# How a release gets past its gates in an emergency; without it: not at all.
#breakglass:
#  approvers: [ann, bob] # attesters; two different ones must approve
#  ring: canary
#  max_time: 8h
`, product, pem(ca), pem(tsa), base)
}
