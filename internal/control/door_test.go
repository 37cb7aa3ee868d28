package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
	"ringwall/internal/store"
)

// shelf is the real store, as the door wants it.
type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
	thing = group + "/providers/Ringwall.Test/things/"
)

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

type lab struct {
	t     *testing.T
	door  *control.Door
	store *store.Store
}

func root() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "admin"} }

func newStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func newDoor(t *testing.T) *control.Door {
	t.Helper()
	d, err := control.New(shelf{newStore(t)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newLab(t *testing.T) *lab {
	t.Helper()
	s := newStore(t)
	d, err := control.New(shelf{s}, control.Kind{
		Type: "Ringwall.Test/things", Secret: []string{"password"},
		Check: func(_ context.Context, _ control.Tx, _, d *resource.Document) error {
			if strings.Contains(string(d.Properties), "bad") {
				return fmt.Errorf("a bad thing: %w", errs.Invalid)
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, door: d, store: s}
	l.must(root(), sub, `{}`)
	l.must(root(), group, `{}`)
	return l
}

func (l *lab) put(by control.Actor, where, properties string) error {
	_, err := l.door.Put(l.t.Context(), by, resource.Document{ID: id(where), Properties: json.RawMessage(properties)}, resource.When{}, false)
	return err
}

func (l *lab) must(by control.Actor, where, properties string) {
	l.t.Helper()
	if err := l.put(by, where, properties); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) assign(name, scope, role, principal string) {
	l.t.Helper()
	l.must(root(), strings.TrimSuffix(scope, "/")+"/providers/Microsoft.Authorization/roleAssignments/"+name,
		fmt.Sprintf(`{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/%s","principalId":%q}`, role, principal))
}

// records reads the audit log and checks its chain.
func (l *lab) records() []audit.Record {
	l.t.Helper()
	var out []audit.Record
	err := l.store.Read(l.t.Context(), func(tx *store.Tx) (err error) { out, err = tx.Audit(l.t.Context(), 0, 1000); return err })
	if err != nil {
		l.t.Fatal(err)
	}
	var b bytes.Buffer
	for i := range out {
		line, _ := json.Marshal(&out[i])
		b.Write(append(line, '\n'))
	}
	if _, err := audit.Verify(&b, audit.Checkpoint{}); err != nil {
		l.t.Fatal(err)
	}
	return out
}

func (l *lab) last() audit.Record {
	l.t.Helper()
	rs := l.records()
	return rs[len(rs)-1]
}

func TestDoor(t *testing.T) {
	l := newLab(t)
	ana := control.Actor{ID: "ana-id", Name: "ana"}
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
		t.Errorf("without a role: %v", err)
	}
	if r := l.last(); r.Outcome != audit.Refused || r.Actor != "ana" || r.Action != "Ringwall.Test/things/write" || r.Target != thing+"a" {
		t.Errorf("a refusal is recorded as %+v", r)
	}
	l.assign("1", group, rbac.Contributor, "ana-id")
	l.must(ana, thing+"a", `{"password":"s3cret","size":1}`)
	if r := l.last(); r.Outcome != audit.Done || strings.Contains(r.Detail, "s3cret") || !strings.Contains(r.Detail, `"size":1`) || !strings.Contains(r.Reason, "Contributor") {
		t.Errorf("a change is recorded as %+v", r)
	}
	if d, err := l.door.Get(t.Context(), ana, id(thing+"a")); err != nil || strings.Contains(string(d.Properties), "s3cret") || d.System.CreatedBy != "ana" {
		t.Errorf("%+v, %v", d, err)
	}
	n := len(l.records())
	for name, tc := range map[string]struct {
		where, properties string
		want              error
	}{
		"its check says no":  {thing + "b", `{"bad":1}`, errs.Invalid},
		"no JSON":            {thing + "b", `{`, errs.Invalid},
		"no such type":       {group + "/providers/Ringwall.Test/others/x", `{}`, errs.Invalid},
		"no such group":      {sub + "/resourceGroups/other/providers/Ringwall.Test/things/x", `{}`, errs.Denied},
		"not its scope":      {sub, `{}`, errs.Denied},
		"who may":            {group + "/providers/Microsoft.Authorization/roleAssignments/2", `{}`, errs.Denied},
		"nothing to hang on": {thing + "none/providers/Ringwall.Test/things/x", `{}`, errs.NotFound},
	} {
		if err := l.put(ana, tc.where, tc.properties); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	if got := len(l.records()) - n; got != 6 { // all but what names no type
		t.Errorf("%d refusals and failures were recorded", got)
	}
}

func TestDoor_takenAway(t *testing.T) {
	l := newLab(t)
	ana := control.Actor{ID: "x", Name: "ana", Groups: []string{"team"}}
	l.assign("1", group, rbac.Owner, "team")
	l.must(ana, thing+"a", `{}`)
	assignment := id(group + "/providers/Microsoft.Authorization/roleAssignments/1")
	if err := l.door.Delete(t.Context(), root(), assignment, resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
		t.Errorf("a role that was taken away: %v", err)
	}
	// Quarantine beats every role, except for the local administrator.
	l.assign("1", "/", rbac.Owner, "team")
	l.must(root(), group+"/providers/Microsoft.Authorization/denyAssignments/q",
		`{"denyAssignmentName":"quarantine","permissions":[{"actions":["*/write"]}],"principals":[{"id":"`+rbac.Everyone+`"}],"excludePrincipals":[{"id":"`+control.BreakGlass+`"}]}`)
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) || !strings.Contains(err.Error(), "quarantine") {
		t.Errorf("in quarantine: %v", err)
	}
	l.must(root(), thing+"a", `{}`)
}

// Nothing that is stored can lock everybody out.
func TestDoor_cannotLockOut(t *testing.T) {
	l := newLab(t)
	const own = "11111111-2222-3333-4444-555555555555"
	define := func(scope string) error {
		return l.put(root(), "/providers/Microsoft.Authorization/roleDefinitions/"+own,
			`{"roleName":"Own","type":"CustomRole","assignableScopes":["`+scope+`"],"permissions":[{"actions":["Ringwall.Test/*"]}]}`)
	}
	if err := define("/"); err != nil {
		t.Fatal(err)
	}
	l.assign("1", group, own, "ana")
	ana := control.Actor{ID: "ana", Name: "ana"}
	l.must(ana, thing+"a", `{}`)
	if err := define("/subscriptions/other"); err != nil { // narrowed below its assignment
		t.Fatal(err)
	}
	if err := l.put(ana, thing+"a", `{}`); !errors.Is(err, errs.Denied) {
		t.Errorf("a role that was narrowed: %v", err)
	}
	if err := l.door.Delete(t.Context(), root(), id("/providers/Microsoft.Authorization/roleDefinitions/"+own), resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	l.must(root(), thing+"a", `{}`)
	for name, tc := range map[string]struct {
		where, properties string
		want              error
	}{
		"a role that is not there":   {group + "/providers/Microsoft.Authorization/roleAssignments/2", `{"roleDefinitionId":"/providers/x/roleDefinitions/y","principalId":"p"}`, errs.Invalid},
		"no role at all":             {group + "/providers/Microsoft.Authorization/roleAssignments/2", `{"principalId":"p"}`, errs.Invalid},
		"an assignment to everybody": {group + "/providers/Microsoft.Authorization/roleAssignments/2", `{"roleDefinitionId":"/providers/x/roleDefinitions/` + rbac.Owner + `","principalId":"` + rbac.Everyone + `"}`, errs.Invalid},
		"no properties":              {group + "/providers/Microsoft.Authorization/roleAssignments/2", ``, errs.Invalid},
		"a built-in role":            {"/providers/Microsoft.Authorization/roleDefinitions/" + rbac.Owner, `{"roleName":"O","type":"CustomRole","assignableScopes":["/"],"permissions":[{"actions":["*"]}]}`, errs.Conflict},
		"a role that says it is one": {"/providers/Microsoft.Authorization/roleDefinitions/x", `{"roleName":"O","type":"BuiltInRole","assignableScopes":["/"],"permissions":[{"actions":["*"]}]}`, errs.Invalid},
		"a denial of nobody":         {group + "/providers/Microsoft.Authorization/denyAssignments/2", `{"permissions":[]}`, errs.Invalid},
	} {
		if err := l.put(root(), tc.where, tc.properties); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	l.must(root(), thing+"a", `{}`)
}

func TestDoor_dryRun(t *testing.T) {
	l := newLab(t)
	n := len(l.records())
	d, err := l.door.Put(t.Context(), root(), resource.Document{ID: id(thing + "a")}, resource.When{Absent: true}, true)
	if err != nil || d.Revision == 0 {
		t.Fatalf("%+v, %v", d, err)
	}
	if _, err := l.door.Get(t.Context(), root(), id(thing+"a")); !errors.Is(err, errs.NotFound) {
		t.Errorf("a dry run stored something: %v", err)
	}
	if err := l.door.Delete(t.Context(), root(), id(group), resource.When{}, true); err != nil {
		t.Error(err)
	}
	if _, err := l.door.Get(t.Context(), root(), id(group)); err != nil {
		t.Errorf("a dry run deleted something: %v", err)
	}
	if len(l.records()) != n {
		t.Error("a dry run is in the audit log")
	}
}

func TestDoor_conditions(t *testing.T) {
	l := newLab(t)
	put := func(when resource.When) error {
		_, err := l.door.Put(t.Context(), root(), resource.Document{ID: id(thing + "a")}, when, false)
		return err
	}
	if err := put(resource.When{Absent: true}); err != nil {
		t.Fatal(err)
	}
	d, err := l.door.Get(t.Context(), root(), id(thing+"a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := put(resource.When{Revision: d.Revision}); err != nil {
		t.Error(err)
	}
	for _, when := range []resource.When{{Absent: true}, {Revision: d.Revision}} {
		if err := put(when); !errors.Is(err, errs.Conflict) {
			t.Errorf("%+v: %v", when, err)
		}
		if r := l.last(); r.Outcome != audit.Failed {
			t.Errorf("a conflict is recorded as %s", r.Outcome)
		}
	}
}

func TestList_onlyWhatOneMayRead(t *testing.T) {
	l := newLab(t)
	for _, n := range []string{"a", "b", "c"} {
		l.must(root(), thing+n, `{}`)
	}
	l.assign("1", thing+"b", rbac.Reader, "ana")
	got, next, err := l.door.List(t.Context(), control.Actor{ID: "ana", Name: "ana"}, resource.Query{Below: id(sub), Type: "Ringwall.Test/things", Limit: 2})
	if err != nil || len(got) != 1 || got[0].ID.Name() != "b" || next == "" {
		t.Errorf("%v, %q, %v", got, next, err)
	}
	got, next, err = l.door.List(t.Context(), control.Actor{ID: "ana", Name: "ana"}, resource.Query{Below: id(sub), Type: "Ringwall.Test/things", Limit: 2, After: next})
	if err != nil || len(got) != 0 || next != "" {
		t.Errorf("the second page: %v, %q, %v", got, next, err)
	}
}

func TestWatch(t *testing.T) {
	l := newLab(t)
	ana := control.Actor{ID: "ana", Name: "ana"}
	l.assign("1", group, rbac.Reader, "ana")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, passed := make(chan resource.Change, 100), make(chan uint64, 1000)
	done := make(chan error, 1)
	go func() {
		done <- l.door.Watch(ctx, ana, id(group), 0, func(c resource.Change) error { got <- c; return nil }, func(r uint64) error { passed <- r; return nil })
	}()
	next := func() resource.Change {
		t.Helper()
		select {
		case c := <-got:
			return c
		case err := <-done:
			t.Fatal("watch ended:", err)
		case <-ctx.Done():
			t.Fatal("nothing comes")
		}
		return resource.Change{}
	}
	if c := next(); c.Document.ID.String() != group {
		t.Errorf("first comes what was there: %s", c.Document.ID)
	}
	if c := next(); c.Document.Type != control.TypeRoleAssignment {
		t.Errorf("then %s", c.Document.ID)
	}
	l.must(root(), sub+"/resourceGroups/other", `{}`) // not below, and not for ana
	l.must(root(), thing+"a", `{}`)
	if c := next(); c.Document.ID.String() != thing+"a" || c.Deleted {
		t.Errorf("%+v", c)
	}
	if err := l.door.Delete(t.Context(), root(), id(thing+"a"), resource.When{}, false); err != nil {
		t.Fatal(err)
	}
	if c := next(); !c.Deleted {
		t.Errorf("%+v", c)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if last := len(passed); last == 0 {
		t.Error("no place to resume at")
	}
}

func TestNew_refuses(t *testing.T) {
	if _, err := control.New(nil, control.Kind{Type: "A/b"}, control.Kind{Type: "a/B"}); !errors.Is(err, errs.Invalid) {
		t.Errorf("a type twice: %v", err)
	}
}
