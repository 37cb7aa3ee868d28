package httpapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/httpapi"
	"ringwall/internal/rbac"
	"ringwall/internal/store"
)

type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

type server struct {
	t     *testing.T
	url   string
	admin string
	log   *bytes.Buffer
}

func newServer(t *testing.T) *server {
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
	out := &server{t: t, log: &bytes.Buffer{}}
	if out.admin, err = door.Bootstrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(httpapi.New(door, slog.New(slog.NewTextHandler(out.log, nil)), time.Now))
	t.Cleanup(srv.Close)
	out.url = srv.URL
	return out
}

type reply struct {
	*http.Response
	body string
}

func (s *server) do(token, method, path, body string, header ...string) reply {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return reply{resp, string(b)}
}

func (s *server) want(status int, r reply, parts ...string) reply {
	s.t.Helper()
	if r.StatusCode != status {
		s.t.Errorf("%s %s: %d, want %d: %s", r.Request.Method, r.Request.URL.Path, r.StatusCode, status, r.body)
	}
	for _, p := range parts {
		if !strings.Contains(r.body, p) {
			s.t.Errorf("%s %s: %s\nlacks %q", r.Request.Method, r.Request.URL.Path, r.body, p)
		}
	}
	return r
}

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
	thing = group + "/providers/Ringwall.Test/things/"
)

func (s *server) user(name, role, scope string) string {
	s.t.Helper()
	token := control.NewToken()
	s.want(201, s.do(s.admin, "PUT", control.TokenID(token).String(),
		fmt.Sprintf(`{"properties":{"principalId":%q,"displayName":%q,"expires":%q}}`, name, name, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))))
	if role != "" {
		s.want(201, s.do(s.admin, "PUT", strings.TrimSuffix(scope, "/")+"/providers/Microsoft.Authorization/roleAssignments/"+name,
			fmt.Sprintf(`{"properties":{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/%s","principalId":%q}}`, role, name)))
	}
	return token
}

func TestTree(t *testing.T) {
	s := newServer(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	s.want(201, s.do(s.admin, "PUT", group, `{"location":"here","tags":{"a":"b"}}`))
	made := s.want(201, s.do(s.admin, "PUT", thing+"One", `{"properties":{"size":1}}`, "If-None-Match", "*"),
		`"name":"One"`, `"type":"Ringwall.Test/things"`, `"properties":{"size":1}`, `"createdBy":"break-glass"`)
	etag := made.Header.Get("ETag")
	s.want(412, s.do(s.admin, "PUT", thing+"one", `{}`, "If-None-Match", "*"), "PreconditionFailed")
	got := s.want(200, s.do(s.admin, "GET", strings.ToUpper(thing)+"ONE?api-version=2031-01-01", ""), `"id":"`+thing+`One"`)
	// What was read can be sent back.
	s.want(200, s.do(s.admin, "PUT", thing+"One", got.body, "If-Match", etag))
	s.want(412, s.do(s.admin, "PUT", thing+"One", got.body, "If-Match", etag))
	s.want(400, s.do(s.admin, "PUT", thing+"Two", got.body), "the document says that it is")
	s.want(400, s.do(s.admin, "PUT", thing+"Two", `{"property":1}`), "unknown field")
	s.want(400, s.do(s.admin, "PUT", thing+"Two", `{} {}`), "goes on after")
	s.want(400, s.do(s.admin, "PUT", thing+"Two", `{"properties":"`+strings.Repeat("a", 5<<20)+`"}`), "longer than")
	s.want(400, s.do(s.admin, "PUT", thing+"Two", `{}`, "If-Match", "x"), "If-Match")
	s.want(400, s.do(s.admin, "PUT", group+"/providers/No.Such/type/x", `{}`), "no resource type")
	s.want(400, s.do(s.admin, "GET", "/nonsense", ""), "InvalidRequest")
	s.want(404, s.do(s.admin, "GET", thing+"Two", ""), "ResourceNotFound")
	s.want(201, s.do(s.admin, "PUT", thing+"Two?dryRun=true", `{}`))
	s.want(404, s.do(s.admin, "GET", thing+"Two", ""))
	s.want(409, s.do(s.admin, "DELETE", group, ""), "not empty")
	s.want(405, s.do(s.admin, "PATCH", thing+"One", ""))
	s.want(404, s.do(s.admin, "POST", thing+"One/burn", ""), "has no action")
	s.want(400, s.do(s.admin, "POST", thing+"One", ""))
	s.want(200, s.do(s.admin, "DELETE", thing+"One", ""))
	s.want(204, s.do(s.admin, "DELETE", thing+"One", ""))
	if strings.Contains(s.log.String(), "request_failed") {
		t.Error(s.log.String())
	}
}

func TestLists(t *testing.T) {
	s := newServer(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	s.want(201, s.do(s.admin, "PUT", group, `{}`))
	for i := range 5 {
		s.want(201, s.do(s.admin, "PUT", fmt.Sprintf("%st%d", thing, i), `{}`))
	}
	names := func(path string) (out []string) {
		for path != "" {
			r := s.want(200, s.do(s.admin, "GET", path, ""))
			var page struct {
				Value []struct{ Name string }
				Next  string `json:"nextLink"`
			}
			if err := json.Unmarshal([]byte(r.body), &page); err != nil {
				t.Fatal(err)
			}
			for _, v := range page.Value {
				out = append(out, v.Name)
			}
			path = ""
			if page.Next != "" {
				_, rest, _ := strings.Cut(page.Next, "://")
				path = rest[strings.IndexByte(rest, '/'):]
			}
		}
		return out
	}
	for path, want := range map[string]string{
		"/subscriptions":                                 "[0b1f6471-1bf0-4dda-aec3-cb9272f09590]",
		sub + "/resourceGroups":                          "[web]",
		sub + "/providers/ringwall.test/things?$top=2":   "[t0 t1 t2 t3 t4]",
		group + "/providers/Ringwall.Test/things?$top=5": "[t0 t1 t2 t3 t4]",
		group + "/resources":                             "[web t0 t1 t2 t3 t4]",
		thing + "t0/parts":                               "[]",
	} {
		if got := fmt.Sprint(names(path)); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	s.want(400, s.do(s.admin, "GET", "/subscriptions?$top=0", ""), "$top")
}

// Every route and every role: nobody without a token gets anything but 401 and
// health, and what a role may not is 403.
func TestAccess(t *testing.T) {
	s := newServer(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	s.want(201, s.do(s.admin, "PUT", group, `{}`))
	s.want(201, s.do(s.admin, "PUT", thing+"a", `{}`))
	tokens := map[string]string{
		"none": "", "wrong": "rwt_wrong", "nobody": s.user("nobody", "", ""),
		"reader": s.user("reader", rbac.Reader, "/"), "contributor": s.user("contributor", rbac.Contributor, "/"), "admin": s.admin,
		"elsewhere": s.user("elsewhere", rbac.Owner, sub),
	}
	s.want(201, s.do(s.admin, "PUT", "/subscriptions/other", `{}`))
	secret := control.TokenID(control.NewToken()).String()
	for _, tc := range []struct {
		method, path, body string
		may                string // those who get an answer; all others are refused
	}{
		{"GET", thing + "a", "", "reader contributor admin elsewhere"},
		{"GET", "/subscriptions/other", "", "reader contributor admin"},
		{"PUT", thing + "a", `{}`, "contributor admin elsewhere"},
		{"PUT", "/subscriptions/other", `{}`, "contributor admin"},
		{"DELETE", thing + "none", "", "contributor admin elsewhere"},
		{"PUT", "/providers/Microsoft.Authorization/roleAssignments/x", `{"properties":{"roleDefinitionId":"/providers/x/y/` + rbac.Owner + `","principalId":"p"}}`, "admin"},
		{"PUT", secret, `{"properties":{"principalId":"p","displayName":"p","expires":"` + time.Now().Add(time.Hour).UTC().Format(time.RFC3339) + `"}}`, "admin"},
		{"GET", "/ringwall/audit", "", "reader contributor admin"},
		{"GET", "/subscriptions", "", "nobody reader contributor admin elsewhere"}, // of what they may see
		{"GET", "/healthz", "", "none wrong nobody reader contributor admin elsewhere"},
	} {
		for name, token := range tokens {
			r := s.do(token, tc.method, tc.path, tc.body)
			may := strings.Contains(" "+tc.may+" ", " "+name+" ")
			want := 403
			if name == "none" || name == "wrong" {
				want = 401
			}
			if may && r.StatusCode >= 300 || !may && r.StatusCode != want {
				t.Errorf("%s %s as %s: %d %s", tc.method, tc.path, name, r.StatusCode, r.body)
			}
			if r.StatusCode == http.StatusUnauthorized && r.Header.Get("WWW-Authenticate") != "Bearer" {
				t.Error("401 without WWW-Authenticate")
			}
		}
	}
	if r := s.do(tokens["nobody"], "GET", "/subscriptions", ""); r.body != `{"value":[]}`+"\n" {
		t.Errorf("nobody sees %s", r.body)
	}
}

func TestAudit(t *testing.T) {
	s := newServer(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	s.want(403, s.do(s.user("eve", "", ""), "PUT", sub, `{}`))
	r := s.want(200, s.do(s.admin, "GET", "/ringwall/audit", ""))
	rep, err := audit.Verify(strings.NewReader(r.body), audit.Checkpoint{})
	if err != nil || rep.Records != 4 || rep.Refused != 1 {
		t.Errorf("%+v, %v", rep, err)
	}
	if strings.Contains(r.body, s.admin) {
		t.Error("the audit log holds a token")
	}
	if r := s.want(200, s.do(s.admin, "GET", "/ringwall/audit?after=3", "")); strings.Count(r.body, "\n") != 1 {
		t.Errorf("after 3: %s", r.body)
	}
	s.want(400, s.do(s.admin, "GET", "/ringwall/audit?after=x", ""))
}

func TestWatch(t *testing.T) {
	s := newServer(t)
	s.want(201, s.do(s.admin, "PUT", sub, `{}`))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	open := func(query string, header ...string) *bufio.Scanner {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/ringwall/watch"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+s.admin)
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("%d %s", resp.StatusCode, resp.Header)
		}
		return bufio.NewScanner(resp.Body)
	}
	next := func(in *bufio.Scanner, want string) {
		t.Helper()
		for in.Scan() {
			if line := in.Text(); strings.HasPrefix(line, "data: {\"revision\"") {
				if !strings.Contains(line, want) {
					t.Errorf("%s, want %s", line, want)
				}
				return
			}
		}
		t.Fatalf("the stream ended before %s: %v", want, in.Err())
	}
	in := open("?below=" + sub)
	next(in, `"id":"`+sub+`"`)
	s.want(201, s.do(s.admin, "PUT", group, `{}`))
	next(in, `"id":"`+group+`"`)
	s.want(200, s.do(s.admin, "DELETE", group, ""))
	next(in, `"deleted":true`)
	next(open("?after=99", "Last-Event-ID", "2"), `"id":"`+group+`"`) // as a browser resumes
	s.want(400, s.do(s.admin, "GET", "/ringwall/watch?below=x", ""))
}
