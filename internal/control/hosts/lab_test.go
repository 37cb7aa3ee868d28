package hosts_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/store"
	"ringwall/internal/testkit"
)

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
)

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

func root() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "admin"} }

// shelf is the real store, as the door wants it.
type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

// TestEngines runs on both what must be the same on both, and on PostgreSQL what
// takes two replicas.
func TestEngines(t *testing.T) {
	tests := map[string]func(t *testing.T, url string){
		"join": testJoin, "ingest": testIngest, "ingest, the sink fails": testIngestSinkFails, "wait": testWait, "renew": testRenew,
	}
	t.Run("sqlite", func(t *testing.T) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) { test(t, "sqlite:"+t.TempDir()) })
		}
	})
	t.Run("postgres", func(t *testing.T) {
		pg := testkit.StartPostgres(t)
		tests["replicas"] = testReplicas
		tests["the database is restarted"] = func(t *testing.T, url string) { testDatabaseRestarts(t, url, pg) }
		for name, test := range tests {
			t.Run(name, func(t *testing.T) { test(t, pg.Database()) })
		}
	})
}

// clock is a time that tests move.
type clock struct {
	mu   sync.Mutex
	more time.Duration
}

func (c *clock) now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return time.Now().Add(c.more) }

func (c *clock) step(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.more += d }

// lab is one replica of a server with everything that is real but the network
// between machines.
type lab struct {
	t      testing.TB
	door   *control.Door
	svc    *hosts.Service
	store  *store.Store
	events *store.Events
	clock  *clock
	ca     *pki.TLSAuthority // of clients
	server *httptest.Server
	stop   func()

	mu      sync.Mutex
	blocks  []incident.Event
	signals []fleet.Signal
}

func newCA(t testing.TB) *pki.TLSAuthority {
	t.Helper()
	ca, err := pki.NewTLSAuthority("clients", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func newLab(t testing.TB, url string, ca *pki.TLSAuthority, change ...func(*hosts.Options)) *lab {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	events, err := store.OpenEvents(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	door, err := control.New(shelf{s}, hosts.Kinds()...)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, door: door, store: s, events: events, ca: ca, clock: &clock{}}
	o := hosts.Options{
		Door: door, Store: shelf{s}, Events: events, Records: events, Clients: ca, Log: slog.New(slog.DiscardHandler), Now: l.clock.now,
		Blocks: func(_ context.Context, all []incident.Event) error {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.blocks = append(l.blocks, all...)
			return nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	for _, where := range []string{sub, group, sub + "/resourceGroups/db"} {
		_, err := door.Put(ctx, root(), resource.Document{ID: id(where), Properties: json.RawMessage(`{}`)}, resource.When{}, false)
		if err != nil {
			t.Fatal(err)
		}
	}
	if l.svc, err = hosts.New(ctx, o); err != nil {
		t.Fatal(err)
	}
	l.svc.OnSignal(func(sig fleet.Signal) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.signals = append(l.signals, sig)
	})
	done := make(chan struct{})
	go func() { defer close(done); _ = l.svc.Run(ctx) }()
	mux := http.NewServeMux()
	mux.Handle(l.svc.AgentHandler())
	mux.Handle(l.svc.EnrolHandler())
	for pattern, serve := range map[string]func(http.ResponseWriter, *http.Request, control.Actor) error{
		"PUT /chunks/{sha256}": l.svc.ServeChunk, "POST /chunks": l.svc.ServeMissing, "GET /hosts": l.svc.ServeHosts, "GET /events": l.svc.ServeEvents, "GET /inventory": l.svc.ServeInventory,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			by := root()
			if who := r.Header.Get("X-Who"); who != "" {
				by = control.Actor{ID: who, Name: who}
			}
			if err := serve(w, r, by); err != nil {
				http.Error(w, err.Error(), http.StatusTeapot)
			}
		})
	}
	l.server = httptest.NewUnstartedServer(mux)
	l.server.EnableHTTP2 = true
	pool := x509.NewCertPool()
	pool.AddCert(ca.Certificate())
	l.server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}
	l.server.Config.ErrorLog = slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn)
	l.server.StartTLS()
	l.stop = sync.OnceFunc(func() {
		cancel()
		l.server.CloseClientConnections()
		l.server.Close()
		<-done
		_ = events.Close()
		_ = s.Close()
	})
	t.Cleanup(l.stop)
	return l
}

func (l *lab) token(p hosts.TokenProperties) string {
	l.t.Helper()
	if p.Expires.IsZero() {
		p.Expires = time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	}
	token := hosts.NewJoinToken(id(group))
	at, err := hosts.JoinTokenID(token)
	if err != nil {
		l.t.Fatal(err)
	}
	body, err := json.Marshal(p)
	if err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.door.Put(l.t.Context(), root(), resource.Document{ID: at, Properties: body}, resource.When{Absent: true}, false); err != nil {
		l.t.Fatal(err)
	}
	return token
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csr(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	b, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// httpClient trusts the lab's server and has a client certificate, or none.
func (l *lab) httpClient(cert *tls.Certificate) *http.Client {
	conf := l.server.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	if cert != nil {
		conf.Certificates = []tls.Certificate{*cert}
	}
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	l.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (l *lab) enrol(r *agentpb.EnrolRequest) (*agentpb.EnrolResponse, error) {
	c := agentpb.NewEnrolmentClient(l.httpClient(nil), l.server.URL)
	out, err := c.Enrol(l.t.Context(), connect.NewRequest(r))
	if err != nil {
		return nil, err
	}
	return out.Msg, nil
}

// agent is a host as the server sees one.
type agent struct {
	agentpb.AgentClient
	id     string
	name   string
	cert   tls.Certificate
	stream []byte
}

func (l *lab) client(cert tls.Certificate, options ...connect.ClientOption) agentpb.AgentClient {
	return agentpb.NewAgentClient(l.httpClient(&cert), l.server.URL, options...)
}

// join makes a host.
func (l *lab) join(name string) *agent {
	l.t.Helper()
	key := newKey(l.t)
	out, err := l.enrol(&agentpb.EnrolRequest{JoinToken: l.token(hosts.TokenProperties{}), Name: name, Csr: csr(l.t, key), Labels: map[string]string{"role": "web"}})
	if err != nil {
		l.t.Fatal(err)
	}
	a := &agent{id: out.GetHostId(), name: name, cert: tls.Certificate{Certificate: out.GetCertificates(), PrivateKey: key}, stream: make([]byte, 16)}
	_, _ = rand.Read(a.stream)
	a.AgentClient = l.client(a.cert)
	return a
}

func (a *agent) wait(ctx context.Context, r *agentpb.WaitRequest) (*agentpb.WaitResponse, error) {
	out, err := a.Wait(ctx, connect.NewRequest(r))
	if err != nil {
		return nil, err
	}
	return out.Msg, nil
}

func (a *agent) ingest(ctx context.Context, lane agentpb.Lane, first uint64, records ...*agentpb.Record) (*agentpb.IngestResponse, error) {
	out, err := a.Ingest(ctx, connect.NewRequest(&agentpb.IngestRequest{Stream: a.stream, Lane: lane, First: first, Records: records}))
	if err != nil {
		return nil, err
	}
	return out.Msg, nil
}

// eventually waits for something that happens soon.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 10 seconds: %s", what)
}

// do calls what people call, as somebody; "" is the administrator.
func (l *lab) do(who, method, path string, body []byte) (int, string) {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), method, l.server.URL+path, bytes.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	req.Header.Set("X-Who", who)
	resp, err := l.httpClient(nil).Do(req)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (l *lab) push(data []byte) integrity.Digest {
	l.t.Helper()
	d := integrity.Digest(sha256.Sum256(data))
	if code, text := l.do("", http.MethodPut, "/chunks/"+d.String()+"?scope="+group, data); code != http.StatusNoContent {
		l.t.Fatalf("%d %s", code, text)
	}
	return d
}

// manifest makes one with all that belongs to it and returns its digest.
func (l *lab) manifest(epoch uint64, scope string) integrity.Digest {
	l.t.Helper()
	a, err := pki.CreateAuthority(l.t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: time.Now})
	if err != nil {
		l.t.Fatal(err)
	}
	signer, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: "spiffe://fleet.example/policy", Now: time.Now()})
	if err != nil {
		l.t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Second)
	b, err := codesign.SignManifest(signer, codesign.Manifest{
		Scope: scope, Epoch: epoch, NotBefore: now, NotAfter: now.Add(time.Hour), Policy: l.push([]byte(fmt.Sprintf("policy %d", epoch))),
	})
	if err != nil {
		l.t.Fatal(err)
	}
	m, err := codesign.UnverifiedManifest(b)
	if err != nil {
		l.t.Fatal(err)
	}
	at, err := hosts.ManifestID(m)
	if err != nil {
		l.t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{"bundle": b})
	if err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.door.Put(l.t.Context(), root(), resource.Document{ID: at, Properties: body}, resource.When{}, false); err != nil {
		l.t.Fatal(err)
	}
	return m.Digest
}

func (l *lab) seenBlocks() []incident.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]incident.Event{}, l.blocks...)
}

func (l *lab) signalled(name string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, s := range l.signals {
		if s.Name == name {
			n++
		}
	}
	return n
}
