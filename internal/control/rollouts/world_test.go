package rollouts_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
	"ringwall/internal/store"
)

const (
	sub    = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group  = sub + "/resourceGroups/web"
	change = group + "/providers/Ringwall.Fleet/rollouts/change"
	halts  = group + "/providers/Ringwall.Fleet/halts/"
)

func noon() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

// shelf is the real store, as the door wants it. With a fault, the process dies
// before a transaction or after it, and what it did is or is not there.
type shelf struct {
	*store.Store
	fault func() error // nil: none
}

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	if err := s.dies(); err != nil {
		return err
	}
	err := s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
	return errors.Join(err, s.dies())
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	if err := s.dies(); err != nil {
		return err
	}
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) dies() error {
	if s.fault == nil {
		return nil
	}
	return s.fault()
}

// keys is an authority that signs policies, and what it signed: a manifest of
// epoch 1 that hosts have, one of epoch 2, and the way back from it.
type keys struct {
	*pki.Authority
	signer             *pki.Signer
	content            *content
	before, good, back integrity.Digest
}

func newKeys(t testing.TB) *keys {
	t.Helper()
	a, err := pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Fleet", Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: "https://ops.example/policy", Now: noon()})
	if err != nil {
		t.Fatal(err)
	}
	k := &keys{Authority: a, signer: s, content: newContent()}
	k.before = k.content.put(t, k, 1, integrity.Digest{}, "")
	k.good = k.content.put(t, k, 2, integrity.Digest{}, "")
	k.back = k.content.put(t, k, 3, k.good, "")
	return k
}

// content is what operators uploaded.
type content struct {
	manifests map[integrity.Digest][]byte
	chunks    map[integrity.Digest][]byte
}

func newContent() *content {
	return &content{manifests: map[integrity.Digest][]byte{}, chunks: map[integrity.Digest][]byte{}}
}

func (c *content) Manifest(_ context.Context, d integrity.Digest) (*codesign.Manifest, []byte, error) {
	b, ok := c.manifests[d]
	if !ok {
		return nil, nil, fmt.Errorf("manifest %s: %w", d, errs.NotFound)
	}
	m, err := codesign.UnverifiedManifest(b)
	return m, b, err
}

func (c *content) Chunk(_ context.Context, d integrity.Digest, _ int) ([]byte, error) {
	b, ok := c.chunks[d]
	if !ok {
		return nil, fmt.Errorf("chunk %s: %w", d, errs.NotFound)
	}
	return b, nil
}

func (c *content) add(chunk []byte) integrity.Digest {
	d := integrity.Digest(sha256.Sum256(chunk))
	c.chunks[d] = chunk
	return d
}

// release uploads a release of one program, and returns it and the program's digest.
func (c *content) release(t testing.TB, k *keys, version, program string) (codesign.Item, integrity.Digest) {
	t.Helper()
	b, err := codesign.Build(codesign.DirSource(fstest.MapFS{"usr/bin/edge": {Data: []byte(program), Mode: 0o755}}), codesign.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := k.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: "https://ci.example/build", Now: noon()})
	if err != nil {
		t.Fatal(err)
	}
	record, err := codesign.SignRelease(s, codesign.ReleaseInfo{
		Product: "edge", Version: version, Epoch: 1, NotAfter: noon().Add(1000 * time.Hour),
		Artefacts: []codesign.Artefact{{Name: "edge.tar", Digest: integrity.Digest{1}}},
	}, b.Catalogue, b.Names)
	if err != nil {
		t.Fatal(err)
	}
	names := c.add(b.Names)
	return codesign.Item{Release: &codesign.ReleaseItem{Record: c.add(record), Catalogue: c.add(b.Catalogue), Names: &names}}, sha256.Sum256([]byte(program))
}

// put uploads a manifest of a policy with these lines, and returns its digest.
func (c *content) put(t testing.TB, k *keys, epoch uint64, undoes integrity.Digest, lines string, items ...codesign.Item) integrity.Digest {
	t.Helper()
	pem := func(b []byte) string {
		return "      " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n      ")
	}
	yaml := fmt.Sprintf("version: 1\nname: base\nepoch: %d\nmode: enforce\ntrust:\n  authorities:\n  - name: ops\n    signs: [policy]\n    certificate: |\n%s\n"+
		"  - name: builds\n    signs: [build]\n    certificate: |\n%s\n  timestamps:\n  - name: clock\n    certificate: |\n%s\n%s", epoch, pem(pki.EncodeCertificate(k.Issuers[pki.PurposePolicy].Cert)), pem(pki.EncodeCertificate(k.Issuers[pki.PurposeBuild].Cert)), pem(pki.EncodeCertificate(k.TSA.Cert)), "  archives: [{name: debian, keyring: mQINBFyy5FABEADZdHDmiXKN7lnhF5xHFPQWFvVE4A==}]\n"+lines)
	policy, err := codesign.SignPolicy(k.signer, []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	digest := c.add(policy)
	parts, err := codesign.WriteIndex(items)
	if err != nil {
		t.Fatal(err)
	}
	var index []integrity.Digest
	for _, p := range parts {
		index = append(index, c.add(p))
	}
	b, err := codesign.SignManifest(k.signer, codesign.Manifest{
		Scope: sub, Epoch: epoch, NotBefore: noon().Add(-time.Hour), NotAfter: noon().Add(1000 * time.Hour), Policy: digest, Index: index, Undoes: undoes,
	})
	if err != nil {
		t.Fatal(err)
	}
	m := integrity.Digest(sha256.Sum256(b))
	c.manifests[m] = b
	return m
}

// hosts is a simulated fleet: agents that do what they are told.
type hosts struct {
	mu       sync.Mutex
	all      map[string]*fleet.Host
	epochs   map[integrity.Digest]uint64
	now      func() time.Time
	assigned int // assignments made
	signals  []fleet.Signal
	// breaks is what a manifest does to a host that has just taken it.
	breaks func(*fleet.Host)
	fail   func() error // instead of Assign, before or after it was stored
}

func newHosts(n int, now func() time.Time) *hosts {
	h := &hosts{all: map[string]*fleet.Host{}, epochs: map[integrity.Digest]uint64{}, now: now}
	for i := range n {
		h.add(fmt.Sprintf("web-%04d", i))
	}
	return h
}

func (h *hosts) add(name string) *fleet.Host {
	x := &fleet.Host{
		ID: name, Resource: id(group + "/providers/Ringwall.Fleet/hosts/" + name), Labels: map[string]string{"role": "web"},
		Online: true, Seen: h.now(), Joined: h.now(), Report: fleet.Report{Boot: "b1", AgentStarts: 1, At: h.now()},
	}
	h.all[name] = x
	return x
}

func (h *hosts) Hosts(_ context.Context, below resource.ID) ([]fleet.Host, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []fleet.Host
	for _, x := range h.all {
		if below.Contains(x.Resource) {
			out = append(out, *x)
		}
	}
	slices.SortFunc(out, func(a, b fleet.Host) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

func (h *hosts) AssignUnder(_ context.Context, _ control.Fence, as []fleet.Assignment) error {
	for _, a := range as {
		if h.fail != nil {
			if err := h.fail(); err != nil {
				return err // what came before is stored
			}
		}
		h.mu.Lock()
		x := h.all[a.Host]
		x.Assigned, x.AssignedAt = a.Manifest, h.now()
		h.assigned++
		h.mu.Unlock()
	}
	return nil
}

func (h *hosts) Signals(_ context.Context, since time.Time) (out []fleet.Signal, _ error) {
	for _, s := range h.signals {
		if !s.At.Before(since) {
			out = append(out, s)
		}
	}
	return out, nil
}

// step lets every host that is there report, and take what is meant for it.
func (h *hosts) step() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.all {
		if !x.Online {
			continue
		}
		x.Seen, x.Report.At = h.now(), h.now()
		if x.Assigned.IsZero() || x.Assigned == x.Report.Manifest || x.Assigned == x.Report.Failed || h.epochs[x.Assigned] < x.Report.Epoch {
			continue
		}
		x.Report.Phase, x.Report.Manifest, x.Report.Epoch, x.Report.Flips, x.Report.Failed = fleet.Confirmed, x.Assigned, h.epochs[x.Assigned], 0, integrity.Digest{}
		if h.breaks != nil {
			h.breaks(x)
		}
	}
}

func (h *hosts) count(is func(*fleet.Host) bool) (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, x := range h.all {
		if is(x) {
			n++
		}
	}
	return n
}

// inventory is what ran.
type inventory struct {
	all      []fleet.Item
	coverage int // percent
}

func (i *inventory) Inventory(context.Context, resource.ID, time.Time, int) ([]fleet.Item, error) {
	return i.all, nil
}

func (i *inventory) Coverage(context.Context, []string, []string, time.Time) (fleet.Coverage, error) {
	return fleet.Coverage{Uses: 100, UsesCovered: i.coverage}, nil
}

// world is a server with a fleet and people.
type world struct {
	t         testing.TB
	store     *store.Store
	door      *control.Door
	fleet     *hosts
	inventory *inventory
	*keys
	engine *rollouts.Engine
	fence  control.Fence
	round  func(context.Context) error

	mayAsk func(*url.URL) bool

	mu    sync.Mutex
	clock time.Time
	fault func() error
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.clock
}

func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	w.clock = w.clock.Add(d)
	w.mu.Unlock()
}

func ana() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "ana"} }

// bob may all that ana may.
func bob() control.Actor { return control.Engine("bob", "Ringwall.Fleet/*") }

func newWorld(t testing.TB, n int, k *keys) *world {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	w := &world{t: t, store: s, clock: noon(), inventory: &inventory{coverage: 100}, keys: k}
	if w.door, err = control.New(w.shelf(), rollouts.Kinds(w.now)...); err != nil {
		t.Fatal(err)
	}
	w.fleet = newHosts(n, w.now)
	w.fleet.epochs = map[integrity.Digest]uint64{w.before: 1, w.good: 2, w.back: 3}
	for _, x := range w.fleet.all {
		x.Assigned, x.Report.Manifest, x.Report.Epoch, x.Report.Phase = w.before, w.before, 1, fleet.Confirmed
	}
	w.put(sub, `{}`)
	w.put(group, `{}`)
	w.restart()
	return w
}

func (w *world) shelf() shelf {
	return shelf{w.store, func() error {
		w.mu.Lock()
		fault := w.fault
		w.mu.Unlock()
		if fault == nil {
			return nil
		}
		return fault()
	}}
}

func (w *world) setFault(f func() error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
}

// restart is a new process: it remembers nothing.
func (w *world) restart() {
	w.t.Helper()
	w.engine = rollouts.New(rollouts.Options{
		Door: w.door, Store: w.shelf(), Fleet: w.fleet, Content: w.content, Inventory: w.inventory,
		Log: slog.New(slog.DiscardHandler), Now: w.now,
		MayAsk: w.mayAsk,
	})
	n, err := w.store.AcquireLease(context.Background(), rollouts.Lease, fmt.Sprint("p", time.Now().UnixNano()), time.Nanosecond)
	if err != nil {
		w.t.Fatal(err)
	}
	w.fence = control.Fence{Lease: rollouts.Lease, Number: n}
	w.round = w.engine.Rounds(w.fence)
}

func (w *world) put(where, properties string) {
	w.t.Helper()
	if err := w.tryPut(ana(), where, properties); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) tryPut(by control.Actor, where, properties string) error {
	_, err := w.door.Put(context.Background(), by, resource.Document{ID: id(where), Properties: json.RawMessage(properties)}, resource.When{}, false)
	return err
}

// spec is a rollout of the good manifest, with more of these lines.
func (w *world) spec(more string) string {
	return fmt.Sprintf(`{"manifest":%q,"rollback":%q%s}`, w.good, w.back, more)
}

func (w *world) act(by control.Actor, where, action, body string) error {
	_, err := w.door.Invoke(context.Background(), by, id(where), action, json.RawMessage(body))
	return err
}

func (w *world) must(by control.Actor, where, action, body string) {
	w.t.Helper()
	if err := w.act(by, where, action, body); err != nil {
		w.t.Fatal(err)
	}
}

// tenth are two rings, of a tenth of the hosts and of all.
const tenth = `,"rings":[{"name":"canary","percent":10,"bake":{"time":"30m"}},{"name":"all","percent":100}]`

// propose starts a rollout and has it checked.
func (w *world) propose(more string) {
	w.t.Helper()
	w.put(change, w.spec(more))
	w.must(ana(), change, "start", `{}`)
	w.tick(0)
}

// begin starts a rollout and approves it.
func (w *world) begin(more string) {
	w.t.Helper()
	w.propose(more)
	w.must(bob(), change, "approve", `{}`)
}

// tick is a round of the engine and some time of the fleet.
func (w *world) tick(d time.Duration) {
	w.t.Helper()
	if err := w.round(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.pass(d)
	w.fleet.step()
}

func (w *world) status(where string) *rollouts.Status {
	w.t.Helper()
	d, err := w.door.Get(context.Background(), ana(), id(where))
	if err != nil {
		w.t.Fatal(err)
	}
	r, err := rollouts.Parsed(d)
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Status
}

// until ticks until a rollout is in a phase.
func (w *world) until(where string, phase rollout.Phase, d time.Duration, most int) *rollouts.Status {
	w.t.Helper()
	for range most {
		if s := w.status(where); s.Phase == phase {
			return s
		}
		w.tick(d)
	}
	s := w.status(where)
	p, err := w.engine.Progress(context.Background(), ana(), id(where))
	w.t.Fatalf("stays %s in ring %d: %+v, %v", s.Phase, s.Ring, p, err)
	return nil
}

// transitions are what the audit log says of a rollout, by the engine.
func (w *world) transitions() []string {
	w.t.Helper()
	var out []string
	err := w.store.Read(context.Background(), func(tx *store.Tx) error {
		all, err := tx.Audit(context.Background(), 0, 1000)
		for i := range all {
			if r := &all[i]; r.Actor == "ringwall rollouts" && r.Outcome == audit.Done {
				out = append(out, r.Reason)
			}
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func isOn(d integrity.Digest) func(*fleet.Host) bool {
	return func(x *fleet.Host) bool { return x.Report.Manifest == d }
}
