package interop

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// What The Update Framework calls rollback, freeze and mix-and-match, for our
// policies and records. That a host refuses a policy of a lower epoch is tested
// where it does so, in internal/agent (TestApplyPolicy_refuses) and internal/host.

// fleetPolicy trusts the world's authority, with more rules behind.
func (w *world) fleetPolicy(t *testing.T, epoch int, more string) []byte {
	t.Helper()
	indent := func(pem []byte) string {
		return strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n        ")
	}
	return fmt.Appendf(nil, `version: 1
name: base
epoch: %d
mode: enforce
trust:
  authorities:
    - name: builds
      signs: [build]
      certificate: |
        %s
    - name: policies
      signs: [policy]
      certificate: |
        %s
  timestamps:
    - name: time
      certificate: |
        %s
allow:
  - {rule: edged, signer: {authority: builds, identity: %q, product: edged}}
%s`, epoch, indent(pki.EncodeCertificate(w.Issuers[pki.PurposeBuild].Cert)), indent(pki.EncodeCertificate(w.Issuers[pki.PurposePolicy].Cert)),
		indent(pki.EncodeCertificate(w.TSA.Cert)), identity, more)
}

// release is a release of edged with one program.
func (w *world) release(t *testing.T, epoch uint32, program byte) (bundle, catalogue, names []byte, digest integrity.Digest) {
	t.Helper()
	digest = integrity.Digest{program}
	catalogue, err := codesign.EncodeCatalogue([]codesign.Record{{Digest: digest, Kinds: integrity.SetOf(integrity.KindExec)}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := codesign.ParseCatalogue(catalogue)
	if err != nil {
		t.Fatal(err)
	}
	names, err = (&codesign.NameTable{Catalogue: c.Digest(), Names: [][]codesign.Name{{{Path: fmt.Sprintf("bin/edged%d", program), Mode: 0o755}}}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	bundle, err = codesign.SignRelease(s, codesign.ReleaseInfo{Product: "edged", Version: "1.0", Epoch: epoch}, catalogue, names)
	if err != nil {
		t.Fatal(err)
	}
	return bundle, catalogue, names, digest
}

// allowed says whether a policy lets the release's program run, now.
func allowed(t *testing.T, p *integrity.Policy, bundle, catalogue, names []byte, digest integrity.Digest) bool {
	t.Helper()
	r, c, err := codesign.VerifyRelease(bundle, catalogue, codesign.Roots(p, codesign.SignsBuild))
	if err != nil {
		t.Fatal(err)
	}
	source, err := codesign.ReleaseSource(r, c, names)
	if err != nil {
		t.Fatal(err)
	}
	compiled, err := integrity.Compile(p, []integrity.Source{source}, integrity.CompileOptions{Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	o := compiled.Object(integrity.KindExec, integrity.Key{Space: integrity.SpaceSHA256, Digest: digest})
	return compiled.Evaluate(&o, time.Now()).Allow
}

// Freeze: nothing new comes for years, and every certificate runs out. What was
// authorised stays so: metadata that is old never empties the allow set.
func TestFreeze_expiredMetadataKeepsTheAllowSet(t *testing.T) {
	w := newWorld(t)
	long := time.Now().AddDate(-10, 0, 0).Truncate(time.Second)
	w.at = long
	var err error
	if w.Authority, err = pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: func() time.Time { return w.at }}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*pki.Issuer{w.Issuers[pki.PurposeBuild], w.Issuers[pki.PurposePolicy], {Cert: w.TSA.Cert}} {
		if !c.Cert.NotAfter.Before(time.Now()) {
			t.Fatalf("%s has not ended", c.Cert.Subject.CommonName)
		}
	}
	p := w.signedPolicy(t, w.fleetPolicy(t, 7, ""))
	bundle, catalogue, names, digest := w.release(t, 1, 1)
	if !allowed(t, p, bundle, catalogue, names, digest) {
		t.Error("what was authorised ten years ago does not run any more")
	}
}

// signedPolicy signs, verifies and parses a policy.
func (w *world) signedPolicy(t *testing.T, doc []byte) *integrity.Policy {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: "spiffe://fleet.example/policy/ops", Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	b, err := codesign.SignPolicy(s, doc)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := codesign.VerifyPolicy(b, w.Roots(pki.PurposePolicy))
	if err != nil {
		t.Fatal(err)
	}
	p, err := integrity.ParsePolicy(signed.YAML)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Rollback: an old release, well signed and once good, is offered again.
func TestRollback_oldRelease(t *testing.T) {
	w := newWorld(t)
	bundle, catalogue, names, digest := w.release(t, 3, 1)
	r, _, err := codesign.VerifyRelease(bundle, catalogue, w.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		deny string
		want bool
	}{
		"no rule":                       {"", true},
		"its epoch is the least":        {"deny:\n  - {rule: old, product: [{name: edged, below_epoch: 3}]}\n", true},
		"its epoch is too low":          {"deny:\n  - {rule: old, product: [{name: edged, below_epoch: 4}]}\n", false},
		"the release is revoked":        {"deny:\n  - {rule: bad, release: [" + r.Record.String() + "]}\n", false},
		"the content is revoked":        {"deny:\n  - {rule: bad, sha256: [" + digest.String() + "]}\n", false},
		"its certificate is revoked":    {"deny:\n  - {rule: bad, certificate: [{sha256: " + r.CertFingerprint.String() + "}]}\n", false},
		"revoked from before it signed": {"deny:\n  - {rule: bad, certificate: [{sha256: " + r.CertFingerprint.String() + ", from: " + w.at.Add(-time.Hour).UTC().Format(time.RFC3339) + "}]}\n", false},
		"revoked from after it signed":  {"deny:\n  - {rule: bad, certificate: [{sha256: " + r.CertFingerprint.String() + ", from: " + w.at.Add(time.Hour).UTC().Format(time.RFC3339) + "}]}\n", true},
	} {
		if got := allowed(t, w.signedPolicy(t, w.fleetPolicy(t, 7, c.deny)), bundle, catalogue, names, digest); got != c.want {
			t.Errorf("%s: runs %v, want %v", name, got, c.want)
		}
	}
}

// Mix and match: parts of two releases, each well signed, are put together.
func TestMixAndMatch(t *testing.T) {
	w := newWorld(t)
	one, _, namesOne, _ := w.release(t, 1, 1)
	two, catalogueTwo, _, _ := w.release(t, 2, 2)
	roots := w.Roots(pki.PurposeBuild)
	if _, _, err := codesign.VerifyRelease(one, catalogueTwo, roots); !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.Invalid) {
		t.Errorf("record of one, catalogue of the other: %v", err)
	}
	r, c, err := codesign.VerifyRelease(two, catalogueTwo, roots)
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(namesOne) == [32]byte(r.Names) {
		t.Fatal("the two have one name table")
	}
	if _, err := r.VerifyNames(namesOne, c); !errors.Is(err, errs.Untrusted) {
		t.Errorf("names of one, record of the other: %v", err)
	}
}
