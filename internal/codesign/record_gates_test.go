package codesign_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func gated() codesign.ReleaseInfo {
	in := info()
	in.Policy, in.Ring = digest(7), "prod"
	return in
}

func broken() codesign.ReleaseInfo {
	in := gated()
	in.Ring, in.Breakglass = "canary", "INC-4711: vendor hotfix"
	in.Gates = append(in.Gates, codesign.Gate{Name: "breakglass", Attester: "https://ci.example/bob", Evidence: digest(6), At: signedAt()})
	in.NotAfter = signedAt().Add(4 * time.Hour)
	return in
}

func TestRelease_gating(t *testing.T) {
	a := authority(t)
	for name, tc := range map[string]struct {
		info    codesign.ReleaseInfo
		purpose pki.Purpose
		verify  func(bundle, catalogue []byte, roots pki.TrustRoots) (*codesign.Release, *codesign.Catalogue, error)
		other   func(bundle, catalogue []byte, roots pki.TrustRoots) (*codesign.Release, *codesign.Catalogue, error)
	}{
		"gated":       {gated(), pki.PurposeBuild, codesign.VerifyRelease, codesign.VerifyBreakglass},
		"break-glass": {broken(), pki.PurposeBreakglass, codesign.VerifyBreakglass, codesign.VerifyRelease},
	} {
		b, err := codesign.SignRelease(signer(t, a, tc.purpose), tc.info, blob(t, 3), []byte("names"))
		if err != nil {
			t.Fatal(err)
		}
		r, _, err := tc.verify(b, blob(t, 3), a.Roots(tc.purpose))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(tc.info, r.ReleaseInfo); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		// neither can pass for the other, whoever's CA is believed
		all := a.Roots(pki.PurposeBuild)
		all.CAs = append(all.CAs, a.Roots(pki.PurposeBreakglass).CAs...)
		if _, _, err := tc.other(b, blob(t, 3), all); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s, verified as the other: %v", name, err)
		}
	}
}

// A policy that trusts an authority for builds does not believe a release past
// its gates; one that names break-glass does, and knows when it ends.
func TestVerifyTrusted(t *testing.T) {
	a := authority(t)
	names := []byte("names")
	glass, err := codesign.SignRelease(signer(t, a, pki.PurposeBreakglass), broken(), blob(t, 3), names)
	if err != nil {
		t.Fatal(err)
	}
	build, err := codesign.SignRelease(signer(t, a, pki.PurposeBuild), gated(), blob(t, 3), names)
	if err != nil {
		t.Fatal(err)
	}
	p := &integrity.Policy{Trust: integrity.Trust{
		Authorities: []integrity.Authority{{Name: "builds", Signs: []string{codesign.SignsBuild}, Certificate: a.Issuers[pki.PurposeBuild].Cert}},
		Timestamps:  []integrity.Timestamp{{Name: "clock", Certificate: a.TSA.Cert}},
	}}
	if _, _, err := codesign.VerifyTrusted(build, blob(t, 3), p); err != nil {
		t.Error(err)
	}
	if _, _, err := codesign.VerifyTrusted(glass, blob(t, 3), p); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a policy that does not name break-glass: %v", err)
	}
	p.Trust.Authorities = append(p.Trust.Authorities, integrity.Authority{Name: "glass", Signs: []string{codesign.SignsBreakglass}, Certificate: a.Issuers[pki.PurposeBreakglass].Cert})
	r, _, err := codesign.VerifyTrusted(glass, blob(t, 3), p)
	if err != nil || r.CA != "glass" || r.Breakglass == "" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, _, err := codesign.VerifyTrusted(build, blob(t, 3), p); err != nil {
		t.Error(err)
	}
}

func TestSignRelease_breakglassIsComplete(t *testing.T) {
	a := authority(t)
	glass, build := signer(t, a, pki.PurposeBreakglass), signer(t, a, pki.PurposeBuild)
	for name, tc := range map[string]struct {
		s    *pki.Signer
		edit func(*codesign.ReleaseInfo)
	}{
		"a build certificate":        {build, func(*codesign.ReleaseInfo) {}},
		"no reason":                  {glass, func(in *codesign.ReleaseInfo) { in.Breakglass = "" }},
		"a reason that hides":        {glass, func(in *codesign.ReleaseInfo) { in.Breakglass = "a\u202eb" }},
		"a long reason":              {glass, func(in *codesign.ReleaseInfo) { in.Breakglass = strings.Repeat("a", 5000) }},
		"no end":                     {glass, func(in *codesign.ReleaseInfo) { in.NotAfter = time.Time{} }},
		"no ring":                    {glass, func(in *codesign.ReleaseInfo) { in.Ring = "" }},
		"no policy":                  {glass, func(in *codesign.ReleaseInfo) { in.Policy = [32]byte{} }},
		"one approval":               {glass, func(in *codesign.ReleaseInfo) { in.Gates = in.Gates[:1] }},
		"a ring that is not a name":  {build, func(in *codesign.ReleaseInfo) { *in = gated(); in.Ring = "a\nb" }},
		"break-glass without reason": {glass, func(in *codesign.ReleaseInfo) { *in = gated() }},
	} {
		in := broken()
		tc.edit(&in)
		if _, err := codesign.SignRelease(tc.s, in, blob(t, 3), []byte("names")); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
