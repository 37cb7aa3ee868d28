package keystore_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/errs"
	"ringwall/internal/keystore"
	"ringwall/internal/pki"
)

func TestParseURI(t *testing.T) {
	for s, want := range map[string]*keystore.URI{
		"pkcs11:token=fleet;object=build-ca": {Token: "fleet", Object: "build-ca"},
		"pkcs11:serial=DECC0401648;type=private;id=%69%95%3E%5C?module-path=/usr/lib/x.so&pin-source=file:/run/pin": {
			Serial: "DECC0401648", ID: []byte("\x69\x95\x3e\x5c"), ModulePath: "/usr/lib/x.so", PINSource: "file:/run/pin",
		},
		"pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;object=my-key": {
			Token: "The Software PKCS#11 Softtoken", Manufacturer: "Snake Oil, Inc.", Model: "1.0", Object: "my-key",
		},
		"pkcs11:token=t;id=%00%0A": {Token: "t", ID: []byte("\x00\n")},
	} {
		got, err := keystore.ParseURI(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if len(got.ID) == 0 {
			got.ID = nil
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", s, d)
		}
		again, err := keystore.ParseURI(got.String())
		if err != nil || again.String() != got.String() {
			t.Errorf("%s: printed as %s: %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "pkcs11:", "file:x", "pkcs11:token", "pkcs11:token=", "pkcs11:token=a;token=b", "pkcs11:colour=red", "pkcs11:type=cert;token=a",
		"pkcs11:token=a%0Ab", "pkcs11:token=%zz", "pkcs11:token=a?module-name=p11", "pkcs11:token=a;", "pkcs11:type=private",
		"pkcs11:token=" + strings.Repeat("a", 1100),
	} {
		if _, err := keystore.ParseURI(s); !errors.Is(err, errs.Invalid) {
			t.Errorf("%.40q: %v, want invalid", s, err)
		}
	}
	if _, err := keystore.ParseURI("pkcs11:token=a?pin-value=1234"); err == nil || strings.Contains(err.Error(), "1234") {
		t.Errorf("a PIN in the URI: %v", err)
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("pkcs11:token=fleet;object=build-ca;id=%01?module-path=/m.so&pin-source=file:/p")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := keystore.ParseURI(s)
		if err != nil {
			return
		}
		again, err := keystore.ParseURI(u.String())
		if len(u.String()) <= 1<<10 && (err != nil || again.String() != u.String()) {
			t.Errorf("%q becomes %q: %v", s, u, err)
		}
	})
}

func TestOpen_file(t *testing.T) {
	dir := t.TempDir()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	data, err := pki.EncodeKey(k, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a key")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	escaped := strings.ReplaceAll(path, " ", "%20")
	for _, uri := range []string{"file:" + escaped, "file://" + escaped} {
		got, err := keystore.Open(uri, []byte("secret"))
		if err != nil || !k.PublicKey.Equal(got.Public()) {
			t.Errorf("%s: %v", uri, err)
		}
	}
	if _, err := keystore.Open("file:"+escaped, []byte("wrong")); !errors.Is(err, errs.Denied) && !errors.Is(err, errs.Invalid) {
		t.Errorf("wrong passphrase: %v", err)
	}
	for _, uri := range []string{"file:", "file://host/x", "https://x.test/key", path} {
		if _, err := keystore.Open(uri, nil); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, want invalid", uri, err)
		}
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.Open("file:"+escaped, []byte("secret")); !errors.Is(err, errs.Denied) {
		t.Errorf("a key that others can read: %v", err)
	}
}

func TestReadSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	for content, want := range map[string]string{"1234": "1234", "1234\r\nmore": "1234", "": "", "\n": "", strings.Repeat("x", 2000): ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := keystore.ReadSecret(path)
		if string(got) != want || (err != nil) != (want == "") {
			t.Errorf("%.10q: %q, %v", content, got, err)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.ReadSecret(path); !errors.Is(err, errs.Denied) {
		t.Errorf("a PIN that others can read: %v", err)
	}
}
