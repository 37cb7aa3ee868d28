package resource_test

import (
	"errors"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

const (
	sub   = "/subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590"
	group = sub + "/resourceGroups/web"
	vault = group + "/providers/Microsoft.KeyVault/vaults/kv1"
	mg    = "/providers/Microsoft.Management/managementGroups/corp"
)

func id(s string) resource.ID {
	out, err := resource.ParseID(s)
	if err != nil {
		panic(err)
	}
	return out
}

func TestParseID(t *testing.T) {
	for s, want := range map[string]string{
		"/": "", sub: "", sub + "/": "", group: "", vault: "", vault + "/secrets/s1": "", mg: "",
		vault + "/providers/Microsoft.Authorization/roleAssignments/x": "",
		sub + "/providers/Ringwall.Integrity/policies/p1":              "",
		sub + "/resourceGroups/providers":                              "", // a name is a name
		"":                                                             "must begin with a slash",
		"subscriptions/x":                                              "must begin with a slash",
		"//x":                                                          "empty part",
		sub + "//x":                                                    "empty part",
		sub + "/../y":                                                  "relative part",
		"/subscriptions/a*":                                            "no name may have",
		"/subscriptions/a b":                                           "no name may have",
		"/ſubscriptions/x":                                             "no name may have", // folds to s
		"/" + strings.Repeat("a", 3000):                                "too long",
		"/" + strings.Repeat("a/", 90) + "a":                           "too many parts",
		"/subscriptions":                                               "neither",
		"/x/y":                                                         "neither",
		group + "/providers/Microsoft.Compute":                         "neither",
		vault + "/secrets":                                             "neither",
	} {
		got, err := resource.ParseID(s)
		switch {
		case want == "" && err != nil:
			t.Errorf("%q: %v", s, err)
		case want == "" && s != "/" && got.String() != strings.TrimSuffix(s, "/"):
			t.Errorf("%q became %q", s, got)
		case want != "" && (!errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), want)):
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}

func TestID_contains(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want bool
	}{
		{"/", sub, true},
		{sub, sub, true},
		{sub, vault, true},
		{strings.ToUpper(sub), vault, true},
		{group, group + "2", false}, // a name that begins the same
		{vault, group, false},
		{group, sub + "/resourceGroups/other", false},
		{mg, vault, false}, // by membership only
	} {
		if got := id(tc.a).Contains(id(tc.b)); got != tc.want {
			t.Errorf("%s contains %s: %v", tc.a, tc.b, got)
		}
	}
}

func TestID_parts(t *testing.T) {
	assignment := vault + "/providers/Microsoft.Authorization/roleAssignments/x1"
	for _, tc := range []struct{ id, name, kind, parent string }{
		{"/", "", "", "/"},
		{sub, "0b1f6471-1bf0-4dda-aec3-cb9272f09590", "microsoft.resources/subscriptions", "/"},
		{group, "web", "microsoft.resources/subscriptions/resourcegroups", sub},
		{vault, "kv1", "microsoft.keyvault/vaults", group},
		{vault + "/secrets/S1", "S1", "microsoft.keyvault/vaults/secrets", vault},
		{assignment, "x1", "microsoft.authorization/roleassignments", vault},
		{sub + "/providers/Ringwall.Integrity/policies/p1", "p1", "ringwall.integrity/policies", sub},
		{mg, "corp", "microsoft.management/managementgroups", "/"},
		{sub + "/resourceGroups/providers", "providers", "microsoft.resources/subscriptions/resourcegroups", sub},
	} {
		got := id(tc.id)
		if got.Name() != tc.name || got.Type() != tc.kind || got.Parent().String() != tc.parent {
			t.Errorf("%s: name %q, type %q, parent %q", tc.id, got.Name(), got.Type(), got.Parent())
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add(vault)
	f.Add(group + "/providers/a/providers/providers")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := resource.ParseID(s)
		if err != nil {
			return
		}
		again, err := resource.ParseID(got.String())
		if err != nil || !again.Equal(got) || again.Type() != got.Type() {
			t.Errorf("%q: %v, %v", s, again, err)
		}
		for p, n := got.Parent(), 0; p.Key() != ""; p, n = p.Parent(), n+1 {
			if !p.Contains(got) || n > 64 {
				t.Errorf("%q: parent %q", s, p)
			}
			if _, err := resource.ParseID(p.String()); err != nil {
				t.Errorf("parent of %q: %v", s, err)
			}
		}
	})
}
