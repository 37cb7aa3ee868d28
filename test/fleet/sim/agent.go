package sim

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
)

// World is what simulated hosts have in common.
type World struct {
	url   string
	roots *x509.CertPool

	mu      sync.Mutex
	arrived map[[32]byte][]time.Time // when hosts reported a manifest in force

	// Waits are calls to wait, Failed those that had to be made again, Bytes what
	// was fetched.
	Waits, Failed, Bytes atomic.Int64

	errors map[string]int // calls that failed, by what the server said
}

// NewWorld is where hosts of a server live.
func NewWorld(s *Server) *World {
	w := &World{url: s.URL, roots: x509.NewCertPool(), arrived: map[[32]byte][]time.Time{}, errors: map[string]int{}}
	w.roots.AppendCertsFromPEM(s.CA)
	return w
}

// fail counts a call that must be made again.
func (w *World) fail(what string, err error) {
	w.Failed.Add(1)
	w.mu.Lock()
	defer w.mu.Unlock()
	text := what + ": " + err.Error()
	if len(w.errors) < 20 || w.errors[text] > 0 {
		w.errors[text]++
	}
}

// Errors are what calls failed with, and how often.
func (w *World) Errors() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.errors)
}

func (w *World) arrive(m [32]byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.arrived[m] = append(w.arrived[m], time.Now())
}

// Times are when hosts had a manifest in force.
func (w *World) Times(m [32]byte) []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]time.Time(nil), w.arrived[m]...)
}

// Agent is a simulated host.
type Agent struct {
	w      *World
	n      int
	Name   string
	ID     string
	key    *ecdsa.PrivateKey
	client agentpb.AgentClient

	boot     [16]byte
	stream   [16]byte
	numbers  [3]uint64 // next record of each lane
	manifest []byte    // signed, in force
	digest   [32]byte
	epoch    uint64
	revision uint64
	sending  sync.Mutex
}

func (w *World) transport(cert *tls.Certificate) *http.Client {
	conf := &tls.Config{RootCAs: w.roots, MinVersion: tls.VersionTLS13}
	if cert != nil {
		conf.Certificates = []tls.Certificate{*cert}
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: conf, ForceAttemptHTTP2: true, WriteBufferSize: 1 << 10, ReadBufferSize: 1 << 10, IdleConnTimeout: time.Hour,
	}}
}

// Enrolment is what hosts without a certificate talk to.
func (w *World) Enrolment() agentpb.EnrolmentClient {
	return agentpb.NewEnrolmentClient(w.transport(nil), w.url)
}

// Join enrols the host of a number by a token.
func (w *World) Join(ctx context.Context, enrol agentpb.EnrolmentClient, n int, token string) (*Agent, error) {
	a := &Agent{w: w, n: n, Name: fmt.Sprintf("sim-%05d", n)}
	_, _ = rand.Read(a.boot[:]) // never fails, see crypto/rand
	_, _ = rand.Read(a.stream[:])
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, a.key)
	if err != nil {
		return nil, err
	}
	r, err := enrol.Enrol(ctx, connect.NewRequest(&agentpb.EnrolRequest{
		JoinToken: token, Name: a.Name, Csr: csr, AgentVersion: "simulated",
		Labels: map[string]string{"role": [...]string{"web", "db", "cache"}[n%3], "image": "debian-12", "kernel": "6.1", "arch": "amd64"},
	}))
	if err != nil {
		return nil, fmt.Errorf("enrol %s: %w", a.Name, err)
	}
	a.ID = r.Msg.GetHostId()
	a.client = agentpb.NewAgentClient(w.transport(&tls.Certificate{Certificate: r.Msg.GetCertificates(), PrivateKey: a.key}), w.url, connect.WithCompressMinBytes(1024))
	return a, nil
}

// Run waits and applies until ctx ends.
func (a *Agent) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.once(ctx); err != nil && ctx.Err() == nil {
			a.w.fail("wait", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
}

func (a *Agent) state() *agentpb.State {
	s := &agentpb.State{
		BootId: a.boot[:], Phase: agentpb.State_PHASE_NONE, Mode: "enforce", AgentVersion: "simulated", AgentStarts: 1, EnforcementProven: true,
	}
	if a.manifest != nil {
		s.Phase, s.Manifest, s.Epoch, s.KernelTable = agentpb.State_PHASE_CONFIRMED, a.digest[:], a.epoch, a.digest[:]
	}
	return s
}

// once waits for one answer and applies what it says.
func (a *Agent) once(ctx context.Context) error {
	a.w.Waits.Add(1)
	q := &agentpb.WaitRequest{State: a.state(), HaveDirectives: a.revision}
	if a.manifest != nil {
		q.HaveManifest = a.digest[:]
	}
	r, err := a.client.Wait(ctx, connect.NewRequest(q))
	if err != nil {
		return err
	}
	if d := r.Msg.GetDirectives(); d != nil {
		a.revision = d.GetRevision()
	}
	if m := r.Msg.GetManifest(); len(m) > 0 {
		return a.apply(ctx, m)
	}
	return nil
}

// apply fetches what a manifest names and is not here yet, and puts it in force.
func (a *Agent) apply(ctx context.Context, signed []byte) error {
	m, err := readManifest(signed)
	if err != nil {
		return err
	}
	for _, d := range m.content() {
		if err := a.fetch(ctx, d); err != nil {
			return err
		}
	}
	digest := sha256.Sum256(signed)
	a.manifest, a.digest, a.epoch = signed, digest, m.Epoch
	a.w.arrive(digest)
	return nil
}

// fetch gets content as the agent does, and keeps the first copy for all: one
// process has no use for ten thousand.
func (a *Agent) fetch(ctx context.Context, d [32]byte) error {
	r, err := a.client.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{Sha256: d[:]}))
	if err != nil {
		return err
	}
	data := r.Msg.GetData()
	if uint64(len(data)) == r.Msg.GetSize() && sha256.Sum256(data) != d {
		return fmt.Errorf("chunk %x: other content", d)
	}
	a.w.Bytes.Add(int64(len(data)))
	return nil
}

// Block reports a refusal.
func (a *Agent) Block(ctx context.Context, epoch uint64, flip bool, path, content string) error {
	sum := sha256.Sum256([]byte(content))
	return a.Ingest(ctx, agentpb.Lane_LANE_BLOCKS, &agentpb.Record{AtUs: time.Now().UnixMicro(), What: &agentpb.Record_Block{Block: &agentpb.Block{
		Kind: "exec", Path: path, Sha256: sum[:], Rule: "default", Reason: "not-listed", Mode: "enforce", Epoch: epoch, Flip: flip, Count: 1,
		Ancestry: []*agentpb.Process{{Path: path, Pid: 4711}, {Path: "/usr/sbin/cron", Pid: 1}},
	}}})
}

var errBusy = errors.New("not all of it was stored")

// Ingest sends records of a lane and keeps at it until they are durable.
func (a *Agent) Ingest(ctx context.Context, lane agentpb.Lane, records ...*agentpb.Record) error {
	a.sending.Lock()
	defer a.sending.Unlock()
	first := a.numbers[lane] + 1
	for {
		r, err := a.client.Ingest(ctx, connect.NewRequest(&agentpb.IngestRequest{Stream: a.stream[:], Lane: lane, First: first, Records: records}))
		if err == nil && r.Msg.GetDurable() >= first+uint64(len(records))-1 {
			a.numbers[lane] += uint64(len(records))
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			err = errBusy
		}
		a.w.fail("ingest", err)
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// Executions are records of programs that ran: some that all hosts have, some of
// this host alone.
func (a *Agent) Executions(n, round int) []*agentpb.Record {
	out := make([]*agentpb.Record, n)
	for i := range out {
		what := fmt.Sprintf("common-%d", (i*7+round)%2000)
		if i == 0 {
			what = fmt.Sprintf("%s-%d", a.Name, round)
		}
		sum := sha256.Sum256([]byte(what))
		out[i] = &agentpb.Record{AtUs: time.Now().UnixMicro(), What: &agentpb.Record_Execution{Execution: &agentpb.Execution{
			Kind: "exec", Path: "/usr/bin/" + what, Sha256: bytes.Clone(sum[:]), Signer: "debian", Count: 1,
		}}}
	}
	return out
}
