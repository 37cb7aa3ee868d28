package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

type signOptions struct {
	keys, passphraseFile, identity, out string
	product, version, revision          string
	notAfter                            string
	epoch                               uint32
	allFiles, force                     bool
}

// signedRelease is what `ringwall sign` made of one artefact.
type signedRelease struct {
	Product   string         `json:"product"`
	Version   string         `json:"version"`
	Epoch     uint32         `json:"epoch"`
	Identity  string         `json:"identity"`
	Release   string         `json:"release"` // SHA-256 of the statement: how rules name this release
	Artefact  string         `json:"artefact"`
	SHA256    string         `json:"sha256"` // of the file, or of the listing of a directory
	Files     int            `json:"files"`  // regular files read
	Code      int            `json:"code"`   // of them, those that are code
	Records   int            `json:"records"`
	Kinds     map[string]int `json:"kinds"`
	Bundle    string         `json:"bundle"`
	Catalogue string         `json:"catalogue"`
	Names     string         `json:"names"`
}

func newSignCommand(e *env) *cobra.Command {
	var o signOptions
	c := &cobra.Command{
		Use:     "sign PATH... --keys DIR",
		GroupID: groupSign,
		Short:   "Sign builds: directories, tar archives, Debian packages",
		Long: `Reads each build to its end, lists what is executable in it (programs, libraries,
scripts, kernel modules, firmware, maintainer scripts) in a catalogue, and signs
a release record over that. Next to each other it writes

  PRODUCT_VERSION.release.json   the signed record, a Sigstore bundle
  PRODUCT_VERSION.cat            the catalogue, which hosts decide by
  PRODUCT_VERSION.names          where each content was found

A Debian package gives its own product, version and architecture (the files are
then PRODUCT_VERSION_ARCH.*). The record also holds the SHA-256 of the artefact;
for a directory that of its listing, one line a file: path, mode, SHA-256 or
link target.

The signer's identity is what policies allow; unless --identity says otherwise
it is spiffe://FLEET.internal/build/main, FLEET being the authority's name. The
epoch is the build's security version: raise it when older builds must stop
running, and deny those below it.

JSON: {"releases": [{"product", "version", "epoch", "identity", "release",
"artefact", "sha256", "files", "code", "records", "kinds": {KIND: COUNT},
"bundle", "catalogue", "names"}]}`,
		Example: `  ringwall sign edged_4.7.0-1_amd64.deb --keys keys
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
	f.StringVar(&o.out, "out", ".", "write the files into `DIR`")
	f.BoolVar(&o.force, "force", false, "overwrite files that are there already")
	require(c, "keys")
	_ = c.MarkFlagDirname("keys")
	_ = c.MarkFlagDirname("out")
	return c
}

func (o *signOptions) run(ctx context.Context, e *env, paths []string) error {
	if len(paths) > 1 && (o.product != "" || o.version != "") {
		return usage(errors.New("--product and --version are for one build, and several are given"))
	}
	var notAfter time.Time
	if o.notAfter != "" {
		var err error
		if notAfter, err = time.Parse(time.RFC3339, o.notAfter); err != nil {
			return usage(fmt.Errorf("--not-after %q: want UTC, such as 2031-05-01T12:00:00Z", o.notAfter))
		}
		if !notAfter.After(e.now()) {
			return usage(fmt.Errorf("--not-after %s has passed", o.notAfter))
		}
	}
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return err
	}
	if o.identity == "" {
		o.identity = defaultIdentity(a, pki.PurposeBuild)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: o.identity, Now: e.now()})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // what is published
		return err
	}
	out := struct {
		Releases []signedRelease `json:"releases"`
	}{Releases: []signedRelease{}}
	var failed error
	for _, p := range paths {
		r, err := o.one(ctx, e, a, s, p, notAfter)
		if err != nil {
			failed = fmt.Errorf("sign %s: %w", p, err)
			break
		}
		out.Releases = append(out.Releases, *r)
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

// one signs one build.
func (o *signOptions) one(ctx context.Context, e *env, a *pki.Authority, s *pki.Signer, path string, notAfter time.Time) (*signedRelease, error) {
	src, err := openArtefact(ctx, e, path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	b, err := codesign.Build(src, codesign.Options{AllFiles: o.allFiles})
	if err != nil {
		return nil, err
	}
	digest := src.digest()
	info := codesign.ReleaseInfo{
		Product: o.product, Version: o.version, Epoch: o.epoch, Revision: o.revision, NotAfter: notAfter,
		Artefacts: []codesign.Artefact{{Name: src.name(), Digest: digest}},
	}
	architecture := ""
	if d, ok := src.deb(); ok {
		architecture = d.Architecture
		if info.Product == "" {
			info.Product = d.Package
		}
		if info.Version == "" {
			info.Version = d.Version
		}
	}
	if info.Product == "" || info.Version == "" {
		return nil, usage(errors.New("it does not say what it is; give --product and --version"))
	}
	if b.Records == 0 {
		return nil, hint(fmt.Errorf("nothing in it is executable: %w", errs.Invalid), "--all-files lists data too")
	}
	bundle, err := codesign.SignRelease(s, info, b.Catalogue, b.Names)
	if err != nil {
		return nil, err
	}
	// What hosts would not believe must not leave this machine.
	r, _, err := codesign.VerifyRelease(bundle, b.Catalogue, a.Roots(pki.PurposeBuild))
	if err != nil {
		return nil, err
	}
	out := &signedRelease{
		Product: r.Product, Version: r.Version, Epoch: r.Epoch, Identity: r.Identity, Release: r.Record.String(),
		Artefact: src.name(), SHA256: digest.String(), Files: b.Files, Code: b.Code, Records: b.Records, Kinds: map[string]int{},
	}
	for k, n := range b.Kinds {
		out.Kinds[k.String()] = n
	}
	stem := filepath.Join(o.out, releaseStem(r.Product, r.Version, architecture))
	out.Bundle, out.Catalogue, out.Names = stem+extRelease, stem+extCatalogue, stem+extNames
	return out, o.save(out, bundle, b)
}

// save writes the record last: where it is, the other two are.
func (o *signOptions) save(r *signedRelease, bundle []byte, b *codesign.Built) error {
	for _, f := range []string{r.Bundle, r.Catalogue, r.Names} {
		if !o.force && exists(f) {
			return hint(fmt.Errorf("%s is there already: %w", f, errs.Conflict), "--force overwrites it, --out chooses another directory")
		}
	}
	if err := host.WriteFile(r.Catalogue, b.Catalogue, 0o644); err != nil {
		return err
	}
	if err := host.WriteFile(r.Names, b.Names, 0o644); err != nil {
		return err
	}
	return host.WriteFile(r.Bundle, bundle, 0o644)
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
	for _, f := range []string{r.Bundle, r.Catalogue, r.Names} {
		fmt.Fprintf(w, "  %s\n", shown(f))
	}
}
