package interop

import (
	"crypto/sha256"
	"encoding/json"
	"testing"

	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

// Evidence that gates believe is evidence to everybody who reads in-toto: the
// statement, its one subject and its annotations parse as in-toto's own.
func TestEvidence(t *testing.T) {
	const ci = "spiffe://fleet.example/attest/ci"
	w := newWorld(t)
	artefact := []byte("an artefact")
	s, err := w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: ci, Now: w.at})
	if err != nil {
		t.Fatal(err)
	}
	statement, err := gate.EncodeStatement(gate.Subject{
		Name: "edged.deb", SHA256: sha256.Sum256(artefact), Gate: "unit", Revision: "8c1f2a77d2a5c0b3f4e5d6c7b8a9f0e1d2c3b4a5",
	}, gate.TypeTest, json.RawMessage(`{"result":"PASSED","configuration":[{"name":"go test"}],"passedTests":["a"]}`))
	if err != nil {
		t.Fatal(err)
	}
	b, err := gate.Sign(s, statement)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Open(b, w.Roots(pki.PurposeAttest)); err != nil {
		t.Fatal(err)
	}
	r, err := w.SigstoreRoot(pki.PurposeAttest)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := root.NewTrustedRootFromJSON(r)
	if err != nil {
		t.Fatal(err)
	}
	v, err := verify.NewVerifier(trust, verify.WithSignedTimestamps(1))
	if err != nil {
		t.Fatal(err)
	}
	id, err := verify.NewShortCertificateIdentity("", ".*", ci, "")
	if err != nil {
		t.Fatal(err)
	}
	var parsed bundle.Bundle
	if err := parsed.UnmarshalJSON(b); err != nil {
		t.Fatal(err)
	}
	for about, good := range map[string]bool{string(artefact): true, "another artefact": false} {
		sum := sha256.Sum256([]byte(about))
		got, err := v.Verify(&parsed, verify.NewPolicy(verify.WithArtifactDigest("sha256", sum[:]), verify.WithCertificateIdentity(id)))
		if (err == nil) != good {
			t.Errorf("%s: %v", about, err)
		}
		if good && err == nil && got.Statement.GetPredicateType() != gate.TypeTest {
			t.Errorf("it reads predicate type %q", got.Statement.GetPredicateType())
		}
	}
}
