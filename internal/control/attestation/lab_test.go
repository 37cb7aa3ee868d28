package attestation_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"ringwall/internal/attest"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/control/attestation"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/store"
	"ringwall/internal/testkit"
)

// shelf is the real store, as the door wants it.
type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

const evidenceDir = "../../attest/testdata/evidence"

// recorded reads the evidence of a virtual machine with real firmware.
func recorded(t testing.TB, name string) attest.Evidence {
	t.Helper()
	f, err := os.Open(filepath.Join(evidenceDir, name+".json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var ev attest.Evidence
	if err := json.NewDecoder(z).Decode(&ev); err != nil {
		t.Fatal(err)
	}
	return ev
}

// machine is a host: a software TPM that was extended with what the logs say.
type machine struct {
	t      testing.TB
	tpm    *testkit.TPM
	prover *host.Prover
	key    *ecdsa.PrivateKey
	log    []byte
	list   []byte
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{t: t, tpm: testkit.StartTPM(t)}
	var err error
	if m.key, err = pki.NewKey(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m.prover = host.NewProver(m.tpm.Path)
	m.prover.BootLog, m.prover.IMAList, m.prover.UserspaceLog = filepath.Join(dir, "log"), filepath.Join(dir, "ima"), filepath.Join(dir, "user")
	return m
}

// file is an entry of an IMA list; violation: no digest.
type file struct {
	path, content string
	violation     bool
}

const recordPath = "/run/ringwall/policy-record"

func goodFiles() []file {
	return []file{{path: recordPath, content: "policy 5"}, {path: "/bin/one", content: "one"}, {path: "/bin/two", content: "two"}}
}

// boot writes the logs and extends the TPM with them, as a machine does that
// booted what the log says and then used the files.
func (m *machine) boot(log []byte, files ...file) {
	m.t.Helper()
	l, err := attest.ParseLog(log)
	if err != nil {
		m.t.Fatal(err)
	}
	m.log, m.list = log, nil
	for i := range l.Events {
		if e := &l.Events[i]; e.Type != attest.EventNoAction {
			m.extend(e.PCR, e.Digest(attest.SHA256))
		}
	}
	bank, err := l.LeadsTo(attest.SHA256)
	if err != nil {
		m.t.Fatal(err)
	}
	m.measure("boot_aggregate", string(bytes.Join(bank.Values[:10], nil)), false)
	m.use(files...)
}

func (m *machine) use(files ...file) {
	for _, f := range files {
		m.measure(f.path, f.content, f.violation)
	}
	m.save()
}

func (m *machine) save() {
	m.t.Helper()
	if err := errors.Join(os.WriteFile(m.prover.BootLog, m.log, 0o600), os.WriteFile(m.prover.IMAList, m.list, 0o600)); err != nil {
		m.t.Fatal(err)
	}
}

// measure adds an entry of template ima-ng to the list and extends PCR 10.
func (m *machine) measure(path, content string, violation bool) {
	entry, digest := imaEntry(path, content, violation)
	m.list = append(m.list, entry...)
	m.extend(10, digest)
}

func imaEntry(path, content string, violation bool) (entry, extended []byte) {
	le := binary.LittleEndian
	field := func(b []byte) []byte { return append(le.AppendUint32(nil, uint32(len(b))), b...) }
	sum := sha256.Sum256([]byte(content))
	if violation {
		sum = [32]byte{}
	}
	data := slices.Concat(field(append([]byte("sha256:\x00"), sum[:]...)), field(append([]byte(path), 0)))
	recorded := bytes.Repeat([]byte{1}, 20) // SHA-1, which nobody compares
	whole := sha256.Sum256(data)
	extended = whole[:]
	if violation {
		recorded, extended = make([]byte, 20), bytes.Repeat([]byte{0xff}, 32)
	}
	return slices.Concat(le.AppendUint32(nil, 10), recorded, field([]byte("ima-ng")), field(data)), extended
}

func (m *machine) do(fn func(transport.TPM) error) {
	m.t.Helper()
	c, err := linuxudstpm.Open(m.tpm.Path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	if err := fn(c); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) extend(pcr int, digest []byte) {
	m.t.Helper()
	m.do(func(c transport.TPM) error {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
		}.Execute(c)
		return err
	})
}

// reset is a power cycle.
func (m *machine) reset() {
	m.tpm.Stop()
	m.tpm.Start()
}

// event is one more record of a log in the format of the recordings, which have
// digests of the banks that alg gives.
func event(t testing.TB, log []byte, pcr int, kind attest.EventType, data []byte) []byte {
	t.Helper()
	l, err := attest.ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	b := le.AppendUint32(le.AppendUint32(le.AppendUint32(nil, uint32(pcr)), uint32(kind)), uint32(len(l.Algs)))
	for _, a := range l.Algs {
		b = le.AppendUint16(b, uint16(a))
		if a == attest.SHA256 {
			sum := sha256.Sum256(data)
			b = append(b, sum[:]...)
		} else {
			b = append(b, make([]byte, a.Size())...)
		}
	}
	return append(append(b, le.AppendUint32(nil, uint32(len(data)))...), data...)
}

// without gives a log without some of its events.
func without(t testing.TB, log []byte, drop func(*attest.RawEvent) bool) []byte {
	t.Helper()
	l, err := attest.ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	head := 32 + int(le.Uint32(log[28:]))
	out := slices.Clone(log[:head])
	at := head
	for i := range l.Events {
		size := 12
		for _, a := range l.Algs {
			size += 2 + a.Size()
		}
		size += 4 + len(l.Events[i].Data)
		if !drop(&l.Events[i]) {
			out = append(out, log[at:at+size]...)
		}
		at += size
	}
	return out
}

func (m *machine) identity() *attest.Identity {
	m.t.Helper()
	id, err := m.prover.Identity()
	if err != nil {
		m.t.Fatal(err)
	}
	c := *id
	return &c
}

func (m *machine) tpmID() attest.HostID {
	ek, err := attest.ParseEK(m.identity().EK)
	if err != nil {
		m.t.Fatal(err)
	}
	return ek.ID()
}

func (m *machine) request() *attest.Request {
	m.t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(m.key.Public())
	if err != nil {
		m.t.Fatal(err)
	}
	return &attest.Request{Identity: *m.identity(), Key: spki}
}

func (m *machine) csr() []byte {
	m.t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, m.key)
	if err != nil {
		m.t.Fatal(err)
	}
	return der
}

// clock is the time, which tests set.
type clock struct {
	sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time { c.Lock(); defer c.Unlock(); return c.at }
func (c *clock) pass(d time.Duration) {
	c.Lock()
	defer c.Unlock()
	c.at = c.at.Add(d)
}

// known is a catalogue of contents.
type known []string

func (k known) Knows(alg string, digest []byte, verity bool) bool {
	return alg == "sha256" && !verity && slices.ContainsFunc(k, func(s string) bool {
		sum := sha256.Sum256([]byte(s))
		return bytes.Equal(sum[:], digest)
	})
}
func (k known) Names() []string { return []string{strings.Join(k, ",")} }

// lab is a server.
type lab struct {
	t         testing.TB
	store     *store.Store
	door      *control.Door
	authority *pki.Authority
	ca        *pki.TLSAuthority
	clock     *clock
	tree      *attestation.Tree
	service   *attestation.Service
	incidents []attestation.Incident
	released  []string
	files     known
}

func newLab(t testing.TB) *lab {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	l := &lab{t: t, store: s, clock: &clock{at: time.Now().UTC().Truncate(time.Second)}, files: known{"one", "two"}}
	if l.door, err = control.New(shelf{s}, attestation.Kinds()...); err != nil {
		t.Fatal(err)
	}
	if l.authority, err = pki.CreateAuthority(t.TempDir(), pki.AuthorityOptions{Name: "Test", Now: l.clock.now}); err != nil {
		t.Fatal(err)
	}
	if l.ca, err = pki.NewTLSAuthority("hosts", l.clock.now()); err != nil {
		t.Fatal(err)
	}
	l.tree = &attestation.Tree{Store: shelf{s}, Catalogues: func(context.Context, string) (attest.Catalogues, error) { return l.files, nil }}
	l.restart()
	return l
}

// restart is another process on the same store.
func (l *lab) restart() {
	l.t.Helper()
	signer, err := l.authority.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAppraisal, Identity: "spiffe://fleet.example/attestation", Now: l.clock.now()})
	if err != nil {
		l.t.Fatal(err)
	}
	l.service, err = attestation.New(attestation.Config{
		Store: shelf{l.store}, Door: l.door, Policies: l.tree, Results: signer, Hosts: l.ca, Fleet: "fleet.example", Now: l.clock.now,
		Hooks: attestation.Hooks{
			Quarantined: func(i attestation.Incident) { l.incidents = append(l.incidents, i) },
			Released:    func(host, by, reason string) { l.released = append(l.released, host+" by "+by+": "+reason) },
		},
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

func root() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "admin"} }

// goodPolicy accepts the recorded machine "good", with the files of goodFiles.
func goodPolicy(t testing.TB) *attest.Policy {
	t.Helper()
	ev := recorded(t, "good")
	log, err := attest.ParseLog(ev.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	bank, err := attest.NewBank(attest.SHA256, ev.PCRs)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := attest.Replay(log, nil, bank, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := attest.Propose(boot, "servers")
	p.EKBases = []attest.Basis{attest.BasisAllowList, attest.BasisVendorCA, attest.BasisVTPMCA, attest.BasisJoinToken, attest.BasisFirstUse}
	p.PolicyRecord = attest.Record{Path: recordPath, Digests: []string{digest("policy 5")}}
	return p
}

func digest(content string) string {
	sum := sha256.Sum256([]byte(content))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// policy puts a policy into the tree.
func (l *lab) policy(name string, p *attest.Policy, e attestation.Enrolment, rings ...string) {
	l.t.Helper()
	appraisal, err := json.Marshal(p)
	if err != nil {
		l.t.Fatal(err)
	}
	l.put("/providers/"+attestation.TypePolicy+"/"+name, attestation.PolicyProperties{Rings: rings, Enrolment: e, Appraisal: appraisal})
}

func (l *lab) put(where string, properties any) {
	l.t.Helper()
	if err := l.tryPut(where, properties); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) tryPut(where string, properties any) error {
	b, err := json.Marshal(properties)
	if err != nil {
		return err
	}
	id, err := resource.ParseID(where)
	if err != nil {
		return err
	}
	_, err = l.door.Put(l.t.Context(), root(), resource.Document{ID: id, Properties: b}, resource.When{}, false)
	return err
}

// answer asks for a challenge and lets the machine answer it.
func (l *lab) answer(name string, m *machine) (*attest.Answer, error) {
	l.t.Helper()
	q, err := l.service.Challenge(l.t.Context(), name, m.request())
	if err != nil {
		return nil, err
	}
	a, err := m.prover.Answer(q, []byte(`{"agent":"1"}`), m.csr())
	if err != nil {
		return nil, err
	}
	// over the wire and back
	b, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return attest.ParseAnswer(b)
}

func (l *lab) round(name string, m *machine) (*attest.Reply, error) {
	l.t.Helper()
	a, err := l.answer(name, m)
	if err != nil {
		return nil, err
	}
	return l.service.Verify(l.t.Context(), name, a)
}

// accepted is a round that must go well.
func (l *lab) accepted(name string, m *machine) *attest.Reply {
	l.t.Helper()
	r, err := l.round(name, m)
	if err != nil || r.Status != attest.Affirming || r.Certificate == nil {
		l.t.Fatalf("%s: %s, %v", name, reasonsOf(r), err)
	}
	return r
}

// refused is a round whose evidence must be refused for exactly these reasons.
func (l *lab) refused(name string, m *machine, want ...attest.Reason) {
	l.t.Helper()
	r, err := l.round(name, m)
	if err != nil {
		l.t.Errorf("%s: %v", name, err)
		return
	}
	l.sameReasons(name, r, want)
}

func (l *lab) sameReasons(name string, r *attest.Reply, want []attest.Reason) {
	l.t.Helper()
	got := slices.Compact(slices.Sorted(slices.Values(r.Reasons)))
	got = slices.DeleteFunc(got, func(r attest.Reason) bool { return r == attest.ReasonNoEvidence })
	slices.Sort(want)
	if r.Status != attest.Contraindicated || r.Certificate != nil || !slices.Equal(got, want) {
		l.t.Errorf("%s: %s for %q, want %q; certificate %v", name, r.Status, got, want, r.Certificate != nil)
	}
}

func (l *lab) state(name string) attestation.State {
	l.t.Helper()
	st, err := l.service.Status(l.t.Context(), name)
	if err != nil {
		l.t.Fatal(err)
	}
	return st.State
}

func (l *lab) audited(verb string) []audit.Record {
	l.t.Helper()
	var out []audit.Record
	err := l.store.Read(l.t.Context(), func(tx *store.Tx) error {
		all, err := tx.Audit(l.t.Context(), 0, 1000)
		for _, r := range all {
			if strings.Contains(r.Action, "/"+verb) {
				out = append(out, r)
			}
		}
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

// ready is a server with the usual policy, and a machine that is on its allow list.
func ready(t testing.TB) (*lab, *machine) {
	t.Helper()
	l, m := newLab(t), newMachine(t)
	m.boot(recorded(t, "good").EventLog, goodFiles()...)
	l.policy("all", goodPolicy(t), attestation.Enrolment{Allowed: []attest.HostID{m.tpmID()}})
	return l, m
}

func wantReason(t testing.TB, what string, err error, want attest.Reason) {
	t.Helper()
	if err == nil || attest.ReasonOf(err) != want {
		t.Errorf("%s: %v, want %s", what, err, want)
	}
}

func (l *lab) order(by control.Actor, order, name, reason string) error {
	return l.service.Give(l.t.Context(), by, order, name, attestation.OrderBody{Reason: reason})
}
