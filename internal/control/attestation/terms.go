package attestation

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// Types of the documents that this package reads.
const (
	TypePolicy = "Ringwall.Attestation/policies"
	TypeOutage = "Ringwall.Attestation/outages"
)

// PolicyProperties is what a document of TypePolicy holds.
type PolicyProperties struct {
	// Rings that it is for; none: every ring that no other policy names.
	Rings           []string        `json:"rings,omitempty"`
	Enrolment       Enrolment       `json:"enrolment"`
	Appraisal       json.RawMessage `json:"appraisal"`       // see attest.ParsePolicy
	IntervalSeconds int             `json:"intervalSeconds"` // between rounds; 0: 300
	SealTo          []int           `json:"sealTo,omitempty"`
}

// Enrolment says whose endorsement keys are believed; nobody's by default.
type Enrolment struct {
	VTPMCAs       []string        `json:"vtpmCAs,omitempty"`   // PEM
	VendorCAs     []string        `json:"vendorCAs,omitempty"` // PEM
	Allowed       []attest.HostID `json:"allowed,omitempty"`
	Denied        []attest.HostID `json:"denied,omitempty"`
	JoinToken     bool            `json:"joinToken,omitempty"`
	FirstUseUntil time.Time       `json:"firstUseUntil"`
}

// Outage is what a document of TypeOutage holds: attestation does not work, and
// until then the results of before count.
type Outage struct {
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`
	Reason string    `json:"reason"`
}

// Kinds are the types of documents, for control.New.
func Kinds() []control.Kind {
	return []control.Kind{{Type: TypePolicy, Check: checkPolicy}, {Type: TypeOutage, Check: checkOutage}}
}

func parseProperties(d *resource.Document, v any) error {
	if err := pki.UnmarshalStrict(d.Properties, v, resource.MaxProperties); err != nil {
		return fmt.Errorf("properties of %s: %w", d.ID, err)
	}
	return nil
}

// policyShell is a policy without what attest.ParsePolicy reads.
type policyShell struct {
	Rings           []string       `json:"rings"`
	Enrolment       Enrolment      `json:"enrolment"`
	Appraisal       *attest.Policy `json:"appraisal"`
	IntervalSeconds int            `json:"intervalSeconds"`
	SealTo          []int          `json:"sealTo"`
}

// parsePolicy reads a policy document.
func parsePolicy(d *resource.Document) (*policyShell, *Terms, error) {
	bad := func(format string, a ...any) (*policyShell, *Terms, error) {
		return nil, nil, fmt.Errorf(format+": %w", append(a, errs.Invalid)...)
	}
	var p policyShell
	if err := parseProperties(d, &p); err != nil {
		return nil, nil, err
	}
	var raw PolicyProperties
	if err := json.Unmarshal(d.Properties, &raw); err != nil {
		return bad("properties: %w", err)
	}
	policy, err := attest.ParsePolicy(raw.Appraisal)
	if err != nil {
		return nil, nil, err
	}
	const shortest, longest = 10, 24 * 3600
	t := &Terms{Policy: policy, Interval: time.Duration(p.IntervalSeconds) * time.Second, SealTo: p.SealTo}
	switch {
	case p.IntervalSeconds == 0:
		t.Interval = DefaultInterval
	case p.IntervalSeconds < shortest || p.IntervalSeconds > longest:
		return bad("an interval of %d seconds (%d to %d)", p.IntervalSeconds, shortest, longest)
	}
	if len(t.SealTo) == 0 {
		t.SealTo = []int{4, 7, 11}
	}
	for _, n := range t.SealTo {
		if n < 0 || n > 15 || n == 10 {
			return bad("certificates cannot be sealed to PCR %d: 0 to 15 but for 10, which grows", n)
		}
	}
	if policy.Bank != attest.SHA256.String() {
		return bad("bank %s: certificates are sealed to sha256", policy.Bank)
	}
	e := &t.Enrolment
	e.Allowed, e.Denied, e.JoinToken, e.FirstUseUntil = p.Enrolment.Allowed, p.Enrolment.Denied, p.Enrolment.JoinToken, p.Enrolment.FirstUseUntil
	if e.VTPMCAs, err = certificates(p.Enrolment.VTPMCAs); err != nil {
		return nil, nil, err
	}
	e.VendorCAs, err = certificates(p.Enrolment.VendorCAs)
	return &p, t, err
}

// certificates reads CAs of TPM makers, which have keys of all kinds.
func certificates(texts []string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for i, text := range texts {
		block, _ := pem.Decode([]byte(text))
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("CA %d is no PEM certificate: %w", i+1, errs.Invalid)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || !c.IsCA {
			return nil, fmt.Errorf("CA %d: not a certificate of a CA: %w", i+1, errors.Join(err, errs.Invalid))
		}
		out = append(out, c)
	}
	return out, nil
}

// checkPolicy refuses what cannot be read, and two policies for one ring: which
// of them counts would be a guess.
func checkPolicy(ctx context.Context, tx control.Tx, _, d *resource.Document) error {
	p, _, err := parsePolicy(d)
	if err != nil {
		return err
	}
	return eachPolicy(ctx, tx, func(o *resource.Document) error {
		if o.ID.Equal(d.ID) {
			return nil
		}
		other, _, err := parsePolicy(o)
		if err != nil {
			return err
		}
		both := len(p.Rings) == 0 && len(other.Rings) == 0 || slices.ContainsFunc(p.Rings, func(r string) bool { return slices.Contains(other.Rings, r) })
		if both {
			return fmt.Errorf("%s is for the same ring: %w", o.ID, errs.Conflict)
		}
		return nil
	})
}

func eachPolicy(ctx context.Context, tx control.Tx, visit func(*resource.Document) error) error {
	list, err := tx.List(ctx, resource.Query{Type: TypePolicy, Limit: resource.MaxPage})
	if err != nil {
		return err
	}
	for i := range list {
		if err := visit(&list[i]); err != nil {
			return err
		}
	}
	return nil
}

func checkOutage(_ context.Context, _ control.Tx, old, d *resource.Document) error {
	var o Outage
	if err := parseProperties(d, &o); err != nil {
		return err
	}
	switch {
	case o.Reason == "" || o.Since.IsZero() || !o.Until.After(o.Since):
		return fmt.Errorf("an outage has since, until and a reason: %w", errs.Invalid)
	case o.Until.Sub(o.Since) > MaxGrace:
		return fmt.Errorf("an outage lasts %s at most: %w", MaxGrace, errs.Invalid)
	case old != nil:
		return fmt.Errorf("an outage is not prolonged: declare another, with another reason: %w", errs.Conflict)
	}
	return nil
}

// degradedSince is when the outage began that is declared now; zero: none is.
func degradedSince(ctx context.Context, tx control.Tx, now time.Time) (time.Time, error) {
	list, err := tx.List(ctx, resource.Query{Type: TypeOutage, Limit: resource.MaxPage})
	var since time.Time
	for i := range list {
		var o Outage
		if err := parseProperties(&list[i], &o); err != nil {
			return time.Time{}, err
		}
		if !now.Before(o.Since) && now.Before(o.Until) && (since.IsZero() || o.Since.Before(since)) {
			since = o.Since
		}
	}
	return since, err
}

// Tree reads policies from the resource tree.
type Tree struct {
	Store control.Store
	// Ring tells a host's ring; nil: every host is in none.
	Ring func(ctx context.Context, host string) (string, error)
	// Catalogues gives the catalogues of what a host may run; nil: none.
	Catalogues func(ctx context.Context, host string) (attest.Catalogues, error)

	mu       sync.Mutex
	read     map[string]readPolicy
	revision uint64 // of the tree, that all is of
	all      []readPolicy
}

// readPolicy is a document that was parsed, as of its revision.
type readPolicy struct {
	revision uint64
	shell    *policyShell
	terms    *Terms
}

// For implements Policies.
func (p *Tree) For(ctx context.Context, host string) (*Terms, error) {
	ring := ""
	var err error
	if p.Ring != nil {
		if ring, err = p.Ring(ctx, host); err != nil {
			return nil, fmt.Errorf("ring of host %s: %w", host, err)
		}
	}
	var found *Terms
	all, err := p.policies(ctx)
	if err != nil {
		return nil, fmt.Errorf("attestation policy of host %s: %w", host, err)
	}
	for _, r := range all {
		if slices.Contains(r.shell.Rings, ring) {
			found = r.terms
			break
		}
		if len(r.shell.Rings) == 0 {
			found = r.terms
		}
	}
	if found == nil {
		return nil, fmt.Errorf("no attestation policy is for host %s in ring %q: %w", host, ring, errs.NotFound)
	}
	terms := *found
	if p.Catalogues != nil {
		terms.Catalogues, err = p.Catalogues(ctx, host)
	}
	return &terms, err
}

// policies are all of them, read when the tree has changed since.
func (p *Tree) policies(ctx context.Context) ([]readPolicy, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var now uint64
	var all []readPolicy
	read := map[string]readPolicy{}
	err := p.Store.Read(ctx, func(tx control.Tx) (err error) {
		if now, err = tx.Revision(ctx); err != nil || now == p.revision {
			return err
		}
		all = nil
		return eachPolicy(ctx, tx, func(d *resource.Document) error {
			r, ok := p.read[d.ID.Key()]
			if !ok || r.revision != d.Revision {
				r = readPolicy{revision: d.Revision}
				if r.shell, r.terms, err = parsePolicy(d); err != nil {
					return fmt.Errorf("policy %s: %w", d.ID, err)
				}
			}
			read[d.ID.Key()], all = r, append(all, r)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if now != p.revision {
		p.read, p.all, p.revision = read, all, now
	}
	return p.all, nil
}
