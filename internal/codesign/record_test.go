package codesign_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const identity = "spiffe://fleet.example/build/main"

func signedAt() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

func authority(t testing.TB) *pki.Authority {
	t.Helper()
	a, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: signedAt})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func signer(t testing.TB, a *pki.Authority, p pki.Purpose) *pki.Signer {
	t.Helper()
	s, err := a.NewSigner(pki.LeafRequest{Purpose: p, Identity: identity, Now: signedAt()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func info() codesign.ReleaseInfo {
	return codesign.ReleaseInfo{
		Product: "edged", Version: "4.7.0-1", Epoch: 12, Revision: "8c1f",
		Artefacts: []codesign.Artefact{{Name: "edged_4.7.0-1_amd64.deb", Digest: digest(9)}},
		Gates:     []codesign.Gate{{Name: "review", Attester: "https://ci.example/review", Evidence: digest(8), At: signedAt()}},
		NotAfter:  signedAt().Add(1000 * time.Hour),
	}
}

func blob(t testing.TB, n int) []byte {
	t.Helper()
	b, err := codesign.EncodeCatalogue(records(n))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRelease_roundTrip(t *testing.T) {
	a := authority(t)
	s := signer(t, a, pki.PurposeBuild)
	for _, in := range []codesign.ReleaseInfo{info(), {Product: "p", Version: "1"}} {
		b, err := codesign.SignRelease(s, in, blob(t, 3), []byte("names"))
		if err != nil {
			t.Fatal(err)
		}
		r, c, err := codesign.VerifyRelease(b, blob(t, 3), a.Roots(pki.PurposeBuild))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(in, r.ReleaseInfo); d != "" {
			t.Error(d)
		}
		if r.CA != "Fleet build CA" || r.Identity != identity || !r.SignedAt.Equal(signedAt()) || r.CertFingerprint != pki.Fingerprint(s.Leaf) ||
			r.Catalogue != c.Digest() || r.Record.IsZero() || c.Len() != 3 {
			t.Errorf("%+v", r)
		}
		// A second signature over the same statement is the same release.
		again, err := codesign.SignRelease(s, in, blob(t, 3), []byte("names"))
		if err != nil {
			t.Fatal(err)
		}
		r2, _, err := codesign.VerifyRelease(again, blob(t, 3), a.Roots(pki.PurposeBuild))
		if err != nil || r2.Record != r.Record {
			t.Errorf("%v: another record", err)
		}
	}
}

func TestVerifyRelease_refuses(t *testing.T) {
	a := authority(t)
	good, err := codesign.SignRelease(signer(t, a, pki.PurposeBuild), info(), blob(t, 3), nil)
	if err != nil {
		t.Fatal(err)
	}
	roots := a.Roots(pki.PurposeBuild)
	for name, cat := range map[string][]byte{"other catalogue": blob(t, 2), "no catalogue": nil, "cut": blob(t, 3)[:100], "names": []byte("RWNAM1")} {
		if _, _, err := codesign.VerifyRelease(good, cat, roots); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	changed := blob(t, 3)
	changed[32+40] ^= 1 // an fs-verity digest: the catalogue still parses
	if _, _, err := codesign.VerifyRelease(good, changed, roots); !errors.Is(err, errs.Untrusted) {
		t.Errorf("changed catalogue: %v", err)
	}
	if _, _, err := codesign.VerifyRelease(good, blob(t, 3), authority(t).Roots(pki.PurposeBuild)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("other fleet: %v", err)
	}
	if _, err := codesign.SignRelease(signer(t, a, pki.PurposePolicy), info(), blob(t, 3), nil); !errors.Is(err, errs.Invalid) {
		t.Errorf("signed with a policy certificate: %v", err)
	}
}

// Statements that are signed by the right key and still must not be believed.
func TestVerifyRelease_signedStatements(t *testing.T) {
	a := authority(t)
	s := signer(t, a, pki.PurposeBuild)
	b, err := codesign.SignRelease(s, info(), blob(t, 3), nil)
	if err != nil {
		t.Fatal(err)
	}
	v, err := pki.VerifyBundle(b, a.Roots(pki.PurposeBuild), pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	pred := func(m object) object { return m["predicate"].(object) }
	subject := func(m object) []any { return m["subject"].([]any) }
	resign := func(payload []byte, payloadType string) error {
		b, err := s.Sign(payloadType, payload)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = codesign.VerifyRelease(b, blob(t, 3), a.Roots(pki.PurposeBuild))
		return err
	}
	if err := resign(v.Payload, v.PayloadType); err != nil {
		t.Fatal(err)
	}
	if err := resign(v.Payload, "application/json"); !errors.Is(err, errs.Untrusted) {
		t.Errorf("payload type: %v", err)
	}
	if err := resign([]byte(`{"version":1}`), v.PayloadType); !errors.Is(err, errs.Invalid) {
		t.Errorf("a permit: %v", err)
	}
	if err := resign([]byte(strings.Replace(string(v.Payload), `"epoch":12`, `"epoch":12,"epoch":1`, 1)), v.PayloadType); !errors.Is(err, errs.Invalid) {
		t.Errorf("epoch twice: %v", err)
	}
	if err := resign([]byte(strings.Replace(string(v.Payload), `"epoch"`, `"Epoch"`, 1)), v.PayloadType); !errors.Is(err, errs.Invalid) {
		t.Errorf("Epoch: %v", err)
	}
	for name, edit := range map[string]func(m object){
		"statement v0.1":     func(m object) { m["_type"] = "https://in-toto.io/Statement/v0.1" },
		"other predicate":    func(m object) { m["predicateType"] = "https://slsa.dev/provenance/v1" },
		"unknown field":      func(m object) { m["extra"] = 1 },
		"unknown predicate":  func(m object) { pred(m)["rings"] = 1 },
		"two subjects":       func(m object) { m["subject"] = append(subject(m), subject(m)[0]) },
		"no subject":         func(m object) { m["subject"] = []any{} },
		"other subject name": func(m object) { subject(m)[0].(object)["name"] = "artefact" },
		"second digest":      func(m object) { subject(m)[0].(object)["digest"].(object)["sha512"] = "00" },
		"upper-case digest": func(m object) {
			d := subject(m)[0].(object)["digest"].(object)
			d["sha256"] = strings.ToUpper(d["sha256"].(string))
		},
		"other digest":        func(m object) { subject(m)[0].(object)["digest"].(object)["sha256"] = digest(1).String() },
		"product upper case":  func(m object) { pred(m)["product"] = "Edged" },
		"product empty":       func(m object) { pred(m)["product"] = "" },
		"version hidden text": func(m object) { pred(m)["version"] = "1\u202e2" },
		"version newline":     func(m object) { pred(m)["version"] = "1\n2" },
		"negative epoch":      func(m object) { pred(m)["epoch"] = -1 },
		"huge epoch":          func(m object) { pred(m)["epoch"] = 1 << 33 },
		"count":               func(m object) { pred(m)["catalogue"].(object)["count"] = 4 },
		"classifier":          func(m object) { pred(m)["catalogue"].(object)["classifier"] = codesign.ClassifierVersion + 1 },
		"gate failed":         func(m object) { pred(m)["gates"].([]any)[0].(object)["result"] = "failed" },
		"gate unknown field":  func(m object) { pred(m)["gates"].([]any)[0].(object)["waived"] = true },
		"not_after":           func(m object) { pred(m)["not_after"] = "2031-05-01" },
		"not_after local":     func(m object) { pred(m)["not_after"] = "2031-05-01T12:00:00+09:00" },
		"65 artefacts":        func(m object) { pred(m)["artefacts"] = make([]object, 65) },
	} {
		var m object
		if err := json.Unmarshal(v.Payload, &m); err != nil {
			t.Fatal(err)
		}
		edit(m)
		p, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := resign(p, v.PayloadType); !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPolicy(t *testing.T) {
	a := authority(t)
	s := signer(t, a, pki.PurposePolicy)
	yaml := []byte("version: 1\nmode: enforce\n")
	b, err := codesign.SignPolicy(s, yaml)
	if err != nil {
		t.Fatal(err)
	}
	p, err := codesign.VerifyPolicy(b, a.Roots(pki.PurposePolicy))
	if err != nil || !bytes.Equal(p.YAML, yaml) || p.Identity != identity || p.CA != "Fleet policy CA" || p.Digest.IsZero() {
		t.Errorf("%+v %v", p, err)
	}
	if _, err := codesign.SignPolicy(signer(t, a, pki.PurposeBuild), yaml); !errors.Is(err, errs.Invalid) {
		t.Errorf("signed with a build certificate: %v", err)
	}
	if _, err := codesign.SignPolicy(s, []byte("\xff")); !errors.Is(err, errs.Invalid) {
		t.Errorf("not UTF-8: %v", err)
	}
	// The same certificate, another kind of document.
	other, err := s.Sign("application/vnd.in-toto+json", yaml)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := codesign.VerifyPolicy(other, a.Roots(pki.PurposePolicy)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("payload type: %v", err)
	}
	large, err := codesign.SignPolicy(s, bytes.Repeat([]byte("# line\n"), 100_000))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := codesign.VerifyPolicy(large, a.Roots(pki.PurposePolicy)); err != nil {
		t.Errorf("700 kB policy: %v", err)
	}
}

func TestPermit(t *testing.T) {
	a := authority(t)
	s := signer(t, a, pki.PurposePermit)
	p := codesign.Permit{Host: "host-17", NotBefore: signedAt(), NotAfter: signedAt().Add(4 * time.Hour), Reason: "incident 12: 決済が止まった"}
	b, err := codesign.SignPermit(s, p)
	if err != nil {
		t.Fatal(err)
	}
	roots := a.Roots(pki.PurposePermit)
	got, err := codesign.VerifyPermit(b, roots, "host-17", signedAt().Add(time.Hour))
	if err != nil || got.Reason != p.Reason || len(got.Nonce) != 32 || got.Identity != identity || got.Record.IsZero() {
		t.Errorf("%+v %v", got, err)
	}
	for name, c := range map[string]struct {
		host string
		now  time.Time
	}{
		"other host": {"host-18", signedAt()}, "too early": {"host-17", signedAt().Add(-time.Second)},
		"too late": {"host-17", signedAt().Add(4*time.Hour + time.Second)},
	} {
		if _, err := codesign.VerifyPermit(b, roots, c.host, c.now); !errors.Is(err, errs.Denied) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, edit := range map[string]func(p *codesign.Permit){
		"25 hours":          func(p *codesign.Permit) { p.NotAfter = p.NotBefore.Add(25 * time.Hour) },
		"ends first":        func(p *codesign.Permit) { p.NotAfter = p.NotBefore },
		"no host":           func(p *codesign.Permit) { p.Host = "" },
		"no reason":         func(p *codesign.Permit) { p.Reason = "" },
		"control in reason": func(p *codesign.Permit) { p.Reason = "a\x1b[2J" },
	} {
		q := p
		edit(&q)
		if _, err := codesign.SignPermit(s, q); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	const form = `{"version":1,"host":"h","not_before":"2031-05-01T12:00:00Z","not_after":"2031-05-01T13:00:00Z","mode":%q,"reason":"r","nonce":"000102030405060708090a0b0c0d0e0f"}`
	for mode, want := range map[string]error{"audit": nil, "off": errs.Invalid, "enforce": errs.Invalid} {
		b, err := s.Sign("application/vnd.ringwall.permit+json", fmt.Appendf(nil, form, mode))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := codesign.VerifyPermit(b, roots, "h", signedAt()); !errors.Is(err, want) {
			t.Errorf("mode %s: %v", mode, err)
		}
	}
	if _, err := codesign.SignPermit(signer(t, a, pki.PurposePolicy), p); !errors.Is(err, errs.Invalid) {
		t.Errorf("signed with a policy certificate: %v", err)
	}
}

// Five thousand real-looking programs: what a host does for one release.
func BenchmarkVerifyRelease(b *testing.B) {
	a := authority(b)
	var rs []codesign.Record
	for i := range 5000 {
		d := integrity.Digest{byte(i), byte(i >> 8), 7}
		rs = append(rs, codesign.Record{Digest: d, Kinds: integrity.SetOf(integrity.KindExec)})
	}
	cat, err := codesign.EncodeCatalogue(rs)
	if err != nil {
		b.Fatal(err)
	}
	rec, err := codesign.SignRelease(signer(b, a, pki.PurposeBuild), info(), cat, nil)
	if err != nil {
		b.Fatal(err)
	}
	roots := a.Roots(pki.PurposeBuild)
	b.SetBytes(int64(len(cat)))
	for b.Loop() {
		if _, _, err := codesign.VerifyRelease(rec, cat, roots); err != nil {
			b.Fatal(err)
		}
	}
}
