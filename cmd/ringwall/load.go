package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// The endings of a release's three files, which lie side by side.
const (
	extRelease   = ".release.json"
	extCatalogue = ".cat"
	extNames     = ".names"
	extKernel    = ".kernel.tar" // where there are kernel signatures
	extPolicy    = ".policy.json"
)

// Bounds of the files that a command reads whole.
const (
	maxBundleFile    = 8 << 20
	maxCatalogueFile = 320 << 20
	maxPolicyFile    = 4 << 20
)

// readBounded reads a file of at most limit bytes. A named pipe will do.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes: %w", name, limit, errs.Invalid)
	}
	return b, nil
}

// loadedRelease is a release whose signature, catalogue and names verified.
type loadedRelease struct {
	*codesign.Release
	file      string
	catalogue *codesign.Catalogue
	names     []byte // nam1
	table     *codesign.NameTable
}

func (r *loadedRelease) source() (integrity.Source, error) {
	return codesign.ReleaseSource(r.Release, r.catalogue, r.names)
}

// loadRelease reads NAME.release.json with NAME.cat and NAME.names beside it.
func loadRelease(file string, roots pki.TrustRoots) (*loadedRelease, error) {
	return loadReleaseAs(file, func(record, catalogue []byte) (*codesign.Release, *codesign.Catalogue, error) {
		return codesign.VerifyRelease(record, catalogue, roots)
	})
}

// loadReleaseAs is loadRelease with another way to verify.
func loadReleaseAs(file string, verify func(record, catalogue []byte) (*codesign.Release, *codesign.Catalogue, error)) (*loadedRelease, error) {
	b, err := readRelease(file)
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", file, err)
	}
	r := &loadedRelease{file: file, names: b.Names}
	if r.Release, r.catalogue, err = verify(b.Record, b.Catalogue); err != nil {
		return nil, fmt.Errorf("release %s: %w", file, err)
	}
	if r.table, err = r.VerifyNames(r.names, r.catalogue); err != nil {
		return nil, fmt.Errorf("release %s: %w", file, err)
	}
	return r, nil
}

// loadSources reads releases that a policy trusts, for Compile. A directory
// stands for every release in it. One that does not verify is an error: what
// is asked about would come out wrong without it.
func loadSources(paths []string, p *integrity.Policy) ([]integrity.Source, error) {
	verify := func(record, catalogue []byte) (*codesign.Release, *codesign.Catalogue, error) {
		return codesign.VerifyTrusted(record, catalogue, p)
	}
	var out []integrity.Source
	for _, path := range paths {
		files, _ := filesOf(path, extRelease) // reading says what is wrong with the path
		if len(files) == 0 {
			return nil, fmt.Errorf("releases of %s: no file ends in %s: %w", path, extRelease, errs.NotFound)
		}
		for _, f := range files {
			r, err := loadReleaseAs(f, verify)
			if err != nil {
				return nil, err
			}
			s, err := r.source()
			if err != nil {
				return nil, err
			}
			out = append(out, s)
		}
	}
	return out, nil
}

// filesOf returns the files in a directory whose names end so, sorted; any other
// path stands for itself, with the error if it cannot be looked at.
func filesOf(path, ending string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		return []string{path}, err
	}
	quoted := strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
	return filepath.Glob(filepath.Join(quoted, "*"+ending))
}

// loadPolicy reads a policy as it is written. A signed one is not for this
// function: whoever wants its signature to count verifies it.
func loadPolicy(file string) (*integrity.Policy, error) {
	doc, err := readBounded(file, maxPolicyFile)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if strings.HasSuffix(file, extPolicy) {
		return nil, hint(fmt.Errorf("policy %s is signed, and this command reads the YAML: %w", file, errs.Invalid),
			"get it with: ringwall verify %s --trust … --extract FILE", shown(file))
	}
	return integrity.ParseNamed(file, doc)
}

// loadRoots returns whom to believe: of an authority's directory, or of a
// policy's trust section.
func loadRoots(path string, p pki.Purpose) (pki.TrustRoots, error) {
	st, err := os.Stat(path)
	if err != nil {
		return pki.TrustRoots{}, fmt.Errorf("trust: %w", err)
	}
	if st.IsDir() {
		a, err := pki.LoadCertificates(path)
		if err != nil {
			return pki.TrustRoots{}, err
		}
		return a.Roots(p), nil
	}
	policy, err := loadPolicy(path)
	if err != nil {
		return pki.TrustRoots{}, err
	}
	r := codesign.Roots(policy, p.String())
	if len(r.CAs) == 0 || len(r.TSAs) == 0 {
		return r, fmt.Errorf("policy %s trusts nobody to sign a %v: %w", path, p, errs.Untrusted)
	}
	return r, nil
}

// exists says whether there is a file of that name; it fails closed.
func exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, os.ErrNotExist)
}
