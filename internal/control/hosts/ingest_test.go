package hosts_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"ringwall/internal/agentpb"
	"ringwall/internal/control"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/testkit"
)

const (
	laneBlocks    = agentpb.Lane_LANE_BLOCKS
	laneInventory = agentpb.Lane_LANE_INVENTORY
)

func block(path string) *agentpb.Record {
	return &agentpb.Record{AtUs: time.Now().UnixMicro(), What: &agentpb.Record_Block{Block: &agentpb.Block{
		Kind: "exec", Path: path, Sha256: bytes.Repeat([]byte{9}, 32), Reason: "not-listed", Mode: "enforce", Count: 1, Ancestry: []*agentpb.Process{{Path: "/bin/bash"}},
	}}}
}

func run(path string) *agentpb.Record {
	return &agentpb.Record{What: &agentpb.Record_Execution{Execution: &agentpb.Execution{Kind: "exec", Path: path, Sha256: bytes.Repeat([]byte{8}, 32), Count: 1}}}
}

func blocks(n int) (out []*agentpb.Record) {
	for i := range n {
		out = append(out, block(fmt.Sprintf("/tmp/%d", i)))
	}
	return out
}

// distinct counts events by their ids: they may come twice.
func distinct(all []incident.Event) map[string]incident.Event {
	out := map[string]incident.Event{}
	for _, e := range all {
		out[e.ID] = e
	}
	return out
}

func testIngest(t *testing.T, url string) {
	t.Helper()
	ca := newCA(t)
	l := newLab(t, url, ca)
	ctx := t.Context()
	a := l.join("web-1")
	send := func(lane agentpb.Lane, first uint64, want uint64, records ...*agentpb.Record) {
		t.Helper()
		got, err := a.ingest(ctx, lane, first, records...)
		if err != nil || got.GetDurable() != want {
			t.Errorf("from %d on: %v, %v; want %d", first, got, err, want)
		}
	}
	all := blocks(10)
	send(laneBlocks, 1, 3, all[:3]...)
	send(laneBlocks, 1, 3, all[:3]...) // again
	send(laneBlocks, 2, 5, all[1:5]...)
	send(laneBlocks, 1, 5)
	// A batch that overtook another is put off, and nothing is lost.
	if got, err := a.ingest(ctx, laneBlocks, 8, all[7:]...); err != nil || got.GetDurable() != 5 || got.GetRetryUs() == 0 {
		t.Errorf("too early: %v, %v", got, err)
	}
	send(laneBlocks, 6, 7, all[5:7]...)
	send(laneBlocks, 8, 10, all[7:]...)
	send(laneInventory, 1, 2, run("/bin/a"), run("/bin/b"))
	eventually(t, "every block is handed on", func() bool { return len(distinct(l.seenBlocks())) == 10 })
	for _, e := range distinct(l.seenBlocks()) {
		if e.Scope != group || e.Host != a.id || e.Parent != "/bin/bash" || e.Reason != "not-listed" || e.Count != 1 || e.At.IsZero() {
			t.Fatalf("%+v", e)
		}
	}
	events, err := l.events.QueryEvents(ctx, fleet.EventQuery{Host: a.id, Until: time.Now().Add(time.Hour), Limit: 100})
	if err != nil || len(events) != 10 {
		t.Errorf("%d events are stored, %v", len(events), err)
	}
	items, err := l.svc.Inventory(ctx, id(group), time.Time{}, 0)
	if err != nil || len(items) != 2 || items[0].Hosts != 1 {
		t.Errorf("%+v, %v", items, err)
	}

	// Another server process knows where it was.
	l.stop()
	l = newLab(t, url, ca)
	a.AgentClient = l.client(a.cert)
	send(laneBlocks, 9, 11, append(all[8:], block("/tmp/x"))...)
	if n := l.svc.Counters().Duplicates; n != 2 {
		t.Errorf("%d duplicates, want 2", n)
	}

	// Numbers that never come are a gap, which is said and not passed over.
	if got, err := a.ingest(ctx, laneBlocks, 21, block("/tmp/y")); err != nil || got.GetDurable() != 11 || got.GetRetryUs() == 0 {
		t.Errorf("too early: %v, %v", got, err)
	}
	l.clock.step(3 * time.Second)
	send(laneBlocks, 21, 21, block("/tmp/y"))
	eventually(t, "the gap is handed on", func() bool {
		for _, e := range l.seenBlocks() {
			if e.Kind == hosts.KindNotice && e.Reason == hosts.SignalGap && e.Count == 9 {
				return l.signalled(hosts.SignalGap) == 1
			}
		}
		return false
	})

	// So is a spool that was made anew.
	a.stream = bytes.Repeat([]byte{1}, 16)
	send(laneBlocks, 1, 1, block("/tmp/z"))
	if l.signalled(hosts.SignalSpool) != 1 {
		t.Error("a new spool is not signalled")
	}
	sig := &agentpb.Record{What: &agentpb.Record_Signal{Signal: &agentpb.Signal{Name: "unit-failed", Text: "ssh.service"}}}
	lost := &agentpb.Record{What: &agentpb.Record_Lost{Lost: &agentpb.Lost{Records: 7, Why: "disk full"}}}
	send(laneBlocks, 2, 3, sig, lost)
	if l.signalled("unit-failed") != 1 || l.signalled("lost") != 1 {
		t.Error("signals are not told")
	}
	kept, err := l.svc.Signals(ctx, time.Now().Add(-time.Hour))
	if err != nil || len(kept) != 4 {
		t.Errorf("%+v, %v", kept, err)
	}
}

// What was acknowledged is there after the database's crash, once, and handed on;
// what was not is refused and comes again.
func testDatabaseRestarts(t *testing.T, url string, pg *testkit.Postgres) {
	t.Helper()
	l := newLab(t, url, newCA(t))
	a := l.join("web-1")
	settled(t, a)
	const batches, size = 40, 25
	restarted := make(chan struct{})
	failed := 0
	next := uint64(1)
	for end := time.Now().Add(time.Minute); next <= batches*size && time.Now().Before(end); {
		if next == 10*size+1 && failed == 0 {
			pg.Stop()
			go func() { defer close(restarted); time.Sleep(300 * time.Millisecond); pg.Start() }()
		}
		got, err := a.ingest(t.Context(), laneBlocks, next, blocks(size)...)
		if err != nil {
			failed++
			if code := connect.CodeOf(err); code != connect.CodeInternal {
				t.Fatalf("while the database is away: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
			continue
		}
		next = got.GetDurable() + 1
	}
	<-restarted
	if next != batches*size+1 || failed == 0 {
		t.Fatalf("%d records are stored, %d calls failed", next-1, failed)
	}
	events, err := l.events.QueryEvents(t.Context(), fleet.EventQuery{Host: a.id, Until: time.Now().Add(time.Hour), Limit: 10_000})
	if err != nil || len(events) != batches*size {
		t.Errorf("%d events, want %d; %v", len(events), batches*size, err)
	}
	eventually(t, "every block is handed on", func() bool { return len(distinct(l.seenBlocks())) == batches*size })
	settled(t, a)
}

// Blocks are handed on although whoever takes them fails for a while, and
// although the server ends in between.
func testIngestSinkFails(t *testing.T, url string) {
	t.Helper()
	ca := newCA(t)
	var tries atomic.Int32
	l := newLab(t, url, ca, func(o *hosts.Options) {
		o.Blocks = func(context.Context, []incident.Event) error { tries.Add(1); return errors.New("not now") }
	})
	a := l.join("web-1")
	if got, err := a.ingest(t.Context(), laneBlocks, 1, blocks(2)...); err != nil || got.GetDurable() != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	eventually(t, "the sink was asked", func() bool { return tries.Load() > 0 })
	l.stop()
	l = newLab(t, url, ca)
	eventually(t, "the blocks are handed on after the start", func() bool { return len(distinct(l.seenBlocks())) == 2 })
}

// hostile checks that something is refused with a typed error, and that the
// server serves others as before.
func TestHostile(t *testing.T) {
	ca := newCA(t)
	l := newLab(t, "sqlite:"+t.TempDir(), ca)
	ctx := t.Context()
	good, a := l.join("good"), l.join("bad")
	long := strings.Repeat("x", 2<<20)
	ingest := func(r *agentpb.IngestRequest) error {
		_, err := a.Ingest(ctx, connect.NewRequest(r))
		return err
	}
	wait := func(s *agentpb.State) error { _, err := a.wait(ctx, &agentpb.WaitRequest{State: s}); return err }
	other := newCA(t)
	stranger := func(uri string, by interface {
		Client(name, identity string, now time.Time) (cert, key []byte, err error)
	},
	) error {
		cert, key, err := by.Client("x", uri, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.client(pair).Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{}))
		return err
	}
	many := make([]*agentpb.Record, 1001)
	for i := range many {
		many[i] = &agentpb.Record{}
	}
	labels := map[string]string{}
	for i := range 33 {
		labels[fmt.Sprint(i)] = "x"
	}
	stream := make([]byte, 16)
	for name, tc := range map[string]struct {
		err  error
		want connect.Code
	}{
		"no certificate": {func() error {
			_, err := agentpb.NewAgentClient(l.httpClient(nil), l.server.URL).Wait(ctx, connect.NewRequest(&agentpb.WaitRequest{}))
			return err
		}(), connect.CodeUnauthenticated},
		"a host that there is not":    {stranger(control.PeerID(control.PeerHost, "")+strings.Repeat("0", 32), ca), connect.CodeUnauthenticated},
		"another's id, another's key": {stranger(control.PeerID(control.PeerHost, "")+good.id, ca), connect.CodeUnauthenticated},
		"a service":                   {stranger("ringwall://service/"+good.id, ca), connect.CodeUnauthenticated},
		"somebody else's CA":          {stranger(control.PeerID(control.PeerHost, "")+good.id, other), connect.CodeUnavailable},
		"too large a batch":           {ingest(&agentpb.IngestRequest{Stream: stream, Lane: laneBlocks, First: 1, Records: []*agentpb.Record{block(long)}}), connect.CodeResourceExhausted},
		"too many records":            {ingest(&agentpb.IngestRequest{Stream: stream, Lane: laneBlocks, First: 1, Records: many}), connect.CodeInvalidArgument},
		"no lane":                     {ingest(&agentpb.IngestRequest{Stream: stream, First: 1}), connect.CodeInvalidArgument},
		"no such lane":                {ingest(&agentpb.IngestRequest{Stream: stream, Lane: 77, First: 1}), connect.CodeInvalidArgument},
		"number 0":                    {ingest(&agentpb.IngestRequest{Stream: stream, Lane: laneBlocks}), connect.CodeInvalidArgument},
		"a number that overflows":     {ingest(&agentpb.IngestRequest{Stream: stream, Lane: laneBlocks, First: 1<<64 - 1, Records: blocks(1)}), connect.CodeInvalidArgument},
		"a short stream":              {ingest(&agentpb.IngestRequest{Stream: []byte{1}, Lane: laneBlocks, First: 1}), connect.CodeInvalidArgument},
		"a long state":                {wait(&agentpb.State{Problem: long[:2000]}), connect.CodeInvalidArgument},
		"a state over all bounds":     {wait(&agentpb.State{Problem: long}), connect.CodeResourceExhausted},
		"half a digest":               {wait(&agentpb.State{Manifest: []byte{1}}), connect.CodeInvalidArgument},
		"a phase that there is not":   {wait(&agentpb.State{Phase: 99}), connect.CodeInvalidArgument},
		"too many labels":             {wait(&agentpb.State{Labels: labels}), connect.CodeInvalidArgument},
		"a label with a line end":     {wait(&agentpb.State{Labels: map[string]string{"role": "a\nb"}}), connect.CodeInvalidArgument},
		"a chunk without a digest":    {func() error { _, err := a.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{})); return err }(), connect.CodeInvalidArgument},
		"a chunk that there is not": {func() error {
			_, err := a.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{Sha256: make([]byte, 32)}))
			return err
		}(), connect.CodeNotFound},
		"an offset that overflows": {func() error {
			_, err := a.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{Sha256: make([]byte, 32), Offset: 1<<64 - 1}))
			return err
		}(), connect.CodeInvalidArgument},
		"attestation that nobody serves": {func() error { _, err := a.Attest(ctx, connect.NewRequest(&agentpb.AttestRequest{})); return err }(), connect.CodeUnimplemented},
	} {
		if tc.err == nil || connect.CodeOf(tc.err) != tc.want {
			t.Errorf("%s: %v, want %v", name, tc.err, tc.want)
		}
	}
	// What is no protobuf at all.
	resp, err := l.httpClient(&a.cert).Post(l.server.URL+agentpb.AgentWaitProcedure, "application/proto", bytes.NewReader([]byte{0xff, 0xff, 0xff}))
	if err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("rubbish: %v, %v", resp, err)
	}
	resp.Body.Close()
	if _, err := good.ingest(ctx, laneBlocks, 1, block("/tmp/good")); err != nil {
		t.Errorf("another host: %v", err)
	}
}

// Records that are not understood do not hold up those that follow, and are
// counted.
func TestIngest_malformed(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t))
	ctx := t.Context()
	a := l.join("web-1")
	short, wide := block("/tmp/a"), block(strings.Repeat("x", 5000))
	short.GetBlock().Sha256 = []byte{1}
	deep := block("/tmp/deep")
	for range 9 {
		deep.GetBlock().Ancestry = append(deep.GetBlock().Ancestry, &agentpb.Process{})
	}
	big := block("/tmp/big")
	big.GetBlock().Ancestry[0].Argv = []string{strings.Repeat("x", 17<<10)}
	records := []*agentpb.Record{{}, short, wide, deep, big, run("/in/the/wrong/lane"), {What: &agentpb.Record_Notice{Notice: &agentpb.Notice{}}}, block("/tmp/good")}
	got, err := a.ingest(ctx, laneBlocks, 1, records...)
	if err != nil || got.GetDurable() != uint64(len(records)) {
		t.Fatalf("%v, %v", got, err)
	}
	if c := l.svc.Counters(); c.Malformed != 7 || l.signalled(hosts.SignalMalformed) != 1 {
		t.Errorf("%+v", c)
	}
	eventually(t, "the sound one is handed on", func() bool {
		for _, e := range l.seenBlocks() {
			if e.Path == "/tmp/good" {
				return len(l.seenBlocks()) == 2
			}
		}
		return false
	})
}

func TestIngest_flood(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t), func(o *hosts.Options) {
		o.Limits = hosts.Limits{Blocks: hosts.Rate{PerSecond: 10, Burst: 100}, NewItems: hosts.Rate{PerSecond: 1, Burst: 10}, Calls: hosts.Rate{PerSecond: 1, Burst: 50}}
	})
	ctx := t.Context()
	a, b := l.join("flood"), l.join("good")
	sent, put := uint64(0), 0
	for range 20 {
		got, err := a.ingest(ctx, laneBlocks, sent+1, blocks(20)...)
		if err != nil {
			t.Fatal(err)
		}
		if got.GetRetryUs() > 0 {
			put++
		}
		sent = got.GetDurable()
	}
	if put < 10 || sent > 200 || sent < 100 {
		t.Errorf("%d of 20 batches were put off, %d records stored", put, sent)
	}
	if l.svc.Counters().Limited == 0 {
		t.Error("nothing is counted")
	}
	var many []*agentpb.Record
	for i := range 50 {
		many = append(many, run(fmt.Sprintf("/tmp/%d", i)))
	}
	if got, err := a.ingest(ctx, laneInventory, 1, many...); err != nil || got.GetDurable() != 50 {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := a.ingest(ctx, laneInventory, 51, run("/tmp/more")); err != nil || got.GetDurable() != 50 || got.GetRetryUs() == 0 {
		t.Errorf("a flood of new executables: %v, %v", got, err)
	}
	if l.signalled(hosts.SignalFlood) != 1 {
		t.Error("the flood is not signalled")
	}
	if got, err := b.ingest(ctx, laneBlocks, 1, blocks(20)...); err != nil || got.GetDurable() != 20 {
		t.Errorf("another host: %v, %v", got, err)
	}
	for i := 0; ; i++ {
		_, err := b.Chunk(ctx, connect.NewRequest(&agentpb.ChunkRequest{Sha256: make([]byte, 32)}))
		if connect.CodeOf(err) == connect.CodeResourceExhausted {
			break
		}
		if i > 100 {
			t.Fatal("calls are not bounded")
		}
	}
}

func TestPeople(t *testing.T) {
	l := newLab(t, "sqlite:"+t.TempDir(), newCA(t))
	a := l.join("web-1")
	if _, err := a.ingest(t.Context(), laneBlocks, 1, block("/tmp/x")); err != nil {
		t.Fatal(err)
	}
	at := group + "/providers/Ringwall.Fleet/hosts/web-1"
	for _, tc := range []struct {
		who, method, path, body, want string
		code                          int
	}{
		{"", "GET", "/hosts?below=" + group, "", `"name":"web-1"`, 200},
		{"", "GET", "/hosts?below=" + sub + "/resourceGroups/db", "", `"hosts":[]`, 200},
		{"ana", "GET", "/hosts?below=" + group, "", "may not", 418},
		{"", "GET", "/hosts?below=x", "", "invalid", 418},
		{"", "GET", "/events?host=" + at, "", `"path":"/tmp/x"`, 200},
		{"", "GET", "/events?host=" + at + "&what=notice", "", `"events":[]`, 200},
		{"", "GET", "/events?host=" + at + "&limit=0", "", "invalid", 418},
		{"", "GET", "/events?host=" + at + "9", "", "not found", 418},
		{"ana", "GET", "/events?host=" + at, "", "may not", 418},
		{"ana", "GET", "/inventory", "", "may not", 418},
		{"", "GET", "/inventory?since=yesterday", "", "invalid", 418},
		{"ana", "POST", "/chunks", `{"scope":"` + group + `","chunks":[]}`, "may not", 418},
		{"", "POST", "/chunks", `{"scope":"` + group + `","chunks":["` + strings.Repeat("ab", 32) + `"]}`, `"chunks":["abab`, 200},
		{"", "POST", "/chunks", `{"x":1}`, "invalid", 418},
		{"ana", "PUT", "/chunks/" + strings.Repeat("ab", 32) + "?scope=" + group, "x", "may not", 418},
		{"", "PUT", "/chunks/" + strings.Repeat("ab", 32) + "?scope=" + group, "x", "not trusted", 418},
		{"", "PUT", "/chunks/short?scope=" + group, "x", "invalid", 418},
	} {
		code, text := l.do(tc.who, tc.method, tc.path, []byte(tc.body))
		if code != tc.code || !strings.Contains(text, tc.want) {
			t.Errorf("%s %s as %q: %d %s", tc.method, tc.path, tc.who, code, text)
		}
	}
}

func FuzzReadEnrolment(f *testing.F) {
	f.Add([]byte("x"), hosts.NewJoinToken(id(group)), "web-1")
	f.Fuzz(func(t *testing.T, csr []byte, token, name string) {
		e, err := hosts.ReadEnrolment(&agentpb.EnrolRequest{JoinToken: token, Name: name, Csr: csr})
		if err == nil && e == nil || err != nil && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Untrusted) {
			t.Errorf("%v, %v", e, err)
		}
	})
}

func FuzzReadState(f *testing.F) {
	b, _ := proto.Marshal(&agentpb.State{BootId: []byte{1}, Manifest: make([]byte, 32), Phase: agentpb.State_PHASE_CONFIRMED, FailedUnits: []string{"a"}, Labels: map[string]string{"a": "b"}})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var s agentpb.State
		if proto.Unmarshal(b, &s) != nil {
			return
		}
		r, labels, err := hosts.ReadState(&s)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Error(err)
			}
			return
		}
		if len(r.Problem) > 1024 || len(labels) > 32 || len(r.FailedUnits) > 32 {
			t.Errorf("%+v", r)
		}
	})
}

func TestJoinToken(t *testing.T) {
	token := hosts.NewJoinToken(id(group))
	at, err := hosts.JoinTokenID(token)
	if err != nil || !at.Parent().Equal(id(group)) {
		t.Fatalf("%v, %v", at, err)
	}
	if other, err := hosts.JoinTokenID(token + "A"); err == nil && other.Equal(at) {
		t.Error("another text is the same token")
	}
	junk := make([]byte, 100)
	_, _ = rand.Read(junk)
	for _, bad := range []string{"", "rwj_", "rwj_a_", "rwj_a_!", string(junk), token[:10], "rwj_" + strings.Repeat("a", 5000) + "_Lw"} {
		if _, err := hosts.JoinTokenID(bad); bad != "rwj_a_" && !errors.Is(err, errs.Untrusted) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
