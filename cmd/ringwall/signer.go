package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

func newSignerCommand(e *env) *cobra.Command {
	return newGroup("signer", groupSign, "Keep the build key on one machine, and sign for those who pass their gates",
		`The signer is a service that holds the build key. Clients send it an artefact and
the evidence about it, never a digest: it reads the artefact itself, makes the
catalogue, asks the product's release policy, and only then touches the key.

Who may ask for which product is decided by client certificates (mTLS). Every
request leaves lines in an audit file; one that cannot be audited is not served.`,
		newSignerInitCommand(e), newSignerServeCommand(e), newSignerSubmitCommand(e), newSignerTSACommand(e))
}

func newSignerInitCommand(e *env) *cobra.Command {
	var hosts, clients []string
	c := &cobra.Command{
		Use:   "init DIR --host NAME --client NAME=URI",
		Short: "Make TLS certificates and a configuration to begin with",
		Long: `Makes a directory with a TLS certificate for the signer, one for each client, the
CA that certifies them (its key is not kept), and signer.yaml. Where a company has
a CA of its own, use that instead: the client certificate's URI is what counts.

JSON: {"dir", "files"}`,
		Example: "  ringwall signer init signer --host signer.fleet.example --host 127.0.0.1 --client ci=spiffe://fleet.example/ci/edged",
		Args:    exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			identities := map[string]string{}
			for _, s := range clients {
				name, uri, ok := strings.Cut(s, "=")
				if !ok || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || name == "" {
					return usage(fmt.Errorf("--client %q: want NAME=URI, such as ci=spiffe://fleet.example/ci/edged", s))
				}
				identities[name] = uri
			}
			files, err := signer.TLSFiles(hosts, identities, e.now())
			if err != nil {
				return err
			}
			files["signer.yaml"] = []byte(signerTemplate(identities))
			return saveSigner(e, args[0], files)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&hosts, "host", []string{"127.0.0.1"}, "`NAME` or address that clients use; repeat")
	f.StringArrayVar(&clients, "client", nil, "a client, as `NAME=URI`; repeat")
	require(c, "client")
	return c
}

func saveSigner(e *env, dir string, files map[string][]byte) error {
	if err := os.MkdirAll(filepath.Join(dir, "policies"), 0o700); err != nil {
		return err
	}
	var names []string
	for name := range files {
		names = append(names, filepath.Join(dir, name))
	}
	slices.Sort(names)
	for _, name := range names {
		if exists(name) {
			return fmt.Errorf("%s is there already: %w", name, errs.Conflict)
		}
	}
	for _, name := range names {
		mode := os.FileMode(0o644)
		if strings.HasSuffix(name, ".key") {
			mode = 0o600
		}
		if err := host.WriteFile(name, files[filepath.Base(name)], mode); err != nil {
			return err
		}
	}
	out := struct {
		Dir   string   `json:"dir"`
		Files []string `json:"files"`
	}{dir, names}
	return e.emit(out, func(w io.Writer) {
		for _, n := range names {
			fmt.Fprintf(w, "%s\n", shown(n))
		}
		fmt.Fprintf(w, "next: put release policies into %s, say in signer.yaml where the keys are, then\n  ringwall signer serve --config %s\n",
			shown(filepath.Join(dir, "policies")), shown(filepath.Join(dir, "signer.yaml")))
	})
}

func signerTemplate(clients map[string]string) string {
	var b strings.Builder
	for name, uri := range clients {
		fmt.Fprintf(&b, "  - {name: %s, identity: %q, products: [\"*\"]} # better: the products that it builds\n", name, uri)
	}
	lines := strings.SplitAfter(b.String(), "\n")
	slices.Sort(lines)
	return `# ringwall signer serve; docs/design/signing.md explains every key.
version: 1
listen: 127.0.0.1:8620
tls: {certificate: server.crt, key: server.key, client_cas: tls-ca.crt}
clients:
` + strings.Join(lines, "") + `keys: ../keys # an authority's directory, with the keys build-ca and tsa
#passphrase_file: /run/credentials/passphrase
policies: policies # a release policy for each product, *.yaml
state: state # epochs, audit, alerts, spool
#kernel_key: ../kernel/kernel # kernel.key and kernel.crt, for release policies with kernel_signatures
#notify: [/usr/local/bin/page, --urgent] # gets every alert on its standard input
`
}

func newSignerServeCommand(e *env) *cobra.Command {
	var config string
	var check bool
	c := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Sign for clients",
		Long: `Serves until it is told to stop (SIGTERM), and then finishes what it began. It
listens on loopback unless the configuration says otherwise.

Under the state directory: audit.jsonl, a line for each request that was asked,
signing and signed, refused or failed; alerts.jsonl, a line for each break-glass
signature; epochs.json, the highest epoch of each product. One signer has a state
directory at a time.`,
		Example: `  ringwall signer serve --config signer/signer.yaml --check
  ringwall signer serve --config signer/signer.yaml`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := signer.LoadConfig(config)
			if err != nil {
				return err
			}
			return serveSigner(c.Context(), e, cfg, check)
		},
	}
	f := c.Flags()
	f.StringVar(&config, "config", "", "the configuration `FILE`")
	f.BoolVar(&check, "check", false, "say whether it could serve, and do not")
	require(c, "config")
	return c
}

// serveSigner puts the service together and runs it.
func serveSigner(ctx context.Context, e *env, cfg *signer.Config, check bool) (err error) {
	parts := signOptions{
		keys: cfg.Keys, passphraseFile: cfg.PassphraseFile, identity: cfg.Identity, policy: cfg.Policies, state: cfg.State,
		kernel: kernelKeyFlags{file: cfg.KernelKey, passphraseFile: cfg.KernelPassphraseFile}, log: cfg.Log, tsa: cfg.TSA, alerts: filepath.Join(cfg.State, "alerts.jsonl"), notify: cfg.Notify,
	}
	if err := os.MkdirAll(cfg.State, 0o700); err != nil {
		return err
	}
	s, closeAll, err := parts.signer(e) //nolint:contextcheck // the log outlives what it was opened for
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	if _, err := s.Policies.Policy(""); err != nil && !errors.Is(err, errs.NotFound) {
		return err // one of them is not valid
	}
	audit, err := signer.OpenLines(filepath.Join(cfg.State, "audit.jsonl"))
	if err != nil {
		return err
	}
	defer audit.Close()
	s.Audit = audit.Add
	pems, err := readAll(cfg.Certificate, cfg.Key, cfg.ClientCAs)
	if err != nil {
		return err
	}
	tlsConfig, err := signer.TLSConfig(pems[0], pems[1], pems[2])
	if err != nil {
		return err
	}
	server := &signer.Server{
		Signer: s, Clients: cfg.Clients, Spool: cfg.Spool, SpoolMax: cfg.SpoolMax, ArtefactMax: cfg.ArtefactMax,
		Audit: audit.Add, Log: slog.New(slog.NewTextHandler(e.stderr, nil)),
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return err
	}
	if check {
		e.notef("it could serve on %s", l.Addr())
		return l.Close()
	}
	e.notef("signing as %s, on %s", s.Identity, l.Addr())
	return server.Serve(ctx, l, tlsConfig)
}

func readAll(files ...string) ([][]byte, error) {
	var out [][]byte
	for _, f := range files {
		b, err := readBounded(f, maxBundleFile)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

type submitOptions struct {
	signOptions
	server, certificate, key, ca, trust string
}

func newSignerSubmitCommand(e *env) *cobra.Command {
	var o submitOptions
	c := &cobra.Command{
		Use:   "submit FILE --server URL --product NAME --version VERSION --evidence DIR",
		Short: "Have a build signed by a signer",
		Long: `Sends a build and the evidence about it to a signer, waits, and writes the three
files of the release, as ringwall sign does. A directory is packed with tar first.

With --trust (an authority's directory, or a policy) the release is verified
before it is written, so that the signer's answer is not just believed.

Exit code 1: a gate refused it; 4: a gate waits for evidence, or a file is
missing; 6: the product is being signed already, or the signer is full.

JSON: as ringwall sign, for one release`,
		Example: `  ringwall signer submit edged_4.7.0_amd64.deb --server https://signer.fleet.example:8620 \
      --certificate ci.crt --key ci.key --ca tls-ca.crt --product edged --version 4.7.0 --epoch 12 \
      --evidence evidence --trust base.yaml`,
		Args: exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error { return o.submit(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.server, "server", "", "the signer's `URL`, such as https://127.0.0.1:8620")
	f.StringVar(&o.certificate, "certificate", "", "the client certificate's `FILE`, PEM")
	f.StringVar(&o.key, "key", "", "its key's `FILE`, PEM")
	f.StringVar(&o.ca, "ca", "", "`FILE` of the CA that certified the signer's certificate, PEM")
	f.StringVar(&o.trust, "trust", "", "whom to believe: an authority's `DIR`, or a policy's YAML")
	f.StringVar(&o.product, "product", "", "lower-case `NAME` of what was built")
	f.StringVar(&o.version, "version", "", "its `VERSION` (default: what the package says)")
	f.StringVar(&o.revision, "revision", "", "its source's `REVISION` (default: what the evidence says)")
	f.Uint32Var(&o.epoch, "epoch", 1, "its security version, which only grows")
	f.StringVar(&o.ring, "ring", "", "the furthest `RING` that it may go to (default: the policy's last)")
	f.StringVar(&o.notAfter, "not-after", "", "use by this `TIME` (2031-05-01T12:00:00Z)")
	f.BoolVar(&o.allFiles, "all-files", false, "list data files too, for hosts whose interpreters may open listed files only")
	f.BoolVar(&o.breakglass, "breakglass", false, "sign past the gates, on the approvals among the evidence; raises an alert")
	f.StringArrayVar(&o.evidence, "evidence", nil, "evidence `FILE`, or a directory of *.evidence.json; repeat")
	f.StringVar(&o.out, "out", ".", "write the files into `DIR`")
	f.BoolVar(&o.force, "force", false, "overwrite files that are there already")
	require(c, "server", "certificate", "key", "ca", "product")
	return c
}

func (o *submitOptions) submit(ctx context.Context, e *env, path string) error {
	pems, err := readAll(o.certificate, o.key, o.ca)
	if err != nil {
		return err
	}
	client, err := signer.NewClient(o.server, pems[0], pems[1], pems[2])
	if err != nil {
		return err
	}
	order, err := o.order(e)
	if err != nil {
		return err
	}
	order.Path = path
	answer, err := client.Submit(ctx, order, uploadProgress(e, path))
	if err != nil {
		return explainRefusal(e, fmt.Errorf("submit %s: %w", path, err))
	}
	if o.trust == "" {
		e.notef("the release is not verified (--trust says whom to believe)")
	} else if err := verifyAnswer(answer, o.trust); err != nil {
		return fmt.Errorf("the signer's answer: %w", err)
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // what is published
		return err
	}
	r := signedRelease{Result: answer.Result}
	if err := r.save(o.out, o.force, releaseFiles{answer.Bundle, answer.Catalogue, answer.Names, answer.Kernel}); err != nil {
		return err
	}
	return e.emit(struct {
		Releases []signedRelease `json:"releases"`
	}{[]signedRelease{r}}, r.write)
}

// uploadProgress tells now and then how much is sent, and once that all is.
func uploadProgress(e *env, path string) func(n, of int64) {
	told, done := e.now(), false
	return func(n, of int64) {
		switch now := e.now(); {
		case n == of && !done:
			done = true
			e.notef("%s: %d bytes sent, the signer reads them …", path, of)
		case now.Sub(told) >= progressEvery:
			told = now
			e.notef("%s: %d of %d MiB sent …", path, n>>20, of>>20)
		}
	}
}

// verifyAnswer believes the signer only what hosts will believe it.
func verifyAnswer(a *signer.Answer, trust string) error {
	purpose, verify := pki.PurposeBuild, codesign.VerifyRelease
	if d := a.Result.Decision; d != nil && d.Breakglass {
		purpose, verify = pki.PurposeBreakglass, codesign.VerifyBreakglass
	}
	roots, err := loadRoots(trust, purpose)
	if err != nil {
		return err
	}
	r, c, err := verify(a.Bundle, a.Catalogue, roots)
	if err != nil {
		return err
	}
	if _, err := r.VerifyNames(a.Names, c); err != nil {
		return err
	}
	if err := signer.VerifyKernelSignatures(r, a.Kernel); err != nil {
		return err
	}
	if r.Record.String() != a.Result.Release || r.Product != a.Result.Product || r.Version != a.Result.Version {
		return fmt.Errorf("it describes another release than the record: %w", errs.Untrusted)
	}
	if d := a.Result.Decision; d == nil || d.State != gate.Pass {
		return fmt.Errorf("it does not say that the gates were passed: %w", errs.Untrusted)
	}
	return nil
}
