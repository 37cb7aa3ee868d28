package signer

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/gate"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// Input is an artefact that can be walked once.
type Input interface {
	codesign.Source
	io.Closer
	// Name is what records call it.
	Name() string
	// Digest is the SHA-256 of the artefact, once it was walked to its end: what
	// evidence is about.
	Digest() integrity.Digest
	// Package is what a package says of itself, once walked; false for others.
	Package() (name, version, architecture string, ok bool)
}

// Issuer certifies keys, and knows whom a verifier believes: *pki.Authority.
type Issuer interface {
	NewSigner(r pki.LeafRequest) (*pki.Signer, error)
	Roots(p pki.Purpose) pki.TrustRoots
}

// Epochs keeps the highest epoch that was signed for each product.
type Epochs interface {
	// Highest returns 0 for a product that was never signed.
	Highest(product string) (uint32, error)
	// Raise makes sure that Highest is at least epoch, also after a crash.
	Raise(product string, epoch uint32) error
}

// Policies are the release policies.
type Policies interface {
	// Policy returns errs.NotFound for a product that has none.
	Policy(product string) (*gate.Policy, error)
}

// Signer signs builds that passed their gates. Its methods may be called from
// several goroutines; of one product, one build is signed at a time.
type Signer struct {
	Issuer   Issuer
	Identity string                                                // in certificates, see pki.LeafRequest
	Open     func(ctx context.Context, path string) (Input, error) // opens an artefact
	Policies Policies                                              // nil: there are none, see Order.Ungated
	Epochs   Epochs                                                // nil: none is kept, and any may be signed
	Stamper  pki.Stamper                                           // nil: the issuer's own
	Log      pki.Recorder                                          // nil: the issuer's own, if it has one
	Now      func() time.Time
	Kernel   *KernelKey // nil: no kernel signatures are made
	// Volume measures a dm-verity image; nil, nil for what is none. The field may
	// be nil: then images are files like others.
	Volume func(ctx context.Context, path string) (*Volume, error)
	// Audit is told what is about to be signed, before the key is touched. An
	// error stops it. nil: nobody asks.
	Audit func(context.Context, Entry) error
	// Alert is told of every break-glass signature, before the key is touched. An
	// error stops it. nil: break-glass is not possible.
	Alert func(context.Context, Entry) error

	mu   sync.Mutex
	busy map[string]bool // products
}

// Order asks for one signature.
type Order struct {
	Path     string `json:"-"` // of the artefact, on this machine
	Name     string `json:"name,omitempty"`
	Product  string `json:"product,omitempty"` // empty: what the package says
	Version  string `json:"version,omitempty"` // empty: what the package says
	Epoch    uint32 `json:"epoch"`
	Revision string `json:"revision,omitempty"` // empty: what the evidence says
	Ring     string `json:"ring,omitempty"`     // empty: the policy's last
	// NotAfter is the use-by time; zero: none.
	NotAfter time.Time `json:"not_after,omitzero"`
	AllFiles bool      `json:"all_files,omitempty"`
	// Breakglass asks to be signed past the gates, on two approvals.
	Breakglass bool `json:"breakglass,omitempty"`
	// Ungated signs a product that has no release policy. Never for production;
	// a Server refuses it.
	Ungated bool `json:"-"`
	// KernelSignatures are what an ungated order asks for; otherwise the policy says.
	KernelSignatures []gate.KernelSignature `json:"-"`

	Evidence []Evidence `json:"-"`
	Client   string     `json:"-"` // who asks, for the audit
	ID       string     `json:"-"` // of the request, for the audit
}

// Evidence is a bundle, not verified yet, and where it came from.
type Evidence struct {
	Label  string
	Bundle []byte
}

// Signed is a release that was signed.
type Signed struct {
	Release      *codesign.Release
	Bundle       []byte
	Built        *codesign.Built
	Artefact     string
	SHA256       integrity.Digest
	Architecture string
	Decision     *gate.Decision // nil: there was no policy
	// Kernel are the signatures for kernels; nil: none were asked for.
	Kernel *KernelSignatures

	forms []gate.KernelSignature // that were asked for
}

// Refused is a build that its gates do not let through. It is an errs.Denied
// whether it failed or is on hold: either way it is not signed.
type Refused struct {
	Product  string
	Artefact integrity.Digest
	Decision *gate.Decision
}

// Error names the first gate that stands in the way.
func (r *Refused) Error() string {
	state := r.Decision.State
	var stopped []gate.Result
	for _, g := range r.Decision.Results {
		if g.State == state {
			stopped = append(stopped, g)
		}
	}
	// a gate says more than what follows from its missing evidence
	slices.SortStableFunc(stopped, func(a, b gate.Result) int { return min(1, len(b.Kind)) - min(1, len(a.Kind)) })
	why, more := "no reason given", len(stopped)-1
	if len(stopped) > 0 { // always, but for a server that is not ours
		why = fmt.Sprintf("gate %s: %s", stopped[0].Gate, stopped[0].Text)
	}
	if more > 0 {
		why += fmt.Sprintf(", and %d more", more)
	}
	word := "is refused"
	if state == gate.Hold {
		word = "is on hold"
	}
	return fmt.Sprintf("%s %s; %s", r.Product, word, why)
}

// Unwrap returns errs.Denied.
func (r *Refused) Unwrap() error { return errs.Denied }

// Entry is what an audit needs to know of a request.
type Entry struct {
	Time       time.Time              `json:"time"`
	Event      string                 `json:"event"` // asked, signing, signed, refused, failed, breakglass
	ID         string                 `json:"id"`
	Client     string                 `json:"client"`
	Product    string                 `json:"product"`
	Version    string                 `json:"version,omitempty"`
	Epoch      uint32                 `json:"epoch"`
	Revision   string                 `json:"revision,omitempty"`
	Ring       string                 `json:"ring,omitempty"`
	Artefact   string                 `json:"artefact,omitempty"` // SHA-256
	Policy     string                 `json:"policy,omitempty"`   // SHA-256
	State      gate.State             `json:"state,omitempty"`
	Codes      []string               `json:"codes,omitempty"` // gate=code of what is not passed
	Release    string                 `json:"release,omitempty"`
	LogEntry   string                 `json:"log_entry,omitempty"`  // what stands in a transparency log, for its monitor
	Breakglass string                 `json:"breakglass,omitempty"` // the reason
	Approvers  []string               `json:"approvers,omitempty"`
	NotAfter   time.Time              `json:"not_after,omitzero"`
	Kernel     []gate.KernelSignature `json:"kernel_signatures,omitempty"` // what was asked for
	Error      string                 `json:"error,omitempty"`
}

// Sign signs one build, or returns a *Refused. Errors are errs.Invalid for an
// artefact or order that cannot be used, errs.Conflict while the product is
// being signed already, errs.NotFound for a product without a policy.
func (s *Signer) Sign(ctx context.Context, o Order) (*Signed, error) {
	in, built, err := s.read(ctx, o)
	if err != nil {
		return nil, err
	}
	name, version, architecture, isPackage := in.Package()
	if isPackage && o.Product == "" {
		o.Product = name
	}
	if isPackage && o.Version == "" {
		o.Version = version
	}
	if o.Name == "" {
		o.Name = in.Name()
	}
	if o.Product == "" || o.Version == "" {
		return nil, fmt.Errorf("artefact %s does not say what it is; give product and version: %w", o.Name, errs.Invalid)
	}
	release, err := s.begin(o.Product)
	if err != nil {
		return nil, err
	}
	defer release()
	policy, decision, err := s.decide(&o, in.Digest())
	if err != nil {
		return nil, err
	}
	out := &Signed{Built: built, Artefact: o.Name, SHA256: in.Digest(), Architecture: architecture, Decision: decision}
	if decision != nil && decision.State != gate.Pass {
		return out, &Refused{Product: o.Product, Artefact: out.SHA256, Decision: decision}
	}
	if out.forms, err = s.forms(&o, policy); err != nil {
		return out, err
	}
	return out, s.sign(ctx, &o, policy, out)
}

// read makes the catalogue from the artefact itself, to its last byte.
func (s *Signer) read(ctx context.Context, o Order) (Input, *codesign.Built, error) {
	in, err := s.Open(ctx, o.Path)
	if err != nil {
		return nil, nil, err
	}
	built, err := codesign.Build(in, codesign.Options{AllFiles: o.AllFiles})
	if err := errors.Join(err, in.Close()); err != nil {
		return nil, nil, err
	}
	if built.Records == 0 {
		return nil, nil, fmt.Errorf("nothing in it is executable: %w", errs.Invalid)
	}
	if in.Digest().IsZero() {
		return nil, nil, fmt.Errorf("artefact %s has no digest: %w", in.Name(), errs.Invalid)
	}
	return in, built, nil
}

// begin takes a product; another request for it is told to come back, so that
// two cannot pass the epoch's check side by side.
func (s *Signer) begin(product string) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[product] {
		return nil, fmt.Errorf("%s is being signed already; try again: %w", product, errs.Conflict)
	}
	if s.busy == nil {
		s.busy = map[string]bool{}
	}
	s.busy[product] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, product)
	}, nil
}

// decide asks the product's policy. Without one there is no decision, and only
// an order that says so gets past here.
func (s *Signer) decide(o *Order, artefact integrity.Digest) (*gate.Policy, *gate.Decision, error) {
	var policy *gate.Policy
	err := fmt.Errorf("release policy of %s: %w", o.Product, errs.NotFound)
	if s.Policies != nil {
		policy, err = s.Policies.Policy(o.Product)
	}
	if err != nil {
		if errors.Is(err, errs.NotFound) && o.Ungated && !o.Breakglass {
			return nil, nil, nil
		}
		return nil, nil, err
	}
	r := gate.Request{
		Product: o.Product, Version: o.Version, Epoch: o.Epoch, Revision: o.Revision, Artefact: gate.Digest(artefact), Ring: o.Ring,
	}
	if s.Epochs != nil {
		if r.Signed, err = s.Epochs.Highest(o.Product); err != nil {
			return nil, nil, err
		}
	}
	return policy, Decide(policy, r, o.Evidence, o.Breakglass, s.Now()), nil
}

// Decide verifies evidence and asks a policy. What does not verify is listed
// with what is ignored.
func Decide(p *gate.Policy, r gate.Request, bundles []Evidence, breakglass bool, now time.Time) *gate.Decision {
	var evidence []*gate.Evidence
	var unread []gate.Ignored
	for _, e := range bundles {
		v, err := gate.Open(e.Bundle, p.Trust)
		if err != nil {
			unread = append(unread, gate.Ignored{Label: e.Label, Reason: err.Error()})
			continue
		}
		v.Label = e.Label
		evidence = append(evidence, v)
	}
	evaluate := gate.Evaluate
	if breakglass {
		evaluate = gate.EvaluateBreakglass
	}
	d := evaluate(p, r, evidence, now)
	d.Ignored = append(d.Ignored, unread...)
	return d
}

// sign is the only place that touches a key, with kernel, which it calls.
func (s *Signer) sign(ctx context.Context, o *Order, policy *gate.Policy, out *Signed) error {
	info := codesign.ReleaseInfo{
		Product: o.Product, Version: o.Version, Epoch: o.Epoch, Revision: o.Revision, NotAfter: o.NotAfter,
		Artefacts: []codesign.Artefact{{Name: o.Name, Digest: out.SHA256}},
	}
	if out.Decision != nil {
		gateInfo(&info, policy, out.Decision)
	}
	entry := s.Entry("signing", o, out)
	if info.Breakglass != "" {
		if s.Alert == nil {
			return fmt.Errorf("break-glass: this signer cannot raise an alert: %w", errs.Denied)
		}
		alert := entry
		alert.Event = "breakglass"
		if err := s.Alert(ctx, alert); err != nil {
			return fmt.Errorf("break-glass: the alert could not be raised: %w", err)
		}
	}
	if s.Audit != nil {
		if err := s.Audit(ctx, entry); err != nil {
			return fmt.Errorf("audit: %w", err)
		}
	}
	if s.Epochs != nil { // before signing: a crash in between only refuses what is older
		if err := s.Epochs.Raise(o.Product, o.Epoch); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.kernel(ctx, o, out, &info); err != nil {
		return err
	}
	purpose, life := pki.PurposeBuild, time.Duration(0)
	verify := codesign.VerifyRelease
	if info.Breakglass != "" {
		purpose, verify = pki.PurposeBreakglass, codesign.VerifyBreakglass
		life = pki.PurposeBreakglass.MaxLifetime()
	}
	leaf, err := s.Issuer.NewSigner(pki.LeafRequest{Purpose: purpose, Identity: s.Identity, Now: s.Now(), Lifetime: life})
	if err != nil {
		return err
	}
	if s.Stamper != nil {
		leaf.Stamper = s.Stamper
	}
	if s.Log != nil {
		leaf.Log = s.Log
	}
	if out.Bundle, err = codesign.SignRelease(leaf, info, out.Built.Catalogue, out.Built.Names); err != nil {
		return err
	}
	// What hosts would not believe must not leave this machine.
	out.Release, _, err = verify(out.Bundle, out.Built.Catalogue, s.Issuer.Roots(purpose))
	return err
}

// gateInfo says in the record what the decision rests on.
func gateInfo(info *codesign.ReleaseInfo, policy *gate.Policy, d *gate.Decision) {
	info.Policy, info.Ring, info.Revision = integrity.Digest(policy.Digest), d.Ring, d.Revision
	if d.Breakglass {
		info.Breakglass = d.Reason
		if info.NotAfter.IsZero() || d.NotAfter.Before(info.NotAfter) {
			info.NotAfter = d.NotAfter
		}
	}
	// The record has room for 64: of a gate with much evidence the newest is named.
	each := max(1, maxGates/max(1, len(d.Results)))
	for _, r := range d.Results {
		used := slices.SortedStableFunc(slices.Values(r.Used), func(a, b gate.Used) int { return b.At.Compare(a.At) })
		for _, u := range used[:min(each, len(used))] {
			info.Gates = append(info.Gates, codesign.Gate{Name: r.Gate, Attester: u.Identity, Evidence: integrity.Digest(u.Evidence), At: u.At.UTC()})
		}
	}
}

const maxGates = 64 // of a release record

// Entry describes an order, as far as it has come, for the audit.
func (s *Signer) Entry(event string, o *Order, out *Signed) Entry {
	e := Entry{
		Time: s.Now().UTC(), Event: event, ID: o.ID, Client: o.Client, Product: o.Product, Version: o.Version, Epoch: o.Epoch,
		Revision: o.Revision, Ring: o.Ring,
	}
	if out == nil {
		return e
	}
	e.Artefact, e.Kernel = out.SHA256.String(), out.forms
	if out.Release != nil {
		e.Release, e.Product, e.Version = out.Release.Record.String(), out.Release.Product, out.Release.Version
	}
	if body, err := pki.LogBody(out.Bundle); err == nil { // not yet signed: nothing to say
		h := pki.LeafHash(body)
		e.LogEntry = hex.EncodeToString(h[:])
	}
	d := out.Decision
	if d == nil {
		return e
	}
	e.State, e.Ring, e.Revision = d.State, d.Ring, d.Revision
	for _, r := range d.Results {
		if r.State != gate.Pass {
			e.Codes = append(e.Codes, r.Gate+"="+string(r.Code))
		}
		if d.Breakglass && r.Kind == gate.KindApproval {
			for _, u := range r.Used {
				e.Approvers = append(e.Approvers, u.Identity)
			}
		}
	}
	if d.Breakglass {
		e.Breakglass, e.NotAfter = strings.TrimSpace(d.Reason), d.NotAfter
	}
	return e
}
