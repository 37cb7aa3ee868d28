// Package interop compares Ringwall's verifier with other people's, in a
// module of its own so that their dependencies stay out of Ringwall.
package interop

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const identity = "spiffe://fleet.example/build/main"

// world is a fleet whose clock can be moved.
type world struct {
	*pki.Authority
	at  time.Time
	cat []byte
}

func newWorld(t *testing.T) *world {
	t.Helper()
	// Half a year ago: every leaf in this test has expired since.
	w := &world{at: time.Now().AddDate(0, -6, 0).Truncate(time.Second)}
	var err error
	if w.Authority, err = pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: func() time.Time { return w.at }}); err != nil {
		t.Fatal(err)
	}
	w.cat, err = codesign.EncodeCatalogue([]codesign.Record{{Digest: integrity.Digest{1}, Kinds: integrity.SetOf(integrity.KindExec)}})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// ours and theirs verify the same bundle over the same catalogue.
func (w *world) ours(b []byte) error {
	_, _, err := codesign.VerifyRelease(b, w.cat, w.Roots(pki.PurposeBuild))
	return err
}

func (w *world) theirs(t *testing.T, b []byte) error {
	t.Helper()
	r, err := w.SigstoreRoot(pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := root.NewTrustedRootFromJSON(r)
	if err != nil {
		t.Fatal(err)
	}
	v, err := verify.NewVerifier(trust, verify.WithSignedTimestamps(1))
	if err != nil {
		t.Fatal(err)
	}
	id, err := verify.NewShortCertificateIdentity("", ".*", identity, "")
	if err != nil {
		t.Fatal(err)
	}
	var parsed bundle.Bundle
	if err := parsed.UnmarshalJSON(b); err != nil {
		return err
	}
	sum := sha256.Sum256(w.cat)
	_, err = v.Verify(&parsed, verify.NewPolicy(verify.WithArtifactDigest("sha256", sum[:]), verify.WithCertificateIdentity(id)))
	return err
}

// statement is the payload of a good release record.
func (w *world) statement(t *testing.T) []byte {
	t.Helper()
	v, err := pki.VerifyBundle(w.good(t), w.Roots(pki.PurposeBuild), pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	return v.Payload
}

func (w *world) good(t *testing.T) []byte {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	b, err := codesign.SignRelease(s, codesign.ReleaseInfo{Product: "edged", Version: "1.0", Epoch: 1}, w.cat, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sign makes a bundle with any leaf, by any stamper: no check of Ringwall's
// signing half is in the way.
func (w *world) sign(t *testing.T, edit func(c *x509.Certificate), stamper pki.Stamper, stampOver []byte) []byte {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	u, _ := url.Parse(identity)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: w.at.Add(-time.Hour), NotAfter: w.at.Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{pki.PurposeBuild.OID()}, URIs: []*url.URL{u},
	}
	edit(c)
	ca := w.Issuers[pki.PurposeBuild]
	der, err := x509.CreateCertificate(rand.Reader, c, ca.Cert, key.Public(), ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	payload := w.statement(t)
	digest := sha256.Sum256(pki.PAE("application/vnd.in-toto+json", payload))
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if stampOver == nil {
		stampOver = sig
	}
	stamp, err := stamper.Stamp(stampOver)
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.StdEncoding.EncodeToString
	type object = map[string]any
	b, err := json.Marshal(object{
		"mediaType": pki.MediaType,
		"verificationMaterial": object{
			"certificate":               object{"rawBytes": enc(der)},
			"timestampVerificationData": object{"rfc3161Timestamps": []object{{"signedTimestamp": enc(stamp)}}},
		},
		"dsseEnvelope": object{"payload": enc(payload), "payloadType": "application/vnd.in-toto+json", "signatures": []object{{"sig": enc(sig)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// otherTSA is a timestamp authority with the certificate that the template
// describes, issued by the same root.
func (w *world) otherTSA(t *testing.T, critical bool, ekus ...asn1.ObjectIdentifier) *pki.TSA {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	v, err := asn1.Marshal(ekus)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(8), Subject: pkix.Name{CommonName: "other"}, NotBefore: w.at.Add(-time.Hour), NotAfter: w.at.AddDate(1, 0, 0),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: critical, Value: v}},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, w.Root.Cert, key.Public(), w.Root.Key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &pki.TSA{Cert: cert, Key: key, Now: func() time.Time { return w.at }}
}

// TestBundle_whoRefusesWhat prints a table and checks it: whatever sigstore-go
// refuses Ringwall refuses, and Ringwall refuses more.
func TestBundle_whoRefusesWhat(t *testing.T) {
	w := newWorld(t)
	same := func(*x509.Certificate) {}
	replace := func(from, to string) []byte {
		return []byte(strings.Replace(string(w.good(t)), from, to, 1))
	}
	payloadOf := func(p []byte) string { return base64.StdEncoding.EncodeToString(p) }
	st := w.statement(t)
	tampered := bytes.Replace(st, []byte(`"epoch":1`), []byte(`"epoch":9`), 1)
	shifted := func(d time.Duration) pki.Stamper {
		return &pki.TSA{Cert: w.TSA.Cert, Key: w.TSA.Key, Now: func() time.Time { return w.at.Add(d) }}
	}
	oidTS, oidCode := asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}
	const accept, refuse = true, false
	cases := []struct {
		name         string
		ours, theirs bool
		bundle       []byte
	}{
		{"good, leaf expired since", accept, accept, w.good(t)},
		{"good, made by hand", accept, accept, w.sign(t, same, w.TSA, nil)},
		{"payload tampered", refuse, refuse, replace(payloadOf(st), payloadOf(tampered))},
		{"payload type tampered", refuse, refuse, replace("vnd.in-toto+json", "vnd.in-toto+jsom")},
		{"leaf for TLS", refuse, refuse, w.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, w.TSA, nil)},
		{"leaf without SAN", refuse, refuse, w.sign(t, func(c *x509.Certificate) { c.URIs = nil }, w.TSA, nil)},
		{"stamped after the leaf's end", refuse, refuse, w.sign(t, same, shifted(2*time.Hour), nil)},
		{"stamped before the leaf's start", refuse, refuse, w.sign(t, func(c *x509.Certificate) { c.NotBefore = w.at.Add(time.Minute) }, w.TSA, nil)},
		{"stamp over something else", refuse, refuse, w.sign(t, same, w.TSA, []byte("else"))},
		{"stamp by an unknown TSA", refuse, refuse, w.sign(t, same, w.otherTSA(t, true, oidTS), nil)},
		{"stamp by a code-signing certificate", refuse, refuse, w.sign(t, same, w.otherTSA(t, true, oidCode), nil)},
		{"media type v9.9", refuse, refuse, replace("bundle.v0.3+json", "bundle.v9.9+json")},
		// From here on only Ringwall refuses.
		{"leaf without EKU", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, nil }, w.TSA, nil)},
		{"leaf with anyEKU", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) }, w.TSA, nil)},
		{"leaf without our EKU", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, w.TSA, nil)},
		{"leaf for policies", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.UnknownExtKeyUsage[0] = pki.PurposePolicy.OID() }, w.TSA, nil)},
		{"leaf also for TLS", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }, w.TSA, nil)},
		{"leaf valid for a year", refuse, accept, w.sign(t, func(c *x509.Certificate) { c.NotAfter = w.at.AddDate(1, 0, 0) }, w.TSA, nil)},
		{"text after the JSON", refuse, refuse, append(w.good(t), "{}"...)},
	}
	var table strings.Builder
	word := map[bool]string{accept: "accepts", refuse: "refuses"}
	for _, c := range cases {
		o, th := w.ours(c.bundle), w.theirs(t, c.bundle)
		fmt.Fprintf(&table, "%-38s ringwall %s  sigstore-go %s\n", c.name, word[o == nil], word[th == nil])
		if (o == nil) != c.ours {
			t.Errorf("%s: Ringwall: %v", c.name, o)
		}
		if (th == nil) != c.theirs {
			t.Errorf("%s: sigstore-go: %v (the table in docs/design/release-record.md is out of date)", c.name, th)
		}
		if o == nil && th != nil {
			t.Errorf("%s: sigstore-go refuses what Ringwall accepts: %v", c.name, th)
		}
	}
	t.Log("\n" + table.String())
}

// Timestamp tokens, one by one, against timestamp-authority's verification.
func TestTimestamp_whoRefusesWhat(t *testing.T) {
	w := newWorld(t)
	oidTS, oidCode := asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}
	for name, c := range map[string]struct {
		tsa  *pki.TSA
		over string
		ok   bool
	}{
		"good":                    {w.TSA, "m", true},
		"other TSA":               {w.otherTSA(t, true, oidTS), "m", true}, // issued by the trusted root
		"other message":           {w.TSA, "n", false},
		"EKU not critical":        {w.otherTSA(t, false, oidTS), "m", false},
		"code signing":            {w.otherTSA(t, true, oidCode), "m", false},
		"two purposes":            {w.otherTSA(t, true, oidTS, oidCode), "m", false},
		"signed with another key": {&pki.TSA{Cert: w.TSA.Cert, Key: w.otherTSA(t, true, oidTS).Key, Now: w.TSA.Now}, "m", false},
	} {
		der, err := c.tsa.Stamp([]byte(c.over))
		if err != nil {
			t.Fatal(err)
		}
		_, ours := pki.VerifyTimestamp(der, []byte("m"), []pki.Anchor{{Name: "root", Cert: w.Root.Cert}})
		_, theirs := verification.VerifyTimestampResponse(der, bytes.NewReader([]byte("m")), verification.VerifyOpts{Roots: []*x509.Certificate{w.Root.Cert}})
		if (ours == nil) != c.ok {
			t.Errorf("%s: Ringwall: %v", name, ours)
		}
		if (theirs == nil) != (ours == nil) {
			t.Logf("%s: Ringwall %v, timestamp-authority %v", name, ours, theirs)
		}
		if ours == nil && theirs != nil {
			t.Errorf("%s: timestamp-authority refuses what Ringwall accepts: %v", name, theirs)
		}
	}
}

// TestFiles leaves a good bundle for other tools when RINGWALL_INTEROP_OUT is
// set: cosign verify-blob-attestation, openssl ts.
func TestFiles(t *testing.T) {
	out := os.Getenv("RINGWALL_INTEROP_OUT")
	if out == "" {
		t.Skip("SKIPPED: RINGWALL_INTEROP_OUT is not set; no files are written for other tools")
	}
	w := newWorld(t)
	r, err := w.SigstoreRoot(pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"bundle.json": w.good(t), "trusted_root.json": r, "catalogue.bin": w.cat} {
		if err := os.WriteFile(filepath.Join(out, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
