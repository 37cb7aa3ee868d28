package attest

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// enrol is the whole way of a host into the fleet.
func enrol(t *testing.T, c *chip, v *vendor) (Enrolled, *AK) {
	t.Helper()
	ekKey, akKey := c.ek(), c.ak()
	defer c.flush(ekKey, akKey)
	ek, ak := parseKeys(t, ekKey, akKey)
	cert, err := ParseEKCertificate(v.certify(t, ek, nil))
	if err != nil {
		t.Fatal(err)
	}
	policy := EKPolicy{VendorCAs: []*x509.Certificate{v.cert}}
	basis, err := policy.Trust(ek, cert, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	secret, cred, err := MakeCredential(ek, ak)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.activate(ekKey, akKey, cred)
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("activation: %v", err)
	}
	return Enrolled{Host: ek.ID(), AKName: ak.Name(), Basis: basis}, ak
}

// answer is a host's side of a round.
func (c *chip) answer(t *testing.T, m *machine, ch *Challenge) Evidence {
	t.Helper()
	akKey := c.ak()
	defer c.flush(akKey)
	ev := Evidence{AK: akKey.public, Bank: "sha256", EventLog: m.raw(), IMA: m.list(t).Bytes(), Claims: []byte(`{"mode":"enforce"}`)}
	q, bank := c.quote(akKey, ch.Qualifying(ev.Claims), SHA256)
	ev.Quote, ev.PCRs = q, bank.Values[:]
	return ev
}

// round is a challenge and its answer, appraised.
func round(t *testing.T, c *chip, m *machine, e Enrolled, ak *AK, state *State, announced bool) (*Result, *State, *Input) {
	t.Helper()
	store := &memory{}
	ch, err := Ask(store, e.Host, ak, ak.Key, SHA256, noon)
	if err != nil {
		t.Fatal(err)
	}
	ev := c.answer(t, m, ch)
	redeemed, err := Redeem(store, ch.Nonce, e.Host, noon)
	if err != nil {
		t.Fatal(err)
	}
	in := &Input{
		Enrolled: e, Challenge: *redeemed, Evidence: ev, State: state, Announced: announced, Policy: goodPolicy(t), Catalogues: newCatalogue("true", "cat"), Now: noon,
	}
	r, next, _ := Appraise(in)
	return r, next, in
}

// From a TPM nobody knows to a refused one, with a TPM that this project did
// not write.
func TestHost(t *testing.T) {
	c := startChip(t)
	m := newMachine()
	e, ak := enrol(t, c, newVendor(t, "vendor"))
	c.boot(mustParseLog(t, m.raw()), m.list(t).extended...)
	r, state, _ := round(t, c, m, e, ak, nil, false)
	wantFailed(t, "first", r, nil)

	// something unknown runs
	was := len(m.list(t).extended)
	m.list(t).file("/tmp/rogue", "rogue")
	c.boot(&Log{}, m.list(t).extended[was:]...)
	r, _, _ = round(t, c, m, e, ak, state, false)
	wantFailed(t, "rogue", r, map[Check]Reason{CheckIMA: ReasonIMAUnknown})

	// The TPM is reset, and software that booted anything it liked extends it
	// with the good log. The quote verifies and every PCR is right.
	m = newMachine()
	c.powerOff()
	c.powerOn()
	c.boot(mustParseLog(t, m.raw()), m.list(t).extended...)
	r, _, _ = round(t, c, m, e, ak, state, false)
	wantFailed(t, "reset and extended again", r, map[Check]Reason{CheckReset: ReasonReset})
	if !r.Passed(CheckQuote) || !r.Passed(CheckReplay) || !r.Passed(CheckSecureBoot) {
		t.Error("the attack is not what the test says")
	}
	// an ordered reboot hides one reset, not two: an evil boot and the reset after it
	r, _, _ = round(t, c, m, e, ak, state, true)
	wantFailed(t, "ordered reboot", r, nil)
	c.powerOff()
	c.powerOn()
	c.boot(mustParseLog(t, m.raw()), m.list(t).extended...)
	r, _, _ = round(t, c, m, e, ak, state, true)
	wantFailed(t, "an evil boot within an ordered reboot", r, map[Check]Reason{CheckReset: ReasonReset})

	// another TPM answers under this host's name
	other := startChip(t)
	other.boot(mustParseLog(t, m.raw()), m.list(t).extended...)
	r, next, _ := round(t, other, m, e, ak, state, false)
	if next != nil || !slices.Equal(r.Reasons()[:1], []Reason{ReasonAK}) {
		t.Errorf("another TPM: %v", r.Reasons())
	}
	e2, _ := enrol(t, other, newVendor(t, "vendor"))
	if e2.Host == e.Host {
		t.Error("two TPMs are one host")
	}
}

func TestArchive(t *testing.T) {
	in := newMachine().input(t, newForger(t))
	in.Now = time.Now().UTC()
	r, state, _ := Appraise(in)
	signed, err := r.Sign(plain{})
	if err != nil {
		t.Fatal(err)
	}
	archive, err := NewArchive(in, signed)
	if err != nil {
		t.Fatal(err)
	}
	again, err := VerifyArchive(archive, in.Catalogues, plain{}.open)
	if err != nil || again.Status != Affirming {
		t.Fatalf("%+v, %v", again, err)
	}
	// a later round, which leaves the log out
	later := newMachine().input(t, newForger(t))
	later.Enrolled, later.Challenge, later.Evidence, later.Now = in.Enrolled, in.Challenge, in.Evidence, in.Now
	later.State, later.BootLog, later.Evidence.EventLog = state, in.Evidence.EventLog, nil
	later.Evidence.IMA, later.Evidence.IMAFrom = nil, state.IMA.Entries
	r, _, _ = Appraise(later)
	if signed, err = r.Sign(plain{}); err != nil {
		t.Fatal(err)
	}
	if archive, err = NewArchive(later, signed); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyArchive(archive, in.Catalogues, plain{}.open); err != nil {
		t.Error(err)
	}
	// what cannot be reproduced
	if _, err := VerifyArchive(archive, newCatalogue("true"), plain{}.open); !errors.Is(err, errs.Untrusted) {
		t.Errorf("other catalogues: %v", err)
	}
	var a Archive
	for what, change := range map[string]func(){
		"result":    func() { a.Result = []byte(strings.Replace(string(a.Result), "affirming", "warning", 1)) },
		"evidence":  func() { a.Evidence.Quote.Signature[10] ^= 1 },
		"log":       func() { a.BootLog[100] ^= 1 },
		"policy":    func() { a.Policy.Version++ },
		"challenge": func() { a.Challenge.Nonce[0] ^= 1 },
		"state":     func() { a.State.Clock.Resets-- },
		"host":      func() { a.Enrolled.Host = "h2" },
		"time":      func() { a.At = a.At.Add(time.Second) },
	} {
		a = Archive{}
		if err := json.Unmarshal(archive, &a); err != nil {
			t.Fatal(err)
		}
		change()
		bad, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyArchive(bad, in.Catalogues, plain{}.open); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s changed: %v", what, err)
		}
	}
	for what, bad := range map[string][]byte{
		"garbage": []byte("garbage"), "another format": bytes.Replace(archive, []byte("archive/1"), []byte("archive/2"), 1),
		"unknown key": bytes.Replace(archive, []byte(`{"format"`), []byte(`{"x":1,"format"`), 1),
	} {
		if _, err := VerifyArchive(bad, in.Catalogues, plain{}.open); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refusal := errors.New("not signed by the verifier")
	if _, err := VerifyArchive(archive, in.Catalogues, func([]byte) ([]byte, error) { return nil, refusal }); !errors.Is(err, refusal) {
		t.Errorf("%v", err)
	}
}

// A result goes through pki's envelope.
func TestResult_signed(t *testing.T) {
	authority, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Test", Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	s, err := authority.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAppraisal, Identity: "spiffe://fleet.example/verifier", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	in := newMachine().input(t, newForger(t))
	r, _, _ := Appraise(in)
	bundle, err := r.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := NewArchive(in, bundle)
	if err != nil {
		t.Fatal(err)
	}
	open := func(b []byte) ([]byte, error) {
		v, err := pki.VerifyBundle(b, authority.Roots(pki.PurposeAppraisal), pki.PurposeAppraisal)
		if err != nil {
			return nil, err
		}
		if v.PayloadType != ResultType {
			return nil, errs.Untrusted
		}
		return v.Payload, nil
	}
	if _, err := VerifyArchive(archive, in.Catalogues, open); err != nil {
		t.Error(err)
	}
	other, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Other", Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	authority = other
	if _, err := VerifyArchive(archive, in.Catalogues, open); !errors.Is(err, errs.Untrusted) {
		t.Errorf("signed by a stranger: %v", err)
	}
}

// Whatever names a host gives its files, its refusal can be signed.
func TestResult_hostileNames(t *testing.T) {
	authority, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Test", Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	s, err := authority.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAppraisal, Identity: "spiffe://fleet.example/verifier", Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine()
	for i := range 2 * maxFindings {
		name := strings.Repeat("\x01", maxPath-8) + strconv.Itoa(i)
		m.list(t).file(name, name)
		m.list(t).add("ima-ng", true, ng("sha256", make([]byte, 32), name))
	}
	in := m.input(t, newForger(t))
	r, _, _ := Appraise(in)
	if !slices.Contains(r.Reasons(), ReasonIMAUnknown) || len(r.IMA.Unknown) != maxFindings || len(r.IMA.Violations) != maxFindings || r.IMA.MoreViolations != maxFindings {
		t.Fatalf("%s, %d and %d findings", r.Reasons(), len(r.IMA.Unknown), len(r.IMA.Violations))
	}
	if _, err := r.Sign(s); err != nil {
		t.Error(err)
	}
}

// plain is a signer that does not sign.
type plain struct{}

func (plain) Sign(_ string, payload []byte) ([]byte, error) { return payload, nil }
func (plain) open(b []byte) ([]byte, error)                 { return b, nil }

// tpm2_checkquote is somebody else's verifier of quotes. It takes what we take;
// of what we refuse it refuses what it looks at.
func TestQuote_tpm2Tools(t *testing.T) {
	tool, err := exec.LookPath("tpm2_checkquote")
	if err != nil {
		t.Skip("SKIP: no tpm2_checkquote here")
	}
	c := startChip(t)
	c.extend(7, SHA256.sum([]byte("x")))
	k := c.ak()
	ak, err := ParseAK(k.public)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{3}, 32)
	good, bank := c.quote(k, nonce, SHA256)
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	spki, err := x509.MarshalPKIXPublicKey(ak.Key)
	if err != nil {
		t.Fatal(err)
	}
	key := write("ak.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
	pcrFile := func(b *Bank) []byte {
		// as tpm2_quote writes it: TPML_PCR_SELECTION in memory, then three lists of 8 digests
		le := binary.LittleEndian
		out := le.AppendUint32(nil, 1)
		out = append(le.AppendUint16(out, uint16(b.Alg)), 3, 0xff, 0xff, 0xff, 0, 0)
		out = le.AppendUint32(append(out, make([]byte, 15*8)...), 3)
		for list := range 3 {
			out = le.AppendUint32(out, 8)
			for _, v := range b.Values[8*list : 8*list+8] {
				out = append(append(le.AppendUint16(out, uint16(len(v))), v...), make([]byte, 64-len(v))...)
			}
		}
		return out
	}
	theirs := func(q Quote, nonce []byte, b *Bank) (bool, string) {
		out, err := exec.Command(tool, "-u", key, "-m", write("msg", q.Attest), "-s", write("sig", q.Signature), "-f", write("pcrs", pcrFile(b)),
			"-g", "sha256", "-q", hex.EncodeToString(nonce)).CombinedOutput()
		return err == nil, string(out)
	}
	flip := func(b []byte, i int) []byte { b = bytes.Clone(b); b[i] ^= 1; return b }
	worse := bank.Clone()
	worse.Values[7] = make([]byte, 32)
	agreed := 0
	for what, x := range map[string]struct {
		q     Quote
		nonce []byte
		bank  *Bank
	}{
		"good": {good, nonce, bank}, "nonce": {good, flip(nonce, 0), bank}, "value": {good, nonce, worse},
		"signature": {Quote{good.Attest, flip(good.Signature, 20)}, nonce, bank}, "attestation": {Quote{flip(good.Attest, 60), good.Signature}, nonce, bank},
		"magic": {Quote{flip(good.Attest, 0), good.Signature}, nonce, bank},
	} {
		_, err := VerifyQuote(ak, x.q, x.nonce, x.bank)
		ok, out := theirs(x.q, x.nonce, x.bank)
		if ok != (err == nil) {
			t.Errorf("%s: we say %v, tpm2_checkquote %v: %s", what, err, ok, out)
		} else {
			agreed++
		}
	}
	t.Logf("%d verdicts agree", agreed)
}
