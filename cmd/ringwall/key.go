package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

const maxPassphrase = 1 << 10

func newKeyCommand(e *env) *cobra.Command {
	return newGroup("key", groupSign, "Make and show the keys that sign builds and policies",
		`A fleet has one authority: a directory with a root, one issuing CA for each
purpose (builds, policies, permits) and a timestamp authority. Hosts trust the
issuing CAs that their policy names, never the root.`,
		newKeyInitCommand(e), newKeyShowCommand(e), newKeyTrustCommand(e), newKeySigstoreRootCommand(e))
}

// keyFile is a key of an authority, for people.
type keyFile struct {
	stem, signs, keep string
}

func keyFiles() []keyFile {
	return []keyFile{
		{"root", "the other certificates", "offline: needed again only to replace one of them"},
		{"build-ca", "builds, by `ringwall sign`", "on the machine that signs builds"},
		{"policy-ca", "policies, by `ringwall policy sign`", "with those who decide what may run; never on the build machine"},
		{"permit-ca", "break-glass permits", "in a safe, reachable by the one on call"},
		{"attest-ca", "evidence of gates, by `ringwall gate attest`", "where tests and reviews are judged; not on the build machine"},
		{"breakglass-ca", "builds past their gates, in an emergency", "in a safe, reachable by two of those who answer for it"},
		{"tsa", "the time of every signature", "wherever something is signed; who has it can back-date"},
	}
}

// passphraseFlag adds --passphrase-file. A passphrase is never an argument,
// which every process on the machine can read.
func passphraseFlag(c *cobra.Command, file *string) {
	c.Flags().StringVar(file, "passphrase-file", "", "read the keys' passphrase from the first line of `FILE` (- for standard input)")
}

// readPassphrase returns nil when no file is named.
func readPassphrase(e *env, file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	in := e.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("passphrase: %w", err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return nil, fmt.Errorf("passphrase: %w", err)
		}
		if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
			return nil, hint(fmt.Errorf("passphrase: mode %04o of %s lets others read it: %w", st.Mode().Perm(), file, errs.Denied),
				"chmod 0600 %s", file)
		}
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 || len(b) > maxPassphrase {
		return nil, fmt.Errorf("passphrase: %s is empty or longer than %d bytes: %w", file, maxPassphrase, errs.Invalid)
	}
	return line, nil
}

// loadAuthority reads an authority to sign with.
func loadAuthority(e *env, dir, passphraseFile string) (*pki.Authority, error) {
	pass, err := readPassphrase(e, passphraseFile)
	if err != nil {
		return nil, err
	}
	a, err := pki.LoadAuthority(dir, pass, e.now)
	switch {
	case errors.Is(err, errs.NotFound):
		err = hint(err, "make keys with: ringwall key init %s --name \"Example Fleet\"", shown(dir))
	case errors.Is(err, errs.Denied) && pass == nil:
		err = hint(err, "is it --passphrase-file, or the file's mode?")
	}
	return a, err
}

// fleetOf is the authority's name as in `key init --name`.
func fleetOf(a *pki.Authority) string {
	return strings.TrimSuffix(a.Root.Cert.Subject.CommonName, " Root")
}

// defaultIdentity is who signs when nobody says so. It names the fleet and the
// job, not the person at the keyboard, so that a rule for it keeps matching;
// the domain .internal is nobody's.
func defaultIdentity(a *pki.Authority, p pki.Purpose) string {
	slug := strings.Trim(strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		}
		return '-'
	}, fleetOf(a)), "-")
	for strings.Contains(slug, "--") {
		slug = strings.ReplaceAll(slug, "--", "-")
	}
	if slug == "" {
		slug = "fleet"
	}
	return "spiffe://" + slug + ".internal/" + p.String() + "/main"
}

func newKeyInitCommand(e *env) *cobra.Command {
	var name, passphraseFile string
	c := &cobra.Command{
		Use:   "init DIR --name NAME",
		Short: "Make the keys of a fleet",
		Long: `Makes a directory with the root, the issuing CAs for builds, policies and
permits, and a timestamp authority: certificates (.crt, public) and keys (.key,
mode 0600, encrypted when a passphrase is given). It never changes a directory
that holds an authority already.

JSON: {"directory", "files": [{"file", "signs", "keep"}]}`,
		Example: `  ringwall key init keys --name "Example Fleet"
  ringwall key init keys --name "Example Fleet" --passphrase-file /run/secrets/pass`,
		Args: exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			pass, err := readPassphrase(e, passphraseFile)
			if err != nil {
				return err
			}
			if _, err := pki.CreateAuthority(args[0], pki.AuthorityOptions{Name: name, Passphrase: pass, Now: e.now}); err != nil {
				if errors.Is(err, errs.Conflict) {
					err = hint(err, "look at it with: ringwall key show %s", shown(args[0]))
				}
				return err
			}
			type file struct {
				File  string `json:"file"`
				Signs string `json:"signs"`
				Keep  string `json:"keep"`
			}
			out := struct {
				Directory string `json:"directory"`
				Files     []file `json:"files"`
			}{Directory: args[0]}
			for _, k := range keyFiles() {
				out.Files = append(out.Files, file{k.stem + ".key", k.signs, k.keep})
			}
			if err := e.emit(out, func(w io.Writer) {
				for _, f := range out.Files {
					fmt.Fprintf(w, "%s\n  signs %s\n  keep it %s\n", filepath.Join(args[0], f.File), f.Signs, f.Keep)
				}
			}); err != nil {
				return err
			}
			if pass == nil {
				e.notef("The keys are not encrypted; --passphrase-file would do that.")
			}
			e.notef("Next: move root.key offline, then write a policy: ringwall policy init --keys %s --name base", shown(args[0]))
			return nil
		},
	}
	c.Flags().StringVar(&name, "name", "", "the fleet's `NAME`, which stands in every certificate")
	passphraseFlag(c, &passphraseFile)
	require(c, "name")
	return c
}

// keyInfo is a certificate of an authority, and its key.
type keyInfo struct {
	File        string    `json:"file"`
	Subject     string    `json:"subject"`
	Purpose     string    `json:"purpose"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, as openssl gives it
	Key         string    `json:"key"`         // present, encrypted or absent
}

func newKeyShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "show DIR",
		Short: "Show an authority's certificates, and which keys are here",
		Long: `Shows each certificate with its fingerprint (SHA-256, as openssl prints it),
after checking it against its purpose and the root. It needs no passphrase.

JSON: {"directory", "fleet", "certificates": [{"file", "subject", "purpose",
"not_before", "not_after", "fingerprint", "key": "present|encrypted|absent"}]}`,
		Example: "  ringwall key show keys",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := pki.LoadCertificates(args[0])
			if err != nil {
				return err
			}
			out := struct {
				Directory    string    `json:"directory"`
				Fleet        string    `json:"fleet"`
				Certificates []keyInfo `json:"certificates"`
			}{Directory: args[0], Fleet: fleetOf(a)}
			add := func(stem, purpose string, c *x509.Certificate) error {
				state, err := keyState(filepath.Join(args[0], stem+".key"))
				out.Certificates = append(out.Certificates, keyInfo{
					File: stem + ".crt", Subject: c.Subject.CommonName, Purpose: purpose, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
					Fingerprint: fmt.Sprintf("%x", pki.Fingerprint(c)), Key: state,
				})
				return err
			}
			err = add("root", "root", a.Root.Cert)
			for _, p := range pki.Purposes() {
				if i := a.Issuers[p]; i != nil {
					err = errors.Join(err, add(p.String()+"-ca", p.String(), i.Cert))
				}
			}
			if err = errors.Join(err, add("tsa", "timestamps", a.TSA.Cert)); err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "FILE\tPURPOSE\tSUBJECT\tVALID UNTIL\tKEY")
				for _, c := range out.Certificates {
					fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", c.File, c.Purpose, c.Subject, c.NotAfter.Format(time.DateOnly), c.Key)
				}
				_ = t.Flush()
				fmt.Fprintln(w, "\nFingerprints (SHA-256):")
				for _, c := range out.Certificates {
					fmt.Fprintf(w, "%s  %s\n", c.Fingerprint, c.File)
				}
			})
		},
	}
}

// keyState looks at a key file without decrypting it.
func keyState(path string) (string, error) {
	b, err := readBounded(path, 16<<10)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "absent", nil
	case err != nil:
		return "", err
	}
	block, _ := pem.Decode(b)
	switch {
	case block == nil:
		return "", fmt.Errorf("%s: no PEM block: %w", path, errs.Invalid)
	case block.Type == "ENCRYPTED PRIVATE KEY":
		return "encrypted", nil
	}
	return "present", nil
}

func newKeyTrustCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "trust DIR",
		Short: "Print the trust section of a policy",
		Long: `Prints the YAML that makes a policy believe this authority's builds, policies,
supplements and permits. Take out what a policy's hosts should not believe.

JSON: {"authorities": [{"name", "signs", "certificate"}], "timestamps": [{"name", "certificate"}]}`,
		Example: "  ringwall key trust keys >> base.yaml",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := pki.LoadCertificates(args[0])
			if err != nil {
				return err
			}
			t := trustOf(a)
			return e.emit(t, func(w io.Writer) {
				fmt.Fprintln(w, "trust:")
				t.writeYAML(w)
			})
		},
	}
}

// trustSection is what a policy says of an authority.
type trustSection struct {
	Authorities []trustEntry `json:"authorities"`
	Timestamps  []trustEntry `json:"timestamps"`
	Logs        []trustLog   `json:"logs,omitempty"`
}

type trustLog struct {
	Name string `json:"name"`
	Key  string `json:"key"`
}

type trustEntry struct {
	Name        string   `json:"name"`
	Signs       []string `json:"signs,omitempty"`
	Certificate string   `json:"certificate"` // PEM
}

func trustOf(a *pki.Authority) trustSection {
	entry := func(c *x509.Certificate, signs ...string) trustEntry {
		return trustEntry{Name: c.Subject.CommonName, Signs: signs, Certificate: string(pki.EncodeCertificate(c))}
	}
	t := trustSection{
		Authorities: []trustEntry{
			entry(a.Issuers[pki.PurposeBuild].Cert, codesign.SignsBuild),
			entry(a.Issuers[pki.PurposePolicy].Cert, codesign.SignsPolicy, codesign.SignsSupplement),
			entry(a.Issuers[pki.PurposePermit].Cert, codesign.SignsPermit),
		},
		Timestamps: []trustEntry{entry(a.TSA.Cert)},
	}
	for _, o := range a.OtherTSAs {
		t.Timestamps = append(t.Timestamps, entry(o.Cert))
	}
	if a.Log != nil {
		t.Logs = []trustLog{{a.Log.Name, a.Log.String()}}
	}
	return t
}

func (t trustSection) writeYAML(w io.Writer) {
	list := func(title string, entries []trustEntry) {
		fmt.Fprintf(w, "  %s:\n", title)
		for _, x := range entries {
			fmt.Fprintf(w, "    - name: %s\n", yamlString(x.Name))
			if len(x.Signs) > 0 {
				fmt.Fprintf(w, "      signs: [%s]\n", strings.Join(x.Signs, ", "))
			}
			fmt.Fprintln(w, "      certificate: |")
			for line := range strings.Lines(x.Certificate) {
				fmt.Fprint(w, "        ", line)
			}
		}
	}
	list("authorities", t.Authorities)
	list("timestamps", t.Timestamps)
	if len(t.Logs) > 0 {
		fmt.Fprintln(w, "  logs:")
	}
	for _, l := range t.Logs {
		fmt.Fprintf(w, "    - name: %s\n      key: %s\n", yamlString(l.Name), l.Key)
	}
}

// yamlString quotes text for YAML; its double-quoted form takes what Go's does
// for printable text.
func yamlString(s string) string { return strconv.Quote(s) }

func newKeySigstoreRootCommand(e *env) *cobra.Command {
	var purpose string
	c := &cobra.Command{
		Use:   "sigstore-root DIR",
		Short: "Print trusted_root.json, for cosign and sigstore libraries",
		Long: `Prints what other people's tools need to verify what this authority signs. They
know nothing of purposes: never join the files of two purposes into one.

The output is JSON in either output format.`,
		Example: "  ringwall key sigstore-root keys --purpose build > trusted_root.json",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePurpose(purpose)
			if err != nil {
				return err
			}
			a, err := pki.LoadCertificates(args[0])
			if err != nil {
				return err
			}
			b, err := a.SigstoreRoot(p)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(e.stdout, "%s\n", b); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
			return nil
		},
	}
	c.Flags().StringVar(&purpose, "purpose", "build", "whose: build, policy, permit, attest or breakglass")
	complete(c, "purpose", "build", "policy", "permit", "attest", "breakglass")
	return c
}

func parsePurpose(s string) (pki.Purpose, error) {
	var names []string
	for _, p := range pki.Purposes() {
		if p.String() == s {
			return p, nil
		}
		names = append(names, p.String())
	}
	return 0, usage(fmt.Errorf("--purpose %q: want one of %s", s, strings.Join(names, ", ")))
}
