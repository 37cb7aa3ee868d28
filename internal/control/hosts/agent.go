package hosts

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

const (
	// waitTime is the longest that a Wait is held: the period of the heartbeat.
	waitTime = 30 * time.Second
	// lostAfter is how long a host may be silent: three missed periods.
	lostAfter = 3 * waitTime

	maxChunkAnswer = 4 << 20 // bytes
	maxText        = 1024    // bytes of a text of a report
	maxUnits       = 32
	maxUnit        = 256 // bytes
)

// Largest messages, in bytes.
const (
	maxSmall  = 64 << 10
	maxBatch  = 1<<20 + 64<<10
	maxAttest = 16<<20 + 1<<10
)

type hostKey struct{}

// identity is who calls: a host, and the key of its certificate.
type identity struct {
	h   *host
	key integrity.Digest
}

// Authenticate tells which host sends a request, by the client certificate that
// TLS has verified and nothing else. It fails closed: a certificate of nobody, of
// a host that was revoked or deleted, or one that was replaced is
// errs.Untrusted.
func (s *Service) Authenticate(r *http.Request) (*control.Actor, error) {
	id, err := s.identify(r)
	if err != nil {
		return nil, err
	}
	return id.actor(), nil
}

// Peer is a control.Peer: it lets hosts ask what people ask, as far as a role
// assignment for ringwall://hosts/ID permits, which none does by itself. It goes
// by the host's document as the transaction sees it; on the agents' own routes a
// change of that counts as soon as the feed brings it, at once where it was made
// and within half a second on other replicas.
func (s *Service) Peer(ctx context.Context, tx control.Tx, _ string, cert *x509.Certificate) (*control.Actor, error) {
	id, err := s.holder(ctx, cert)
	if err != nil {
		return nil, err
	}
	by := id.actor()
	where, err := resource.ParseID(by.Name)
	if err != nil {
		return nil, err
	}
	d, err := tx.Get(ctx, where)
	if err != nil {
		return nil, err
	}
	var p HostProperties
	if err := read(d, &p); err != nil || !p.Revoked.IsZero() || control.PeerID(control.PeerHost, p.ID) != by.ID {
		return nil, errors.Join(err, fmt.Errorf("client certificate: was revoked: %w", errs.Untrusted))
	}
	return by, nil
}

func (id *identity) actor() *control.Actor {
	id.h.mu.Lock()
	defer id.h.mu.Unlock()
	return &control.Actor{ID: control.PeerID(control.PeerHost, id.h.v.ID), Name: id.h.v.Resource.String()}
}

func (s *Service) identify(r *http.Request) (*identity, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		s.counters.unknown.Add(1)
		return nil, fmt.Errorf("client certificate: there is none: %w", errs.Untrusted)
	}
	return s.holder(r.Context(), r.TLS.VerifiedChains[0][0])
}

// holder is the host whose certificate that is, which TLS has verified.
func (s *Service) holder(ctx context.Context, cert *x509.Certificate) (*identity, error) {
	refuse := func(why string) (*identity, error) {
		s.counters.unknown.Add(1)
		return nil, fmt.Errorf("client certificate: %s: %w", why, errs.Untrusted)
	}
	now := s.Now()
	switch {
	case len(cert.URIs) != 1:
		return refuse("names nobody")
	case now.Before(cert.NotBefore) || !now.Before(cert.NotAfter): // a connection may outlive it
		return refuse("is over")
	}
	name, ok := strings.CutPrefix(cert.URIs[0].String(), control.PeerID(control.PeerHost, ""))
	if !ok {
		return refuse("is no host's")
	}
	h := s.host(name)
	if h == nil {
		h = s.lookUp(ctx, name)
	}
	if h == nil {
		return refuse("of a host that there is not")
	}
	key := spki(cert)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.v.Revoked:
		return refuse("was revoked")
	case key != h.key && (h.oldKey.IsZero() || key != h.oldKey):
		return refuse("was replaced")
	}
	return &identity{h: h, key: key}, nil
}

func spki(c *x509.Certificate) integrity.Digest { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// lookUp finds a host that joined by another replica a moment ago. Our own CA
// certified the name, so nobody can make us look for what there never was.
func (s *Service) lookUp(ctx context.Context, name string) *host {
	if !s.Shared {
		return nil
	}
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		grants, err := of[grantTx](tx)
		if err != nil {
			return err
		}
		g, err := grants.Grant(ctx, name)
		if err != nil {
			return err
		}
		d, err := tx.Get(ctx, g.Resource)
		if err != nil {
			return err
		}
		var p HostProperties
		if err := read(d, &p); err != nil || p.ID != name {
			return errors.Join(err, errs.NotFound)
		}
		if err := s.learn(d); err != nil {
			return err
		}
		h := s.host(name)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.given(g)
		return nil
	})
	if err != nil {
		if !errors.Is(err, errs.NotFound) {
			s.Log.WarnContext(ctx, "host_not_found", slog.String("host", name), slog.Any("error", err))
		}
		return nil
	}
	return s.host(name)
}

// AgentHandler is what enrolled hosts call, and its path. It authenticates by
// itself, before anything is read.
func (s *Service) AgentHandler() (path string, handler http.Handler) {
	options := append(s.options(), connect.WithConditionalHandlerOptions(func(spec connect.Spec) []connect.HandlerOption {
		most := maxSmall
		switch spec.Procedure {
		case agentpb.AgentIngestProcedure:
			most = maxBatch
		case agentpb.AgentAttestProcedure, agentpb.AgentAttestChallengeProcedure:
			most = maxAttest
		}
		return []connect.HandlerOption{connect.WithReadMaxBytes(most)}
	}))
	path, h := agentpb.NewAgentHandler(agentService{s}, options...)
	errors := connect.NewErrorWriter()
	return path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := s.identify(r)
		if err == nil {
			err = s.mayCall(id.h)
		}
		held := err == nil && plainWait(r)
		if held {
			err = s.serveWait(w, r, id)
		}
		if err != nil {
			_ = errors.Write(w, r, s.refusal(r.Context(), err)) // the client may be gone
		}
		if err != nil || held {
			return
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), hostKey{}, id)))
	})
}

// EnrolHandler is what a host that has no certificate calls, and its path.
func (s *Service) EnrolHandler() (path string, handler http.Handler) {
	return agentpb.NewEnrolmentHandler(enrolService{s}, append(s.options(), connect.WithReadMaxBytes(maxSmall))...)
}

func (s *Service) options() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithCompressMinBytes(1024)}
}

// errLimited is a call over a bound.
type errLimited struct{ wait time.Duration }

func (e errLimited) Error() string { return fmt.Sprintf("too much: again in %v", e.wait) }

func (s *Service) mayCall(h *host) error { return s.within(h, &h.use.calls, s.Limits.Calls, 1) }

// within takes n of a bound, or says errLimited and counts it.
func (s *Service) within(h *host, b *bucket, r Rate, n float64) error {
	if wait := b.take(r, n, s.Now()); wait > 0 {
		h.use.limited.Add(1)
		s.counters.limited.Add(1)
		return errLimited{wait}
	}
	return nil
}

// refusal maps a kind of error to Connect's code, once. What is no kind stays
// inside.
func (s *Service) refusal(ctx context.Context, err error) *connect.Error {
	if limited, ok := errors.AsType[errLimited](err); ok {
		return connect.NewError(connect.CodeResourceExhausted, limited)
	}
	if tooLarge, ok := errors.AsType[errTooLarge](err); ok {
		return connect.NewError(connect.CodeResourceExhausted, tooLarge)
	}
	for _, k := range []struct {
		kind error
		code connect.Code
	}{
		{errs.Untrusted, connect.CodeUnauthenticated},
		{errs.Denied, connect.CodePermissionDenied},
		{errs.Invalid, connect.CodeInvalidArgument},
		{errs.NotFound, connect.CodeNotFound},
		{errs.Conflict, connect.CodeAlreadyExists},
		{errs.Unsupported, connect.CodeUnimplemented},
	} {
		if errors.Is(err, k.kind) {
			return connect.NewError(k.code, err)
		}
	}
	if ctx.Err() == nil {
		s.Log.ErrorContext(ctx, "host_call_failed", slog.Any("error", err))
	}
	return connect.NewError(connect.CodeInternal, errors.New("something went wrong; the server's log has it"))
}

// reply is an answer or its refusal.
func reply[T any](ctx context.Context, s *Service, msg *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, s.refusal(ctx, err)
	}
	return connect.NewResponse(msg), nil
}

// enrolService implements agentpb.EnrolmentHandler.
type enrolService struct{ s *Service }

func (e enrolService) Enrol(ctx context.Context, r *connect.Request[agentpb.EnrolRequest]) (*connect.Response[agentpb.EnrolResponse], error) {
	if wait := e.s.enrols.take(e.s.Limits.Enrols, 1, e.s.Now()); wait > 0 {
		e.s.counters.limited.Add(1)
		return nil, e.s.refusal(ctx, errLimited{wait})
	}
	out, err := e.s.enrol(ctx, r.Msg)
	return reply(ctx, e.s, out, err)
}

// agentService implements agentpb.AgentHandler. Whoever calls it was
// authenticated by AgentHandler.
type agentService struct{ s *Service }

func caller(ctx context.Context) (*identity, error) {
	id, ok := ctx.Value(hostKey{}).(*identity)
	if !ok {
		return nil, fmt.Errorf("nobody was authenticated: %w", errs.Untrusted)
	}
	return id, nil
}

func (a agentService) Wait(ctx context.Context, r *connect.Request[agentpb.WaitRequest]) (*connect.Response[agentpb.WaitResponse], error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, a.s.refusal(ctx, err)
	}
	out, err := a.s.wait(ctx, id, r.Msg)
	return reply(ctx, a.s, out, err)
}

func (a agentService) Chunk(ctx context.Context, r *connect.Request[agentpb.ChunkRequest]) (*connect.Response[agentpb.ChunkResponse], error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, a.s.refusal(ctx, err)
	}
	out, err := a.s.chunk(ctx, id.h, r.Msg)
	return reply(ctx, a.s, out, err)
}

func (a agentService) Ingest(ctx context.Context, r *connect.Request[agentpb.IngestRequest]) (*connect.Response[agentpb.IngestResponse], error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, a.s.refusal(ctx, err)
	}
	out, err := a.s.take(ctx, id.h, r.Msg)
	return reply(ctx, a.s, out, err)
}

func (a agentService) Renew(ctx context.Context, r *connect.Request[agentpb.RenewRequest]) (*connect.Response[agentpb.RenewResponse], error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, a.s.refusal(ctx, err)
	}
	out, err := a.s.renew(ctx, id.h, id.key, r.Msg.GetCsr())
	return reply(ctx, a.s, out, err)
}

func (a agentService) AttestChallenge(ctx context.Context, r *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	return a.attest(ctx, r.Msg.GetBody(), Attester.Challenge)
}

func (a agentService) Attest(ctx context.Context, r *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	return a.attest(ctx, r.Msg.GetBody(), Attester.Attest)
}

func (a agentService) attest(ctx context.Context, body []byte, fn func(Attester, context.Context, string, []byte) ([]byte, error)) (*connect.Response[agentpb.AttestResponse], error) {
	id, err := caller(ctx)
	switch {
	case err != nil:
		return nil, a.s.refusal(ctx, err)
	case a.s.Attester == nil:
		return nil, a.s.refusal(ctx, fmt.Errorf("this server does not attest hosts: %w", errs.Unsupported))
	}
	id.h.mu.Lock()
	name := id.h.v.ID
	id.h.mu.Unlock()
	out, err := fn(a.s.Attester, ctx, name, body)
	return reply(ctx, a.s, &agentpb.AttestResponse{Body: out}, err)
}

func (s *Service) chunk(ctx context.Context, h *host, r *agentpb.ChunkRequest) (*agentpb.ChunkResponse, error) {
	if len(r.GetSha256()) != sha256.Size {
		return nil, fmt.Errorf("chunk: a digest of %d bytes: %w", len(r.GetSha256()), errs.Invalid)
	}
	if r.GetOffset() > 1<<40 {
		return nil, fmt.Errorf("chunk: offset %d: %w", r.GetOffset(), errs.Invalid)
	}
	if err := s.within(h, &h.use.chunks, s.Limits.Chunks, 1); err != nil {
		return nil, err
	}
	out, err := s.chunks.get(integrity.Digest(r.GetSha256()), r.GetOffset(), func() (*agentpb.ChunkResponse, error) {
		out := &agentpb.ChunkResponse{}
		err := s.Store.Read(ctx, func(tx control.Tx) error {
			chunks, err := of[chunkTx](tx)
			if err != nil {
				return err
			}
			data, size, err := chunks.Chunk(ctx, integrity.Digest(r.GetSha256()), int64(r.GetOffset()), maxChunkAnswer) //nolint:gosec // bounded above
			out.Data, out.Size = data, uint64(size)                                                                     //nolint:gosec // not negative
			return err
		})
		return out, err
	})
	if err == nil {
		h.use.chunks.take(s.Limits.Chunks, float64(len(out.GetData())), s.Now())
	}
	return out, err
}

// answers keeps small chunks that were read: when a manifest goes to thousands of
// hosts, all of them ask for the same few. Chunks never change.
type answers struct {
	mu   sync.Mutex
	m    map[integrity.Digest]*agentpb.ChunkResponse // whole chunks; answers are not changed
	size int
}

const (
	maxKept    = 256 << 10 // bytes of a chunk that is kept
	maxKeptAll = 32 << 20  // bytes of all
)

func (a *answers) get(d integrity.Digest, offset uint64, read func() (*agentpb.ChunkResponse, error)) (*agentpb.ChunkResponse, error) {
	a.mu.Lock()
	have := a.m[d]
	a.mu.Unlock()
	if have != nil {
		return &agentpb.ChunkResponse{Data: have.GetData()[min(offset, have.GetSize()):], Size: have.GetSize()}, nil
	}
	out, err := read()
	if err != nil || offset != 0 || out.GetSize() > maxKept || uint64(len(out.GetData())) != out.GetSize() {
		return out, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.m == nil || a.size > maxKeptAll {
		a.m, a.size = map[integrity.Digest]*agentpb.ChunkResponse{}, 0
	}
	if a.m[d] == nil {
		a.m[d] = out
		a.size += len(out.GetData())
	}
	return out, nil
}

// wait notes how the host stands, and holds the call until the server has
// something else for it than it has.
func (s *Service) wait(ctx context.Context, id *identity, r *agentpb.WaitRequest) (*agentpb.WaitResponse, error) {
	w, err := s.begin(ctx, id, r)
	if err != nil {
		return nil, err
	}
	return s.hold(ctx, id.h, w)
}

// waiting is what a call that is held must remember: as little as possible.
type waiting struct {
	session    uint64
	directives uint64
	have       integrity.Digest
}

// begin notes how the host stands.
func (s *Service) begin(ctx context.Context, id *identity, r *agentpb.WaitRequest) (w waiting, err error) {
	report, labels, err := readState(r.GetState())
	if err != nil {
		return w, err
	}
	if n := len(r.GetHaveManifest()); n != 0 && n != sha256.Size {
		return w, fmt.Errorf("have_manifest has %d bytes: %w", n, errs.Invalid)
	}
	copy(w.have[:], r.GetHaveManifest())
	if err := s.settle(ctx, id); err != nil {
		return w, err
	}
	w.directives, w.session = r.GetHaveDirectives(), s.heard(id.h, report, labels)
	return w, nil
}

func (s *Service) hold(ctx context.Context, h *host, w waiting) (*agentpb.WaitResponse, error) {
	s.counters.waits.Add(1)
	s.counters.waiting.Add(1)
	defer s.counters.waiting.Add(-1)
	// not all at once, should all have begun at once
	limit := time.NewTimer(waitTime - rand.N(waitTime/10)) //nolint:gosec // no secret
	defer limit.Stop()
	for {
		out, wake, done, err := s.news(ctx, h, w)
		if err != nil || done {
			return out, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-limit.C:
			h.mu.Lock()
			if h.wake == wake {
				h.wake = nil
			}
			h.mu.Unlock()
			return &agentpb.WaitResponse{NowUs: s.Now().UnixMicro()}, nil
		case <-wake:
		}
	}
}

// news is what the host does not have; done: there is some, or the host is to go.
// Else wake is closed when it is worth to look again. Of two Waits of one host
// the older ends: the host has forgotten it.
func (s *Service) news(ctx context.Context, h *host, w waiting) (out *agentpb.WaitResponse, wake chan struct{}, done bool, err error) {
	now := s.Now()
	h.mu.Lock()
	if h.v.Revoked {
		h.mu.Unlock()
		return nil, nil, false, fmt.Errorf("the host was revoked: %w", errs.Untrusted)
	}
	assigned := h.v.Assigned
	out = &agentpb.WaitResponse{NowUs: now.UnixMicro()}
	if w.session != h.session {
		h.mu.Unlock()
		return out, nil, true, nil
	}
	if h.revision != w.directives {
		d := &agentpb.Directives{Revision: h.revision, Isolated: h.props.Isolated, ResendInventory: now.Sub(h.props.Resend) < time.Hour}
		if !h.props.Attest.IsZero() {
			d.AttestUs = h.props.Attest.UnixMicro()
		}
		out.Directives, done = d, true
	}
	send := !assigned.IsZero() && assigned != w.have
	if !send && !done {
		wake = make(chan struct{})
		h.wake = wake
	}
	h.mu.Unlock()
	if send {
		m, err := s.manifest(ctx, assigned)
		if err != nil {
			return nil, nil, false, err
		}
		out.Manifest, done = m.bundle, true
	}
	return out, wake, done, nil
}

// settle notes that a host uses its newest certificate: the one before is worth
// nothing from now on.
func (s *Service) settle(ctx context.Context, id *identity) error {
	h := id.h
	h.mu.Lock()
	over := !h.oldKey.IsZero() && id.key == h.key
	name := h.v.ID
	h.mu.Unlock()
	if !over {
		return nil
	}
	err := s.Store.Write(ctx, func(tx control.Tx) error {
		grants, err := of[grantTx](tx)
		if err != nil {
			return err
		}
		g, err := grants.Grant(ctx, name)
		if err != nil || g.Key != id.key || g.OldKey.IsZero() {
			return err
		}
		g.OldKey = integrity.Digest{}
		return grants.PutGrant(ctx, g)
	})
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.key == id.key {
		h.oldKey = integrity.Digest{}
	}
	return nil
}

// heard takes a report and numbers the Wait that it came with. An older Wait ends.
func (s *Service) heard(h *host, r fleet.Report, labels map[string]string) (session uint64) {
	h.mu.Lock()
	h.session++
	session = h.session
	h.rouse()
	old := h.v
	now := s.Now().UTC()
	h.v.Seen, h.v.Online, h.dirty = now, true, true
	changed := !sameReport(&old.Report, &r)
	if changed {
		r.At = now
		h.v.Report = r
		h.urgent = true
	}
	if !maps.Equal(h.own, labels) {
		h.own, h.urgent = labels, true
		h.relabel()
	}
	v := h.v
	h.mu.Unlock()
	if changed || !old.Online {
		s.reported(&old, &v)
	}
	return session
}

// readState reads a report within bounds. What is too long is refused; an agent
// of ours never sends it.
func readState(s *agentpb.State) (fleet.Report, map[string]string, error) {
	var r fleet.Report
	bad := func(what string) (fleet.Report, map[string]string, error) {
		return fleet.Report{}, nil, fmt.Errorf("state: %s is too long or malformed: %w", what, errs.Invalid)
	}
	for _, d := range []struct {
		name string
		in   []byte
		out  *integrity.Digest
	}{
		{"manifest", s.GetManifest(), &r.Manifest},
		{"failed", s.GetFailed(), &r.Failed},
		{"kernel_table", s.GetKernelTable(), &r.KernelTable},
	} {
		if len(d.in) != 0 && len(d.in) != sha256.Size {
			return bad(d.name)
		}
		copy(d.out[:], d.in)
	}
	for _, t := range []struct{ name, text string }{
		{"reason", s.GetReason()},
		{"mode", s.GetMode()},
		{"agent_version", s.GetAgentVersion()},
		{"problem", s.GetProblem()},
	} {
		if len(t.text) > maxText {
			return bad(t.name)
		}
	}
	if len(s.GetBootId()) > 64 {
		return bad("boot_id")
	}
	if len(s.GetFailedUnits()) > maxUnits {
		return bad("failed_units")
	}
	for _, u := range s.GetFailedUnits() {
		if len(u) > maxUnit {
			return bad("failed_units")
		}
	}
	if err := checkLabels(s.GetLabels()); err != nil {
		return fleet.Report{}, nil, err
	}
	phase, ok := map[agentpb.State_Phase]fleet.Phase{
		agentpb.State_PHASE_UNSPECIFIED: fleet.None, agentpb.State_PHASE_NONE: fleet.None,
		agentpb.State_PHASE_CONFIRMED: fleet.Confirmed, agentpb.State_PHASE_PROVISIONAL: fleet.Provisional,
		agentpb.State_PHASE_REVERTED: fleet.Reverted, agentpb.State_PHASE_REFUSED: fleet.Refused,
	}[s.GetPhase()]
	if !ok {
		return bad("phase")
	}
	r.Boot, r.Phase, r.Epoch, r.Reason, r.Mode = fmt.Sprintf("%x", s.GetBootId()), phase, s.GetEpoch(), s.GetReason(), s.GetMode()
	r.Applied, r.AgentStart = stamp(s.GetAppliedUs()), stamp(s.GetStartedUs())
	r.AgentStarts, r.Agent, r.FailedUnits = s.GetAgentStarts(), s.GetAgentVersion(), s.GetFailedUnits()
	r.Flips, r.Spooled, r.Dropped = s.GetFlips(), s.GetSpooledBytes(), s.GetDropped()
	r.Proven, r.Problem, r.Isolated = s.GetEnforcementProven(), s.GetProblem(), s.GetIsolated()
	return r, s.GetLabels(), nil
}

// stamp is a host's time; what no clock shows is none.
func stamp(us int64) time.Time {
	const year2200 = 7258118400_000_000
	if us <= 0 || us > year2200 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// sameReport compares all but when it came.
func sameReport(a, b *fleet.Report) bool {
	x, y := *a, *b
	x.At, y.At = time.Time{}, time.Time{}
	return reflect.DeepEqual(x, y)
}
