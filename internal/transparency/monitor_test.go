package transparency_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

// watch runs a monitor from a state to the next.
func watch(t *testing.T, dir string, key pki.LogKey, state []byte, asked *transparency.Asked) (*transparency.Report, []byte, error) {
	t.Helper()
	m, err := transparency.NewMonitor(transparency.Dir(dir), key, state)
	if err != nil {
		t.Fatal(err)
	}
	r, err := m.Run(context.Background(), asked)
	next, err2 := m.State()
	if err2 != nil {
		t.Fatal(err2)
	}
	return r, next, err
}

func asked(t *testing.T, bundles ...[]byte) *transparency.Asked {
	t.Helper()
	a := &transparency.Asked{}
	for _, b := range bundles {
		if err := a.AddBundle("b", b); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func TestMonitor(t *testing.T) {
	w := newWorld(t)
	key := w.Log.LogKey
	first := w.fill(t, 3)
	r, state, err := watch(t, w.dir, key, nil, asked(t, first...))
	if err != nil || r.Found() || r.From != 0 || r.Size != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	// Somebody signs with the stolen path; the log must show it.
	more := w.fill(t, 2)
	r, state, err = watch(t, w.dir, key, state, asked(t, append(first, more[1])...))
	if err != nil || r.From != 3 || r.Size != 5 || len(r.Unasked) != 1 || len(r.Missing) != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	e := r.Unasked[0]
	want, err := transparency.EntryHash(more[0])
	if err != nil {
		t.Fatal(err)
	}
	if e.Hash != want || e.Identity != identity || e.Purpose != "build" || e.Issuer != "Example Fleet build CA" || e.Index < 3 || e.Index > 4 {
		t.Errorf("%+v", e)
	}
	// It is reported until somebody says that it was asked for, also with nothing new.
	r, state, err = watch(t, w.dir, key, state, asked(t, first...))
	if err != nil || len(r.Unasked) != 1 || r.From != 5 {
		t.Errorf("%+v, %v", r, err)
	}
	lines := &transparency.Asked{}
	if err := lines.AddLines([]byte(`{"event":"signed","log_entry":"` + want.String() + `"}` + "\n\n" + `{"event":"start"}`)); err != nil {
		t.Fatal(err)
	}
	r, state, err = watch(t, w.dir, key, state, lines)
	if err != nil || r.Found() {
		t.Errorf("explained: %+v, %v", r, err)
	}
	for name, text := range map[string]string{"not JSON": "x", "not a hash": `{"log_entry":"ab"}`} {
		if err := (&transparency.Asked{}).AddLines([]byte(text)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// What was signed past the log, and what is in another one.
	unlogged := w.bundle(t, "past the log", nil)
	stranger := newWorld(t)
	elsewhere := stranger.fill(t, 1)[0]
	r, _, err = watch(t, w.dir, key, state, asked(t, unlogged, elsewhere, first[0]))
	if err != nil || len(r.Missing) != 2 || !strings.Contains(r.Missing[0].Why, "no proof") || !strings.Contains(r.Missing[1].Why, "another log") {
		t.Errorf("%+v, %v", r, err)
	}
}

// A log that shows different people different things is found by who has both
// a bundle and the log, and by who watches it.
func TestMonitor_splitViewAndRollback(t *testing.T) {
	w := newWorld(t)
	key := w.Log.LogKey
	w.fill(t, 2)
	fork := copyDir(t, w.dir)
	if err := os.CopyFS(fork+"2", os.DirFS(w.dir)); err != nil { // with tessera's state, to go on from
		t.Fatal(err)
	}
	honest := w.fill(t, 2)
	victim := *w
	victim.dir = fork + "2"
	hidden := victim.fill(t, 3) // signed for one victim only

	_, state, err := watch(t, w.dir, key, nil, asked(t))
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := watch(t, w.dir, key, state, asked(t, honest[0], hidden[0], hidden[2]))
	if err != nil || len(r.Missing) != 2 {
		t.Errorf("a bundle of the other history: %+v, %v", r, err)
	}
	// The other history, shown to who knows this one.
	_, kept, err := watch(t, victim.dir, key, state, asked(t))
	if !errors.Is(err, errs.Untrusted) || string(kept) != string(state) {
		t.Errorf("split view: %v; the state is kept: %v", err, string(kept) == string(state))
	}
	// An old checkpoint, with all its files.
	if _, _, err := watch(t, fork, key, state, asked(t)); !errors.Is(err, errs.Untrusted) || !strings.Contains(err.Error(), "had 4 entries and now has 2") {
		t.Errorf("stale checkpoint: %v", err)
	}
	for name, spoil := range map[string]func(string) string{
		"of another log": func(s string) string {
			return strings.Replace(s, key.String(), (&pki.LogKey{Origin: "other.example", Key: key.Key}).String(), 1)
		},
		"other size":     func(s string) string { return strings.Replace(s, `"size": 4`, `"size": 3`, 1) },
		"other root":     func(s string) string { return strings.Replace(s, `"nodes": [`+"\n  \"", `"nodes": [`+"\n  \"00", 1) },
		"other version":  func(s string) string { return strings.Replace(s, `"version": 1`, `"version": 2`, 1) },
		"unsigned":       func(s string) string { return strings.Replace(s, `\n\n`, `\n`, 1) },
		"unknown fields": func(s string) string { return strings.Replace(s, `"version"`, `"x": 1, "version"`, 1) },
	} {
		bad := spoil(string(state))
		if bad == string(state) {
			t.Fatalf("%s: nothing was spoilt in %s", name, state)
		}
		if _, err := transparency.NewMonitor(transparency.Dir(w.dir), key, []byte(bad)); err == nil {
			t.Errorf("a state %s is taken", name)
		}
	}
}

func FuzzMonitorState(f *testing.F) {
	k, err := pki.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	key := pki.LogKey{Origin: origin, Key: &k.PublicKey}
	m, err := transparency.NewMonitor(transparency.Dir("."), key, nil)
	if err != nil {
		f.Fatal(err)
	}
	state, err := m.State()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(state)
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = transparency.NewMonitor(transparency.Dir("."), key, b) })
}

// files is a log in memory.
type files map[string][]byte

func (f files) ReadFile(_ context.Context, path string) ([]byte, error) {
	if b, ok := f[path]; ok {
		return b, nil
	}
	return nil, os.ErrNotExist
}

// Whatever stands in the files, what verifies is what was signed.
func FuzzVerify(f *testing.F) {
	k, err := pki.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	key := pki.LogKey{Origin: origin, Key: &k.PublicKey}
	leaf := pki.LeafHash([]byte("entry"))
	note, err := pki.SignCheckpoint(pki.Checkpoint{Origin: origin, Size: 1, Root: leaf}, k)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("\x00\x05entry"), leaf[:])
	f.Add([]byte("\xff\xff"), []byte{})
	f.Fuzz(func(t *testing.T, bundle, tile []byte) {
		src := files{"checkpoint": note, "tile/entries/000.p/1": bundle, "tile/0/000.p/1": tile}
		r := transparency.NewReader(src, key)
		c, _, err := r.Checkpoint(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Verify(context.Background(), c); err == nil && !strings.HasPrefix(string(bundle), "\x00\x05entry") {
			t.Errorf("%x passes for the entry", bundle)
		}
		if _, err := r.Entries(context.Background(), 0, c); err != nil && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}
