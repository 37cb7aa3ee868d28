package strictyaml_test

import (
	"errors"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
	"ringwall/internal/strictyaml"
)

type recipe struct {
	name    string
	minutes uint64
	steps   []string
	vegan   bool
}

func read(doc []byte) (*recipe, error) {
	r := strictyaml.NewReader("r.yaml", strictyaml.Limits{What: "recipe", Bytes: 1000, Parts: 60, Depth: 4, Hint: "cook less"})
	out := &recipe{}
	if root := r.Root(doc); root != nil {
		r.Mapping(root, "", []strictyaml.Field{
			strictyaml.Required("name", func(n *yaml.Node, where string) { out.name, _ = r.Text(n, where) }),
			strictyaml.Optional("minutes", func(n *yaml.Node, where string) { out.minutes = r.Number(n, where, 1, 90) }),
			strictyaml.Optional("vegan", func(n *yaml.Node, where string) { out.vegan = r.Boolean(n, where) }),
			strictyaml.Optional("steps", func(n *yaml.Node, where string) { out.steps = r.Texts(n, where, 3, nil); r.NotEmpty(n, where) }),
		})
	}
	if err := r.Err(); err != nil {
		return nil, err
	}
	return out, nil
}

func TestReader(t *testing.T) {
	for name, tc := range map[string]struct{ doc, want string }{
		"good":            {"name: soup\nminutes: 20\nvegan: true\nsteps: [cut, cook]\n", ""},
		"empty":           {"", "r.yaml: empty (fix: start with `version: 1`)"},
		"too large":       {"name: " + strings.Repeat("a", 1000), "1006 bytes (fix: a recipe has at most 1000 bytes: cook less)"},
		"too many parts":  {"steps: [" + strings.Repeat("a,", 60) + "]", "too many entries (fix: a recipe has at most 60: cook less)"},
		"not UTF-8":       {"name: \xff", "not UTF-8"},
		"not YAML":        {"name: [", "r.yaml:1:1: not YAML"},
		"two documents":   {"name: a\n---\nname: b\n", "a second YAML document (fix: one file holds one recipe"},
		"unknown key":     {"name: a\nvegn: true\n", "r.yaml:2:1: vegn: unknown key (fix: did you mean vegan?)"},
		"repeated key":    {"name: a\nname: b\n", "r.yaml:2:1: name: repeated; it stands in line 1 already"},
		"missing key":     {"minutes: 3\n", "lacks name (fix: add `name: …`)"},
		"not a mapping":   {"- a\n", "is a list, must be a mapping"},
		"wrong word":      {"name: a\nvegan: ys\n", "must be one of true, false"},
		"out of bounds":   {"name: a\nminutes: 91\n", "must be a number from 1 to 90"},
		"number as text":  {"name: 7\n", "must be a text (fix: put it in quotes)"},
		"control":         {"name: \"a\\u0007\"\n", "must be a line of 1 to 1024 bytes"},
		"anchor":          {"name: &x a\n", "anchors are not allowed"},
		"alias":           {"name: &x a\nsteps: [*x]\n", "aliases are not allowed"},
		"tag":             {"name: !!str a\n", "tags are not allowed"},
		"merge":           {"name: a\n<<: {minutes: 3}\n", "merge keys are not allowed"},
		"too deep":        {"name: [[[[[a]]]]]\n", "nested too deeply"},
		"too many items":  {"name: a\nsteps: [a, b, c, d]\n", "4 entries (fix: at most 3)"},
		"repeated item":   {"name: a\nsteps: [a, a]\n", "`a` is repeated"},
		"no items":        {"name: a\nsteps: []\n", "is empty"},
		"several at once": {"nam: a\nminutes: x\n", "r.yaml:2:10: minutes: is `x`"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := read([]byte(tc.doc))
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (!errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v\nwant %q", err, tc.want)
			}
		})
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("name: soup\nminutes: 20\nsteps: [cut, cook]\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		r, err := read(doc)
		if err == nil && (r.name == "" || r.minutes > 90 || len(r.steps) > 3) {
			t.Errorf("%+v", r)
		}
	})
}
