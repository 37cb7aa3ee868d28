package attestation_test

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"errors"
	"io"
	"testing"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/control"
	"ringwall/internal/control/attestation"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/store"
)

// From a TPM that nobody knows to a certificate that only it can open, and what
// becomes of it when something else runs.
func TestHost(t *testing.T) {
	l, m := ready(t)
	ctx := t.Context()
	if err := l.service.Attested(ctx, "web-1", nil, 0); !errors.Is(err, errs.Denied) {
		t.Errorf("before it attested: %v", err)
	}
	r := l.accepted("web-1", m)
	der, err := m.prover.Open(r.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil || len(cert.URIs) != 1 || cert.URIs[0].String() != attestation.Identity("fleet.example", m.tpmID()) ||
		!m.key.PublicKey.Equal(cert.PublicKey) || cert.NotAfter.Sub(l.clock.now()) > attestation.CertificateLife {
		t.Fatalf("%+v, %v", cert, err)
	}
	if err := l.service.Attested(ctx, "web-1", []attest.Check{attest.CheckSecureBoot, attest.CheckPolicy}, time.Minute); err != nil {
		t.Error(err)
	}
	// another host cannot open it, and this one not after its PCRs moved
	other := newMachine(t)
	if _, err := other.prover.Open(r.Certificate); !errors.Is(err, errs.Untrusted) {
		t.Errorf("opened on another host: %v", err)
	}
	m.extend(11, bytes.Repeat([]byte{7}, 32))
	if _, err := m.prover.Open(r.Certificate); !errors.Is(err, errs.Denied) {
		t.Errorf("opened in another state: %v", err)
	}
}

// Later rounds send what is new, and a process that starts anew goes on.
func TestHost_rounds(t *testing.T) {
	l, m := ready(t)
	l.accepted("web-1", m)
	m.use(file{path: "/bin/one", content: "two"})
	l.clock.pass(5 * time.Minute)
	a, err := l.answer("web-1", m)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Evidence.EventLog) != 0 || a.Evidence.IMAFrom != 4 || len(a.Secret) != 0 {
		t.Errorf("sends the log (%d bytes) or the list from %d again", len(a.Evidence.EventLog), a.Evidence.IMAFrom)
	}
	if r, err := l.service.Verify(t.Context(), "web-1", a); err != nil || r.Status != attest.Affirming {
		t.Fatalf("%s, %v", reasonsOf(r), err)
	}
	l.restart()
	l.accepted("web-1", m)
	// an ordered reboot
	if err := l.order(root(), attestation.OrderAnnounce, "web-1", "kernel update"); err != nil {
		t.Fatal(err)
	}
	m.reset()
	m.boot(recorded(t, "good").EventLog, goodFiles()...)
	l.accepted("web-1", m)
	if st, _ := l.service.Status(t.Context(), "web-1"); st.Announced {
		t.Error("the reboot is still expected")
	}
	l.reverify("web-1")
}

// reverify opens the newest archive as an auditor does.
func (l *lab) reverify(name string) {
	l.t.Helper()
	var blob []byte
	err := l.store.Read(l.t.Context(), func(tx *store.Tx) (err error) {
		blob, _, err = tx.AttestationArchive(l.t.Context(), name, l.clock.now().Add(time.Hour))
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		l.t.Fatal(err)
	}
	archive, err := io.ReadAll(z)
	if err != nil {
		l.t.Fatal(err)
	}
	_, err = attest.VerifyArchive(archive, l.files, func(b []byte) ([]byte, error) {
		v, err := pki.VerifyBundle(b, l.authority.Roots(pki.PurposeAppraisal), pki.PurposeAppraisal)
		if err != nil {
			return nil, err
		}
		return v.Payload, nil
	})
	if err != nil {
		l.t.Error(err)
	}
}

// A refusal isolates the host until a person with the right and a reason ends it.
func TestQuarantine(t *testing.T) {
	l, m := ready(t)
	ctx := t.Context()
	l.accepted("web-1", m)
	m.use(file{path: "/tmp/rogue", content: "rogue"})
	l.refused("web-1", m, attest.ReasonIMAUnknown)
	l.refused("web-1", m, attest.ReasonIMAUnknown)
	if len(l.incidents) != 1 || l.incidents[0].Host != "web-1" || l.incidents[0].Archive.IsZero() || len(l.audited("quarantine")) != 1 {
		t.Errorf("%+v", l.incidents)
	}
	l.reverify("web-1")
	if err := l.service.Attested(ctx, "web-1", nil, time.Hour); !errors.Is(err, errs.Denied) {
		t.Errorf("quarantined and attested: %v", err)
	}
	// good evidence alone ends nothing
	l.files = append(l.files, "rogue")
	if r, err := l.round("web-1", m); err != nil || r.Status != attest.Affirming || r.Certificate != nil {
		t.Errorf("%s, %v", reasonsOf(r), err)
	}
	if s := l.state("web-1"); s != attestation.StateQuarantined {
		t.Errorf("it is %s", s)
	}
	for what, err := range map[string]error{
		"without a right":  l.order(control.Actor{ID: "bob", Name: "bob"}, attestation.OrderReadmit, "web-1", "it is fine"),
		"without a reason": l.order(root(), attestation.OrderReadmit, "web-1", ""),
		"another host":     l.order(root(), attestation.OrderReadmit, "web-9", "it is fine"),
	} {
		if err == nil {
			t.Errorf("released %s", what)
		}
	}
	if err := l.order(root(), attestation.OrderReadmit, "web-1", "an installer, now in a catalogue"); err != nil {
		t.Fatal(err)
	}
	if got := l.audited("readmit"); len(got) == 0 || len(l.released) != 1 || got[len(got)-1].Actor != "admin" || !bytes.Contains([]byte(got[len(got)-1].Detail), []byte("installer")) {
		t.Errorf("%+v %v", got, l.released)
	}
	if err := l.service.Attested(ctx, "web-1", nil, time.Hour); !errors.Is(err, errs.Denied) {
		t.Errorf("attested before it proved anything again: %v", err)
	}
	l.accepted("web-1", m)
	if err := l.service.Attested(ctx, "web-1", nil, 0); err != nil {
		t.Error(err)
	}
	if err := l.order(root(), attestation.OrderQuarantine, "web-1", "suspected"); err != nil || l.state("web-1") != attestation.StateQuarantined {
		t.Errorf("by order: %v, %s", err, l.state("web-1"))
	}
}

// Silence makes a host stale and then refused, an outage of ours does neither.
func TestSilence(t *testing.T) {
	l, m := ready(t)
	ctx := t.Context()
	l.accepted("web-1", m)
	sweep := func(want int) {
		t.Helper()
		if n, err := l.service.Sweep(ctx); err != nil || n != want {
			t.Errorf("%d quarantined, want %d: %v", n, want, err)
		}
	}
	l.clock.pass(11 * time.Minute)
	sweep(0)
	if s := l.state("web-1"); s != attestation.StateStale {
		t.Errorf("after 11 minutes it is %s", s)
	}
	if err := l.service.Attested(ctx, "web-1", nil, 0); !errors.Is(err, errs.Denied) {
		t.Errorf("stale and attested: %v", err)
	}
	// the server was away for a day: nobody is blamed
	l.clock.pass(24 * time.Hour)
	l.restart()
	sweep(0)
	// a declared outage lets older results count, for as long as it lasts
	l.accepted("web-1", m)
	l.clock.pass(time.Minute)
	since := l.clock.now()
	outage := attestation.Outage{Since: since, Until: since.Add(4 * time.Hour), Reason: "the database is being moved"}
	l.put("/providers/"+attestation.TypeOutage+"/one", outage)
	for what, bad := range map[string]attestation.Outage{
		"too long":         {Since: since, Until: since.Add(25 * time.Hour), Reason: "x"},
		"without a reason": {Since: since, Until: since.Add(time.Hour)},
	} {
		if err := l.tryPut("/providers/"+attestation.TypeOutage+"/two", bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("an outage %s: %v", what, err)
		}
	}
	if err := l.tryPut("/providers/"+attestation.TypeOutage+"/one", outage); !errors.Is(err, errs.Conflict) {
		t.Errorf("prolonged: %v", err)
	}
	l.clock.pass(3 * time.Hour)
	sweep(0)
	if err := l.service.Attested(ctx, "web-1", nil, 0); err != nil {
		t.Errorf("in an outage: %v", err)
	}
	l.clock.pass(2 * time.Hour)
	if err := l.service.Attested(ctx, "web-1", nil, 0); !errors.Is(err, errs.Denied) {
		t.Errorf("after the outage: %v", err)
	}
	sweep(1)
	sweep(0)
	if s := l.state("web-1"); s != attestation.StateQuarantined || len(l.incidents) != 1 || l.incidents[0].Reasons[0] != attest.ReasonSilent {
		t.Errorf("%s, %+v", s, l.incidents)
	}
}

func reasonsOf(r *attest.Reply) []attest.Reason {
	if r == nil {
		return nil
	}
	return append([]attest.Reason{attest.Reason(r.Status)}, r.Reasons...)
}
