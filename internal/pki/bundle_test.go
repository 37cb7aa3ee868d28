package pki_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func TestVerifyBundle_everyPurpose(t *testing.T) {
	w := newWorld(t)
	for _, p := range pki.Purposes() {
		b, err := w.signer(t, p).Sign(payloadType, []byte("hello"))
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range pki.Purposes() {
			v, err := pki.VerifyBundle(b, w.Roots(q), q)
			if (err == nil) != (p == q) {
				t.Errorf("signed for %v, verified for %v: %v", p, q, err)
			}
			if err != nil {
				continue
			}
			if string(v.Payload) != "hello" || v.PayloadType != payloadType || v.Identity != identity ||
				v.CA != "Example Fleet "+p.String()+" CA" || v.TSA != "Example Fleet TSA" || !v.SignedAt.Equal(epoch()) {
				t.Errorf("%v: %+v", p, v)
			}
			if v.Fingerprint != sha256.Sum256(v.Leaf.Raw) {
				t.Error("fingerprint of our own certificate is not what openssl prints")
			}
		}
		// The leaf alone decides too: every CA's roots, wrong purpose asked.
		var all pki.TrustRoots
		for _, q := range pki.Purposes() {
			r := w.Roots(q)
			all.CAs, all.TSAs = append(all.CAs, r.CAs...), r.TSAs
		}
		if _, err := pki.VerifyBundle(b, all, p%3+1); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%v for another purpose: %v", p, err)
		}
	}
}

func TestVerifyBundle_flippedCertificateKeepsItsFingerprint(t *testing.T) {
	w := newWorld(t)
	s := w.signer(t, pki.PurposeBuild)
	flipped, err := pki.FlipCertificate(s.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(flipped.Raw, s.Leaf.Raw) {
		t.Fatal("not flipped")
	}
	b, err := pki.SignUnchecked(flipped, s.Key, s.Stamper, payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	v, err := pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	if v.Fingerprint != pki.Fingerprint(s.Leaf) {
		t.Error("a revoked certificate escapes by flipping its signature")
	}
}

func TestVerifyBundle_leafProfile(t *testing.T) {
	w := newWorld(t)
	oid := asn1.ObjectIdentifier{1, 2, 3, 4}
	uri := func(s string) *url.URL { u, _ := url.Parse(s); return u }
	cases := map[string]func(c *x509.Certificate){
		"no EKU": func(c *x509.Certificate) { c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, nil },
		"anyEKU": func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) },
		"anyEKU alone": func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, nil
		},
		"codeSigning alone": func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil },
		"our EKU alone":     func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"TLS server":        func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"TLS server too":    func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) },
		"policy EKU":        func(c *x509.Certificate) { c.UnknownExtKeyUsage[0] = pki.PurposePolicy.OID() },
		"policy EKU too": func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = append(c.UnknownExtKeyUsage, pki.PurposePolicy.OID())
		},
		"unknown EKU too":        func(c *x509.Certificate) { c.UnknownExtKeyUsage = append(c.UnknownExtKeyUsage, oid) },
		"no SAN":                 func(c *x509.Certificate) { c.URIs = nil },
		"two SANs":               func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://other.example/x")) },
		"DNS SAN too":            func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} },
		"IP SAN too":             func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} },
		"e-mail SAN only":        func(c *x509.Certificate) { c.URIs, c.EmailAddresses = nil, []string{"a@fleet.example"} },
		"URI without host":       func(c *x509.Certificate) { c.URIs[0] = uri("urn:x") },
		"URI with query":         func(c *x509.Certificate) { c.URIs[0] = uri(identity + "?a=b") },
		"eight days":             func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(8 * 24 * time.Hour) },
		"expired when stamped":   func(c *x509.Certificate) { c.NotAfter = epoch().Add(-time.Minute) },
		"not valid when stamped": func(c *x509.Certificate) { c.NotBefore = epoch().Add(time.Minute) },
		"CA": func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign
		},
		"key agreement too": func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement },
		"no key usage":      func(c *x509.Certificate) { c.KeyUsage = 0 },
	}
	sign := func(t *testing.T, i *pki.Issuer, c *x509.Certificate, k crypto.Signer) error {
		t.Helper()
		b, err := pki.SignUnchecked(issue(t, i, c, k.Public()), k, w.TSA, payloadType, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild)
		return err
	}
	ca := w.Issuers[pki.PurposeBuild]
	if err := sign(t, ca, leafTemplate(), newKey(t)); err != nil {
		t.Fatalf("the template is not good: %v", err)
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			c := leafTemplate()
			spoil(c)
			if err := sign(t, ca, c, newKey(t)); !errors.Is(err, errs.Untrusted) {
				t.Errorf("not refused: %v", err)
			}
		})
	}
	for name, k := range map[string]crypto.Signer{"P-384": key384(t), "RSA": keyRSA(t)} {
		if err := sign(t, ca, leafTemplate(), k); err == nil {
			t.Errorf("%s key not refused: %v", name, err)
		}
	}
	for name, i := range map[string]*pki.Issuer{"root": w.Root, "policy CA": w.Issuers[pki.PurposePolicy]} {
		if err := sign(t, i, leafTemplate(), newKey(t)); !errors.Is(err, errs.Untrusted) {
			t.Errorf("leaf issued by %s not refused: %v", name, err)
		}
	}
	other := newWorld(t) // the same names, other keys
	if err := sign(t, other.Issuers[pki.PurposeBuild], leafTemplate(), newKey(t)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("leaf of a CA with the same name not refused: %v", err)
	}
}

func TestVerifyBundle_CAProfile(t *testing.T) {
	w := newWorld(t)
	b, err := w.signer(t, pki.PurposeBuild).Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	r := w.Roots(pki.PurposeBuild)
	if _, err := pki.VerifyBundle(b, pki.TrustRoots{TSAs: r.TSAs}, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("no CA: %v", err)
	}
	if _, err := pki.VerifyBundle(b, pki.TrustRoots{CAs: r.CAs}, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("no TSA: %v", err)
	}
	// The root vouches for the build CA, yet trusting it trusts no leaf.
	root := []pki.Anchor{{Name: "root", Cert: w.Root.Cert}}
	if _, err := pki.VerifyBundle(b, pki.TrustRoots{CAs: root, TSAs: r.TSAs}, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("root as the anchor: %v", err)
	}
	// A CA that ran out before the signature was made.
	late := *w.Authority
	c := w.Issuers[pki.PurposeBuild]
	w.clock.t = c.Cert.NotAfter.Add(time.Hour)
	k := newKey(t)
	tmpl := leafTemplate()
	tmpl.NotBefore, tmpl.NotAfter = w.clock.t.Add(-time.Hour), w.clock.t.Add(time.Hour)
	leaf := issue(t, c, tmpl, k.Public())
	tk := newKey(t)
	tc, err := late.Root.IssueTSA("late TSA", tk, w.clock.t)
	if err != nil {
		t.Fatal(err)
	}
	b, err = pki.SignUnchecked(leaf, k, &pki.TSA{Cert: tc, Key: tk, Now: w.clock.now}, payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	r.TSAs = []pki.Anchor{{Name: "late", Cert: tc}}
	if _, err := pki.VerifyBundle(b, r, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("expired CA: %v", err)
	}
}

func TestVerifyBundle_revoked(t *testing.T) {
	w := newWorld(t)
	s := w.signer(t, pki.PurposePolicy)
	b, err := s.Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*x509.Certificate{
		"leaf": s.Leaf, "authority": w.Issuers[pki.PurposePolicy].Cert, "timestamp authority": w.TSA.Cert, "": w.Root.Cert,
	} {
		for from, refused := range map[time.Time]bool{{}: true, epoch(): true, epoch().Add(-time.Hour): true, epoch().Add(time.Second): false} {
			r := w.Roots(pki.PurposePolicy)
			r.Revoked = []pki.Revocation{{Fingerprint: pki.Fingerprint(c), From: from}}
			v, err := pki.VerifyBundle(b, r, pki.PurposePolicy)
			switch {
			case name == "" || !refused:
				if err != nil {
					t.Errorf("%q from %v: %v", name, from, err)
				}
			case !errors.Is(err, errs.Untrusted) || v != nil:
				t.Errorf("%s revoked from %v: %v, %v", name, from, v, err)
			}
		}
	}
}

func TestVerifyBundle_edits(t *testing.T) {
	w := newWorld(t)
	s := w.signer(t, pki.PurposeBuild)
	good, err := s.Sign(payloadType, []byte(`{"a":1}`))
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Sign(payloadType, []byte(`{"a":2}`))
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	env := func(m object) object { return m["dsseEnvelope"].(object) }
	mat := func(m object) object { return m["verificationMaterial"].(object) }
	stamps := func(m object) object { return mat(m)["timestampVerificationData"].(object) }
	sigs := func(m object) []any { return env(m)["signatures"].([]any) }
	var o object
	if err := json.Unmarshal(other, &o); err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	cases := []struct {
		name string
		want error
		edit func(m object)
	}{
		{"other payload", errs.Untrusted, func(m object) { env(m)["payload"] = b64([]byte(`{"a":3}`)) }},
		{"other payload type", errs.Untrusted, func(m object) { env(m)["payloadType"] = "text/plain" }},
		{"signature of another payload", errs.Untrusted, func(m object) { env(m)["signatures"] = sigs(o) }},
		{"timestamp of another signature", errs.Untrusted, func(m object) { mat(m)["timestampVerificationData"] = stamps(o) }},
		{"no timestamp data", errs.Invalid, func(m object) { delete(mat(m), "timestampVerificationData") }},
		{"no timestamp", errs.Invalid, func(m object) { stamps(m)["rfc3161Timestamps"] = []any{} }},
		{"two timestamps", errs.Invalid, func(m object) {
			l := stamps(m)["rfc3161Timestamps"].([]any)
			stamps(m)["rfc3161Timestamps"] = append(l, l[0])
		}},
		{"two signatures", errs.Invalid, func(m object) { env(m)["signatures"] = append(sigs(m), sigs(m)[0]) }},
		{"no signature", errs.Invalid, func(m object) { env(m)["signatures"] = []any{} }},
		{"key id", errs.Invalid, func(m object) { sigs(m)[0].(object)["keyid"] = "k" }},
		{"no certificate", errs.Invalid, func(m object) { delete(mat(m), "certificate") }},
		{"public key instead", errs.Invalid, func(m object) {
			delete(mat(m), "certificate")
			mat(m)["publicKey"] = object{"hint": "x"}
		}},
		{"certificate chain instead", errs.Invalid, func(m object) {
			mat(m)["x509CertificateChain"] = object{"certificates": []any{mat(m)["certificate"]}}
			delete(mat(m), "certificate")
		}},
		{"log entry", errs.Invalid, func(m object) { mat(m)["tlogEntries"] = []any{object{}} }},
		{"message signature", errs.Invalid, func(m object) { m["messageSignature"] = object{"signature": "AA=="} }},
		{"no envelope", errs.Invalid, func(m object) { delete(m, "dsseEnvelope") }},
		{"media type v0.2", errs.Invalid, func(m object) { m["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.2" }},
		{"media type missing", errs.Invalid, func(m object) { delete(m, "mediaType") }},
		{"unknown field", errs.Invalid, func(m object) { m["extra"] = 1 }},
		{"other case", errs.Invalid, func(m object) { m["mediatype"] = m["mediaType"]; delete(m, "mediaType") }},
		{"URL base64", errs.Invalid, func(m object) { env(m)["payload"] = "_-__" }},
		{"empty payload", errs.Invalid, func(m object) { env(m)["payload"] = "" }},
		{"huge payload", errs.Invalid, func(m object) { env(m)["payload"] = b64(make([]byte, 65<<10)) }},
		{"empty log accepted", nil, func(m object) { mat(m)["tlogEntries"] = []any{} }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var m object
			if err := json.Unmarshal(good, &m); err != nil {
				t.Fatal(err)
			}
			c.edit(m)
			b, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	for name, b := range map[string]string{
		"trailing JSON":  string(good) + "{}",
		"trailing text":  string(good) + "x",
		"repeated key":   strings.Replace(string(good), `{"mediaType"`, `{"mediaType":"x","mediaType"`, 1),
		"cut":            string(good[:len(good)-1]),
		"array":          "[" + string(good) + "]",
		"null":           "null",
		"empty":          "",
		"deep":           strings.Repeat(`{"mediaType":`, 5000),
		"not UTF-8":      strings.Replace(string(good), "in-toto", "in-\xfftoto", 1),
		"leading banner": "x" + string(good),
	} {
		if _, err := pki.VerifyBundle([]byte(b), w.Roots(pki.PurposeBuild), pki.PurposeBuild); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A single-bit change of a bundle either breaks it or changes nothing that
// is believed.
func TestVerifyBundle_bitFlips(t *testing.T) {
	w := newWorld(t)
	good, err := w.signer(t, pki.PurposeBuild).Sign(payloadType, []byte(`{"a":1}`))
	if err != nil {
		t.Fatal(err)
	}
	roots := w.Roots(pki.PurposeBuild)
	for i := 0; i < len(good); i += 5 {
		b := bytes.Clone(good)
		b[i] ^= 1 << (i % 7)
		v, err := pki.VerifyBundle(b, roots, pki.PurposeBuild)
		if err != nil {
			continue
		}
		if string(v.Payload) != `{"a":1}` || v.PayloadType != payloadType || v.Identity != identity || !v.SignedAt.Equal(epoch()) {
			t.Fatalf("byte %d: %+v", i, v)
		}
	}
}

func FuzzVerifyBundle(f *testing.F) {
	w := newWorld(f)
	good, err := w.signer(f, pki.PurposeBuild).Sign(payloadType, []byte(`{"a":1}`))
	if err != nil {
		f.Fatal(err)
	}
	roots := w.Roots(pki.PurposeBuild)
	f.Add(good)
	f.Add([]byte(`{"mediaType":"` + pki.MediaType + `"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := pki.VerifyBundle(b, roots, pki.PurposeBuild)
		if err == nil && string(v.Payload) != `{"a":1}` {
			t.Errorf("forged: %q", b)
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func BenchmarkVerifyBundle(b *testing.B) {
	w := newWorld(b)
	good, err := w.signer(b, pki.PurposeBuild).Sign(payloadType, bytes.Repeat([]byte("x"), 2000))
	if err != nil {
		b.Fatal(err)
	}
	roots := w.Roots(pki.PurposeBuild)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := pki.VerifyBundle(good, roots, pki.PurposeBuild); err != nil {
			b.Fatal(err)
		}
	}
}
