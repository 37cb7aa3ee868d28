package codesign

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// What a policy's trust section says that an authority signs.
const (
	SignsBuild      = "build"      // release records
	SignsPolicy     = "policy"     // policies
	SignsSupplement = "supplement" // supplemental policies
	SignsPermit     = "permit"     // break-glass permits
	SignsBreakglass = "breakglass" // release records of builds past their gates
)

// Roots returns whom a policy trusts to sign one sort of document. Nobody is a
// valid answer: then nothing verifies. A revoked certificate does not keep a
// release from being verified: the evaluator denies it, with the rule's name.
func Roots(p *integrity.Policy, signs string) pki.TrustRoots {
	var r pki.TrustRoots
	if signs != SignsBuild && signs != SignsBreakglass {
		r.Revoked = p.Revoked()
	}
	t := &p.Trust
	for _, a := range t.Authorities {
		if slices.Contains(a.Signs, signs) {
			r.CAs = append(r.CAs, pki.Anchor{Name: a.Name, Cert: a.Certificate})
		}
	}
	for _, s := range t.Timestamps {
		r.TSAs = append(r.TSAs, pki.Anchor{Name: s.Name, Cert: s.Certificate})
	}
	if signs != SignsPermit { // break-glass must work while the log does not; its use is an alert
		r.Logs = t.Logs
	}
	return r
}

// VerifyTrusted verifies a release as a policy trusts it: by an authority that
// it trusts for builds or, for a release past its gates, by one that it trusts
// for break-glass. Trusting the first never means trusting the second.
func VerifyTrusted(bundle, catalogue []byte, p *integrity.Policy) (*Release, *Catalogue, error) {
	r, c, err := VerifyRelease(bundle, catalogue, Roots(p, SignsBuild))
	if err == nil {
		return r, c, nil
	}
	roots := Roots(p, SignsBreakglass)
	if len(roots.CAs) == 0 {
		return nil, nil, err
	}
	r, c, glass := VerifyBreakglass(bundle, catalogue, roots)
	if glass != nil {
		return nil, nil, err // what is wrong with it as an ordinary release says more
	}
	return r, c, nil
}

// VerifyNames checks that a name table is the one that was signed.
func (r *Release) VerifyNames(blob []byte, c *Catalogue) (*NameTable, error) {
	if got := integrity.Digest(sha256.Sum256(blob)); got != r.Names {
		return nil, fmt.Errorf("name table is %v, the record is about %v: %w", got, r.Names, errs.Untrusted)
	}
	return ParseNames(blob, c)
}

// ReleaseSource is a verified release as a policy is compiled with it. The name
// table is checked against the record. It is required, since what makes a
// program an interpreter, and so restricts it, goes by names.
func ReleaseSource(r *Release, c *Catalogue, names []byte) (integrity.Source, error) {
	t, err := r.VerifyNames(names, c)
	if err != nil {
		return integrity.Source{}, fmt.Errorf("release %s %s: %w", r.Product, r.Version, err)
	}
	end := time.Time{}
	if r.Breakglass != "" {
		end = r.NotAfter
	}
	return sourceOf(integrity.Origin{
		NotAfter: end,
		Release:  r.Record, Authority: r.CA, Identity: r.Identity,
		Certificates: [3]integrity.Digest{r.CertFingerprint, r.CAFingerprint, r.TSAFingerprint},
		SignedAt:     r.SignedAt, Product: r.Product, Epoch: r.Epoch, Version: r.Version,
	}, c, t), nil
}

// CatalogueSource is the catalogue of something that the caller has verified
// by other means, such as a package of an archive. The name table must belong
// to the catalogue; whether it is genuine is the caller's to know.
func CatalogueSource(o integrity.Origin, c *Catalogue, names []byte) (integrity.Source, error) {
	t, err := ParseNames(names, c)
	if err != nil {
		return integrity.Source{}, fmt.Errorf("package %s %s: %w", o.Package, o.Version, err)
	}
	return sourceOf(o, c, t), nil
}

func sourceOf(o integrity.Origin, c *Catalogue, t *NameTable) integrity.Source {
	return integrity.Source{Origin: o, Files: func(yield func(integrity.File) bool) {
		var paths []string // reused: Compile copies
		for i, rec := range c.All() {
			paths = paths[:0]
			for _, n := range t.Names[i] {
				paths = append(paths, n.Path)
			}
			if !yield(integrity.File{SHA256: rec.Digest, Verity: rec.Verity, Kinds: rec.Kinds, Names: paths, Data: rec.Flags&FlagData != 0}) {
				return
			}
		}
	}}
}
