package codesign_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func manifest() codesign.Manifest {
	return codesign.Manifest{
		Scope: "/subscriptions/a", Epoch: 7, NotBefore: signedAt(), NotAfter: signedAt().Add(time.Hour),
		Policy: digest(1), Index: []integrity.Digest{digest(2), digest(3)}, Undoes: digest(4),
	}
}

func TestManifest_roundTrip(t *testing.T) {
	a := authority(t)
	b, err := codesign.SignManifest(signer(t, a, pki.PurposePolicy), manifest())
	if err != nil {
		t.Fatal(err)
	}
	got, err := codesign.VerifyManifest(b, a.Roots(pki.PurposePolicy))
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest.IsZero() || got.Identity != identity {
		t.Errorf("digest %v, signed by %q", got.Digest, got.Identity)
	}
	want := manifest()
	want.Digest, want.Identity, want.SignedAt = got.Digest, got.Identity, got.SignedAt
	if d := cmp.Diff(want, *got); d != "" {
		t.Errorf("differs (-want +got):\n%s", d)
	}
}

func TestManifest_refused(t *testing.T) {
	a := authority(t)
	for name, change := range map[string]func(*codesign.Manifest){
		"no policy":       func(m *codesign.Manifest) { m.Policy = integrity.Digest{} },
		"no epoch":        func(m *codesign.Manifest) { m.Epoch = 0 },
		"no scope":        func(m *codesign.Manifest) { m.Scope = "" },
		"no time":         func(m *codesign.Manifest) { m.NotAfter = m.NotBefore },
		"index too long":  func(m *codesign.Manifest) { m.Index = make([]integrity.Digest, codesign.MaxIndex+1) },
		"part without id": func(m *codesign.Manifest) { m.Index[0] = integrity.Digest{} },
	} {
		t.Run(name, func(t *testing.T) {
			m := manifest()
			change(&m)
			if _, err := codesign.SignManifest(signer(t, a, pki.PurposePolicy), m); !errors.Is(err, errs.Invalid) {
				t.Errorf("error %v, want invalid", err)
			}
		})
	}
	if _, err := codesign.SignManifest(signer(t, a, pki.PurposeBuild), manifest()); !errors.Is(err, errs.Invalid) {
		t.Errorf("a build's signer: error %v, want invalid", err)
	}
	policy, err := codesign.SignPolicy(signer(t, a, pki.PurposePolicy), []byte("epoch: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := codesign.VerifyManifest(policy, a.Roots(pki.PurposePolicy)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a policy as a manifest: error %v, want untrusted", err)
	}
	b, err := codesign.SignManifest(signer(t, a, pki.PurposePolicy), manifest())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := codesign.VerifyPolicy(b, a.Roots(pki.PurposePolicy)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a manifest as a policy: error %v, want untrusted", err)
	}
	if _, err := codesign.VerifyManifest(b, authority(t).Roots(pki.PurposePolicy)); err == nil {
		t.Error("somebody else's manifest is believed")
	}
}

// numbered is a digest that looks random.
func numbered(n int) integrity.Digest { return sha256.Sum256(fmt.Append(nil, n)) }

// TestIndex_oneChange: one release more changes one part.
func TestIndex_oneChange(t *testing.T) {
	items := func(n int) []codesign.Item {
		var out []codesign.Item
		for i := range n {
			out = append(out, codesign.Item{Release: &codesign.ReleaseItem{Record: numbered(i), Catalogue: numbered(i + 1)}})
		}
		return out
	}
	write := func(n int) [][]byte {
		parts, err := codesign.WriteIndex(items(n))
		if err != nil {
			t.Fatal(err)
		}
		return parts
	}
	before, after := write(1000), write(1001)
	known, read := map[string]bool{}, 0
	for _, p := range before {
		known[string(p)] = true
	}
	changed := 0
	for _, p := range after {
		list, err := codesign.ReadIndex(p)
		if err != nil {
			t.Fatal(err)
		}
		read += len(list)
		if !known[string(p)] {
			changed += len(p)
		}
	}
	if read != 1001 {
		t.Errorf("%d items, want 1001", read)
	}
	if len(after) > codesign.MaxIndex || changed == 0 || changed > 16<<10 {
		t.Errorf("one release more changes %d bytes in %d parts, want a few KiB", changed, len(after))
	}
	if _, err := codesign.WriteIndex([]codesign.Item{{}}); !errors.Is(err, errs.Invalid) {
		t.Errorf("an empty item: error %v, want invalid", err)
	}
}

func FuzzReadIndex(f *testing.F) {
	parts, err := codesign.WriteIndex([]codesign.Item{{Release: &codesign.ReleaseItem{Record: digest(1), Catalogue: digest(2)}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(parts[0])
	f.Fuzz(func(t *testing.T, b []byte) {
		items, err := codesign.ReadIndex(b)
		if err != nil {
			return
		}
		if _, err := codesign.WriteIndex(items); err != nil {
			t.Errorf("read and not written again: %v", err)
		}
	})
}
