package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"

	"ringwall/internal/pki"
)

// A package counts as the archive's only when an index that the archive signed
// lists this very version; an index that was changed afterwards counts for nothing.
func TestLearn_signedIndex(t *testing.T) {
	for _, tc := range []struct {
		name     string
		tamper   string // appended to the index after signing
		verified bool
	}{
		{"signed", "", true},
		{"changed", "\nPackage: more\nVersion: 1\nArchitecture: all\nFilename: x\nSize: 1\nSHA256: " + strings.Repeat("0", 64) + "\n", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root, keys := t.TempDir(), filepath.Join(t.TempDir(), "keys")
			write := func(name, text string) {
				t.Helper()
				p := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			record := func(name, version string) string {
				return "Package: " + name + "\nStatus: install ok installed\nMaintainer: Nobody\nArchitecture: all\nVersion: " + version + "\nDescription: x\n\n"
			}
			write("var/lib/dpkg/status", record("listed", "1.0")+record("older", "1.0"))
			write("var/lib/dpkg/info/listed.list", "/.\n/usr\n/usr/bin\n/usr/bin/listed\n")
			write("var/lib/dpkg/info/listed.md5sums", strings.Repeat("0", 32)+"  usr/bin/listed\n")
			write("var/lib/dpkg/info/older.list", "/.\n")
			write("usr/bin/listed", "#!/bin/sh\n# not as it was\n")
			keyring := signedLists(t, write, tc.tamper)
			write("archive.gpg", keyring)
			if _, err := pki.CreateAuthority(keys, pki.AuthorityOptions{Name: "Fleet", Now: time.Now}); err != nil {
				t.Fatal(err)
			}
			var out, said bytes.Buffer
			e := &env{stdout: &out, stderr: &said, now: time.Now}
			code := run(t.Context(), []string{"policy", "learn", "--keys", keys, "--root", root, "--archive", "test=" + filepath.Join(root, "archive.gpg")}, e)
			if code != 0 {
				t.Fatalf("exit code %d: %s", code, said.String())
			}
			for text, want := range map[string]bool{
				`package: {archive: "test", names: ["*"]}`: tc.verified,
				"#   listed 1.0: 1\n":                      tc.verified, // one of its files was changed
				"#   older 1.0\n":                          true,        // the index has 2.0
				"#   listed 1.0\n":                         !tc.verified,
			} {
				if strings.Contains(out.String(), text) != want {
					t.Errorf("%q there: %v, want %v\n%s\n%s", text, !want, want, out.String(), said.String())
				}
			}
		})
	}
}

// signedLists writes an archive's index as apt keeps it, and returns the keyring.
func signedLists(t *testing.T, write func(name, text string), tamper string) string {
	t.Helper()
	key, err := openpgp.NewEntity("Test archive", "", "archive@example.invalid", nil)
	if err != nil {
		t.Fatal(err)
	}
	var index strings.Builder
	for _, p := range [][2]string{{"listed", "1.0"}, {"older", "2.0"}} {
		fmt.Fprintf(&index, "Package: %s\nVersion: %s\nArchitecture: all\nFilename: pool/%s.deb\nSize: 1\nSHA256: %s\n\n", p[0], p[1], p[0], strings.Repeat("0", 64))
	}
	release := fmt.Sprintf("Origin: Test\nSuite: stable\nCodename: test\nDate: %s\nSHA256:\n %x %d main/binary-all/Packages\n",
		time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 UTC"), sha256.Sum256([]byte(index.String())), index.Len())
	var signed, keyring bytes.Buffer
	w, err := clearsign.Encode(&signed, key.PrivateKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(release)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := key.Serialize(&keyring); err != nil {
		t.Fatal(err)
	}
	const stem = "var/lib/apt/lists/archive.example.invalid_dists_test_"
	write(stem+"InRelease", signed.String())
	write(stem+"main_binary-all_Packages", index.String()+tamper)
	return keyring.String()
}
