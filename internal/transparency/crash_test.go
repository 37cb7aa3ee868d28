package transparency_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

// The variables that make a test process another one that appends.
const (
	helperLog  = "RINGWALL_TEST_LOG"
	helperKeys = "RINGWALL_TEST_KEYS"
	helperOut  = "RINGWALL_TEST_OUT"
)

// TestAppender is no test: it is what TestLog_killed and TestLog_manyProcesses run.
func TestAppender(t *testing.T) {
	dir := os.Getenv(helperLog)
	if dir == "" {
		return
	}
	a, err := pki.LoadAuthority(os.Getenv(helperKeys), nil, now)
	if err != nil {
		t.Fatal(err)
	}
	l, err := transparency.Open(dir, a.Log.LogKey, a.LogKey)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Authority: a}
	for i := range 5 {
		b := w.bundle(t, fmt.Sprint(os.Getpid(), i), l)
		file := filepath.Join(os.Getenv(helperOut), fmt.Sprintf("%d-%d", os.Getpid(), i))
		if err := os.WriteFile(file+".part", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".part", file); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func (w *world) appender(out string) (*exec.Cmd, *bytes.Buffer) {
	c := exec.Command(os.Args[0], "-test.run=^TestAppender$", "-test.count=1")
	c.Env = append(os.Environ(), helperLog+"="+w.dir, helperKeys+"="+w.keys, helperOut+"="+out)
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	return c, &said
}

// whole verifies the log and that every bundle that was handed out is in it.
func (w *world) whole(t *testing.T, out string) (handedOut int) {
	t.Helper()
	if err := verify(t, transparency.Dir(w.dir), w.Log.LogKey); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(out)
	if err != nil {
		t.Fatal(err)
	}
	known := &transparency.Asked{}
	for _, f := range files {
		if strings.HasSuffix(f.Name(), ".part") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(out, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pki.VerifyBundle(b, w.Roots(pki.PurposeBuild), pki.PurposeBuild); err != nil {
			t.Errorf("%s: %v", f.Name(), err)
		}
		if err := known.AddBundle(f.Name(), b); err != nil {
			t.Fatal(err)
		}
		handedOut++
	}
	r, _, err := watch(t, w.dir, w.Log.LogKey, nil, known)
	if err != nil || len(r.Missing) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	return handedOut
}

// A signer that is killed at any moment leaves a log that is whole, that holds
// all that was handed out, and that can be gone on with.
func TestLog_killed(t *testing.T) {
	w := newWorld(t)
	out := t.TempDir()
	killed := 0
	for range 15 {
		c, _ := w.appender(out)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
		if err := c.Process.Kill(); err == nil {
			killed++
		}
		_ = c.Wait()
		w.whole(t, out)
	}
	b := w.fill(t, 1)
	if _, err := pki.VerifyBundle(b[0], w.Roots(pki.PurposeBuild), pki.PurposeBuild); err != nil {
		t.Error(err)
	}
	t.Logf("killed %d of 15, %d bundles handed out", killed, w.whole(t, out))
}

func TestLog_manyProcesses(t *testing.T) {
	w := newWorld(t)
	out := t.TempDir()
	type running struct {
		*exec.Cmd
		said *bytes.Buffer
	}
	var all []running
	for range 4 {
		c, said := w.appender(out)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, running{c, said})
	}
	for _, r := range all {
		if err := r.Wait(); err != nil {
			t.Errorf("%v: %s", err, r.said)
		}
	}
	if n := w.whole(t, out); n != 20 {
		t.Errorf("%d bundles, want 20", n)
	}
}
