package interop

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"ringwall/internal/codesign"
	"ringwall/internal/pki"
)

// The unmodified cosign 3 verifies release records without a network, with and
// without the proof of our log. It builds from the module proxy:
//
//	go install github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3
func TestCosign(t *testing.T) {
	cosign, err := exec.LookPath("cosign")
	if err != nil {
		t.Skip("SKIPPED: cosign 3 is not installed; sigstore-go stands for it")
	}
	w := newLoggedWorld(t)
	dir := t.TempDir()
	in := func(f string) string { return filepath.Join(dir, f) }
	write := func(f string, b []byte) {
		t.Helper()
		if err := os.WriteFile(in(f), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, err := w.SigstoreRoot(pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	write("root.json", r)
	write("catalogue", w.cat)
	write("other", append(bytes.Clone(w.cat), 0))
	log := &twoLeaves{w.Log.LogKey, w.LogKey, origin}
	logged, unlogged := w.signLogged(t, log), w.signLogged(t, nil)
	stranger, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	const noLog = "--insecure-ignore-tlog"
	for i, c := range []struct {
		name     string
		bundle   []byte
		blob     string
		identity string
		args     []string
		ok       bool
	}{
		{"logged", logged, "catalogue", identity, nil, true},
		{"not logged, and nobody asks", unlogged, "catalogue", identity, []string{noLog}, true},
		{"not logged", unlogged, "catalogue", identity, nil, false},
		{"another catalogue", logged, "other", identity, nil, false},
		{"another signer", logged, "catalogue", "spiffe://fleet.example/build/other", nil, false},
		{"checkpoint by another key", w.signLogged(t, &twoLeaves{w.Log.LogKey, stranger, origin}), "catalogue", identity, nil, false},
	} {
		b := fmt.Sprintf("b%d.json", i)
		write(b, c.bundle)
		args := append([]string{
			"verify-blob-attestation", "--bundle", in(b), "--trusted-root", in("root.json"), "--certificate-identity", c.identity,
			"--certificate-oidc-issuer-regexp", ".*", "--insecure-ignore-sct", "--use-signed-timestamps", "--type", codesign.ReleasePredicateType,
		}, c.args...)
		cmd := exec.Command(cosign, append(args, in(c.blob))...)
		cmd.Env = append(os.Environ(), "HOME="+dir)
		out, err := cmd.CombinedOutput()
		t.Logf("%s: %v: %s", c.name, err, bytes.TrimSpace(out))
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
