package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

type signOptions struct {
	keys, passphraseFile, identity, out string
	product, version, revision          string
	notAfter, ring                      string
	policy, state, log, tsa, alerts     string
	evidence, notify, kernelSignatures  []string
	kernel                              kernelKeyFlags
	epoch                               uint32
	allFiles, force, breakglass         bool
}

// signedRelease is what was made of one artefact, and where it lies.
type signedRelease struct {
	signer.Result
	Bundle    string `json:"bundle"`
	Catalogue string `json:"catalogue"`
	Names     string `json:"names"`
	Kernel    string `json:"kernel,omitempty"`
}

func newSignCommand(e *env) *cobra.Command {
	var o signOptions
	c := &cobra.Command{
		Use:     "sign PATH... --keys DIR [--release-policy FILE --evidence DIR]",
		GroupID: groupSign,
		Short:   "Sign builds: directories, archives, packages, images",
		Long: `Reads each build to its end, lists what is executable in it (programs, libraries,
scripts, kernel modules, firmware, maintainer scripts) in a catalogue, asks the
product's release policy whether every gate is passed, and signs a release record
over that. Next to each other it writes

  PRODUCT_VERSION.release.json   the signed record, a Sigstore bundle
  PRODUCT_VERSION.cat            the catalogue, which hosts decide by
  PRODUCT_VERSION.names          where each content was found
  PRODUCT_VERSION.kernel.tar     signatures that kernels check, where asked for

A Debian package gives its own product, version and architecture (the files are
then PRODUCT_VERSION_ARCH.*). The record also holds the SHA-256 of the artefact;
for a directory that of its listing, one line a file: path, mode, SHA-256 or
link target.

The gates are those of --release-policy (see ringwall gate --help), a file or a
directory with one for each product; evidence is read from --evidence. Without a
policy anything is signed, which is for trying and not for production: nothing
but the key then stands between a build and the fleet. Where several people
build, ringwall signer serve keeps the key away from them.

Signatures for kernels (fs-verity, IMA, modules, dm-verity roots, IPE policies)
are made in the same run if the release policy says kernel_signatures, with
--kernel-key; the record names the archive that they are in. Of a dm-verity image
(ringwall image build) the record always names the root.

The signer's identity is what policies allow; unless --identity says otherwise
it is spiffe://FLEET.internal/build/main, FLEET being the authority's name. The
epoch is the build's security version: raise it when older builds must stop
running, and deny those below it. With --state an epoch never goes back.

Exit code 1: a gate refused it; 4: a gate waits for evidence, or a file is missing.

JSON: {"releases": [{"product", "version", "epoch", "identity", "release",
"artefact", "sha256", "architecture", "files", "code", "records", "kinds": {KIND:
COUNT}, "decision", "kernel_signatures": {FORM: COUNT}, "bundle", "catalogue",
"names", "kernel"}]}; decision is that of ringwall gate check, and is left out
without a policy`,
		Example: `  ringwall sign edged_4.7.0-1_amd64.deb --keys keys --release-policy edged-release.yaml --evidence evidence
  ringwall sign ./dist --keys keys --product edged --version 4.7.0 --epoch 12 --revision "$(git rev-parse HEAD)"
  ringwall sign *.deb --keys keys --out releases --passphrase-file /run/secrets/pass`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactly("PATH")(c, args)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args) },
	}
	f := c.Flags()
	f.StringVar(&o.keys, "keys", "", "the authority's `DIR`, with the keys build-ca and tsa")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.identity, "identity", "", "who signs, as a `URI` such as spiffe://fleet.example/build/edged")
	f.StringVar(&o.product, "product", "", "lower-case `NAME` of what was built")
	f.StringVar(&o.version, "version", "", "its `VERSION`")
	f.StringVar(&o.revision, "revision", "", "its source's `REVISION`")
	f.Uint32Var(&o.epoch, "epoch", 1, "its security version, which only grows")
	f.BoolVar(&o.allFiles, "all-files", false, "list data files too, for hosts whose interpreters may open listed files only")
	f.StringVar(&o.notAfter, "not-after", "", "use by this `TIME` (2031-05-01T12:00:00Z)")
	f.StringVar(&o.policy, "release-policy", "", "the product's release policy `FILE`, or a directory of them")
	f.StringArrayVar(&o.evidence, "evidence", nil, "evidence `FILE`, or a directory of *.evidence.json; repeat")
	f.StringVar(&o.ring, "ring", "", "the furthest `RING` that it may go to (default: the policy's last)")
	f.BoolVar(&o.breakglass, "breakglass", false, "sign past the gates, on the approvals among the evidence; raises an alert")
	f.StringVar(&o.alerts, "alerts", "", "append alerts to `FILE`; --breakglass needs it")
	f.StringArrayVar(&o.notify, "notify", nil, "`COMMAND` that reads an alert on its standard input; repeat for its arguments")
	f.StringVar(&o.state, "state", "", "keep the highest epoch of each product in `DIR`")
	f.StringVar(&o.log, "log", "", "append the signature to the transparency log in `DIR`")
	f.StringVar(&o.tsa, "tsa", "", "timestamp authority's `URL` (default: the authority's own)")
	f.StringVar(&o.kernel.file, "kernel-key", "", "the key of kernel signatures in `FILE`.key, its certificate in FILE.crt beside it")
	f.StringVar(&o.kernel.passphraseFile, "kernel-passphrase-file", "", "read the passphrase of --kernel-key from `FILE`")
	f.StringSliceVar(&o.kernelSignatures, "kernel-signatures", nil, "without a release policy: make these `FORMS` ("+strings.Join(kernelForms(), ", ")+")")
	f.StringVar(&o.out, "out", ".", "write the files into `DIR`")
	f.BoolVar(&o.force, "force", false, "overwrite files that are there already")
	require(c, "keys")
	complete(c, "kernel-signatures", kernelForms()...)
	_ = c.MarkFlagDirname("keys")
	_ = c.MarkFlagDirname("out")
	return c
}

func kernelForms() []string {
	var out []string
	for _, k := range gate.KernelSignatures() {
		out = append(out, string(k))
	}
	return out
}

// order is what the flags ask for, for one artefact.
func (o *signOptions) order(e *env) (signer.Order, error) {
	r := signer.Order{
		Product: o.product, Version: o.version, Epoch: o.epoch, Revision: o.revision, Ring: o.ring, AllFiles: o.allFiles, Breakglass: o.breakglass,
	}
	if o.notAfter != "" {
		var err error
		if r.NotAfter, err = time.Parse(time.RFC3339, o.notAfter); err != nil {
			return r, usage(fmt.Errorf("--not-after %q: want UTC, such as 2031-05-01T12:00:00Z", o.notAfter))
		}
		if !r.NotAfter.After(e.now()) {
			return r, usage(fmt.Errorf("--not-after %s has passed", o.notAfter))
		}
	}
	for _, k := range o.kernelSignatures {
		if !slices.Contains(kernelForms(), k) {
			return r, usage(fmt.Errorf("--kernel-signatures %q: want some of %s", k, strings.Join(kernelForms(), ", ")))
		}
		r.KernelSignatures = append(r.KernelSignatures, gate.KernelSignature(k))
	}
	var err error
	r.Evidence, err = signer.LoadEvidence(o.evidence)
	return r, err
}

func (o *signOptions) run(ctx context.Context, e *env, paths []string) (err error) {
	switch {
	case len(paths) > 1 && (o.product != "" || o.version != ""):
		return usage(errors.New("--product and --version are for one build, and several are given"))
	case o.policy == "" && (len(o.evidence) > 0 || o.ring != "" || o.breakglass):
		return usage(errors.New("--evidence, --ring and --breakglass need --release-policy"))
	case o.policy != "" && len(o.kernelSignatures) > 0:
		return usage(errors.New("--kernel-signatures is for trying without a release policy; in one, kernel_signatures says which"))
	case o.breakglass && o.alerts == "":
		return usage(errors.New("--breakglass needs --alerts: it is never quiet"))
	}
	order, err := o.order(e)
	if err != nil {
		return err
	}
	s, closeAll, err := o.signer(e) //nolint:contextcheck // the log outlives what it was opened for
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	if o.policy == "" {
		order.Ungated = true
		e.notef("no gates: not for production (--release-policy says what a build must pass)")
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // what is published
		return err
	}
	out := struct {
		Releases []signedRelease `json:"releases"`
	}{Releases: []signedRelease{}}
	var failed error
	for _, p := range paths {
		order.Path = p
		signed, err := s.Sign(ctx, order)
		if err != nil {
			failed = explainRefusal(e, fmt.Errorf("sign %s: %w", p, signHint(err)))
			break
		}
		r := signedRelease{Result: signed.Describe()}
		out.Releases = append(out.Releases, r)
		if failed = out.Releases[len(out.Releases)-1].save(o.out, o.force, releaseFiles{signed.Bundle, signed.Built.Catalogue, signed.Built.Names, signed.KernelArchive()}); failed != nil {
			out.Releases = out.Releases[:len(out.Releases)-1]
			failed = fmt.Errorf("sign %s: %w", p, failed)
			break
		}
	}
	if len(out.Releases) == 0 {
		return failed
	}
	return errors.Join(e.emit(out, func(w io.Writer) {
		for i := range out.Releases {
			out.Releases[i].write(w)
		}
	}), failed)
}

// signer puts the local signer together; closeAll releases what it holds.
func (o *signOptions) signer(e *env) (s *signer.Signer, closeAll func() error, err error) {
	var closers []func() error
	release := func() error {
		var all error
		for _, c := range slices.Backward(closers) {
			all = errors.Join(all, c())
		}
		return all
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, release())
		}
	}()
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return nil, nil, err
	}
	s = &signer.Signer{Issuer: a, Identity: o.identity, Now: e.now, Open: openInput(e)}
	if s.Identity == "" {
		s.Identity = defaultIdentity(a, pki.PurposeBuild)
	}
	s.Volume = measureVolume
	if o.kernel.file != "" {
		k, err := o.kernel.load(e)
		if err != nil {
			return nil, nil, err
		}
		s.Kernel = &signer.KernelKey{Key: k.key, Cert: k.cert}
	}
	if o.policy != "" {
		if s.Policies, err = openPolicies(o.policy); err != nil {
			return nil, nil, err
		}
	}
	if o.state != "" {
		if err := os.MkdirAll(o.state, 0o700); err != nil {
			return nil, nil, err
		}
		unlock, err := lockState(o.state)
		if err != nil {
			return nil, nil, err
		}
		closers = append(closers, unlock)
		s.Epochs = &signer.EpochFile{Path: filepath.Join(o.state, "epochs.json"), Write: host.WriteFile}
	}
	if s.Stamper, err = openStamper(a, o.tsa); err != nil {
		return nil, nil, err
	}
	if o.alerts != "" {
		lines, err := signer.OpenLines(o.alerts)
		if err != nil {
			return nil, nil, err
		}
		closers = append(closers, lines.Close)
		s.Alert = signer.Alerts(lines, o.notify, func(err error) { e.notef("warning: %v", err) })
	}
	log, closeLog, err := openLog(a, o.log)
	if err != nil {
		return nil, nil, err
	}
	s.Log = log
	closers = append(closers, closeLog)
	return s, release, nil
}

// lockState makes sure that no other signer has the directory: two would each
// keep an epoch that the other does not see.
func lockState(dir string) (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("state %s is another signer's at the moment: %w", dir, errs.Conflict), f.Close())
	}
	return f.Close, nil
}

// signHint says what to do about an order that says too little.
func signHint(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errs.Invalid) && strings.Contains(err.Error(), "does not say what it is"):
		return usage(errors.New("it does not say what it is; give --product and --version"))
	case errors.Is(err, errs.Invalid) && strings.Contains(err.Error(), "is executable"):
		return hint(err, "--all-files lists data too")
	}
	return err
}

// releaseFiles are what a signature consists of; kernel may be empty.
type releaseFiles struct{ bundle, catalogue, names, kernel []byte }

// save writes the record last: where it is, the others are.
func (r *signedRelease) save(dir string, force bool, files releaseFiles) error {
	stem := filepath.Join(dir, releaseStem(r.Product, r.Version, r.Architecture))
	r.Bundle, r.Catalogue, r.Names = stem+extRelease, stem+extCatalogue, stem+extNames
	if len(files.kernel) > 0 {
		r.Kernel = stem + extKernel
	}
	for _, f := range r.files() {
		if !force && exists(f) {
			return hint(fmt.Errorf("%s is there already: %w", f, errs.Conflict), "--force overwrites it, --out chooses another directory")
		}
	}
	if r.Kernel != "" {
		if err := host.WriteFile(r.Kernel, files.kernel, 0o644); err != nil {
			return err
		}
	}
	if err := host.WriteFile(r.Catalogue, files.catalogue, 0o644); err != nil {
		return err
	}
	if err := host.WriteFile(r.Names, files.names, 0o644); err != nil {
		return err
	}
	return host.WriteFile(r.Bundle, files.bundle, 0o644)
}

func (r *signedRelease) files() []string {
	out := []string{r.Bundle, r.Catalogue, r.Names}
	if r.Kernel != "" {
		out = append(out, r.Kernel)
	}
	return out
}

// releaseStem is the file name of a release without its ending. What could
// mean something else in a file name is spelt out as in a URL.
func releaseStem(product, version, architecture string) string {
	var b strings.Builder
	for i, part := range []string{product, version, architecture} {
		if part == "" {
			continue
		}
		if i > 0 {
			b.WriteByte('_')
		}
		for _, c := range []byte(part) {
			if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(".+~-", c) >= 0 {
				b.WriteByte(c)
			} else {
				fmt.Fprintf(&b, "%%%02x", c)
			}
		}
	}
	return b.String()
}

func (r *signedRelease) write(w io.Writer) {
	fmt.Fprintf(w, "signed %s %s, epoch %d, as %s\n", r.Product, r.Version, r.Epoch, r.Identity)
	fmt.Fprintf(w, "  %d files, %d of them code:", r.Files, r.Code)
	for _, k := range integrity.Kinds() {
		if n := r.Kinds[k.String()]; n > 0 {
			fmt.Fprintf(w, " %s %d", k, n)
		}
	}
	fmt.Fprintf(w, "\n  release %s\n", r.Release)
	if d := r.Decision; d != nil && d.Breakglass {
		fmt.Fprintf(w, "  BREAK-GLASS, past its gates, in ring %s until %s: %s\n", d.Ring, d.NotAfter.UTC().Format(time.RFC3339), d.Reason)
	} else if d != nil {
		fmt.Fprintf(w, "  %d checks passed, revision %s, for ring %s\n", len(d.Results), d.Revision, d.Ring)
	}
	if n := r.KernelSignatures; n != nil {
		fmt.Fprint(w, "  for kernels:")
		for _, f := range slices.Sorted(maps.Keys(n)) {
			fmt.Fprintf(w, " %s %d", f, n[f])
		}
		fmt.Fprintln(w)
	}
	for _, f := range r.files() {
		fmt.Fprintf(w, "  %s\n", shown(f))
	}
}
