package codesign_test

import (
	"errors"
	"slices"
	"testing"
	"testing/fstest"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func TestRoots_bySort(t *testing.T) {
	a := authority(t)
	build, policy := a.Issuers[pki.PurposeBuild].Cert, a.Issuers[pki.PurposePolicy].Cert
	stolen := pki.Revocation{Fingerprint: pki.Fingerprint(policy)}
	p := &integrity.Policy{Deny: []integrity.DenyRule{{Certificates: []integrity.Revocation{{Certificate: stolen.Fingerprint}}}}, Trust: integrity.Trust{
		Authorities: []integrity.Authority{
			{Name: "builds", Signs: []string{codesign.SignsBuild}, Certificate: build},
			{Name: "policies", Signs: []string{codesign.SignsPolicy, codesign.SignsSupplement}, Certificate: policy},
		},
		Timestamps: []integrity.Timestamp{{Name: "clock", Certificate: a.TSA.Cert}},
	}}
	for sort, want := range map[string]string{
		codesign.SignsBuild: "builds", codesign.SignsPolicy: "policies", codesign.SignsSupplement: "policies", codesign.SignsPermit: "",
	} {
		r := codesign.Roots(p, sort)
		got := ""
		if len(r.CAs) == 1 {
			got = r.CAs[0].Name
		}
		if got != want || len(r.CAs) > 1 || len(r.TSAs) != 1 {
			t.Errorf("%s: %+v, want authority %q and the timestamp authority", sort, r, want)
		}
		if revoked := slices.Contains(r.Revoked, stolen); revoked == (sort == codesign.SignsBuild) {
			t.Errorf("%s: the revocation is given to the verifier: %v; of a release the evaluator judges", sort, revoked)
		}
	}
}

func TestReleaseSource_namesAndTampering(t *testing.T) {
	a := authority(t)
	b, err := codesign.Build(codesign.DirSource(fstest.MapFS{
		"bin/a": {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
		"bin/b": {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
	}), codesign.Options{})
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := codesign.SignRelease(signer(t, a, pki.PurposeBuild), info(), b.Catalogue, b.Names)
	if err != nil {
		t.Fatal(err)
	}
	r, c, err := codesign.VerifyRelease(bundle, b.Catalogue, a.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	src, err := codesign.ReleaseSource(r, c, b.Names)
	if err != nil {
		t.Fatal(err)
	}
	if o := src.Origin; o.Release != r.Record || o.Authority != "Fleet build CA" || o.Product != "edged" || o.Epoch != 12 || o.Package != "" {
		t.Errorf("origin %+v", o)
	}
	n := 0
	for f := range src.Files {
		if n++; len(f.Names) != 2 || f.Names[0] != "bin/a" || f.Names[1] != "bin/b" || !f.Kinds.Has(integrity.KindScript) || f.Verity.IsZero() {
			t.Errorf("%+v", f)
		}
	}
	if n != 1 {
		t.Errorf("%d files, want 1", n)
	}

	// The same catalogue with another name: well formed, but not what was signed.
	table, err := codesign.ParseNames(b.Names, c)
	if err != nil {
		t.Fatal(err)
	}
	table.Names[0] = table.Names[0][:1]
	other, err := table.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for what, names := range map[string][]byte{"fewer names": other, "no names": nil} {
		if _, err := codesign.ReleaseSource(r, c, names); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v, want untrusted", what, err)
		}
	}
	src, err = codesign.CatalogueSource(integrity.Origin{Archive: "debian", Package: "p"}, c, other)
	if err != nil || src.Origin.Package != "p" {
		t.Errorf("%+v, %v", src.Origin, err)
	}
	if _, err := codesign.CatalogueSource(integrity.Origin{}, c, []byte("x")); !errors.Is(err, errs.Invalid) {
		t.Errorf("malformed names: %v", err)
	}
}
