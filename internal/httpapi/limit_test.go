package httpapi_test

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/httpapi"
	"ringwall/internal/store"
)

// newServerWith is newServer with options, and a clock.
func newServerWith(t *testing.T, options ...httpapi.Option) (*server, *clock, *control.Door) {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	door, err := control.New(shelf{s}, control.Kind{Type: "Ringwall.Test/things"})
	if err != nil {
		t.Fatal(err)
	}
	out, c := &server{t: t}, &clock{}
	if out.admin, err = door.Bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	options = append([]httpapi.Option{httpapi.Remember(control.NewAnswers(door))}, options...)
	srv := httptest.NewServer(httpapi.New(door, slog.New(slog.DiscardHandler), c.now, options...))
	t.Cleanup(srv.Close)
	out.url = srv.URL
	return out, c, door
}

// One actor's flood ends in 429s of its own, and others do not notice.
func TestLimits(t *testing.T) {
	hold, held := make(chan struct{}), make(chan struct{}, 10)
	s, c, _ := newServerWith(t, httpapi.WithLimits(httpapi.Limits{PerSecond: 2, Burst: 20, Open: 2}),
		httpapi.Mount(httpapi.Route{Method: "GET", Path: "/ringwall/test/hold", Serve: func(_ http.ResponseWriter, _ *http.Request, _ control.Actor) error {
			held <- struct{}{}
			<-hold
			return nil
		}}))
	ana := s.user("ana", "", "")
	statuses := map[int]int{}
	var last reply
	for range 30 {
		last = s.do(ana, "GET", "/subscriptions", "")
		statuses[last.StatusCode]++
	}
	if statuses[200] < 20 || statuses[200] > 22 || statuses[429] != 30-statuses[200] || last.Header.Get("Retry-After") == "" || !strings.Contains(last.body, `"code":"TooManyRequests"`) {
		t.Errorf("%v, %v, %s", statuses, last.Header, last.body)
	}
	s.want(200, s.do(s.admin, "GET", "/subscriptions", ""))
	c.move(5 * time.Second)
	s.want(200, s.do(ana, "GET", "/subscriptions", ""))
	done := make(chan int, 2)
	for range 2 {
		go func() { done <- s.do(ana, "GET", "/ringwall/test/hold", "").StatusCode }()
		<-held
	}
	s.want(429, s.do(ana, "GET", "/subscriptions", ""), "under way already")
	s.want(200, s.do(s.admin, "GET", "/subscriptions", ""))
	close(hold)
	for range 2 {
		if code := <-done; code != 200 {
			t.Errorf("what was held ends with %d", code)
		}
	}
	s.want(200, s.do(ana, "GET", "/subscriptions", ""))
	for range 200 {
		s.want(200, s.do("", "GET", "/healthz", "")) // a probe is never too much
	}
}

// A request with a key happens once.
func TestIdempotencyKey(t *testing.T) {
	var ran atomic.Int64
	s, c, door := newServerWith(t, httpapi.Mount(
		httpapi.Route{Method: "POST", Path: "/ringwall/test/count", Serve: func(w http.ResponseWriter, r *http.Request, _ control.Actor) error {
			b, _ := io.ReadAll(r.Body)
			if string(b) == "bad" {
				return fmt.Errorf("bad: %w", errs.Invalid)
			}
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusAccepted)
			_, err := fmt.Fprintf(w, "run %d %s", ran.Add(1), strings.Repeat(string(b), 1))
			return err
		}}))
	ana, bob := s.user("ana", "", ""), s.user("bob", "", "")
	post := func(token, key, body string) reply {
		return s.do(token, "POST", "/ringwall/test/count", body, "Idempotency-Key", key)
	}
	first := s.want(202, post(ana, "k1", "x"), "run 1 x")
	again := s.want(202, post(ana, "k1", "x"))
	if again.body != first.body || again.Header.Get("Idempotency-Replayed") != "true" || again.Header.Get("Content-Type") != "text/plain" || first.Header.Get("Idempotency-Replayed") != "" {
		t.Errorf("%q, then %q %v", first.body, again.body, again.Header)
	}
	s.want(409, post(ana, "k1", "y"), "IdempotencyKeyInUse", "another request")
	s.want(202, post(bob, "k1", "x"), "run 2") // keys are one's own
	s.want(202, post(ana, "k2", "x"), "run 3")
	s.want(400, post(ana, "k3", "bad"))
	s.want(400, post(ana, "k3", "bad")) // what failed is tried again
	s.want(400, post(ana, strings.Repeat("k", 200), "x"), "Idempotency-Key")
	long := strings.Repeat("l", 100<<10)
	s.want(202, post(ana, "k4", long), "run 4")
	s.want(409, post(ana, "k4", long), "AnswerNotKept", "status 202")
	s.want(202, s.do(ana, "POST", "/ringwall/test/count", "x"), "run 5") // without a key
	s.want(202, s.do(ana, "POST", "/ringwall/test/count", "x"), "run 6")

	// A change of the tree: the answer is the old one, and nothing is written twice.
	s.want(201, s.do(s.admin, "PUT", sub, `{}`, "Idempotency-Key", "p1"))
	made := s.want(201, s.do(s.admin, "PUT", group, `{}`, "Idempotency-Key", "p2"))
	if r := s.want(201, s.do(s.admin, "PUT", group, `{}`, "Idempotency-Key", "p2")); r.body != made.body || r.Header.Get("ETag") != made.Header.Get("ETag") {
		t.Errorf("%s, then %s", made.body, r.body)
	}
	s.want(409, s.do(s.admin, "PUT", group, `{}`, "Idempotency-Key", "p2", "If-Match", made.Header.Get("ETag")), "IdempotencyKeyInUse")

	// One that began and never ended may be done again after some time, and not before.
	answers := control.NewAnswers(door)
	by := control.Actor{ID: "ana"}
	if done, err := answers.Begin(t.Context(), by, "k9", "r", c.now()); done != nil || err != nil {
		t.Fatal(done, err)
	}
	if _, err := answers.Begin(t.Context(), by, "k9", "r", c.now()); err == nil {
		t.Error("two at once")
	}
	if done, err := answers.Begin(t.Context(), by, "k9", "r", c.now().Add(3*time.Minute)); done != nil || err != nil {
		t.Error(done, err)
	}
}

// A client that sends its body drop by drop, or does not read, is let go.
func TestSlowClients(t *testing.T) {
	s, _, _ := newServerWith(t, httpapi.Mount(httpapi.Route{
		Method: "GET", Path: "/ringwall/test/much", Slow: 300 * time.Millisecond,
		Serve: func(w http.ResponseWriter, _ *http.Request, _ control.Actor) error {
			b := make([]byte, 1<<20)
			for range 200 {
				if _, err := w.Write(b); err != nil {
					return nil //nolint:nilerr // as it should be
				}
			}
			t.Error("200 MiB went to a client that reads nothing")
			return nil
		},
	}))
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := fmt.Fprintf(conn, "GET /ringwall/test/much HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", s.admin); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, conn); err == nil && n > 100<<20 || err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A page from elsewhere changes nothing, even in a browser that holds a certificate.
func TestCrossOrigin(t *testing.T) {
	s, _, _ := newServerWith(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	for _, h := range [][]string{{"Sec-Fetch-Site", "cross-site"}, {"Origin", "https://evil.example"}, {"Origin", "null"}} {
		s.want(403, s.do(s.admin, "PUT", sub, `{}`, h...), "a page from elsewhere")
		s.want(403, s.do("", "DELETE", sub, "", h...), "a page from elsewhere")
		s.want(200, s.do(s.admin, "GET", sub, "", h...)) // which no page can read
	}
	s.want(200, s.do(s.admin, "PUT", sub, `{}`, "Sec-Fetch-Site", "same-origin"))
}
