package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/attest"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

// Prover is a host's TPM with its logs; *host.Prover is one.
type Prover interface {
	Identity() (*attest.Identity, error)
	Answer(q *attest.Question, claims, csr []byte) (*attest.Answer, error)
	Open(c *attest.SealedCertificate) ([]byte, error)
}

// Attester proves to a server what this host booted, and holds the certificate
// that it gets for it: in memory only, with its key, because both are worth an
// hour and no longer. It is safe for use by several goroutines.
type Attester struct {
	Prover Prover
	// Integrity is the policy in force, by the SHA-256 of its text, and its mode,
	// to be recorded for the kernel to measure; nil: nothing is recorded.
	Integrity func() (policy [32]byte, mode attest.Mode)
	// Record is the file of that; "" is attest.PolicyRecordPath.
	Record string

	mu    sync.Mutex
	cert  *tls.Certificate
	text  []byte // that was recorded
	count int    // of records
}

// attestTries is how often a round is begun again because what the server knew
// changed meanwhile.
const attestTries = 3

// Attest has one round with the server. It is what Options.Attest wants. errs.Denied:
// the server refused the host, for the reasons that the error names.
func (a *Attester) Attest(ctx context.Context, c agentpb.AgentClient) error {
	for try := 1; ; try++ {
		err := a.round(ctx, c)
		if err == nil || try == attestTries || connect.CodeOf(err) != connect.CodeAlreadyExists {
			return err
		}
	}
}

func (a *Attester) round(ctx context.Context, c agentpb.AgentClient) error {
	if err := a.record(); err != nil {
		return err
	}
	id, err := a.Prover.Identity()
	if err != nil {
		return err
	}
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	var q attest.Question
	if err := exchange(ctx, c.AttestChallenge, attest.Request{Identity: *id, Key: spki}, &q); err != nil {
		return fmt.Errorf("ask for a challenge: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	answer, err := a.Prover.Answer(&q, nil, csr)
	if err != nil {
		return err
	}
	var r attest.Reply
	if err := exchange(ctx, c.Attest, answer, &r); err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	return a.keep(&r, key)
}

// keep opens the certificate that the server sent. Without one the old stays
// until it is over, unless the server refused the host.
func (a *Attester) keep(r *attest.Reply, key *ecdsa.PrivateKey) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.Status == attest.Contraindicated {
		a.cert = nil
		return fmt.Errorf("the server refused what this host booted or ran: %s: %w", r.Reasons, errs.Denied)
	}
	if r.Certificate == nil {
		return nil
	}
	der, err := a.Prover.Open(r.Certificate)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil || !key.PublicKey.Equal(leaf.PublicKey) {
		return fmt.Errorf("the sealed certificate is for another key: %w", errors.Join(err, errs.Untrusted))
	}
	a.cert = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return nil
}

// Certificate is the host's attested certificate; errs.NotFound when it has none
// that is still good.
func (a *Attester) Certificate(now time.Time) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cert == nil || now.After(a.cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("this host has no attested certificate: %w", errs.NotFound)
	}
	return a.cert, nil
}

// exchange sends one message of package attest and reads the answer to it.
func exchange(ctx context.Context, call func(context.Context, *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error), message, answer any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	resp, err := call(ctx, connect.NewRequest(&agentpb.AttestRequest{Body: body}))
	if err != nil {
		return err
	}
	// the server was authenticated; what it says is still bounded by the protocol
	return pki.UnmarshalStrict(resp.Msg.GetBody(), answer, attest.MaxAnswer)
}

// record writes the record of the integrity policy anew if what it says has
// changed, before the quote is made. It needs no TPM: the kernel measures the
// file as it is read, if a policy for that was loaded (ringwall attest measure).
func (a *Attester) record() error {
	if a.Integrity == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	path := a.Record
	if path == "" {
		path = attest.PolicyRecordPath
	}
	if a.count == 0 {
		a.count = recorded(path) // by an agent before this one, since the host started
	}
	policy, mode := a.Integrity()
	if bytes.Equal(a.text, attest.PolicyRecordText(policy, mode, a.count)) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // nothing in it is secret
		return fmt.Errorf("record the integrity policy: %w", err)
	}
	text := attest.PolicyRecordText(policy, mode, a.count+1)
	if err := host.WriteRecord(path, text); err != nil {
		return err
	}
	a.text, a.count = text, a.count+1
	return nil
}

// recorded is the count of a record that is there; 0 for none.
func recorded(path string) int {
	const most = 1 << 10
	b, err := os.ReadFile(path)
	_, tail, found := bytes.Cut(b, []byte("\ncount "))
	n, err2 := strconv.Atoi(strings.TrimSpace(string(tail)))
	if err != nil || !found || err2 != nil || len(b) > most || n < 0 {
		return 0
	}
	return n
}

// integrityNow is what an Attester records: zeros and audit where no policy is in
// force, audit while nothing is refused.
func (a *Agent) integrityNow() (policy [32]byte, mode attest.Mode) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded != nil {
		policy = a.loaded.signed.Digest
	}
	if state, _ := a.standing(); state == StateEnforcing {
		return policy, attest.ModeEnforce
	}
	return policy, attest.ModeAudit
}

// Between rounds of attestation: as servers want it by default, and after one
// that failed.
const (
	attestEvery   = 5 * time.Minute
	attestUnknown = time.Hour // the server does not attest hosts
)

// Prove has the attester prove this host to its fleet's server when the server
// asks, and by itself: when the connection stands, and then every few minutes
// until ctx ends. Call it before Run, which it does not wait for.
func (a *Agent) Prove(ctx context.Context, at *Attester) {
	at.Integrity = a.integrityNow
	a.opts.Attest = at.Attest
	if err := MeasureEarly(a.opts.StateDir); err != nil {
		a.log.WarnContext(ctx, "the kernel does not measure what runs", slog.Any("error", err))
	}
	go func() {
		for wait := attestEvery / 60; ; {
			// not all hosts at the same time
			jitter := time.Duration(mathrand.Int64N(int64(wait)/5 + 1)) //nolint:gosec // no secret
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait + jitter):
			}
			wait = a.proveOnce(ctx, at)
		}
	}()
}

// fileMeasure marks a host whose server looks at what the kernel measures.
const fileMeasure = "measure"

// MeasureEarly has the kernel measure what runs, on a host that attests: before
// the agent does anything else, best in the initramfs. It does nothing on other
// hosts, on kernels without IMA, and where a policy for it is loaded already.
func MeasureEarly(stateDir string) error {
	if _, err := os.Stat(filepath.Join(stateDir, fileMeasure)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := host.LoadMeasurePolicy(host.MeasurePolicy())
	if errors.Is(err, errs.Conflict) || errors.Is(err, errs.Unsupported) {
		return nil // evidence says which it is
	}
	return err
}

// measure makes this host one that measures, from its next start on whole and
// from now on in part.
func (a *Agent) measure(ctx context.Context) {
	path := filepath.Join(a.opts.StateDir, fileMeasure)
	if _, err := os.Stat(path); err == nil {
		return
	}
	err := host.WriteFile(path, []byte("ringwall attest measure\n"), 0o600)
	if err == nil {
		err = MeasureEarly(a.opts.StateDir)
	}
	if err != nil {
		a.log.WarnContext(ctx, "the kernel does not measure what runs", slog.Any("error", err))
	}
}

// proveOnce has a round, if there is a server, and says when to have the next.
func (a *Agent) proveOnce(ctx context.Context, at *Attester) time.Duration {
	l := a.link
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c == nil {
		return attestEvery / 60
	}
	ctx, stop := context.WithTimeout(ctx, attestEvery)
	defer stop()
	switch err := at.Attest(ctx, c.AgentClient); {
	case err == nil:
		a.measure(ctx)
		return attestEvery
	case errors.Is(err, errs.Denied): // by a server that looks
		a.measure(ctx)
		return attestEvery
	case connect.CodeOf(err) == connect.CodeUnimplemented, errors.Is(err, errs.NotFound):
		return attestUnknown // no such service there, or no TPM here
	default:
		a.log.WarnContext(ctx, "this host could not prove what it booted", slog.Any("error", err))
		return attestEvery / 5
	}
}
