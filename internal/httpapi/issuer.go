package httpapi

import (
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sort"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/identity"
)

// The built-in issuer, for a server that stands alone: OpenID Connect with
// authorization codes and PKCE for programs on the same machine (RFC 8252,
// section 7.3) and codes for another device (RFC 8628). It keeps no cookie and
// no session in a browser: every page asks for the password, so that no other
// page can act for somebody.
const issuerPath = "/ringwall/issuer"

// grantDevice is the grant type of RFC 8628, section 3.4.
const grantDevice = "urn:ietf:params:oauth:grant-type:device_code"

//go:embed signon.html
var signOnPage string

const maxForm = 16 << 10 // bytes

func (p *people) routes() []Route {
	public := func(method, path string, serve func(http.ResponseWriter, *http.Request) error) Route {
		return Route{Method: method, Path: path, Public: true, MaxBody: maxForm, Serve: func(w http.ResponseWriter, r *http.Request, _ control.Actor) error { return serve(w, r) }}
	}
	return []Route{
		public(http.MethodGet, "/.well-known/oauth-protected-resource", p.resource),
		public(http.MethodGet, issuerPath+"/.well-known/openid-configuration", p.discovery),
		public(http.MethodGet, issuerPath+"/keys", p.keySet),
		public(http.MethodPost, issuerPath+"/device", p.device),
		public(http.MethodGet, issuerPath+"/activate", p.activate),
		public(http.MethodPost, issuerPath+"/activate", p.activate),
		public(http.MethodGet, issuerPath+"/authorize", p.authorize),
		public(http.MethodPost, issuerPath+"/authorize", p.authorize),
		public(http.MethodGet, issuerPath+"/password", p.password),
		public(http.MethodPost, issuerPath+"/password", p.password),
		public(http.MethodPost, issuerPath+"/token", p.token),
		public(http.MethodPost, issuerPath+"/revoke", p.revoke),
	}
}

// IssuerInfo is what a client needs to know of an issuer.
type IssuerInfo struct {
	Name     string `json:"name"`
	Issuer   string `json:"issuer"`
	ClientID string `json:"client_id"`
	CA       string `json:"certificate_authority,omitempty"` // PEM; of the built-in one: the server's
}

// resource says whose tokens are taken here (RFC 9728), and, beyond the RFC,
// what to sign on to there.
func (p *people) resource(w http.ResponseWriter, r *http.Request) error {
	all, err := p.Memory.Issuers(r.Context())
	if err != nil {
		return err
	}
	infos := []IssuerInfo{{Name: control.Local, Issuer: p.issuer, ClientID: ClientID}}
	for name, i := range all {
		infos = append(infos, IssuerInfo{name, i.URL, i.ClientID, i.CA})
	}
	sort.Slice(infos[1:], func(i, j int) bool { return infos[1+i].Name < infos[1+j].Name })
	var servers []string
	for _, i := range infos {
		servers = append(servers, i.Issuer)
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"resource": p.Base, "authorization_servers": servers, "bearer_methods_supported": []string{"header"}, "ringwall_issuers": infos,
	})
}

func (p *people) discovery(w http.ResponseWriter, _ *http.Request) error {
	return writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                p.issuer,
		"authorization_endpoint":                p.issuer + "/authorize",
		"token_endpoint":                        p.issuer + "/token",
		"device_authorization_endpoint":         p.issuer + "/device",
		"revocation_endpoint":                   p.issuer + "/revoke",
		"jwks_uri":                              p.issuer + "/keys",
		"response_types_supported":              []string{"code"},
		"response_modes_supported":              []string{"query"},
		"grant_types_supported":                 []string{"authorization_code", "refresh_token", grantDevice},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{"ES256"},
		"scopes_supported":                      []string{"openid", "profile", "offline_access"},
		"claims_supported":                      []string{"iss", "sub", "aud", "exp", "iat", "auth_time", "nonce", "name", "preferred_username", "amr"},
		"code_challenge_methods_supported":      []string{"S256"},
		"token_endpoint_auth_methods_supported": []string{"none"},

		"authorization_response_iss_parameter_supported": true,
	})
}

func (p *people) keySet(w http.ResponseWriter, _ *http.Request) error {
	public, err := p.Keys.Public()
	if err != nil {
		return err
	}
	b, err := identity.KeySet(public)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/jwk-set+json")
	w.Header().Set("Cache-Control", "public, max-age=300")
	_, _ = w.Write(b) // the client may be gone
	return nil
}

// from is where a request comes from, as tries are counted: an IPv4 address, or
// the /64 network of an IPv6 one, which one customer has for himself.
func from(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return "?"
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return "?"
	}
	if a = a.Unmap(); a.Is6() {
		return netip.PrefixFrom(a.WithZone(""), 64).Masked().String()
	}
	return a.String()
}

// oauthError answers as RFC 6749, section 5.2, has it.
func oauthError(w http.ResponseWriter, err error) error {
	e, ok := errors.AsType[*control.SignOnError](err)
	switch {
	case ok:
		return writeJSON(w, http.StatusBadRequest, map[string]string{"error": e.Code, "error_description": e.Why})
	case errors.Is(err, control.ErrTooMany):
		w.Header().Set("Retry-After", "900")
		return writeJSON(w, http.StatusTooManyRequests, map[string]string{"error": "slow_down", "error_description": err.Error()})
	}
	return err
}

func badRequest(format string, args ...any) error {
	return &control.SignOnError{Code: "invalid_request", Why: fmt.Sprintf(format, args...)}
}

// form reads a form of a client; its fields are there once.
func form(r *http.Request) (url.Values, error) {
	if err := r.ParseForm(); err != nil {
		return nil, badRequest("the form: %v", err)
	}
	f := r.PostForm // what stands in the URL too counts once
	if r.Method == http.MethodGet {
		f = r.Form
	}
	for name, v := range f {
		if len(v) != 1 {
			return nil, badRequest("%.40q is there %d times", name, len(v))
		}
	}
	return f, nil
}

func (p *people) device(w http.ResponseWriter, r *http.Request) error {
	f, err := form(r)
	if err == nil && f.Get("client_id") != ClientID {
		err = &control.SignOnError{Code: "invalid_client", Why: "the client is " + ClientID}
	}
	if err != nil {
		return oauthError(w, err)
	}
	deviceCode, userCode, err := p.Memory.StartDevice(r.Context(), from(r), p.now())
	if err != nil {
		return oauthError(w, err)
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"device_code": deviceCode, "user_code": userCode,
		"verification_uri": p.issuer + "/activate", "verification_uri_complete": p.issuer + "/activate?user_code=" + userCode,
		"expires_in": int(control.DeviceLife / time.Second), "interval": int(control.PollEvery / time.Second),
	})
}

func (p *people) token(w http.ResponseWriter, r *http.Request) error {
	f, err := form(r)
	if err == nil && f.Get("client_id") != ClientID {
		err = &control.SignOnError{Code: "invalid_client", Why: "the client is " + ClientID}
	}
	if err != nil {
		return oauthError(w, err)
	}
	var by *control.Signed
	session := ""
	switch f.Get("grant_type") {
	case "authorization_code":
		by, err = p.Memory.Redeem(r.Context(), f.Get("code"), f.Get("redirect_uri"), f.Get("code_verifier"))
	case grantDevice:
		by, err = p.Memory.PollDevice(r.Context(), f.Get("device_code"), p.now())
	case "refresh_token":
		by, session, err = p.Memory.Refresh(r.Context(), f.Get("refresh_token"))
	default:
		err = &control.SignOnError{Code: "unsupported_grant_type", Why: "this issuer does not do that"}
	}
	if err == nil && session == "" {
		session, err = p.Memory.StartSession(r.Context(), by)
	}
	if err != nil {
		return oauthError(w, err)
	}
	return p.answer(w, by, session)
}

// answer is the answer of the token endpoint. The access token is the ID token:
// it is for this server alone.
func (p *people) answer(w http.ResponseWriter, by *control.Signed, session string) error {
	key, err := p.Keys.Signing()
	if err != nil {
		return err
	}
	now := p.now()
	token, err := identity.Sign(key, &identity.Claims{
		Issuer: p.issuer, Subject: by.User, Audience: ClientID, Issued: now.Unix(), Expires: now.Add(identity.TokenLife).Unix(),
		AuthTime: by.At, Nonce: by.Nonce, Name: by.Name, Username: by.User, Generation: by.Generation, Methods: []string{"pwd"},
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"id_token": token, "access_token": token, "token_type": "Bearer", "expires_in": int(identity.TokenLife / time.Second),
		"refresh_token": session, "scope": "openid profile offline_access",
	})
}

// revoke ends a session (RFC 7009).
func (p *people) revoke(w http.ResponseWriter, r *http.Request) error {
	f, err := form(r)
	if err == nil {
		err = p.Memory.EndSession(r.Context(), f.Get("token"))
	}
	if err != nil {
		return oauthError(w, err)
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// page is what a browser shows.
type page struct {
	Title, Text, Problem string
	Form                 bool
	Code                 bool // asks for the code of another device
	New                  bool // asks for a new password
	UserCode             string
	Hidden               map[string]string
}

// show writes a page. It loads nothing, runs no script and stands in no frame;
// where a form may lead is said too.
func (p *people) show(w http.ResponseWriter, status int, pg *page) error {
	t, err := template.New("signon").Parse(signOnPage)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'self' http://127.0.0.1:* http://[::1]:*")
	h.Set("Referrer-Policy", "no-referrer")
	w.WriteHeader(status)
	_ = t.Execute(w, pg) // the client may be gone
	return nil
}

// problem shows a form again, with what was wrong.
func (p *people) problem(w http.ResponseWriter, err error, pg *page) error {
	pg.Problem = err.Error()
	switch e, ok := errors.AsType[*control.SignOnError](err); {
	case ok && e.Code == "invalid_request":
		return p.show(w, http.StatusBadRequest, pg)
	case ok:
		return p.show(w, http.StatusUnauthorized, pg)
	case errors.Is(err, control.ErrTooMany):
		w.Header().Set("Retry-After", "900")
		pg.Problem = control.ErrTooMany.Error()
		return p.show(w, http.StatusTooManyRequests, pg)
	}
	return err
}

// activate lets another device in.
func (p *people) activate(w http.ResponseWriter, r *http.Request) error {
	pg := &page{Title: "Sign on", Text: "A command line waits to be signed on. Go on only if you started it yourself and it shows this code.", Form: true, Code: true}
	f, err := form(r)
	if err != nil {
		return p.problem(w, err, pg)
	}
	pg.UserCode = identity.PlainUserCode(f.Get("user_code"))
	if r.Method == http.MethodGet {
		return p.show(w, http.StatusOK, pg)
	}
	by, err := p.Memory.Password(r.Context(), f.Get("username"), f.Get("password"), from(r), p.now())
	if err == nil {
		err = p.Memory.ApproveDevice(r.Context(), f.Get("user_code"), by)
	}
	if err != nil {
		return p.problem(w, err, pg)
	}
	return p.show(w, http.StatusOK, &page{Title: "Signed on", Text: "You are signed on as " + by.User + ". Go back to the command line; this page can be closed."})
}

// password changes one's password.
func (p *people) password(w http.ResponseWriter, r *http.Request) error {
	pg := &page{Title: "New password", Text: "A new password ends every session.", Form: true, New: true}
	f, err := form(r)
	if err != nil {
		return p.problem(w, err, pg)
	}
	if r.Method == http.MethodGet {
		return p.show(w, http.StatusOK, pg)
	}
	if f.Get("new") != f.Get("again") {
		return p.problem(w, badRequest("the two new passwords differ"), pg)
	}
	err = p.Memory.ChangePassword(r.Context(), f.Get("username"), f.Get("password"), f.Get("new"), from(r), p.now())
	if errors.Is(err, errs.Invalid) {
		err = badRequest("the new password is too short or too long: it has %d characters or more", identity.MinPassword)
	}
	if err != nil {
		return p.problem(w, err, pg)
	}
	return p.show(w, http.StatusOK, &page{Title: "Changed", Text: "The new password counts from now on."})
}

// authorize signs a program of this machine on.
func (p *people) authorize(w http.ResponseWriter, r *http.Request) error {
	pg := &page{Title: "Sign on"}
	f, err := form(r)
	if err != nil {
		return p.problem(w, err, pg)
	}
	redirect, err := loopback(f.Get("redirect_uri"))
	if err == nil && f.Get("client_id") != ClientID {
		err = badRequest("the client is %s", ClientID)
	}
	if err != nil { // and never a redirect to where it did not come from
		return p.problem(w, err, pg)
	}
	answer := func(v url.Values) error {
		v.Set("iss", p.issuer) // RFC 9207
		if s := f.Get("state"); s != "" {
			v.Set("state", s)
		}
		redirect.RawQuery = v.Encode()
		w.Header().Set("Location", redirect.String())
		w.Header().Set("Referrer-Policy", "no-referrer")
		w.WriteHeader(http.StatusSeeOther)
		return nil
	}
	switch {
	case f.Get("response_type") != "code":
		return answer(url.Values{"error": {"unsupported_response_type"}})
	case f.Get("code_challenge_method") != "S256" || len(f.Get("code_challenge")) != 43:
		return answer(url.Values{"error": {"invalid_request"}, "error_description": {"PKCE with S256 is required"}})
	case !slices.Contains(strings.Fields(f.Get("scope")), "openid"):
		return answer(url.Values{"error": {"invalid_scope"}})
	}
	pg.Text, pg.Form, pg.Hidden = "A program on this machine asks who you are.", true, map[string]string{}
	for _, name := range []string{"client_id", "redirect_uri", "response_type", "scope", "state", "nonce", "code_challenge", "code_challenge_method"} {
		pg.Hidden[name] = f.Get(name)
	}
	if r.Method == http.MethodGet {
		return p.show(w, http.StatusOK, pg)
	}
	by, err := p.Memory.Password(r.Context(), f.Get("username"), f.Get("password"), from(r), p.now())
	if err != nil {
		return p.problem(w, err, pg)
	}
	by.Nonce = f.Get("nonce")
	code, err := p.Memory.NewCode(r.Context(), by, f.Get("redirect_uri"), f.Get("code_challenge"), p.now())
	if err != nil {
		return err
	}
	return answer(url.Values{"code": {code}})
}

// loopback takes a redirect to this machine, on any port (RFC 8252, section 7.3).
func loopback(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || len(s) > 256 ||
		u.Hostname() != "127.0.0.1" && u.Hostname() != "::1" {
		return nil, badRequest("redirect_uri is %.200q, want http://127.0.0.1:PORT/PATH", s)
	}
	return u, nil
}
