package signer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

const commit = "8c1f2a77d2a5c0b3f4e5d6c7b8a9f0e1d2c3b4a5"

func epoch() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

// tarInput is a tar archive as the signer's input.
type tarInput struct {
	codesign.Source
	f   *os.File
	sum io.Writer
	get func() integrity.Digest
}

func openTar(_ context.Context, path string) (signer.Input, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	return &tarInput{codesign.TarSource(io.TeeReader(f, h)), f, h, func() integrity.Digest { return integrity.Digest(h.Sum(nil)) }}, nil
}

func (i *tarInput) Close() error                                      { return i.f.Close() }
func (i *tarInput) Name() string                                      { return filepath.Base(i.f.Name()) }
func (i *tarInput) Digest() integrity.Digest                          { return i.get() }
func (i *tarInput) Package() (name, version, arch string, isPkg bool) { return }

// world is a signer with everything that it needs, all of it kept in memory or
// in a test's directory.
type world struct {
	*signer.Signer
	authority *pki.Authority
	dir, file string
	digest    gate.Digest
	now       time.Time

	mu            sync.Mutex
	audit, alerts []signer.Entry
	auditErr      error

	failing, approved []signer.Evidence
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), now: epoch()}
	var err error
	w.authority, err = pki.CreateAuthority(filepath.Join(w.dir, "keys"), pki.AuthorityOptions{Name: "Fleet", Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	w.file = filepath.Join(w.dir, "edged.tar")
	b := archive(t, map[string]string{"bin/edged": "#!/bin/sh\necho edged\n"})
	w.put(t, "edged.tar", b)
	w.digest = sha256.Sum256(b)
	w.put(t, "policies/edged.yaml", []byte(w.policy("edged")))
	w.Signer = &signer.Signer{
		Issuer: w.authority, Identity: "spiffe://fleet.example/build/edged", Open: openTar, Now: func() time.Time { return w.now },
		Policies: signer.PolicyDir(filepath.Join(w.dir, "policies")),
		Epochs:   &signer.EpochFile{Path: filepath.Join(w.dir, "epochs.json"), Write: os.WriteFile},
		Audit: func(_ context.Context, e signer.Entry) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.auditErr == nil {
				w.audit = append(w.audit, e)
			}
			return w.auditErr
		},
		Alert: func(_ context.Context, e signer.Entry) error { w.alerts = append(w.alerts, e); return nil },
	}
	return w
}

func (w *world) put(t *testing.T, name string, b []byte) {
	t.Helper()
	name = filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func archive(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (w *world) policy(product string) string {
	pem := func(b []byte) string { return strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n        ") }
	return fmt.Sprintf(`version: 1
name: %s-release
product: %s
rings: [canary, prod]
trust:
  authorities:
    - name: fleet
      certificate: |
        %s
  timestamps:
    - name: clock
      certificate: |
        %s
attesters:
  - {name: ci, authority: fleet, identity: spiffe://fleet.example/attest/ci}
  - {name: ann, authority: fleet, identity: spiffe://fleet.example/attest/ann}
  - {name: bob, authority: fleet, identity: spiffe://fleet.example/attest/bob}
gates:
  - {name: unit, kind: test, attesters: [ci]}
breakglass: {approvers: [ann, bob], ring: canary, max_time: 4h}
`, product, product, pem(pki.EncodeCertificate(w.authority.Issuers[pki.PurposeAttest].Cert)), pem(pki.EncodeCertificate(w.authority.TSA.Cert)))
}

func (w *world) evidence(t *testing.T, who, uri, predicate string) signer.Evidence {
	t.Helper()
	s, err := w.authority.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: "spiffe://fleet.example/attest/" + who, Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	st, err := gate.EncodeStatement(gate.Subject{SHA256: w.digest, Revision: commit}, uri, json.RawMessage(predicate))
	if err != nil {
		t.Fatal(err)
	}
	b, err := gate.Sign(s, st)
	if err != nil {
		t.Fatal(err)
	}
	return signer.Evidence{Label: who + ".evidence.json", Bundle: b}
}

func (w *world) passed(t *testing.T) signer.Evidence {
	return w.evidence(t, "ci", gate.TypeTest, `{"result":"PASSED","passedTests":["a"]}`)
}

func (w *world) approvals(t *testing.T) []signer.Evidence {
	p := `{"product":"edged","ring":"canary","reason":"INC-1","not_after":"2031-05-01T14:00:00Z"}`
	return []signer.Evidence{w.evidence(t, "ann", gate.TypeApproval, p), w.evidence(t, "bob", gate.TypeApproval, p)}
}

func (w *world) order(ev ...signer.Evidence) signer.Order {
	return signer.Order{Path: w.file, Product: "edged", Version: "4.7.0", Epoch: 3, Evidence: ev, ID: "1", Client: "test"}
}

var errFull = fmt.Errorf("disk full: %w", errs.Unsupported)
