package attestation

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// Order is what a person has done to a host's attestation. It changes the
// record; the error says why it cannot be.
type Order struct {
	change func(r *attest.HostRecord, by control.Actor, body *OrderBody, now time.Time) error
}

// OrderBody says why.
type OrderBody struct {
	Reason string        `json:"reason"` // 1 to 1000 bytes, recorded
	TPM    attest.HostID `json:"tpm"`    // of approve: the one that the person looked at
}

const maxReason = 1000

// Names of the orders; each takes the permission TYPE/NAME/action.
const (
	OrderReadmit    = "readmit"        // ends a quarantine
	OrderQuarantine = "quarantine"     // refuses a host
	OrderApprove    = "approveTPM"     // lets a TPM enrol that nobody else vouches for
	OrderReplace    = "replaceTPM"     // lets the host enrol with another TPM
	OrderAnnounce   = "announceReboot" // one TPM reset more is expected
)

// orders are all of them.
func orders() map[string]Order {
	return map[string]Order{
		OrderReadmit: {readmit}, OrderQuarantine: {quarantine}, OrderApprove: {approve}, OrderReplace: {replace},
		OrderAnnounce: {func(r *attest.HostRecord, _ control.Actor, _ *OrderBody, _ time.Time) error {
			r.Announced = true
			return nil
		}},
	}
}

// readmit ends a quarantine. The host is trusted again with its next round,
// which has to explain everything from the start of the boot. Resets of its TPM
// up to the last round are taken as explained; those after it are not.
func readmit(r *attest.HostRecord, _ control.Actor, _ *OrderBody, now time.Time) error {
	if r.Standing != attest.StandingQuarantined {
		return fmt.Errorf("it is %s: %w", r.Standing, errs.Conflict)
	}
	r.Standing, r.Why, r.LastGood, r.LastSeen = attest.StandingTrusted, "", time.Time{}, now
	r.State, r.BootLog, r.Passed = nil, nil, nil
	if r.Clock != nil {
		r.State = &attest.State{Clock: *r.Clock}
	}
	return nil
}

func quarantine(r *attest.HostRecord, by control.Actor, body *OrderBody, _ time.Time) error {
	r.Standing, r.Why = attest.StandingQuarantined, "by "+by.Name+": "+body.Reason
	return nil
}

func approve(r *attest.HostRecord, _ control.Actor, body *OrderBody, _ time.Time) error {
	if r.Standing != attest.StandingPending || r.TPM != body.TPM {
		return fmt.Errorf("%s with TPM %s: %w", r.Standing, r.TPM, errs.Conflict)
	}
	r.Approved = true
	return nil
}

// replace forgets the host's TPM: after a repair of its board. The name stays
// taken, by a TPM that there is none of.
func replace(r *attest.HostRecord, _ control.Actor, _ *OrderBody, _ time.Time) error {
	*r = attest.HostRecord{Host: r.Host, TPM: replacedTPM(r.Host), Standing: attest.StandingPending, Why: "its TPM is to be replaced", Version: r.Version}
	return nil
}

func replacedTPM(host string) attest.HostID { return attest.HostID("none of " + host) }

// give carries an order out in a transaction that has authorised it, and returns
// what the audit log is to say of it.
func (o Order) give(ctx context.Context, tx Tx, by control.Actor, host string, body *OrderBody, now time.Time) (rec *attest.HostRecord, detail string, err error) {
	if body.Reason == "" || len(body.Reason) > maxReason {
		return nil, "", fmt.Errorf("a reason of 1 to %d bytes is wanted: %w", maxReason, errs.Invalid)
	}
	if rec, err = tx.AttestationHost(ctx, host); err != nil {
		return nil, "", err
	}
	b, err := json.Marshal(map[string]any{"reason": body.Reason, "tpm": rec.TPM, "was": rec.Standing, "why": rec.Why})
	if err != nil {
		return nil, "", err
	}
	if err := o.change(rec, by, body, now); err != nil {
		return nil, "", err
	}
	return rec, string(b), tx.PutAttestation(ctx, rec)
}

// Give has a host's order carried out for somebody who may: the same as the
// action on the host's document, for a host that has none.
func (s *Service) Give(ctx context.Context, by control.Actor, order, host string, body OrderBody) error {
	o, ok := orders()[order]
	if !ok || s.Door == nil {
		return fmt.Errorf("order %.40q for host %s: there is no such order, or nobody who may be asked: %w", order, host, errs.Unsupported)
	}
	err := s.Door.Act(ctx, by, TypeHost, order+"/action", hostID(host), func(tx control.Tx, r *audit.Record) error {
		return with(tx, func(own Tx) (err error) {
			_, r.Detail, err = o.give(ctx, own, by, host, &body, s.Now().UTC())
			return err
		})
	})
	if err == nil && order == OrderReadmit && s.Hooks.Released != nil {
		s.Hooks.Released(host, by.Name, body.Reason)
	}
	return err
}

// Actions are the orders as actions of the documents of hosts: POST ID/NAME with
// an OrderBody. hostOf finds the host's name in its document. errs.NotFound for
// a host that never attested.
func Actions(hostOf func(*resource.Document) (string, error), now func() time.Time) map[string]control.Action {
	out := map[string]control.Action{}
	for name, o := range orders() {
		out[name] = control.Action{Do: func(ctx context.Context, tx control.Tx, by control.Actor, d *resource.Document, raw json.RawMessage) (any, error) {
			host, err := hostOf(d)
			if err != nil {
				return nil, err
			}
			var body OrderBody
			if err := pki.UnmarshalStrict(raw, &body, 4*maxReason); err != nil {
				return nil, err
			}
			var rec *attest.HostRecord
			err = with(tx, func(own Tx) error {
				done, detail, err := o.give(ctx, own, by, host, &body, now().UTC())
				if err != nil {
					return err
				}
				rec = done
				// the door's own record shows the document, which does not change
				return own.AppendAudit(ctx, &audit.Record{Actor: by.Name, Action: TypeHost + "/" + name, Target: d.ID.String(), Outcome: audit.Done, Reason: clip(body.Reason), Detail: detail})
			})
			if err != nil {
				return nil, err
			}
			return &Status{Host: host, TPM: rec.TPM, State: State(rec.Standing), Why: rec.Why, Basis: rec.Basis, LastGood: rec.LastGood, LastSeen: rec.LastSeen, Announced: rec.Announced}, nil
		}}
	}
	return out
}
