package control_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

const groups = "/providers/Ringwall.Identity/groups/"

// Nested groups count at once, in both directions, and for denials too.
func TestGroups(t *testing.T) {
	l := newLab(t)
	ana := control.Actor{ID: control.UserID(control.Local, "ana"), Name: "ana"}
	guest := control.Actor{ID: "https://idp.example|1", Name: "guest", Groups: []string{control.GroupID("https://idp.example", "sre")}}
	l.assign("1", group, rbac.Contributor, "Local#Outer") // no case in object ids
	l.must(root(), groups+"inner", `{"members":["local|ana","https://idp.example#sre"]}`)
	for _, who := range []control.Actor{ana, guest} {
		if err := l.put(who, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
			t.Errorf("%s is in no group that may: %v", who.Name, err)
		}
	}
	l.must(root(), groups+"outer", `{"displayName":"Outer","members":["local#inner"]}`)
	for _, who := range []control.Actor{ana, guest} {
		if err := l.put(who, thing+"a", `{}`); err != nil {
			t.Errorf("%s: %v", who.Name, err)
		}
	}
	l.must(root(), group+"/providers/Microsoft.Authorization/denyAssignments/q",
		`{"denyAssignmentName":"quarantine","permissions":[{"actions":["*/write"]}],"principals":[{"id":"local#outer"}]}`)
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) || !strings.Contains(err.Error(), "quarantine") {
		t.Errorf("denied to the group: %v", err)
	}
	if err := l.door.Delete(t.Context(), root(), id(group+"/providers/Microsoft.Authorization/denyAssignments/q"), resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	l.must(ana, thing+"a", `{}`)
	l.must(root(), groups+"inner", `{"members":[]}`)
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
		t.Errorf("taken out of the group: %v", err)
	}
}

func TestGroups_refused(t *testing.T) {
	l := newLab(t)
	l.assign("1", "/", rbac.Contributor, "bob")
	if err := l.put(control.Actor{ID: "bob", Name: "bob"}, groups+"g", `{"members":["bob"]}`); !errors.Is(err, errs.Denied) {
		t.Errorf("who may not assign roles fills a group: %v", err)
	}
	l.must(root(), groups+"a", `{"members":["local#b"]}`)
	l.must(root(), groups+"b", `{"members":["local#c"]}`)
	for name, tc := range map[string]struct{ where, properties string }{
		"a circle":                {groups + "c", `{"members":["x","LOCAL#A"]}`},
		"itself":                  {groups + "d", `{"members":["local#d"]}`},
		"the local administrator": {groups + "d", `{"members":["Ringwall-Break-Glass"]}`},
		"nobody":                  {groups + "d", `{"members":[""]}`},
		"not at the root":         {group + groups + "d", `{"members":[]}`},
		"upper case":              {groups + "D", `{"members":[]}`},
		"too many":                {groups + "d", `{"members":["x"` + strings.Repeat(`,"x"`, 10_000) + `]}`},
		"no list":                 {groups + "d", `{"members":"x"}`},
	} {
		if err := l.put(root(), tc.where, tc.properties); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	soon := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	err := l.put(root(), control.TokenID("x").String(), fmt.Sprintf(`{"principalId":"ci","displayName":"ci","groups":["ringwall-break-glass"],"expires":%q}`, soon))
	if !errors.Is(err, errs.Denied) {
		t.Errorf("a token in the group of the local administrator: %v", err)
	}
}

// What is stored can deny everybody everything, and still be undone.
func TestDeny_notTheLocalAdministrator(t *testing.T) {
	l := newLab(t)
	l.assign("1", "/", rbac.Owner, "ana")
	where := "/providers/Microsoft.Authorization/denyAssignments/all"
	l.must(root(), where, `{"denyAssignmentName":"all","permissions":[{"actions":["*"]}],"principals":[{"id":"`+rbac.Everyone+`"}]}`)
	if err := l.put(control.Actor{ID: "ana", Name: "ana"}, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
		t.Errorf("denied to everyone: %v", err)
	}
	if err := l.door.Delete(t.Context(), root(), id(where), resource.When{}, false); err != nil {
		t.Error(err)
	}
}

func TestAccess(t *testing.T) {
	l := newLab(t)
	l.must(root(), groups+"readers", `{"members":["ana"]}`)
	l.assign("1", group, rbac.Reader, "local#readers")
	l.assign("2", "/", rbac.Auditor, "audit")
	ana, audit := control.Actor{ID: "ana", Name: "ana"}, control.Actor{ID: "audit", Name: "audit"}
	for name, tc := range map[string]struct {
		by   control.Actor
		q    control.Question
		want bool
		err  error
	}{
		"of oneself":               {ana, control.Question{Action: "Ringwall.Test/things/read", Scope: id(thing + "a")}, true, nil},
		"of oneself, by name":      {ana, control.Question{Principal: "ANA", Action: "Ringwall.Test/things/write", Scope: id(thing + "a")}, false, nil},
		"of another, unasked":      {ana, control.Question{Principal: "audit", Action: "Ringwall.Test/things/read", Scope: id(sub)}, false, errs.Denied},
		"of another":               {audit, control.Question{Principal: "ana", Action: "Ringwall.Test/things/read", Scope: id(thing + "a")}, true, nil},
		"of another, elsewhere":    {audit, control.Question{Principal: "ana", Action: "Ringwall.Test/things/read", Scope: id(sub)}, false, nil},
		"data are another matter":  {audit, control.Question{Principal: "ana", Action: "Ringwall.Test/things/read", Data: true, Scope: id(thing + "a")}, false, nil},
		"with groups of a sign-on": {audit, control.Question{Principal: "x", Groups: []string{"local#readers"}, Action: "Ringwall.Test/things/read", Scope: id(thing + "a")}, true, nil},
	} {
		got, err := l.door.Access(t.Context(), tc.by, tc.q)
		if !errors.Is(err, tc.err) || tc.err == nil && got.Allowed != tc.want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if tc.want && (got.Through != "local#readers" || !slices.Contains(got.Groups, "local#readers") || !strings.Contains(got.Reason, "Reader")) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// Object ids never meet: users and groups of an issuer, subjects that differ in case.
func TestUserID(t *testing.T) {
	seen := map[string]string{}
	for _, issuer := range []string{"local", "https://a.example", "https://a.example/x"} {
		for _, s := range []string{"ana", "Ana", "a|b", "a#b", "#ana", "|ana", "", "x y", "sha256:1", strings.Repeat("a", 200)} {
			for kind, id := range map[string]string{"user": control.UserID(issuer, s), "group": control.GroupID(issuer, s)} {
				what := kind + " " + s + " of " + issuer
				if other, twice := seen[strings.ToLower(id)]; twice {
					t.Errorf("%s and %s are both %s", what, other, id)
				}
				seen[strings.ToLower(id)] = what
			}
		}
	}
}
