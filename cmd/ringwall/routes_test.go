package main

import (
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

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/spf13/cobra"

	"ringwall/internal/control"
	"ringwall/internal/httpapi"
	"ringwall/internal/rbac"
)

// assembled is a whole server without its listener.
type assembled struct {
	t     *testing.T
	parts *serverParts
	api   *httpapi.API
	url   string
	admin string
}

func assembleServer(t *testing.T) *assembled {
	t.Helper()
	var o serverOptions
	o.audit.flags(&cobra.Command{})
	o.data = t.TempDir()
	p, err := openServer(t.Context(), o.url(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.close() })
	token, err := p.door.Bootstrap(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e := &env{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, now: time.Now, getenv: func(string) string { return "" }, quiet: true}
	if err := o.assemble(t.Context(), e, p); err != nil {
		t.Fatal(err)
	}
	a := &assembled{t: t, parts: p, admin: token, api: p.api("https://localhost", time.Now)}
	srv := httptest.NewServer(a.api)
	t.Cleanup(srv.Close)
	a.url = srv.URL
	return a
}

func (a *assembled) do(token, method, path, body string) (int, string) {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.Header.Get("Content-Type") == "text/event-stream" {
		return resp.StatusCode, "" // it would go on for ever
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// Letters of roles in the tables below.
func roleLetters() map[byte]string {
	return map[byte]string{
		'O': rbac.Owner, 'C': rbac.Contributor, 'R': rbac.Reader, 'U': rbac.UserAccessAdministrator, 'S': rbac.SecurityAdministrator,
		'M': rbac.ReleaseManager, 'E': rbac.OnCallEngineer, 'A': rbac.Auditor, 'H': rbac.Host,
	}
}

const (
	all      = "*"       // everybody who is somebody
	watchers = "OCRUSEA" // who may read everything
)

// kindAccess says which roles may read and write a type of document, and do
// each of its actions. A type or an action that is not here fails the test:
// adding one is a decision, made here.
func kindAccess() map[string]struct {
	read, write string
	actions     map[string]string
} {
	type access = struct {
		read, write string
		actions     map[string]string
	}
	incident := map[string]string{}
	for _, action := range []string{"acknowledge", "close", "comment", "mitigate", "resolve", "triage"} {
		incident[action] = "OCSE"
	}
	return map[string]access{
		"Microsoft.Resources/subscriptions":                {"OCRUSMEA", "OC", nil},
		"Microsoft.Resources/subscriptions/resourceGroups": {"OCRUSMEA", "OC", nil},
		"Microsoft.Authorization/roleDefinitions":          {watchers, "OU", nil},
		"Microsoft.Authorization/roleAssignments":          {watchers, "OU", nil},
		"Microsoft.Authorization/denyAssignments":          {watchers, "OUS", nil},
		// whoever makes somebody could be him: it takes what assigning roles takes, too
		"Ringwall.Identity/tokens":       {watchers, "O", nil},
		"Ringwall.Identity/users":        {watchers, "O", nil},
		"Ringwall.Identity/groups":       {watchers, "O", nil},
		"Ringwall.Identity/issuers":      {watchers, "O", nil},
		"Ringwall.Identity/certificates": {watchers, "O", nil},
		"Ringwall.Fleet/hosts": {"OCRUSMEAH", "OCS", map[string]string{
			"isolate": "OCSE", "release": "OCSE", "revoke": "OCS", "attest": "OCS", "resendInventory": "OCS",
			"quarantine": "OCSE", "readmit": "OCS", "approveTPM": "OCS", "replaceTPM": "OCS", "announceReboot": "OCS",
		}},
		"Ringwall.Attestation/policies": {"OCRUSMEA", "OCS", nil},
		"Ringwall.Attestation/outages":  {"OCRUSMEA", "OCS", nil},
		"Ringwall.Fleet/joinTokens":     {"OCRUSMEA", "OCS", nil},
		"Ringwall.Fleet/manifests":      {"OCRUSMEAH", "OCSM", nil},
		"Ringwall.Fleet/halts":          {"OCRUSMEA", "OCSME", nil},
		"Ringwall.Fleet/rollouts": {"OCRUSMEA", "OCSM", map[string]string{
			"start": "OCSM", "approve": "OCSM", "promote": "OCSM", "resume": "OCSM", "pause": "OCSME", "rollback": "OCSME",
		}},
		"Ringwall.Incidents/incidents": {"OCRUSMEA", "OCSE", incident},
		"Ringwall.Incidents/silences":  {"OCRUSMEA", "OCSE", nil},
	}
}

// routeAccess says the same of every route that is no document. "public" is for
// everybody, "own" for those who authenticate in another way than these roles.
func routeAccess() map[string]string {
	return map[string]string{
		"GET /healthz": "public",
		"GET /.well-known/oauth-protected-resource":                           "public",
		"GET /ringwall/issuer/.well-known/openid-configuration":               "public",
		"GET /ringwall/issuer/keys":                                           "public",
		"POST /ringwall/issuer/device":                                        "public",
		"GET /ringwall/issuer/activate":                                       "public",
		"POST /ringwall/issuer/activate":                                      "public",
		"GET /ringwall/issuer/authorize":                                      "public",
		"POST /ringwall/issuer/authorize":                                     "public",
		"GET /ringwall/issuer/password":                                       "public",
		"POST /ringwall/issuer/password":                                      "public",
		"POST /ringwall/issuer/token":                                         "public",
		"POST /ringwall/issuer/revoke":                                        "public",
		"POST /ringwall.agent.v1.Agent/":                                      "own", // a host's certificate
		"POST /ringwall.agent.v1.Enrolment/":                                  "own", // a join token in the message
		"GET /ringwall/watch":                                                 all,   // of what one may read
		"GET /ringwall/whoami":                                                all,
		"GET /ringwall/openapi.json":                                          all,
		"GET /ringwall/can?action=Ringwall.Fleet/hosts/read":                  all, // of oneself
		"GET /ringwall/can?principal=x&action=X/y/read":                       watchers,
		"POST /ringwall/certificates":                                         "O",
		"GET /ringwall/audit":                                                 watchers,
		"GET /ringwall/audit/checkpoint":                                      watchers,
		"GET /ringwall/fleet/hosts":                                           "OCRUSMEAH",
		"GET /ringwall/fleet/inventory":                                       "OCRUSMEAH",
		"GET /ringwall/fleet/events":                                          "OCRUSMEAH",
		"POST /ringwall/fleet/chunks":                                         "OCSM",
		"PUT /ringwall/fleet/chunks/{sha256}":                                 "OCSM",
		"GET /ringwall/fleet/chunks/{sha256}":                                 "OCRUSMEAH",
		"GET /ringwall/fleet/rollout?id=/providers/Ringwall.Fleet/rollouts/x": "OCRUSMEA",
	}
}

func bodyOf(t *testing.T, route string) string {
	t.Helper()
	switch {
	case strings.HasPrefix(route, "POST /ringwall/fleet/chunks"):
		return `{"scope":"/","chunks":[]}`
	case strings.HasPrefix(route, "POST /ringwall/certificates"):
		_, csr, err := newRequest()
		if err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(map[string]any{"name": "ci", "csr": string(csr)})
		return string(b)
	}
	return `{}`
}

// saidTo is what an answer says of who asked.
func saidTo(status int, body string) string {
	switch {
	case status == http.StatusUnauthorized:
		return "nobody"
	case status == http.StatusForbidden && strings.Contains(body, " may not "):
		return "refused"
	case status >= 500:
		return fmt.Sprintf("broken (%d %s)", status, body)
	}
	return "may"
}

// Every route, every type, every action, for every role: who is not meant to is
// refused, who is not known is nobody, and nothing is forgotten.
func TestRoutes_everyRole(t *testing.T) {
	a := assembleServer(t)
	people := map[string]string{"none": "", "wrong": "rwt_wrong", "a JWT": "a.eyJpc3MiOiJ4In0.c", "admin": a.admin, "no role": a.token("nobody", "")}
	for letter, role := range roleLetters() {
		people[string(letter)] = a.token("role-"+string(letter), role)
	}
	if n := len(rbac.BuiltIn()); n != len(roleLetters()) {
		t.Errorf("%d built-in roles, %d letters", n, len(roleLetters()))
	}
	check := func(route, body, may string) {
		method, path, _ := strings.Cut(route, " ")
		path = strings.ReplaceAll(path, "{sha256}", strings.Repeat("0", 64))
		for who, token := range people {
			got := saidTo(a.do(token, method, path, body))
			want := "refused"
			switch {
			case may == "public":
				want = "may"
			case who == "none" || who == "wrong" || who == "a JWT":
				want = "nobody"
			case may == "own":
				want = "nobody"
			case who == "admin" || may == all || strings.Contains(may, who):
				want = "may"
			}
			if got != want {
				t.Errorf("%s as %s: %s, want %s", route, who, got, want)
			}
		}
	}
	left := routeAccess()
	for _, r := range a.api.Routes() {
		route := r.Method + " " + r.Path
		if r.Path == "/" {
			continue // documents, below
		}
		found := false
		for key, may := range routeAccess() {
			if key != route && !strings.HasPrefix(key, route+"?") {
				continue
			}
			found = true
			delete(left, key)
			if r.Public != (may == "public") {
				t.Errorf("%s: public is %v, the table says %s", route, r.Public, may)
			}
			if strings.HasPrefix(r.Path, "/ringwall.agent.v1.Enrolment/") {
				a.enrolment(r.Path)
				continue
			}
			if may != "public" || r.Method == http.MethodGet {
				check(key, bodyOf(t, key), may)
			}
		}
		if !found {
			t.Errorf("%s: nobody has decided who may; add it to routeAccess", route)
		}
	}
	for key := range left {
		t.Errorf("%s is in the table and no route", key)
	}

	kinds := kindAccess()
	for _, k := range a.parts.door.Kinds() {
		may, ok := kinds[k.Type]
		if !ok {
			t.Errorf("%s: nobody has decided who may; add it to kindAccess", k.Type)
			continue
		}
		delete(kinds, k.Type)
		list, doc := samplePaths(k.Type)
		check("GET "+doc, "", may.read)
		check("GET "+list, "", all) // of what one may read
		check("DELETE "+doc, "", may.write)
		check("PUT "+doc, `{"properties":{}}`, may.write)
		for action := range k.Actions {
			if _, ok := may.actions[action]; !ok {
				t.Errorf("%s/%s: nobody has decided who may; add it to kindAccess", k.Type, action)
			}
			check("POST "+doc+"/"+action, `{}`, may.actions[action])
		}
	}
	for kind := range kinds {
		t.Errorf("%s is in the table and no type", kind)
	}
	if _, body := a.do(people["no role"], "GET", "/resources", ""); !strings.Contains(body, `"value":[]`) {
		t.Errorf("who has no role sees %s", body)
	}
}

// token makes one for somebody with a role at the root.
func (a *assembled) token(name, role string) string {
	a.t.Helper()
	token := control.NewToken()
	put := func(id, properties string) {
		if status, body := a.do(a.admin, "PUT", id, `{"properties":`+properties+`}`); status >= 300 {
			a.t.Fatalf("%s: %d %s", id, status, body)
		}
	}
	put(control.TokenID(token).String(), fmt.Sprintf(`{"principalId":%q,"displayName":%q,"expires":%q}`, name, name, time.Now().Add(time.Hour).UTC().Format(time.RFC3339)))
	if role != "" {
		put("/providers/Microsoft.Authorization/roleAssignments/"+name, fmt.Sprintf(`{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/%s","principalId":%q}`, role, name))
	}
	return token
}

// samplePaths are a list and a document of a type, which is not there.
func samplePaths(kind string) (list, doc string) {
	switch kind {
	case control.TypeSubscription:
		return "/subscriptions", "/subscriptions/none"
	case control.TypeGroup:
		return "/subscriptions/none/resourceGroups", "/subscriptions/none/resourceGroups/none"
	}
	namespace, rest, _ := strings.Cut(kind, "/")
	list = "/providers/" + namespace + "/" + rest
	return list, list + "/none"
}

// enrolment is answered without a certificate, and gives nothing without a join token.
func (a *assembled) enrolment(path string) {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodPost, a.url+path+"Enrol", strings.NewReader(`{}`))
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode < 400 || resp.StatusCode >= 500 {
		a.t.Errorf("enrolment without a token: %d %s", resp.StatusCode, b)
	}
}

// The OpenAPI document is one, by somebody else's reader, and leaves nothing out.
func TestOpenAPI(t *testing.T) {
	a := assembleServer(t)
	status, body := a.do(a.admin, "GET", "/ringwall/openapi.json", "")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	doc, err := openapi3.NewLoader().LoadFromData([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if !doc.IsOpenAPI31OrLater() {
		t.Error("not OpenAPI 3.1")
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Error(err)
	}
	ids := map[string]bool{}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			if op.OperationID == "" || ids[op.OperationID] {
				t.Errorf("%s %s: operationId %q", method, path, op.OperationID)
			}
			ids[op.OperationID] = true
		}
	}
	for _, r := range a.api.Routes() {
		if r.Summary == "" && strings.HasPrefix(r.Path, "/ringwall/") && !strings.HasPrefix(r.Path, "/ringwall/issuer") && r.Path != "/ringwall/fleet/chunks/{sha256}" {
			t.Errorf("%s %s has no summary", r.Method, r.Path)
		}
	}
	for _, k := range a.parts.door.Kinds() {
		name := strings.NewReplacer(".", "_", "/", "_").Replace(k.Type)
		if doc.Components.Schemas[name] == nil || !ids[name+"_put"] {
			t.Errorf("%s is not described", k.Type)
		}
	}
	// A document that the server gives fits its own description.
	a.token("ana", rbac.Reader)
	_, given := a.do(a.admin, "GET", "/providers/Microsoft.Authorization/roleAssignments/ana", "")
	var value any
	if err := json.Unmarshal([]byte(given), &value); err != nil {
		t.Fatal(err)
	}
	schema := doc.Components.Schemas["Microsoft_Authorization_roleAssignments"].Value
	if err := schema.VisitJSON(value, openapi3.EnableJSONSchema2020()); err != nil {
		t.Errorf("%s: %v", given, err)
	}
	if err := schema.VisitJSON(map[string]any{"properties": map[string]any{"principalId": 1}}, openapi3.EnableJSONSchema2020()); err == nil {
		t.Error("a wrong document fits")
	}
	var b strings.Builder
	e := &env{stdin: strings.NewReader(""), stdout: &b, stderr: io.Discard, now: time.Now, getenv: func(string) string { return "" }}
	if code := run(t.Context(), []string{"server", "openapi"}, e); code != 0 || b.String() != body+"\n" {
		t.Errorf("exit code %d; the command prints something else than the server answers", code)
	}
}
