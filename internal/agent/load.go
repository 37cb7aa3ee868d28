package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// loaded is a policy with everything that it authorises, ready for the kernel.
type loaded struct {
	bundle   []byte
	signed   *codesign.SignedPolicy
	policy   *integrity.Policy // with its supplements
	compiled *integrity.Compiled
	sources  int
	// given is the manifest that it came with, own whether with this very policy; nil: none.
	given *bundle
	own   bool
	items []codesign.Item
	local int // releases that were handed in on the host itself
	// scripts are the paths of the packages' scripts, for kernels on which they
	// must be measured.
	scripts []string
	// python is what packages say of Python's sources and of Python itself, by path.
	python map[string][]moduleSource
	// modules is the byte code that the agent made of them, by path.
	modules map[string]module
	// skipped is what lies in the state directory and is not believed. It
	// authorises nothing: this fails closed.
	skipped []Skipped
}

// Skipped is a stored document that is not believed.
type Skipped struct {
	What string `json:"what"`
	Why  string `json:"why"`

	given bool // by a manifest, which then is not taken
}

// believe verifies and reads a policy that an authority of this host signed.
func (s *State) believe(bundle []byte) (*integrity.Policy, *codesign.SignedPolicy, error) {
	roots, err := s.anchor.roots()
	if err != nil {
		return nil, nil, err
	}
	return verifyPolicy(bundle, roots)
}

func verifyPolicy(bundle []byte, roots pki.TrustRoots) (*integrity.Policy, *codesign.SignedPolicy, error) {
	signed, err := codesign.VerifyPolicy(bundle, roots)
	if err != nil {
		return nil, nil, err
	}
	p, err := integrity.ParsePolicy(signed.YAML)
	return p, signed, err
}

// load verifies a signed policy and compiles it with all that is stored, with
// what the host adds to it, and with byte code that was made of what it
// authorises.
func (s *State) load(bundle []byte, o integrity.CompileOptions, made map[string]module) (*loaded, error) {
	l := &loaded{bundle: bundle, python: map[string][]moduleSource{}}
	base, signed, err := s.believe(bundle)
	if err != nil {
		return nil, err
	}
	l.signed = signed
	if base.Supplements != "" {
		return nil, fmt.Errorf("policy %s adds to %s: apply it as a supplement: %w", base.Name, base.Supplements, errs.Invalid)
	}
	// The next start believes whom this policy trusts, and has to believe this policy.
	if _, err := codesign.VerifyPolicy(bundle, codesign.Roots(base, codesign.SignsPolicy)); err != nil {
		return nil, fmt.Errorf("policy %s does not trust its own signer: to change authorities, trust the old and the new one in one epoch, and sign the next with the new one: %w", base.Name, err)
	}
	l.given, l.own = s.bundleOf(bundle)
	l.items = s.items(l)
	if l.policy, err = s.withSupplements(base, l); err != nil {
		return nil, err
	}
	sources, err := s.sources(l)
	if err != nil {
		return nil, err
	}
	l.sources = len(sources)
	l.compiled, err = integrity.Compile(l.policy, append(sources, moduleSources(made)...), o)
	if err != nil {
		return nil, fmt.Errorf("compile policy %s: %w", base.Name, err)
	}
	if l.keepModules(made) { // rare: a package went, or a source was denied
		return s.load(bundle, o, l.modules)
	}
	return l, nil
}

func (s *State) withSupplements(base *integrity.Policy, l *loaded) (*integrity.Policy, error) {
	names, err := s.stored(dirSupps, ".policy.json")
	if err != nil {
		return nil, err
	}
	roots := codesign.Roots(base, codesign.SignsSupplement)
	var supps []*integrity.Policy
	for _, n := range names {
		p, err := s.supplement(n, roots, base.Name)
		if err != nil {
			l.skip("supplement "+n, err)
			continue
		}
		supps = append(supps, p)
	}
	if supps = s.givenSupplements(l, base, roots, supps); len(supps) == 0 {
		return base, nil
	}
	p, err := integrity.Join(base, supps...)
	if err != nil {
		return nil, fmt.Errorf("join supplements: %w", err)
	}
	return p, nil
}

func (s *State) supplement(name string, roots pki.TrustRoots, base string) (*integrity.Policy, error) {
	b, err := readFile(s.path(dirSupps, name+".policy.json"), maxBundle)
	if err != nil {
		return nil, err
	}
	return verifySupplement(b, roots, base)
}

func verifySupplement(bundle []byte, roots pki.TrustRoots, base string) (*integrity.Policy, error) {
	p, _, err := verifyPolicy(bundle, roots)
	if err != nil {
		return nil, err
	}
	if p.Supplements != base {
		return nil, fmt.Errorf("policy %s adds to %q, this host has %q: %w", p.Name, p.Supplements, base, errs.Invalid)
	}
	return p, nil
}

func (l *loaded) skip(what string, err error) {
	l.skipped = append(l.skipped, Skipped{What: what, Why: err.Error()})
}

func (l *loaded) skipGiven(what string, err error) {
	l.skipped = append(l.skipped, Skipped{What: what, Why: err.Error(), given: true})
}

// sources are all releases that verify against the policy's trust, and all
// packages of archives that it still trusts.
func (s *State) sources(l *loaded) ([]integrity.Source, error) {
	var out []integrity.Source
	records, err := s.stored(dirReleases, ".release.json")
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		src, err := s.release(r, l.policy)
		if err != nil {
			l.skip("release "+r, err)
			continue
		}
		out = append(out, src)
	}
	l.local = len(out)
	out = s.givenSources(l, out)
	debs, err := s.stored(dirPackages, ".json")
	if err != nil {
		return nil, err
	}
	for _, d := range debs {
		src, err := s.packageSource(d, l.policy.Trust)
		if err != nil {
			l.skip("package "+d, err)
			continue
		}
		out = append(out, l.note(src))
	}
	return out, nil
}

// note remembers where a package's scripts lie, as they pass.
func (l *loaded) note(src integrity.Source) integrity.Source {
	files := src.Files
	src.Files = func(yield func(integrity.File) bool) {
		for f := range files {
			if f.Kinds.Has(integrity.KindScript) && !f.Data {
				for _, n := range f.Names {
					l.scripts = append(l.scripts, "/"+n)
				}
			}
			l.notePython(&f, src.Origin)
			if !yield(f) {
				return
			}
		}
	}
	return src
}

func (s *State) release(record string, p *integrity.Policy) (integrity.Source, error) {
	files, err := s.read(dirReleases, record, ".release.json", ".cat", ".names")
	if err != nil {
		return integrity.Source{}, err
	}
	r, c, err := codesign.VerifyTrusted(files[0], files[1], p)
	if err != nil {
		return integrity.Source{}, err
	}
	return codesign.ReleaseSource(r, c, files[2])
}

// addRelease stores a release that verifies against the trust given, and
// returns it. One that is stored already changes nothing.
func (s *State) addRelease(bundle, catalogue, names []byte, p *integrity.Policy) (*codesign.Release, error) {
	r, c, err := codesign.VerifyTrusted(bundle, catalogue, p)
	if err != nil {
		return nil, err
	}
	if _, err := codesign.ReleaseSource(r, c, names); err != nil {
		return nil, err
	}
	err = s.put(dirReleases, r.Record.String(), map[string][]byte{".release.json": bundle, ".cat": catalogue, ".names": names}, ".release.json")
	if err != nil {
		return nil, fmt.Errorf("store release %s %s: %w", r.Product, r.Version, err)
	}
	return r, nil
}

// read reads the files of one stored entry, in the order of the endings.
func (s *State) read(dir, stem string, endings ...string) ([][]byte, error) {
	out := make([][]byte, len(endings))
	for i, e := range endings {
		var err error
		if out[i], err = readFile(s.path(dir, stem+e), maxCatalogue); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// storedPackage is a package whose archive's signature chain was verified.
// Catalogue and Names are the SHA-256 of the files beside it.
type storedPackage struct {
	Archive      string           `json:"archive"` // name in the policy's trust
	Suite        string           `json:"suite"`
	Package      string           `json:"package"`
	Version      string           `json:"version"`
	Architecture string           `json:"architecture"`
	Deb          integrity.Digest `json:"-"`
	Catalogue    string           `json:"catalogue"`
	Names        string           `json:"names"`
	Added        int64            `json:"added"` // Unix seconds
}

func (s *State) packageRecord(deb string) (*storedPackage, error) {
	b, err := readFile(s.path(dirPackages, deb+".json"), maxAnchor)
	if err != nil {
		return nil, err
	}
	p := &storedPackage{}
	if err := pki.UnmarshalStrict(b, p, maxAnchor); err != nil {
		return nil, err
	}
	p.Deb, err = integrity.ParseDigest(deb)
	return p, err
}

func (s *State) packageSource(deb string, t integrity.Trust) (integrity.Source, error) {
	var none integrity.Source
	p, err := s.packageRecord(deb)
	if err != nil {
		return none, err
	}
	if !slices.ContainsFunc(t.Archives, func(a integrity.Archive) bool { return a.Name == p.Archive }) {
		return none, fmt.Errorf("archive %q is not trusted by the policy: %w", p.Archive, errs.Untrusted)
	}
	files, err := s.read(dirPackages, deb, ".cat", ".names")
	if err != nil {
		return none, err
	}
	for i, want := range []string{p.Catalogue, p.Names} {
		if got := integrity.Digest(sha256.Sum256(files[i])); got.String() != want {
			return none, fmt.Errorf("%s of package %s is damaged: %w", []string{"catalogue", "names"}[i], p.Package, errs.Untrusted)
		}
	}
	c, err := codesign.ParseCatalogue(files[0])
	if err != nil {
		return none, err
	}
	return codesign.CatalogueSource(integrity.Origin{Archive: p.Archive, Package: p.Package, Version: p.Version}, c, files[1])
}

func (s *State) addPackage(p *storedPackage, catalogue, names []byte) error {
	cat, nam := integrity.Digest(sha256.Sum256(catalogue)), integrity.Digest(sha256.Sum256(names))
	p.Catalogue, p.Names = cat.String(), nam.String()
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return s.put(dirPackages, p.Deb.String(), map[string][]byte{".json": b, ".cat": catalogue, ".names": names}, ".json")
}

// supplementName is the file stem of a supplemental policy.
func supplementName(policy string) (string, error) {
	if policy == "" || len(policy) > 64 || strings.ContainsAny(policy, "/\x00") || policy[0] == '.' {
		return "", fmt.Errorf("policy name %q: %w", policy, errs.Invalid)
	}
	return policy, nil
}

// addSupplement stores a supplemental policy of the policy in force. A lower
// epoch than the stored one of that name is refused.
func (s *State) addSupplement(bundle []byte, base *integrity.Policy) (*integrity.Policy, error) {
	p, err := verifySupplement(bundle, codesign.Roots(base, codesign.SignsSupplement), base.Name)
	if err != nil {
		return nil, err
	}
	name, err := supplementName(p.Name)
	if err != nil {
		return nil, err
	}
	old, err := readFile(s.path(dirSupps, name+".policy.json"), maxBundle)
	switch {
	case errors.Is(err, errs.NotFound):
	case err != nil:
		return nil, err
	case bytes.Equal(old, bundle):
		return p, nil
	default:
		was, err := verifySupplement(old, codesign.Roots(base, codesign.SignsSupplement), base.Name)
		if err == nil && was.Epoch >= p.Epoch {
			return nil, fmt.Errorf("supplement %s has epoch %d, epoch %d is in force: %w", name, p.Epoch, was.Epoch, errs.Conflict)
		}
	}
	return p, host.WriteFile(s.path(dirSupps, name+".policy.json"), bundle, 0o600)
}
