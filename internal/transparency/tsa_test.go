package transparency_test

import (
	"bytes"
	"crypto/ecdsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func client(t *testing.T, url string, roots []pki.Anchor) *transparency.TSAClient {
	t.Helper()
	c, err := transparency.NewTSAClient(url, roots)
	if err != nil {
		t.Fatal(err)
	}
	c.Hurry(time.Millisecond, 500*time.Millisecond)
	return c
}

func TestTSAClient(t *testing.T) {
	w := newWorld(t)
	roots := w.Roots(pki.PurposeBuild).TSAs
	own := transparency.TSAHandler(w.TSA)
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.TSA.Now()})
	if err != nil {
		t.Fatal(err)
	}
	s.Stamper = client(t, serve(t, own.ServeHTTP), roots)
	b, err := s.Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	r := w.Roots(pki.PurposeBuild)
	r.Logs = nil
	if _, err := pki.VerifyBundle(b, r, pki.PurposeBuild); err != nil {
		t.Error(err)
	}
}

// What goes wrong with a timestamp authority: who tries again, and who does not.
func TestTSAClient_failures(t *testing.T) {
	w, stranger := newWorld(t), newWorld(t)
	roots := w.Roots(pki.PurposeBuild).TSAs
	own := transparency.TSAHandler(w.TSA)
	old, err := w.TSA.Stamp([]byte("m")) // without a nonce: as if replayed
	if err != nil {
		t.Fatal(err)
	}
	reply := func(w http.ResponseWriter, b []byte) {
		w.Header().Set("Content-Type", "application/timestamp-reply")
		_, _ = w.Write(b)
	}
	for name, c := range map[string]struct {
		handler func(try int32, rw http.ResponseWriter, r *http.Request)
		tries   int32
		want    error // nil: it works
		any     bool  // some error
	}{
		"works at the third try": {func(try int32, rw http.ResponseWriter, r *http.Request) {
			if try < 3 {
				rw.WriteHeader(http.StatusBadGateway)
				return
			}
			own.ServeHTTP(rw, r)
		}, 3, nil, false},
		"never works": {func(_ int32, rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusServiceUnavailable) }, 3, nil, true},
		"hangs":       {func(_ int32, _ http.ResponseWriter, r *http.Request) { _, _ = io.ReadAll(r.Body); <-r.Context().Done() }, 3, nil, true},
		"refuses":     {func(_ int32, rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusForbidden) }, 1, nil, true},
		"a web page":  {func(_ int32, rw http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(rw, "<html>") }, 1, errs.Invalid, false},
		"garbage":     {func(_ int32, rw http.ResponseWriter, _ *http.Request) { reply(rw, []byte{0x30, 0}) }, 1, errs.Invalid, false},
		"too long":    {func(_ int32, rw http.ResponseWriter, _ *http.Request) { reply(rw, make([]byte, 1<<20)) }, 1, errs.Invalid, false},
		"rejection":   {func(_ int32, rw http.ResponseWriter, _ *http.Request) { reply(rw, rejection(t)) }, 1, errs.Invalid, false},
		"replayed":    {func(_ int32, rw http.ResponseWriter, _ *http.Request) { reply(rw, old) }, 1, errs.Untrusted, false},
		"another authority": {func(_ int32, rw http.ResponseWriter, r *http.Request) {
			transparency.TSAHandler(stranger.TSA).ServeHTTP(rw, r)
		}, 1, errs.Untrusted, false},
		"a token for other data":  {func(_ int32, rw http.ResponseWriter, _ *http.Request) { reply(rw, respond(t, w.TSA, "n")) }, 1, errs.Untrusted, false},
		"the key of a build leaf": {func(_ int32, rw http.ResponseWriter, r *http.Request) { byBuilder(t, w).ServeHTTP(rw, r) }, 1, errs.Untrusted, false},
	} {
		t.Run(name, func(t *testing.T) {
			var tries atomic.Int32
			url := serve(t, func(rw http.ResponseWriter, r *http.Request) {
				c.handler(tries.Add(1), rw, r)
			})
			_, err := client(t, url, roots).Stamp([]byte("m"))
			switch {
			case c.any && err == nil, !c.any && !errors.Is(err, c.want):
				t.Errorf("got %v, want %v", err, c.want)
			case tries.Load() != c.tries:
				t.Errorf("%d tries, want %d", tries.Load(), c.tries)
			}
		})
	}
	for _, url := range []string{"", "ftp://x", "tsa.example", "http://"} {
		if _, err := transparency.NewTSAClient(url, roots); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", url, err)
		}
	}
	if _, err := transparency.NewTSAClient("http://x.test", nil); !errors.Is(err, errs.Invalid) {
		t.Errorf("nobody to verify it by: %v", err)
	}
}

func rejection(t *testing.T) []byte {
	t.Helper()
	der, err := asn1.Marshal(struct{ Status struct{ Status int } }{struct{ Status int }{2}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func respond(t *testing.T, tsa *pki.TSA, message string) []byte {
	t.Helper()
	q, err := pki.TimestampRequest([]byte(message))
	if err != nil {
		t.Fatal(err)
	}
	der, err := tsa.Respond(q)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// byBuilder stamps with the certificate that signs builds.
func byBuilder(t *testing.T, w *world) http.Handler {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := w.Issuers[pki.PurposeBuild].IssueLeaf(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.TSA.Now()}, &k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return transparency.TSAHandler(&pki.TSA{Cert: leaf, Key: k, Now: w.TSA.Now})
}

func TestTSAHandler_refuses(t *testing.T) {
	w := newWorld(t)
	h := transparency.TSAHandler(w.TSA)
	good, err := pki.TimestampRequest([]byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		method, contentType string
		body                []byte
		status              int
	}{
		"good":       {"POST", "application/timestamp-query", good, 200},
		"GET":        {"GET", "", nil, 405},
		"other type": {"POST", "text/plain", good, 415},
		"garbage":    {"POST", "application/timestamp-query", []byte("x"), 400},
		"trailing":   {"POST", "application/timestamp-query", append(bytes.Clone(good), 0), 400},
		"too long":   {"POST", "application/timestamp-query", make([]byte, 1<<20), 400},
	} {
		r := httptest.NewRequest(c.method, "/", bytes.NewReader(c.body))
		r.Header.Set("Content-Type", c.contentType)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code != c.status {
			t.Errorf("%s: %d, want %d", name, rec.Code, c.status)
		}
	}
	keyless := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(good))
	r.Header.Set("Content-Type", "application/timestamp-query")
	transparency.TSAHandler(&pki.TSA{Cert: w.TSA.Cert, Now: w.TSA.Now}).ServeHTTP(keyless, r)
	if keyless.Code != http.StatusInternalServerError || strings.Contains(keyless.Body.String(), "key") {
		t.Errorf("without its key: %d %s", keyless.Code, keyless.Body)
	}
}

// openssl answers our requests, and reads our answers to its own.
func TestTSA_openssl(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("SKIPPED: openssl is not installed; no timestamp authority but ours is tested")
	}
	dir := t.TempDir()
	in := func(f string) string { return filepath.Join(dir, f) }
	write := func(f string, b []byte) {
		t.Helper()
		if err := os.WriteFile(in(f), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) error {
		out, err := exec.Command("openssl", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("openssl %v: %w: %s", args, err, out)
		}
		return nil
	}
	rootKey, tsaKey := newKey(t), newKey(t)
	root, err := pki.NewRoot("their root", rootKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := root.IssueTSA("their TSA", tsaKey, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pem, err := pki.EncodeKey(tsaKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	write("tsa.key", pem)
	write("tsa.crt", pki.EncodeCertificate(cert))
	write("root.crt", pki.EncodeCertificate(root.Cert))
	write("serial", []byte("01\n"))
	write("ts.cnf", []byte("[tsa]\ndefault_tsa=t\n[t]\nserial="+in("serial")+"\nsigner_cert="+in("tsa.crt")+"\nsigner_key="+in("tsa.key")+
		"\ncerts="+in("root.crt")+"\nsigner_digest=sha256\ndefault_policy=1.2.3.4\ndigests=sha256\ness_cert_id_alg=sha256\nordering=yes\ntsa_name=yes\naccuracy=secs:1\n"))
	theirs := serve(t, func(rw http.ResponseWriter, r *http.Request) {
		q, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		write("q", q)
		if err := run("ts", "-reply", "-config", in("ts.cnf"), "-queryfile", in("q"), "-out", in("r")); err != nil {
			t.Error(err)
		}
		b, err := os.ReadFile(in("r"))
		if err != nil {
			t.Error(err)
		}
		rw.Header().Set("Content-Type", "application/timestamp-reply")
		_, _ = rw.Write(b)
	})
	for name, roots := range map[string][]pki.Anchor{"by its certificate": {{Name: "t", Cert: cert}}, "by its CA": {{Name: "r", Cert: root.Cert}}} {
		c, err := transparency.NewTSAClient(theirs, roots)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Stamp([]byte("message")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	ours := &pki.TSA{Cert: cert, Key: tsaKey, Now: time.Now}
	write("m", []byte("message"))
	if err := run("ts", "-query", "-data", in("m"), "-sha256", "-cert", "-out", in("q2")); err != nil {
		t.Fatal(err)
	}
	q, err := os.ReadFile(in("q2"))
	if err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(q))
	r.Header.Set("Content-Type", "application/timestamp-query")
	transparency.TSAHandler(ours).ServeHTTP(rec, r)
	write("r2", rec.Body.Bytes())
	if err := run("ts", "-verify", "-queryfile", in("q2"), "-in", in("r2"), "-CAfile", in("root.crt")); err != nil {
		t.Error(err)
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}
