package rbac_test

import (
	"errors"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

func scope(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
	vault = group + "/providers/Microsoft.KeyVault/vaults/kv1"
	mg    = "/providers/Microsoft.Management/managementGroups/corp"
)

func role(id string, p rbac.Permission) *rbac.Role {
	return &rbac.Role{ID: id, Name: id, Permissions: []rbac.Permission{p}, Assignable: []resource.ID{scope("/")}}
}

func TestCan(t *testing.T) {
	owner := role("owner", rbac.Permission{Actions: []string{"*"}})
	reader := role("reader", rbac.Permission{Actions: []string{"*/read"}})
	contributor := role("contributor", rbac.Permission{Actions: []string{"*"}, NotActions: []string{"Microsoft.Authorization/*/Write", "Microsoft.Authorization/*/Delete"}})
	secrets := role("secrets", rbac.Permission{DataActions: []string{"Microsoft.KeyVault/vaults/secrets/*"}, NotDataActions: []string{"Microsoft.KeyVault/vaults/secrets/purge/action"}})
	conditional := role("conditional", rbac.Permission{Actions: []string{"*"}, Condition: "true"})
	roles := []*rbac.Role{owner, reader, contributor, secrets, conditional}
	as := func(role, who, at string) rbac.Assignment {
		return rbac.Assignment{ID: role + "-" + who, Scope: scope(at), Role: role, Principal: who}
	}
	ask := func(who, action, at string, change ...func(*rbac.Request)) rbac.Request {
		r := rbac.Request{Principal: who, Action: action, Scope: scope(at)}
		for _, c := range change {
			c(&r)
		}
		return r
	}
	data := func(r *rbac.Request) { r.Data = true }
	groups := func(g ...string) func(*rbac.Request) { return func(r *rbac.Request) { r.Groups = g } }
	below := func(r *rbac.Request) { r.Above = []resource.ID{scope(strings.ToUpper(mg))} }
	withCondition := as("owner", "ana", sub)
	withCondition.Condition = "@Resource[x] StringEquals 'y'"
	isolate := rbac.Deny{ID: "d1", Name: "quarantine", Scope: scope(group), Permissions: []rbac.Permission{{Actions: []string{"*"}, NotActions: []string{"*/read"}, DataActions: []string{"*"}, Condition: "whatever"}}, Principals: []string{rbac.Everyone}, Except: []string{"breakglass"}}
	own := isolate
	own.ThisScope = true
	for name, tc := range map[string]struct {
		have []rbac.Assignment
		deny []rbac.Deny
		ask  rbac.Request
		want bool
		says string
	}{
		"nothing":                     {nil, nil, ask("ana", "a/b/read", sub), false, "no role allows it"},
		"at the scope":                {[]rbac.Assignment{as("reader", "ana", group)}, nil, ask("ana", "Microsoft.KeyVault/vaults/read", group), true, "role reader at " + group},
		"below it":                    {[]rbac.Assignment{as("reader", "ana", sub)}, nil, ask("ana", "Microsoft.KeyVault/vaults/read", vault), true, "role reader"},
		"above it":                    {[]rbac.Assignment{as("owner", "ana", vault)}, nil, ask("ana", "x/write", group), false, "no role"},
		"in another group":            {[]rbac.Assignment{as("owner", "ana", group)}, nil, ask("ana", "x/write", group+"2"), false, "no role"},
		"case does not matter":        {[]rbac.Assignment{as("READER", "ANA", strings.ToUpper(sub))}, nil, ask("ana", "MICROSOFT.keyvault/vaults/READ", vault), true, "role reader"},
		"by a group":                  {[]rbac.Assignment{as("reader", "oncall", sub)}, nil, ask("ana", "x/read", sub, groups("other", "oncall")), true, "role reader"},
		"by a management group":       {[]rbac.Assignment{as("reader", "ana", mg)}, nil, ask("ana", "x/read", vault, below), true, "role reader"},
		"by no management group":      {[]rbac.Assignment{as("reader", "ana", mg)}, nil, ask("ana", "x/read", vault), false, "no role"},
		"notActions":                  {[]rbac.Assignment{as("contributor", "ana", sub)}, nil, ask("ana", "Microsoft.Authorization/roleAssignments/write", sub), false, "no role"},
		"notActions deny nothing":     {[]rbac.Assignment{as("contributor", "ana", sub), as("owner", "ana", group)}, nil, ask("ana", "Microsoft.Authorization/roleAssignments/write", vault), true, "role owner"},
		"an owner has no data":        {[]rbac.Assignment{as("owner", "ana", sub)}, nil, ask("ana", "Microsoft.KeyVault/vaults/secrets/getSecret/action", vault, data), false, "no role"},
		"data actions":                {[]rbac.Assignment{as("secrets", "ana", sub)}, nil, ask("ana", "Microsoft.KeyVault/vaults/secrets/getSecret/action", vault, data), true, "role secrets"},
		"data actions manage nothing": {[]rbac.Assignment{as("secrets", "ana", sub)}, nil, ask("ana", "Microsoft.KeyVault/vaults/secrets/getSecret/action", vault), false, "no role"},
		"notDataActions":              {[]rbac.Assignment{as("secrets", "ana", sub)}, nil, ask("ana", "Microsoft.KeyVault/vaults/secrets/purge/action", vault, data), false, "no role"},
		"a condition grants nothing":  {[]rbac.Assignment{withCondition}, nil, ask("ana", "x/read", sub), false, "condition"},
		"nor does a role's":           {[]rbac.Assignment{as("conditional", "ana", sub)}, nil, ask("ana", "x/read", sub), false, "no role"},
		"deny beats every role":       {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{isolate}, ask("ana", "x/write", vault), false, "denied by quarantine"},
		"deny only what it says":      {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{isolate}, ask("ana", "x/read", vault), true, "role owner"},
		"deny not for everybody":      {[]rbac.Assignment{as("owner", "BreakGlass", "/")}, []rbac.Deny{isolate}, ask("breakglass", "x/write", vault), true, "role owner"},
		"excepted by a group":         {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{isolate}, ask("ana", "x/write", vault, groups("breakglass")), true, "role owner"},
		"deny elsewhere":              {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{isolate}, ask("ana", "x/write", sub), true, "role owner"},
		"deny at this scope only":     {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{own}, ask("ana", "x/write", vault), true, "role owner"},
		"deny at this scope":          {[]rbac.Assignment{as("owner", "ana", "/")}, []rbac.Deny{own}, ask("ana", "x/write", group), false, "denied"},
		"a star is no action":         {[]rbac.Assignment{as("owner", "ana", "/")}, nil, ask("ana", "*", sub), false, "no action"},
		"an empty action":             {[]rbac.Assignment{as("owner", "ana", "/")}, nil, ask("ana", "", sub), false, "no action"},
		"nobody":                      {[]rbac.Assignment{as("owner", "ana", "/")}, nil, ask("", "x/read", sub, groups("ana")), false, "nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			above := func(resource.ID) []resource.ID { return nil }
			a, err := rbac.New(roles, tc.have, tc.deny, above)
			if err != nil {
				t.Fatal(err)
			}
			got := a.Can(&tc.ask)
			if got.Allowed != tc.want || !strings.Contains(got.Reason, tc.says) || got.Allowed != (got.Assignment != "") {
				t.Errorf("%+v, want %v, %q", got, tc.want, tc.says)
			}
		})
	}
}

func TestNew_refuses(t *testing.T) {
	r := role("r", rbac.Permission{Actions: []string{"*"}})
	narrow := role("narrow", rbac.Permission{Actions: []string{"*"}})
	narrow.Assignable = []resource.ID{scope(group)}
	for name, tc := range map[string]struct {
		roles  []*rbac.Role
		assign []rbac.Assignment
		deny   []rbac.Deny
	}{
		"a role twice":     {[]*rbac.Role{r, role("R", rbac.Permission{Actions: []string{"x"}})}, nil, nil},
		"no such role":     {[]*rbac.Role{r}, []rbac.Assignment{{Role: "x", Principal: "p", Scope: scope("/")}}, nil},
		"not assignable":   {[]*rbac.Role{narrow}, []rbac.Assignment{{Role: "narrow", Principal: "p", Scope: scope(sub)}}, nil},
		"to everyone":      {[]*rbac.Role{r}, []rbac.Assignment{{Role: "r", Principal: rbac.Everyone, Scope: scope("/")}}, nil},
		"to nobody":        {[]*rbac.Role{r}, []rbac.Assignment{{Role: "r", Scope: scope("/")}}, nil},
		"a deny of nobody": {nil, nil, []rbac.Deny{{ID: "d"}}},
	} {
		if _, err := rbac.New(tc.roles, tc.assign, tc.deny, nil); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := rbac.New([]*rbac.Role{narrow}, []rbac.Assignment{{Role: "narrow", Principal: "p", Scope: scope(vault)}}, nil, nil); err != nil {
		t.Error(err)
	}
}

func TestParseRole(t *testing.T) {
	rest := `{"id":"/subscriptions/x/providers/Microsoft.Authorization/roleDefinitions/88fa32db","name":"88fa32db","type":"Microsoft.Authorization/roleDefinitions",
	 "properties":{"roleName":"Virtual Machine Operator","type":"CustomRole","description":"starts","assignableScopes":["` + sub + `"],
	 "permissions":[{"actions":["Microsoft.Compute/*/read","Microsoft.Compute/virtualMachines/start/action"],"notActions":[],"dataActions":[],"notDataActions":[]}],"createdOn":"2031-01-01T00:00:00Z"}}`
	flat := `{"Name":"Virtual Machine Operator","Id":"88fa32db","IsCustom":true,"Description":"starts",
	 "Actions":["Microsoft.Compute/*/read","Microsoft.Compute/virtualMachines/start/action"],"NotActions":[],"DataActions":[],"NotDataActions":[],"AssignableScopes":["` + sub + `"]}`
	listed := `{"id":"/x/88fa32db","name":"88fa32db","roleName":"Virtual Machine Operator","roleType":"CustomRole","description":"starts","assignableScopes":["` + sub + `"],
	 "permissions":[{"actions":["Microsoft.Compute/*/read","Microsoft.Compute/virtualMachines/start/action"],"notActions":[],"dataActions":[],"notDataActions":[]}]}`
	for name, doc := range map[string]string{"REST": rest, "flat": flat, "listed": listed} {
		r, err := rbac.ParseRole([]byte(doc))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if r.ID != "88fa32db" || r.Name != "Virtual Machine Operator" || !r.Custom || r.Description != "starts" || len(r.Assignable) != 1 ||
			len(r.Permissions) != 1 || !slices.Equal(r.Permissions[0].Actions, []string{"Microsoft.Compute/*/read", "Microsoft.Compute/virtualMachines/start/action"}) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for name, doc := range map[string]string{
		"no JSON":             `x`,
		"no name":             `{"Actions":["*"],"AssignableScopes":["/"]}`,
		"bad action":          `{"Name":"a","Actions":["a b"],"AssignableScopes":["/"]}`,
		"bad scope":           `{"Name":"a","Actions":["*"],"AssignableScopes":["x"]}`,
		"custom and nowhere":  `{"Name":"a","Actions":["*"]}`,
		"too large":           `{"Name":"` + strings.Repeat("a", 2<<20) + `"}`,
		"without permissions": `{"properties":{"roleName":"a","assignableScopes":["/"]}}`,
	} {
		if _, err := rbac.ParseRole([]byte(doc)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// can asks with one role.
func can(t *testing.T, p rbac.Permission, action string) bool {
	t.Helper()
	a, err := rbac.New([]*rbac.Role{role("r", p)}, []rbac.Assignment{{ID: "a", Role: "r", Principal: "p", Scope: scope("/")}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return a.Can(&rbac.Request{Principal: "p", Action: action, Scope: scope("/")}).Allowed
}

func FuzzActions(f *testing.F) {
	f.Add("a*b*c", "axxbyyc")
	f.Add("*/read", "Microsoft.Compute/virtualMachines/read")
	f.Add("a*a", "a")
	f.Fuzz(func(t *testing.T, pattern, action string) {
		p := rbac.Permission{Actions: []string{pattern}}
		r := role("r", p)
		if r.Check() != nil || len(action) > 256 || regexp.MustCompile(`[^A-Za-z0-9./_$-]`).MatchString(action) || action == "" {
			return
		}
		want := regexp.MustCompile("(?i)^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + "$").MatchString(action)
		if got := can(t, p, action); got != want {
			t.Errorf("%q matches %q: %v", pattern, action, got)
		}
	})
}

func FuzzParseRole(f *testing.F) {
	f.Add([]byte(`{"Name":"a","Actions":["*"],"AssignableScopes":["/"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := rbac.ParseRole(b); err == nil {
			if err := r.Check(); err != nil {
				t.Error(err)
			}
		}
	})
}

// More assignments never take anything away, more denials never give, and order
// plays no part.
func TestCan_monotonic(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	one := func(of ...string) string { return of[r.IntN(len(of))] }
	list := func() (out []string) {
		for range r.IntN(3) {
			out = append(out, one("*", "a/*", "*/read", "a/b/write", "A/B/read", "c/*/action"))
		}
		return out
	}
	scopes := []string{"/", sub, group, vault, sub + "/resourceGroups/db"}
	who := []string{"p", "q", "g", "h"}
	for range 3000 {
		var roles []*rbac.Role
		for _, id := range []string{"r1", "r2", "r3"} {
			roles = append(roles, role(id, rbac.Permission{Actions: list(), NotActions: list(), DataActions: list(), NotDataActions: list()}))
		}
		var as []rbac.Assignment
		for range 1 + r.IntN(4) {
			as = append(as, rbac.Assignment{ID: "x", Role: one("r1", "r2", "r3"), Principal: one(who...), Scope: scope(one(scopes...))})
		}
		var ds []rbac.Deny
		for range r.IntN(3) {
			ds = append(ds, rbac.Deny{ID: "d", Scope: scope(one(scopes...)), Principals: []string{one(append(who, rbac.Everyone)...)}, Permissions: []rbac.Permission{{Actions: list(), NotActions: list()}}, ThisScope: r.IntN(2) == 0})
		}
		q := rbac.Request{Principal: one("p", "q"), Groups: []string{one("g", "h")}, Action: one("a/b/read", "a/b/write", "c/d/action"), Data: r.IntN(4) == 0, Scope: scope(one(scopes...))}
		ask := func(as []rbac.Assignment, ds []rbac.Deny) bool {
			a, err := rbac.New(roles, as, ds, nil)
			if err != nil {
				t.Fatal(err)
			}
			return a.Can(&q).Allowed
		}
		all := ask(as, ds)
		if all && !ask(as, nil) {
			t.Fatal("a denial gave something")
		}
		if !all && ask(as[1:], ds) {
			t.Fatal("an assignment took something away")
		}
		slices.Reverse(as)
		slices.Reverse(ds)
		if ask(as, ds) != all {
			t.Fatal("the order of assignments decides")
		}
	}
}

func BenchmarkCan(b *testing.B) {
	var as []rbac.Assignment
	for range 200 {
		as = append(as, rbac.Assignment{ID: "x", Role: "r", Principal: "p", Scope: scope(group)})
	}
	a, err := rbac.New([]*rbac.Role{role("r", rbac.Permission{Actions: []string{"Microsoft.Compute/*/read", "*/start/action"}})}, as, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	q := rbac.Request{Principal: "p", Groups: []string{"g"}, Action: "Microsoft.KeyVault/vaults/write", Scope: scope(vault)}
	for b.Loop() {
		a.Can(&q)
	}
}

// What Ringwall's own roles are for, and what they must not do.
func TestBuiltIn(t *testing.T) {
	all := rbac.BuiltIn()
	var as []rbac.Assignment
	seen := map[string]bool{}
	for _, r := range all {
		if err := r.Check(); err != nil || seen[r.ID] || r.Custom || r.Description == "" {
			t.Errorf("%+v: %v", r, err)
		}
		seen[r.ID] = true
		as = append(as, rbac.Assignment{ID: r.Name, Role: r.ID, Principal: r.Name})
	}
	a, err := rbac.New(all, as, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string]string{
		"Microsoft.Authorization/roleAssignments/write": "Owner, User Access Administrator",
		"Microsoft.Authorization/denyAssignments/write": "Owner, User Access Administrator, Security Administrator",
		"Ringwall.Identity/users/write":                 "Owner, Contributor",
		"Ringwall.Integrity/policies/write":             "Owner, Contributor, Security Administrator",
		"Ringwall.Fleet/manifests/write":                "Owner, Contributor, Security Administrator, Release Manager",
		"Ringwall.Fleet/rollouts/approve/action":        "Owner, Contributor, Security Administrator, Release Manager",
		"Ringwall.Fleet/rollouts/pause/action":          "Owner, Contributor, Security Administrator, Release Manager, On-Call Engineer",
		"Ringwall.Fleet/halts/write":                    "Owner, Contributor, Security Administrator, Release Manager, On-Call Engineer",
		"Ringwall.Fleet/hosts/isolate/action":           "Owner, Contributor, Security Administrator, On-Call Engineer",
		"Ringwall.Incidents/incidents/write":            "Owner, Contributor, Security Administrator, On-Call Engineer",
		"Ringwall.Fleet/joinTokens/write":               "Owner, Contributor, Security Administrator",
		"Ringwall.Audit/records/read":                   "Owner, Contributor, Reader, User Access Administrator, Security Administrator, On-Call Engineer, Auditor",
		"Ringwall.Identity/users/read":                  "Owner, Contributor, Reader, User Access Administrator, Security Administrator, On-Call Engineer, Auditor",
		"Ringwall.Fleet/hosts/read":                     "Owner, Contributor, Reader, User Access Administrator, Security Administrator, Release Manager, On-Call Engineer, Auditor, Host",
	} {
		var got []string
		for _, r := range all {
			if a.Can(&rbac.Request{Principal: r.Name, Action: action}).Allowed {
				got = append(got, r.Name)
			}
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s: %s\nwant %s", action, strings.Join(got, ", "), want)
		}
	}
}
