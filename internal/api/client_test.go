package api_test

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ringwall/internal/api"
	"ringwall/internal/errs"
)

func newClient(t *testing.T, h http.HandlerFunc) *api.Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	n := 0
	c, err := api.NewTokenClient(srv.URL, ca, func(context.Context) (string, error) {
		n++
		return strings.Repeat("t", n), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A request that comes too often waits as long as the server says, with its
// body and the newest token, and gives up in the end.
func TestDo_waits(t *testing.T) {
	var calls atomic.Int64
	c := newClient(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		n := calls.Add(1)
		if want := "Bearer " + strings.Repeat("t", int(n)); string(b) != "body" || r.Header.Get("Authorization") != want {
			t.Errorf("call %d: %s with %s", n, b, r.Header.Get("Authorization"))
		}
		if n == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		_, _ = io.WriteString(w, "{}")
	})
	start := time.Now()
	if _, _, err := c.Do(t.Context(), api.Request{Method: http.MethodPost, Path: "/x", Body: []byte("body")}); err != nil || calls.Load() != 2 || time.Since(start) < time.Second {
		t.Errorf("%v after %d calls and %v", err, calls.Load(), time.Since(start))
	}
	long := newClient(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "900")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	if _, _, err := long.Do(t.Context(), api.Request{Method: http.MethodGet, Path: "/x"}); err == nil || !strings.Contains(err.Error(), "429") {
		t.Errorf("a quarter of an hour: %v", err)
	}
}

// What a server refuses keeps its kind.
func TestDo_kinds(t *testing.T) {
	status := 0
	c := newClient(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, `{"error":{"code":"X","message":"because"}}`)
	})
	for s, want := range map[int]error{400: errs.Invalid, 401: errs.Untrusted, 403: errs.Denied, 404: errs.NotFound, 409: errs.Conflict, 412: errs.Conflict, 422: errs.Untrusted, 501: errs.Unsupported} {
		status = s
		if _, _, err := c.Do(t.Context(), api.Request{Method: http.MethodGet, Path: "/x"}); !errors.Is(err, want) || !strings.Contains(err.Error(), "because") {
			t.Errorf("%d: %v", s, err)
		}
	}
	for _, path := range []string{"https://elsewhere.example/", "//elsewhere.example/"} {
		if _, _, err := c.Do(t.Context(), api.Request{Method: http.MethodGet, Path: path}); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
