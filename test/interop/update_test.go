package interop

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// TestUpdateAttacks has the attacks of The Update Framework's list (TUF 1.0,
// section 1.5.2) that the tests beside it do not; docs/design/release-record.md,
// section 13, has the whole list with its tests.
func TestUpdateAttacks(t *testing.T) {
	w := newWorld(t)
	bundle, catalogue, names, digest := w.release(t, 3, 1)
	for name, attack := range map[string]func(t *testing.T){
		"arbitrary software, wrong key: another fleet's signature": func(t *testing.T) {
			other := newWorld(t)
			b, c, _, _ := other.release(t, 9, 7)
			refused(t, release(b, c, w.Roots(pki.PurposeBuild)))
			s := other.signer(t, pki.PurposePolicy)
			p, err := codesign.SignPolicy(s, w.fleetPolicy(t, 9, ""))
			if err != nil {
				t.Fatal(err)
			}
			_, err = codesign.VerifyPolicy(p, w.Roots(pki.PurposePolicy))
			refused(t, err)
		},
		"wrong key for the role: the build key signs a policy, the policy key a release": func(t *testing.T) {
			build, policy := w.signer(t, pki.PurposeBuild), w.signer(t, pki.PurposePolicy)
			if _, err := codesign.SignPolicy(build, w.fleetPolicy(t, 9, "")); !errors.Is(err, errs.Invalid) {
				t.Errorf("our own signer: %v", err)
			}
			// as somebody would who has the key and not our signer
			p, err := build.Sign("application/vnd.ringwall.policy+yaml", w.fleetPolicy(t, 9, ""))
			if err != nil {
				t.Fatal(err)
			}
			_, err = codesign.VerifyPolicy(p, w.Roots(pki.PurposePolicy))
			refused(t, err)
			b, err := policy.Sign("application/vnd.in-toto+json", []byte(`{}`))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, release(b, catalogue, w.Roots(pki.PurposeBuild)))
		},
		"fast-forward: a release with the highest epoch takes nothing from the others": func(t *testing.T) {
			last, lastCatalogue, lastNames, lastDigest := w.release(t, math.MaxUint32, 8)
			p := w.signedPolicy(t, w.fleetPolicy(t, 7, "deny:\n  - {rule: old, product: [{name: edged, below_epoch: 3}]}\n"))
			if !allowed(t, p, last, lastCatalogue, lastNames, lastDigest) || !allowed(t, p, bundle, catalogue, names, digest) {
				t.Error("who signs one build decides about another")
			}
		},
		"fast-forward: a policy's epoch stops where a higher one can still be written": func(t *testing.T) {
			doc := bytes.Replace(w.fleetPolicy(t, 7, ""), []byte("epoch: 7"), []byte("epoch: 4611686018427387905"), 1)
			if _, err := integrity.ParsePolicy(doc); !errors.Is(err, errs.Invalid) {
				t.Errorf("%v", err)
			}
		},
		"indefinite freeze: an exception ends by the host's clock, with nothing new from anywhere": func(t *testing.T) {
			until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
			p := w.signedPolicy(t, w.fleetPolicy(t, 7,
				"exceptions:\n  - {rule: tonight, sha256: ["+integrity.Digest{9}.String()+"], kinds: [exec], until: "+until.Format(time.RFC3339)+", reason: INC-1}\n"))
			for at, want := range map[time.Time]bool{until.Add(-time.Minute): true, until.Add(time.Minute): false} {
				c, err := integrity.Compile(p, nil, integrity.CompileOptions{Now: at})
				if err != nil {
					t.Fatal(err)
				}
				o := c.Object(integrity.KindExec, integrity.Key{Digest: integrity.Digest{9}})
				if got := c.Evaluate(&o, at).Allow; got != want {
					t.Errorf("at %v it runs: %v", at, got)
				}
			}
		},
		"extraneous dependencies: a product brings along nothing under another one's name": func(t *testing.T) {
			s := w.signer(t, pki.PurposeBuild)
			b, err := codesign.SignRelease(s, codesign.ReleaseInfo{Product: "miner", Version: "1", Epoch: 9}, catalogue, names)
			if err != nil {
				t.Fatal(err)
			}
			p := w.signedPolicy(t, w.fleetPolicy(t, 7, ""))
			if allowed(t, p, b, catalogue, names, digest) {
				t.Error("the same signer's other product runs")
			}
		},
		"wrong software: a record vouches for its own catalogue only": func(t *testing.T) {
			_, other, _, _ := w.release(t, 3, 2)
			refused(t, release(bundle, other, w.Roots(pki.PurposeBuild)))
		},
		"endless data: what is too large is refused before it is read": func(t *testing.T) {
			refused(t, release(append(bytes.Clone(bundle), bytes.Repeat([]byte(" "), 2<<20)...), catalogue, w.Roots(pki.PurposeBuild)))
			refused(t, release(bundle, append(bytes.Clone(catalogue), make([]byte, 1<<20)...), w.Roots(pki.PurposeBuild)))
			if _, err := integrity.ParsePolicy([]byte(strings.Repeat("# \n", 8<<20))); !errors.Is(err, errs.Invalid) {
				t.Errorf("a policy of 24 MiB: %v", err)
			}
		},
		"key compromise: a certificate and its CA are revoked from a time on": func(t *testing.T) {
			r, _, err := codesign.VerifyRelease(bundle, catalogue, w.Roots(pki.PurposeBuild))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range []integrity.Digest{r.CertFingerprint, r.CAFingerprint, r.TSAFingerprint} {
				for from, want := range map[time.Time]bool{r.SignedAt.Add(-time.Minute): false, r.SignedAt.Add(time.Minute): true} {
					p := w.signedPolicy(t, w.fleetPolicy(t, 7, "deny:\n  - {rule: stolen, certificate: [{sha256: "+f.String()+", from: "+from.UTC().Format(time.RFC3339)+"}]}\n"))
					if got := allowed(t, p, bundle, catalogue, names, digest); got != want {
						t.Errorf("%v revoked from %v, signed at %v: runs %v", f, from, r.SignedAt, got)
					}
				}
			}
		},
	} {
		t.Run(name, attack)
	}
}

// signer is one of the world's own.
func (w *world) signer(t *testing.T, p pki.Purpose) *pki.Signer {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: p, Identity: identity, Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func release(bundle, catalogue []byte, roots pki.TrustRoots) error {
	_, _, err := codesign.VerifyRelease(bundle, catalogue, roots)
	return err
}

// refused wants an error of a kind that means "not believed".
func refused(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.Invalid) {
		t.Errorf("%v, want it refused", err)
	}
}
