// Package attestation is the server's side of host attestation: it asks a
// host's TPM what was booted and what runs, holds the answer against the
// policy of the host's ring, and draws the consequences.
//
//	Challenge  a host asks; a TPM that nobody knows is judged by the enrolment
//	           policy and must open a credential
//	Verify     the answer is appraised, the result signed and archived, the host
//	           gets a certificate that only its TPM in that state can open, or is
//	           quarantined
//	Attested   the gate: other parts call it before they give out keys or work
//
// Everything fails closed: a host that is not known, an age that is too great,
// a check that was not made is a refusal. What runs already is not this
// package's to stop; it tells by Hooks.
package attestation

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
)

// Tx is what a transaction of the store must offer beside control.Tx;
// *store.Tx does.
type Tx interface {
	// AttestationHost and AttestationTPM: errs.NotFound where there is none.
	AttestationHost(ctx context.Context, host string) (*attest.HostRecord, error)
	AttestationTPM(ctx context.Context, tpm attest.HostID) (*attest.HostRecord, error)
	// PutAttestation: errs.Conflict when the version is not the stored one or the
	// TPM is another host's.
	PutAttestation(ctx context.Context, r *attest.HostRecord) error
	Attestations(ctx context.Context, standing attest.Standing, after string, limit int) ([]attest.HostRecord, error)
	PutAttestationChallenge(ctx context.Context, c *attest.OpenChallenge) error
	// TakeAttestationChallenge: of two that ask with one nonce, one gets errs.NotFound.
	TakeAttestationChallenge(ctx context.Context, nonce []byte) (*attest.OpenChallenge, error)
	PutAttestationArchive(ctx context.Context, host string, at time.Time, status attest.Status, blob []byte) error
	AppendAudit(ctx context.Context, r *audit.Record) error
}

// Issuer certifies hosts; *pki.TLSAuthority does.
type Issuer interface {
	CertifyClient(csr []byte, identity string, life time.Duration, now time.Time) (*x509.Certificate, error)
}

// Terms are what one host is held against.
type Terms struct {
	Policy    *attest.Policy
	Enrolment attest.EKPolicy
	Interval  time.Duration // between rounds
	SealTo    []int         // PCRs that a certificate is sealed to
	// Catalogues that the host's IMA list is looked up in; nil: none.
	Catalogues attest.Catalogues
}

// Policies knows the terms of a host, by its name in the fleet. errs.NotFound:
// nothing is said about it, and it cannot attest.
type Policies interface {
	For(ctx context.Context, host string) (*Terms, error)
}

// Incident is what became of a host, for whoever answers for it.
type Incident struct {
	Host    string
	TPM     attest.HostID
	Reasons []attest.Reason
	Detail  string
	At      time.Time
	Archive time.Time // of the evidence, in the store; zero: there is none
}

// Hooks are told what happened, after it was stored. They must not block.
type Hooks struct {
	Quarantined func(Incident)
	Released    func(host, by, reason string)
}

// Config is what a Service is made of.
type Config struct {
	Store    control.Store
	Door     *control.Door
	Policies Policies
	Results  attest.Signer // of purpose "appraisal"
	Hosts    Issuer        // nil: hosts get no certificates
	Fleet    string        // trust domain of the certificates, such as fleet.example
	Hooks    Hooks
	Now      func() time.Time
}

// Service is safe for use by several goroutines and by several replicas on one
// store.
type Service struct {
	Config
	started time.Time
	boots   *bootCache
}

// CertificateLife is how long a host's certificate lasts.
const CertificateLife = time.Hour

// DefaultInterval is the time between two rounds where the terms say none.
const DefaultInterval = 5 * time.Minute

// New makes a service. Hosts that were silent while no service ran are not
// blamed for it: silence counts from now on.
func New(c Config) (*Service, error) {
	switch {
	case c.Store == nil || c.Policies == nil || c.Results == nil || c.Now == nil:
		return nil, fmt.Errorf("attestation service: store, policies, signer or clock is missing: %w", errs.Invalid)
	case c.Hosts != nil && c.Fleet == "":
		return nil, fmt.Errorf("attestation service: certificates without a trust domain: %w", errs.Invalid)
	}
	return &Service{Config: c, started: c.Now(), boots: newBootCache()}, nil
}

func (s *Service) write(ctx context.Context, fn func(Tx) error) error {
	return s.Store.Write(ctx, func(tx control.Tx) error { return with(tx, fn) })
}

func (s *Service) read(ctx context.Context, fn func(Tx) error) error {
	return s.Store.Read(ctx, func(tx control.Tx) error { return with(tx, fn) })
}

func with(tx control.Tx, fn func(Tx) error) error {
	own, ok := tx.(Tx)
	if !ok {
		return fmt.Errorf("attestation: this store keeps none: %w", errs.Unsupported)
	}
	return fn(own)
}

// record is the host's; nil when there is none.
func record(ctx context.Context, tx Tx, host string) (*attest.HostRecord, error) {
	r, err := tx.AttestationHost(ctx, host)
	if errors.Is(err, errs.NotFound) {
		return nil, nil //nolint:nilnil // a host that is new
	}
	return r, err
}

// Kind of the actions in the audit log.
const (
	TypeHost = "Ringwall.Attestation/hosts"
	actor    = "attestation"
)

// Audit records of the service itself.
func note(verb, host string, outcome audit.Outcome, reason string) *audit.Record {
	return &audit.Record{Actor: actor, Action: TypeHost + "/" + verb, Target: hostID(host).String(), Outcome: outcome, Reason: clip(reason)}
}

func clip(s string) string {
	const most = 800
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

func zip(b []byte) ([]byte, error) {
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed) // a level that exists
	_, err := w.Write(b)
	err = errors.Join(err, w.Close())
	return out.Bytes(), err
}
