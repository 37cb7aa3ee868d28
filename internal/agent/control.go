package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// SocketName is the control socket's name in the run directory.
const SocketName = "agent.sock"

// maxRequest bounds a request: a release with its catalogue, in base64.
const maxRequest = 512 << 20

// control answers the command line on a unix socket. Only root may connect, and
// even root can only hand in what a trusted authority signed: no request
// weakens a policy by itself.
type control struct {
	a  *Agent
	l  net.Listener
	mu *http.ServeMux
}

// Requests and answers. Bytes are base64, as encoding/json writes them.
type (
	// PolicyRequest hands in a signed policy and the releases that come with it.
	PolicyRequest struct {
		Policy   []byte           `json:"policy"`
		Releases []ReleaseRequest `json:"releases,omitempty"`
		// Force puts a policy in force that would refuse this host's own init.
		Force bool `json:"force,omitempty"`
	}
	// ReleaseRequest is one release record with its catalogue and names.
	ReleaseRequest struct {
		Record    []byte `json:"record"`
		Catalogue []byte `json:"catalogue"`
		Names     []byte `json:"names"`
	}
	// ReleaseAnswer says what was stored.
	ReleaseAnswer struct {
		Product string `json:"product"`
		Version string `json:"version"`
		Epoch   uint32 `json:"epoch"`
		Record  string `json:"record"`
	}
	// PackagesRequest names package files on this host.
	PackagesRequest struct {
		Files []string `json:"files"`
	}
	// SettleAnswer says how many packages were forgotten.
	SettleAnswer struct {
		Forgotten int `json:"forgotten"`
	}
	// MeasureAnswer says how many files the kernel knows now.
	MeasureAnswer struct {
		Needed   bool `json:"needed"` // false: this kernel measures by itself
		Measured int  `json:"measured"`
	}
	// DocumentRequest hands in a signed permit or supplemental policy.
	DocumentRequest struct {
		Document []byte `json:"document"`
	}
	// PermitAnswer says until when everything is let through.
	PermitAnswer struct {
		Until  time.Time `json:"until"`
		Reason string    `json:"reason"`
	}
	// ExplainRequest asks what the policy in force says of content.
	ExplainRequest struct {
		Kind   string `json:"kind"`
		Digest string `json:"digest"`
	}
	// ExplainAnswer is the evaluator's verdict.
	ExplainAnswer struct {
		Allow     bool     `json:"allow"`
		Mode      string   `json:"mode"`
		Rule      string   `json:"rule,omitempty"`
		Indicator string   `json:"indicator,omitempty"`
		Reason    string   `json:"reason"`
		Vouched   []string `json:"vouched_by,omitempty"`
	}
	failure struct {
		Error string `json:"error"`
		Kind  string `json:"kind"`
	}
)

func newControl(ctx context.Context, a *Agent) (*control, error) {
	path := filepath.Join(a.opts.RunDir, SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	c := &control{a: a, l: l, mu: http.NewServeMux()}
	c.routes()
	return c, nil
}

func (c *control) routes() {
	c.mu.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, c.a.Status(), nil) })
	handle(c, "POST /v1/policy", c.a.ApplyPolicy)
	handle(c, "POST /v1/release", c.a.AddRelease)
	handle(c, "POST /v1/supplement", c.a.AddSupplement)
	handle(c, "POST /v1/permit", c.a.UsePermit)
	handle(c, "POST /v1/permit/end", func(ctx context.Context, _ struct{}) (struct{}, error) { return struct{}{}, c.a.EndPermit(ctx) })
	handle(c, "POST /v1/packages", func(ctx context.Context, r PackagesRequest) ([]PackageResult, error) {
		return c.a.TrustPackages(ctx, r.Files)
	})
	handle(c, "POST /v1/packages/settle", func(ctx context.Context, _ struct{}) (SettleAnswer, error) {
		n, err := c.a.SettlePackages(ctx)
		return SettleAnswer{n}, err
	})
	handle(c, "POST /v1/measure", func(ctx context.Context, r PackagesRequest) (MeasureAnswer, error) { return c.a.Measure(ctx, r.Files) })
	handle(c, "POST /v1/canary", func(ctx context.Context, _ struct{}) (Canary, error) { return c.a.RunCanary(ctx) })
	handle(c, "POST /v1/explain", c.a.Explain)
	handle(c, "POST /v1/upgrade", c.a.Upgrade)
	handle(c, "POST /v1/join", c.a.Join)
	handle(c, "POST /v1/leave", func(ctx context.Context, _ struct{}) (struct{}, error) { return struct{}{}, c.a.Leave(ctx) })
	handle(c, "POST /v1/remove", func(ctx context.Context, _ struct{}) (struct{}, error) { return struct{}{}, c.a.Remove(ctx) })
}

func handle[Q, A any](c *control, route string, fn func(context.Context, Q) (A, error)) {
	c.mu.HandleFunc(route, func(w http.ResponseWriter, r *http.Request) {
		var q Q
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
		d.DisallowUnknownFields()
		if err := d.Decode(&q); err != nil {
			answer(w, nil, fmt.Errorf("request: %w: %w", err, errs.Invalid))
			return
		}
		v, err := fn(r.Context(), q)
		answer(w, v, err)
	})
}

func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		kind, status := kindOf(err)
		w.WriteHeader(status)
		v = failure{Error: err.Error(), Kind: kind}
	}
	_ = json.NewEncoder(w).Encode(v) // a client that is gone needs no answer
}

// kinds map an error's kind over the socket and back.
func kinds() []struct {
	err    error
	name   string
	status int
} {
	return []struct {
		err    error
		name   string
		status int
	}{
		{errs.Untrusted, "untrusted", http.StatusForbidden},
		{errs.Denied, "denied", http.StatusForbidden},
		{errs.Conflict, "conflict", http.StatusConflict},
		{errs.Unsupported, "unsupported", http.StatusNotImplemented},
		{errs.Invalid, "invalid", http.StatusBadRequest},
		{errs.NotFound, "not-found", http.StatusNotFound},
	}
}

func kindOf(err error) (name string, status int) {
	for _, k := range kinds() {
		if errors.Is(err, k.err) {
			return k.name, k.status
		}
	}
	return "", http.StatusInternalServerError
}

// serve answers until ctx ends.
func (c *control) serve(ctx context.Context) error {
	srv := &http.Server{
		Handler: c.mu, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	err := srv.Serve(rootOnly{c.l})
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("control socket: %w", err)
}

// rootOnly drops connections of anyone but root, should the socket's mode ever
// be wrong.
type rootOnly struct{ net.Listener }

func (l rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if u, ok := c.(*net.UnixConn); ok && peerUID(u) == 0 {
			return c, nil
		}
		_ = c.Close()
	}
}

// peerUID is the user id at the other end, -1 if unknown.
func peerUID(c *net.UnixConn) int {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1
	}
	uid := -1
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int(cred.Uid)
		}
	})
	if err != nil {
		return -1
	}
	return uid
}

// ApplyPolicy puts a signed policy in force: verified, not older than any
// before, compiled, proven by the canary, and then confirmed. Applying the
// policy in force again changes nothing.
func (a *Agent) ApplyPolicy(ctx context.Context, q PolicyRequest) (Status, error) {
	if err := a.applyPolicy(ctx, q); err != nil {
		return Status{}, fmt.Errorf("apply policy: %w", err)
	}
	return a.Status(), nil
}

func (a *Agent) applyPolicy(ctx context.Context, q PolicyRequest) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, _, err := a.state.believe(q.Policy)
	if err != nil {
		return err
	}
	for i, r := range q.Releases {
		if _, err := a.state.addRelease(r.Record, r.Catalogue, r.Names, p); err != nil {
			return fmt.Errorf("release %d: %w", i+1, err)
		}
	}
	if a.loaded != nil && bytes.Equal(a.loaded.bundle, q.Policy) {
		if len(q.Releases) > 0 {
			if err := a.recompile(ctx); err != nil {
				return err
			}
		}
		if a.unsettled && a.trial == nil {
			return a.settle(ctx, a.loaded)
		}
		return nil
	}
	least, err := a.floor.Get()
	if _, broken := a.floor.(brokenFloor); err != nil && !(broken && a.loaded != nil) {
		return fmt.Errorf("epoch floor: %w", err)
	}
	if a.loaded != nil {
		least = max(least, a.loaded.policy.Epoch)
	}
	if p.Epoch < least || p.Epoch == least && a.loaded != nil {
		return fmt.Errorf("it has epoch %d, this host has had %d: sign it with a higher epoch: %w", p.Epoch, least, errs.Conflict)
	}
	l, err := a.state.load(q.Policy, a.compileOptions(), a.modules())
	if err != nil {
		return err
	}
	if !q.Force {
		if err := a.lockout(l); err != nil {
			return err
		}
	}
	if err := a.enact(ctx, l); err != nil {
		return err
	}
	a.trial = nil // this policy comes after it, and is confirmed at once
	if err := a.renewFloor(); err != nil {
		return fmt.Errorf("make the epoch floor anew: %w", err)
	}
	defer a.link.changed(false)
	return a.settle(ctx, l)
}

// lockout refuses a policy under which this host could not even start its own
// init again: an operator's mistake, caught before it hurts.
func (a *Agent) lockout(l *loaded) error {
	if a.state.Settings().Scope != "" || l.policy.Modes[integrity.KindExec] != integrity.ModeEnforce {
		return nil
	}
	d, err := hashFile("/proc/1/exe")
	if errors.Is(err, os.ErrPermission) {
		d, err = hashFile("/sbin/init")
	}
	if err != nil {
		return fmt.Errorf("look at init: %w", err)
	}
	e := l.compiled.Table.Entries[integrity.Key{Space: integrity.SpaceSHA256, Digest: d}]
	if !e.Kinds.Has(integrity.KindExec) {
		return fmt.Errorf("it enforces and does not authorise this host's own init (sha256 %s): trust its packages first (`ringwall packages adopt`), or start in audit mode: %w", d, errs.Denied)
	}
	return nil
}

// AddRelease authorises a release that the policy in force trusts.
func (a *Agent) AddRelease(ctx context.Context, q ReleaseRequest) (ReleaseAnswer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return ReleaseAnswer{}, fmt.Errorf("add release: no policy is in force: %w", errs.Conflict)
	}
	r, err := a.state.addRelease(q.Record, q.Catalogue, q.Names, a.loaded.policy)
	if err != nil {
		return ReleaseAnswer{}, fmt.Errorf("add release: %w", err)
	}
	if err := a.recompile(ctx); err != nil {
		return ReleaseAnswer{}, fmt.Errorf("add release: %w", err)
	}
	if r.Breakglass != "" {
		a.pipe.notice(noticePermit, fmt.Sprintf("break-glass: release %s %s, signed past its gates by %s, may run until %s: %s",
			r.Product, r.Version, r.Identity, r.NotAfter.UTC().Format(time.RFC3339), r.Breakglass))
	}
	return ReleaseAnswer{r.Product, r.Version, r.Epoch, r.Record.String()}, nil
}

// AddSupplement adds a signed supplemental policy.
func (a *Agent) AddSupplement(ctx context.Context, q DocumentRequest) (Status, error) {
	a.mu.Lock()
	err := func() error {
		if a.loaded == nil {
			return fmt.Errorf("no policy is in force: %w", errs.Conflict)
		}
		if _, err := a.state.addSupplement(q.Document, a.loaded.policy); err != nil {
			return err
		}
		return a.recompile(ctx)
	}()
	a.mu.Unlock()
	if err != nil {
		return Status{}, fmt.Errorf("add supplement: %w", err)
	}
	return a.Status(), nil
}

// UsePermit lets everything pass, with events, until a signed break-glass
// permit for this host runs out. That is an alert, and the guards stay up.
func (a *Agent) UsePermit(_ context.Context, q DocumentRequest) (PermitAnswer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return PermitAnswer{}, fmt.Errorf("use permit: no policy is in force: %w", errs.Conflict)
	}
	now := a.clock.now()
	p, err := codesign.VerifyPermit(q.Document, codesign.Roots(a.loaded.policy, codesign.SignsPermit), a.state.Host(), now)
	if err != nil {
		return PermitAnswer{}, fmt.Errorf("use permit: %w", err)
	}
	a.regime++
	if err := a.enforcer.Relax(p.NotAfter.Sub(now)); err != nil {
		return PermitAnswer{}, fmt.Errorf("use permit: %w", err)
	}
	a.relaxed = relaxation{until: p.NotAfter, permit: p.Record.String(), reason: p.Reason}
	a.pipe.notice(noticePermit, fmt.Sprintf("break-glass: nothing is refused until %s, by a permit of %s: %s", p.NotAfter.UTC().Format(time.RFC3339), p.Identity, p.Reason))
	return PermitAnswer{Until: p.NotAfter, Reason: p.Reason}, nil
}

// EndPermit enforces again before a permit runs out.
func (a *Agent) EndPermit(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.enforcer.Relax(0); err != nil {
		return fmt.Errorf("end permit: %w", err)
	}
	a.relaxed = relaxation{}
	a.pipe.notice(noticePermit, "break-glass ended: the policy is enforced again")
	return nil
}

// Measure makes the kernel know files, or those below directories, before an
// interpreter reads them. Needed before Linux 6.9 only; it authorises nothing.
func (a *Agent) Measure(ctx context.Context, paths []string) (MeasureAnswer, error) {
	out := MeasureAnswer{Needed: a.measurer != nil}
	for _, p := range paths {
		n, err := a.measurer.tree(ctx, p)
		out.Measured += n
		if err != nil {
			return out, fmt.Errorf("measure: %w", err)
		}
	}
	return out, nil
}

// RunCanary proves enforcement now.
func (a *Agent) RunCanary(ctx context.Context) (Canary, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return Canary{}, fmt.Errorf("canary: no policy is in force: %w", errs.Conflict)
	}
	err := a.prove(ctx)
	return a.canary, err
}

// Explain says what the policy in force decides about content.
func (a *Agent) Explain(_ context.Context, q ExplainRequest) (ExplainAnswer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil {
		return ExplainAnswer{}, fmt.Errorf("explain: no policy is in force: %w", errs.Conflict)
	}
	kind, err := integrity.ParseKind(q.Kind)
	if err != nil {
		return ExplainAnswer{}, fmt.Errorf("explain: %w", err)
	}
	d, err := integrity.ParseDigest(q.Digest)
	if err != nil {
		return ExplainAnswer{}, fmt.Errorf("explain: %w", err)
	}
	o := a.loaded.compiled.Object(kind, integrity.Key{Space: integrity.SpaceSHA256, Digest: d})
	v := a.loaded.compiled.Evaluate(&o, a.clock.now())
	out := ExplainAnswer{Allow: v.Allow, Mode: v.Mode.String(), Rule: v.Rule, Reason: v.Reason}
	if v.Indicator.Type != "" {
		out.Indicator = v.Indicator.Type + " " + v.Indicator.Value
	}
	for _, m := range o.Memberships {
		out.Vouched = append(out.Vouched, signerText(m.Origin))
	}
	return out, nil
}

// Remove takes everything out of the kernel and ends the agent. A host that
// enforces for all of itself needs a signed policy in audit mode first: root
// alone cannot switch enforcement off.
func (a *Agent) Remove(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded != nil && a.state.Settings().Scope == "" && a.loaded.policy.Modes[integrity.KindExec] == integrity.ModeEnforce {
		return fmt.Errorf("remove: the policy in force enforces: apply a signed one with mode audit first: %w", errs.Denied)
	}
	a.pipe.notice(noticeStop, "Ringwall was taken out of the kernel: nothing is refused or reported from here on")
	if err := a.watcher.Remove(); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	a.stopSoon()
	return nil
}

// stopSoon ends Run after the answer.
func (a *Agent) stopSoon() { time.AfterFunc(200*time.Millisecond, a.stop) }
