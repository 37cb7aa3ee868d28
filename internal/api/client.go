// Package api is the Go client of a Ringwall server, for the command line and
// for agents.
package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
)

const (
	maxAnswer = 64 << 20 // bytes of one answer
	maxEvent  = 8 << 20  // bytes of one event of a stream
)

// Client talks to one server. It may be used by several goroutines.
type Client struct {
	base  *url.URL
	token func(context.Context) (string, error) // nil: none
	http  *http.Client
}

// NewClient returns a client of a server's URL, which must be https. ca is who
// certifies the server, as PEM; empty for the system's own authorities.
func NewClient(server string, ca []byte, token string) (*Client, error) {
	base, err := url.Parse(server)
	if err != nil || base.Scheme != "https" || base.Host == "" || strings.Trim(base.Path, "/") != "" {
		return nil, fmt.Errorf("server %.200q: want https://HOST[:PORT]: %w", server, errs.Invalid)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS13}
	if len(ca) > 0 {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("the CA of %s holds no certificate: %w", base.Host, errs.Invalid)
		}
	}
	var fixed func(context.Context) (string, error)
	if token != "" {
		fixed = func(context.Context) (string, error) { return token, nil }
	}
	return &Client{base: base, token: fixed, http: &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: conf, ForceAttemptHTTP2: true,
			TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 60 * time.Second, IdleConnTimeout: 90 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // it would carry the token elsewhere
	}}, nil
}

// NewCertificateClient is NewClient for a service, which shows a certificate and
// has no token. cert and key are PEM.
func NewCertificateClient(server string, ca, cert, key []byte) (*Client, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("client certificate: %w: %w", err, errs.Invalid)
	}
	c, err := NewClient(server, ca, "")
	if err != nil {
		return nil, err
	}
	c.http.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{pair} //nolint:forcetypeassert // made above
	return c, nil
}

// NewTokenClient is NewClient for tokens that are replaced: token is asked before
// each request, by several goroutines.
func NewTokenClient(server string, ca []byte, token func(context.Context) (string, error)) (*Client, error) {
	c, err := NewClient(server, ca, "")
	if err != nil {
		return nil, err
	}
	c.token = token
	return c, nil
}

// Request is one call.
type Request struct {
	Method  string
	Path    string // with its query
	Body    []byte
	IfMatch string // an ETag
	Absent  bool   // only if there is nothing yet
}

// Do returns the body of an answer and its ETag. What the server refuses is an
// error of the kind that the server meant.
func (c *Client) Do(ctx context.Context, q Request) (body []byte, etag string, err error) {
	resp, err := c.send(ctx, q)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, "", fmt.Errorf("%s %s: %w", q.Method, q.Path, err)
	}
	if len(body) > maxAnswer {
		return nil, "", fmt.Errorf("%s %s: an answer of more than %d bytes: %w", q.Method, q.Path, maxAnswer, errs.Invalid)
	}
	return body, resp.Header.Get("ETag"), nil
}

// maxWaits is how often a request waits because the server says that it comes
// too often.
const maxWaits = 8

func (c *Client) send(ctx context.Context, q Request) (*http.Response, error) {
	for waits := 0; ; waits++ {
		resp, err := c.once(ctx, q)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", q.Method, q.Path, err)
		}
		if resp.StatusCode < 300 {
			return resp, nil
		}
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After")) // 0 if it is none
		if resp.StatusCode != http.StatusTooManyRequests || waits == maxWaits || seconds < 1 || seconds > 30 {
			defer func() { _ = resp.Body.Close() }()
			return nil, fmt.Errorf("%s %s: %w", q.Method, q.Path, refusal(resp))
		}
		_ = resp.Body.Close() // nothing in it is needed
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Duration(seconds) * time.Second):
		}
	}
}

func (c *Client) once(ctx context.Context, q Request) (*http.Response, error) {
	u, err := c.base.Parse(q.Path)
	if err != nil || u.Host != c.base.Host || u.Scheme != c.base.Scheme {
		return nil, errs.Invalid
	}
	req, err := http.NewRequestWithContext(ctx, q.Method, u.String(), bytes.NewReader(q.Body))
	if err != nil {
		return nil, err
	}
	if c.token != nil {
		token, err := c.token(ctx)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if len(q.Body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	if q.IfMatch != "" {
		req.Header.Set("If-Match", q.IfMatch)
	}
	if q.Absent {
		req.Header.Set("If-None-Match", "*")
	}
	resp, err := c.http.Do(req)
	return resp, withoutURL(err)
}

// withoutURL is the error without http's own words around it.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// refusal turns an answer into an error of its kind.
func refusal(resp *http.Response) error {
	var body struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	text := resp.Status
	if json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&body) == nil && body.Error.Message != "" {
		text = body.Error.Message
	}
	kinds := map[int]error{
		http.StatusBadRequest: errs.Invalid, http.StatusUnauthorized: errs.Untrusted, http.StatusUnprocessableEntity: errs.Untrusted, http.StatusForbidden: errs.Denied,
		http.StatusNotFound: errs.NotFound, http.StatusConflict: errs.Conflict, http.StatusPreconditionFailed: errs.Conflict,
		http.StatusNotImplemented: errs.Unsupported,
	}
	kind, ok := kinds[resp.StatusCode]
	if !ok {
		return fmt.Errorf("the server answers %s: %s", resp.Status, text)
	}
	// the message ends with its kind already
	return fmt.Errorf("the server answers: %s: %w", strings.TrimSuffix(text, ": "+kind.Error()), kind)
}

// List visits every item of a list, over all its pages.
func (c *Client) List(ctx context.Context, path string, visit func(json.RawMessage) error) error {
	for path != "" {
		b, _, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path})
		if err != nil {
			return err
		}
		var page struct {
			Value []json.RawMessage `json:"value"`
			Next  string            `json:"nextLink"`
		}
		if err := json.Unmarshal(b, &page); err != nil {
			return fmt.Errorf("list %s: %w: %w", path, err, errs.Invalid)
		}
		for _, v := range page.Value {
			if err := visit(v); err != nil {
				return err
			}
		}
		path = ""
		if page.Next != "" {
			next, err := url.Parse(page.Next)
			if err != nil {
				return fmt.Errorf("list: next page %.200q: %w", page.Next, errs.Invalid)
			}
			path = next.RequestURI() // of this server, whatever host it says
		}
	}
	return nil
}

// Lines visits every line of an answer that is streamed. A stream that breaks
// off is an error.
func (c *Client) Lines(ctx context.Context, path string, visit func(line []byte) error) error {
	resp, err := c.send(ctx, Request{Method: http.MethodGet, Path: path})
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	in := bufio.NewScanner(resp.Body)
	in.Buffer(nil, maxEvent)
	for in.Scan() {
		if err := visit(in.Bytes()); err != nil {
			return err
		}
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

// Event is one of a stream of server-sent events.
type Event struct {
	Name string // "change" or "passed"
	ID   uint64 // the revision
	Data []byte
}

// Watch visits the events of the change feed after a revision, below a place in
// the tree, until ctx ends or visit fails. It resumes by itself when the
// connection breaks, and misses nothing.
func (c *Client) Watch(ctx context.Context, below string, after uint64, visit func(Event) error) error {
	pause := time.Second
	for {
		before := after
		err := c.watch(ctx, below, &after, visit)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return err
		}
		if after != before {
			pause = time.Second
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
	}
}

// watch returns nil when the connection broke and may be made again.
func (c *Client) watch(ctx context.Context, below string, after *uint64, visit func(Event) error) error {
	q := url.Values{"below": {below}, "after": {strconv.FormatUint(*after, 10)}}
	var visitErr error
	e := Event{}
	err := c.Lines(ctx, "/ringwall/watch?"+q.Encode(), func(line []byte) error {
		key, value, _ := strings.Cut(string(line), ": ")
		switch key {
		case "event":
			e.Name = value
		case "id":
			n, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				return fmt.Errorf("event %.40q: %w", value, errs.Invalid)
			}
			e.ID = n
		case "data":
			e.Data = []byte(value)
		case "":
			if e.Name != "" {
				*after = e.ID
				visitErr = visit(e)
			}
			e = Event{}
		}
		return visitErr
	})
	switch {
	case visitErr != nil:
		return visitErr
	case err == nil:
		return nil
	}
	for _, kind := range []error{errs.Invalid, errs.Untrusted, errs.Denied, errs.NotFound, errs.Unsupported} {
		if errors.Is(err, kind) {
			return err
		}
	}
	return nil // the network, or a server that restarts
}
