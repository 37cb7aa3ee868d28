package transparency_test

import (
	"encoding/base64"
	"path/filepath"
	"testing"
	"time"

	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

const (
	identity    = "spiffe://fleet.example/build/main"
	payloadType = "application/vnd.in-toto+json"
	origin      = "log.fleet.example"
)

// world is an authority with a log.
type world struct {
	*pki.Authority
	keys string // the authority's directory
	dir  string // of the log
}

func newWorld(t *testing.T) *world {
	t.Helper()
	keys := t.TempDir()
	o := pki.AuthorityOptions{Name: "Example Fleet", Now: now}
	if _, err := pki.CreateAuthority(keys, o); err != nil {
		t.Fatal(err)
	}
	if _, _, err := pki.SaveLog(keys, origin, o); err != nil {
		t.Fatal(err)
	}
	a, err := pki.LoadAuthority(keys, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Authority: a, keys: keys, dir: filepath.Join(t.TempDir(), "log")}
	if err := transparency.Create(w.dir, a.Log.LogKey, a.LogKey); err != nil {
		t.Fatal(err)
	}
	return w
}

func now() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

func (w *world) open(t *testing.T) *transparency.Log {
	t.Helper()
	l, err := transparency.Open(w.dir, w.Log.LogKey, w.LogKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// bundle signs a payload; without a log the bundle has no proof.
func (w *world) bundle(t *testing.T, payload string, log pki.Recorder) []byte {
	t.Helper()
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.TSA.Now()})
	if err != nil {
		t.Fatal(err)
	}
	s.Log = log
	b, err := s.Sign(payloadType, []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLog_appendAndVerify(t *testing.T) {
	w := newWorld(t)
	l := w.open(t)
	for i, p := range []string{"a", "b", "c"} {
		b := w.bundle(t, p, l)
		v, err := pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild)
		if err != nil {
			t.Fatal(err)
		}
		if v.Logged == nil || v.Logged.Log != origin || v.Logged.Index != uint64(i) || v.Logged.Size != uint64(i+1) {
			t.Errorf("logged %+v", v.Logged)
		}
	}
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
