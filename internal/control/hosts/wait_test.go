package hosts_test

import (
	"context"
	"crypto"
	"crypto/tls"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// settled is a request of a host that has heard everything.
func settled(t *testing.T, a *agent) *agentpb.WaitRequest {
	t.Helper()
	first, err := a.wait(t.Context(), &agentpb.WaitRequest{State: &agentpb.State{AgentVersion: "1"}})
	if err != nil {
		t.Fatal(err)
	}
	return &agentpb.WaitRequest{State: &agentpb.State{AgentVersion: "1"}, HaveDirectives: first.GetDirectives().GetRevision()}
}

type answered struct {
	r   *agentpb.WaitResponse
	err error
	at  time.Time
}

// hold begins a Wait.
func hold(ctx context.Context, a *agent, r *agentpb.WaitRequest) <-chan answered {
	out := make(chan answered, 1)
	go func() {
		got, err := a.wait(ctx, r)
		out <- answered{got, err, time.Now()}
	}()
	return out
}

func held(t *testing.T, l *lab, n int64) {
	t.Helper()
	eventually(t, "the call is held", func() bool { return l.svc.Counters().Waiting == n })
}

func soon(t *testing.T, c <-chan answered) answered {
	t.Helper()
	select {
	case a := <-c:
		return a
	case <-time.After(10 * time.Second):
		t.Fatal("no answer")
	}
	return answered{}
}

func testWait(t *testing.T, url string) {
	t.Helper()
	l := newLab(t, url, newCA(t))
	ctx := t.Context()
	a := l.join("web-1")
	m := l.manifest(7, group)
	other := l.manifest(8, sub+"/resourceGroups/db")

	// What is not for the host, or not there, is not assigned.
	if err := l.svc.Assign(ctx, []fleet.Assignment{{Host: a.id, Manifest: other}}); !errors.Is(err, errs.Denied) {
		t.Errorf("another scope's manifest: %v", err)
	}
	if err := l.svc.Assign(ctx, []fleet.Assignment{{Host: a.id, Manifest: integrity.Digest{1}}}); !errors.Is(err, errs.NotFound) {
		t.Errorf("no such manifest: %v", err)
	}

	r := settled(t, a)
	c := hold(ctx, a, r)
	held(t, l, 1)
	began := time.Now()
	if err := l.svc.Assign(ctx, []fleet.Assignment{{Host: a.id, Manifest: m}, {Host: "nobody", Manifest: m}}); err != nil {
		t.Fatal(err)
	}
	got := soon(t, c)
	if got.err != nil || len(got.r.GetManifest()) == 0 || got.at.Sub(began) > 3*time.Second {
		t.Fatalf("%v, %v after %v", got.r, got.err, got.at.Sub(began))
	}
	parsed, bundle, err := l.svc.Manifest(ctx, m)
	if err != nil || parsed.Epoch != 7 || string(bundle) != string(got.r.GetManifest()) {
		t.Errorf("%+v, %v", parsed, err)
	}
	for _, tc := range []struct {
		offset uint64
		want   string
	}{{3, "icy 7"}, {0, "policy 7"}, {3, "icy 7"}, {8, ""}, {9, ""}} { // from the database, then from memory
		chunk, err := a.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{Sha256: parsed.Policy[:], Offset: tc.offset}))
		if err != nil || string(chunk.Msg.GetData()) != tc.want || chunk.Msg.GetSize() != 8 {
			t.Errorf("%+v: %v, %v", tc, chunk, err)
		}
	}

	// Having it, the host waits; a directive wakes it.
	r.HaveManifest = m[:]
	c = hold(ctx, a, r)
	held(t, l, 1)
	all, err := l.svc.Hosts(ctx, id(group))
	if err != nil || len(all) != 1 || all[0].Assigned != m || all[0].AssignedAt.IsZero() {
		t.Fatalf("%+v, %v", all, err)
	}
	if _, err := l.door.Invoke(ctx, root(), all[0].Resource, "isolate", json.RawMessage("{}")); err != nil {
		t.Fatal(err)
	}
	if got := soon(t, c); got.err != nil || !got.r.GetDirectives().GetIsolated() || len(got.r.GetManifest()) != 0 {
		t.Errorf("%v, %v", got.r, got.err)
	} else {
		r.HaveDirectives = got.r.GetDirectives().GetRevision()
	}

	// A second Wait of a host ends the first, and only that.
	c = hold(ctx, a, r)
	held(t, l, 1)
	second := hold(ctx, a, r)
	if got := soon(t, c); got.err != nil || got.r.GetDirectives() != nil {
		t.Errorf("the older call: %v, %v", got.r, got.err)
	}
	held(t, l, 1)

	// Revoked, the held call ends, and no other begins.
	if _, err := l.door.Invoke(ctx, root(), all[0].Resource, "revoke", json.RawMessage("{}")); err != nil {
		t.Fatal(err)
	}
	if got := soon(t, second); connect.CodeOf(got.err) != connect.CodeUnauthenticated {
		t.Errorf("held while it was revoked: %v, %v", got.r, got.err)
	}
	if _, err := a.wait(ctx, r); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("a revoked host waits: %v", err)
	}
	if _, err := a.ingest(ctx, agentpb.Lane_LANE_BLOCKS, 1); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("a revoked host sends: %v", err)
	}
	if _, err := l.svc.Chunk(ctx, parsed.Policy, 3); !errors.Is(err, errs.Invalid) {
		t.Errorf("a chunk over the limit: %v", err)
	}
}

// The forms of a call that agents do not use are answered alike.
func TestWait_forms(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t))
	a := l.join("web-1")
	long := &agentpb.State{Problem: strings.Repeat("x", 2000)}
	longer := &agentpb.State{Problem: strings.Repeat("x", 70<<10)}
	for name, o := range map[string][]connect.ClientOption{
		"protobuf": nil, "gzip": {connect.WithSendGzip()}, "JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()},
	} {
		a.AgentClient = l.client(a.cert, o...)
		got, err := a.wait(t.Context(), &agentpb.WaitRequest{State: &agentpb.State{AgentVersion: name}})
		if err != nil || got.GetDirectives().GetRevision() == 0 || got.GetNowUs() == 0 {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if all, err := l.svc.Hosts(t.Context(), id("/")); err != nil || all[0].Report.Agent != name {
			t.Errorf("%s: %+v, %v", name, all, err)
		}
		if _, err := a.wait(t.Context(), &agentpb.WaitRequest{State: long}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: a long state: %v", name, err)
		}
		if _, err := a.wait(t.Context(), &agentpb.WaitRequest{State: longer}); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("%s: a message over its bound: %v", name, err)
		}
	}
}

func TestHost_document(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t))
	ctx := t.Context()
	a := l.join("web-1")
	at := id(group + "/providers/Ringwall.Fleet/hosts/web-1")
	d, err := l.door.Get(ctx, root(), at)
	if err != nil {
		t.Fatal(err)
	}
	var p hosts.HostProperties
	if err := json.Unmarshal(d.Properties, &p); err != nil || p.ID != a.id {
		t.Fatalf("%+v, %v", p, err)
	}
	put := func(where resource.ID, p hosts.HostProperties) error {
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.door.Put(ctx, root(), resource.Document{ID: where, Properties: b}, resource.When{}, false)
		return err
	}
	if err := put(id(group+"/providers/Ringwall.Fleet/hosts/web-2"), p); !errors.Is(err, errs.Denied) {
		t.Errorf("a host was written, not joined: %v", err)
	}
	for name, change := range map[string]func(*hosts.HostProperties){
		"id":       func(p *hosts.HostProperties) { p.ID = "other" },
		"isolated": func(p *hosts.HostProperties) { p.Isolated = true },
		"revoked":  func(p *hosts.HostProperties) { p.Revoked = time.Now() },
		"labels":   func(p *hosts.HostProperties) { p.Labels = map[string]string{"x": "a\nb"} },
	} {
		q := p
		change(&q)
		if err := put(at, q); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s was written: %v", name, err)
		}
	}
	p.Labels, p.Critical = map[string]string{"role": "db"}, true
	if err := put(at, p); err != nil {
		t.Fatal(err)
	}
	settled(t, a) // the host says role=web
	eventually(t, "what people say wins", func() bool {
		all, err := l.svc.Hosts(ctx, id("/"))
		return err == nil && len(all) == 1 && all[0].Critical && all[0].Labels["role"] == "db"
	})
	// Its document gone, the host is nobody, and its name is free for another.
	if err := l.door.Delete(ctx, root(), at, resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a deleted host is refused", func() bool {
		_, err := a.wait(ctx, &agentpb.WaitRequest{HaveDirectives: 1})
		return connect.CodeOf(err) == connect.CodeUnauthenticated
	})
	if b := l.join("web-1"); b.id == a.id {
		t.Error("an id was used again")
	}
}

func testRenew(t *testing.T, url string) {
	t.Helper()
	ca := newCA(t)
	l := newLab(t, url, ca)
	ctx := t.Context()
	a := l.join("web-1")
	renew := func(c agentpb.AgentClient, csr []byte) (*agentpb.RenewResponse, error) {
		out, err := c.Renew(ctx, connect.NewRequest(&agentpb.RenewRequest{Csr: csr}))
		if err != nil {
			return nil, err
		}
		return out.Msg, nil
	}
	if _, err := renew(a, csr(t, a.cert.PrivateKey.(crypto.Signer))); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("the same key: %v", err)
	}
	if _, err := renew(a, []byte("x")); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("no request: %v", err)
	}
	key := newKey(t)
	first, err := renew(a, csr(t, key))
	if err != nil {
		t.Fatal(err)
	}
	// The answer was lost: the old certificate is good still, and asks again.
	again, err := renew(a, csr(t, key))
	if err != nil || string(again.GetCertificates()[0]) != string(first.GetCertificates()[0]) {
		t.Errorf("%v", err)
	}
	b := l.client(tls.Certificate{Certificate: first.GetCertificates(), PrivateKey: key})
	if _, err := b.Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{State: &agentpb.State{}})); err != nil {
		t.Fatal(err)
	}
	// Once the new one was used the old one is worth nothing.
	if _, err := a.wait(ctx, &agentpb.WaitRequest{}); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("the old certificate: %v", err)
	}
	// So it is after the server has started again.
	l.stop()
	l = newLab(t, url, ca)
	b = l.client(tls.Certificate{Certificate: first.GetCertificates(), PrivateKey: key})
	if _, err := b.Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{State: &agentpb.State{}})); err != nil {
		t.Error(err)
	}
	if _, err := l.client(a.cert).Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{})); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("the old certificate after a restart: %v", err)
	}
	// A certificate that ends during a connection ends with it.
	l.clock.step(hosts.CertificateLife)
	if _, err := b.Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{})); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("a certificate that is over: %v", err)
	}
}

func TestLost(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t))
	a := l.join("web-1")
	settled(t, a)
	l.clock.step(89 * time.Second)
	time.Sleep(time.Second)
	if l.signalled(hosts.SignalLost) != 0 {
		t.Error("lost too early")
	}
	l.clock.step(10 * time.Second)
	eventually(t, "the host is lost", func() bool { return l.signalled(hosts.SignalLost) == 1 })
	all, err := l.svc.Hosts(t.Context(), id("/"))
	if err != nil || all[0].Online {
		t.Errorf("%+v, %v", all, err)
	}
	settled(t, a)
	if all, err := l.svc.Hosts(t.Context(), id("/")); err != nil || !all[0].Online {
		t.Errorf("%+v, %v", all, err)
	}
	if got, err := l.svc.Signals(t.Context(), time.Time{}.Add(1)); err != nil || len(got) != 1 || got[0].Host != a.id {
		t.Errorf("%+v, %v", got, err)
	}
}

// Two replicas on one database: what is done at one is so at the other within a
// second.
func testReplicas(t *testing.T, url string) {
	t.Helper()
	ca := newCA(t)
	shared := func(o *hosts.Options) { o.Shared = true }
	one, two := newLab(t, url, ca, shared), newLab(t, url, ca, shared)
	ctx := t.Context()
	a := one.join("web-1")
	// It goes on at the other replica at once.
	a.AgentClient = two.client(a.cert)
	r := settled(t, a)
	c := hold(ctx, a, r)
	held(t, two, 1)
	m := one.manifest(7, group)
	began := time.Now()
	if err := one.svc.AssignUnder(ctx, fence(t, one), []fleet.Assignment{{Host: a.id, Manifest: m}}); err != nil {
		t.Fatal(err)
	}
	if got := soon(t, c); got.err != nil || len(got.r.GetManifest()) == 0 || got.at.Sub(began) > 2*time.Second {
		t.Fatalf("%v, %v after %v", got.r, got.err, got.at.Sub(began))
	}
	r.State, r.HaveManifest = &agentpb.State{AgentVersion: "1", Phase: agentpb.State_PHASE_CONFIRMED, Manifest: m[:]}, m[:]
	c = hold(ctx, a, r)
	eventually(t, "the first replica knows the report", func() bool {
		all, err := one.svc.Hosts(ctx, id(group))
		return err == nil && len(all) == 1 && all[0].Online && all[0].Report.Phase == fleet.Confirmed && all[0].Report.Manifest == m
	})
	if _, err := one.door.Invoke(ctx, root(), id(group+"/providers/Ringwall.Fleet/hosts/web-1"), "revoke", json.RawMessage("{}")); err != nil {
		t.Fatal(err)
	}
	if got := soon(t, c); connect.CodeOf(got.err) != connect.CodeUnauthenticated {
		t.Errorf("revoked at the other replica: %v, %v", got.r, got.err)
	}
	// The holder of a lease that is over assigns nothing.
	old := fence(t, one)
	fence(t, two)
	if err := one.svc.AssignUnder(ctx, old, []fleet.Assignment{{Host: a.id}}); !errors.Is(err, errs.Conflict) {
		t.Errorf("a holding that is over: %v", err)
	}
}

func fence(t *testing.T, l *lab) control.Fence {
	t.Helper()
	n, err := l.store.AcquireLease(t.Context(), "rollouts", "one owner", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return control.Fence{Lease: "rollouts", Number: n}
}
