package pki_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// memoryLog is a log in memory.
type memoryLog struct {
	pki.LogKey
	private *ecdsa.PrivateKey
	leaves  [][32]byte
}

func newLog(t testing.TB, origin string) *memoryLog {
	t.Helper()
	k := newKey(t)
	return &memoryLog{LogKey: pki.LogKey{Origin: origin, Key: &k.PublicKey}, private: k}
}

func (l *memoryLog) anchor() pki.LogAnchor { return pki.LogAnchor{Name: "the log", LogKey: l.LogKey} }

func (l *memoryLog) checkpoint() ([]byte, error) {
	return pki.SignCheckpoint(pki.Checkpoint{Origin: l.Origin, Size: uint64(len(l.leaves)), Root: treeHash(l.leaves)}, l.private)
}

func (l *memoryLog) Append(_ context.Context, bundle []byte) ([]byte, error) {
	body, err := pki.LogBody(bundle)
	if err != nil {
		return nil, err
	}
	l.leaves = append(l.leaves, pki.LeafHash(body))
	note, err := l.checkpoint()
	if err != nil {
		return nil, err
	}
	at := len(l.leaves) - 1
	return pki.AttachProof(bundle, pki.LogProof{LogID: l.ID(), Index: uint64(at), Hashes: path(at, l.leaves), Checkpoint: note})
}

// logged signs a payload into a log that has others before it.
func (w *world) logged(t testing.TB, l *memoryLog, payload string) []byte {
	t.Helper()
	s := w.signer(t, pki.PurposeBuild)
	s.Log = l
	b, err := s.Sign(payloadType, []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLogKey(t *testing.T) {
	l := newLog(t, "log.fleet.example")
	s := l.String()
	k, err := pki.ParseLogKey(s)
	if err != nil || k.Origin != l.Origin || !k.Key.Equal(l.Key) {
		t.Fatalf("%s: %v", s, err)
	}
	hash := strings.Split(s, "+")[1]
	for name, bad := range map[string]string{
		"empty": "", "no hash": strings.Replace(s, "+"+hash, "", 1), "other hash": strings.Replace(s, hash, "00000000", 1),
		"other origin is another key": "Log" + s[3:], "space": " " + s, "line": s + "\n", "long": s + strings.Repeat("A", 600),
		"Ed25519": "a.test+12345678+AZf3kpyTKLAyKuC2B2cFmRPRUm4XrVtPhdEDK0/UbWwL",
	} {
		if _, err := pki.ParseLogKey(bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
}

func FuzzParseLogKey(f *testing.F) {
	f.Add(newLog(f, "log.fleet.example").String())
	f.Fuzz(func(t *testing.T, s string) {
		if k, err := pki.ParseLogKey(s); err == nil && k.String() != s {
			t.Errorf("%q has another spelling, %q", s, k)
		}
	})
}

func TestOpenCheckpoint(t *testing.T) {
	l, other := newLog(t, "log.fleet.example"), newLog(t, "log.fleet.example")
	l.leaves = someLeaves(5)
	good, err := l.checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.OpenCheckpoint(good, &l.LogKey)
	if err != nil || c.Size != 5 || c.Root != treeHash(l.leaves) {
		t.Fatalf("%+v, %v", c, err)
	}
	elsewhere := newLog(t, "other.fleet.example")
	foreign, err := pki.SignCheckpoint(pki.Checkpoint{Origin: l.Origin, Size: 5, Root: c.Root}, other.private)
	if err != nil {
		t.Fatal(err)
	}
	foreignLine := string(foreign[bytes.LastIndex(foreign, []byte("\n\n"))+2:])
	ownLine := string(good[bytes.LastIndex(good, []byte("\n\n"))+2:])
	text := strings.TrimSuffix(string(good), ownLine)
	witness := "\u2014 witness.example AAAABBBBCCCCDDDD\n"
	for name, c := range map[string]struct {
		note string
		want error
	}{
		"good":                     {string(good), nil},
		"and a cosignature":        {string(good) + witness, nil},
		"cosignature first":        {text + witness + ownLine, nil},
		"other key":                {string(foreign), errs.Untrusted},
		"signed by nobody known":   {text + witness, errs.Untrusted},
		"signed twice":             {string(good) + ownLine, errs.Untrusted},
		"other size":               {strings.Replace(string(good), "\n5\n", "\n6\n", 1), errs.Untrusted},
		"other origin":             {strings.Replace(string(good), l.Origin+"\n5", elsewhere.Origin+"\n5", 1), errs.Untrusted},
		"other name in the line":   {text + strings.Replace(ownLine, l.Origin, elsewhere.Origin, 1), errs.Untrusted},
		"size with a zero":         {strings.Replace(string(good), "\n5\n", "\n05\n", 1), errs.Invalid},
		"size with a sign":         {strings.Replace(string(good), "\n5\n", "\n+5\n", 1), errs.Invalid},
		"size of 2^63":             {strings.Replace(string(good), "\n5\n", "\n9223372036854775808\n", 1), errs.Invalid},
		"extension line":           {strings.Replace(string(good), "\n\n", "\nmore\n\n", 1), errs.Invalid},
		"origin not first":         {"x.example\n" + string(good), errs.Invalid},
		"carriage return":          {strings.Replace(string(good), "\n5\n", "\r\n5\n", 1), errs.Invalid},
		"no last newline":          {strings.TrimSuffix(string(good), "\n"), errs.Invalid},
		"no signature":             {text, errs.Invalid},
		"no empty line":            {strings.Replace(string(good), "\n\n", "\n", 1), errs.Invalid},
		"hyphen for the dash":      {text + "-" + strings.TrimPrefix(ownLine, "\u2014"), errs.Invalid},
		"signature not base64":     {text + "\u2014 " + l.Origin + " !!!!\n", errs.Invalid},
		"too many":                 {string(good) + strings.Repeat(witness, 16), errs.Invalid},
		"too long":                 {string(good) + strings.Repeat("\u2014 "+strings.Repeat("w", 1000)+" AAAABBBB\n", 9), errs.Invalid},
		"not UTF-8":                {string(good) + "\xff", errs.Invalid},
		"empty":                    {"", errs.Invalid},
		"foreign and own":          {string(good) + foreignLine, nil},
		"own hash, foreign signed": {text + "\u2014 " + l.Origin + " " + splice(t, ownLine, foreignLine) + "\n", errs.Untrusted},
	} {
		got, err := pki.OpenCheckpoint([]byte(c.note), &l.LogKey)
		if !errors.Is(err, c.want) || c.want == nil && got.Size != 5 {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// splice gives a signature the key hash of another one.
func splice(t *testing.T, hashOf, sigOf string) string {
	t.Helper()
	decode := func(line string) []byte {
		b, err := base64.StdEncoding.DecodeString(strings.Fields(line)[2])
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return base64.StdEncoding.EncodeToString(append(decode(hashOf)[:4], decode(sigOf)[4:]...))
}

func FuzzOpenCheckpoint(f *testing.F) {
	l := newLog(f, "log.fleet.example")
	l.leaves = someLeaves(5)
	good, err := l.checkpoint()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("a\n1\n\n\u2014 a AAAABBBB\n"))
	f.Fuzz(func(t *testing.T, note []byte) {
		c, err := pki.OpenCheckpoint(note, &l.LogKey)
		if err == nil && (c.Size != 5 || c.Root != treeHash(l.leaves)) {
			t.Errorf("forged: %q", note)
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func TestVerifyBundle_logged(t *testing.T) {
	w := newWorld(t)
	l := newLog(t, "log.fleet.example")
	l.leaves = someLeaves(9)
	b := w.logged(t, l, "x")
	plain := w.roots()
	with := w.roots(l)
	v, err := pki.VerifyBundle(b, with, pki.PurposeBuild)
	if err != nil {
		t.Fatal(err)
	}
	if v.Logged == nil || *v.Logged != (pki.Logged{Log: "the log", Index: 9, Size: 10}) {
		t.Errorf("%+v", v.Logged)
	}
	if v, err := pki.VerifyBundle(b, plain, pki.PurposeBuild); err != nil || v.Logged != nil {
		t.Errorf("without logs in the roots: %+v, %v", v, err)
	}
	unlogged, err := w.signer(t, pki.PurposeBuild).Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyBundle(unlogged, plain, pki.PurposeBuild); err != nil {
		t.Errorf("nobody asked for a log: %v", err)
	}
	if _, err := pki.VerifyBundle(unlogged, with, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("no proof: %v, want untrusted", err)
	}
	stranger := newLog(t, "log.fleet.example")
	if _, err := pki.VerifyBundle(w.logged(t, stranger, "x"), with, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another log of that name: %v, want untrusted", err)
	}
	if _, err := pki.VerifyBundle(w.logged(t, stranger, "x"), w.roots(l, stranger), pki.PurposeBuild); err != nil {
		t.Errorf("one of two logs is enough: %v", err)
	}
	renamed := l.anchor()
	renamed.Origin = "other.fleet.example"
	r := w.roots()
	r.Logs = []pki.LogAnchor{renamed}
	if _, err := pki.VerifyBundle(b, r, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("wrong origin: %v, want untrusted", err)
	}
}

// roots are those of the build CA, with these logs.
func (w *world) roots(logs ...*memoryLog) pki.TrustRoots {
	r := w.Roots(pki.PurposeBuild)
	for _, l := range logs {
		r.Logs = append(r.Logs, l.anchor())
	}
	return r
}

func TestVerifyBundle_logEdits(t *testing.T) {
	w := newWorld(t)
	l, other := newLog(t, "log.fleet.example"), newLog(t, "log.fleet.example")
	l.leaves = someLeaves(9)
	first := w.logged(t, l, "first")
	good := w.logged(t, l, "x")
	other.leaves = append(someLeaves(8), l.leaves[10])
	split, err := other.checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	decode := func(b []byte) (m object, entry object) {
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		return m, m["verificationMaterial"].(object)["tlogEntries"].([]any)[0].(object)
	}
	proof := func(e object) object { return e["inclusionProof"].(object) }
	_, firstEntry := decode(first)
	for name, c := range map[string]struct {
		want error
		edit func(m, e object)
	}{
		"nothing":                    {nil, func(_, _ object) {}},
		"swapped entry":              {errs.Untrusted, func(m, _ object) { m["verificationMaterial"].(object)["tlogEntries"] = []any{firstEntry} }},
		"swapped body":               {errs.Untrusted, func(_, e object) { e["canonicalizedBody"] = firstEntry["canonicalizedBody"] }},
		"swapped proof":              {errs.Invalid, func(_, e object) { e["inclusionProof"] = firstEntry["inclusionProof"] }},
		"two entries":                {errs.Invalid, func(m, e object) { m["verificationMaterial"].(object)["tlogEntries"] = []any{e, firstEntry} }},
		"the same twice":             {errs.Invalid, func(m, e object) { m["verificationMaterial"].(object)["tlogEntries"] = []any{e, e} }},
		"no entry":                   {errs.Untrusted, func(m, _ object) { m["verificationMaterial"].(object)["tlogEntries"] = []any{} }},
		"no proof":                   {errs.Invalid, func(_, e object) { delete(e, "inclusionProof") }},
		"no body":                    {errs.Untrusted, func(_, e object) { delete(e, "canonicalizedBody") }},
		"no checkpoint":              {errs.Invalid, func(_, e object) { delete(proof(e), "checkpoint") }},
		"no hashes":                  {errs.Untrusted, func(_, e object) { delete(proof(e), "hashes") }},
		"other hash":                 {errs.Untrusted, func(_, e object) { proof(e)["hashes"].([]any)[0] = proof(e)["rootHash"] }},
		"short hash":                 {errs.Invalid, func(_, e object) { proof(e)["hashes"].([]any)[0] = "AAAA" }},
		"wrong root hash":            {errs.Invalid, func(_, e object) { proof(e)["rootHash"] = proof(e)["hashes"].([]any)[0] }},
		"wrong tree size":            {errs.Invalid, func(_, e object) { proof(e)["treeSize"] = "12" }},
		"index of another":           {errs.Invalid, func(_, e object) { proof(e)["logIndex"] = "3" }},
		"both of another":            {errs.Untrusted, func(_, e object) { proof(e)["logIndex"], e["logIndex"] = "3", "3" }},
		"negative index":             {errs.Invalid, func(_, e object) { proof(e)["logIndex"], e["logIndex"] = "-1", "-1" }},
		"index as a number":          {errs.Invalid, func(_, e object) { e["logIndex"] = 10 }},
		"log id of another":          {errs.Untrusted, func(_, e object) { e["logId"].(object)["keyId"] = proof(e)["rootHash"] }},
		"log id missing":             {errs.Invalid, func(_, e object) { delete(e, "logId") }},
		"dsse 0.0.1":                 {errs.Invalid, func(_, e object) { e["kindVersion"] = object{"kind": "dsse", "version": "0.0.1"} }},
		"integrated time":            {errs.Invalid, func(_, e object) { e["integratedTime"] = "1" }},
		"inclusion promise":          {errs.Invalid, func(_, e object) { e["inclusionPromise"] = object{"signedEntryTimestamp": "AA=="} }},
		"checkpoint of a split view": {errs.Invalid, func(_, e object) { proof(e)["checkpoint"] = object{"envelope": string(split)} }},
		"whole proof of a split view": {errs.Untrusted, func(_, e object) {
			p := proof(e)
			root := treeHash(other.leaves)
			p["checkpoint"], p["treeSize"] = object{"envelope": string(split)}, "9"
			p["rootHash"] = base64.StdEncoding.EncodeToString(root[:])
			p["logIndex"], e["logIndex"] = "8", "8"
			p["hashes"] = []any{}
			for _, h := range path(8, other.leaves) {
				p["hashes"] = append(p["hashes"].([]any), base64.StdEncoding.EncodeToString(h[:]))
			}
		}},
	} {
		m, e := decode(good)
		c.edit(m, e)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pki.VerifyBundle(b, w.roots(l), pki.PurposeBuild); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// A log that fails keeps the signature from being handed out.
func TestSign_logFails(t *testing.T) {
	s := newWorld(t).signer(t, pki.PurposeBuild)
	s.Log = brokenLog{}
	if b, err := s.Sign(payloadType, []byte("x")); !errors.Is(err, errs.Denied) || b != nil {
		t.Errorf("%s, %v", b, err)
	}
}

type brokenLog struct{}

func (brokenLog) Append(context.Context, []byte) ([]byte, error) { return nil, errs.Denied }

func FuzzVerifyBundle_logged(f *testing.F) {
	w := newWorld(f)
	l := newLog(f, "log.fleet.example")
	l.leaves = someLeaves(3)
	f.Add(w.logged(f, l, "x"))
	roots := w.roots(l)
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := pki.VerifyBundle(b, roots, pki.PurposeBuild)
		if err == nil && (string(v.Payload) != "x" || v.Logged.Index != 3 || v.Logged.Size != 4) {
			t.Errorf("forged: %q", b)
		}
		if err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func TestAuthority_log(t *testing.T) {
	w := newWorld(t)
	if w.Log != nil || len(w.Roots(pki.PurposeBuild).Logs) > 0 {
		t.Error("a log that nobody made")
	}
	dir := t.TempDir()
	o := pki.AuthorityOptions{Name: "F", Now: w.clock.now, Passphrase: []byte("secret")}
	if _, err := pki.CreateAuthority(dir, o); err != nil {
		t.Fatal(err)
	}
	if _, _, err := pki.SaveLog(dir, "Not A Host", o); !errors.Is(err, errs.Invalid) {
		t.Errorf("bad origin: %v", err)
	}
	made, _, err := pki.SaveLog(dir, "log.fleet.example", o)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := pki.SaveLog(dir, "log.fleet.example", o); !errors.Is(err, errs.Conflict) {
		t.Errorf("a second log: %v", err)
	}
	a, err := pki.LoadAuthority(dir, []byte("secret"), w.clock.now)
	if err != nil {
		t.Fatal(err)
	}
	if a.Log.String() != made.String() || a.LogKey == nil || !made.Key.Equal(a.LogKey.Public()) {
		t.Error("another log than was made")
	}
	if len(a.Roots(pki.PurposeBuild).Logs) != 1 || len(a.Roots(pki.PurposePolicy).Logs) != 1 || len(a.Roots(pki.PurposePermit).Logs) != 0 {
		t.Error("the log is required of builds and policies, and not of permits")
	}
	if err := os.WriteFile(filepath.Join(dir, "log.pub"), []byte(newLog(t, "x.test").String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadAuthority(dir, []byte("secret"), w.clock.now); !errors.Is(err, errs.Invalid) {
		t.Errorf("key of another log: %v", err)
	}
}

func BenchmarkVerifyBundle_logged(b *testing.B) {
	w := newWorld(b)
	l := newLog(b, "log.fleet.example")
	l.leaves = someLeaves(10_000)
	bundle := w.logged(b, l, "x")
	roots := w.roots(l)
	b.ReportMetric(float64(len(bundle)), "bytes")
	for b.Loop() {
		if _, err := pki.VerifyBundle(bundle, roots, pki.PurposeBuild); err != nil {
			b.Fatal(err)
		}
	}
}
