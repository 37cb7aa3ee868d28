package attestation

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/audit"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
)

// Challenge begins a round: host is the fleet's name of the host, which the
// caller has authenticated. A TPM that this host has not enrolled with is held
// against the enrolment policy first.
//
// errs.Conflict: the host has another TPM, or the TPM belongs to another host;
// that takes Replace. An *attest.Error with ReasonEKPending: a person must
// approve the TPM, and the host may ask again later.
func (s *Service) Challenge(ctx context.Context, host string, req *attest.Request) (*attest.Question, error) {
	q, err := s.challenge(ctx, host, req)
	if err != nil {
		return nil, fmt.Errorf("challenge host %s: %w", host, err)
	}
	return q, nil
}

func (s *Service) challenge(ctx context.Context, host string, req *attest.Request) (*attest.Question, error) {
	if host == "" {
		return nil, fmt.Errorf("a host without a name: %w", errs.Invalid)
	}
	terms, err := s.Policies.For(ctx, host)
	if err != nil {
		return nil, err
	}
	ek, ak, err := parseIdentity(&req.Identity)
	if err != nil {
		return nil, err
	}
	key, err := req.PublicKey()
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("key: %w: %w", err, errs.Invalid)
	}
	keySum := sha256.Sum256(spki)
	now := s.Now().UTC()
	open := &attest.OpenChallenge{
		Name: host, Identity: req.Identity,
		Challenge: attest.Challenge{
			Nonce: make([]byte, attest.NonceSize), Host: ek.ID(), AKName: ak.Name(), Key: keySum[:], Bank: terms.Policy.Bank, Issued: now,
		},
	}
	_, _ = rand.Read(open.Challenge.Nonce) // never fails, see crypto/rand
	var q *attest.Question
	secret, cred, err := attest.MakeCredential(ek, ak)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(secret)
	var refused error
	err = s.write(ctx, func(tx Tx) error {
		refused, open.Opened, open.Version, q = nil, nil, 0, question(open)
		rec, err := s.belongs(ctx, tx, host, ek.ID())
		if err != nil {
			refused = err
			return refusal(ctx, tx, host, err)
		}
		open.Basis, refused = trust(rec, req, ek, terms, now)
		if attest.ReasonOf(refused) == attest.ReasonEKPending {
			refused = nil // it must show that it has the TPM before it takes a place in the list
		}
		if refused != nil {
			return refusal(ctx, tx, host, refused)
		}
		if rec == nil || rec.Basis == "" || !bytes.Equal(rec.Identity.AK, req.Identity.AK) {
			open.Opened, q.Credential = sum[:], &cred
		}
		if rec != nil && rec.State != nil {
			q.Boot, q.Resets = rec.State.EventLog, rec.State.Clock.Resets
			if rec.State.Facts.Covered(terms.Catalogues) {
				q.IMAFrom = rec.State.IMA.Entries
			}
		}
		if rec != nil {
			open.Version = rec.Version
		}
		return tx.PutAttestationChallenge(ctx, open)
	})
	if err = errors.Join(refused, err); err != nil {
		return nil, err
	}
	return q, nil
}

func question(open *attest.OpenChallenge) *attest.Question {
	c := &open.Challenge
	return &attest.Question{Nonce: c.Nonce, Key: c.Key, Bank: c.Bank}
}

// refusal records one that a person should see.
func refusal(ctx context.Context, tx Tx, host string, why error) error {
	if !errors.Is(why, errs.Conflict) && !errors.Is(why, errs.Untrusted) {
		return nil // malformed, or the database's failure
	}
	return tx.AppendAudit(ctx, note("enrol", host, audit.Refused, why.Error()))
}

func parseIdentity(id *attest.Identity) (*attest.EK, *attest.AK, error) {
	ek, err := attest.ParseEK(id.EK)
	if err != nil {
		return nil, nil, err
	}
	ak, err := attest.ParseAK(id.AK)
	return ek, ak, err
}

// belongs gives the host's record, nil for a new host, if name and TPM are one
// another's. Whoever comes first has both: a second is refused in the same
// transaction that would write.
func (s *Service) belongs(ctx context.Context, tx Tx, host string, tpm attest.HostID) (*attest.HostRecord, error) {
	rec, err := record(ctx, tx, host)
	if err != nil {
		return nil, err
	}
	if rec != nil && rec.TPM == replacedTPM(host) {
		rec.TPM = tpm // whichever comes first, as with a new host
	}
	if rec != nil && rec.TPM != tpm {
		return nil, fmt.Errorf("it has the TPM %s and comes with %s: replacing a TPM takes an order: %w", rec.TPM, tpm, errs.Conflict)
	}
	other, err := tx.AttestationTPM(ctx, tpm)
	switch {
	case errors.Is(err, errs.NotFound) || err == nil && other.Host == host:
		return rec, nil
	case err != nil:
		return nil, err
	}
	if left, err := gone(ctx, tx, other.Host); err != nil || !left {
		return nil, errors.Join(err, fmt.Errorf("the TPM %s is that of host %s: %w", tpm, other.Host, errs.Conflict))
	}
	return rec, nil
}

// fleetTx is what a transaction of a store that knows the fleet's hosts offers.
type fleetTx interface {
	Grant(ctx context.Context, host string) (*fleet.Grant, error)
	Get(ctx context.Context, id resource.ID) (*resource.Document, error)
}

// gone: the host's document was deleted, stands for another host now, or is
// revoked for good. That was somebody's explicit, audited act, so that the machine
// may join anew under another id. A host that the fleet does not know is not gone.
func gone(ctx context.Context, tx Tx, host string) (bool, error) {
	f, ok := tx.(fleetTx)
	if !ok {
		return false, nil
	}
	g, err := f.Grant(ctx, host)
	if errors.Is(err, errs.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	d, err := f.Get(ctx, g.Resource)
	if errors.Is(err, errs.NotFound) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	var p struct {
		ID      string    `json:"hostId"`
		Revoked time.Time `json:"revoked"`
	}
	if err := json.Unmarshal(d.Properties, &p); err != nil {
		return false, fmt.Errorf("properties of %s: %w: %w", d.ID, err, errs.Invalid)
	}
	return p.ID != host || !p.Revoked.IsZero(), nil
}

// put writes a record whose TPM belongs to it, as belongs has seen in the same
// transaction: from a host that is gone it is taken.
func put(ctx context.Context, tx Tx, rec *attest.HostRecord) error {
	other, err := tx.AttestationTPM(ctx, rec.TPM)
	switch {
	case errors.Is(err, errs.NotFound) || err == nil && other.Host == rec.Host:
		return tx.PutAttestation(ctx, rec)
	case err != nil:
		return err
	}
	why := fmt.Sprintf("the host is gone, its TPM %s is that of host %s now", rec.TPM, rec.Host)
	*other = attest.HostRecord{Host: other.Host, TPM: replacedTPM(other.Host), Standing: attest.StandingPending, Why: why, Version: other.Version}
	return errors.Join(tx.PutAttestation(ctx, other), tx.AppendAudit(ctx, note("replace", other.Host, audit.Done, why)), tx.PutAttestation(ctx, rec))
}

// trust is why the endorsement key is believed today. A host that enrolled
// keeps its basis for as long as the key is not denied; the appraisal decides
// whether the basis is good enough.
func trust(rec *attest.HostRecord, req *attest.Request, ek *attest.EK, terms *Terms, now time.Time) (attest.Basis, error) {
	policy := terms.Enrolment
	if rec != nil && rec.Basis != "" {
		if slices.Contains(policy.Denied, ek.ID()) {
			return "", nil // the round goes on, and fails ek-trust
		}
		return rec.Basis, nil
	}
	if rec != nil && rec.Approved {
		// the window was open when the person approved it
		policy.Approved, policy.FirstUseUntil = append(slices.Clone(policy.Approved), ek.ID()), now.Add(time.Minute)
	}
	var cert *attest.EKCertificate
	var err error
	if len(req.Identity.Certificate) > 0 {
		if cert, err = attest.ParseEKCertificate(req.Identity.Certificate); err != nil {
			return "", err
		}
	}
	var between []*x509.Certificate
	for _, der := range req.Identity.Intermediates {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return "", fmt.Errorf("intermediate certificate: %w: %w", err, errs.Invalid)
		}
		between = append(between, c)
	}
	return policy.Trust(ek, cert, between, now)
}

const waits = "waits for approval"

// wait puts a TPM that nobody vouches for onto the list of those that a person
// may approve.
func (s *Service) wait(ctx context.Context, rec *attest.HostRecord, open *attest.OpenChallenge) error {
	pending := attest.Refuse(attest.ReasonEKPending, "key "+string(rec.TPM)+" waits for a person's approval")
	if rec.Standing == attest.StandingPending && rec.Why == waits {
		return pending
	}
	rec.Identity, rec.Standing, rec.Why, rec.LastSeen = open.Identity, attest.StandingPending, waits, s.Now().UTC()
	return errors.Join(pending, s.write(ctx, func(tx Tx) error {
		if _, err := s.belongs(ctx, tx, rec.Host, rec.TPM); err != nil {
			return err
		}
		return errors.Join(put(ctx, tx, rec), tx.AppendAudit(ctx, note("enrol", rec.Host, audit.Refused, "TPM "+string(rec.TPM)+" waits for approval")))
	}))
}

// Verify ends a round. The error is an *attest.Error for an answer that is none
// (a nonce that is not open, a credential that was not opened, a request for
// another key); evidence that was looked at and refused is no error but a Reply
// with its reasons.
func (s *Service) Verify(ctx context.Context, host string, a *attest.Answer) (*attest.Reply, error) {
	r, err := s.verify(ctx, host, a)
	if err != nil {
		return nil, fmt.Errorf("verify host %s: %w", host, err)
	}
	return r, nil
}

func (s *Service) verify(ctx context.Context, host string, a *attest.Answer) (*attest.Reply, error) {
	open, err := s.redeem(ctx, host, a)
	if err != nil {
		return nil, err
	}
	csr, err := open.Challenge.CheckCSR(a.CSR)
	if err != nil {
		return nil, err
	}
	terms, err := s.Policies.For(ctx, host)
	if err != nil {
		return nil, err
	}
	ek, ak, err := parseIdentity(&open.Identity)
	if err != nil {
		return nil, err
	}
	var rec *attest.HostRecord
	if err := s.read(ctx, func(tx Tx) (err error) { rec, err = s.belongs(ctx, tx, host, ek.ID()); return err }); err != nil {
		return nil, err
	}
	if rec == nil {
		rec = &attest.HostRecord{Host: host, TPM: ek.ID()}
	}
	if rec.Basis == "" && open.Basis == "" {
		return nil, s.wait(ctx, rec, open)
	}
	// what was asked for is not what is wanted any more: no fault of the host's
	if rec.Version != open.Version || a.Evidence.IMAFrom > 0 && rec.State != nil && !rec.State.Facts.Covered(terms.Catalogues) {
		return nil, fmt.Errorf("what is known of it has changed since it was asked: ask again: %w", errs.Conflict)
	}
	in := &attest.Input{
		Enrolled:  attest.Enrolled{Host: ek.ID(), AKName: ak.Name(), Basis: open.Basis},
		Challenge: open.Challenge, Evidence: a.Evidence, State: rec.State, Announced: rec.Announced,
		Policy: terms.Policy, Catalogues: terms.Catalogues, Now: s.Now().UTC(),
	}
	if len(a.Evidence.EventLog) == 0 {
		in.BootLog, in.Boot = rec.BootLog, s.boots.get(host, rec.Version)
	}
	result, next, boot := attest.Appraise(in)
	signed, err := result.Sign(s.Results)
	if err != nil {
		return nil, err
	}
	reply := &attest.Reply{Status: result.Status, Reasons: result.Reasons(), Result: signed}
	standing := rec.Standing
	s.fold(rec, open, in, result, next)
	// what may fail is made before the record says that it was
	if rec.Standing == attest.StandingTrusted && s.Hosts != nil {
		if reply.Certificate, err = s.certify(ek, csr, in, terms); err != nil {
			return nil, err
		}
	}
	if err := s.keep(ctx, rec, standing, in, result, signed); err != nil {
		return nil, err
	}
	if boot != nil && result.Status != attest.Contraindicated {
		s.boots.put(host, rec.Version+1, boot)
	}
	if rec.Standing == attest.StandingQuarantined && standing != attest.StandingQuarantined && s.Hooks.Quarantined != nil {
		s.Hooks.Quarantined(Incident{Host: host, TPM: rec.TPM, Reasons: reply.Reasons, Detail: rec.Why, At: in.Now, Archive: in.Now})
	}
	return reply, nil
}

// redeem takes the challenge out, in a transaction of its own: whatever comes of
// the answer, the nonce is used up. Then it checks that the host may answer it.
func (s *Service) redeem(ctx context.Context, host string, a *attest.Answer) (*attest.OpenChallenge, error) {
	open := &attest.OpenChallenge{}
	err := s.write(ctx, func(tx Tx) error {
		got, err := tx.TakeAttestationChallenge(ctx, a.Nonce)
		if err == nil {
			open = got
		}
		return err
	})
	switch {
	case err != nil && !errors.Is(err, errs.NotFound):
		return nil, err
	case err == nil && open.Name != host:
		return nil, notFor(host, open.Name)
	}
	if _, err := attest.Redeem(once{open.Challenge, err}, a.Nonce, open.Challenge.Host, s.Now().UTC()); err != nil {
		return nil, err
	}
	if want := open.Opened; len(want) > 0 {
		sum := sha256.Sum256(a.Secret)
		if subtle.ConstantTimeCompare(sum[:], want) != 1 {
			return nil, attest.Refuse(attest.ReasonActivation, "the secret of the credential is another: the keys are not in one TPM")
		}
	}
	return open, nil
}

func notFor(host, name string) error {
	return attest.Refuse(attest.ReasonNonce, "the challenge was for host "+name+", not for "+host)
}

// once hands out a challenge that was taken already.
type once struct {
	c   attest.Challenge
	err error
}

// PutChallenge implements attest.ChallengeStore.
func (once) PutChallenge(attest.Challenge) error { return errs.Unsupported }

// TakeChallenge implements attest.ChallengeStore.
func (o once) TakeChallenge([]byte) (attest.Challenge, error) { return o.c, o.err }

// fold brings the record up to the round. Of a round that was refused nothing
// is kept but that it was: the host has to explain the same entries again.
func (s *Service) fold(rec *attest.HostRecord, open *attest.OpenChallenge, in *attest.Input, r *attest.Result, next *attest.State) {
	if rec.Basis == "" {
		rec.Enrolled = in.Now
	}
	rec.Identity, rec.LastSeen = open.Identity, in.Now
	if next != nil {
		rec.Clock = &next.Clock
	}
	if open.Basis != "" {
		rec.Basis = open.Basis
	}
	if r.Status == attest.Contraindicated {
		if rec.Standing != attest.StandingQuarantined {
			rec.Standing, rec.Why = attest.StandingQuarantined, why(r)
		}
		return
	}
	if rec.State == nil || next.Clock.Resets != rec.State.Clock.Resets {
		rec.Announced = false
	}
	rec.State, rec.LastGood, rec.Passed = next, in.Now, passed(r)
	if len(in.Evidence.EventLog) > 0 {
		rec.BootLog = in.Evidence.EventLog
	}
	if rec.Standing != attest.StandingQuarantined { // which only a person ends
		rec.Standing, rec.Why = attest.StandingTrusted, ""
	}
}

func passed(r *attest.Result) []attest.Check {
	var out []attest.Check
	for _, c := range r.Checks {
		if c.Outcome == attest.Pass {
			out = append(out, c.Check)
		}
	}
	return out
}

func why(r *attest.Result) string {
	var b strings.Builder
	for _, c := range r.Checks {
		if c.Outcome == attest.Fail && c.Mode == attest.ModeEnforce {
			if b.Len() > 0 {
				b.WriteString("; ")
			}
			fmt.Fprintf(&b, "%s (%s): %s", c.Check, c.Reason, c.Detail)
		}
	}
	return clip(b.String())
}

// certify makes the host's certificate and seals it to what was attested.
func (s *Service) certify(ek *attest.EK, csr *x509.CertificateRequest, in *attest.Input, terms *Terms) (*attest.SealedCertificate, error) {
	alg, err := attest.ParseAlg(in.Evidence.Bank)
	if err != nil {
		return nil, err
	}
	bank, err := attest.NewBank(alg, in.Evidence.PCRs)
	if err != nil {
		return nil, err
	}
	cert, err := s.Hosts.CertifyClient(csr.Raw, Identity(s.Fleet, ek.ID()), CertificateLife, in.Now)
	if err != nil {
		return nil, err
	}
	return attest.SealCertificate(ek, bank, terms.SealTo, cert.Raw)
}

// Identity is the URI in the certificate of an attested host.
func Identity(fleet string, tpm attest.HostID) string {
	return "spiffe://" + fleet + "/host/" + string(tpm)
}

// archiveEvery is how long rounds that only say the same again are not archived.
const archiveEvery = 24 * time.Hour

// worthKeeping: every round that was not wholly good, the first one of a boot,
// every change of standing, and one a day.
func worthKeeping(rec *attest.HostRecord, before attest.Standing, in *attest.Input, r *attest.Result) bool {
	return r.Status != attest.Affirming || len(in.Evidence.EventLog) > 0 || rec.Standing != before || in.Now.Sub(rec.Archived) >= archiveEvery
}

// keep stores record, archive and, where the standing changed, an audit record
// in one transaction. Two rounds of one host at the same time: one wins, the
// other is errs.Conflict.
func (s *Service) keep(ctx context.Context, rec *attest.HostRecord, before attest.Standing, in *attest.Input, r *attest.Result, signed []byte) error {
	var blob []byte
	if worthKeeping(rec, before, in, r) {
		archive, err := attest.NewArchive(in, signed)
		if err != nil {
			return err
		}
		if blob, err = zip(archive); err != nil {
			return fmt.Errorf("archive: %w", err)
		}
		rec.Archived = in.Now
	}
	return s.write(ctx, func(tx Tx) error {
		if _, err := s.belongs(ctx, tx, rec.Host, rec.TPM); err != nil {
			return err
		}
		err := put(ctx, tx, rec)
		if err == nil && blob != nil {
			err = tx.PutAttestationArchive(ctx, rec.Host, in.Now, r.Status, blob)
		}
		if err != nil || rec.Standing == before {
			return err
		}
		verb, outcome, reason := "enrol", audit.Done, fmt.Sprintf("TPM %s, by %s", rec.TPM, rec.Basis)
		if rec.Standing == attest.StandingQuarantined {
			verb, outcome, reason = "quarantine", audit.Done, rec.Why
		}
		return tx.AppendAudit(ctx, note(verb, rec.Host, outcome, reason))
	})
}

// bootCache keeps what the boot logs of hosts said, so that a round of a boot
// that is known reads no log. It is bounded, and losing it costs time only.
type bootCache struct {
	mu   sync.Mutex
	of   map[string]cachedBoot
	most int
}

type cachedBoot struct {
	version uint64 // of the record that it belongs to
	boot    *attest.Boot
}

const maxCachedBoots = 4096

func newBootCache() *bootCache { return &bootCache{of: map[string]cachedBoot{}, most: maxCachedBoots} }

func (c *bootCache) get(host string, version uint64) *attest.Boot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b := c.of[host]; b.version == version {
		return b.boot
	}
	return nil
}

func (c *bootCache) put(host string, version uint64, b *attest.Boot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, there := c.of[host]; !there && len(c.of) >= c.most {
		for other := range c.of { // whichever
			delete(c.of, other)
			break
		}
	}
	c.of[host] = cachedBoot{version, b}
}
