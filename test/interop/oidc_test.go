package interop

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"

	"ringwall/internal/api"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/httpapi"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// database is the store as the door wants it.
type database struct{ *store.Store }

func (d database) Write(ctx context.Context, fn func(control.Tx) error) error {
	return d.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (d database) Read(ctx context.Context, fn func(control.Tx) error) error {
	return d.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

// certificateOf is who certifies a server of a test.
func certificateOf(s *httptest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// startOP starts the OpenID provider of zitadel/oidc.
func startOP(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(nil)
	issuer := "https://" + s.Listener.Addr().String()
	storage.RegisterClients(storage.NativeClient("fleet", "http://127.0.0.1/callback"), storage.NativeClient("other", "http://127.0.0.1/callback"))
	s.Config.Handler = exampleop.SetupServer(issuer, storage.NewStorage(storage.NewUserStore(issuer)), slog.New(slog.DiscardHandler), false)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// person is a browser, and who sits before it.
func person(t *testing.T, op *httptest.Server) func(string) {
	return func(where string) {
		go func() {
			jar, err := cookiejar.New(nil)
			if err != nil {
				t.Error(err)
				return
			}
			c := &http.Client{Jar: jar, Transport: op.Client().Transport, Timeout: 20 * time.Second}
			page, err := c.Get(where)
			if err != nil {
				t.Error(err)
				return
			}
			_ = page.Body.Close()
			id := page.Request.URL.Query().Get("authRequestID")
			done, err := c.PostForm(op.URL+"/login/username", url.Values{"id": {id}, "username": {"test-user@127.0.0.1"}, "password": {"verysecure"}})
			if err != nil {
				t.Error(err)
				return
			}
			b, _ := io.ReadAll(done.Body)
			_ = done.Body.Close()
			if !strings.Contains(string(b), "Go back to the command line") {
				t.Errorf("%s: %s", done.Status, b)
			}
		}()
	}
}

// Somebody else's provider signs a person on, through its pages and ours, and
// its tokens count, are refreshed, and are refused when they are for others.
func TestOpenIDProvider(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	op := startOP(t)
	s, err := store.Open(ctx, "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	door, err := control.New(database{s})
	if err != nil {
		t.Fatal(err)
	}
	admin := control.Actor{ID: control.BreakGlass, Name: "admin"}
	put := func(where string, properties any) {
		t.Helper()
		id, err := resource.ParseID(where)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(properties)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := door.Put(ctx, admin, resource.Document{ID: id, Properties: b}, resource.When{}, false); err != nil {
			t.Fatal(err)
		}
	}
	put("/providers/Ringwall.Identity/issuers/corp", control.Issuer{URL: op.URL, ClientID: "fleet", CA: certificateOf(op)})
	ours := httptest.NewUnstartedServer(nil)
	ours.Config.Handler = httpapi.New(door, slog.New(slog.DiscardHandler), time.Now,
		httpapi.WithSignOn(httpapi.SignOn{Memory: control.NewSignOn(door), Base: "https://" + ours.Listener.Addr().String()}),
		httpapi.Mount(httpapi.AccessRoutes(door, nil, time.Now)...))
	ours.StartTLS()
	t.Cleanup(ours.Close)
	ca := []byte(certificateOf(ours))

	all, err := api.Issuers(ctx, ours.URL, ca)
	if err != nil {
		t.Fatal(err)
	}
	corp, err := api.FindIssuer(all, "")
	if err != nil || corp.URL != op.URL || corp.ClientID != "fleet" {
		t.Fatalf("%+v, %v", corp, err)
	}
	signOn := func(i api.Issuer) (*api.SignOn, *api.Tokens) {
		t.Helper()
		on, err := api.OpenIssuer(ctx, i, ca)
		if err != nil {
			t.Fatal(err)
		}
		tokens, err := on.Browser(ctx, person(t, op))
		if err != nil {
			t.Fatal(err)
		}
		return on, tokens
	}
	whoami := func(token string) (who httpapi.Who, err error) {
		c, err := api.NewClient(ours.URL, ca, token)
		if err != nil {
			t.Fatal(err)
		}
		b, _, err := c.Do(ctx, api.Request{Method: http.MethodGet, Path: "/ringwall/whoami"})
		if err == nil {
			err = json.Unmarshal(b, &who)
		}
		return who, err
	}
	on, tokens := signOn(corp)
	put("/providers/Ringwall.Identity/groups/staff", control.Group{Members: []string{op.URL + "|id1"}})
	who, err := whoami(tokens.ID)
	if err != nil || who.Principal != op.URL+"|id1" || len(who.Groups) != 1 || who.Groups[0] != "local#staff" {
		t.Errorf("%+v, %v", who, err)
	}
	if tokens.Refresh == "" {
		t.Fatal("no refresh token")
	}
	again, err := on.Refresh(ctx, tokens.Refresh)
	if err != nil {
		t.Fatal(err)
	}
	if who, err := whoami(again.ID); err != nil || who.Principal != op.URL+"|id1" {
		t.Errorf("refreshed: %+v, %v", who, err)
	}
	cut := strings.LastIndexByte(tokens.ID, '.')
	for name, bad := range map[string]string{
		"another's signature": tokens.ID[:cut] + again.ID[strings.LastIndexByte(again.ID, '.'):],
		"cut off":             tokens.ID[:cut+1],
	} {
		if _, err := whoami(bad); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := corp
	other.ClientID = "other"
	_, foreign := signOn(other)
	if _, err := whoami(foreign.ID); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a token for another client: %v", err)
	}
	if _, err := on.Refresh(ctx, "made up"); err == nil {
		t.Error("a refresh token that is none")
	}
}
