package agent

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/enforce"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const (
	hostPlace = "/subscriptions/s/resourceGroups/edge/providers/Ringwall.Fleet/hosts/h1"
	joinWord  = "join-secret-1"
)

// fleetServer is a server with one host, without any of the real one's code: what
// it does wrong is up to the test.
type fleetServer struct {
	t   *testing.T
	ca  *pki.TLSAuthority
	srv *httptest.Server

	mu         sync.Mutex
	changed    chan struct{}
	down       bool // answers nothing
	mute       bool // holds Wait without an answer, and takes no records
	muteTrial  bool // as mute, to a host in a trial
	busy       time.Duration
	life       time.Duration // of certificates
	assigned   []byte
	directives *agentpb.Directives
	chunks     map[integrity.Digest][]byte
	piece      int // bytes of a chunk in one answer
	spoil      func(d integrity.Digest, offset uint64, data []byte) ([]byte, error)
	states     []*agentpb.State
	enrols     int
	renewals   int
	usedBy     string
	streams    map[string]uint64 // durable
	records    []*agentpb.Record // in the order of their numbers
	batches    int
}

func newFleetServer(t *testing.T) *fleetServer {
	t.Helper()
	ca, err := pki.NewTLSAuthority("Fleet server CA", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &fleetServer{t: t, ca: ca, changed: make(chan struct{}), chunks: map[integrity.Digest][]byte{}, streams: map[string]uint64{}, piece: 4 << 20, life: time.Hour}
	cert, key, err := ca.Server([]string{"127.0.0.1"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.Certificate())
	mux := http.NewServeMux()
	mux.Handle(agentpb.NewEnrolmentHandler(f))
	path, h := agentpb.NewAgentHandler(f)
	mux.Handle(path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || r.ProtoMajor != 2 {
			t.Errorf("%s without a certificate, or not by HTTP/2", r.URL.Path)
		}
		h.ServeHTTP(w, r)
	}))
	f.srv = httptest.NewUnstartedServer(mux)
	f.srv.EnableHTTP2 = true
	f.srv.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
	f.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	f.srv.StartTLS()
	t.Cleanup(func() {
		f.set(func() { f.down = true })
		f.srv.CloseClientConnections()
		f.srv.Close()
	})
	return f
}

func (f *fleetServer) set(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fleetServer) request() JoinRequest {
	return JoinRequest{Server: f.srv.URL, CA: string(pki.EncodeCertificate(f.ca.Certificate())), Token: joinWord, Name: "h1", Labels: map[string]string{"role": "edge"}}
}

var errDown = connect.NewError(connect.CodeUnavailable, errors.New("down"))

func (f *fleetServer) certify(csr []byte) ([][]byte, int64, error) {
	c, err := f.ca.CertifyClient(csr, "ringwall://host/h1", f.life, time.Now())
	if err != nil {
		return nil, 0, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return [][]byte{c.Raw}, time.Now().Add(f.life).UnixMicro(), nil
}

func (f *fleetServer) Enrol(_ context.Context, r *connect.Request[agentpb.EnrolRequest]) (*connect.Response[agentpb.EnrolResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enrols++
	q := r.Msg
	csr, err := x509.ParseCertificateRequest(q.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	key := fmt.Sprint(csr.PublicKey)
	if q.GetJoinToken() != joinWord || f.usedBy != "" && f.usedBy != key {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("the join token is unknown, over or used"))
	}
	f.usedBy = key
	if f.down {
		return nil, errDown // the answer is lost
	}
	certs, renew, err := f.certify(q.GetCsr())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentpb.EnrolResponse{HostId: "host-id-1", ResourceId: hostPlace, Certificates: certs, RenewUs: renew, NowUs: time.Now().UnixMicro()}), nil
}

func (f *fleetServer) Wait(ctx context.Context, r *connect.Request[agentpb.WaitRequest]) (*connect.Response[agentpb.WaitResponse], error) {
	f.mu.Lock()
	f.states = append(f.states, r.Msg.GetState())
	f.mu.Unlock()
	held := time.After(500 * time.Millisecond)
	for {
		f.mu.Lock()
		out := &agentpb.WaitResponse{NowUs: time.Now().UnixMicro()}
		news, changed, down := false, f.changed, f.down
		mute := f.mute || f.muteTrial && r.Msg.GetState().GetPhase() == agentpb.State_PHASE_PROVISIONAL
		if sum := sha256.Sum256(f.assigned); len(f.assigned) > 0 && !slices.Equal(sum[:], r.Msg.GetHaveManifest()) {
			out.Manifest, news = f.assigned, true
		}
		if f.directives != nil && f.directives.GetRevision() != r.Msg.GetHaveDirectives() {
			out.Directives, news = f.directives, true
		}
		f.mu.Unlock()
		if down {
			return nil, errDown
		}
		if news && !mute {
			return connect.NewResponse(out), nil
		}
		select {
		case <-held:
			if !mute {
				return connect.NewResponse(out), nil
			}
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *fleetServer) Chunk(_ context.Context, r *connect.Request[agentpb.ChunkRequest]) (*connect.Response[agentpb.ChunkResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := integrity.Digest(r.Msg.GetSha256())
	b, ok := f.chunks[d]
	if f.down || f.mute {
		return nil, errDown
	}
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such chunk"))
	}
	from := int(min(r.Msg.GetOffset(), uint64(len(b))))
	data := b[from:min(from+f.piece, len(b))]
	if f.spoil != nil {
		var err error
		if data, err = f.spoil(d, r.Msg.GetOffset(), data); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&agentpb.ChunkResponse{Data: data, Size: uint64(len(b))}), nil
}

func (f *fleetServer) Ingest(_ context.Context, r *connect.Request[agentpb.IngestRequest]) (*connect.Response[agentpb.IngestResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down || f.mute || f.muteTrial {
		return nil, errDown
	}
	f.batches++
	q := r.Msg
	key := string(q.GetStream())
	have := f.streams[key]
	if q.GetFirst() > have+1 {
		f.t.Errorf("a gap: records from %d, %d are durable", q.GetFirst(), have)
	}
	for i, x := range q.GetRecords() {
		if n := q.GetFirst() + uint64(i); n > f.streams[key] {
			f.streams[key] = n
			f.records = append(f.records, x)
		}
	}
	if f.busy > 0 {
		return connect.NewResponse(&agentpb.IngestResponse{Durable: have, RetryUs: f.busy.Microseconds()}), nil
	}
	return connect.NewResponse(&agentpb.IngestResponse{Durable: f.streams[key]}), nil
}

func (f *fleetServer) Renew(_ context.Context, r *connect.Request[agentpb.RenewRequest]) (*connect.Response[agentpb.RenewResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renewals++
	certs, renew, err := f.certify(r.Msg.GetCsr())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentpb.RenewResponse{Certificates: certs, RenewUs: renew}), nil
}

func (f *fleetServer) AttestChallenge(context.Context, *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	return nil, errDown
}

func (f *fleetServer) Attest(_ context.Context, r *connect.Request[agentpb.AttestRequest]) (*connect.Response[agentpb.AttestResponse], error) {
	return connect.NewResponse(&agentpb.AttestResponse{Body: r.Msg.GetBody()}), nil
}

// last is the newest state that the host reported.
func (f *fleetServer) last() *agentpb.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.states) == 0 {
		return &agentpb.State{}
	}
	return f.states[len(f.states)-1]
}

// until waits for a state; what it is about stands in the failure.
func (f *fleetServer) until(what string, ok func(*agentpb.State) bool) *agentpb.State {
	f.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if s := f.last(); ok(s) {
			return s
		}
	}
	f.t.Fatalf("%s: the host reports %v", what, f.last())
	return nil
}

func (f *fleetServer) untilPhase(p agentpb.State_Phase, manifest []byte) *agentpb.State {
	f.t.Helper()
	sum := sha256.Sum256(manifest)
	return f.until(p.String(), func(s *agentpb.State) bool {
		is := s.GetManifest()
		if p == agentpb.State_PHASE_REVERTED || p == agentpb.State_PHASE_REFUSED {
			is = s.GetFailed()
		}
		return s.GetPhase() == p && slices.Equal(is, sum[:])
	})
}

// got waits for a record.
func (f *fleetServer) got(what string, ok func(*agentpb.Record) bool) *agentpb.Record {
	f.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		f.mu.Lock()
		i := slices.IndexFunc(f.records, ok)
		f.mu.Unlock()
		if i >= 0 {
			return f.records[i]
		}
	}
	f.t.Fatalf("no record of %s", what)
	return nil
}

func (f *fleetServer) assign(manifest []byte) { f.set(func() { f.assigned = manifest }) }

func (f *fleetServer) keep(b []byte) integrity.Digest {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := integrity.Digest(sha256.Sum256(b))
	f.chunks[d] = b
	return d
}

// manifest signs a manifest for the lab's fleet and uploads what it names.
func (l *lab) manifest(f *fleetServer, policy []byte, epoch uint64, releases []ReleaseRequest, change func(*codesign.Manifest)) []byte {
	l.t.Helper()
	var items []codesign.Item
	for _, r := range releases {
		names := f.keep(r.Names)
		items = append(items, codesign.Item{Release: &codesign.ReleaseItem{Record: f.keep(r.Record), Catalogue: f.keep(r.Catalogue), Names: &names}})
	}
	parts, err := codesign.WriteIndex(items)
	if err != nil {
		l.t.Fatal(err)
	}
	m := codesign.Manifest{Scope: "/subscriptions/s", Epoch: epoch, NotBefore: l.now().Add(-time.Hour), NotAfter: l.now().Add(24 * time.Hour), Policy: f.keep(policy)}
	for _, p := range parts {
		m.Index = append(m.Index, f.keep(p))
	}
	keys := l.keys
	if change != nil {
		change(&m)
	}
	b, err := codesign.SignManifest(l.signer(keys, pki.PurposePolicy), m)
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// testPace is quick; a trial that goes well has time on a busy machine too.
func testPace() pace {
	return pace{
		trialMin: 20 * time.Millisecond, trialMax: time.Minute, trialTick: 5 * time.Millisecond, unitsEvery: 10 * time.Millisecond, bake: time.Hour,
		waitFor: 2 * time.Second, backoff: 5 * time.Millisecond, backoffMax: 30 * time.Millisecond, sampleTick: time.Hour, reportTick: time.Hour, idle: 10 * time.Millisecond,
	}
}

// inFleet is a host with the policy of epoch 5 that has joined a server.
func inFleet(t *testing.T) (*lab, *fleetServer) {
	t.Helper()
	return inFleetFor(t, testPace().trialMax)
}

// inFleetFor has trials end after a time.
func inFleetFor(t *testing.T, trialMax time.Duration) (*lab, *fleetServer) {
	t.Helper()
	l, f := newLab(t), newFleetServer(t)
	l.options = func(o *Options) { o.pace, o.Version = testPace(), "test"; o.pace.trialMax = trialMax }
	l.prepare(l.policy(5, "enforce", allowTool))
	l.startInit()
	l.join(f)
	return l, f
}

// startInit starts an agent on a kernel whose init no policy would refuse: the
// lab's host governs a cgroup, as hosts of a trial do.
func (l *lab) startInit() {
	l.t.Helper()
	s, err := OpenState(l.state())
	if err != nil {
		l.t.Fatal(err)
	}
	s.anchor.Settings.Scope = "/sys/fs/cgroup/lab"
	if err := s.saveAnchor(); err != nil {
		l.t.Fatal(err)
	}
	l.start()
}

func (l *lab) join(f *fleetServer) {
	l.t.Helper()
	var s LinkStatus
	if err := l.client().Call(l.t.Context(), "join", f.request(), &s); err != nil {
		l.t.Fatal(err)
	}
}

// use raises an event for content that the kernel refused.
func (l *lab) use(seq uint64, content string, epoch uint64) {
	l.kernel.mu.Lock()
	l.kernel.counters.Raised = seq
	l.kernel.mu.Unlock()
	l.kernel.events <- enforce.Event{
		Seq: seq, Epoch: epoch, Kind: integrity.KindScript, Reason: enforce.Unlisted, Refused: true, Digest: sha256.Sum256([]byte(content)),
		Path: "/opt/" + strings.TrimSpace(strings.ReplaceAll(content, "/", "_")), PID: 1, TGID: 1, Comm: "test",
	}
}

func (l *lab) allows(content string) bool {
	return l.kernel.live().Allows(integrity.Key{Digest: sha256.Sum256([]byte(content))}, integrity.KindScript)
}

func jsonOf(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}
