package agent

import (
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// A release that was signed past its gates runs only where the policy names
// break-glass, only until it ends, and never without a notice.
func TestRelease_breakglass(t *testing.T) {
	l := newLab(t)
	const content = "#!/bin/sh\n# hotfix\n"
	rel := l.release(content)
	var err error
	rel.Record, err = codesign.SignRelease(l.signer(l.keys, pki.PurposeBreakglass), codesign.ReleaseInfo{
		Product: "tool", Version: "1", Epoch: 1, Policy: sha256.Sum256([]byte("policy")), Ring: "canary", Breakglass: "INC-4711",
		NotAfter: l.now().Add(2 * time.Hour), Gates: []codesign.Gate{
			{Name: "breakglass", Attester: "spiffe://fleet.example/ann", Evidence: sha256.Sum256([]byte("1")), At: l.now()},
			{Name: "breakglass", Attester: "spiffe://fleet.example/bob", Evidence: sha256.Sum256([]byte("2")), At: l.now()},
		},
	}, rel.Catalogue, rel.Names)
	if err != nil {
		t.Fatal(err)
	}
	k := integrity.Key{Digest: sha256.Sum256([]byte(content))}
	l.prepare(l.policy(5, "audit", allowTool))
	l.start()
	var a ReleaseAnswer
	if err := l.client().Call(t.Context(), "release", rel, &a); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a policy that does not name break-glass: %v", err)
	}
	l.stop()

	pem := strings.ReplaceAll(strings.TrimSpace(string(pki.EncodeCertificate(l.keys.Issuers[pki.PurposeBreakglass].Cert))), "\n", "\n        ")
	doc := strings.Replace(l.policyYAML(6, "audit", "allow:\n  - {rule: glass, signer: {authority: glass, product: tool}}\n"),
		"  timestamps:\n", "    - name: glass\n      signs: [breakglass]\n      certificate: |\n        "+pem+"\n  timestamps:\n", 1)
	if err := os.RemoveAll(l.state()); err != nil {
		t.Fatal(err)
	}
	l.prepare(l.signedBy(l.keys, doc))
	l.start()
	if err := l.client().Call(t.Context(), "release", rel, &a); err != nil {
		t.Fatal(err)
	}
	if !l.kernel.live().Allows(k, integrity.KindScript) {
		t.Error("the release is not in the kernel's table")
	}
	l.waitFor("signed past its gates")
	l.waitFor("INC-4711")
	l.forward(2*time.Hour + time.Second)
	l.agent.tend(t.Context())
	if l.kernel.live().Allows(k, integrity.KindScript) {
		t.Error("it runs although it has ended")
	}
}
