package httpapi_test

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"ringwall/internal/control"
	"ringwall/internal/httpapi"
	"ringwall/internal/identity"
	"ringwall/internal/pki"
	"ringwall/internal/rbac"
	"ringwall/internal/store"
	"ringwall/internal/testkit"
)

const password = "correct horse battery"

// ring is signing keys that a test can change.
type ring struct {
	mu   sync.Mutex
	keys []*ecdsa.PrivateKey
}

func (r *ring) add(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keys = append(r.keys, k)
	return k
}

func (r *ring) Signing() (*ecdsa.PrivateKey, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keys[len(r.keys)-1], nil
}

func (r *ring) Public() (out []*ecdsa.PublicKey, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.keys {
		out = append(out, &k.PublicKey)
	}
	return out, nil
}

// clock is a time that tests move.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time       { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) move(d time.Duration) { c.ahead.Add(int64(d)) }

type signOnLab struct {
	*server
	http  *http.Client
	keys  *ring
	clock *clock
	ca    string
}

func newSignOnLab(t *testing.T) *signOnLab {
	t.Helper()
	return newSignOnLabOn(t, "sqlite:"+t.TempDir())
}

func newSignOnLabOn(t *testing.T, database string) *signOnLab {
	t.Helper()
	s, err := store.Open(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	door, err := control.New(shelf{s})
	if err != nil {
		t.Fatal(err)
	}
	l := &signOnLab{server: &server{t: t}, keys: &ring{}, clock: &clock{}}
	l.keys.add(t)
	if l.admin, err = door.Bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(nil)
	base := "https://" + srv.Listener.Addr().String()
	srv.Config.Handler = httpapi.New(door, slog.New(slog.DiscardHandler), l.clock.now,
		httpapi.WithSignOn(httpapi.SignOn{Memory: control.NewSignOn(door), Keys: l.keys, Base: base}))
	srv.StartTLS()
	t.Cleanup(srv.Close)
	l.url, l.http = base, srv.Client()
	l.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	l.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	return l
}

func (l *signOnLab) call(token, method, path, body string) reply {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), method, l.url+path, strings.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	resp, err := l.http.Do(req)
	if err != nil {
		l.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return reply{resp, string(b)}
}

func (l *signOnLab) post(path string, fields ...string) reply {
	l.t.Helper()
	v := url.Values{}
	for i := 0; i+1 < len(fields); i += 2 {
		v.Set(fields[i], fields[i+1])
	}
	return l.call("", http.MethodPost, "/ringwall/issuer"+path, v.Encode())
}

func (l *signOnLab) putUser(name, more string) {
	l.t.Helper()
	hash := cheapHash()
	if r := l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/users/"+name, `{"properties":{"displayName":"Ana","passwordHash":"`+hash+`"`+more+`}}`); r.StatusCode >= 300 || strings.Contains(r.body, "argon2id") {
		l.t.Fatalf("%d %s", r.StatusCode, r.body)
	}
}

func (l *signOnLab) assign(role, principal string) {
	l.t.Helper()
	l.want(201, l.call(l.admin, http.MethodPut, "/providers/Microsoft.Authorization/roleAssignments/x"+fmt.Sprint(time.Now().UnixNano()),
		fmt.Sprintf(`{"properties":{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/%s","principalId":%q}}`, role, principal)))
}

type tokens struct {
	ID      string `json:"id_token"`
	Refresh string `json:"refresh_token"`
	Error   string `json:"error"`
}

func (l *signOnLab) tokens(r reply) (out tokens) {
	l.t.Helper()
	if err := json.Unmarshal([]byte(r.body), &out); err != nil {
		l.t.Fatalf("%d %s", r.StatusCode, r.body)
	}
	return out
}

// deviceSignOn signs somebody on by a code that is entered on another device.
func (l *signOnLab) deviceSignOn(name string) tokens {
	l.t.Helper()
	var d struct {
		Device string `json:"device_code"`
		User   string `json:"user_code"`
	}
	if err := json.Unmarshal([]byte(l.want(200, l.post("/device", "client_id", "ringwall", "scope", "openid")).body), &d); err != nil {
		l.t.Fatal(err)
	}
	l.want(200, l.post("/activate", "user_code", strings.ToLower(d.User), "username", name, "password", password), "Signed on")
	return l.tokens(l.want(200, l.post("/token", "client_id", "ringwall", "grant_type", "urn:ietf:params:oauth:grant-type:device_code", "device_code", d.Device)))
}

func TestDevice(t *testing.T) {
	l := newSignOnLab(t)
	l.putUser("ana", "")
	var d struct {
		Device   string `json:"device_code"`
		User     string `json:"user_code"`
		Complete string `json:"verification_uri_complete"`
		Interval int
	}
	if err := json.Unmarshal([]byte(l.want(200, l.post("/device", "client_id", "ringwall")).body), &d); err != nil {
		t.Fatal(err)
	}
	poll := func() reply {
		return l.post("/token", "client_id", "ringwall", "grant_type", "urn:ietf:params:oauth:grant-type:device_code", "device_code", d.Device)
	}
	l.want(400, poll(), "authorization_pending")
	l.want(400, poll(), "slow_down")
	l.clock.move(6 * time.Second)
	l.want(400, poll(), "authorization_pending")
	shown := l.want(200, l.call("", http.MethodGet, strings.TrimPrefix(d.Complete, l.url), ""), d.User)
	for h, want := range map[string]string{"Content-Security-Policy": "default-src 'none'", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"} {
		if !strings.Contains(shown.Header.Get(h), want) {
			t.Errorf("%s: %q", h, shown.Header.Get(h))
		}
	}
	l.want(401, l.post("/activate", "user_code", d.User, "username", "ana", "password", "wrong"), "name or password is wrong")
	l.want(401, l.post("/activate", "user_code", d.User, "username", "nobody", "password", password), "name or password is wrong")
	l.want(401, l.post("/activate", "user_code", d.User, "username", "../tokens/x", "password", password), "name or password is wrong")
	l.want(401, l.post("/activate", "user_code", "BBBB-BBBB", "username", "ana", "password", password), "no sign-on waits")
	l.want(401, l.post("/activate", "user_code", "<script>", "username", "<script>", "password", password), "name or password is wrong")
	l.want(200, l.post("/activate", "user_code", strings.ToLower(strings.ReplaceAll(d.User, "-", " ")), "username", "Ana", "password", password), "Signed on")
	l.want(401, l.post("/activate", "user_code", d.User, "username", "ana", "password", password), "no sign-on waits") // once
	got := l.tokens(l.want(200, poll()))
	l.want(400, poll(), "expired_token") // once
	l.want(400, l.post("/token", "client_id", "ringwall", "grant_type", "password"), "unsupported_grant_type")
	l.want(400, l.post("/token", "client_id", "other", "grant_type", "refresh_token"), "invalid_client")

	// Somebody else's client understands the token, by discovery.
	ctx := oidc.ClientContext(t.Context(), l.http)
	provider, err := oidc.NewProvider(ctx, l.url+"/ringwall/issuer")
	if err != nil {
		t.Fatal(err)
	}
	token, err := provider.Verifier(&oidc.Config{ClientID: "ringwall", Now: l.clock.now}).Verify(ctx, got.ID)
	if err != nil || token.Subject != "ana" {
		t.Errorf("%+v, %v", token, err)
	}
	// It says who she is, and no more: roles say what she may.
	l.want(403, l.call(got.ID, http.MethodGet, "/providers/Ringwall.Identity/users/ana", ""), "local|ana may not")
	l.assign(rbac.Reader, "local|ana")
	if r := l.want(200, l.call(got.ID, http.MethodGet, "/providers/Ringwall.Identity/users/ana", "")); strings.Contains(r.body, "argon2") {
		t.Error(r.body)
	}
	if r := l.want(200, l.call(l.admin, http.MethodGet, "/ringwall/audit", "")); strings.Count(r.body, "signOn") != 7 || strings.Contains(r.body, password) || strings.Contains(r.body, "argon2id") {
		t.Errorf("%d sign-ons are recorded, or a secret: %s", strings.Count(r.body, "signOn"), r.body)
	}
}

func TestSession(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { testSession(t, newSignOnLab(t)) })
	t.Run("postgres", func(t *testing.T) { testSession(t, newSignOnLabOn(t, testkit.StartPostgres(t).Database())) })
}

func testSession(t *testing.T, l *signOnLab) {
	t.Helper()
	l.putUser("ana", "")
	l.assign(rbac.Reader, "local|ana")
	works := func(token string) bool {
		return l.call(token, http.MethodGet, "/providers/Ringwall.Identity/users/ana", "").StatusCode == http.StatusOK
	}
	refresh := func(token string) reply {
		return l.post("/token", "client_id", "ringwall", "grant_type", "refresh_token", "refresh_token", token)
	}
	one := l.deviceSignOn("ana")
	l.clock.move(16 * time.Minute)
	if works(one.ID) {
		t.Error("a token that is over works")
	}
	two := l.tokens(l.want(200, refresh(one.Refresh)))
	if !works(two.ID) || two.Refresh == one.Refresh {
		t.Error("a refreshed token does not work")
	}
	// A key that is replaced still counts for what it signed.
	l.keys.add(t)
	three := l.tokens(l.want(200, refresh(two.Refresh)))
	if !works(two.ID) || !works(three.ID) {
		t.Error("after a new key something does not work")
	}
	// A refresh token that comes twice ends the session, for the thief and the owner.
	l.want(400, refresh(one.Refresh), "invalid_grant")
	l.want(400, refresh(three.Refresh), "invalid_grant")
	four := l.deviceSignOn("ana")
	l.want(200, l.post("/revoke", "token", four.Refresh))
	l.want(200, l.post("/revoke", "token", "unknown"))
	l.want(400, refresh(four.Refresh), "invalid_grant")
	five := l.deviceSignOn("ana")
	l.putUser("ana", "") // a new hash
	if works(five.ID) {
		t.Error("a token from before the password changed works")
	}
	l.want(400, refresh(five.Refresh), "invalid_grant")
	six := l.deviceSignOn("ana")
	l.want(200, l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/users/ana", `{"properties":{"disabled":true}}`))
	if works(six.ID) {
		t.Error("a disabled user goes on")
	}
	l.want(401, l.post("/activate", "user_code", "BBBB-BBBB", "username", "ana", "password", password), "name or password is wrong")
	l.want(200, l.call(l.admin, http.MethodDelete, "/providers/Ringwall.Identity/users/ana", ""))
	if works(six.ID) {
		t.Error("a deleted user goes on")
	}
	l.keys.mu.Lock()
	l.keys.keys = l.keys.keys[1:]
	l.keys.mu.Unlock()
	if works(two.ID) {
		t.Error("a token of a key that was thrown away works")
	}
}

func TestAuthorize(t *testing.T) {
	l := newSignOnLab(t)
	l.putUser("ana", "")
	const verifier, back = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", "http://127.0.0.1:4321/callback"
	good := []string{
		"client_id", "ringwall", "redirect_uri", back, "response_type", "code", "scope", "openid profile", "state", "s1", "nonce", "n1",
		"code_challenge", identity.Challenge(verifier), "code_challenge_method", "S256",
	}
	with := func(more ...string) []string { return append(append([]string{}, good...), more...) }
	query := func(fields []string) string {
		v := url.Values{}
		for i := 0; i+1 < len(fields); i += 2 {
			v.Set(fields[i], fields[i+1])
		}
		return "/ringwall/issuer/authorize?" + v.Encode()
	}
	l.want(200, l.call("", http.MethodGet, query(with("state", `"><script>`)), ""), `name="nonce" value="n1"`, "&#34;&gt;&lt;script&gt;")
	for name, tc := range map[string]struct {
		fields []string
		want   string // in Location; "" for no redirect
	}{
		"elsewhere":              {with("redirect_uri", "https://evil.example/callback"), ""},
		"a host that begins so":  {with("redirect_uri", "http://127.0.0.1.evil.example/callback"), ""},
		"a user that looks like": {with("redirect_uri", "http://127.0.0.1:1@evil.example/"), ""},
		"another client":         {with("client_id", "other"), ""},
		"implicit":               {with("response_type", "token"), "error=unsupported_response_type"},
		"plain PKCE":             {with("code_challenge_method", "plain"), "error=invalid_request"},
		"no PKCE":                {with("code_challenge", ""), "error=invalid_request"},
		"no OpenID":              {with("scope", "profile"), "error=invalid_scope"},
	} {
		r := l.call("", http.MethodGet, query(tc.fields), "")
		if at := r.Header.Get("Location"); tc.want == "" && (at != "" || r.StatusCode != http.StatusBadRequest) || !strings.Contains(at, tc.want) {
			t.Errorf("%s: %d %s", name, r.StatusCode, at)
		}
	}
	l.want(401, l.post("/authorize", with("username", "ana", "password", "wrong")...), "name or password is wrong", `value="n1"`)
	code := func() string {
		t.Helper()
		r := l.want(303, l.post("/authorize", with("username", "ana", "password", password)...))
		at, err := url.Parse(r.Header.Get("Location"))
		if err != nil || at.Host != "127.0.0.1:4321" || at.Query().Get("state") != "s1" || at.Query().Get("iss") != l.url+"/ringwall/issuer" || at.Query().Get("code") == "" {
			t.Fatalf("%s, %v", at, err)
		}
		return at.Query().Get("code")
	}
	redeem := func(code, redirect, verifier string) reply {
		return l.post("/token", "client_id", "ringwall", "grant_type", "authorization_code", "code", code, "redirect_uri", redirect, "code_verifier", verifier)
	}
	c := code()
	got := l.tokens(l.want(200, redeem(c, back, verifier)))
	ctx := oidc.ClientContext(t.Context(), l.http)
	provider, err := oidc.NewProvider(ctx, l.url+"/ringwall/issuer")
	if err != nil {
		t.Fatal(err)
	}
	if token, err := provider.Verifier(&oidc.Config{ClientID: "ringwall"}).Verify(ctx, got.ID); err != nil || token.Nonce != "n1" {
		t.Errorf("%+v, %v", token, err)
	}
	l.want(400, redeem(c, back, verifier), "invalid_grant")
	c = code()
	l.want(400, redeem(c, back, verifier+"x"), "invalid_grant")
	l.want(400, redeem(c, back, verifier), "invalid_grant") // a try uses it up
	l.want(400, redeem(code(), "http://127.0.0.1:1/other", verifier), "invalid_grant")
}

// Guessing ends soon, and does not lock out who comes from elsewhere.
func TestTries(t *testing.T) {
	l := newLabForTries(t)
	at := time.Now()
	for range 10 {
		if _, err := l.Password(t.Context(), "ana", "wrong", "192.0.2.1", at); err == nil {
			t.Fatal("a wrong password is right")
		}
	}
	if _, err := l.Password(t.Context(), "ana", password, "192.0.2.1", at); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("the eleventh guess: %v", err)
	}
	if _, err := l.Password(t.Context(), "ana", password, "192.0.2.2", at); err != nil {
		t.Errorf("from elsewhere: %v", err)
	}
	for i := range 100 {
		if _, err := l.StartDevice(t.Context(), "192.0.2.3", at); (err != nil) != (i >= 30) {
			t.Fatalf("device %d: %v", i, err)
		}
	}
}

type triesLab struct{ *control.SignOn }

func (l triesLab) StartDevice(ctx context.Context, from string, now time.Time) (string, error) {
	_, code, err := l.SignOn.StartDevice(ctx, from, now)
	return code, err
}

func newLabForTries(t *testing.T) triesLab {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	door, err := control.New(shelf{s})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := door.Put(t.Context(), control.Actor{ID: control.BreakGlass, Name: "admin"}, userDoc(t, "ana"), noCondition(), false); err != nil {
		t.Fatal(err)
	}
	return triesLab{control.NewSignOn(door)}
}

// fakeIssuer is an issuer elsewhere that can be made to say anything.
type fakeIssuer struct {
	t     *testing.T
	srv   *httptest.Server
	keys  *ring
	reads atomic.Int64
	name  string // that it calls itself; "" for its own
	down  atomic.Bool
}

func newFakeIssuer(t *testing.T) *fakeIssuer {
	t.Helper()
	f := &fakeIssuer{t: t, keys: &ring{}}
	f.keys.add(t)
	f.srv = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.reads.Add(1)
		name := f.name
		if name == "" {
			name = f.srv.URL
		}
		switch {
		case f.down.Load():
			http.Error(w, "away", http.StatusServiceUnavailable)
		case r.URL.Path == "/.well-known/openid-configuration":
			_, _ = fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, name, f.srv.URL+"/keys")
		default:
			pub, _ := f.keys.Public()
			b, _ := identity.KeySet(pub)
			_, _ = w.Write(b)
		}
	}))
	t.Cleanup(f.srv.Close)
	f.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	return f
}

func (f *fakeIssuer) document(more string) string {
	ca, _ := json.Marshal(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.srv.Certificate().Raw})))
	return fmt.Sprintf(`{"properties":{"issuer":%q,"clientId":"fleet","certificateAuthority":%s%s}}`, f.srv.URL, ca, more)
}

func (f *fakeIssuer) token(key *ecdsa.PrivateKey, claims map[string]any) string {
	f.t.Helper()
	all := map[string]any{"iss": f.srv.URL, "sub": "u1", "aud": "fleet", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(), "preferred_username": "Ana", "groups": []string{"sre"}}
	for k, v := range claims {
		if all[k] = v; v == nil {
			delete(all, k)
		}
	}
	token, err := signAny(key, all)
	if err != nil {
		f.t.Fatal(err)
	}
	return token
}

func TestIssuerElsewhere(t *testing.T) {
	l, f := newSignOnLab(t), newFakeIssuer(t)
	key, _ := f.keys.Signing()
	good := f.token(key, nil)
	const where = "/providers/Ringwall.Identity/issuers/corp"
	see := func(token string) reply { return l.call(token, http.MethodGet, where, "") }
	l.want(401, see(good), "not believed here")
	l.want(201, l.call(l.admin, http.MethodPut, where, f.document("")))
	l.want(403, see(good), "Ana ("+f.srv.URL+"|u1) may not")
	l.assign(rbac.Reader, f.srv.URL+"#sre")
	l.want(200, see(good))
	if n := f.reads.Load(); n != 2 {
		t.Errorf("two tokens cost %d requests to the issuer", n)
	}
	other, _ := (&ring{keys: []*ecdsa.PrivateKey{newRingKey(t)}}).Signing()
	for name, tc := range map[string]struct {
		token string
		want  int
	}{
		"for somebody else":              {f.token(key, map[string]any{"aud": "other"}), 401},
		"for two, and not said for whom": {f.token(key, map[string]any{"aud": []string{"fleet", "other"}}), 401},
		"for two, by us":                 {f.token(key, map[string]any{"aud": []string{"fleet", "other"}, "azp": "fleet"}), 200},
		"for us, by another":             {f.token(key, map[string]any{"azp": "other"}), 401},
		"over":                           {f.token(key, map[string]any{"exp": time.Now().Add(-time.Second).Unix()}), 401},
		"without an end":                 {f.token(key, map[string]any{"exp": nil}), 401},
		"for ever":                       {f.token(key, map[string]any{"exp": time.Now().AddDate(1, 0, 0).Unix()}), 401},
		"from tomorrow":                  {f.token(key, map[string]any{"iat": time.Now().Add(time.Hour).Unix()}), 401},
		"not yet":                        {f.token(key, map[string]any{"nbf": time.Now().Add(time.Hour).Unix()}), 401},
		"about nobody":                   {f.token(key, map[string]any{"sub": nil}), 401},
		"of nobody":                      {f.token(key, map[string]any{"iss": nil}), 401},
		"of another key":                 {f.token(other, nil), 401},
		"as the local administrator":     {f.token(key, map[string]any{"sub": "ringwall-break-glass", "groups": []string{"ringwall-break-glass"}}), 403},
		"in no group":                    {f.token(key, map[string]any{"groups": nil}), 403},
		"one group as a text":            {f.token(key, map[string]any{"groups": "sre"}), 200},
		"in a group of another case":     {f.token(key, map[string]any{"groups": []string{"SRE"}}), 403},
		"a name to steer a terminal":     {f.token(key, map[string]any{"preferred_username": "\x1b[2J\n"}), 200},
		"not for sign-on at all":         {good + "x", 401},
	} {
		if r := see(tc.token); r.StatusCode != tc.want {
			t.Errorf("%s: %d %s", name, r.StatusCode, r.body)
		}
	}
	// Tokens of keys that nobody has are no flood at the issuer.
	before := f.reads.Load()
	for range 20 {
		l.want(401, see(f.token(newRingKey(t), nil)))
	}
	if n := f.reads.Load() - before; n > 2 {
		t.Errorf("20 unknown keys cost %d requests", n)
	}
	l.clock.move(30 * time.Second)
	fresh := f.keys.add(t)
	l.want(200, see(f.token(fresh, nil))) // a new key is found
	f.down.Store(true)
	l.clock.move(2 * time.Hour)
	late := map[string]any{"exp": time.Now().Add(10 * time.Hour).Unix()}
	l.want(200, see(f.token(fresh, late))) // for a while the issuer may be away
	l.clock.move(5 * time.Hour)
	l.want(401, see(f.token(fresh, late)))
	f.down.Store(false)
	l.want(401, see(f.token(fresh, late))) // it was just asked
	l.clock.move(30 * time.Second)
	l.want(200, see(f.token(fresh, late)))
	l.want(200, l.call(l.admin, http.MethodPut, where, f.document(`,"allowedGroups":["admins"]`)))
	l.want(403, see(f.token(fresh, late)), "none of the groups")
	l.want(200, l.call(l.admin, http.MethodPut, where, f.document(`,"disabled":true`)))
	l.want(401, see(f.token(fresh, late)), "not believed here")
	f.name = "https://other.example"
	l.want(200, l.call(l.admin, http.MethodPut, where, f.document(`,"nameClaim":"sub"`)))
	l.want(401, see(f.token(fresh, late)))
	// The built-in issuer of another server is an issuer too.
	if l.want(200, l.call("", http.MethodGet, "/.well-known/oauth-protected-resource", ""), `"name":"local"`, `"client_id":"fleet"`); t.Failed() {
		return
	}
	far := newSignOnLab(t)
	far.putUser("bob", "")
	ca, _ := json.Marshal(far.ca)
	l.want(201, l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/issuers/far", fmt.Sprintf(`{"properties":{"issuer":%q,"clientId":"ringwall","certificateAuthority":%s}}`, far.url+"/ringwall/issuer", ca)))
	l.clock.ahead.Store(0)
	l.want(403, see(far.deviceSignOn("bob").ID), "bob ("+far.url+"/ringwall/issuer|bob) may not")
}

func TestIssuerElsewhere_refused(t *testing.T) {
	l, f := newSignOnLab(t), newFakeIssuer(t)
	l.want(201, l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/issuers/corp", f.document("")))
	for name, tc := range map[string]struct {
		name, properties string
		want             int
	}{
		"twice":               {"other", strings.TrimPrefix(strings.TrimSuffix(f.document(""), "}"), `{"properties":`), 409},
		"without TLS":         {"a", `{"issuer":"http://idp.example","clientId":"x"}`, 400},
		"with a bar":          {"a", `{"issuer":"https://idp.example/a|b","clientId":"x"}`, 400},
		"with a hash":         {"a", `{"issuer":"https://idp.example/#b","clientId":"x"}`, 400},
		"for everybody":       {"a", `{"issuer":"https://idp.example"}`, 400},
		"named as ours":       {"local", `{"issuer":"https://idp.example","clientId":"x"}`, 409},
		"a misspelt property": {"a", `{"issuer":"https://idp.example","clientId":"x","disable":true}`, 400},
		"a CA that is none":   {"a", `{"issuer":"https://idp.example","clientId":"x","certificateAuthority":"x"}`, 400},
	} {
		if r := l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/issuers/"+tc.name, `{"properties":`+tc.properties+`}`); r.StatusCode != tc.want {
			t.Errorf("%s: %d %s", name, r.StatusCode, r.body)
		}
	}
	for name, p := range map[string]string{"a cheap hash": `{"passwordHash":"$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"}`, "a password": `{"password":"x"}`} {
		l.want(400, l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/users/ana", `{"properties":`+p+`}`))
		_ = name
	}
}

func TestChangePassword(t *testing.T) {
	l := newSignOnLab(t)
	l.putUser("ana", "")
	session := l.deviceSignOn("ana")
	const next = "another battery staple"
	change := func(user, old, next, again string) reply {
		return l.post("/password", "username", user, "password", old, "new", next, "again", again)
	}
	l.want(200, l.call("", http.MethodGet, "/ringwall/issuer/password", ""), "New password")
	l.want(401, change("ana", "wrong", next, next), "name or password is wrong")
	l.want(400, change("ana", password, next, next+"x"), "differ")
	l.want(400, change("ana", password, "short", "short"), "12 characters")
	l.want(401, change("nobody", password, next, next), "name or password is wrong")
	l.want(200, l.call(session.ID, http.MethodGet, "/subscriptions", ""))
	l.want(200, change("ana", password, next, next), "Changed")
	l.want(401, l.call(session.ID, http.MethodGet, "/subscriptions", ""))
	l.want(401, change("ana", password, next, next), "name or password is wrong")
	l.want(200, change("ana", next, password, password), "Changed")
	if r := l.want(200, l.call(l.admin, http.MethodGet, "/providers/Ringwall.Identity/users/ana", ""), `"displayName":"Ana"`, `"lastModifiedBy":"local|ana"`); strings.Contains(r.body, "argon2id") {
		t.Error(r.body)
	}
	// Disabled users change nothing, least of all that.
	l.want(200, l.call(l.admin, http.MethodPut, "/providers/Ringwall.Identity/users/ana", `{"properties":{"disabled":true}}`))
	l.want(401, change("ana", password, next, next), "name or password is wrong")
	if r := l.want(200, l.call(l.admin, http.MethodGet, "/ringwall/audit", "")); strings.Contains(r.body, "argon2id") || strings.Contains(r.body, next) || !strings.Contains(r.body, `"actor":"local|ana"`) {
		t.Error(r.body)
	}
}
