package main

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

// checkedJSON is an appraisal for people and programs.
type checkedJSON struct {
	File   string           `json:"file"`
	Host   attest.HostID    `json:"host"`
	At     time.Time        `json:"at"`
	Status attest.Status    `json:"status"`
	Policy string           `json:"policy"`
	Checks []attest.Checked `json:"checks"`
	IMA    attest.IMAFacts  `json:"ima"`
	Signed *signedByJSON    `json:"signed,omitempty"`
}

type signedByJSON struct {
	Authority string    `json:"authority"`
	Identity  string    `json:"identity"`
	At        time.Time `json:"at"`
}

func describeResult(file string, r *attest.Result) *checkedJSON {
	return &checkedJSON{
		File: file, Host: r.Host, At: r.At, Status: r.Status, Policy: fmt.Sprintf("%s, version %d, %s", r.PolicyName, r.PolicyVersion, r.PolicyDigest), Checks: r.Checks, IMA: r.IMA,
	}
}

func (c *checkedJSON) write(w io.Writer) {
	fmt.Fprintf(w, "%s: %s\nhost    %s\nat      %s\npolicy  %s\n", shown(c.File), c.Status, c.Host, c.At.Format(time.RFC3339), c.Policy)
	if s := c.Signed; s != nil {
		fmt.Fprintf(w, "signed  by %s (%s) at %s\n", shown(s.Identity), shown(s.Authority), s.At.Format(time.RFC3339))
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nCHECK\tMODE\tOUTCOME\tREASON\tDETAIL")
	for _, k := range c.Checks {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", k.Check, k.Mode, k.Outcome, k.Reason, printable(k.Detail))
	}
	_ = t.Flush()
}

// end gives the exit code of an appraisal.
func (c *checkedJSON) end() error {
	if c.Status == attest.Contraindicated {
		return fmt.Errorf("%s: the host is refused: %w", c.File, errs.Denied)
	}
	return nil
}

func newAttestVerifyArchiveCommand(e *env) *cobra.Command {
	var trust string
	var cats []string
	c := &cobra.Command{
		Use:   "verify-archive FILE --trust DIR",
		Short: "Appraise archived evidence again, and compare with what was signed then",
		Long: `Takes an archive that the server kept of a host's round, appraises the evidence in
it again and compares every byte of the result with the one that was signed then:
without the server, the host or a network, years later. The timestamp says when.

--trust is the authority's directory; certificates are enough. The catalogues
that the result names are given with --catalogue; the error says which is missing.

Exit code 5: the signature does not verify, or the evidence does not lead to the
result. A refusal that was signed and verifies is exit code 0: it is what happened.

JSON: {"file", "host", "at", "status", "policy", "checks": [{"check", "mode",
"outcome", "reason", "detail"}], "ima", "signed": {"authority", "identity", "at"}}`,
		Example: `  ringwall attest verify-archive web-1-2031-05-01.json.gz --trust keys \
      --catalogue edged.cat --catalogue debian.cat`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			roots, err := loadRoots(trust, pki.PurposeAppraisal)
			if err != nil {
				return err
			}
			archive, err := readZipped(args[0], attest.MaxArchive)
			if err != nil {
				return err
			}
			var known attest.Catalogues
			if len(cats) > 0 {
				if known, err = openCatalogues(cats); err != nil {
					return err
				}
			}
			var by *signedByJSON
			var payload []byte
			r, err := attest.VerifyArchive(archive, known, func(bundle []byte) ([]byte, error) {
				v, err := pki.VerifyBundle(bundle, roots, pki.PurposeAppraisal)
				if err != nil {
					return nil, err
				}
				if v.PayloadType != attest.ResultType {
					return nil, fmt.Errorf("it signs a %.80q: %w", v.PayloadType, errs.Untrusted)
				}
				by, payload = &signedByJSON{Authority: v.CA, Identity: v.Identity, At: v.SignedAt}, v.Payload
				return v.Payload, nil
			})
			if err != nil {
				err = fmt.Errorf("%s: %w", args[0], err)
				if missing := missingCatalogues(payload, known); len(missing) > 0 {
					err = hint(err, "give the catalogues that it names with --catalogue; missing: %s", strings.Join(missing, ", "))
				}
				return err
			}
			out := describeResult(args[0], r)
			out.Signed = by
			return e.emit(out, out.write)
		},
	}
	c.Flags().StringVar(&trust, "trust", "", "the authority's `DIR`")
	c.Flags().StringArrayVar(&cats, "catalogue", nil, "a `FILE.cat` that the result names; may be repeated")
	require(c, "trust")
	return c
}

// missingCatalogues are those that a signed result names and that were not given.
func missingCatalogues(payload []byte, known attest.Catalogues) []string {
	var r attest.Result
	if json.Unmarshal(payload, &r) != nil {
		return nil
	}
	return slices.DeleteFunc(r.IMA.Catalogues, func(name string) bool { return known != nil && slices.Contains(known.Names(), name) })
}

// readZipped reads a file that may be packed with gzip, to at most limit bytes.
func readZipped(path string, limit int64) ([]byte, error) {
	b, err := readBounded(path, limit)
	if err != nil || !bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
		return b, err
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, err, errs.Invalid)
	}
	out, err := io.ReadAll(io.LimitReader(z, limit+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, err, errs.Invalid)
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes unpacked: %w", path, limit, errs.Invalid)
	}
	return out, nil
}

func newAttestEvidenceCommand(e *env) *cobra.Command {
	var tpm, nonce, to string
	c := &cobra.Command{
		Use:   "evidence -o FILE",
		Short: "Collect this machine's evidence into a file",
		Long: `Asks the TPM for a quote over all PCRs and puts it into a file with the firmware's
log, the kernel's IMA list and systemd's log of its own measurements. The file holds
digests, names of files and public keys, no secret. It takes root.

The quote is as fresh as the nonce: whoever wants to know what runs now chooses one
and gives it with --nonce; without it one is drawn here and proves no time. Look at
the file with ringwall attest verify, elsewhere.

JSON: {"file", "host", "bytes", "nonce"}`,
		Example: `  ringwall attest evidence -o web-1.json --nonce $(openssl rand -hex 32)
  ringwall attest verify web-1.json --policy attestation.json --nonce NONCE`,
		Args: cobra.NoArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			q := &attest.Collected{At: e.now().UTC(), Nonce: make([]byte, attest.NonceSize)}
			_, _ = rand.Read(q.Nonce) // never fails
			if nonce != "" {
				var err error
				if q.Nonce, err = parseNonce(nonce); err != nil {
					return err
				}
			}
			prover := host.NewProver(tpm)
			id, err := prover.Identity()
			if err != nil {
				return hint(err, "is there a TPM 2.0 at %s, and are you root?", prover.TPM)
			}
			q.Identity, q.Evidence.Bank = *id, attest.SHA256.String()
			a, err := prover.Answer(q.Question(), nil, nil)
			if err != nil {
				return err
			}
			q.Evidence = a.Evidence
			b, err := q.Encode()
			if err != nil {
				return err
			}
			if err := host.WriteFile(to, b, 0o644); err != nil {
				return err
			}
			ek, err := attest.ParseEK(id.EK)
			if err != nil {
				return err
			}
			out := struct {
				File  string        `json:"file"`
				Host  attest.HostID `json:"host"`
				Bytes int           `json:"bytes"`
				Nonce string        `json:"nonce"`
			}{to, ek.ID(), len(b), hex.EncodeToString(q.Nonce)}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "%s: %d bytes, TPM %s\n", shown(out.File), out.Bytes, out.Host) })
		},
	}
	c.Flags().StringVar(&tpm, "tpm", "", "the TPM's `DEVICE`, or an emulator's socket (default "+host.DefaultTPM+")")
	c.Flags().StringVar(&nonce, "nonce", "", "64 hexadecimal `DIGITS` by whoever asks")
	c.Flags().StringVarP(&to, "out", "o", "", "write to this `FILE`")
	require(c, "out")
	return c
}

func parseNonce(s string) ([]byte, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != attest.NonceSize {
		return nil, usage(fmt.Errorf("--nonce: want %d hexadecimal digits", 2*attest.NonceSize))
	}
	return b, nil
}

func readCollected(path string) (*attest.Collected, error) {
	b, err := readZipped(path, attest.MaxCollected)
	if err != nil {
		return nil, err
	}
	c, err := attest.ParseCollected(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func readAttestPolicy(path string) (*attest.Policy, error) {
	b, err := readBounded(path, 8<<20)
	if err != nil {
		return nil, err
	}
	p, err := attest.ParsePolicy(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func newAttestVerifyCommand(e *env) *cobra.Command {
	var policy, nonce, ca string
	var cats, tpms []string
	c := &cobra.Command{
		Use:   "verify FILE --policy POLICY",
		Short: "Hold a machine's evidence against a policy",
		Long: `Appraises a file of ringwall attest evidence as the server appraises a host: quote,
logs, and the checks of an attestation policy. Nothing else is asked, neither the
machine nor a server.

Why the TPM is believed to be one is said with --ca (its maker's CA) or --tpm (its
id, if you know it); with neither, the check ek-trust fails. That the attestation
key is in that very TPM takes a conversation, which a file is not: the server has it.

Exit code 1: an enforced check failed. 5 is left for signatures.

JSON: {"file", "host", "at", "status", "policy", "checks": [{"check", "mode",
"outcome", "reason", "detail"}], "ima"}`,
		Example: `  ringwall attest verify web-1.json --policy attestation.json --nonce 3f…
  ringwall attest verify web-1.json --policy attestation.json --ca vendor.pem --catalogue debian.cat`,
		Args: exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			got, err := readCollected(args[0])
			if err != nil {
				return err
			}
			if nonce != "" {
				want, err := parseNonce(nonce)
				if err != nil {
					return err
				}
				got.Nonce = want // and nothing else verifies
			}
			p, err := readAttestPolicy(policy)
			if err != nil {
				return err
			}
			var known attest.Catalogues
			if len(cats) > 0 {
				if known, err = openCatalogues(cats); err != nil {
					return err
				}
			}
			basis, err := basisOf(got, ca, tpms, e.now())
			if err != nil {
				return err
			}
			in, err := got.Input(basis, p, known, e.now())
			if err != nil {
				return err
			}
			r, _, _ := attest.Appraise(in)
			out := describeResult(args[0], r)
			return errors.Join(e.emit(out, out.write), out.end())
		},
	}
	f := c.Flags()
	f.StringVar(&policy, "policy", "", "the attestation policy, a JSON `FILE`")
	f.StringVar(&nonce, "nonce", "", "the `DIGITS` that you asked with")
	f.StringVar(&ca, "ca", "", "PEM `FILE` with certificates of TPM makers' CAs, and of CAs between")
	f.StringArrayVar(&tpms, "tpm", nil, "`ID` of a TPM that you know; may be repeated")
	f.StringArrayVar(&cats, "catalogue", nil, "look IMA entries up in this `FILE.cat`; may be repeated")
	require(c, "policy")
	return c
}

// basisOf is why the file's endorsement key is believed; "" if it is not.
func basisOf(c *attest.Collected, ca string, tpms []string, now time.Time) (attest.Basis, error) {
	ek, err := attest.ParseEK(c.Identity.EK)
	if err != nil {
		return "", err
	}
	policy := attest.EKPolicy{}
	for _, id := range tpms {
		policy.Allowed = append(policy.Allowed, attest.HostID(id))
	}
	var cert *attest.EKCertificate
	if len(c.Identity.Certificate) > 0 {
		if cert, err = attest.ParseEKCertificate(c.Identity.Certificate); err != nil {
			return "", err
		}
	}
	var between []*x509.Certificate
	if ca != "" {
		rest, err := readBounded(ca, maxBundleFile)
		if err != nil {
			return "", err
		}
		for len(bytes.TrimSpace(rest)) > 0 {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return "", fmt.Errorf("%s: not PEM: %w", ca, errs.Invalid)
			}
			x, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return "", fmt.Errorf("%s: %w: %w", ca, err, errs.Invalid)
			}
			if bytes.Equal(x.RawSubject, x.RawIssuer) {
				policy.VendorCAs = append(policy.VendorCAs, x)
			} else {
				between = append(between, x)
			}
		}
	}
	basis, err := policy.Trust(ek, cert, between, now)
	if attest.ReasonOf(err) == attest.ReasonEKTrust {
		return "", nil // the check says it
	}
	return basis, err
}

func newAttestMeasureCommand(e *env) *cobra.Command {
	var load bool
	c := &cobra.Command{
		Use:   "measure",
		Short: "Show the IMA policy that evidence needs, or load it",
		Long: `Prints the kernel's measurement policy with which its list tells what ran and which
integrity policy the host had read. --load hands it to the kernel: once after each
start, as early as possible, best in the initramfs. The kernel takes no second one.

Exit code 6: one is loaded already; 7: the kernel has no IMA.`,
		Example: `  ringwall attest measure
  ringwall attest measure --load`,
		Args: cobra.NoArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			text := host.MeasurePolicy()
			if load {
				return host.LoadMeasurePolicy(text)
			}
			if _, err := io.WriteString(e.stdout, text); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&load, "load", false, "hand it to this machine's kernel")
	return c
}

// saveOrPrint writes a result to a file, or to standard output.
func saveOrPrint(e *env, to string, b []byte) error {
	if to != "" {
		return host.WriteFile(to, b, 0o644)
	}
	if _, err := e.stdout.Write(b); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	return nil
}

// stem is a file's name without directory and endings.
func stem(path string) string {
	name := filepath.Base(path)
	for _, end := range []string{".signed", ".efi", ".EFI", ".pcrlock"} {
		name = strings.TrimSuffix(name, end)
	}
	return name
}

func isDirectory(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
