package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// Issuer is where people of a server sign on (OpenID Connect).
type Issuer struct {
	Name     string `json:"name"`
	URL      string `json:"issuer"`
	ClientID string `json:"client_id"`
	CA       string `json:"certificate_authority,omitempty"` // PEM; "" for the server's
}

const maxSignOn = 256 << 10 // bytes of an answer

// Issuers asks a server where its people sign on; the first is its own.
func Issuers(ctx context.Context, server string, ca []byte) ([]Issuer, error) {
	c, err := NewClient(server, ca, "")
	if err != nil {
		return nil, err
	}
	b, _, err := c.Do(ctx, Request{Method: http.MethodGet, Path: "/.well-known/oauth-protected-resource"})
	if err != nil {
		return nil, err
	}
	var about struct {
		Issuers []Issuer `json:"ringwall_issuers"`
	}
	if err := json.Unmarshal(b, &about); err != nil || len(about.Issuers) == 0 {
		return nil, fmt.Errorf("%s names no issuer: %w", server, errs.Invalid)
	}
	return about.Issuers, nil
}

// Tokens are what a sign-on gives.
type Tokens struct {
	ID      string    // the bearer token
	Refresh string    // "" if the issuer gives none
	Expires time.Time // of ID
}

// SignOn signs somebody on at an issuer. What the issuer says comes over TLS
// from itself; whether the token is genuine is for the server to check.
type SignOn struct {
	issuer Issuer
	http   *http.Client
	at     struct {
		Issuer    string `json:"issuer"`
		Authorize string `json:"authorization_endpoint"`
		Token     string `json:"token_endpoint"`
		Device    string `json:"device_authorization_endpoint"`
		Revoke    string `json:"revocation_endpoint"`
	}
}

// OpenIssuer reads where an issuer's parts are (OpenID Connect Discovery 1.0).
// ca certifies it if the issuer has none of its own; empty for the system's.
func OpenIssuer(ctx context.Context, i Issuer, ca []byte) (*SignOn, error) {
	if i.CA != "" {
		ca = []byte(i.CA)
	}
	u, err := url.Parse(i.URL)
	if err != nil || u.Scheme != "https" {
		return nil, fmt.Errorf("issuer %.200q: want https: %w", i.URL, errs.Invalid)
	}
	c, err := NewClient("https://"+u.Host, ca, "")
	if err != nil {
		return nil, err
	}
	s := &SignOn{issuer: i, http: c.http}
	b, _, err := c.Do(ctx, Request{Method: http.MethodGet, Path: strings.TrimSuffix(u.EscapedPath(), "/") + "/.well-known/openid-configuration"})
	if err != nil {
		return nil, fmt.Errorf("issuer %s: %w", i.URL, err)
	}
	if err := json.Unmarshal(b, &s.at); err != nil || s.at.Issuer != i.URL {
		return nil, fmt.Errorf("issuer %s calls itself %.200q: %w", i.URL, s.at.Issuer, errs.Untrusted)
	}
	for _, e := range []string{s.at.Authorize, s.at.Token, s.at.Device, s.at.Revoke} {
		if u, err := url.Parse(e); e != "" && (err != nil || u.Scheme != "https") {
			return nil, fmt.Errorf("issuer %s: %.200q is no https URL: %w", i.URL, e, errs.Untrusted)
		}
	}
	return s, nil
}

// oauthError is an error of RFC 6749, section 5.2.
type oauthError struct {
	Code string `json:"error"`
	Text string `json:"error_description"`
}

func (e *oauthError) Error() string {
	if e.Text == "" {
		return e.Code
	}
	return e.Text + " (" + e.Code + ")"
}

// Unwrap is the kind: the issuer does not believe what it was shown.
func (e *oauthError) Unwrap() error { return errs.Untrusted }

func (s *SignOn) post(ctx context.Context, where string, form url.Values, out any) error {
	if where == "" {
		return fmt.Errorf("issuer %s cannot do that: %w", s.issuer.URL, errs.Unsupported)
	}
	form.Set("client_id", s.issuer.ClientID)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, where, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	resp, err := s.http.Do(req)
	if err != nil {
		return fmt.Errorf("issuer %s: %w", s.issuer.URL, withoutURL(err))
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxSignOn))
	if err != nil {
		return fmt.Errorf("issuer %s: %w", s.issuer.URL, err)
	}
	if resp.StatusCode != http.StatusOK {
		e := &oauthError{}
		if json.Unmarshal(b, e) != nil || e.Code == "" {
			return fmt.Errorf("issuer %s answers %s", s.issuer.URL, resp.Status)
		}
		return e
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("issuer %s: %w: %w", s.issuer.URL, err, errs.Invalid)
	}
	return nil
}

type tokenAnswer struct {
	ID      string `json:"id_token"`
	Refresh string `json:"refresh_token"`
}

// tokens reads the answer of the token endpoint. nonce is the one of the
// request, if it had one.
func (s *SignOn) tokens(a *tokenAnswer, nonce string) (*Tokens, error) {
	var claims struct {
		Issuer  string  `json:"iss"`
		Nonce   string  `json:"nonce"`
		Expires float64 `json:"exp"`
	}
	parts := strings.Split(a.ID, ".")
	if len(parts) != 3 {
		return nil, fmt.Errorf("issuer %s gives no ID token: %w", s.issuer.URL, errs.Invalid)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(b, &claims) != nil {
		return nil, fmt.Errorf("issuer %s: the ID token cannot be read: %w", s.issuer.URL, errs.Invalid)
	}
	if claims.Issuer != s.issuer.URL || nonce != "" && claims.Nonce != nonce {
		return nil, fmt.Errorf("issuer %s: the ID token is the answer to another sign-on: %w", s.issuer.URL, errs.Untrusted)
	}
	return &Tokens{ID: a.ID, Refresh: a.Refresh, Expires: time.Unix(int64(claims.Expires), 0)}, nil
}

const scopes = "openid profile offline_access"

// Code is what a person enters on another device.
type Code struct {
	URL      string `json:"verification_uri"`
	Complete string `json:"verification_uri_complete"` // with the code in it; may be ""
	Code     string `json:"user_code"`
}

// Device signs somebody on who enters a code on any device (RFC 8628); show
// tells him. It waits until he did, the issuer gives up, or ctx ends.
func (s *SignOn) Device(ctx context.Context, show func(Code)) (*Tokens, error) {
	var d struct {
		Code
		Device   string `json:"device_code"`
		Expires  int    `json:"expires_in"`
		Interval int    `json:"interval"`
	}
	if err := s.post(ctx, s.at.Device, url.Values{"scope": {scopes}}, &d); err != nil {
		return nil, fmt.Errorf("begin the sign-on: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(min(max(d.Expires, 1), 3600))*time.Second, fmt.Errorf("nobody entered the code in time: %w", errs.Untrusted))
	defer cancel()
	show(d.Code)
	wait := time.Duration(min(max(d.Interval, 1), 60)) * time.Second
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
		var a tokenAnswer
		err := s.post(ctx, s.at.Token, url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {d.Device}}, &a)
		e, refused := errors.AsType[*oauthError](err)
		switch {
		case refused && e.Code == "authorization_pending":
		case refused && e.Code == "slow_down":
			wait += 5 * time.Second
		case err != nil:
			return nil, err
		default:
			return s.tokens(&a, "")
		}
	}
}

func secret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// Browser signs somebody on with a browser on this machine: an authorization
// code with PKCE (RFC 7636) that comes back to a port of loopback (RFC 8252).
// open shows the page.
func (s *SignOn) Browser(ctx context.Context, open func(url string)) (*Tokens, error) {
	if s.at.Authorize == "" {
		return nil, fmt.Errorf("issuer %s cannot do that: %w", s.issuer.URL, errs.Unsupported)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	verifier, state, nonce := secret(), secret(), secret()
	challenge := sha256.Sum256([]byte(verifier))
	redirect := "http://" + l.Addr().String() + "/callback"
	got := make(chan url.Values, 1)
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, MaxHeaderBytes: 32 << 10, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		// who does not know the state did not begin this
		if r.URL.Path != "/callback" || q.Get("state") != state || q.Has("iss") && q.Get("iss") != s.issuer.URL {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, "Go back to the command line; this page can be closed.\n")
		select {
		case got <- q:
		default:
		}
	})}
	go func() { _ = srv.Serve(l) }() // until it is closed
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_ = srv.Shutdown(end) // the page is written
	}()
	q := url.Values{
		"client_id": {s.issuer.ClientID}, "redirect_uri": {redirect}, "response_type": {"code"}, "scope": {scopes}, "state": {state}, "nonce": {nonce},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
	}
	join := "?"
	if strings.Contains(s.at.Authorize, "?") {
		join = "&"
	}
	open(s.at.Authorize + join + q.Encode())
	var back url.Values
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case back = <-got:
	}
	if code := back.Get("error"); code != "" {
		return nil, &oauthError{code, back.Get("error_description")}
	}
	var a tokenAnswer
	err = s.post(ctx, s.at.Token, url.Values{"grant_type": {"authorization_code"}, "code": {back.Get("code")}, "redirect_uri": {redirect}, "code_verifier": {verifier}}, &a)
	if err != nil {
		return nil, err
	}
	return s.tokens(&a, nonce)
}

// Refresh gets a new token for a refresh token, which is replaced if the issuer
// replaces it. errs.Untrusted: the session is over.
func (s *SignOn) Refresh(ctx context.Context, refresh string) (*Tokens, error) {
	var a tokenAnswer
	if err := s.post(ctx, s.at.Token, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {refresh}}, &a); err != nil {
		return nil, err
	}
	t, err := s.tokens(&a, "")
	if err == nil && t.Refresh == "" {
		t.Refresh = refresh
	}
	return t, err
}

// End ends a session (RFC 7009), if the issuer can.
func (s *SignOn) End(ctx context.Context, refresh string) error {
	err := s.post(ctx, s.at.Revoke, url.Values{"token": {refresh}, "token_type_hint": {"refresh_token"}}, nil)
	if errors.Is(err, errs.Unsupported) {
		return nil
	}
	return err
}

// FindIssuer picks one by its name; "" for the only one, or the server's own.
func FindIssuer(all []Issuer, name string) (Issuer, error) {
	i := slices.IndexFunc(all, func(i Issuer) bool { return i.Name == name })
	switch {
	case i >= 0:
		return all[i], nil
	case name == "" && len(all) == 2: // people sign on elsewhere
		return all[1], nil
	case name == "":
		return all[0], nil
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return Issuer{}, fmt.Errorf("no issuer %q; there is %s: %w", name, strings.Join(names, ", "), errs.NotFound)
}
