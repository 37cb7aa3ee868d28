package transparency_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

// fill signs n payloads at once and returns the bundles with their proofs.
func (w *world) fill(t *testing.T, n int) [][]byte {
	t.Helper()
	l, err := transparency.Open(w.dir, w.Log.LogKey, w.LogKey)
	if err != nil {
		t.Fatal(err)
	}
	out := make([][]byte, n)
	var all sync.WaitGroup
	for i := range out {
		all.Go(func() { out[i] = w.bundle(t, strconv.Itoa(i), l) })
	}
	all.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return out
}

// copyDir is a mirror: plain files, without tessera's own state.
func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(to, ".state")); err != nil {
		t.Fatal(err)
	}
	return to
}

func verify(t *testing.T, src transparency.Source, key pki.LogKey) error {
	t.Helper()
	r := transparency.NewReader(src, key)
	c, _, err := r.Checkpoint(context.Background())
	if err != nil {
		return err
	}
	return r.Verify(context.Background(), c)
}

// edit changes a file of a log.
func edit(t *testing.T, dir, pattern string, change func([]byte) []byte) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: %v, %v", pattern, files, err)
	}
	slices.SortFunc(files, func(a, b string) int { // partial files: the largest last
		return len(a) - len(b) + 1000*strings.Compare(filepath.Dir(a), filepath.Dir(b)) + strings.Compare(a, b)
	})
	f := files[len(files)-1]
	b, err := os.ReadFile(f)
	if err != nil {
		t.Fatal(err)
	}
	b = change(b)
	if err := errors.Join(os.Remove(f)); err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return
	}
	if err := os.WriteFile(f, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// entries splits an entry bundle: each entry has its length before it.
func entries(b []byte) (out [][]byte) {
	for len(b) > 0 {
		n := 2 + int(binary.BigEndian.Uint16(b))
		out = append(out, b[:n])
		b = b[n:]
	}
	return out
}

// Every way to tell another story with a log's files is seen, by who reads the
// files only.
func TestVerify_attacks(t *testing.T) {
	w := newWorld(t)
	bundles := w.fill(t, 300)
	for i, b := range bundles {
		if _, err := pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild); err != nil {
			t.Fatalf("bundle %d: %v", i, err)
		}
	}
	mirror := copyDir(t, w.dir)
	if err := verify(t, transparency.Dir(mirror), w.Log.LogKey); err != nil {
		t.Fatalf("a good mirror: %v", err)
	}
	served := httptest.NewServer(http.FileServerFS(os.DirFS(mirror)))
	defer served.Close()
	byHTTP, err := transparency.NewHTTP(served.URL)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, byHTTP, w.Log.LogKey); err != nil {
		t.Errorf("served by HTTP: %v", err)
	}
	stranger := newWorld(t)
	sign := func(c pki.Checkpoint, by *world) func([]byte) []byte {
		return func([]byte) []byte {
			b, err := pki.SignCheckpoint(c, by.LogKey)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
	}
	now, _, err := transparency.NewReader(transparency.Dir(mirror), w.Log.LogKey).Checkpoint(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	join := func(l [][]byte) []byte { return bytes.Join(l, nil) }
	const full, rest = "tile/entries/000", "tile/entries/001.p/44"
	for name, c := range map[string]struct {
		file   string
		change func([]byte) []byte
		want   error
	}{
		"entry changed": {full, func(b []byte) []byte { b[100] ^= 1; return b }, errs.Untrusted},
		"entry removed": {full, func(b []byte) []byte { return join(entries(b)[1:]) }, errs.Untrusted},
		"last entry removed": {rest, func(b []byte) []byte {
			e := entries(b)
			return join(e[:len(e)-1])
		}, errs.Untrusted},
		"two entries change places": {full, func(b []byte) []byte {
			e := entries(b)
			e[3], e[4] = e[4], e[3]
			return join(e)
		}, errs.Untrusted},
		"entry added in the middle": {full, func(b []byte) []byte {
			e := entries(b)
			return join(slices.Insert(e, 7, e[9]))
		}, errs.Untrusted},
		"bundle cut":                      {full, func(b []byte) []byte { return b[:len(b)-5] }, errs.Untrusted},
		"bundle missing":                  {full, func([]byte) []byte { return nil }, errs.Untrusted},
		"bundle empty":                    {rest, func([]byte) []byte { return []byte{} }, errs.Untrusted},
		"a tile's hash changed":           {"tile/0/000", func(b []byte) []byte { b[40] ^= 1; return b }, errs.Untrusted},
		"a tile cut":                      {"tile/0/000", func(b []byte) []byte { return b[:len(b)-32] }, errs.Untrusted},
		"a tile missing":                  {"tile/0/001.p/44", func([]byte) []byte { return nil }, errs.Untrusted},
		"a tile of hashes of tiles wrong": {"tile/1/000.p/1", func(b []byte) []byte { b[0] ^= 1; return b }, errs.Untrusted},
		"checkpoint missing":              {"checkpoint", func([]byte) []byte { return nil }, errs.NotFound},
		"checkpoint's size changed":       {"checkpoint", func(b []byte) []byte { return bytes.Replace(b, []byte("\n300\n"), []byte("\n299\n"), 1) }, errs.Untrusted},
		"checkpoint by another key":       {"checkpoint", sign(*now, stranger), errs.Untrusted},
		"checkpoint of another origin":    {"checkpoint", sign(pki.Checkpoint{Origin: "other.example", Size: now.Size, Root: now.Root}, w), errs.Untrusted},
		"signed, and of nothing":          {"checkpoint", sign(pki.Checkpoint{Origin: origin, Size: 300, Root: pki.LeafHash(nil)}, w), errs.Untrusted},
		"signed, for more than is there":  {"checkpoint", sign(pki.Checkpoint{Origin: origin, Size: 301, Root: now.Root}, w), errs.Untrusted},
		"signed, for less, the same root": {"checkpoint", sign(pki.Checkpoint{Origin: origin, Size: 299, Root: now.Root}, w), errs.Untrusted},
	} {
		dir := copyDir(t, mirror)
		edit(t, dir, c.file, c.change)
		if err := verify(t, transparency.Dir(dir), w.Log.LogKey); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if err := verify(t, transparency.Dir(mirror), stranger.Log.LogKey); !errors.Is(err, errs.Untrusted) {
		t.Errorf("read with another log's key: %v", err)
	}
	if err := verify(t, transparency.Dir(t.TempDir()), w.Log.LogKey); !errors.Is(err, errs.NotFound) {
		t.Errorf("nothing there: %v", err)
	}
}

// Whoever writes to a log's directory past the log cannot get a proof from it.
func TestAppend_attacks(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, w *world){
		"the state goes back": func(t *testing.T, w *world) {
			// as if the directory was put back from a backup while the signer runs
			edit(t, w.dir, ".state/treeState", func([]byte) []byte { return []byte(`{"size":1,"root":"` + rootOf(t, w, 1) + `"}`) })
		},
		"the root is another one": func(t *testing.T, w *world) {
			edit(t, w.dir, "tile/0/000.p/3", func(b []byte) []byte { b[0] ^= 1; return b })
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			for range 3 {
				w.fill(t, 1)
			}
			l := w.open(t)
			spoil(t, w)
			s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: w.TSA.Now()})
			if err != nil {
				t.Fatal(err)
			}
			s.Log = l
			if b, err := s.Sign(payloadType, []byte("x")); err == nil {
				t.Errorf("a signature with a proof: %s", b)
			}
		})
	}
	w := newWorld(t)
	if _, err := transparency.Open(filepath.Join(t.TempDir(), "typo"), w.Log.LogKey, w.LogKey); !errors.Is(err, errs.NotFound) {
		t.Errorf("a log that is not there: %v", err)
	}
	if err := transparency.Create(w.dir, w.Log.LogKey, w.LogKey); !errors.Is(err, errs.Conflict) {
		t.Errorf("a second log in its place: %v", err)
	}
	stranger := newWorld(t)
	if _, err := transparency.Open(w.dir, stranger.Log.LogKey, stranger.LogKey); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another log's key: %v", err)
	}
	if _, err := transparency.Open(w.dir, w.Log.LogKey, stranger.LogKey); !errors.Is(err, errs.Invalid) {
		t.Errorf("another key than it says: %v", err)
	}
	if _, err := transparency.Open(w.dir, w.Log.LogKey, nil); !errors.Is(err, errs.NotFound) {
		t.Errorf("without a key: %v", err)
	}
}

// rootOf is the root of the first n entries, in base64.
func rootOf(t *testing.T, w *world, n int) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(w.dir, "tile/0/000.p", strconv.Itoa(n)))
	if err != nil {
		t.Fatal(err)
	}
	return base64Of(b[:32])
}
