package pki_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/digitorus/timestamp"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func oidTS() asn1.ObjectIdentifier   { return asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8} }
func oidCode() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3} }

func TestVerifyTimestamp_signer(t *testing.T) {
	w := newWorld(t)
	cases := map[string]struct {
		template *x509.Certificate
		ok       bool
	}{
		"good":                  {tsaTemplate(t, true, oidTS()), true},
		"EKU not critical":      {tsaTemplate(t, false, oidTS()), false},
		"two EKUs":              {tsaTemplate(t, true, oidTS(), oidCode()), false},
		"code signing":          {tsaTemplate(t, true, oidCode()), false},
		"no EKU":                {tsaTemplate(t, true), false},
		"anyEKU":                {tsaTemplate(t, true, asn1.ObjectIdentifier{2, 5, 29, 37, 0}), false},
		"expired when stamping": {tsaTemplate(t, true, oidTS()), false},
	}
	cases["expired when stamping"].template.NotAfter = epoch().Add(-time.Minute)
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			k := newKey(t)
			cert := issue(t, w.Root, c.template, k.Public())
			stamp := timestamp.Timestamp{
				HashAlgorithm: crypto.SHA256, HashedMessage: sum("m"), Time: epoch(), Policy: []int{1, 2, 3},
				SerialNumber: big.NewInt(7), AddTSACertificate: true,
			}
			der, err := stamp.CreateResponseWithOpts(cert, k, crypto.SHA256)
			if err != nil {
				t.Fatal(err)
			}
			// Both ways of trusting it: itself, and whoever issued it.
			for how, a := range map[string]*x509.Certificate{"pinned": cert, "issued": w.Root.Cert} {
				s, err := pki.VerifyTimestamp(der, []byte("m"), []pki.Anchor{{Name: "tsa", Cert: a}})
				if (err == nil) != c.ok || (err != nil && !errors.Is(err, errs.Untrusted)) {
					t.Errorf("%s: %v", how, err)
				}
				if err == nil && (!s.Time.Equal(epoch()) || s.TSA != "tsa") {
					t.Errorf("%s: %+v", how, s)
				}
			}
			if _, err := pki.VerifyTimestamp(der, []byte("m"), []pki.Anchor{{Name: "x", Cert: newWorld(t).Root.Cert}}); !errors.Is(err, errs.Untrusted) {
				t.Errorf("stranger: %v", err)
			}
		})
	}
}

func TestVerifyTimestamp_refuses(t *testing.T) {
	w := newWorld(t)
	roots := w.Roots(pki.PurposeBuild).TSAs
	der, err := w.TSA.Stamp([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyTimestamp(der, []byte("m"), roots); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyTimestamp(der, []byte("n"), roots); !errors.Is(err, errs.Untrusted) {
		t.Errorf("other message: %v", err)
	}
	for name, b := range map[string][]byte{
		"trailing byte": append(bytes.Clone(der), 0), "cut": der[:len(der)-1], "empty": nil,
		"rejection": {0x30, 0x05, 0x30, 0x03, 0x02, 0x01, 0x02},
		"BER bomb":  bytes.Repeat([]byte{0x30, 0x80}, 8000),
		"huge":      make([]byte, 1<<20),
	} {
		if _, err := pki.VerifyTimestamp(b, []byte("m"), roots); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range der {
		b := bytes.Clone(der)
		b[i] ^= 1 << (i % 8)
		s, err := pki.VerifyTimestamp(b, []byte("m"), roots)
		if err == nil && !s.Time.Equal(epoch()) {
			t.Errorf("byte %d changes the time to %v", i, s.Time)
		}
	}
	// SHA-1 and SHA-512 imprints by a good TSA.
	for _, h := range []crypto.Hash{crypto.SHA384, crypto.SHA512} {
		hh := h.New()
		hh.Write([]byte("m"))
		ts := timestamp.Timestamp{
			HashAlgorithm: h, HashedMessage: hh.Sum(nil), Time: epoch(), Policy: []int{1, 2, 3},
			SerialNumber: big.NewInt(7), AddTSACertificate: true,
		}
		der, err := ts.CreateResponseWithOpts(w.TSA.Cert, w.TSA.Key, crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pki.VerifyTimestamp(der, []byte("m"), roots); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%v: %v", h, err)
		}
	}
}

// Another implementation reads our tokens as we do.
func TestTSA_readByAnother(t *testing.T) {
	w := newWorld(t)
	der, err := w.TSA.Stamp([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	ts, err := timestamp.ParseResponse(der)
	if err != nil {
		t.Fatal(err)
	}
	if !ts.Time.Equal(epoch()) || !bytes.Equal(ts.HashedMessage, sum("m")) || len(ts.Certificates) != 1 || ts.Accuracy != time.Second {
		t.Errorf("%+v", ts)
	}
}

func TestTSA_expired(t *testing.T) {
	w := newWorld(t)
	w.clock.t = w.TSA.Cert.NotAfter.Add(time.Second)
	if _, err := w.TSA.Stamp([]byte("m")); err == nil {
		t.Error("an expired TSA still stamps")
	}
}

func sum(s string) []byte { h := sha256.Sum256([]byte(s)); return h[:] }

func FuzzVerifyTimestamp(f *testing.F) {
	w := newWorld(f)
	roots := w.Roots(pki.PurposeBuild).TSAs
	roots = append(roots, pki.Anchor{Name: "root", Cert: w.Root.Cert})
	der, err := w.TSA.Stamp([]byte("m"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(bytes.Repeat([]byte{0x30, 0x80}, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := pki.VerifyTimestamp(b, []byte("m"), roots)
		if err == nil && !s.Time.Equal(epoch()) {
			t.Errorf("forged time %v", s.Time)
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
