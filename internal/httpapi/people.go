package httpapi

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/identity"
)

// ClientID is what people sign on to at the built-in issuer: the command line,
// a public client (RFC 6749, section 2.1).
const ClientID = "ringwall"

// SigningKeys are the keys of the built-in issuer.
type SigningKeys interface {
	// Signing is the one that signs now.
	Signing() (*ecdsa.PrivateKey, error)
	// Public are those whose tokens count.
	Public() ([]*ecdsa.PublicKey, error)
}

// SignOn is what New needs to let people in with tokens of OpenID Connect.
type SignOn struct {
	Memory *control.SignOn
	Keys   SigningKeys
	// Base is the server's own URL, https://HOST[:PORT].
	Base string
}

// WithSignOn lets people in with tokens of the built-in issuer, which it adds
// with its public routes, and of those that documents name.
func WithSignOn(s SignOn) Option {
	return func(a *API) {
		a.people = &people{SignOn: s, issuer: s.Base + issuerPath, log: a.log, now: a.now, remotes: map[string]*remote{}}
		a.routes = append(a.routes, a.people.routes()...)
	}
}

// people tells whose token one of OpenID Connect is.
type people struct {
	SignOn
	issuer string // the built-in one
	log    *slog.Logger
	now    func() time.Time

	mu      sync.Mutex
	remotes map[string]*remote // by the name of the issuer's document
}

// looksLikeJWT tells a token of OpenID Connect from one of ours.
func looksLikeJWT(token string) bool { return strings.Count(token, ".") == 2 }

// Bounds of what issuers say.
const (
	maxTokenAhead = 24 * time.Hour // a token lasts at most so long
	maxGroupNames = 1000
	maxName       = 200 // bytes
)

// actor fails closed: an issuer that nobody named, that is away, or whose answer
// is odd lets nobody in. Who asks learns no more than that; the log says why.
func (p *people) actor(ctx context.Context, token string) (*control.Actor, error) {
	iss, err := identity.IssuerOf(token)
	if err != nil {
		return nil, err
	}
	if iss == p.issuer {
		return p.localActor(ctx, token)
	}
	all, err := p.Memory.Issuers(ctx)
	if err != nil {
		return nil, err
	}
	for name, conf := range all {
		if conf.URL != iss {
			continue
		}
		by, err := p.remote(name, &conf, all).actor(ctx, token)
		if err != nil && !errors.Is(err, errs.Denied) {
			p.log.WarnContext(ctx, "token_refused", slog.String("issuer", name), slog.Any("error", err))
			err = fmt.Errorf("the token of %s does not count here, or is over: %w", name, errs.Untrusted)
		}
		return by, err
	}
	return nil, fmt.Errorf("the token's issuer is not believed here: %w", errs.Untrusted)
}

func (p *people) localActor(ctx context.Context, token string) (*control.Actor, error) {
	t, err := oidc.NewVerifier(p.issuer, localKeys{p.Keys}, &oidc.Config{ClientID: ClientID, Now: p.now, SupportedSigningAlgs: []string{oidc.ES256}}).Verify(ctx, token)
	if err != nil {
		return nil, fmt.Errorf("the token does not count here, or is over: %w", errs.Untrusted)
	}
	var c identity.Claims
	if err := t.Claims(&c); err != nil {
		return nil, fmt.Errorf("token: %w: %w", err, errs.Untrusted)
	}
	return p.Memory.LocalActor(ctx, c.Subject, c.Generation)
}

// localKeys implements oidc.KeySet.
type localKeys struct{ keys SigningKeys }

func (l localKeys) VerifySignature(_ context.Context, token string) ([]byte, error) {
	public, err := l.keys.Public()
	if err != nil {
		return nil, err
	}
	b, err := identity.KeySet(public)
	if err != nil {
		return nil, err
	}
	set, err := identity.ParseKeys(b)
	if err != nil {
		return nil, err
	}
	return set.Verify(token)
}

// remote returns the issuer of a document, made anew when the document changed,
// and forgets those that are gone.
func (p *people) remote(name string, conf *control.Issuer, all map[string]control.Issuer) *remote {
	p.mu.Lock()
	defer p.mu.Unlock()
	for old := range p.remotes {
		if _, ok := all[old]; !ok {
			delete(p.remotes, old)
		}
	}
	b, _ := json.Marshal(conf) // strings and lists of them
	r := p.remotes[name]
	if r == nil || r.version != string(b) {
		r = &remote{conf: *conf, version: string(b), client: clientFor(conf), now: p.now}
		p.remotes[name] = r
	}
	return r
}

// clientFor is an HTTP client that goes where an issuer's document says and
// nowhere else: no redirects, and the CA of the document if it has one.
func clientFor(conf *control.Issuer) *http.Client {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if conf.CA != "" {
		c.RootCAs = x509.NewCertPool()
		c.RootCAs.AppendCertsFromPEM([]byte(conf.CA)) // checked when it was stored; else nobody is believed
	}
	return &http.Client{
		Timeout:       10 * time.Second,
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: c, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// How long the keys of an issuer elsewhere are used.
const (
	keysFresh = time.Hour        // then they are read again
	keysUsed  = 6 * time.Hour    // if that fails
	keysPause = 20 * time.Second // between tries: a flood of tokens is no flood there
)

// remote is an issuer elsewhere. It implements oidc.KeySet.
type remote struct {
	conf    control.Issuer
	version string
	client  *http.Client
	now     func() time.Time

	fetch sync.Mutex // held while keys are read
	mu    sync.Mutex
	keys  *identity.Keys
	read  time.Time
	tried time.Time
	err   error // of the last try
}

// VerifySignature implements oidc.KeySet. A key that is not known yet is looked
// for at the issuer, not more often than every keysPause.
func (r *remote) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	keys, err := r.current(ctx, keysFresh)
	if err != nil {
		return nil, err
	}
	payload, err := keys.Verify(token)
	if !errors.Is(err, errs.NotFound) {
		return payload, err
	}
	if keys, err = r.current(ctx, keysPause); err != nil {
		return nil, err
	}
	return keys.Verify(token)
}

func (r *remote) cached(maxAge time.Duration) (*identity.Keys, error, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	age, now := keysUsed, r.now()
	if maxAge < age && now.Sub(r.tried) >= keysPause {
		age = maxAge
	}
	if r.keys != nil && now.Sub(r.read) < age {
		return r.keys, nil, true
	}
	return nil, r.err, now.Sub(r.tried) < keysPause
}

// current returns keys that are not older than maxAge, or what there is if the
// issuer cannot be asked.
func (r *remote) current(ctx context.Context, maxAge time.Duration) (*identity.Keys, error) {
	if keys, err, ok := r.cached(maxAge); ok {
		return keys, err
	}
	r.fetch.Lock()
	defer r.fetch.Unlock()
	if keys, err, ok := r.cached(maxAge); ok { // another has asked meanwhile
		return keys, err
	}
	keys, err := r.readKeys(context.WithoutCancel(ctx)) // others wait for it too
	r.mu.Lock()
	r.tried, r.err = r.now(), err
	if err == nil {
		r.keys, r.read = keys, r.tried
	}
	r.mu.Unlock()
	if err == nil {
		return keys, nil
	}
	if keys, _, ok := r.cached(keysUsed); ok && keys != nil {
		return keys, nil
	}
	return nil, err
}

// readKeys asks the issuer where its keys are (OpenID Connect Discovery 1.0) and
// reads them.
func (r *remote) readKeys(ctx context.Context) (*identity.Keys, error) {
	var about struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	b, err := r.get(ctx, strings.TrimSuffix(r.conf.URL, "/")+"/.well-known/openid-configuration")
	if err == nil {
		err = json.Unmarshal(b, &about)
	}
	if err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	if about.Issuer != r.conf.URL {
		return nil, fmt.Errorf("discovery: the issuer calls itself %.200q: %w", about.Issuer, errs.Untrusted)
	}
	if b, err = r.get(ctx, about.Keys); err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	return identity.ParseKeys(b)
}

func (r *remote) get(ctx context.Context, where string) ([]byte, error) {
	const most = 512 << 10
	u, err := url.Parse(where)
	if err != nil || u.Scheme != "https" {
		return nil, fmt.Errorf("%.200q is no https URL: %w", where, errs.Untrusted)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		return nil, err
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s: %w", where, resp.Status, errs.Untrusted)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err == nil && len(b) > most {
		err = fmt.Errorf("%s: more than %d bytes: %w", where, most, errs.Untrusted)
	}
	return b, err
}

// actor checks a token and reads who it is about.
func (r *remote) actor(ctx context.Context, token string) (*control.Actor, error) {
	t, err := oidc.NewVerifier(r.conf.URL, r, &oidc.Config{SkipClientIDCheck: true, Now: r.now, SupportedSigningAlgs: identity.Algorithms()}).Verify(ctx, token)
	if err != nil {
		return nil, err
	}
	claims := map[string]json.RawMessage{}
	if err := t.Claims(&claims); err != nil {
		return nil, err
	}
	now := r.now()
	switch {
	case !r.forUs(t.Audience, text(claims["azp"])):
		return nil, fmt.Errorf("the token is for %.200q", t.Audience)
	case t.Subject == "" || len(t.Subject) > 255:
		return nil, errors.New("the token is about nobody")
	case t.Expiry.Sub(now) > maxTokenAhead || t.IssuedAt.Sub(now) > 5*time.Minute:
		return nil, fmt.Errorf("the token is of %s and lasts until %s", t.IssuedAt, t.Expiry)
	}
	groups := texts(claims[cmp.Or(r.conf.GroupsClaim, "groups")])
	if len(groups) > maxGroupNames {
		return nil, fmt.Errorf("%d groups", len(groups))
	}
	id := control.UserID(r.conf.URL, t.Subject)
	name := text(claims[cmp.Or(r.conf.NameClaim, "preferred_username")])
	by := &control.Actor{ID: id, Name: id}
	if name != "" && len(name) <= maxName {
		by.Name = name + " (" + id + ")"
	}
	if len(r.conf.AllowedGroups) > 0 && !slices.ContainsFunc(groups, func(g string) bool { return slices.Contains(r.conf.AllowedGroups, g) }) {
		return nil, fmt.Errorf("%s is in none of the groups that may come in: %w", by.Name, errs.Denied)
	}
	for _, g := range groups {
		by.Groups = append(by.Groups, control.GroupID(r.conf.URL, g))
	}
	return by, nil
}

// forUs checks aud, and azp where there are several (OpenID Connect Core 1.0,
// section 3.1.3.7).
func (r *remote) forUs(audience []string, authorised string) bool {
	ours := func(a string) bool { return a == r.conf.ClientID || slices.Contains(r.conf.Audiences, a) }
	return slices.ContainsFunc(audience, ours) && (authorised == "" && len(audience) == 1 || ours(authorised))
}

// text reads a claim that is a text; "" if it is none.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// texts reads a claim that is a list of texts, or one.
func texts(raw json.RawMessage) []string {
	var list []string
	if json.Unmarshal(raw, &list) == nil {
		return list
	}
	if s := text(raw); s != "" {
		return []string{s}
	}
	return nil
}
