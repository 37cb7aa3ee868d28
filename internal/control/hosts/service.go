package hosts

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// Store is what this package needs of the database beside the tree.
type Store interface {
	control.Store
	GrantsSince(ctx context.Context, mark int64) ([]fleet.Grant, int64, error)
	SavePresence(ctx context.Context, node string, all []fleet.Presence) error
	PresenceSince(ctx context.Context, node string, mark int64) ([]fleet.Presence, int64, error)
}

// grantTx is what a transaction of the store does for hosts.
type grantTx interface {
	Grant(ctx context.Context, host string) (*fleet.Grant, error)
	PutGrant(ctx context.Context, g *fleet.Grant) error
	Assign(ctx context.Context, manifest integrity.Digest, hosts []string) error
}

// Attester answers what hosts prove by their TPM. Bodies are of package attest;
// host is an id that was authenticated.
type Attester interface {
	Challenge(ctx context.Context, host string, body []byte) ([]byte, error)
	Attest(ctx context.Context, host string, body []byte) ([]byte, error)
}

// Options are what a Service is made of.
type Options struct {
	Door    *control.Door // with Kinds among its kinds
	Store   Store
	Events  Events
	Records Records
	Clients *pki.TLSAuthority // certifies hosts
	Log     *slog.Logger
	Now     func() time.Time // nil: time.Now
	// Shared: other replicas use the same database.
	Shared bool
	// Attester may be nil: then attestation is not supported.
	Attester Attester
	// Blocks gets every batch of blocks and notices that was stored, in order; at
	// least once. While it fails, the batch comes again.
	Blocks func(ctx context.Context, all []incident.Event) error
	Limits Limits // zero values: DefaultLimits
	Spool  string // directory for what is received; "" for the system's
}

// Service is the server's side of hosts. It is safe for use by several
// goroutines.
type Service struct {
	Options
	node string // this process, among the replicas

	mu       sync.RWMutex
	hosts    map[string]*host  // by id
	byKey    map[string]string // key of the document → id
	revision uint64            // of the tree, up to which documents are known
	grants   int64             // marks, see Store
	presence int64

	hooks    hooks
	counters counters
	enrols   bucket
	ingest   *ingester
	chunks   answers

	manifests struct {
		sync.Mutex
		m map[integrity.Digest]*knownManifest
	}
}

type knownManifest struct {
	id     resource.ID
	parsed *codesign.Manifest
	bundle []byte
}

// hooks are set before Run.
type hooks struct {
	report []func(old, now *fleet.Host)
	signal []func(fleet.Signal)
}

// host is one host in memory. What v points to is replaced, never changed in
// place, so that a copy of v may be handed out.
type host struct {
	mu       sync.Mutex
	v        fleet.Host
	props    HostProperties
	own      map[string]string // labels that the host says of itself
	revision uint64            // of the document: that of its directives
	key      integrity.Digest
	oldKey   integrity.Digest
	wake     chan struct{} // of the Wait that is held; closed to wake it
	session  uint64        // of the newest Wait
	dirty    bool          // seen, not stored
	urgent   bool          // the report changed, not stored
	lanes    [2]lane
	use      use
}

// New reads what is known of hosts. Run does the rest.
func New(ctx context.Context, o Options) (*Service, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	o.Limits = o.Limits.withDefaults()
	s := &Service{Options: o, node: newID(), hosts: map[string]*host{}, byKey: map[string]string{}}
	s.manifests.m = map[integrity.Digest]*knownManifest{}
	s.ingest = newIngester(s)
	if err := s.load(ctx); err != nil {
		return nil, fmt.Errorf("read hosts: %w", err)
	}
	return s, nil
}

// newID is a name that nobody else has or guesses.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// engine is who changes hosts' documents for them.
func engine() control.Actor {
	return control.Engine("hosts", fleet.TypeHost+"/*", fleet.TypeJoinToken+"/*", fleet.TypeManifest+"/read")
}

// OnReport calls fn after a host's report changed, on every replica; not at the
// same time twice for one host. Set before Run; fn must not block.
func (s *Service) OnReport(fn func(old, now *fleet.Host)) {
	s.hooks.report = append(s.hooks.report, fn)
}

// OnSignal calls fn for each signal, on the replica that heard it; the others find
// it by Signals. Set before Run; fn must not block.
func (s *Service) OnSignal(fn func(fleet.Signal)) { s.hooks.signal = append(s.hooks.signal, fn) }

func (s *Service) load(ctx context.Context) error {
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		var err error
		if s.revision, err = tx.Revision(ctx); err != nil {
			return err
		}
		q := resource.Query{Type: fleet.TypeHost, Limit: resource.MaxPage}
		for {
			page, err := tx.List(ctx, q)
			if err != nil {
				return err
			}
			for i := range page {
				if err := s.learn(&page[i]); err != nil {
					return err
				}
			}
			if len(page) < q.Limit {
				return nil
			}
			q.After = page[len(page)-1].ID.Key()
		}
	})
	if err != nil {
		return err
	}
	return s.pull(ctx, "")
}

// learn takes a host's document as it is now.
func (s *Service) learn(d *resource.Document) error {
	var p HostProperties
	if err := read(d, &p); err != nil {
		return fmt.Errorf("%s: %w", d.ID, err)
	}
	s.mu.Lock()
	h := s.hosts[p.ID]
	if h == nil {
		h = &host{}
		s.hosts[p.ID] = h
	}
	s.byKey[d.ID.Key()] = p.ID
	s.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.Revision <= h.revision {
		return nil
	}
	h.props, h.revision = p, d.Revision
	h.v.ID, h.v.Resource, h.v.Critical, h.v.Revoked, h.v.Joined = p.ID, d.ID, p.Critical, !p.Revoked.IsZero(), p.Joined
	h.relabel()
	h.rouse()
	return nil
}

// relabel joins what the host says of itself with what people say, who win.
func (h *host) relabel() {
	m := make(map[string]string, len(h.own)+len(h.props.Labels))
	maps.Copy(m, h.own)
	maps.Copy(m, h.props.Labels)
	h.v.Labels = m
}

// rouse ends the Wait that is held, so that it looks again.
func (h *host) rouse() {
	if h.wake != nil {
		close(h.wake)
		h.wake = nil
	}
}

// forget takes away a host whose document is gone: its certificate is worth
// nothing from now on.
func (s *Service) forget(id resource.ID) {
	s.mu.Lock()
	h := s.hosts[s.byKey[id.Key()]]
	delete(s.hosts, s.byKey[id.Key()])
	delete(s.byKey, id.Key())
	s.mu.Unlock()
	if h != nil {
		h.mu.Lock()
		h.v.Revoked = true
		h.rouse()
		h.mu.Unlock()
	}
}

func (s *Service) host(id string) *host {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.hosts[id]
}

// all are the hosts, in no order.
func (s *Service) all() []*host {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Collect(maps.Values(s.hosts))
}

// pull reads what other replicas gave and heard; node "" reads everything.
func (s *Service) pull(ctx context.Context, node string) error {
	grants, mark, err := s.Store.GrantsSince(ctx, s.grants)
	if err != nil {
		return err
	}
	s.grants = mark
	for i := range grants {
		if h := s.host(grants[i].Host); h != nil {
			h.mu.Lock()
			h.given(&grants[i])
			h.mu.Unlock()
		}
	}
	heard, mark, err := s.Store.PresenceSince(ctx, node, s.presence)
	if err != nil {
		return err
	}
	s.presence = mark
	for i := range heard {
		if h := s.host(heard[i].Host); h != nil {
			s.heardElsewhere(h, &heard[i])
		}
	}
	return nil
}

// given takes what the database says a host was given.
func (h *host) given(g *fleet.Grant) {
	if h.key != g.Key || !g.OldKey.IsZero() {
		h.key, h.oldKey = g.Key, g.OldKey
	}
	if g.AssignedAt.After(h.v.AssignedAt) {
		changed := h.v.Assigned != g.Assigned
		h.v.Assigned, h.v.AssignedAt = g.Assigned, g.AssignedAt
		if changed {
			h.rouse()
		}
	}
}

func (s *Service) heardElsewhere(h *host, p *fleet.Presence) {
	h.mu.Lock()
	if !p.Seen.After(h.v.Seen) {
		h.mu.Unlock()
		return
	}
	old := h.v
	h.v.Seen = p.Seen
	h.v.Online = s.Now().Sub(p.Seen) < lostAfter
	changed := p.Report.At.After(old.Report.At)
	if changed {
		h.v.Report = p.Report
	}
	if !maps.Equal(h.own, p.Labels) {
		h.own = p.Labels
		h.relabel()
	}
	now := h.v
	h.mu.Unlock()
	if changed {
		s.reported(&old, &now)
	}
}

func (s *Service) reported(old, now *fleet.Host) {
	for _, fn := range s.hooks.report {
		fn(old, now)
	}
}

// signal tells of a signal and stores it.
func (s *Service) signal(ctx context.Context, all ...fleet.Signal) {
	for _, sig := range all {
		for _, fn := range s.hooks.signal {
			fn(sig)
		}
	}
	if err := s.Events.RecordSignals(ctx, all); err != nil {
		s.Log.WarnContext(ctx, "signals_not_stored", slog.Int("count", len(all)), slog.Any("error", err))
	}
}

// Signal notes what another part of the server saw happen to hosts, for the
// rollouts that watch them.
func (s *Service) Signal(ctx context.Context, all ...fleet.Signal) { s.signal(ctx, all...) }

// Signals are those since a time, the oldest first, of all replicas.
func (s *Service) Signals(ctx context.Context, since time.Time) ([]fleet.Signal, error) {
	out, err := s.Events.SignalsSince(ctx, since)
	if err != nil {
		return nil, fmt.Errorf("signals since %s: %w", since.Format(time.RFC3339), err)
	}
	return out, nil
}

// Hosts returns the hosts below a place in the tree, in the order of their ids,
// as they are now. What it returns is the caller's, but for the labels, which
// are not to be changed.
func (s *Service) Hosts(_ context.Context, below resource.ID) ([]fleet.Host, error) {
	all := s.all()
	out := make([]fleet.Host, 0, len(all))
	for _, h := range all {
		h.mu.Lock()
		v := h.v
		h.mu.Unlock()
		if v.ID != "" && below.Contains(v.Resource) {
			out = append(out, v)
		}
	}
	slices.SortFunc(out, func(a, b fleet.Host) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// Name is the name of a host in the tree; "" for one that there is not.
func (s *Service) Name(id string) string {
	h := s.host(id)
	if h == nil {
		return ""
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.v.Resource.Name()
}

// Assign says which manifests are meant for hosts, and wakes those that wait;
// other replicas see it within their next look, half a second. A manifest whose
// scope does not hold the host is errs.Denied, one that there is not is
// errs.NotFound, a host that there is not is left out. Nothing is assigned then.
func (s *Service) Assign(ctx context.Context, all []fleet.Assignment) error {
	return s.assign(ctx, s.Store, all)
}

// AssignUnder is Assign by the holder of a lease: errs.Conflict when the holding
// is over.
func (s *Service) AssignUnder(ctx context.Context, f control.Fence, all []fleet.Assignment) error {
	return s.assign(ctx, f.Store(s.Store), all)
}

func (s *Service) assign(ctx context.Context, store control.Store, all []fleet.Assignment) error {
	groups := map[integrity.Digest][]string{}
	for _, a := range all {
		h := s.host(a.Host)
		if h == nil {
			continue
		}
		if !a.Manifest.IsZero() {
			m, err := s.manifest(ctx, a.Manifest)
			if err != nil {
				return fmt.Errorf("assign: %w", err)
			}
			h.mu.Lock()
			where := h.v.Resource
			h.mu.Unlock()
			if !m.id.Parent().Contains(where) {
				return fmt.Errorf("assign: manifest %v is for %s, the host is %s: %w", a.Manifest, m.id.Parent(), where, errs.Denied)
			}
		}
		groups[a.Manifest] = append(groups[a.Manifest], a.Host)
	}
	var at time.Time
	err := store.Write(ctx, func(tx control.Tx) error {
		t, err := of[interface {
			grantTx
			Now() time.Time
		}](tx)
		if err != nil {
			return err
		}
		at = t.Now()
		for m, ids := range groups {
			if err := t.Assign(ctx, m, ids); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("assign to %d hosts: %w", len(all), err)
	}
	for m, ids := range groups {
		for _, id := range ids {
			if h := s.host(id); h != nil {
				h.mu.Lock()
				h.given(&fleet.Grant{Key: h.key, Assigned: m, AssignedAt: at})
				h.mu.Unlock()
			}
		}
	}
	return nil
}

// Manifest returns a manifest of the tree, with the signed document; errs.NotFound
// if there is none. Nothing of it was verified.
func (s *Service) Manifest(ctx context.Context, digest integrity.Digest) (*codesign.Manifest, []byte, error) {
	m, err := s.manifest(ctx, digest)
	if err != nil {
		return nil, nil, err
	}
	return m.parsed, m.bundle, nil
}

// Chunk returns content by its digest, of at most limit bytes; errs.NotFound if it
// is not there, errs.Invalid if it is longer.
func (s *Service) Chunk(ctx context.Context, digest integrity.Digest, limit int) ([]byte, error) {
	var out []byte
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		t, err := of[chunkTx](tx)
		if err != nil {
			return err
		}
		var size int64
		if out, size, err = t.Chunk(ctx, digest, 0, limit); err == nil && size > int64(limit) {
			err = fmt.Errorf("chunk %v has %d bytes (at most %d): %w", digest, size, limit, errs.Invalid)
		}
		return err
	})
	return out, err
}

// maxManifests are kept in memory.
const maxManifests = 64

func (s *Service) manifest(ctx context.Context, digest integrity.Digest) (*knownManifest, error) {
	k := &s.manifests
	k.Lock()
	m := k.m[digest]
	k.Unlock()
	if m != nil {
		return m, nil
	}
	m = &knownManifest{}
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		t, err := of[interface {
			FindByName(ctx context.Context, kind, name string) (*resource.Document, error)
		}](tx)
		if err != nil {
			return err
		}
		d, err := t.FindByName(ctx, fleet.TypeManifest, digest.String())
		if err != nil {
			return err
		}
		var p ManifestProperties
		if err := read(d, &p); err != nil {
			return err
		}
		m.id, m.bundle = d.ID, p.Bundle
		m.parsed, err = codesign.UnverifiedManifest(p.Bundle)
		return err
	})
	if err == nil && m.parsed.Digest != digest {
		err = fmt.Errorf("the stored document is %v: %w", m.parsed.Digest, errs.Untrusted)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %v: %w", digest, err)
	}
	k.Lock()
	defer k.Unlock()
	if len(k.m) >= maxManifests {
		clear(k.m)
	}
	k.m[digest] = m
	return m, nil
}

// poll is how often a replica looks for what others did.
const poll = 300 * time.Millisecond

// Run does what must be done all the time, until ctx ends; it returns ctx's error.
func (s *Service) Run(ctx context.Context) error {
	var group sync.WaitGroup
	for _, loop := range []func(context.Context){s.follow, s.keepPresence, s.ingest.run, s.prune} {
		group.Go(func() { loop(ctx) })
	}
	if s.Shared {
		group.Go(func() { s.every(ctx, poll, "pull", func(ctx context.Context) error { return s.pull(ctx, s.node) }) })
	}
	group.Wait()
	return ctx.Err()
}

// every does something again and again, and logs when it fails.
func (s *Service) every(ctx context.Context, period time.Duration, what string, fn func(context.Context) error) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := fn(ctx); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "hosts_loop_failed", slog.String("what", what), slog.Any("error", err))
		}
	}
}

// follow learns of documents that people and other replicas change.
func (s *Service) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.Door.Watch(ctx, engine(), resource.ID{}, s.revision, func(c resource.Change) error {
			switch c.Document.ID.Type() {
			case strings.ToLower(fleet.TypeHost):
				if c.Deleted {
					s.forget(c.Document.ID)
				} else {
					return s.learn(&c.Document)
				}
			case strings.ToLower(fleet.TypeManifest):
				s.manifests.Lock()
				clear(s.manifests.m)
				s.manifests.Unlock()
			}
			return nil
		}, func(passed uint64) error { s.revision = passed; return nil })
		if ctx.Err() != nil {
			return
		}
		s.Log.WarnContext(ctx, "hosts_feed_failed", slog.Any("error", err))
		if errors.Is(err, errs.NotFound) { // compacted: read everything
			if err := s.load(ctx); err != nil {
				s.Log.WarnContext(ctx, "hosts_not_read", slog.Any("error", err))
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
