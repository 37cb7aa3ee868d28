package gate_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
	"ringwall/internal/strictyaml"
)

// Each edit of a good policy is refused in the right place, with a fix.
func TestParsePolicy_problems(t *testing.T) {
	w := newWorld(t)
	good := w.document(allGates)
	for name, tc := range map[string]struct{ old, with, path, text string }{
		"unknown key":          {"min_epoch: 3", "min_epoche: 3", "min_epoche", "did you mean min_epoch?"},
		"repeated key":         {"min_epoch: 3", "min_epoch: 3\nmin_epoch: 4", "min_epoch", "remove one"},
		"version":              {"version: 1", "version: 2", "version", "number from 1 to 1"},
		"bad product":          {"product: edged", "product: Edged", "product", "release record"},
		"no gates":             {"gates:\n" + allGates, "gates: []", "gates", "is empty"},
		"unknown kind":         {"kind: scan", "kind: scam", "gates[2].kind", "did you mean scan?"},
		"a key of another":     {"kind: scan", "kind: scan, builders: [x]", "gates[2].builders", "unknown key"},
		"unknown attester":     {"kind: test, attesters: [ci]", "kind: test, attesters: [cj]", "gates[0].attesters", "did you mean ci?"},
		"nobody attests":       {"kind: test, attesters: [ci], ", "kind: test, ", "gates[0]", "lacks attesters"},
		"same name":            {"name: sast", "name: unit", "gates[2].name", "taken"},
		"reserved name":        {"name: sast", "name: epoch", "gates[2].name", "another name"},
		"age":                  {"max_age: 24h", "max_age: tomorrow", "gates[0].max_age", "30m, 24h or 7d"},
		"unlimited":            {"max_age: 24h", "max_age: 99999d", "gates[0].max_age", "up to 3650d"},
		"severity":             {"medium: 1", "mediun: 1", "gates[3].at_most.mediun", "did you mean medium?"},
		"anchor":               {"product: edged", "product: &x edged", "", "anchors are not allowed"},
		"unknown authority":    {"name: ci, authority: fleet", "name: ci, authority: flet", "attesters[0].authority", "did you mean fleet?"},
		"attester of nothing":  {"identity: spiffe://fleet.example/attest/ci}", "}", "attesters[0]", "either identity or key"},
		"identity":             {"identity: spiffe://fleet.example/attest/ci}", "identity: ci}", "attesters[0].identity", "certificate's URI"},
		"key":                  {"identity: spiffe://fleet.example/attest/ci}", "key: abc}", "attesters[0].key", "sha256sum"},
		"one approver":         {"approvers: [ann, bob]", "approvers: [ann]", "breakglass", "name more"},
		"few approvals":        {"ring: canary", "ring: canary\n  required: 1", "breakglass.required", "from 2"},
		"long break-glass":     {"max_time: 8h", "max_time: 48h", "breakglass.max_time", "up to 24h"},
		"unknown ring":         {"ring: canary", "ring: moon", "breakglass.ring", "one of canary"},
		"custom of a kind":     {"type: \"https://licences.example/v1\"", "type: \"https://slsa.dev/provenance/v1\"", "gates[7].type", "kind: provenance"},
		"provenance of source": {"kind: provenance,", "kind: provenance, about: source,", "gates[4]", "remove"},
		"kernel signature":     {"[fsverity, roothash]", "[fsverty]", "kernel_signatures[0]", "did you mean fsverity?"},
		"revoked, no digest":   {"attesters:\n  - {name: ci", "  revoked: [{sha256: abc}]\nattesters:\n  - {name: ci", "trust.revoked[0].sha256", "fingerprint"},
		"signed twice":         {"[fsverity, roothash]", "[ima, ima]", "kernel_signatures[1]", "there already"},
		"certificate":          {"-----BEGIN", "-----BEGUN", "trust.authorities[0].certificate", "paste"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := strings.Replace(good, tc.old, tc.with, 1)
			if doc == good {
				t.Fatal("the edit does nothing")
			}
			_, err := gate.ParsePolicy("p.yaml", []byte(doc))
			var e *strictyaml.Error
			if !errors.As(err, &e) || !errors.Is(err, errs.Invalid) {
				t.Fatalf("%v", err)
			}
			for _, p := range e.Problems {
				if p.Path == tc.path && strings.Contains(p.Text+" "+p.Fix, tc.text) && p.Line > 0 && p.Column > 0 {
					return
				}
			}
			t.Errorf("want %s: %s in\n%v", tc.path, tc.text, err)
		})
	}
}

// Evidence about a revision needs something that ties the artefact to it.
func TestParsePolicy_sourceNeedsArtefact(t *testing.T) {
	w := newWorld(t)
	_, err := gate.ParsePolicy("p", []byte(w.document("  - {name: review, kind: review, attesters: [forge], about: source}")))
	if err == nil || !strings.Contains(err.Error(), "would vouch for any artefact") {
		t.Errorf("%v", err)
	}
}

// What the parser takes, the schema takes; what it does not know, neither does.
func TestSchema(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(gate.Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("s.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("s.json")
	if err != nil {
		t.Fatal(err)
	}
	check := func(text string) error {
		var v any
		if err := yaml.Unmarshal([]byte(text), &v); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		inst, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return s.Validate(inst)
	}
	good := newWorld(t).document(allGates)
	if err := check(good); err != nil {
		t.Errorf("%v", err)
	}
	for _, edit := range [][2]string{
		{"min_epoch: 3", "x: 3"},
		{"version: 1", "version: 2"},
		{"kind: scan", "kind: scam"},
		{"kind: scan", "kind: scan, builders: [x]"},
		{"max_age: 24h", "max_age: 1y"},
		{", properties: [RINGWALL_CSV_PASSED]", ""},
		{"medium: 1", "mediun: 1"},
		{"[fsverity, roothash]", "[fsverity, fsverty]"},
		{"[fsverity, roothash]", "[]"},
	} {
		if check(strings.Replace(good, edit[0], edit[1], 1)) == nil {
			t.Errorf("the schema takes %s", edit[1])
		}
	}
}

// What a revoked certificate signed from then on counts nowhere.
func TestPolicy_revoked(t *testing.T) {
	w := newWorld(t)
	st, err := gate.EncodeStatement(about(), gate.TypeTest, json.RawMessage(`{"result":"PASSED","passedTests":["a"]}`))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := gate.Sign(w.signers["ci"], st)
	if err != nil {
		t.Fatal(err)
	}
	signed := w.now
	for name, tc := range map[string]struct {
		cert *x509.Certificate
		from string
		kind error
	}{
		"the attester's":              {w.signers["ci"].Leaf, "", errs.Untrusted},
		"its authority's":             {w.Issuers[pki.PurposeAttest].Cert, "", errs.Untrusted},
		"the timestamp authority's":   {w.TSA.Cert, "", errs.Untrusted},
		"from before it signed":       {w.signers["ci"].Leaf, signed.Add(-time.Minute).Format(time.RFC3339), errs.Untrusted},
		"from after it signed":        {w.signers["ci"].Leaf, signed.Add(time.Minute).Format(time.RFC3339), nil},
		"another attester's":          {w.signers["forge"].Leaf, "", nil},
		"another, from before it was": {w.signers["forge"].Leaf, signed.Add(-time.Minute).Format(time.RFC3339), nil},
	} {
		item := fmt.Sprintf("{sha256: %x", pki.Fingerprint(tc.cert))
		if tc.from != "" {
			item += ", from: " + tc.from
		}
		doc := strings.Replace(w.document(allGates), "attesters:\n", "  revoked:\n    - "+item+"}\nattesters:\n", 1)
		p, err := gate.ParsePolicy("p.yaml", []byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := gate.Open(bundle, p.Trust); !errors.Is(err, tc.kind) {
			t.Errorf("%s: %v, want %v", name, err, tc.kind)
		}
	}
}
