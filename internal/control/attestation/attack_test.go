package attestation_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"ringwall/internal/attest"
	"ringwall/internal/control/attestation"
	"ringwall/internal/errs"
)

// Answers that are none: the nonce. A refusal of this kind blames no host.
func TestAttack_nonces(t *testing.T) {
	l, m := ready(t)
	ctx := t.Context()
	l.accepted("web-1", m)
	ask := func() *attest.Answer {
		t.Helper()
		a, err := l.answer("web-1", m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	seen := map[string]bool{}
	for range 20 { // CVE-2026-6420: a constant nonce
		q, err := l.service.Challenge(ctx, "web-1", m.request())
		if err != nil || seen[string(q.Nonce)] || len(q.Nonce) != attest.NonceSize || bytes.Equal(q.Nonce, make([]byte, attest.NonceSize)) {
			t.Fatalf("%x, %v", q.Nonce, err)
		}
		seen[string(q.Nonce)] = true
	}
	a := ask()
	if r, err := l.service.Verify(ctx, "web-1", a); err != nil || r.Status != attest.Affirming {
		t.Fatalf("%s, %v", reasonsOf(r), err)
	}
	_, err := l.service.Verify(ctx, "web-1", a)
	wantReason(t, "the same answer twice", err, attest.ReasonNonce)
	a = ask()
	_, err = l.service.Verify(ctx, "web-2", a)
	wantReason(t, "for another host", err, attest.ReasonNonce)
	_, err = l.service.Verify(ctx, "web-1", a)
	wantReason(t, "and then for the right one: it is used up", err, attest.ReasonNonce)
	a = ask()
	l.clock.pass(attest.ChallengeLife + time.Second)
	_, err = l.service.Verify(ctx, "web-1", a)
	wantReason(t, "too late", err, attest.ReasonNonce)
	_, err = l.service.Verify(ctx, "web-1", &attest.Answer{Nonce: make([]byte, attest.NonceSize), CSR: m.csr()})
	wantReason(t, "a nonce that was never given", err, attest.ReasonNonce)
	// a quote that somebody relays is of no use with his own key
	a = ask()
	thief := &machine{t: t, key: newKey(t)}
	a.CSR = thief.csr()
	_, err = l.service.Verify(ctx, "web-1", a)
	wantReason(t, "another key asks for the certificate", err, attest.ReasonNonce)
	a = ask()
	a.CSR[len(a.CSR)-1] ^= 1
	_, err = l.service.Verify(ctx, "web-1", a)
	wantReason(t, "the key did not sign the request", err, attest.ReasonSignature)
	if s := l.state("web-1"); s != attestation.StateTrusted {
		t.Errorf("it is %s for what others did", s)
	}
	// while two questions are open, the second answer asks again and blames nobody
	one, two := ask(), ask()
	if _, err := l.service.Verify(ctx, "web-1", one); err != nil {
		t.Error(err)
	}
	if _, err := l.service.Verify(ctx, "web-1", two); !errors.Is(err, errs.Conflict) {
		t.Errorf("overtaken: %v", err)
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Answers to the right question with other evidence than the TPM and the kernel
// made: each with its own reason, and the host is quarantined.
func TestAttack_evidence(t *testing.T) {
	good := recorded(t, "good")
	cut := func(a *attest.Answer, n int) { a.Evidence.EventLog = a.Evidence.EventLog[:n] }
	drop := func(f func(*attest.RawEvent) bool) func(*attest.Answer) {
		return func(a *attest.Answer) { a.Evidence.EventLog = without(t, a.Evidence.EventLog, f) }
	}
	last := func(log []byte) int { // where its last event begins
		return len(without(t, log, lastOf(t, log)))
	}
	type attack struct {
		name   string
		change func(*attest.Answer)
		want   []attest.Reason
	}
	attacks := []attack{
		{"a PCR's value changed", func(a *attest.Answer) { a.Evidence.PCRs[7][0] ^= 1 }, []attest.Reason{attest.ReasonPCRDigest}},
		{"fewer PCRs", func(a *attest.Answer) { a.Evidence.PCRs = a.Evidence.PCRs[:8] }, []attest.Reason{attest.ReasonMalformed}},
		{"no PCRs", func(a *attest.Answer) { a.Evidence.PCRs = nil }, []attest.Reason{attest.ReasonMalformed}},
		{"SHA-1", func(a *attest.Answer) { a.Evidence.Bank = "sha1" }, []attest.Reason{attest.ReasonPCRSelection}},
		{"a bank that was not asked for", func(a *attest.Answer) { a.Evidence.Bank = "sha384" }, []attest.Reason{attest.ReasonPCRSelection}},
		{"claims exchanged", func(a *attest.Answer) { a.Evidence.Claims = []byte("{}") }, []attest.Reason{attest.ReasonNonce}},
		{"signature", func(a *attest.Answer) { a.Evidence.Quote.Signature[20] ^= 1 }, []attest.Reason{attest.ReasonSignature}},
		{"attestation", func(a *attest.Answer) { a.Evidence.Quote.Attest[50] ^= 1 }, []attest.Reason{attest.ReasonSignature}},
		{"log of another machine", func(a *attest.Answer) { a.Evidence.EventLog = recorded(t, "direct").EventLog }, []attest.Reason{attest.ReasonPCRReplay}},
		{"log without its last event", drop(lastOf(t, good.EventLog)), []attest.Reason{attest.ReasonPCRReplay}},
		{"log cut within an event", func(a *attest.Answer) { cut(a, len(a.Evidence.EventLog)-3) }, []attest.Reason{attest.ReasonMalformed}},
		{"an event more", func(a *attest.Answer) {
			a.Evidence.EventLog = append(a.Evidence.EventLog, event(t, a.Evidence.EventLog, 4, attest.EventAction, []byte("x"))...)
		}, []attest.Reason{attest.ReasonPCRReplay}},
		{"order", func(a *attest.Answer) {
			log := a.Evidence.EventLog
			at := last(log)
			tail := bytes.Clone(log[at:])
			head := 32 + int(log[28]) + int(log[29])<<8
			a.Evidence.EventLog = slices.Concat(log[:head], tail, log[head:at])
		}, []attest.Reason{attest.ReasonPCRReplay}},
		{"no log", func(a *attest.Answer) { a.Evidence.EventLog = nil }, nil},
		{"a log of lengths", func(a *attest.Answer) { a.Evidence.EventLog = bytes.Repeat([]byte{0xff}, 1<<20) }, []attest.Reason{attest.ReasonMalformed}},
		{"IMA list cut", func(a *attest.Answer) { a.Evidence.IMA = a.Evidence.IMA[:len(a.Evidence.IMA)-5] }, []attest.Reason{attest.ReasonMalformed}},
		{"IMA entry dropped", func(a *attest.Answer) {
			entry, _ := imaEntry("/bin/two", "two", false)
			a.Evidence.IMA = a.Evidence.IMA[:len(a.Evidence.IMA)-len(entry)]
		}, []attest.Reason{attest.ReasonIMAReplay}},
		{"IMA entry edited", func(a *attest.Answer) {
			a.Evidence.IMA = bytes.Replace(a.Evidence.IMA, []byte("/bin/two"), []byte("/bin/twq"), 1)
		}, []attest.Reason{attest.ReasonIMAReplay}},
		{"IMA list from another place", func(a *attest.Answer) { a.Evidence.IMAFrom = 2 }, []attest.Reason{attest.ReasonIMAPosition}},
		{"no IMA list", func(a *attest.Answer) { a.Evidence.IMA = nil }, []attest.Reason{attest.ReasonIMAReplay}},
		{"a list of lengths", func(a *attest.Answer) { a.Evidence.IMA = bytes.Repeat([]byte{0xff}, 1<<20) }, []attest.Reason{attest.ReasonMalformed}},
		{"another attestation key", func(a *attest.Answer) { a.Evidence.AK[len(a.Evidence.AK)-1] ^= 1 }, []attest.Reason{attest.ReasonAK}},
		{"userspace log of another kind", func(a *attest.Answer) { a.Evidence.UserspaceLog = []byte(`{"pcr":99}`) }, []attest.Reason{attest.ReasonMalformed}},
	}
	for pcr := range 12 { // what other verifiers accept: a PCR without its events
		if pcr == 10 || pcr == 8 {
			continue
		}
		attacks = append(attacks, attack{"PCR stripped", drop(func(e *attest.RawEvent) bool { return e.PCR == pcr }), []attest.Reason{attest.ReasonPCRReplay}})
	}
	l, m := ready(t)
	for i, a := range attacks {
		name := "web-1"
		ans, err := l.answer(name, m)
		if err != nil {
			t.Fatal(err)
		}
		a.change(ans)
		r, err := l.service.Verify(t.Context(), name, ans)
		if err != nil {
			t.Errorf("%d, %s: %v", i, a.name, err)
			continue
		}
		got := slices.DeleteFunc(slices.Clone(r.Reasons), func(r attest.Reason) bool { return r == attest.ReasonNoEvidence })
		if r.Status != attest.Contraindicated || r.Certificate != nil || !slices.Equal(got, a.want) {
			t.Errorf("%d, %s: %s, want %s", i, a.name, r.Reasons, a.want)
		}
		if s := l.state(name); s != attestation.StateQuarantined {
			t.Errorf("%d, %s: it is %s", i, a.name, s)
		}
		if err := l.order(root(), attestation.OrderReadmit, name, "next attack"); err != nil {
			t.Fatal(err)
		}
	}
	// and with all of that behind it the host itself is accepted, also with data
	// under a digest that does not cover it: that data is just not read
	ans, err := l.answer("web-1", m)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.LastIndex(ans.Evidence.EventLog, []byte("B\x00O\x00O\x00T\x00X\x006\x004"))
	if at < 0 {
		t.Fatal("the recording has no device path")
	}
	ans.Evidence.EventLog[at] = 'G'
	if r, err := l.service.Verify(t.Context(), "web-1", ans); err != nil || r.Status != attest.Affirming {
		t.Errorf("%s, %v", reasonsOf(r), err)
	}
}

// lastOf picks a log's last event.
func lastOf(t testing.TB, log []byte) func(*attest.RawEvent) bool {
	t.Helper()
	l, err := attest.ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	n := l.Events[len(l.Events)-1].Index
	return func(e *attest.RawEvent) bool { return e.Index == n }
}

// Other statements that the same key signs, and keys that sign anything.
func TestAttack_otherStatements(t *testing.T) {
	l, m := ready(t)
	q, err := l.service.Challenge(t.Context(), "web-1", m.request())
	if err != nil {
		t.Fatal(err)
	}
	a, err := m.prover.Answer(q, nil, m.csr())
	if err != nil {
		t.Fatal(err)
	}
	m.do(func(c transport.TPM) error {
		ak, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(attest.AKTemplate())}.Execute(c)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: ak.ObjectHandle}.Execute(c) }()
		key := tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)}
		r, err := tpm2.GetTime{
			PrivacyAdminHandle: tpm2.TPMRHEndorsement, SignHandle: key, QualifyingData: tpm2.TPM2BData{Buffer: q.Qualifying(nil)},
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		}.Execute(c)
		if err != nil {
			return err
		}
		a.Evidence.Quote = attest.Quote{Attest: r.TimeInfo.Bytes(), Signature: tpm2.Marshal(r.Signature)}
		// what the restricted key does not sign: bytes that only look like a quote
		forged := append([]byte{0xff, 'T', 'C', 'G', 0x80, 0x18}, make([]byte, 60)...)
		sum := sha256.Sum256(forged)
		_, err = tpm2.Sign{
			KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: sum[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(c)
		if !errors.Is(err, tpm2.TPMRCTicket) {
			t.Errorf("the TPM signs forged bytes: %v", err)
		}
		return nil
	})
	r, err := l.service.Verify(t.Context(), "web-1", a)
	if err != nil || len(r.Reasons) == 0 || r.Reasons[0] != attest.ReasonAttestMagic {
		t.Errorf("the time in the place of a quote: %s, %v", reasonsOf(r), err)
	}
	// an unrestricted key would sign the forged bytes, and is refused before it is asked
	req := m.request()
	m.do(func(c transport.TPM) error {
		k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(attest.SigningTemplate())}.Execute(c)
		if err != nil {
			return err
		}
		req.Identity.AK = k.OutPublic.Bytes()
		_, err = tpm2.FlushContext{FlushHandle: k.ObjectHandle}.Execute(c)
		return err
	})
	_, err = l.service.Challenge(t.Context(), "web-2", req)
	wantReason(t, "an unrestricted key", err, attest.ReasonAK)
}

// What the machine measured, each with its own reason.
func TestAttack_machines(t *testing.T) {
	good := recorded(t, "good").EventLog
	with := func(e []byte) []byte { return append(bytes.Clone(good), e...) }
	for name, tc := range map[string]struct {
		log    []byte
		files  []file
		policy func(*attest.Policy)
		after  func(*machine)
		want   []attest.Reason
	}{
		"a rogue program":     {files: append(goodFiles(), file{path: "/tmp/rogue", content: "rogue"}), want: []attest.Reason{attest.ReasonIMAUnknown}},
		"changed while read":  {files: append(goodFiles(), file{path: "/bin/one", violation: true}), want: []attest.Reason{attest.ReasonIMAViolation}},
		"an old policy":       {files: []file{{path: recordPath, content: "policy 4"}}, want: []attest.Reason{attest.ReasonPolicyRecord, attest.ReasonIMAUnknown}},
		"audit after enforce": {files: append(goodFiles(), file{path: recordPath, content: "policy 5 in audit"}), want: []attest.Reason{attest.ReasonPolicyRecord, attest.ReasonIMAUnknown}},
		"no policy":           {files: []file{{path: "/bin/one", content: "one"}}, want: nil},
		"Secure Boot off": {log: recorded(t, "off").EventLog, want: []attest.Reason{
			attest.ReasonSecureBootOff, attest.ReasonFirmware, attest.ReasonPK, attest.ReasonKEK, attest.ReasonDB, attest.ReasonDBX, attest.ReasonBootApp,
		}},
		"another image and command line":     {log: recorded(t, "rogue").EventLog, want: []attest.Reason{attest.ReasonBootApp, attest.ReasonUnused, attest.ReasonUKI, attest.ReasonLoader}},
		"kernel handed over past the check":  {log: recorded(t, "direct").EventLog, want: []attest.Reason{attest.ReasonUnused}},
		"a signer more in db":                {policy: func(p *attest.Policy) { p.DB = []string{digest("another")} }, want: []attest.Reason{attest.ReasonDB}},
		"an old dbx":                         {policy: func(p *attest.Policy) { p.DBX = append(p.DBX, digest("revoked since")) }, want: []attest.Reason{attest.ReasonDBX}},
		"another platform key":               {policy: func(p *attest.Policy) { p.PK = []string{digest("owner")} }, want: []attest.Reason{attest.ReasonPK}},
		"another key exchange key":           {policy: func(p *attest.Policy) { p.KEK = []string{digest("kek")} }, want: []attest.Reason{attest.ReasonKEK}},
		"signed by another":                  {policy: func(p *attest.Policy) { p.Authorities = []string{digest("ours")} }, want: []attest.Reason{attest.ReasonAuthority}},
		"unknown firmware":                   {policy: func(p *attest.Policy) { p.Firmware[0].PCRs[0].Digest = digest("newer") }, want: []attest.Reason{attest.ReasonFirmware}},
		"debugged firmware":                  {log: with(event(t, good, 7, attest.EventEFIAction, []byte("UEFI Debug Mode"))), want: []attest.Reason{attest.ReasonDebug}},
		"devices that write memory":          {log: with(event(t, good, 7, attest.EventEFIAction, []byte("DMA Protection Disabled"))), want: []attest.Reason{attest.ReasonDMA}},
		"a boot kit by another name":         {log: with(event(t, good, 4, attest.EventPostCode, []byte("kit"))), want: []attest.Reason{attest.ReasonBootApp}},
		"extended without an event":          {after: func(m *machine) { m.extend(8, bytes.Repeat([]byte{1}, 32)) }, want: []attest.Reason{attest.ReasonPCRReplay}},
		"PCR 10 moves and the list does not": {after: func(m *machine) { m.extend(10, bytes.Repeat([]byte{1}, 32)) }, want: []attest.Reason{attest.ReasonIMAReplay}},
		"enrolled by what is not accepted":   {policy: func(p *attest.Policy) { p.EKBases = []attest.Basis{attest.BasisVendorCA} }, want: []attest.Reason{attest.ReasonEKTrust}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			l, m := newLab(t), newMachine(t)
			log, files, p := tc.log, tc.files, goodPolicy(t)
			if log == nil {
				log = good
			}
			if files == nil {
				files = goodFiles()
			}
			m.boot(log, files...)
			if tc.policy != nil {
				tc.policy(p)
			}
			if tc.after != nil {
				tc.after(m)
			}
			l.policy("all", p, attestation.Enrolment{Allowed: []attest.HostID{m.tpmID()}})
			l.refused("web-1", m, tc.want...)
		})
	}
}

// The list may run ahead of the quote, and what it runs ahead by counts later.
func TestAttack_listAhead(t *testing.T) {
	l, m := ready(t)
	entry, extended := imaEntry("/tmp/rogue", "rogue", false)
	m.list = append(m.list, entry...)
	m.save()
	l.accepted("web-1", m)
	m.extend(10, extended)
	l.refused("web-1", m, attest.ReasonIMAUnknown)
}

// Software that resets the TPM can extend it with a good log; the quote verifies.
func TestAttack_reset(t *testing.T) {
	l, m := ready(t)
	l.accepted("web-1", m)
	again := func() {
		m.reset()
		m.boot(recorded(t, "good").EventLog, goodFiles()...)
	}
	again()
	l.refused("web-1", m, attest.ReasonReset)
	if err := l.order(root(), attestation.OrderReadmit, "web-1", "explained"); err != nil {
		t.Fatal(err)
	}
	l.accepted("web-1", m)
	if err := l.order(root(), attestation.OrderAnnounce, "web-1", "reboot"); err != nil {
		t.Fatal(err)
	}
	again()
	again() // an evil boot within the ordered one
	l.refused("web-1", m, attest.ReasonReset)
}

// Who may enrol.
func TestAttack_enrolment(t *testing.T) {
	l, m := newLab(t), newMachine(t)
	ctx := t.Context()
	other := newMachine(t)
	for _, x := range []*machine{m, other} {
		x.boot(recorded(t, "good").EventLog, goodFiles()...)
	}
	_, err := l.service.Challenge(ctx, "web-1", m.request())
	if !errors.Is(err, errs.NotFound) {
		t.Errorf("without a policy: %v", err)
	}
	set := func(e attestation.Enrolment) { t.Helper(); l.policy("all", goodPolicy(t), e) }
	ask := func(m *machine, change func(*attest.Request)) error {
		req := m.request()
		if change != nil {
			change(req)
		}
		_, err := l.service.Challenge(ctx, "web-1", req)
		return err
	}
	set(attestation.Enrolment{})
	wantReason(t, "nobody vouches", ask(m, nil), attest.ReasonEKTrust)
	maker, stranger := newVendor(t), newVendor(t)
	set(attestation.Enrolment{VendorCAs: []string{maker.pem()}})
	mine := maker.certify(t, m)
	wantReason(t, "a stranger's certificate", ask(m, func(r *attest.Request) { r.Identity.Certificate = stranger.certify(t, m) }), attest.ReasonEKTrust)
	wantReason(t, "another TPM's certificate", ask(other, func(r *attest.Request) { r.Identity.Certificate = mine }), attest.ReasonEKCertificate)
	wantReason(t, "no endorsement key", ask(m, func(r *attest.Request) { r.Identity.EK = r.Identity.AK }), attest.ReasonEKTemplate)
	// AK of another TPM: the credential cannot be opened, and without its secret nothing follows
	req := m.request()
	req.Identity.Certificate, req.Identity.AK = mine, other.identity().AK
	q, err := l.service.Challenge(ctx, "web-1", req)
	if err != nil || q.Credential == nil {
		t.Fatal(err)
	}
	for _, x := range []*machine{m, other} {
		if _, err := x.prover.Answer(q, nil, m.csr()); !errors.Is(err, errs.Untrusted) {
			t.Errorf("a credential for two TPMs was opened: %v", err)
		}
	}
	bare := *q
	bare.Credential = nil
	a, err := other.prover.Answer(&bare, nil, m.csr())
	if err != nil {
		t.Fatal(err)
	}
	a.Secret = make([]byte, 32)
	_, err = l.service.Verify(ctx, "web-1", a)
	wantReason(t, "without the secret", err, attest.ReasonActivation)
	if s := l.state("web-1"); s != attestation.StateUnknown {
		t.Errorf("it is %s", s)
	}
	// with the right ones it enrols, and nobody else can be web-1, nor it another
	req = m.request()
	req.Identity.Certificate = mine
	if q, err = l.service.Challenge(ctx, "web-1", req); err != nil {
		t.Fatal(err)
	}
	if a, err = m.prover.Answer(q, nil, m.csr()); err != nil {
		t.Fatal(err)
	}
	r, err := l.service.Verify(ctx, "web-1", a)
	if err != nil || r.Status != attest.Affirming {
		t.Fatalf("%s, %v", reasonsOf(r), err)
	}
	set(attestation.Enrolment{Allowed: []attest.HostID{m.tpmID(), other.tpmID()}})
	if _, err := l.round("web-1", other); !errors.Is(err, errs.Conflict) {
		t.Errorf("another TPM under its name: %v", err)
	}
	if _, err := l.round("web-2", m); !errors.Is(err, errs.Conflict) {
		t.Errorf("its TPM under another name: %v", err)
	}
	if n := len(l.audited("enrol")); n < 4 {
		t.Errorf("%d records of enrolments and refusals", n)
	}
	// replacing it is an order
	if err := l.order(root(), attestation.OrderReplace, "web-1", "new main board"); err != nil {
		t.Fatal(err)
	}
	l.accepted("web-1", other)
	if _, err := l.round("web-1", m); !errors.Is(err, errs.Conflict) {
		t.Errorf("the old TPM: %v", err)
	}
	// a key that is denied afterwards
	set(attestation.Enrolment{Denied: []attest.HostID{other.tpmID()}})
	l.refused("web-1", other, attest.ReasonEKTrust)
}

// First use waits for a person; a join token is enough where the policy says so.
func TestEnrolment_byPeople(t *testing.T) {
	l, m := newLab(t), newMachine(t)
	ctx := t.Context()
	m.boot(recorded(t, "good").EventLog, goodFiles()...)
	l.policy("all", goodPolicy(t), attestation.Enrolment{FirstUseUntil: l.clock.now().Add(time.Hour)})
	for range 2 {
		_, err := l.round("web-1", m)
		wantReason(t, "before approval", err, attest.ReasonEKPending)
	}
	if s := l.state("web-1"); s != attestation.StatePending {
		t.Errorf("it is %s", s)
	}
	if err := l.service.Give(ctx, root(), attestation.OrderApprove, "web-1", attestation.OrderBody{Reason: "on the phone", TPM: "another"}); !errors.Is(err, errs.Conflict) {
		t.Errorf("another TPM was approved: %v", err)
	}
	if err := l.service.Give(ctx, root(), attestation.OrderApprove, "web-1", attestation.OrderBody{Reason: "read out on the phone", TPM: m.tpmID()}); err != nil {
		t.Fatal(err)
	}
	l.clock.pass(2 * time.Hour)
	l.accepted("web-1", m)
	token := newMachine(t)
	token.boot(recorded(t, "good").EventLog, goodFiles()...)
	l.policy("canary", goodPolicy(t), attestation.Enrolment{JoinToken: true}, "")
	l.accepted("web-2", token)
	if st, _ := l.service.Status(ctx, "web-2"); st.Basis != attest.BasisJoinToken {
		t.Errorf("enrolled by %s", st.Basis)
	}
}

// Two machines enrol under one name at once, and one machine under two names:
// one wins, the others are told so.
func TestAttack_enrolmentRace(t *testing.T) {
	l := newLab(t)
	var machines []*machine
	for range 3 {
		m := newMachine(t)
		m.boot(recorded(t, "good").EventLog, goodFiles()...)
		machines = append(machines, m)
	}
	l.policy("all", goodPolicy(t), attestation.Enrolment{JoinToken: true})
	type entry struct {
		name string
		a    *attest.Answer
	}
	var answers []entry
	for _, m := range machines {
		for _, name := range []string{"web-1", "web-2"} {
			a, err := l.answer(name, m)
			if err != nil {
				t.Fatal(err)
			}
			answers = append(answers, entry{name, a})
		}
	}
	var mu sync.Mutex
	won := map[string]int{}
	var wg sync.WaitGroup
	for _, e := range answers {
		wg.Go(func() {
			r, err := l.service.Verify(t.Context(), e.name, e.a)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && r.Status == attest.Affirming:
				won[e.name]++
			case !errors.Is(err, errs.Conflict):
				t.Errorf("%s: %s, %v", e.name, reasonsOf(r), err)
			}
		})
	}
	wg.Wait()
	if won["web-1"] != 1 || won["web-2"] > 1 {
		t.Errorf("%v", won)
	}
}

// vendor is a maker of TPMs.
type vendor struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newVendor(t testing.TB) *vendor {
	t.Helper()
	v := &vendor{key: newKey(t)}
	v.cert = v.issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}, v.key.Public())
	return v
}

func (v *vendor) issue(t testing.TB, template *x509.Certificate, public any) *x509.Certificate {
	t.Helper()
	parent := v.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, v.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (v *vendor) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.cert.Raw}))
}

// certify issues the certificate of a machine's endorsement key.
func (v *vendor) certify(t testing.TB, m *machine) []byte {
	t.Helper()
	ek, err := attest.ParseEK(m.identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	name, err := asn1.Marshal(pkix.RDNSequence{pkix.RelativeDistinguishedNameSET{
		{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:00001014"},
		{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 2}, Value: "swtpm"},
		{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 3}, Value: "id:20191023"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	return v.issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}, ek.Key).Raw
}
