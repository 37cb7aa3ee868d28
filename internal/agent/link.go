package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// fileLink is who this host is in the fleet, with its key: mode 0600, and guarded
// as everything below the state directory.
const fileLink = dirFleet + "/link.json"

// Bounds of the link.
const (
	maxLink     = 256 << 10
	maxAnswer   = 16<<20 + 64<<10 // bytes of one message: attestation has the largest
	callWait    = time.Minute
	dialWait    = 10 * time.Second
	maxBackoff  = 15 * time.Minute // whatever the server asks for
	maxAddrs    = 16
	warnEvery   = 10 * time.Minute // of a server that does not answer
	renewPart   = 3                // renew when a third of a certificate's life is left, at the latest
	renewJitter = 10               // within a tenth of its life
	renewAgain  = 10 * time.Minute
)

// joined is a host's membership in a fleet. It is replaced, never changed.
type joined struct {
	Server       string   `json:"server"`
	CA           string   `json:"ca"` // PEM: the only ones that may vouch for the server
	Name         string   `json:"name"`
	Labels       []string `json:"labels,omitempty"`   // KEY=VALUE
	Host         string   `json:"host,omitempty"`     // id that the server gave; "" before it answered
	Resource     string   `json:"resource,omitempty"` // place in the tree
	Key          string   `json:"key"`                // PEM, made here
	Certificates string   `json:"certificates,omitempty"`
	Renew        int64    `json:"renew_us,omitempty"`
	Revision     uint64   `json:"revision,omitempty"` // of the last directives
	Isolated     bool     `json:"isolated,omitempty"`
	Addresses    []string `json:"addresses,omitempty"` // of the server, where it last answered
}

// LinkStatus is how this host's membership in a fleet stands.
type LinkStatus struct {
	Server     string     `json:"server"`
	CA         []string   `json:"ca"` // names
	Host       string     `json:"host,omitempty"`
	Name       string     `json:"name"`
	Resource   string     `json:"resource,omitempty"`
	State      string     `json:"state"` // joining, connecting, connected, unreachable, expired
	Answered   *time.Time `json:"answered,omitempty"`
	Error      string     `json:"error,omitempty"`
	Expires    *time.Time `json:"certificate_expires,omitempty"`
	Phase      string     `json:"phase"` // none, provisional, confirmed, reverted, refused
	Manifest   string     `json:"manifest,omitempty"`
	Failed     string     `json:"failed,omitempty"`
	Reason     string     `json:"reason,omitempty"`
	Spooled    uint64     `json:"spooled_bytes"`
	Dropped    uint64     `json:"dropped"`
	Isolated   bool       `json:"isolated"`
	LocalItems int        `json:"local_releases"` // handed in on the host, not by a manifest
}

// link talks to the fleet's server, if this host is in a fleet. Enforcement never
// waits for it: every call of the agent returns at once.
type link struct {
	a *Agent

	mu       sync.Mutex // never held while a.mu is taken
	joined   *joined    // nil: in no fleet
	conn     *conn
	turn     chan struct{} // closed when what is above changes
	alive    chan struct{} // the server answers again
	release  context.CancelFunc
	blocks   *spool // nil: no room for one
	inv      *spool
	answered time.Time // by the wall clock, for people
	failure  error
	collect  bool
	attested int64 // when, by the server's clock
	hint     time.Duration
	isolated bool // is in force
	cleared  bool // nothing of an isolation is left
	// isolation is what keeps this host from being isolated, or released.
	isolation  error
	problem    string
	attesting  bool
	renewNext  time.Time
	mended     time.Time // of the wait loop alone
	units      []string  // failed ones, the last time that somebody looked
	unitsKnown bool
	starts     uint32         // of the agent, since the boot
	table      tableDigest    // under a.mu
	joining    sync.Mutex     // one at a time joins or leaves
	others     sync.WaitGroup // what runs beside the loops

	invMu     sync.Mutex
	resendAll bool
	inventory
}

// conn is a way to the server with one identity.
type conn struct {
	agentpb.AgentClient
	transport *http.Transport
}

func newLink(a *Agent) *link {
	l := &link{a: a, turn: make(chan struct{}), alive: make(chan struct{}, 1)}
	j, err := a.state.readLink()
	switch {
	case err == nil:
		l.joined = j
	case !errors.Is(err, errs.NotFound):
		a.state.noteDamage("this host's place in the fleet is damaged; enforcement goes on without the server: join again: %v", err)
	}
	return l
}

// open begins to keep records for the server, if there is one.
func (l *link) open() {
	l.starts = l.a.countStart()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.joined != nil && l.joined.Host != "" {
		l.begin()
	}
}

// begin opens the spools and a way to the server. l.mu is held.
func (l *link) begin() {
	s := l.a.state
	var err error
	if l.blocks == nil {
		if l.blocks, err = openSpool(s.path(dirSpool, "blocks"), agentpb.Lane_LANE_BLOCKS, spoolBlocks); err != nil {
			l.a.log.Error("nothing can be kept for the server", slog.Any("error", err))
		}
	}
	if l.inv == nil {
		if l.inv, err = openSpool(s.path(dirSpool, "inventory"), agentpb.Lane_LANE_INVENTORY, spoolInv); err != nil {
			l.a.log.Error("no inventory can be kept for the server", slog.Any("error", err))
		}
	}
	l.dial()
}

// dial makes a new way to the server. l.mu is held.
func (l *link) dial() {
	if l.conn != nil {
		l.conn.transport.CloseIdleConnections()
		l.conn = nil
	}
	if l.joined != nil && l.joined.Host != "" {
		c, err := l.connect(l.joined)
		if err != nil {
			l.failure = err
		}
		l.conn = c
	}
	l.stir()
}

// stir ends the call that is held and wakes who waits. l.mu is held.
func (l *link) stir() {
	close(l.turn)
	l.turn = make(chan struct{})
	if l.release != nil {
		l.release()
	}
}

// changed has the server told at once how the host stands now; fresh by a new
// connection, which proves that one can be made.
func (l *link) changed(fresh bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if fresh {
		l.dial()
		return
	}
	l.stir()
}

func (l *link) collectSoon() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.collect = true
}

func (s *State) readLink() (*joined, error) {
	raw, err := readFile(s.path(fileLink), maxLink)
	if err != nil {
		return nil, err
	}
	j := &joined{}
	if err := pki.UnmarshalStrict(raw, j, maxLink); err != nil {
		return nil, fmt.Errorf("%s: %w", fileLink, err)
	}
	if _, err := checkServer(j.Server); err != nil {
		return nil, fmt.Errorf("%s: %w", fileLink, err)
	}
	return j, nil
}

func (s *State) writeLink(j *joined) error {
	raw, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	return host.WriteFile(s.path(fileLink), append(raw, '\n'), 0o600)
}

// checkServer refuses any address but https://HOST[:PORT].
func checkServer(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" || len(raw) > 512 {
		return nil, fmt.Errorf("server %.200q: want https://HOST[:PORT]: %w", raw, errs.Invalid)
	}
	return u, nil
}

func (j *joined) pool() (*x509.CertPool, []string, error) {
	p := x509.NewCertPool()
	var names []string
	rest := []byte(j.CA)
	for len(rest) > 0 {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil || b.Type != "CERTIFICATE" || !c.IsCA {
			return nil, nil, fmt.Errorf("CA of the server: want certificates of authorities: %w", errors.Join(err, errs.Invalid))
		}
		p.AddCert(c)
		names = append(names, c.Subject.CommonName)
	}
	if len(names) == 0 {
		return nil, nil, fmt.Errorf("CA of the server: no certificate: %w", errs.Invalid)
	}
	return p, names, nil
}

// keyPair is the host's certificate with its key.
func (j *joined) keyPair() (*tls.Certificate, error) {
	c, err := tls.X509KeyPair([]byte(j.Certificates), []byte(j.Key))
	if err != nil {
		return nil, fmt.Errorf("this host's certificate: %w: %w", err, errs.Invalid)
	}
	return &c, nil
}

func (j *joined) key() (*ecdsa.PrivateKey, error) { return pki.DecodeKey([]byte(j.Key), nil) }

// transport is for one server and nobody else: TLS 1.3, only the given CA, HTTP/2.
func (l *link) transport(j *joined, client *tls.Certificate) (*http.Transport, error) {
	pool, _, err := j.pool()
	if err != nil {
		return nil, err
	}
	t := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool}
	if client != nil {
		t.Certificates = []tls.Certificate{*client}
	}
	return &http.Transport{
		TLSClientConfig: t, ForceAttemptHTTP2: true, TLSHandshakeTimeout: dialWait, IdleConnTimeout: 2 * time.Minute, DialContext: l.dialServer,
		HTTP2: &http.HTTP2Config{SendPingTimeout: 20 * time.Second, PingTimeout: 10 * time.Second},
	}, nil
}

func (l *link) connect(j *joined) (*conn, error) {
	pair, err := j.keyPair()
	if err != nil {
		return nil, err
	}
	t, err := l.transport(j, pair)
	if err != nil {
		return nil, err
	}
	return &conn{agentpb.NewAgentClient(&http.Client{Transport: t}, j.Server, clientOptions()...), t}, nil
}

func clientOptions() []connect.ClientOption {
	return []connect.ClientOption{connect.WithReadMaxBytes(maxAnswer), connect.WithSendMaxBytes(maxAnswer)}
}

// dialServer finds the server by name, or, while this host is isolated and no name
// can be asked for, where it answered last.
func (l *link) dialServer(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialWait}
	l.mu.Lock()
	known, isolated := []string(nil), l.isolated
	if l.joined != nil {
		known = l.joined.Addresses
	}
	l.mu.Unlock()
	var all error
	if isolated {
		for _, a := range known {
			c, err := d.DialContext(ctx, network, a)
			if err == nil {
				return c, nil
			}
			all = errors.Join(all, err)
		}
	}
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, errors.Join(err, all)
	}
	l.learn(c.RemoteAddr().String())
	return c, nil
}

// learn keeps where the server was reached, for isolation.
func (l *link) learn(addr string) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return
	}
	_ = l.update(func(j *joined) bool {
		if slices.Contains(j.Addresses, addr) {
			return false
		}
		j.Addresses = append([]string{addr}, j.Addresses[:min(len(j.Addresses), maxAddrs-1)]...)
		return true
	}) // without it isolation waits for the next connection
}

// update changes the membership durably, if fn says so.
func (l *link) update(fn func(*joined) bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.joined == nil {
		return nil
	}
	j := *l.joined
	j.Addresses = slices.Clone(j.Addresses)
	if !fn(&j) {
		return nil
	}
	if err := l.a.state.writeLink(&j); err != nil {
		return err
	}
	l.joined = &j
	return nil
}

// now is what the loops work with.
func (l *link) now() (*joined, *conn, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.joined, l.conn, l.turn
}

// run talks to the server until ctx ends.
func (l *link) run(ctx context.Context) {
	var w sync.WaitGroup
	w.Go(func() { l.waitLoop(ctx) })
	w.Go(func() { l.pushLoop(ctx) })
	w.Go(func() { l.sampleLoop(ctx) })
	w.Wait()
	l.others.Wait()
}

// close ends the lanes; what they hold is for the next agent to send.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range []*spool{l.blocks, l.inv} {
		if s != nil {
			s.close()
		}
	}
	l.blocks, l.inv = nil, nil
}

// waitLoop asks again and again what is meant for this host. A server that is gone
// changes nothing but how often.
func (l *link) waitLoop(ctx context.Context) {
	fails := 0
	for ctx.Err() == nil {
		j, c, turn := l.now()
		if j == nil || c == nil {
			l.sleep(ctx, turn, time.Hour)
			continue
		}
		l.tidy(ctx)
		l.renew(ctx, false)
		pause, err := l.once(ctx, j, c)
		switch {
		case err == nil:
			l.mend(ctx, c)
			fails = 0
		case errors.Is(err, errStirred):
			continue
		default:
			fails++
			pause = l.backoff(fails)
		}
		l.note(ctx, err)
		_, _, turn = l.now()
		l.sleep(ctx, turn, pause)
	}
}

// errStirred says that a call was ended because something else is to be said.
var errStirred = errors.New("the state changed")

// sleep waits, for a change at most.
func (l *link) sleep(ctx context.Context, turn <-chan struct{}, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-turn:
	case <-ctx.Done():
	}
}

// backoff is a random time up to one that doubles with each failure: hosts that
// lost their server together do not come back together.
func (l *link) backoff(fails int) time.Duration {
	l.mu.Lock()
	most := max(l.a.opts.pace.backoffMax, l.hint)
	l.mu.Unlock()
	up := min(l.a.opts.pace.backoff<<min(fails, 16), most)
	return time.Duration(rand.Int64N(int64(up) + 1)) //nolint:gosec // to spread load
}

func (l *link) note(ctx context.Context, err error) {
	l.mu.Lock()
	first := err != nil && l.failure == nil
	if err == nil && l.failure != nil {
		select {
		case l.alive <- struct{}{}: // records need not wait for their own next try
		default:
		}
	}
	l.failure = err
	if err == nil {
		l.answered = l.a.opts.Now()
	}
	l.mu.Unlock()
	if first {
		l.a.log.WarnContext(ctx, "the fleet's server does not answer; what is enforced stays", slog.Any("error", err))
	}
}

// once makes one held call and does what the answer says.
func (l *link) once(ctx context.Context, j *joined, c *conn) (pause time.Duration, err error) {
	state := l.a.fleetState()
	l.a.mu.Lock()
	have := l.a.outcome.Received
	l.a.mu.Unlock()
	q := &agentpb.WaitRequest{State: state, HaveDirectives: j.Revision}
	if !have.IsZero() {
		q.HaveManifest = have[:]
	}
	held, release := context.WithTimeout(ctx, l.a.opts.pace.waitFor)
	defer release()
	l.mu.Lock()
	if l.conn != c { // changed meanwhile
		l.mu.Unlock()
		return 0, errStirred
	}
	stirred := false
	l.release = func() { stirred = true; release() }
	l.mu.Unlock()
	began := time.Now()
	resp, err := c.Wait(held, connect.NewRequest(q))
	l.mu.Lock()
	l.release = nil
	was := stirred
	l.mu.Unlock()
	if err != nil {
		if was && ctx.Err() == nil {
			return 0, errStirred
		}
		return 0, fmt.Errorf("wait: %w", err)
	}
	l.a.answered(began)
	l.note(ctx, nil)
	l.mu.Lock()
	l.hint = min(max(time.Duration(resp.Msg.GetWaitUs())*time.Microsecond, 0), maxBackoff)
	pause = l.hint
	l.mu.Unlock()
	news := len(resp.Msg.GetManifest()) > 0 || resp.Msg.GetDirectives() != nil
	switch idle := l.a.opts.pace.idle; {
	case news:
		pause = idle / 10 // what comes of it is told soon
	case time.Since(began) < idle:
		pause = max(pause, idle) // a server that never holds a call
	}
	if d := resp.Msg.GetDirectives(); d != nil {
		if err := l.direct(ctx, d, resp.Msg.GetNowUs()); err != nil {
			return 0, err
		}
	}
	if m := resp.Msg.GetManifest(); len(m) > 0 {
		where, err := resource.ParseID(j.Resource)
		if err != nil {
			return 0, err
		}
		if err := l.a.takeManifest(ctx, m, where, l.fetch(c)); err != nil {
			return 0, err
		}
	}
	return pause, nil
}

// fetchTries is how often a piece is asked for, so that a short trouble, or a
// server that has enough to do, does not begin a long download anew.
const fetchTries = 6

// fetch gets content over a connection.
func (l *link) fetch(c *conn) fetcher {
	once := func(ctx context.Context, q *agentpb.ChunkRequest) (*connect.Response[agentpb.ChunkResponse], error) {
		ctx, stop := context.WithTimeout(ctx, callWait)
		defer stop()
		return c.Chunk(ctx, connect.NewRequest(q))
	}
	return func(ctx context.Context, d integrity.Digest, offset uint64) ([]byte, uint64, error) {
		for try := 1; ; try++ {
			r, err := once(ctx, &agentpb.ChunkRequest{Sha256: d[:], Offset: offset})
			if err == nil {
				return r.Msg.GetData(), r.Msg.GetSize(), nil
			}
			code := connect.CodeOf(err)
			if code != connect.CodeResourceExhausted && code != connect.CodeUnavailable || try == fetchTries || ctx.Err() != nil {
				return nil, 0, err
			}
			l.sleep(ctx, nil, l.backoff(try))
		}
	}
}

// tidy removes content that is of no use any more, while none is fetched.
func (l *link) tidy(ctx context.Context) {
	l.mu.Lock()
	due := l.collect
	l.collect = false
	l.mu.Unlock()
	if !due {
		return
	}
	l.a.mu.Lock()
	err := l.a.state.collect()
	l.a.mu.Unlock()
	if err != nil {
		l.a.log.WarnContext(ctx, "remove content that no manifest names", slog.Any("error", err))
	}
}

// mend fetches again what came by the manifest in force and was damaged on this
// host's disk, and authorises it again.
func (l *link) mend(ctx context.Context, c *conn) {
	a := l.a
	a.mu.Lock()
	in := a.loaded
	broken := in != nil && slices.ContainsFunc(in.skipped, func(s Skipped) bool { return s.given })
	a.mu.Unlock()
	if !broken || time.Since(l.mended) < a.opts.pace.backoffMax {
		return
	}
	l.mended = time.Now()
	if a.state.sound(in.given) {
		return // another reason: its own signature, or the policy's
	}
	err := a.state.obtainItems(ctx, in.given.Index, l.fetch(c))
	if err == nil && !a.state.sound(in.given) { // of a list that came just now
		err = a.state.obtainItems(ctx, in.given.Index, l.fetch(c))
	}
	if err == nil {
		a.mu.Lock()
		if a.loaded == in {
			err = a.recompile(ctx)
		}
		a.mu.Unlock()
	}
	if err != nil {
		a.log.WarnContext(ctx, "fetch again what was damaged", slog.Any("error", err))
		return
	}
	a.pipe.notice(noticeState, "content of the manifest in force was damaged on the disk and was fetched again")
}

// renew gets the next certificate, for a new key, when it is time.
func (l *link) renew(ctx context.Context, now bool) {
	j, c, _ := l.now()
	if j == nil || c == nil || !now && !l.renewDue(j) {
		return
	}
	if err := l.renewNow(ctx, j, c); err != nil {
		l.mu.Lock()
		l.renewNext = time.Now().Add(renewAgain/2 + time.Duration(rand.Int64N(int64(renewAgain)))) //nolint:gosec // to spread load
		l.mu.Unlock()
		l.a.log.WarnContext(ctx, "renew this host's certificate", slog.Any("error", err))
	}
}

// renewDue also says so when a third of the certificate's life is left, whatever
// the server said.
func (l *link) renewDue(j *joined) bool {
	l.mu.Lock()
	next := l.renewNext
	l.mu.Unlock()
	if time.Now().Before(next) {
		return false
	}
	pair, err := j.keyPair()
	if err != nil {
		return false
	}
	leaf := pair.Leaf
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	at := leaf.NotAfter.Add(-life / renewPart)
	if j.Renew != 0 {
		if t := time.UnixMicro(j.Renew); t.Before(at) {
			at = t
		}
	}
	// each host at another time, the same one every time it is asked
	spread := time.Duration(leaf.SerialNumber.Bits()[0]%1000) * (life / renewJitter / 1000)
	return l.a.opts.Now().After(at.Add(-spread))
}

func (l *link) renewNow(ctx context.Context, j *joined, c *conn) error {
	ctx, stop := context.WithTimeout(ctx, callWait)
	defer stop()
	keyPEM, csr, err := newCSR(j.Name)
	if err != nil {
		return err
	}
	resp, err := c.Renew(ctx, connect.NewRequest(&agentpb.RenewRequest{Csr: csr}))
	if err != nil {
		return err
	}
	chain, err := checkChain(resp.Msg.GetCertificates(), keyPEM, l.a.opts.Now())
	if err != nil {
		return err
	}
	err = l.update(func(n *joined) bool {
		if n.Key != j.Key {
			return false // joined anew meanwhile
		}
		n.Key, n.Certificates, n.Renew = keyPEM, chain, resp.Msg.GetRenewUs()
		return true
	})
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dial()
	return nil
}
