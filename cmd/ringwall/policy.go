package main

import (
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

func newPolicyCommand(e *env) *cobra.Command {
	return newGroup("policy", groupPolicy, "Write, check, try and sign policies",
		`A policy says whose software runs on a host, and what happens to the rest. It is
YAML, becomes valid by being signed, and reaches a host by ringwall host apply.

From nothing: policy init, policy check, policy simulate on the host, policy
sign, host apply; in audit mode first, then in enforce mode.`,
		newPolicyInitCommand(e), newPolicyLearnCommand(e), newPolicyCheckCommand(e), newPolicyShowCommand(e),
		newPolicyExplainCommand(e), newPolicySimulateCommand(e), newPolicyDiffCommand(e), newPolicySignCommand(e), newPolicySchemaCommand(e), newPolicyBaselineCommand(e))
}

func newPolicyCheckCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "Say everything that is wrong with a policy",
		Long: `Reads policies as strictly as a host does and lists every problem with its place
and what to do; warnings are about what is allowed but rarely meant.

JSON: {"policies": [{"file", "ok", "name", "epoch", "problems": [{"line",
"column", "path", "text", "fix"}], "warnings"}]}`,
		Example: "  ringwall policy check base.yaml extra.yaml",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactly("FILE")(c, args)
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			return checkDocuments(e, "policies", args, func(d *checkedDocument) error {
				p, err := loadPolicy(d.File)
				if err != nil {
					return err
				}
				d.Name, d.Epoch = p.Name, p.Epoch
				d.about = fmt.Sprintf("policy %s, epoch %d", p.Name, p.Epoch)
				d.Warnings = append(d.Warnings, lint(p, e.now())...)
				return nil
			})
		},
	}
}

// lint says what a valid policy probably does not mean.
func lint(p *integrity.Policy, now time.Time) []string {
	var out []string
	warn := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if len(p.Allow) == 0 {
		warn("no rule allows anything")
	}
	for i := range p.Allow {
		if r := &p.Allow[i]; !r.Until.IsZero() && !now.Before(r.Until) {
			warn("exception %s ended %s", r.Rule, r.Until.UTC().Format(time.RFC3339))
		}
	}
	if p.Supplements != "" {
		return out
	}
	if len(codesign.Roots(p, codesign.SignsPolicy).CAs) == 0 {
		warn("it trusts nobody to sign policies: a host could never get another one")
	}
	if len(p.Trust.Authorities) > 0 && len(p.Trust.Timestamps) == 0 {
		warn("it trusts no timestamp authority: nothing that is signed will verify")
	}
	for _, a := range p.Trust.Authorities {
		if a.Certificate != nil && now.After(a.Certificate.NotAfter) {
			warn("the certificate of %s ended %s: what it signs from then on does not verify", a.Name, a.Certificate.NotAfter.Format(time.DateOnly))
		}
	}
	for _, k := range []integrity.Kind{integrity.KindExec, integrity.KindLibrary, integrity.KindModule} {
		if p.Modes[k] == integrity.ModeOff {
			warn("mode of %s is off: it is not even logged", k)
		}
	}
	return out
}

func newPolicySchemaCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		Short:   "Print the JSON Schema of policies, for editors",
		Long:    "The output is JSON Schema 2020-12 in either output format.",
		Example: "  ringwall policy schema > policy.schema.json",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			if _, err := e.stdout.Write(integrity.Schema()); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
}

func newPolicyBaselineCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "baseline",
		Short: "Print the built-in interpreters, programs and kernel settings",
		Long: `What "baseline: 1" in a policy stands for, as YAML in either output format. An entry
of the same name in the policy replaces one of these, an interpreter key by key.`,
		Example: "  ringwall policy baseline | less",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			if _, err := e.stdout.Write(integrity.Baseline(1)); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
}

func newPolicySignCommand(e *env) *cobra.Command {
	var keys, passphraseFile, identity, out, log, tsaURL string
	var force bool
	c := &cobra.Command{
		Use:   "sign FILE --keys DIR",
		Short: "Sign a policy",
		Long: `Checks a policy and signs it, byte by byte, comments included. Unless --identity
says otherwise the signer is spiffe://FLEET.internal/policy/main, FLEET being the
authority's name.

JSON: {"file", "name", "epoch", "sha256", "identity", "warnings"}`,
		Example: `  ringwall policy sign base.yaml --keys keys
  ringwall policy sign base.yaml --keys keys --identity spiffe://fleet.example/policy/ops -o base-12.policy.json`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			doc, err := readBounded(args[0], maxPolicyFile)
			if err != nil {
				return fmt.Errorf("policy: %w", err)
			}
			p, err := integrity.ParseNamed(args[0], doc)
			if err != nil {
				return err
			}
			if out == "" {
				out = strings.TrimSuffix(strings.TrimSuffix(args[0], ".yml"), ".yaml") + extPolicy
			}
			if !force && exists(out) {
				return hint(fmt.Errorf("%s is there already: %w", out, errs.Conflict), "--force overwrites it, -o chooses another name")
			}
			a, err := loadAuthority(e, keys, passphraseFile)
			if err != nil {
				return err
			}
			if identity == "" {
				identity = defaultIdentity(a, pki.PurposePolicy)
			}
			s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: identity, Now: e.now()})
			if err != nil {
				return err
			}
			if tsa, err := openStamper(a, tsaURL); err != nil {
				return err
			} else if tsa != nil {
				s.Stamper = tsa
			}
			l, closeLog, err := openLog(a, log)
			if err != nil {
				return err
			}
			if l != nil {
				s.Log = l
			}
			bundle, err := codesign.SignPolicy(s, doc)
			if err = errors.Join(err, closeLog()); err != nil {
				return err
			}
			signed, err := codesign.VerifyPolicy(bundle, a.Roots(pki.PurposePolicy))
			if err != nil {
				return err
			}
			if err := host.WriteFile(out, bundle, 0o644); err != nil {
				return err
			}
			warnings := append([]string{}, lint(p, e.now())...)
			if p.Supplements == "" && !slices.ContainsFunc(p.Trust.Authorities, func(t integrity.Authority) bool {
				return t.Certificate.Equal(a.Issuers[pki.PurposePolicy].Cert) && slices.Contains(t.Signs, codesign.SignsPolicy)
			}) {
				warnings = append(warnings, "it does not trust the authority that signs it: the next policy must come from another one")
			}
			return e.emit(struct {
				File     string   `json:"file"`
				Name     string   `json:"name"`
				Epoch    uint64   `json:"epoch"`
				SHA256   string   `json:"sha256"`
				Identity string   `json:"identity"`
				Warnings []string `json:"warnings"`
			}{out, p.Name, p.Epoch, signed.Digest.String(), identity, warnings}, func(w io.Writer) {
				fmt.Fprintf(w, "signed policy %s, epoch %d, as %s\n  %s\n", p.Name, p.Epoch, identity, shown(out))
				for _, x := range warnings {
					fmt.Fprintf(w, "  warning: %s\n", x)
				}
			})
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`, with the keys policy-ca and tsa")
	passphraseFlag(c, &passphraseFile)
	f.StringVar(&identity, "identity", "", "who signs, as a `URI`")
	f.StringVarP(&out, "out", "o", "", "write to `FILE` (default: the policy's name with .policy.json)")
	f.BoolVar(&force, "force", false, "overwrite a file that is there already")
	f.StringVar(&log, "log", "", "append the signature to the transparency log in `DIR`")
	f.StringVar(&tsaURL, "tsa", "", "timestamp authority's `URL` (default: the authority's own)")
	require(c, "keys")
	return c
}
