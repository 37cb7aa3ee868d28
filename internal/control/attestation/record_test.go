package attestation_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/codesign"
	"ringwall/internal/control/attestation"
	"ringwall/internal/pki"
	"ringwall/internal/store"
)

// signed are the lab's files as a release's catalogue.
type signed struct{ *codesign.Catalogue }

func (s signed) Knows(alg string, digest []byte, verity bool) bool {
	if alg != "sha256" || verity || len(digest) != sha256.Size {
		return false
	}
	_, found := s.Lookup([32]byte(digest))
	return found
}
func (s signed) Names() []string { return []string{"sha256:" + s.Digest().String()} }

// TestRecord makes the recordings that the command line is tested with, in the
// directory that RINGWALL_RECORD names:
//
//	RINGWALL_RECORD=$PWD/cmd/ringwall/testdata/attest go test -run TestRecord ./internal/control/attestation
func TestRecord(t *testing.T) {
	dir := os.Getenv("RINGWALL_RECORD")
	if dir == "" {
		t.Skip("recordings are made on demand")
	}
	l, m := ready(t)
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	one, two := sha256.Sum256([]byte("one")), sha256.Sum256([]byte("two"))
	blob, err := codesign.EncodeCatalogue([]codesign.Record{{Digest: one, Kinds: 2}, {Digest: two, Kinds: 2}})
	if err != nil {
		t.Fatal(err)
	}
	cat, err := codesign.ParseCatalogue(blob)
	if err != nil {
		t.Fatal(err)
	}
	l.tree.Catalogues = func(context.Context, string) (attest.Catalogues, error) { return signed{cat}, nil }
	write("files.cat", blob)
	l.policy("all", goodPolicy(t), attestation.Enrolment{Allowed: []attest.HostID{m.tpmID()}})
	keep := func(name string) {
		t.Helper()
		err := l.store.Read(t.Context(), func(tx *store.Tx) error {
			b, _, err := tx.AttestationArchive(t.Context(), "web-1", l.clock.now().Add(time.Hour))
			write(name, b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	l.accepted("web-1", m)
	keep("good.json.gz")
	l.clock.pass(time.Minute)
	m.use(file{path: "/tmp/rogue", content: "rogue"})
	l.refused("web-1", m, attest.ReasonIMAUnknown)
	keep("rogue.json.gz")
	for _, p := range pki.Purposes() {
		write("keys/"+p.String()+"-ca.crt", pki.EncodeCertificate(l.authority.Issuers[p].Cert))
	}
	write("keys/root.crt", pki.EncodeCertificate(l.authority.Root.Cert))
	write("keys/tsa.crt", pki.EncodeCertificate(l.authority.TSA.Cert))
	policy, err := json.MarshalIndent(goodPolicy(t), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	write("policy.json", policy)
	c := &attest.Collected{Identity: *m.identity(), Nonce: make([]byte, attest.NonceSize), At: l.clock.now()}
	for i := range c.Nonce {
		c.Nonce[i] = 7
	}
	c.Evidence.Bank = "sha256"
	a, err := m.prover.Answer(c.Question(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Evidence = a.Evidence
	b, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if b, err = attestation.Zip(b); err != nil {
		t.Fatal(err)
	}
	write("evidence.json.gz", b)
	write("tpm", []byte(string(m.tpmID())+"\n"))
}
