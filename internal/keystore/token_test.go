//go:build pkcs11

package keystore_test

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/keystore"
	"ringwall/internal/pki"
)

const pin = "123456"

// softHSM makes two tokens, fleet and spare, and returns a URI's query.
func softHSM(t *testing.T) string {
	t.Helper()
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	if _, err := os.Stat(module); err != nil {
		t.Skip("SKIPPED: SoftHSM2 is not installed (apt-get install softhsm2); keys in tokens are not tested")
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\nlog.level = ERROR\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	for _, label := range []string{"fleet", "spare"} {
		if out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "87654321", "--pin", pin).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return "?module-path=" + module
}

// One test, since SoftHSM reads its configuration once a process.
func TestToken(t *testing.T) {
	query := softHSM(t)
	uri := func(object string) string { return "pkcs11:token=fleet;object=" + object + query }

	made, err := keystore.Generate(uri("build-ca"), []byte(pin))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Generate(uri("build-ca"), []byte(pin)); !errors.Is(err, errs.Conflict) {
		t.Errorf("a second key of that name: %v", err)
	}
	k, err := keystore.Open(uri("build-ca"), []byte(pin))
	if err != nil {
		t.Fatal(err)
	}
	if pub, ok := made.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(k.Public()) {
		t.Error("opened another key than was made")
	}
	digest := sha256.Sum256([]byte("x"))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if _, err := k.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil { // verifies by itself
				t.Error(err)
			}
		})
	}
	all.Wait()
	if _, err := k.Sign(rand.Reader, digest[:20], crypto.SHA1); !errors.Is(err, errs.Invalid) {
		t.Errorf("a SHA-1 digest: %v", err)
	}

	file := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(file, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Open(uri("build-ca")+"&pin-source=file:"+file, nil); err != nil {
		t.Errorf("PIN from a file: %v", err)
	}
	for name, c := range map[string]struct {
		uri, pin string
		want     error
	}{
		"no PIN":     {uri("build-ca"), "", errs.Denied},
		"no key":     {uri("other"), pin, errs.NotFound},
		"no token":   {"pkcs11:token=nowhere;object=build-ca" + query, pin, errs.NotFound},
		"two tokens": {"pkcs11:object=build-ca" + query, pin, errs.Conflict},
		"no library": {"pkcs11:token=fleet?module-path=/etc/passwd", pin, errs.NotFound},
		"no module":  {"pkcs11:token=fleet;object=build-ca", pin, errs.Invalid},
	} {
		if _, err := keystore.Open(c.uri, []byte(c.pin)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// SoftHSM asks for the PIN once a process and token, so the wrong one goes to the other token.
	if _, err := keystore.Open("pkcs11:token=spare;object=x"+query, []byte("000000")); !errors.Is(err, errs.Denied) {
		t.Errorf("wrong PIN: %v", err)
	}
	authority(t, query)
}

// authority makes a whole authority in a token and signs with it.
func authority(t *testing.T, query string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	now := func() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }
	o := pki.AuthorityOptions{Name: "Fleet", Now: now, NewKey: func(stem string) (crypto.Signer, string, error) {
		uri := "pkcs11:token=fleet;object=all-" + stem + query
		k, err := keystore.Generate(uri, []byte(pin))
		return k, uri, err
	}}
	if _, err := pki.CreateAuthority(dir, o); err != nil {
		t.Fatal(err)
	}
	if keys, err := filepath.Glob(filepath.Join(dir, "*.key")); err != nil || len(keys) > 0 {
		t.Errorf("key files: %v, %v", keys, err)
	}
	opened := map[string]bool{}
	a, err := pki.LoadAuthorityKeys(dir, nil, now, func(uri string) (crypto.Signer, error) {
		opened[uri] = true
		return keystore.Open(uri, []byte(pin))
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(opened) > 0 {
		t.Errorf("opened before it was needed: %v", opened)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: "spiffe://fleet.example/build/main", Now: now()})
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Sign("text/plain", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyBundle(b, a.Roots(pki.PurposeBuild), pki.PurposeBuild); err != nil {
		t.Error(err)
	}
	if len(opened) != 2 {
		t.Errorf("opened %v, want the build CA's and the TSA's key only", opened)
	}
}
