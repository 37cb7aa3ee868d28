package main

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/keystore"
	"ringwall/internal/pki"
)

func newKeyCommand(e *env) *cobra.Command {
	return newGroup("key", groupSign, "Make and show the keys that sign builds and policies",
		`A fleet has one authority: a directory with a root, one issuing CA for each
purpose (builds, policies, permits) and a timestamp authority. Hosts trust the
issuing CAs that their policy names, never the root.`,
		newKeyInitCommand(e), newKeyAddCommand(e), newKeyAdoptCommand(e), newKeyShowCommand(e), newKeyTrustCommand(e), newKeySigstoreRootCommand(e))
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
		{"appraisal-ca", "what hosts proved of themselves, by the server", "where hosts are attested; it can sign nothing else"},
		{"tsa", "the time of every signature", "wherever something is signed; who has it can back-date"},
	}
}

// passphraseFlag adds --passphrase-file. A passphrase is never an argument,
// which every process on the machine can read.
func passphraseFlag(c *cobra.Command, file *string) {
	c.Flags().StringVar(file, "passphrase-file", "", "read the keys' passphrase, or the token's PIN, from the first line of `FILE` (- for standard input, env:NAME, credential:NAME for one of systemd's)")
}

// readPassphrase returns nil when no file is named.
func readPassphrase(e *env, file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	var secret []byte
	var err error
	name, isEnv := strings.CutPrefix(file, "env:")
	credential, isCredential := strings.CutPrefix(file, "credential:")
	switch {
	case file == "-":
		secret, err = keystore.FirstLine(e.stdin)
	case isEnv:
		secret, err = keystore.FirstLine(strings.NewReader(e.getenv(name)))
	case isCredential:
		dir := e.getenv("CREDENTIALS_DIRECTORY")
		if dir == "" || credential != filepath.Base(credential) {
			return nil, fmt.Errorf("passphrase: systemd gave no credential %q to this process: %w", credential, errs.NotFound)
		}
		secret, err = keystore.ReadSecret(filepath.Join(dir, credential))
	default:
		if secret, err = keystore.ReadSecret(file); errors.Is(err, errs.Denied) {
			err = hint(err, "chmod 0600 %s", file)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("passphrase from %s: %w", file, err)
	}
	return secret, nil
}

// keyOpener opens keys in tokens. Their PIN is where their URI says, and
// otherwise the passphrase.
func keyOpener(e *env, pass []byte) pki.KeyOpener {
	return func(uri string) (crypto.Signer, error) {
		pin, err := pinOf(e, uri, pass)
		if err != nil {
			return nil, err
		}
		return keystore.Open(uri, pin)
	}
}

func pinOf(e *env, uri string, pass []byte) ([]byte, error) {
	if !strings.HasPrefix(uri, "pkcs11:") {
		return pass, nil
	}
	u, err := keystore.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	switch {
	case strings.HasPrefix(u.PINSource, "env:"), strings.HasPrefix(u.PINSource, "credential:"):
		return readPassphrase(e, u.PINSource)
	case u.PINSource != "":
		return nil, nil // a file, which keystore reads
	}
	return pass, nil
}

// authorityOptions says how to make keys: in files, or where URIs say, each for
// one key (build-ca=pkcs11:…) or for all (pkcs11:…).
func authorityOptions(e *env, passphraseFile string, uris []string) (*pki.AuthorityOptions, error) {
	pass, err := readPassphrase(e, passphraseFile)
	if err != nil {
		return nil, err
	}
	o := &pki.AuthorityOptions{Passphrase: pass, Now: e.now, OpenKey: keyOpener(e, pass)}
	places := map[string]string{}
	for _, s := range uris {
		if s == "" {
			continue
		}
		stem, uri := "", s
		if !strings.HasPrefix(s, "pkcs11:") {
			stem, uri, _ = strings.Cut(s, "=")
		}
		u, err := keystore.ParseURI(uri)
		if err != nil {
			return nil, usage(fmt.Errorf("--key-uri: %w", err))
		}
		if stem != "" && u.Object == "" {
			u.Object = stem
		}
		if stem == "" && u.Object != "" {
			return nil, usage(errors.New("--key-uri: object= is for one key; write KEY=pkcs11:…"))
		}
		places[stem] = u.String()
	}
	if len(places) == 0 {
		return o, nil
	}
	o.NewKey = func(stem string) (crypto.Signer, string, error) {
		uri, ok := places[stem]
		if !ok {
			if uri, ok = places[""]; !ok {
				return nil, "", nil // a file
			}
			u, err := keystore.ParseURI(uri)
			if err != nil {
				return nil, "", err
			}
			u.Object = stem
			uri = u.String()
		}
		pin, err := pinOf(e, uri, pass)
		if err != nil {
			return nil, "", err
		}
		k, err := keystore.Generate(uri, pin)
		return k, uri, err
	}
	return o, nil
}

// loadAuthority reads an authority to sign with.
func loadAuthority(e *env, dir, passphraseFile string) (*pki.Authority, error) {
	pass, err := readPassphrase(e, passphraseFile)
	if err != nil {
		return nil, err
	}
	a, err := pki.LoadAuthorityKeys(dir, pass, e.now, keyOpener(e, pass))
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
	var uris []string
	c := &cobra.Command{
		Use:   "init DIR --name NAME",
		Short: "Make the keys of a fleet",
		Long: `Makes a directory with the root, an issuing CA for each purpose, and a timestamp
authority: certificates (.crt, public) and keys (.key, mode 0600, encrypted when a
passphrase is given). It never changes a directory that holds an authority already.

With --key-uri keys are made in a token (HSM) and cannot leave it; the directory
then has a .uri file in the place of the .key file. Give it once for all keys, or
as KEY=URI for one: root, build-ca, policy-ca, permit-ca, attest-ca,
breakglass-ca, appraisal-ca, tsa. The PIN is read from where the URI's pin-source
says (file:PATH, env:NAME, credential:NAME), otherwise from --passphrase-file; it
is never an argument. This takes a ringwall with PKCS#11: ./build --pkcs11.

JSON: {"directory", "files": [{"file", "signs", "keep"}]}`,
		Example: `  ringwall key init keys --name "Example Fleet"
  ringwall key init keys --name "Example Fleet" --passphrase-file /run/secrets/pass
  ringwall-pkcs11 key init keys --name "Example Fleet" \
      --key-uri 'pkcs11:token=fleet?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin'`,
		Args: exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			o, err := authorityOptions(e, passphraseFile, uris)
			if err != nil {
				return err
			}
			o.Name = name
			if _, err := pki.CreateAuthority(args[0], *o); err != nil {
				if errors.Is(err, errs.Conflict) && exists(filepath.Join(args[0], "root.crt")) {
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
			inFiles := false
			for _, k := range keyFiles() {
				name := k.stem + ".key"
				if exists(filepath.Join(args[0], k.stem+".uri")) {
					name = k.stem + ".uri"
				} else {
					inFiles = true
				}
				out.Files = append(out.Files, file{name, k.signs, k.keep})
			}
			if err := e.emit(out, func(w io.Writer) {
				for _, f := range out.Files {
					fmt.Fprintf(w, "%s\n  signs %s\n  keep it %s\n", filepath.Join(args[0], f.File), f.Signs, f.Keep)
				}
			}); err != nil {
				return err
			}
			if o.Passphrase == nil && inFiles {
				e.notef("The keys are not encrypted; --passphrase-file would do that.")
			}
			e.notef("Next: move the root's key offline, then write a policy: ringwall policy init --keys %s --name base", shown(args[0]))
			return nil
		},
	}
	c.Flags().StringVar(&name, "name", "", "the fleet's `NAME`, which stands in every certificate")
	passphraseFlag(c, &passphraseFile)
	f := c.Flags()
	f.StringArrayVar(&uris, "key-uri", nil, "make keys in the token that the pkcs11: `[KEY=]URI` names; repeat")
	require(c, "name")
	return c
}

func newKeyAddCommand(e *env) *cobra.Command {
	var passphraseFile string
	var uris []string
	c := &cobra.Command{
		Use:   "add DIR",
		Short: "Make what an authority lacks, or what is to be replaced",
		Long: `Makes the issuing CAs that an authority of an earlier version lacks, and those
(or the timestamp authority) whose files were moved away to be replaced. It needs
the root's key, so bring it for this. Where nothing is missing nothing is done;
hosts trust a new certificate when a policy says so.

JSON: {"directory", "added": ["build-ca.crt"]}`,
		Example: "  ringwall key add keys --passphrase-file /run/secrets/pass",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			o, err := authorityOptions(e, passphraseFile, uris)
			if err != nil {
				return err
			}
			added, err := pki.ExtendAuthority(args[0], *o)
			if err != nil {
				return err
			}
			out := struct {
				Directory string   `json:"directory"`
				Added     []string `json:"added"`
			}{args[0], []string{}}
			for _, stem := range added {
				out.Added = append(out.Added, stem+".crt")
			}
			return e.emit(out, func(w io.Writer) {
				for _, f := range out.Added {
					fmt.Fprintf(w, "%s\n", filepath.Join(args[0], f))
				}
				if len(out.Added) == 0 {
					fmt.Fprintln(w, "nothing is missing")
				}
			})
		},
	}
	passphraseFlag(c, &passphraseFile)
	c.Flags().StringArrayVar(&uris, "key-uri", nil, "make keys in the token that the pkcs11: `[KEY=]URI` names; repeat")
	return c
}

func newKeyAdoptCommand(e *env) *cobra.Command {
	var passphraseFile string
	c := &cobra.Command{
		Use:   "adopt DIR KEY URI",
		Short: "Use a key of the authority that is in a token now",
		Long: `Says where the key of a certificate is: after it was imported into a token, or on
a machine whose token holds it. The key must be the certificate's. KEY is root,
build-ca, policy-ca, permit-ca, attest-ca, breakglass-ca, appraisal-ca, tsa or log;
a file KEY.key must be moved away first.

JSON: {"file", "uri"}`,
		Example: `  ringwall-pkcs11 key adopt keys build-ca 'pkcs11:token=fleet;object=build-ca?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin'`,
		Args:    exactly("DIR", "KEY", "URI"),
		RunE: func(_ *cobra.Command, args []string) error {
			pass, err := readPassphrase(e, passphraseFile)
			if err != nil {
				return err
			}
			if err := adoptable(args[1]); err != nil {
				return err
			}
			if err := pki.AdoptKey(args[0], args[1], args[2], keyOpener(e, pass)); err != nil {
				return err
			}
			out := struct {
				File string `json:"file"`
				URI  string `json:"uri"`
			}{filepath.Join(args[0], args[1]+".uri"), args[2]}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "%s\n", shown(out.File)) })
		},
	}
	passphraseFlag(c, &passphraseFile)
	return c
}

// adoptable keeps a key's name from being a path.
func adoptable(stem string) error {
	names := []string{"log"}
	for _, k := range keyFiles() {
		names = append(names, k.stem)
	}
	if !slices.Contains(names, stem) {
		return usage(fmt.Errorf("KEY %q: want one of %s", stem, strings.Join(names, ", ")))
	}
	return nil
}

// keyInfo is a certificate of an authority, and its key.
type keyInfo struct {
	File        string    `json:"file"`
	Subject     string    `json:"subject"`
	Purpose     string    `json:"purpose"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, as openssl gives it
	Key         string    `json:"key"`         // present, encrypted, token or absent
}

// keyLog is the authority's transparency log.
type keyLog struct {
	File   string `json:"file"`
	Origin string `json:"origin"`
	Line   string `json:"line"` // as policies name it
	Key    string `json:"key"`  // as in keyInfo
}

func newKeyShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "show DIR",
		Short: "Show an authority's certificates, and which keys are here",
		Long: `Shows each certificate with its fingerprint (SHA-256, as openssl prints it),
after checking it against its purpose and the root. It needs no passphrase.

JSON: {"directory", "fleet", "certificates": [{"file", "subject", "purpose",
"not_before", "not_after", "fingerprint", "key": "present|encrypted|token|absent"}],
"log": {"file", "origin", "line", "key"}}`,
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
				Log          *keyLog   `json:"log,omitempty"`
			}{Directory: args[0], Fleet: fleetOf(a)}
			if a.Log != nil {
				state, err := keyState(filepath.Join(args[0], "log.key"))
				if err != nil {
					return err
				}
				out.Log = &keyLog{File: "log.pub", Origin: a.Log.Origin, Line: a.Log.String(), Key: state}
			}
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
				if l := out.Log; l != nil {
					fmt.Fprintf(t, "%s\tlog\t%s\t-\t%s\n", l.File, l.Origin, l.Key)
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
	case errors.Is(err, os.ErrNotExist) && exists(strings.TrimSuffix(path, ".key")+".uri"):
		return "token", nil
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
	c.Flags().StringVar(&purpose, "purpose", "build", "whose: build, policy, permit, attest, breakglass or appraisal")
	complete(c, "purpose", "build", "policy", "permit", "attest", "breakglass", "appraisal")
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
