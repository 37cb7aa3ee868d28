package agent

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/attest"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// oracle is a server that answers as it is told.
type oracle struct {
	agentpb.AgentClient
	reply     attest.Status
	fail      []error // of the next calls
	ca        *pki.TLSAuthority
	certifies []byte // another request than the host's; nil: the host's
	rounds    int
}

func (o *oracle) AttestChallenge(_ context.Context, r *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	o.rounds++
	if _, err := attest.ParseRequest(r.Msg.GetBody()); err != nil {
		return nil, err
	}
	return message(attest.Question{Nonce: make([]byte, attest.NonceSize), Bank: "sha256"})
}

func message(v any) (*connect.Response[agentpb.AttestResponse], error) {
	b, err := json.Marshal(v)
	return connect.NewResponse(&agentpb.AttestResponse{Body: b}), err
}

func (o *oracle) Attest(_ context.Context, r *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	if len(o.fail) > 0 {
		err := o.fail[0]
		o.fail = o.fail[1:]
		return nil, err
	}
	a, err := attest.ParseAnswer(r.Msg.GetBody())
	if err != nil {
		return nil, err
	}
	reply := attest.Reply{Status: o.reply}
	if o.reply == attest.Contraindicated {
		reply.Reasons = []attest.Reason{attest.ReasonIMAUnknown}
		return message(reply)
	}
	csr := a.CSR
	if o.certifies != nil {
		csr = o.certifies
	}
	c, err := o.ca.CertifyClient(csr, "spiffe://fleet.example/host/x", time.Hour, time.Now())
	if err != nil {
		return nil, err
	}
	reply.Certificate = &attest.SealedCertificate{Cipher: c.Raw}
	return message(reply)
}

// chip is a TPM that seals nothing.
type chip struct{ csr []byte }

func (*chip) Identity() (*attest.Identity, error) { return &attest.Identity{}, nil }
func (c *chip) Answer(q *attest.Question, _, csr []byte) (*attest.Answer, error) {
	c.csr = csr
	return &attest.Answer{Nonce: q.Nonce, CSR: csr}, nil
}
func (*chip) Open(c *attest.SealedCertificate) ([]byte, error) { return c.Cipher, nil }

func TestAttester(t *testing.T) {
	ca, err := pki.NewTLSAuthority("hosts", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	o, tpm := &oracle{reply: attest.Affirming, ca: ca}, &chip{}
	a := &Attester{Prover: tpm}
	now := time.Now()
	if _, err := a.Certificate(now); !errors.Is(err, errs.NotFound) {
		t.Errorf("before a round: %v", err)
	}
	if err := a.Attest(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	c, err := a.Certificate(now)
	if err != nil || c.Leaf.URIs[0].String() != "spiffe://fleet.example/host/x" {
		t.Fatalf("%+v, %v", c, err)
	}
	csr, err := x509.ParseCertificateRequest(tpm.csr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Certificate(now.Add(2 * time.Hour)); !errors.Is(err, errs.NotFound) {
		t.Errorf("when it is over: %v", err)
	}
	// every round has a key of its own
	if err := a.Attest(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	again, err := x509.ParseCertificateRequest(tpm.csr)
	if err != nil || string(again.RawSubjectPublicKeyInfo) == string(csr.RawSubjectPublicKeyInfo) {
		t.Errorf("the key of the round before: %v", err)
	}
	// what changed meanwhile is asked again, what fails is not
	o.rounds, o.fail = 0, []error{connect.NewError(connect.CodeAlreadyExists, errors.New("changed")), connect.NewError(connect.CodeAlreadyExists, errors.New("changed"))}
	if err := a.Attest(t.Context(), o); err != nil || o.rounds != 3 {
		t.Errorf("%d rounds, %v", o.rounds, err)
	}
	o.rounds, o.fail = 0, []error{connect.NewError(connect.CodeUnavailable, errors.New("away"))}
	if err := a.Attest(t.Context(), o); err == nil || o.rounds != 1 {
		t.Errorf("%d rounds, %v", o.rounds, err)
	}
	if _, err := a.Certificate(now); err != nil {
		t.Errorf("a server that was away takes nothing: %v", err)
	}
	// a certificate for somebody else's key is refused
	o.certifies = tpm.csr
	if err := a.Attest(t.Context(), o); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another key: %v", err)
	}
	o.reply = attest.Contraindicated
	if err := a.Attest(t.Context(), o); !errors.Is(err, errs.Denied) || !strings.Contains(err.Error(), "ima-unknown") {
		t.Errorf("refused: %v", err)
	}
	if _, err := a.Certificate(now); !errors.Is(err, errs.NotFound) {
		t.Errorf("refused, and with a certificate: %v", err)
	}
}

// Only a host that attests has its kernel measure, and what cannot be loaded here
// is no error there.
func TestMeasureEarly(t *testing.T) {
	dir := t.TempDir()
	a := &Agent{opts: Options{StateDir: dir}, log: slog.New(slog.DiscardHandler)}
	if err := MeasureEarly(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/sys/kernel/security/ima/policy"); err == nil {
		t.Skip("SKIPPED, NOT TESTED: this machine's kernel would be told to measure")
	}
	a.measure(t.Context())
	if _, err := os.Stat(filepath.Join(dir, fileMeasure)); err != nil {
		t.Error(err)
	}
	if err := MeasureEarly(dir); err != nil {
		t.Error(err)
	}
}

// The record changes when what it says does, and never repeats itself, also
// not after the agent was started again.
func TestAttester_record(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: the record's owner takes root")
	}
	path := filepath.Join(t.TempDir(), "run", "record")
	mode := attest.ModeEnforce
	start := func() *Attester {
		return &Attester{Record: path, Integrity: func() ([32]byte, attest.Mode) { return [32]byte{5}, mode }}
	}
	want := func(a *Attester, count int) {
		t.Helper()
		if err := a.record(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != string(attest.PolicyRecordText([32]byte{5}, mode, count)) {
			t.Errorf("%q, %v", b, err)
		}
	}
	a := start()
	want(a, 1)
	want(a, 1)
	mode = attest.ModeAudit
	want(a, 2)
	mode = attest.ModeEnforce
	want(start(), 3)
}
