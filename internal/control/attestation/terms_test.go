package attestation_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/control/attestation"
	"ringwall/internal/errs"
)

// Which policy is whose, and what is no policy.
func TestPolicies(t *testing.T) {
	l := newLab(t)
	ring := ""
	l.tree.Ring = func(context.Context, string) (string, error) { return ring, nil }
	named := func(name string) *attest.Policy {
		p := goodPolicy(t)
		p.Name = name
		return p
	}
	of := func(r string) string {
		t.Helper()
		ring = r
		terms, err := l.tree.For(t.Context(), "web-1")
		if err != nil {
			if !errors.Is(err, errs.NotFound) {
				t.Error(err)
			}
			return ""
		}
		return terms.Policy.Name
	}
	if got := of("prod"); got != "" {
		t.Errorf("without a policy: %s", got)
	}
	l.policy("canary", named("canary"), attestation.Enrolment{}, "canary", "lab")
	if got := of("prod"); got != "" {
		t.Errorf("a ring that no policy is for: %s", got)
	}
	l.policy("rest", named("rest"), attestation.Enrolment{})
	for r, want := range map[string]string{"canary": "canary", "lab": "canary", "prod": "rest", "": "rest"} {
		if got := of(r); got != want {
			t.Errorf("ring %q: %s, want %s", r, got, want)
		}
	}
	// a change is seen, and the other policies are not read again
	l.policy("rest", named("rest 2"), attestation.Enrolment{})
	if got := of("prod"); got != "rest 2" {
		t.Errorf("%s after the change", got)
	}
	l.tree.Ring = func(context.Context, string) (string, error) { return "", errs.Denied }
	if _, err := l.tree.For(t.Context(), "web-1"); !errors.Is(err, errs.Denied) {
		t.Errorf("a host that has no ring: %v", err)
	}

	appraisal, err := json.Marshal(named("x"))
	if err != nil {
		t.Fatal(err)
	}
	sha384, err := json.Marshal(attest.Policy{Format: attest.PolicyFormat, Name: "x", Version: 1, Bank: "sha384"})
	if err != nil {
		t.Fatal(err)
	}
	for what, tc := range map[string]struct {
		properties any
		want       error
	}{
		"the same ring":     {attestation.PolicyProperties{Rings: []string{"lab"}, Appraisal: appraisal}, errs.Conflict},
		"a second for all":  {attestation.PolicyProperties{Appraisal: appraisal}, errs.Conflict},
		"no appraisal":      {map[string]any{"rings": []string{"y"}}, errs.Invalid},
		"unknown key":       {map[string]any{"rings": []string{"y"}, "appraisal": json.RawMessage(appraisal), "x": 1}, errs.Invalid},
		"too often":         {attestation.PolicyProperties{Rings: []string{"y"}, Appraisal: appraisal, IntervalSeconds: 1}, errs.Invalid},
		"sealed to PCR 10":  {attestation.PolicyProperties{Rings: []string{"y"}, Appraisal: appraisal, SealTo: []int{7, 10}}, errs.Invalid},
		"another bank":      {attestation.PolicyProperties{Rings: []string{"y"}, Appraisal: sha384}, errs.Invalid},
		"a CA that is none": {attestation.PolicyProperties{Rings: []string{"y"}, Appraisal: appraisal, Enrolment: attestation.Enrolment{VendorCAs: []string{"x"}}}, errs.Invalid},
	} {
		if err := l.tryPut("/providers/"+attestation.TypePolicy+"/more", tc.properties); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Bytes in, bytes out, and what is no message is refused before anything happens.
func TestWire(t *testing.T) {
	l, m := ready(t)
	w := attestation.Wire{Service: l.service}
	ask, err := json.Marshal(m.request())
	if err != nil {
		t.Fatal(err)
	}
	b, err := w.Challenge(t.Context(), "web-1", ask)
	if err != nil {
		t.Fatal(err)
	}
	var q attest.Question
	if err := json.Unmarshal(b, &q); err != nil {
		t.Fatal(err)
	}
	a, err := m.prover.Answer(&q, nil, m.csr())
	if err != nil {
		t.Fatal(err)
	}
	answer, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = w.Attest(t.Context(), "web-1", answer); err != nil || !strings.Contains(string(b), `"status":"affirming"`) {
		t.Errorf("%.100s, %v", b, err)
	}
	for _, bad := range [][]byte{nil, []byte("{}x"), []byte(`{"nonce":"","nonce":""}`)} {
		if _, err := w.Challenge(t.Context(), "web-1", bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("challenge %q: %v", bad, err)
		}
		if _, err := w.Attest(t.Context(), "web-1", bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("attest %q: %v", bad, err)
		}
	}
	if _, err := w.Challenge(t.Context(), "", ask); !errors.Is(err, errs.Invalid) {
		t.Errorf("a host without a name: %v", err)
	}
}

// The gate fails closed, whatever is the matter.
func TestAttested_failsClosed(t *testing.T) {
	l, m := ready(t)
	l.accepted("web-1", m)
	l.clock.pass(-time.Hour) // a clock that was set back
	if err := l.service.Attested(t.Context(), "web-1", nil, time.Hour); !errors.Is(err, errs.Denied) {
		t.Errorf("attested in the future: %v", err)
	}
	l.clock.pass(time.Hour)
	if err := l.service.Attested(t.Context(), "web-1", []attest.Check{"no such check"}, 0); !errors.Is(err, errs.Denied) {
		t.Errorf("a check that nobody makes: %v", err)
	}
	if err := l.store.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.service.Attested(t.Context(), "web-1", nil, 0); !errors.Is(err, errs.Denied) {
		t.Errorf("without a database: %v", err)
	}
}
