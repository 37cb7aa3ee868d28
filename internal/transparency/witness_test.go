package transparency_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/transparency-dev/formats/note"
	sumdb "golang.org/x/mod/sumdb/note"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

func TestWitness(t *testing.T) {
	private, key, err := transparency.NewWitness("witness.example/w1")
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := transparency.ParseWitnessKey(key.String())
	if err != nil || parsed.String() != key.String() {
		t.Fatalf("%s: %v", key, err)
	}
	logKey := newKey(t)
	log := pki.LogKey{Origin: origin, Key: &logKey.PublicKey}
	checkpoint, err := pki.SignCheckpoint(pki.Checkpoint{Origin: origin, Size: 7, Root: pki.LeafHash(nil)}, logKey)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)
	cosigned, err := transparency.Cosign(checkpoint, private, key, at)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := transparency.VerifyCosignature(cosigned, key); err != nil || !got.Equal(at) {
		t.Errorf("%v, %v", got, err)
	}
	if c, err := pki.OpenCheckpoint(cosigned, &log); err != nil || c.Size != 7 {
		t.Errorf("cosigned, the log's signature does not verify: %v", err)
	}

	// Others' code reads both keys and both signatures.
	witness, err := note.NewVerifierForCosignatureV1(key.String())
	if err != nil {
		t.Fatal(err)
	}
	theLog, err := note.NewECDSAVerifier(log.String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := sumdb.Open(cosigned, sumdb.VerifierList(theLog, witness))
	if err != nil || len(n.Sigs) != 2 {
		t.Errorf("%+v, %v", n, err)
	}

	line := cosigned[len(checkpoint):]
	raw, err := base64.StdEncoding.DecodeString(strings.Fields(string(line))[2])
	if err != nil {
		t.Fatal(err)
	}
	raw[11]++ // a second later
	later := append(bytes.Clone(checkpoint), "\u2014 "+key.Name+" "+base64.StdEncoding.EncodeToString(raw)+"\n"...)
	other, err := pki.SignCheckpoint(pki.Checkpoint{Origin: origin, Size: 8, Root: pki.LeafHash(nil)}, logKey)
	if err != nil {
		t.Fatal(err)
	}
	_, stranger, err := transparency.NewWitness(key.Name)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		note []byte
		key  *transparency.WitnessKey
		want error
	}{
		"not cosigned":      {checkpoint, key, errs.Untrusted},
		"by another":        {cosigned, stranger, errs.Untrusted},
		"twice":             {append(bytes.Clone(cosigned), line...), key, errs.Untrusted},
		"time moved":        {later, key, errs.Untrusted},
		"other checkpoint":  {append(bytes.Clone(other), line...), key, errs.Untrusted},
		"not a signed note": {[]byte("x"), key, errs.Invalid},
	} {
		if _, err := transparency.VerifyCosignature(c.note, c.key); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := transparency.Cosign(checkpoint, private, stranger, at); !errors.Is(err, errs.Invalid) {
		t.Errorf("with another key: %v", err)
	}
	for _, s := range []string{"", "a", "a+b", key.String() + "=", "x" + key.String(), log.String(), "a b+00000000+AAAA"} {
		if _, err := transparency.ParseWitnessKey(s); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func FuzzVerifyCosignature(f *testing.F) {
	private, key, err := transparency.NewWitness("w.example")
	if err != nil {
		f.Fatal(err)
	}
	note, err := transparency.Cosign([]byte("a.example\n1\nAAAA\n\n\u2014 a.example AAAABBBB\n"), private, key, time.Unix(1, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(note)
	f.Fuzz(func(t *testing.T, b []byte) {
		at, err := transparency.VerifyCosignature(b, key)
		if err == nil && (!bytes.HasPrefix(b, []byte("a.example\n1\nAAAA\n\n")) || at.Unix() != 1) {
			t.Errorf("forged: %q", b)
		}
	})
}

func FuzzParseWitnessKey(f *testing.F) {
	f.Add("w.example+00000000+BAAA")
	f.Fuzz(func(t *testing.T, s string) {
		if k, err := transparency.ParseWitnessKey(s); err == nil && k.String() != s {
			t.Errorf("%q has another spelling, %q", s, k)
		}
	})
}
