package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

func newGateAttesterCommand(e *env) *cobra.Command {
	var keys, passphraseFile, identity string
	var valid time.Duration
	c := &cobra.Command{
		Use:   "attester DIR --identity URI --keys DIR",
		Short: "Certify a machine that attests, for some days",
		Long: `Makes a key and a certificate for one attester: attester.key and attester.crt in
DIR. The machine that checks gets those two and signs evidence with them; it can
speak for itself only, and for seven days at most. Run it on the machine that has
attest-ca.key, from a timer, and hand the files over as your pipeline's secrets.

JSON: {"certificate", "key", "identity", "not_after", "fingerprint"}`,
		Example: "  ringwall gate attester ci --identity spiffe://fleet.example/attest/ci --keys keys --valid 24h",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := loadAuthority(e, keys, passphraseFile)
			if err != nil {
				return err
			}
			ca := a.Issuers[pki.PurposeAttest]
			if ca == nil || ca.Key == nil {
				return fmt.Errorf("certify %s: the key of the attest CA is not here: %w", identity, errs.NotFound)
			}
			key, err := pki.NewKey()
			if err != nil {
				return err
			}
			leaf, err := ca.IssueLeaf(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: identity, Now: e.now(), Lifetime: valid}, key.Public())
			if err != nil {
				return err
			}
			secret, err := pki.EncodeKey(key, nil)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(args[0], 0o700); err != nil {
				return err
			}
			out := struct {
				Certificate string    `json:"certificate"`
				Key         string    `json:"key"`
				Identity    string    `json:"identity"`
				NotAfter    time.Time `json:"not_after"`
				Fingerprint string    `json:"fingerprint"` // SHA-256, for trust.revoked of a release policy
			}{filepath.Join(args[0], "attester.crt"), filepath.Join(args[0], "attester.key"), identity, leaf.NotAfter, fmt.Sprintf("%x", pki.Fingerprint(leaf))}
			// the old pair is replaced: that is what the timer is for
			if err := host.WriteFile(out.Key, secret, 0o600); err != nil {
				return err
			}
			if err := host.WriteFile(out.Certificate, pki.EncodeCertificate(leaf), 0o644); err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s may attest until %s\n  %s\n  %s\n  fingerprint %s\n", identity, leaf.NotAfter.UTC().Format(time.RFC3339), shown(out.Certificate), shown(out.Key), out.Fingerprint)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`, with the key attest-ca")
	passphraseFlag(c, &passphraseFile)
	f.StringVar(&identity, "identity", "", "who it is, as a `URI`")
	f.DurationVar(&valid, "valid", pki.MaxLeafLifetime, "for how long")
	require(c, "keys", "identity")
	return c
}
