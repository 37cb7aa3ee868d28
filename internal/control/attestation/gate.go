package attestation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// State is what a host is to others.
type State string

// The states.
const (
	StateUnknown     State = "unknown" // it never attested
	StatePending     State = "pending" // a person must approve its TPM
	StateTrusted     State = "trusted"
	StateStale       State = "stale" // trusted once, and silent for two intervals
	StateQuarantined State = "quarantined"
)

// How long a host may be silent, in intervals.
const (
	staleAfter      = 2
	quarantineAfter = 3
)

// MaxGrace is how long an outage may be declared for: as long as that, results
// from before it count.
const MaxGrace = 24 * time.Hour

// Status is a host's state with what it rests on.
type Status struct {
	Host      string         `json:"host"`
	TPM       attest.HostID  `json:"tpm,omitempty"`
	State     State          `json:"state"`
	Why       string         `json:"why,omitempty"`
	Basis     attest.Basis   `json:"basis,omitempty"`
	LastGood  time.Time      `json:"last_good"`
	LastSeen  time.Time      `json:"last_seen"`
	Passed    []attest.Check `json:"passed,omitempty"`
	Announced bool           `json:"announced"`
}

// Status tells a host's state.
func (s *Service) Status(ctx context.Context, host string) (*Status, error) {
	var rec *attest.HostRecord
	err := s.read(ctx, func(tx Tx) (err error) { rec, err = record(ctx, tx, host); return err })
	if err != nil {
		return nil, fmt.Errorf("attestation of %s: %w", host, err)
	}
	if rec == nil {
		return &Status{Host: host, State: StateUnknown}, nil
	}
	return s.status(ctx, rec), nil
}

func (s *Service) status(ctx context.Context, rec *attest.HostRecord) *Status {
	st := &Status{
		Host: rec.Host, TPM: rec.TPM, State: State(rec.Standing), Why: rec.Why, Basis: rec.Basis,
		LastGood: rec.LastGood, LastSeen: rec.LastSeen, Passed: rec.Passed, Announced: rec.Announced,
	}
	if rec.Standing == attest.StandingTrusted && s.Now().Sub(rec.LastGood) > staleAfter*s.interval(ctx, rec.Host) {
		st.State = StateStale
	}
	return st
}

func (s *Service) interval(ctx context.Context, host string) time.Duration {
	if t, err := s.Policies.For(ctx, host); err == nil && t.Interval > 0 {
		return t.Interval
	}
	return DefaultInterval
}

// Attested is the gate: nil when the host is trusted, its last accepted round is
// at most maxAge old (0: as old as its policy lets it be before it is stale), and
// that round passed the checks; none: all that its policy enforces. Everything
// else is errs.Denied, also what could not be read: it fails closed.
//
// While an outage of attestation is declared (Degrade), an older result counts
// for as long as that lasts; a host that was refused stays refused.
func (s *Service) Attested(ctx context.Context, host string, checks []attest.Check, maxAge time.Duration) error {
	deny := func(format string, a ...any) error {
		return fmt.Errorf("host %s is not attested: "+format+": %w", append(append([]any{host}, a...), errs.Denied)...)
	}
	var rec *attest.HostRecord
	var grace time.Time
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		return with(tx, func(own Tx) (err error) {
			if rec, err = record(ctx, own, host); err != nil {
				return err
			}
			grace, err = degradedSince(ctx, tx, s.Now())
			return err
		})
	})
	switch {
	case err != nil:
		return deny("its state cannot be read: %v", err)
	case rec == nil:
		return deny("its TPM has shown nothing")
	case rec.Standing != attest.StandingTrusted:
		return deny("it is %s: %s", rec.Standing, rec.Why)
	case rec.LastGood.IsZero():
		return deny("no round was accepted since it was released")
	}
	if maxAge <= 0 {
		maxAge = staleAfter * s.interval(ctx, host)
	}
	age := s.Now().Sub(rec.LastGood)
	if fresh := age >= 0 && age <= maxAge; !fresh && (grace.IsZero() || rec.LastGood.Before(grace.Add(-maxAge))) {
		return deny("its last accepted round was %s ago (at most %s)", age.Round(time.Second), maxAge)
	}
	for _, c := range checks {
		if !slices.Contains(rec.Passed, c) {
			return deny("its last round did not pass %s", c)
		}
	}
	return nil
}

// Sweep quarantines hosts that were silent for three intervals while this
// service could have heard them, and tells how many. One replica runs it, every
// interval or so. While an outage is declared nobody is blamed.
func (s *Service) Sweep(ctx context.Context) (int, error) {
	n, after := 0, ""
	for {
		var page []attest.HostRecord
		var grace time.Time
		err := s.Store.Read(ctx, func(tx control.Tx) error {
			return with(tx, func(own Tx) (err error) {
				if grace, err = degradedSince(ctx, tx, s.Now()); err != nil {
					return err
				}
				page, err = own.Attestations(ctx, attest.StandingTrusted, after, sweepPage)
				return err
			})
		})
		if err != nil || len(page) == 0 || !grace.IsZero() {
			return n, wrapSweep(err)
		}
		for i := range page {
			done, err := s.sweepOne(ctx, &page[i])
			if err != nil {
				return n, wrapSweep(err)
			}
			if done {
				n++
			}
		}
		after = page[len(page)-1].Host
	}
}

const sweepPage = 200

func wrapSweep(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("look for silent hosts: %w", err)
}

func (s *Service) sweepOne(ctx context.Context, rec *attest.HostRecord) (bool, error) {
	now, limit := s.Now(), quarantineAfter*s.interval(ctx, rec.Host)
	since := rec.LastSeen
	if since.Before(s.started) {
		since = s.started
	}
	if now.Sub(since) <= limit {
		return false, nil
	}
	rec.Standing, rec.Why = attest.StandingQuarantined, fmt.Sprintf("silent since %s", rec.LastSeen.Format(time.RFC3339))
	err := s.write(ctx, func(tx Tx) error {
		return errors.Join(tx.PutAttestation(ctx, rec), tx.AppendAudit(ctx, note("quarantine", rec.Host, audit.Done, rec.Why)))
	})
	if errors.Is(err, errs.Conflict) {
		return false, nil // it was heard of meanwhile
	}
	if err == nil && s.Hooks.Quarantined != nil {
		s.Hooks.Quarantined(Incident{Host: rec.Host, TPM: rec.TPM, Reasons: []attest.Reason{attest.ReasonSilent}, Detail: rec.Why, At: now})
	}
	return err == nil, err
}

// hostID is the host in the audit log and in role assignments.
func hostID(host string) resource.ID {
	id, err := resource.ParseID("/providers/" + TypeHost + "/" + host)
	if err != nil {
		return resource.ID{} // a name that is none: at the root, where few may act
	}
	return id
}

// List tells the state of hosts in the order of their names, after one, at most
// limit; of one standing, or "" for all.
func (s *Service) List(ctx context.Context, standing attest.Standing, after string, limit int) ([]Status, error) {
	var page []attest.HostRecord
	err := s.read(ctx, func(tx Tx) (err error) { page, err = tx.Attestations(ctx, standing, after, limit); return err })
	if err != nil {
		return nil, fmt.Errorf("list attested hosts: %w", err)
	}
	var out []Status
	for i := range page {
		out = append(out, *s.status(ctx, &page[i]))
	}
	return out, nil
}
