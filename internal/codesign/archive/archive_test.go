package archive_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"ringwall/internal/codesign"
	"ringwall/internal/codesign/archive"
	"ringwall/internal/errs"
)

const release = `Origin: Example
Suite: stable
Codename: test
Date: Sat, 10 May 2031 09:00:00 UTC
Valid-Until: Sat, 17 May 2031 09:00:00 UTC
SHA256:
 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0 main/binary-amd64/Packages
`

func at() time.Time { return time.Date(2031, 5, 10, 10, 0, 0, 0, time.UTC) }

func newKey(t testing.TB) (*openpgp.Entity, *packet.Config) {
	t.Helper()
	c := &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return at().Add(-time.Hour) }}
	e, err := openpgp.NewEntity("archive", "", "archive@example.invalid", c)
	if err != nil {
		t.Fatal(err)
	}
	return e, c
}

func keyring(t testing.TB, e *openpgp.Entity, armoured bool) []byte {
	t.Helper()
	var b bytes.Buffer
	if !armoured {
		if err := e.Serialize(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	w, err := armor.Encode(&b, openpgp.PublicKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Serialize(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func sign(t testing.TB, e *openpgp.Entity, c *packet.Config, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := clearsign.Encode(&b, e.PrivateKey, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

func TestVerifyInRelease(t *testing.T) {
	e, c := newKey(t)
	good := sign(t, e, c, release)
	for _, armoured := range []bool{false, true} {
		s, err := archive.VerifyInRelease(good, keyring(t, e, armoured), at())
		if err != nil {
			t.Fatal(err)
		}
		if s.Suite != "stable" || s.Codename != "test" || len(s.Files) != 1 || s.ValidUntil.Sub(s.Date) != 7*24*time.Hour || s.Signer == "" {
			t.Errorf("%+v", s)
		}
	}
	ring := keyring(t, e, false)
	stranger, _ := newKey(t)
	edit := func(from, to string) []byte { return bytes.Replace(good, []byte(from), []byte(to), 1) }
	for name, data := range map[string][]byte{
		"tampered":            edit("stable", "stabel"),
		"digest tampered":     edit("e3b0c442", "e3b0c443"),
		"text before":         append([]byte("Suite: evil\n\n"), good...),
		"text after":          append(bytes.Clone(good), "Suite: evil\n"...),
		"two messages":        append(bytes.Clone(good), good...),
		"line before":         append([]byte("\n"), good...),
		"signed by stranger":  sign(t, stranger, c, release),
		"armour header added": edit("\n\n", "\nSuite: evil\n\n"),
		"not signed":          []byte(release),
		"no suite":            sign(t, e, c, "Date: Sat, 10 May 2031 09:00:00 UTC\n"),
		"two stanzas":         sign(t, e, c, release+"\n"+release),
		"field twice":         sign(t, e, c, "Suite: other\n"+release),
		"path climbs":         sign(t, e, c, release+" e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0 ../../x\n"),
		"no digests":          sign(t, e, c, "Suite: x\nDate: Sat, 10 May 2031 09:00:00 UTC\n"),
		"local time":          sign(t, e, c, "Suite: x\nDate: Sat, 10 May 2031 09:00:00 CET\n"),
		"empty":               nil,
	} {
		_, err := archive.VerifyInRelease(data, ring, at())
		if !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := archive.VerifyInRelease(good, keyring(t, stranger, false), at()); !errors.Is(err, errs.Untrusted) {
		t.Errorf("other keyring: %v", err)
	}
	if _, err := archive.VerifyInRelease(good, []byte("junk"), at()); err == nil {
		t.Error("junk keyring accepted")
	}
	if _, err := archive.VerifyInRelease(good, nil, at()); err == nil {
		t.Error("empty keyring accepted")
	}
}

// The machine's own archive indices, verified with Debian's own keyring.
func TestVerifyInRelease_thisMachine(t *testing.T) {
	files, err := filepath.Glob("/var/lib/apt/lists/*_InRelease")
	if err != nil {
		t.Fatal(err)
	}
	ring, err := os.ReadFile("/usr/share/keyrings/debian-archive-keyring.gpg")
	if err != nil || len(files) == 0 {
		t.Skipf("SKIPPED: no apt lists (%d) or no Debian keyring (%v); real InRelease files are not tested", len(files), err)
	}
	verified := 0
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		s, err := archive.VerifyInRelease(data, ring, time.Now())
		if err != nil {
			t.Logf("%s: %v", filepath.Base(f), err) // another vendor's, perhaps
			continue
		}
		verified++
		if s.Origin != "Debian" || len(s.Files) < 10 || s.Date.IsZero() {
			t.Errorf("%s: %+v", f, s.Suite)
		}
		for name, bad := range map[string][]byte{
			"tampered": bytes.Replace(data, []byte("\nSHA256:\n"), []byte("\nSHA256:\n "+string(bytes.Repeat([]byte("a"), 64))+" 1 evil\n"), 1),
			"after":    append(bytes.Clone(data), 'x'),
		} {
			if _, err := archive.VerifyInRelease(bad, ring, time.Now()); !errors.Is(err, errs.Untrusted) {
				t.Errorf("%s %s: %v", f, name, err)
			}
		}
	}
	if verified == 0 {
		t.Skip("SKIPPED: none of the apt lists is Debian's")
	}
}

func FuzzVerifyInRelease(f *testing.F) {
	e, c := newKey(f)
	ring := keyring(f, e, false)
	f.Add(sign(f, e, c, release))
	f.Add([]byte(release))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := archive.VerifyInRelease(b, ring, at())
		if err == nil && (s.Suite != "stable" || len(s.Files) != 1) {
			t.Errorf("forged: %q", b)
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

// The whole chain on this machine: signature, index, every package in it.
func TestChain_thisMachine(t *testing.T) {
	helper := "/usr/lib/apt/apt-helper" // reads apt's compressed lists
	ring, err := os.ReadFile("/usr/share/keyrings/debian-archive-keyring.gpg")
	lists, globErr := filepath.Glob("/var/lib/apt/lists/*_InRelease")
	_, statErr := os.Stat(helper)
	if err := errors.Join(err, globErr, statErr); err != nil || len(lists) == 0 {
		t.Skipf("SKIPPED: no apt lists, keyring or apt-helper (%v); the chain is not tested on real files", err)
	}
	packages := 0
	for _, in := range lists {
		data, err := os.ReadFile(in)
		if err != nil {
			t.Fatal(err)
		}
		s, err := archive.VerifyInRelease(data, ring, time.Now())
		if err != nil {
			continue
		}
		for name, want := range s.Files {
			list := strings.TrimSuffix(in, "InRelease") + strings.ReplaceAll(name, "/", "_")
			found, err := filepath.Glob(list + "*")
			if err != nil || len(found) != 1 || !strings.HasSuffix(name, "/Packages") {
				continue
			}
			text, err := exec.Command(helper, "cat-file", found[0]).Output()
			if err != nil {
				t.Fatal(err)
			}
			err = codesign.VerifyIndex(bytes.NewReader(text), want, func(r io.Reader) error {
				return codesign.ParsePackages(r, func(codesign.Package) error { packages++; return nil })
			})
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if packages == 0 {
		t.Skip("SKIPPED: no Packages index here")
	}
	t.Logf("%d packages under verified signatures", packages)
}
