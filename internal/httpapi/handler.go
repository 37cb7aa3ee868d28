// Package httpapi is the server's HTTP: the resource tree in the manner of Azure
// Resource Manager, the change feed and the audit log. It authenticates, reads
// requests within bounds, and leaves every decision to package control.
package httpapi

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Identities tells who somebody is.
type Identities interface {
	AuthenticatePeer(ctx context.Context, cert *x509.Certificate, now time.Time) (*control.Actor, error)
	Authenticate(ctx context.Context, token string, now time.Time) (*control.Actor, error)
}

// Door is what the handlers need of control.Door.
type Door interface {
	Identities
	Get(ctx context.Context, by control.Actor, id resource.ID) (*resource.Document, error)
	List(ctx context.Context, by control.Actor, q resource.Query) ([]resource.Document, string, error)
	Put(ctx context.Context, by control.Actor, d resource.Document, when resource.When, dryRun bool) (*resource.Document, error)
	Delete(ctx context.Context, by control.Actor, id resource.ID, when resource.When, dryRun bool) error
	Invoke(ctx context.Context, by control.Actor, id resource.ID, name string, body json.RawMessage) (any, error)
	Watch(ctx context.Context, by control.Actor, below resource.ID, after uint64, visit func(resource.Change) error, seen func(uint64) error) error
	Audit(ctx context.Context, by control.Actor, after uint64, limit int) ([]audit.Record, error)
}

const (
	maxBody     = resource.MaxProperties + 64<<10 // bytes
	defaultPage = 100
	auditPage   = 1000
)

// API is the handler of everything.
type API struct {
	door   Door
	log    *slog.Logger
	now    func() time.Time
	routes []Route
	mux    *http.ServeMux
	people *people // nil: tokens of OpenID Connect are not taken
	limits *limiter
	// public limits those who are not authenticated, by address; joining those who
	// are not yet anybody, such as hosts that enrol.
	public, joining *limiter
	answers         Answers // nil: Idempotency-Key is not taken

	sameOrigin *http.CrossOriginProtection
}

// New returns the handler of everything. Nothing but what Route calls public is
// answered without authentication.
func New(d Door, log *slog.Logger, now func() time.Time, options ...Option) *API {
	a := &API{
		door: d, log: log, now: now, mux: http.NewServeMux(), sameOrigin: http.NewCrossOriginProtection(),
		limits: newLimiter(defaultLimits(), now), public: newLimiter(Limits{PerSecond: 10, Burst: 100, Open: 64}, now),
		joining: newLimiter(Limits{PerSecond: 1000, Burst: 10_000, Open: 1024}, now),
	}
	a.routes = a.ownRoutes()
	for _, o := range options {
		o(a)
	}
	for _, r := range a.routes {
		a.mux.Handle(r.Method+" "+r.Path, a.serve(r))
	}
	return a
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// serve fails closed: who is not known gets no answer but 401, whatever was
// asked for.
func (a *API) serve(route Route) http.HandlerFunc {
	who := route.Who
	if who == nil {
		who = a.Actor
	}
	limit, slow := cmp.Or(route.MaxBody, maxBody), cmp.Or(route.Slow, answerTime)
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		request := newRequestID()
		h.Set("x-ms-request-id", request)
		deadlines(w, r, slow)
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		if err := a.answer(w, r, route, who); err != nil {
			a.fail(w, r, request, err)
		}
	}
}

// How long a client may take to send a body, and an answer to go out.
const (
	bodyTime   = time.Minute
	answerTime = time.Minute
)

// deadlines end the request of a client that is too slow. Streams move theirs.
func deadlines(w http.ResponseWriter, r *http.Request, answer time.Duration) {
	c, now := http.NewResponseController(w), time.Now()
	var body time.Time // without a body there is nothing to wait for: a deadline would end a stream
	if r.ContentLength != 0 {
		body = now.Add(bodyTime)
	}
	// what carries no deadlines is a test's
	_ = c.SetReadDeadline(body)
	_ = c.SetWriteDeadline(now.Add(answer))
}

func (a *API) answer(w http.ResponseWriter, r *http.Request, route Route, who Authenticator) error {
	// a browser may hold a client certificate, and show it on behalf of any page
	if err := a.sameOrigin.Check(r); err != nil {
		return fmt.Errorf("a page from elsewhere asks: %w: %w", err, errs.Denied)
	}
	if route.Public {
		if route.Path == healthPath {
			return route.Serve(w, r, control.Actor{})
		}
		leave, err := a.public.enter(from(r))
		if err != nil {
			return err
		}
		defer leave()
		return route.Serve(w, r, control.Actor{})
	}
	by, err := who(r)
	if errors.Is(err, errs.Untrusted) {
		return &statusError{status: http.StatusUnauthorized, code: "AuthenticationFailed", err: err}
	}
	if err != nil {
		return err
	}
	leave, err := a.enter(r, by)
	if err != nil {
		return err
	}
	defer leave()
	r = r.WithContext(context.WithValue(r.Context(), actorKey{}, *by))
	if key := r.Header.Get("Idempotency-Key"); key != "" && a.answers != nil && r.Method != http.MethodGet {
		if route.MaxBody > maxBody { // the body would have to be held in memory
			return fmt.Errorf("Idempotency-Key is not taken here: repeating does no harm: %w", errs.Invalid)
		}
		return a.once(w, r, *by, key, route.Serve)
	}
	return route.Serve(w, r, *by)
}

// enter counts a request of somebody who is authenticated.
func (a *API) enter(r *http.Request, by *control.Actor) (leave func(), err error) {
	if by.ID == "" {
		return a.joining.enter(from(r))
	}
	return a.limits.enter(by.ID)
}

func newRequestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

// fail maps a kind of error to a status, once. What is no kind stays inside:
// the client gets the request's id, the log has the rest.
func (a *API) fail(w http.ResponseWriter, r *http.Request, request string, err error) {
	if r.Context().Err() != nil {
		return // nobody is there any more
	}
	status, code, text := http.StatusInternalServerError, "InternalError", "something went wrong; the server's log has it under "+request
	conditional := r.Header.Get("If-Match") != "" || r.Header.Get("If-None-Match") != ""
	for _, k := range []struct {
		kind   error
		status int
		code   string
	}{
		{errs.Untrusted, http.StatusUnprocessableEntity, "Untrusted"}, // what was sent, not who sent it
		{errs.Denied, http.StatusForbidden, "AuthorizationFailed"},
		{errs.Invalid, http.StatusBadRequest, "InvalidRequest"},
		{errs.NotFound, http.StatusNotFound, "ResourceNotFound"},
		{errs.Conflict, http.StatusConflict, "Conflict"},
		{errs.Unsupported, http.StatusNotImplemented, "NotSupported"},
	} {
		if errors.Is(err, k.kind) {
			status, code, text = k.status, k.code, err.Error()
			break
		}
	}
	own, isOwn := errors.AsType[*statusError](err)
	if errors.Is(err, control.ErrTooMany) {
		own, isOwn = &statusError{http.StatusTooManyRequests, "TooManyRequests", 15 * time.Minute, err}, true
	}
	if isOwn && own.after > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((own.after+time.Second-1)/time.Second)))
	}
	switch {
	case isOwn:
		if status, code, text = own.status, own.code, own.Error(); status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
	case status == http.StatusConflict && conditional:
		status, code = http.StatusPreconditionFailed, "PreconditionFailed"
	case status == http.StatusInternalServerError:
		a.log.ErrorContext(r.Context(), "request_failed", slog.String("request", request), slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Any("error", err))
	}
	w.Header().Set("x-ms-error-code", code)
	type body struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	_ = writeJSON(w, status, map[string]body{"error": {code, text}})
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // the client may be gone
	return nil
}

func writeDocument(w http.ResponseWriter, status int, d *resource.Document) error {
	if d.Revision != 0 {
		w.Header().Set("ETag", d.ETag())
	}
	return writeJSON(w, status, d)
}

func (a *API) get(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	if below, kind, ok := collection(r.URL.Path); ok {
		return a.list(w, r, by, below, kind)
	}
	id, err := resource.ParseID(r.URL.Path)
	if err != nil {
		return err
	}
	d, err := a.door.Get(r.Context(), by, id)
	if err != nil {
		return err
	}
	return writeDocument(w, http.StatusOK, d)
}

// collection tells a list's path from a document's:
//
//	/subscriptions, SUBSCRIPTION/resourceGroups, SCOPE/resources,
//	SCOPE/providers/NAMESPACE/TYPE, RESOURCE/TYPE
func collection(path string) (below resource.ID, kind string, ok bool) {
	path = strings.TrimSuffix(path, "/")
	cut := strings.LastIndexByte(path, '/')
	if cut < 0 {
		return below, "", false
	}
	scope, last := path[:cut], path[cut+1:]
	if strings.EqualFold(last, "resources") {
		below, err := resource.ParseID(scope + "/")
		return below, "", err == nil
	}
	// a made-up name makes it the id of what would be listed
	sample, err := resource.ParseID(path + "/x")
	if err != nil {
		return below, "", false
	}
	if scope == "" {
		return below, sample.Type(), true
	}
	return sample.Parent(), sample.Type(), true
}

func (a *API) list(w http.ResponseWriter, r *http.Request, by control.Actor, below resource.ID, kind string) error {
	q := resource.Query{Below: below, Type: kind, Limit: defaultPage, After: r.URL.Query().Get("$skiptoken")}
	if top := r.URL.Query().Get("$top"); top != "" {
		n, err := strconv.Atoi(top)
		if err != nil || n < 1 || n > resource.MaxPage {
			return fmt.Errorf("$top is %.20q (1 to %d): %w", top, resource.MaxPage, errs.Invalid)
		}
		q.Limit = n
	}
	docs, next, err := a.door.List(r.Context(), by, q)
	if err != nil {
		return err
	}
	out := struct {
		Value []resource.Document `json:"value"`
		Next  string              `json:"nextLink,omitempty"`
	}{Value: append([]resource.Document{}, docs...)}
	if next != "" {
		v := r.URL.Query()
		v.Set("$skiptoken", next)
		out.Next = (&url.URL{Scheme: "https", Host: r.Host, Path: r.URL.Path, RawQuery: v.Encode()}).String()
	}
	return writeJSON(w, http.StatusOK, out)
}

// input is a document as a client sends it. What the server says of it may be
// there, so that a document that was read can be sent back, and is ignored.
type input struct {
	ID         *resource.ID      `json:"id"`
	Name       string            `json:"name"`
	Type       string            `json:"type"`
	ETag       string            `json:"etag"`
	System     json.RawMessage   `json:"systemData"`
	Location   string            `json:"location"`
	Tags       map[string]string `json:"tags"`
	Properties json.RawMessage   `json:"properties"`
}

func (a *API) put(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	id, err := resource.ParseID(r.URL.Path)
	if err != nil {
		return err
	}
	when, err := condition(r)
	if err != nil {
		return err
	}
	var in input
	if err := readJSON(r, &in); err != nil {
		return err
	}
	if in.ID != nil && !in.ID.Equal(id) {
		return fmt.Errorf("the document says that it is %s: %w", in.ID, errs.Invalid)
	}
	doc := resource.Document{ID: id, Location: in.Location, Tags: in.Tags, Properties: in.Properties}
	d, err := a.door.Put(r.Context(), by, doc, when, dryRun(r))
	if err != nil {
		return err
	}
	status := http.StatusOK
	if d.Created() {
		status = http.StatusCreated
	}
	return writeDocument(w, status, d)
}

// condition reads If-Match and If-None-Match (RFC 9110, section 13.1).
func condition(r *http.Request) (resource.When, error) {
	var when resource.When
	switch v := r.Header.Get("If-None-Match"); v {
	case "":
	case "*":
		when.Absent = true
	default:
		return when, fmt.Errorf("If-None-Match may be * only: %w", errs.Invalid)
	}
	if v := r.Header.Get("If-Match"); v != "" && v != "*" {
		n, err := resource.ParseETag(v)
		if err != nil {
			return when, fmt.Errorf("If-Match: %w", err)
		}
		when.Revision = n
	}
	return when, nil
}

func dryRun(r *http.Request) bool {
	v := r.URL.Query().Get("dryRun")
	return v != "" && v != "false"
}

// act does what a document's kind offers beside writing: POST ID/ACTION.
func (a *API) act(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	cut := strings.LastIndexByte(r.URL.Path, '/')
	id, err := resource.ParseID(r.URL.Path[:max(cut, 0)] + "/")
	if err != nil {
		return err
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return fmt.Errorf("the body: %w: %w", err, errs.Invalid)
	}
	if len(body) == 0 {
		body = []byte("{}")
	}
	answer, err := a.door.Invoke(r.Context(), by, id, r.URL.Path[cut+1:], body)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, answer)
}

func (a *API) remove(w http.ResponseWriter, r *http.Request, by control.Actor) error {
	id, err := resource.ParseID(r.URL.Path)
	if err != nil {
		return err
	}
	when, err := condition(r)
	if err != nil {
		return err
	}
	switch err := a.door.Delete(r.Context(), by, id, when, dryRun(r)); {
	case errors.Is(err, errs.NotFound):
		w.WriteHeader(http.StatusNoContent) // as Azure answers: it is gone, as was wanted
	case err != nil:
		return err
	default:
		w.WriteHeader(http.StatusOK)
	}
	return nil
}
