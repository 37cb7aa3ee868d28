package control_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

func TestTokens(t *testing.T) {
	l := newLab(t)
	token := control.NewToken()
	where := control.TokenID(token).String()
	soon := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	good := fmt.Sprintf(`{"principalId":"ci","displayName":"ci of web","groups":["builders"],"expires":%q}`, soon)
	l.assign("1", "/", rbac.Contributor, "bob")
	if err := l.put(control.Actor{ID: "bob", Name: "bob"}, where, good); !errors.Is(err, errs.Denied) {
		t.Errorf("who may not assign roles makes a token: %v", err)
	}
	l.must(root(), where, good)
	if r := l.last(); strings.Contains(r.Detail, token) || strings.Contains(r.Target, token) {
		t.Error("the audit log holds a token")
	}
	a, err := l.door.Authenticate(t.Context(), token, time.Now())
	if err != nil || a.ID != "ci" || a.Name != "ci of web" || len(a.Groups) != 1 {
		t.Errorf("%+v, %v", a, err)
	}
	for name, tc := range map[string]struct {
		token string
		at    time.Time
	}{
		"expired": {token, time.Now().Add(2 * time.Hour)}, "another": {control.NewToken(), time.Now()}, "none": {"", time.Now()},
		"its own hash": {control.TokenID(token).Name(), time.Now()},
	} {
		if _, err := l.door.Authenticate(t.Context(), tc.token, tc.at); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := l.door.Delete(t.Context(), root(), control.TokenID(token), resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	if _, err := l.door.Authenticate(t.Context(), token, time.Now()); !errors.Is(err, errs.Untrusted) {
		t.Errorf("revoked: %v", err)
	}
	for name, tc := range map[string]struct {
		where, properties string
		want              error
	}{
		"for the local administrator": {where, fmt.Sprintf(`{"principalId":"Ringwall-Break-Glass","displayName":"x","expires":%q}`, soon), errs.Denied},
		"for ever":                    {where, `{"principalId":"ci","displayName":"x"}`, errs.Invalid},
		"for ten years":               {where, `{"principalId":"ci","displayName":"x","expires":"2050-01-01T00:00:00Z"}`, errs.Invalid},
		"for nobody":                  {where, fmt.Sprintf(`{"displayName":"x","expires":%q}`, soon), errs.Invalid},
		"not a hash":                  {"/providers/Ringwall.Identity/tokens/" + token, good, errs.Invalid},
		"a hash in upper case":        {"/providers/Ringwall.Identity/tokens/" + strings.ToUpper(control.TokenID(token).Name()), good, errs.Invalid},
	} {
		if err := l.put(root(), tc.where, tc.properties); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func TestBootstrap(t *testing.T) {
	l := newLab(t)
	if token, err := l.door.Bootstrap(t.Context()); err != nil || token != "" {
		t.Errorf("a server that is in use gets a new administrator: %q, %v", token, err)
	}
	fresh := newDoor(t)
	token, err := fresh.Bootstrap(t.Context())
	if err != nil || token == "" {
		t.Fatalf("%q, %v", token, err)
	}
	a, err := fresh.Authenticate(t.Context(), token, time.Now())
	if err != nil || a.ID != control.BreakGlass {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := fresh.Put(t.Context(), *a, resource.Document{ID: id(sub)}, resource.When{}, false); err != nil {
		t.Error(err)
	}
	if again, err := fresh.Bootstrap(context.Background()); err != nil || again != "" {
		t.Errorf("again: %q, %v", again, err)
	}
}

func TestAudit_whoMayRead(t *testing.T) {
	l := newLab(t)
	l.assign("1", "/", rbac.Reader, "auditor")
	l.assign("2", group, rbac.Owner, "ana")
	if rs, err := l.door.Audit(t.Context(), control.Actor{ID: "auditor", Name: "auditor"}, 1, 2); err != nil || len(rs) != 2 || rs[0].Seq != 2 {
		t.Errorf("%v, %v", rs, err)
	}
	if _, err := l.door.Audit(t.Context(), control.Actor{ID: "ana", Name: "ana"}, 0, 10); !errors.Is(err, errs.Denied) {
		t.Errorf("an owner of a group: %v", err)
	}
}
