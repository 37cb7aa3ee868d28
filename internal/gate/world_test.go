package gate_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/gate"
	"ringwall/internal/pki"
)

const (
	commit  = "8c1f2a77d2a5c0b3f4e5d6c7b8a9f0e1d2c3b4a5"
	another = "0000000000000000000000000000000000000001"
)

func epoch() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

// world is a fleet with attesters.
type world struct {
	*pki.Authority
	now     time.Time
	signers map[string]*pki.Signer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{now: epoch(), signers: map[string]*pki.Signer{}}
	var err error
	w.Authority, err = pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Example Fleet", Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	w.TSA.Now = func() time.Time { return w.now }
	for _, who := range []string{"ci", "forge", "psirt", "ann", "bob", "eve"} {
		w.signers[who], err = w.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: "spiffe://fleet.example/attest/" + who, Now: w.now})
		if err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func indent(pem []byte, by int) string {
	return strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n"+strings.Repeat(" ", by))
}

// policy is a release policy with the gates given, as YAML list items.
func (w *world) document(gates string) string {
	return fmt.Sprintf(`version: 1
name: edged-release
product: edged
min_epoch: 3
rings: [canary, internal, prod]
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
  - {name: forge, authority: fleet, identity: spiffe://fleet.example/attest/forge}
  - {name: psirt, authority: fleet, identity: spiffe://fleet.example/attest/psirt}
  - {name: ann, authority: fleet, identity: spiffe://fleet.example/attest/ann}
  - {name: bob, authority: fleet, identity: spiffe://fleet.example/attest/bob}
gates:
%s
breakglass:
  approvers: [ann, bob]
  ring: canary
  max_time: 8h
kernel_signatures: [fsverity, roothash]
`, indent(pki.EncodeCertificate(w.Issuers[pki.PurposeAttest].Cert), 8), indent(pki.EncodeCertificate(w.TSA.Cert), 8), gates)
}

const allGates = `  - {name: unit, kind: test, attesters: [ci], at_least: 2, max_age: 24h}
  - {name: review, kind: review, attesters: [forge], reviewers: 1, about: source, max_age: 30d}
  - {name: sast, kind: scan, attesters: [ci], at_most: {warning: 1, note: any}}
  - {name: vulns, kind: vulns, attesters: [ci], at_most: {medium: 1, low: any, none: any}, database_age: 48h, vex: [psirt]}
  - {name: built, kind: provenance, attesters: [ci], builders: ["https://ci.example/runner"], source: "git+https://git.example/edged"}
  - {name: csv, kind: verification, attesters: [ci], properties: [RINGWALL_CSV_PASSED]}
  - {name: surface, kind: surface, attesters: [ci], reviewers: 1}
  - {name: licences, kind: custom, attesters: [ci], type: "https://licences.example/v1", require: {summary.result: pass}}`

func (w *world) policy(t *testing.T, gates string) *gate.Policy {
	t.Helper()
	p, err := gate.ParsePolicy("release.yaml", []byte(w.document(gates)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func artefact() gate.Digest { return sha256.Sum256([]byte("edged")) }

func request() gate.Request {
	return gate.Request{Product: "edged", Version: "4.7.0", Epoch: 12, Artefact: artefact()}
}

func about() gate.Subject {
	return gate.Subject{Name: "edged.deb", SHA256: artefact(), Revision: commit}
}

// attest signs a statement, and opens it as a signer would.
func (w *world) attest(t *testing.T, p *gate.Policy, who string, s gate.Subject, predicateType, predicate string) *gate.Evidence {
	t.Helper()
	st, err := gate.EncodeStatement(s, predicateType, json.RawMessage(predicate))
	if err != nil {
		t.Fatal(err)
	}
	b, err := gate.Sign(w.signers[who], st)
	if err != nil {
		t.Fatal(err)
	}
	v, err := gate.Open(b, p.Trust)
	if err != nil {
		t.Fatal(err)
	}
	v.Label = who + " " + string(v.Kind)
	return v
}

// Predicates that pass allGates.
const (
	goodTest    = `{"result":"PASSED","configuration":[],"passedTests":["a.TestOne","a.TestTwo"]}`
	goodReview  = `{"reviewers":[{"name":"Ann","uri":"mailto:ann@example.org"}],"annotations":{"authors":[{"name":"Bob","uri":"mailto:bob@example.org"}]}}`
	goodScan    = `{"tool":{"name":"vet"},"counts":{"error":0,"warning":1,"note":7}}`
	goodVulns   = `{"scanner":{"uri":"pkg:x/scan","db":{"lastUpdate":"2031-05-01T00:00:00Z"},"result":[{"id":"CVE-1","severity":[{"method":"nvd","score":"low"}]}]},"metadata":{"scanStartedOn":"2031-05-01T11:00:00Z","scanFinishedOn":"2031-05-01T11:30:00Z"}}`
	goodBuilt   = `{"buildDefinition":{"buildType":"https://ci.example/t","externalParameters":{},"resolvedDependencies":[{"uri":"git+https://git.example/edged","digest":{"gitCommit":"` + commit + `"}},{"uri":"git+https://git.example/lib","digest":{"gitCommit":"` + another + `"}}]},"runDetails":{"builder":{"id":"https://ci.example/runner"}}}`
	goodCSV     = `{"verifier":{"id":"urn:ringwall:csv:v1"},"timeCreated":"2031-05-01T11:59:00Z","properties":["RINGWALL_CSV_PASSED"]}`
	goodSurface = `{"new":["listens tcp/8443"],"approved":[{"item":"listens tcp/8443","by":{"name":"Ann"}}]}`
	goodCustom  = `{"summary":{"result":"pass"}}`

	customType = "https://licences.example/v1"
)

// evidence is everything that allGates want; replace changes pieces by kind.
func (w *world) evidence(t *testing.T, p *gate.Policy, replace map[string]string) []*gate.Evidence {
	t.Helper()
	var out []*gate.Evidence
	for _, x := range []struct {
		name, who, uri, predicate string
		subject                   gate.Subject
	}{
		{"test", "ci", gate.TypeTest, goodTest, about()},
		{"review", "forge", gate.TypeReview, goodReview, gate.Subject{Commit: commit}},
		{"scan", "ci", gate.TypeScan, goodScan, about()},
		{"vulns", "ci", gate.TypeVulns, goodVulns, about()},
		{"provenance", "ci", gate.TypeProvenance, goodBuilt, gate.Subject{SHA256: artefact()}},
		{"verification", "ci", gate.TypeSVR, goodCSV, about()},
		{"surface", "ci", gate.TypeSurface, goodSurface, about()},
		{"custom", "ci", customType, goodCustom, about()},
	} {
		if r, ok := replace[x.name]; ok {
			if r == "" {
				continue
			}
			x.predicate = r
		}
		out = append(out, w.attest(t, p, x.who, x.subject, x.uri, x.predicate))
	}
	return out
}
