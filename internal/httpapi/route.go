package httpapi

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
)

// Handler answers a request of somebody who is known. An error of a kind in
// errs becomes its status, as long as nothing was written.
type Handler func(w http.ResponseWriter, r *http.Request, by control.Actor) error

// Authenticator tells who sends a request; the error is errs.Untrusted.
type Authenticator func(r *http.Request) (*control.Actor, error)

// Route is one thing that the server answers.
type Route struct {
	Method string
	Path   string // a pattern of http.ServeMux
	Serve  Handler

	// Who authenticates in another way than by token or client certificate, such
	// as by a join token. nil: the usual ways.
	Who Authenticator
	// Public is for health and for sign-on itself: nobody is authenticated, and
	// Serve gets no Actor.
	Public bool
	// MaxBody is the longest body in bytes; 0 is the tree's.
	MaxBody int64
	// Slow is how long an answer may take; 0 is a minute. Streams move the
	// deadline by themselves.
	Slow time.Duration

	// For the OpenAPI document.
	Summary string  // one line; without it the route is not in the document
	Query   []Query // parameters behind the question mark
	Body    any     // of a request: a value whose type says what is in it; nil: none
	Answer  any     // of status 200
	Media   string  // type of the answer; "" for JSON
}

// Query is a parameter behind the question mark.
type Query struct{ Name, About string }

// Option changes what New makes.
type Option func(*API)

// Mount adds routes, authenticated as all others. Their paths begin with
// "/ringwall/", or with "/ringwall." for a Connect service. What http.ServeMux
// takes for a mistake panics, as there.
func Mount(routes ...Route) Option {
	return func(a *API) {
		for _, r := range routes {
			if !strings.HasPrefix(r.Path, "/ringwall/") && !strings.HasPrefix(r.Path, "/ringwall.") || r.Public {
				panic(fmt.Sprintf("httpapi: a route at %q (public: %v) cannot be mounted", r.Path, r.Public))
			}
		}
		a.routes = append(a.routes, routes...)
	}
}

// Routes lists every route, for the tests that walk all of them.
func (a *API) Routes() []Route { return append([]Route{}, a.routes...) }

func (a *API) ownRoutes() []Route {
	return []Route{
		{Method: http.MethodGet, Path: healthPath, Public: true, Serve: health, Summary: "Whether the server answers", Media: "text/plain"},
		{
			Method: http.MethodGet, Path: "/ringwall/watch", Serve: a.watch, Summary: "Changes of documents as they happen, without a gap", Media: "text/event-stream",
			Query: []Query{{"below", "a place in the tree; default: the root"}, {"after", "begin after this revision; Last-Event-ID too"}},
		},
		{
			Method: http.MethodGet, Path: "/ringwall/audit", Serve: a.audit, Summary: "Records of the audit log, a line each", Media: "application/jsonl",
			Query: []Query{{"after", "begin after the record of this number"}},
		},
		{Method: http.MethodGet, Path: "/", Serve: a.get},
		{Method: http.MethodPut, Path: "/", Serve: a.put},
		{Method: http.MethodDelete, Path: "/", Serve: a.remove},
		{Method: http.MethodPost, Path: "/", Serve: a.act},
	}
}

const healthPath = "/healthz"

func health(w http.ResponseWriter, _ *http.Request, _ control.Actor) error {
	_, err := io.WriteString(w, "ok\n")
	return err
}

// Actor tells who sends a request: the bearer of a token, else the holder of
// the client certificate that TLS has verified. It fails closed: a token that is
// wrong is not made up for by a certificate.
func (a *API) Actor(r *http.Request) (*control.Actor, error) {
	if header := r.Header.Get("Authorization"); header != "" {
		token, ok := strings.CutPrefix(header, "Bearer ")
		if !ok || len(token) > maxToken {
			return nil, fmt.Errorf("send a token as `Authorization: Bearer …`: %w", errs.Untrusted)
		}
		if a.people != nil && looksLikeJWT(token) {
			return a.people.actor(r.Context(), token)
		}
		return a.door.Authenticate(r.Context(), token, a.now())
	}
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil, fmt.Errorf("send a token as `Authorization: Bearer …`, or a client certificate: %w", errs.Untrusted)
	}
	return a.door.AuthenticatePeer(r.Context(), r.TLS.VerifiedChains[0][0], a.now())
}

// maxToken is the longest bearer token in bytes.
const maxToken = 16 << 10

type actorKey struct{}

// ActorOf is who sent the request of a context that came through a Route, for
// handlers that get nothing but a context, such as Connect's.
func ActorOf(ctx context.Context) (control.Actor, bool) {
	by, ok := ctx.Value(actorKey{}).(control.Actor)
	return by, ok
}
