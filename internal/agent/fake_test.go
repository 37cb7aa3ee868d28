package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/enforce"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// fakeKernel stands for the engine where a test is about the agent: the real
// one is tested in guests.
type fakeKernel struct {
	mu        sync.Mutex
	applied   []*integrity.Table
	relaxed   time.Duration
	guarded   []string
	protected bool
	canary    func(*integrity.Table) error
	events    chan enforce.Event
	closed    bool
	removed   bool
	counters  enforce.Counters
}

func newFakeKernel() *fakeKernel { return &fakeKernel{events: make(chan enforce.Event, 64)} }

func (k *fakeKernel) Adopt(context.Context) ([]enforce.Running, error) {
	return []enforce.Running{{PID: 7, Exe: "/old", Listed: false}, {PID: 8, Exe: "/bin/true", Listed: true}}, nil
}

func (k *fakeKernel) Apply(t *integrity.Table) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.applied = append(k.applied, t)
	return nil
}

func (k *fakeKernel) live() *integrity.Table {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.applied) == 0 {
		return nil
	}
	return k.applied[len(k.applied)-1]
}

func (k *fakeKernel) Guard(p ...string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.guarded = append(k.guarded, p...)
	return nil
}

func (k *fakeKernel) Unguard(p ...string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.guarded = slices.DeleteFunc(k.guarded, func(g string) bool { return slices.Contains(p, g) })
	return nil
}

func (k *fakeKernel) Protect() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.protected = true
	return nil
}

func (k *fakeKernel) Relax(d time.Duration) error                { k.relaxed = d; return nil }
func (k *fakeKernel) TrustVolume(uint64, integrity.Digest) error { return nil }
func (k *fakeKernel) ForgetVolume(uint64) error                  { return nil }
func (k *fakeKernel) Status() (enforce.Status, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := enforce.Status{Protected: k.protected, Counters: k.counters}
	if n := len(k.applied); n > 0 {
		t := k.applied[n-1]
		s.Epoch, s.Policy, s.Entries, s.Modes, s.Process = t.Epoch, t.PolicyDigest, uint64(len(t.Entries)), t.Modes, t.Process
	}
	return s, nil
}
func (k *fakeKernel) MustMeasure() bool      { return false }
func (k *fakeKernel) Measure(*os.File) error { return nil }
func (k *fakeKernel) IsGuarded(p string) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Contains(k.guarded, p), nil
}

func (k *fakeKernel) IsCanary(enforce.Event) bool { return false }
func (k *fakeKernel) Close() error                { k.closed = true; return nil }

func (k *fakeKernel) Remove() error                                   { k.removed = true; return nil }
func (k *fakeKernel) open(enforce.Options) (Enforcer, Watcher, error) { return k, k, nil }

func (k *fakeKernel) Canary(context.Context) error {
	if k.canary == nil {
		return nil
	}
	return k.canary(k.live())
}

func (k *fakeKernel) Events(ctx context.Context, fn func(enforce.Event)) error {
	for {
		select {
		case e := <-k.events:
			fn(e)
		case <-ctx.Done():
			return nil
		}
	}
}

// lab is a host with its own fleet's keys.
type lab struct {
	t       *testing.T
	dir     string
	keys    *pki.Authority
	kernel  *fakeKernel
	agent   *Agent
	clock   time.Time
	mu      sync.Mutex
	stop    func()
	program string // where the agent's own program lies
	usrLib  string // of Python, in place of /usr/lib
	options func(*Options)
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), kernel: newFakeKernel(), clock: time.Now().UTC().Truncate(time.Second)}
	l.keys = l.authority("keys")
	return l
}

func (l *lab) authority(name string) *pki.Authority {
	l.t.Helper()
	a, err := pki.CreateAuthority(filepath.Join(l.dir, name), pki.AuthorityOptions{Name: "Fleet", Now: l.now})
	if err != nil {
		l.t.Fatal(err)
	}
	return a
}

func (l *lab) now() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.clock
}

func (l *lab) forward(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock = l.clock.Add(d)
}

func (l *lab) state() string { return filepath.Join(l.dir, "state") }
func (l *lab) run() string   { return filepath.Join(l.dir, "run") }

func (l *lab) anchor() Anchor {
	a := AnchorFor(certs(l.keys.Issuers[pki.PurposePolicy]), nil)
	a.Timestamps = []AnchorCert{{Name: "TSA", PEM: string(pki.EncodeCertificate(l.keys.TSA.Cert))}}
	a.Host = "host-1"
	return a
}

// policy signs a policy of this lab's fleet; rules are further lines of YAML.
func (l *lab) policy(epoch int, mode, rules string) []byte {
	l.t.Helper()
	return l.signedBy(l.keys, l.policyYAML(epoch, mode, rules))
}

func (l *lab) policyYAML(epoch int, mode, rules string) string {
	indent := func(pem []byte) string { return strings.ReplaceAll(strings.TrimSpace(string(pem)), "\n", "\n        ") }
	ca := func(name string, p pki.Purpose, signs string) string {
		return fmt.Sprintf("    - name: %s\n      signs: [%s]\n      certificate: |\n        %s\n", name, signs, indent(pki.EncodeCertificate(l.keys.Issuers[p].Cert)))
	}
	return fmt.Sprintf("version: 1\nname: test\nepoch: %d\nmode: %s\ntrust:\n  authorities:\n%s%s%s  timestamps:\n    - name: TSA\n      certificate: |\n        %s\n%s",
		epoch, mode, ca("build", pki.PurposeBuild, "build"), ca("policy", pki.PurposePolicy, "policy, supplement"), ca("permit", pki.PurposePermit, "permit"),
		indent(pki.EncodeCertificate(l.keys.TSA.Cert)), rules)
}

func (l *lab) signer(a *pki.Authority, p pki.Purpose) *pki.Signer {
	l.t.Helper()
	s, err := a.NewSigner(pki.LeafRequest{Purpose: p, Identity: "spiffe://fleet.example/" + p.String(), Now: l.now()})
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}

func (l *lab) signedBy(a *pki.Authority, yaml string) []byte {
	l.t.Helper()
	b, err := codesign.SignPolicy(l.signer(a, pki.PurposePolicy), []byte(yaml))
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// release signs a release whose only file is content.
func (l *lab) release(content string) ReleaseRequest {
	l.t.Helper()
	dir := filepath.Join(l.dir, fmt.Sprintf("build-%x", sha256.Sum256([]byte(content))))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tool"), []byte(content), 0o755); err != nil {
		l.t.Fatal(err)
	}
	b, err := codesign.Build(codesign.DirSource(os.DirFS(dir)), codesign.Options{})
	if err != nil {
		l.t.Fatal(err)
	}
	r, err := codesign.SignRelease(l.signer(l.keys, pki.PurposeBuild), codesign.ReleaseInfo{Product: "tool", Version: "1", Epoch: 1}, b.Catalogue, b.Names)
	if err != nil {
		l.t.Fatal(err)
	}
	return ReleaseRequest{Record: r, Catalogue: b.Catalogue, Names: b.Names}
}

func (l *lab) prepare(policy []byte, releases ...ReleaseRequest) {
	l.t.Helper()
	if _, err := Prepare(l.t.Context(), l.state(), Setup{Anchor: l.anchor(), Policy: policy, Releases: releases}, l.now()); err != nil {
		l.t.Fatal(err)
	}
}

// start runs an agent and waits until it answers.
func (l *lab) start() {
	l.t.Helper()
	if err := l.tryStart(); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) tryStart() error {
	o := Options{StateDir: l.state(), RunDir: l.run(), Log: slog.New(slog.DiscardHandler), Now: l.now, Open: l.kernel.open, usrLib: l.usrLib, Program: l.program, uncovered: func() []enforce.Problem { return nil }}
	if l.options != nil {
		l.options(&o)
	}
	a, err := New(o)
	if err != nil {
		return err
	}
	l.agent = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	l.stop = func() {
		cancel()
		<-done
		l.stop = func() {}
	}
	l.t.Cleanup(func() { l.stop() })
	for {
		select {
		case err := <-done:
			done <- err
			if err == nil {
				err = errors.New("the agent ended at once")
			}
			return err
		case <-time.After(20 * time.Millisecond): // a status looks at the whole machine
		}
		if _, err := l.client().Status(ctx); err == nil {
			return nil
		}
	}
}

func (l *lab) client() *Client { return NewClient(l.run()) }

func (l *lab) status() *Status {
	l.t.Helper()
	s, err := l.client().Status(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	return s
}
