package pki_test

import (
	"bytes"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/digitorus/timestamp"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// What stands behind the fields that a token must have is read as well.
func TestVerifyTimestamp_endOfToken(t *testing.T) {
	w := newWorld(t)
	roots := w.Roots(pki.PurposeBuild).TSAs
	token := func(edit func(ts *timestamp.Timestamp)) []byte {
		ts := timestamp.Timestamp{
			HashAlgorithm: crypto.SHA256, HashedMessage: sum("m"), Time: epoch(), Policy: []int{1, 2, 3},
			SerialNumber: big.NewInt(7), AddTSACertificate: true, Accuracy: time.Second, Nonce: big.NewInt(9), Ordering: true,
		}
		edit(&ts)
		der, err := ts.CreateResponseWithOpts(w.TSA.Cert, w.TSA.Key, crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	extension := func(critical bool) func(*timestamp.Timestamp) {
		return func(ts *timestamp.Timestamp) {
			ts.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: critical, Value: []byte{5, 0}}}
		}
	}
	unsigned, err := pki.AddUnsigned(token(func(*timestamp.Timestamp) {}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyTimestamp(unsigned, []byte("m"), roots); err == nil || !strings.Contains(err.Error(), "holds what is not known") {
		t.Errorf("an unsigned attribute: %v", err)
	}
	for name, c := range map[string]struct {
		der  []byte
		want error
	}{
		"good":                   {token(func(*timestamp.Timestamp) {}), nil},
		"extension":              {token(extension(false)), nil},
		"critical extension":     {token(extension(true)), errs.Untrusted},
		"an unsigned attribute":  {unsigned, errs.Invalid},
		"no accuracy, but nonce": {token(func(ts *timestamp.Timestamp) { ts.Accuracy, ts.Ordering = 0, false }), nil},
		"critical extension alone": {token(func(ts *timestamp.Timestamp) {
			ts.Accuracy, ts.Ordering, ts.Nonce = 0, false, nil
			extension(true)(ts)
		}), errs.Untrusted},
	} {
		if _, err := pki.VerifyTimestamp(c.der, []byte("m"), roots); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestTSA_respond(t *testing.T) {
	w := newWorld(t)
	q, err := pki.TimestampRequest([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := timestamp.ParseRequest(q)
	if err != nil || theirs.HashAlgorithm != crypto.SHA256 || !theirs.Certificates || !bytes.Equal(theirs.HashedMessage, sum("m")) {
		t.Errorf("another implementation reads %+v, %v", theirs, err)
	}
	der, err := w.TSA.Respond(q)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.CheckTimestampReply(der, q); err != nil {
		t.Error(err)
	}
	if _, err := pki.VerifyTimestamp(der, []byte("m"), w.Roots(pki.PurposeBuild).TSAs); err != nil {
		t.Error(err)
	}
	again, err := pki.TimestampRequest([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.CheckTimestampReply(der, again); !errors.Is(err, errs.Untrusted) {
		t.Errorf("the answer to another request: %v", err)
	}
	request := func(edit func(*timestamp.Request)) []byte {
		r := timestamp.Request{HashAlgorithm: crypto.SHA256, HashedMessage: sum("m")}
		edit(&r)
		b, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if _, err := w.TSA.Respond(request(func(*timestamp.Request) {})); err != nil {
		t.Errorf("the least that can be asked: %v", err)
	}
	for name, b := range map[string][]byte{
		"empty": nil, "trailing": append(bytes.Clone(q), 0), "long": make([]byte, 1<<20),
		"SHA-512":     request(func(r *timestamp.Request) { r.HashAlgorithm, r.HashedMessage = crypto.SHA512, make([]byte, 64) }),
		"short hash":  request(func(r *timestamp.Request) { r.HashedMessage = r.HashedMessage[:20] }),
		"our policy?": request(func(r *timestamp.Request) { r.TSAPolicyOID = asn1.ObjectIdentifier{1, 2, 3} }),
		"extension": request(func(r *timestamp.Request) {
			r.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: []byte{5, 0}}}
		}),
		"huge nonce": request(func(r *timestamp.Request) { r.Nonce = new(big.Int).Lsh(big.NewInt(1), 300) }),
	} {
		if _, err := w.TSA.Respond(b); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
}

func FuzzTSARespond(f *testing.F) {
	w := newWorld(f)
	q, err := pki.TimestampRequest([]byte("m"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(q)
	f.Fuzz(func(t *testing.T, request []byte) {
		der, err := w.TSA.Respond(request)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("error of no kind: %v", err)
			}
			return
		}
		if err := pki.CheckTimestampReply(der, request); err != nil {
			t.Errorf("our answer to %x is none: %v", request, err)
		}
	})
}

func FuzzCheckTimestampReply(f *testing.F) {
	w := newWorld(f)
	q, err := pki.TimestampRequest([]byte("m"))
	if err != nil {
		f.Fatal(err)
	}
	der, err := w.TSA.Respond(q)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, response []byte) {
		if err := pki.CheckTimestampReply(response, q); err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
