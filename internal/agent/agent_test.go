package agent

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func certs(i *pki.Issuer) []*x509.Certificate { return []*x509.Certificate{i.Cert} }

const allowTool = "allow:\n  - rule: tools\n    signer: {authority: build, product: tool, min_epoch: 1}\n"

func TestAgent_enforcesWhatItWasGiven(t *testing.T) {
	l := newLab(t)
	rel := l.release("#!/bin/sh\necho tool\n")
	l.prepare(l.policy(5, "enforce", allowTool), rel)
	l.start()
	s := l.status()
	if s.State != StateEnforcing || s.Policy.Epoch != 5 || s.Sources != 1 || s.Host != "host-1" {
		t.Fatalf("status %+v", s)
	}
	if len(s.Unlisted) != 1 || s.Unlisted[0].Program != "/old" {
		t.Errorf("running but not authorised: %+v", s.Unlisted)
	}
	k := integrity.Key{Digest: sha256.Sum256([]byte("#!/bin/sh\necho tool\n"))}
	if !l.kernel.live().Allows(k, integrity.KindScript) {
		t.Error("the release's script is not in the kernel's table")
	}
	if !l.kernel.protected || len(l.kernel.guarded) == 0 {
		t.Error("the guards are not up")
	}
}

func TestAgent_withoutPolicy(t *testing.T) {
	l := newLab(t)
	l.prepare(nil)
	l.start()
	if s := l.status(); s.State != StateNoPolicy {
		t.Errorf("state %q", s.State)
	}
	var s Status
	if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: l.policy(1, "audit", "")}, &s); err != nil {
		t.Fatal(err)
	}
	if s.State != StateAuditing {
		t.Errorf("state %q: %s", s.State, s.Text)
	}
}

func TestApplyPolicy_refuses(t *testing.T) {
	l := newLab(t)
	good := l.policy(5, "audit", "")
	l.prepare(good)
	l.start()
	stranger := l.authority("stranger")
	for name, c := range map[string]struct {
		policy []byte
		kind   error
	}{
		"a lower epoch":               {l.policy(4, "audit", ""), errs.Conflict},
		"the same epoch, another one": {l.policy(5, "audit", "# changed\n"), errs.Conflict},
		"another fleet's signature":   {l.signedBy(stranger, l.policyYAML(9, "audit", "")), errs.Untrusted},
		"not signed":                  {[]byte(l.policyYAML(9, "audit", "")), errs.Invalid},
		"a policy that is malformed":  {l.signedBy(l.keys, "version: 1\nname: x\nepoch: 9\nmoed: audit\n"), errs.Invalid},
		"init would be refused":       {l.policy(9, "enforce", ""), errs.Denied},
	} {
		t.Run(name, func(t *testing.T) {
			n := len(l.kernel.applied)
			var s Status
			err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: c.policy}, &s)
			if !errors.Is(err, c.kind) {
				t.Errorf("%v, want %v", err, c.kind)
			}
			if len(l.kernel.applied) != n || l.status().Policy.Epoch != 5 {
				t.Error("something changed")
			}
		})
	}
	t.Run("the same again changes nothing", func(t *testing.T) {
		var s Status
		n := len(l.kernel.applied)
		if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: good}, &s); err != nil || len(l.kernel.applied) != n {
			t.Error(err)
		}
	})
}

// A policy that the canary does not prove is taken back.
func TestApplyPolicy_canaryFails(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	l.kernel.canary = func(tab *integrity.Table) error {
		if tab.Epoch == 6 {
			return errors.New("an unlisted program ran")
		}
		return nil
	}
	var s Status
	if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: l.policy(6, "audit", "")}, &s); err == nil {
		t.Fatal("applied")
	}
	if got := l.kernel.live().Epoch; got != 5 {
		t.Errorf("epoch %d is in the kernel", got)
	}
	if st := l.status(); st.State != StateUnproven || st.Policy.Epoch != 5 {
		t.Errorf("state %q, epoch %d: the failed canary must show until the next one", st.State, st.Policy.Epoch)
	}
	l.stop()
	l.kernel.canary = nil
	l.start()
	if st := l.status(); st.Policy.Epoch != 5 || st.State != StateAuditing {
		t.Errorf("after a restart: state %q, epoch %d", st.State, st.Policy.Epoch)
	}
}

func TestAgent_onlyOne(t *testing.T) {
	l := newLab(t)
	l.prepare(nil)
	l.start()
	first := l.agent
	if err := l.tryStart(); !errors.Is(err, errs.Conflict) {
		// tryStart's probe is answered by the first agent: look at Run itself
		second, err := New(Options{StateDir: l.state(), RunDir: l.run(), Log: first.log, Now: l.now, Open: l.kernel.open})
		if err != nil {
			t.Fatal(err)
		}
		if err := second.Run(t.Context()); !errors.Is(err, errs.Conflict) {
			t.Errorf("a second agent runs: %v", err)
		}
	}
}

func TestPermit(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	sign := func(host string, from, to time.Duration) []byte {
		b, err := codesign.SignPermit(l.signer(l.keys, pki.PurposePermit), codesign.Permit{
			Host: host, Reason: "a drill", NotBefore: l.now().Add(from), NotAfter: l.now().Add(to),
		})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var a PermitAnswer
	if err := l.client().Call(t.Context(), "permit", DocumentRequest{sign("host-2", 0, time.Hour)}, &a); !errors.Is(err, errs.Denied) {
		t.Errorf("another host's permit: %v", err)
	}
	mine := sign("host-1", 0, time.Hour)
	if err := l.client().Call(t.Context(), "permit", DocumentRequest{mine}, &a); err != nil {
		t.Fatal(err)
	}
	if s := l.status(); s.State != StateRelaxed || l.kernel.relaxed != time.Hour {
		t.Errorf("state %q, relaxed for %v", s.State, l.kernel.relaxed)
	}
	var none struct{}
	if err := l.client().Call(t.Context(), "permit/end", none, &none); err != nil || l.kernel.relaxed != 0 {
		t.Errorf("%v, relaxed for %v", err, l.kernel.relaxed)
	}
	// setting the clock back does not bring an expired permit back
	l.forward(2 * time.Hour)
	l.agent.tend(t.Context())
	l.stop()
	l.forward(-2 * time.Hour)
	l.start()
	if err := l.client().Call(t.Context(), "permit", DocumentRequest{mine}, &a); !errors.Is(err, errs.Denied) {
		t.Errorf("a permit that had expired works with the clock back: %v", err)
	}
}

func TestRelease_added(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", allowTool))
	l.start()
	rel := l.release("#!/bin/sh\n# later\n")
	k := integrity.Key{Digest: sha256.Sum256([]byte("#!/bin/sh\n# later\n"))}
	if l.kernel.live().Allows(k, integrity.KindScript) {
		t.Fatal("allowed before it came")
	}
	bad := rel
	bad.Catalogue = append([]byte(nil), rel.Catalogue...)
	bad.Catalogue[len(bad.Catalogue)-1] ^= 1
	var a ReleaseAnswer
	if err := l.client().Call(t.Context(), "release", bad, &a); err == nil {
		t.Error("a release with another catalogue was taken")
	}
	if err := l.client().Call(t.Context(), "release", rel, &a); err != nil {
		t.Fatal(err)
	}
	if !l.kernel.live().Allows(k, integrity.KindScript) {
		t.Error("the release is not in the kernel's table")
	}
	// damage on the disk authorises nothing and is told
	l.stop()
	if err := os.WriteFile(filepath.Join(l.state(), dirReleases, a.Record+".cat"), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.start()
	if l.kernel.live().Allows(k, integrity.KindScript) || len(l.status().Skipped) != 1 {
		t.Errorf("a damaged release: %+v", l.status().Skipped)
	}
}

func TestRemove(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", ""))
	l.start()
	var none struct{}
	if err := l.client().Call(t.Context(), "remove", none, &none); !errors.Is(err, errs.Denied) {
		t.Errorf("removed while it enforces: %v", err)
	}
	var s Status
	if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: l.policy(6, "audit", "")}, &s); err != nil {
		t.Fatal(err)
	}
	if err := l.client().Call(t.Context(), "remove", none, &none); err != nil || !l.kernel.removed {
		t.Errorf("removed: %v, %v", l.kernel.removed, err)
	}
}

// Root starts the agent with a state directory of its own over the pins that are
// in force.
func TestAgent_anotherStateDirectory(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", allowTool))
	l.start()
	l.stop()
	other := newLab(t)
	other.kernel = l.kernel
	other.prepare(other.policy(9, "audit", ""))
	if err := other.tryStart(); !errors.Is(err, errs.Denied) {
		t.Errorf("another state directory was taken: %v", err)
	}
	if got := l.kernel.live().Epoch; got != 5 {
		t.Errorf("epoch %d is in the kernel", got)
	}
	l.start()
}

// A policy that cannot be stored is in force and says that it is not confirmed;
// handing it in again confirms it, and so does time.
func TestApplyPolicy_cannotBeStored(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	next := l.policy(6, "audit", "")
	// the name is taken by a directory: no rename replaces it
	stored := filepath.Join(l.state(), filePolicy)
	if err := errors.Join(os.Remove(stored), os.MkdirAll(filepath.Join(stored, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	var s Status
	if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: next}, &s); err == nil {
		t.Fatal("confirmed what could not be stored")
	}
	if got := l.status().Policy.Epoch; got != 6 {
		t.Errorf("epoch %d is in force", got)
	}
	if err := os.RemoveAll(stored); err != nil {
		t.Fatal(err)
	}
	if err := l.client().Call(t.Context(), "policy", PolicyRequest{Policy: next}, &s); err != nil {
		t.Fatal(err)
	}
	l.stop()
	l.start()
	if got := l.status().Policy.Epoch; got != 6 {
		t.Errorf("after a restart epoch %d is in force", got)
	}
}

// Authorities change in two steps, and after each a restart believes the policy.
func TestApplyPolicy_changesAuthority(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	old := l.keys
	next := l.authority("next")
	next.TSA = old.TSA // the timestamp authority stays
	l.keys = next
	onlyNew := l.policyYAML(7, "audit", "")
	cert := strings.ReplaceAll(strings.TrimSpace(string(pki.EncodeCertificate(old.Issuers[pki.PurposePolicy].Cert))), "\n", "\n        ")
	both := strings.Replace(l.policyYAML(6, "audit", ""), "  timestamps:", "    - name: old\n      signs: [policy]\n      certificate: |\n        "+cert+"\n  timestamps:", 1)
	apply := func(b []byte) error {
		var s Status
		return l.client().Call(t.Context(), "policy", PolicyRequest{Policy: b}, &s)
	}
	if err := apply(l.signedBy(old, onlyNew)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a policy that does not trust its own signer: %v", err)
	}
	if err := apply(l.signedBy(old, both)); err != nil {
		t.Fatal(err)
	}
	l.stop()
	l.start()
	if err := apply(l.signedBy(next, onlyNew)); err != nil {
		t.Fatal(err)
	}
	l.stop()
	l.start()
	if got := l.status().Policy.Epoch; got != 7 {
		t.Errorf("epoch %d is in force", got)
	}
}

// A policy authority that was stolen at a time signs no later policy, while the
// one that it signed before stays in force.
func TestApplyPolicy_revokedAuthority(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	l.start()
	ca := integrity.Digest(pki.Fingerprint(l.keys.Issuers[pki.PurposePolicy].Cert))
	apply := func(epoch int, from string) error {
		var s Status
		deny := fmt.Sprintf("deny:\n  - rule: stolen\n    certificate:\n      - sha256: %v\n        from: %s\n", ca, from)
		return l.client().Call(t.Context(), "policy", PolicyRequest{Policy: l.policy(epoch, "audit", deny)}, &s)
	}
	soon := l.now().Add(time.Hour).UTC().Format(time.RFC3339)
	if err := apply(6, soon); err != nil {
		t.Fatal(err)
	}
	l.forward(2 * time.Hour)
	if err := apply(7, soon); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a policy signed by an authority after it was revoked: %v", err)
	}
	if err := apply(7, l.now().Add(time.Hour).UTC().Format(time.RFC3339)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a thief lifts the revocation: %v", err)
	}
	l.stop()
	l.start()
	if got := l.status().Policy.Epoch; got != 6 {
		t.Errorf("epoch %d is in force", got)
	}
	if err := apply(7, soon); !errors.Is(err, errs.Untrusted) {
		t.Errorf("after a restart: %v", err)
	}
}

// What a crash left behind is removed, and nothing else is.
func TestAgent_sweeps(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	half := []string{".policy.json.tmp-1", "incoming/deb-2", "packages/.x.json.tmp-3"}
	for _, n := range half {
		if err := os.WriteFile(filepath.Join(l.state(), n), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.start()
	for _, n := range half {
		if _, err := os.Lstat(filepath.Join(l.state(), n)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", n, err)
		}
	}
	for _, n := range []string{filePolicy, fileAnchor, "floor/epoch", "floor/key"} {
		if _, err := os.Lstat(filepath.Join(l.state(), n)); err != nil {
			t.Error(err)
		}
	}
}
