package gate

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/strictyaml"
)

// keysOf are the keys that a kind of gate has besides those that all have.
func keysOf(k Kind) (required, optional []string) {
	switch k {
	case KindTest:
		return nil, []string{"at_least", "max_warned"}
	case KindReview:
		return nil, []string{"reviewers"}
	case KindScan:
		return nil, []string{"at_most"}
	case KindVulns:
		return []string{"database_age"}, []string{"at_most", "vex"}
	case KindProvenance:
		return []string{"builders"}, []string{"build_types", "source"}
	case KindVerification:
		return []string{"properties"}, []string{"verifiers"}
	case KindSurface:
		return nil, []string{"reviewers"}
	case KindCustom:
		return []string{"type", "require"}, nil
	}
	return nil, nil
}

func (d *document) gate(n *yaml.Node, where string) {
	g := Gate{MaxAge: defaultMaxAge, AtLeast: 1, MaxWarned: anyNumber, Reviewers: 1, AtMost: map[string]int{}}
	if n.Kind != yaml.MappingNode {
		d.WrongType(n, where, "a mapping (key: value)")
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			g.Kind = Kind(n.Content[i+1].Value)
		}
	}
	var kinds []string
	for _, k := range GateKinds() {
		kinds = append(kinds, string(k))
	}
	fields := []strictyaml.Field{
		strictyaml.Required("name", func(n *yaml.Node, where string) { g.Name = d.gateName(n, where) }),
		strictyaml.Required("kind", func(n *yaml.Node, where string) { d.Word(n, where, kinds) }),
		strictyaml.Required("attesters", func(n *yaml.Node, where string) { g.Attesters = d.attesters(n, where) }),
		strictyaml.Optional("max_age", func(n *yaml.Node, where string) { g.MaxAge = d.duration(n, where, maxAge) }),
		strictyaml.Optional("about", func(n *yaml.Node, where string) {
			g.Source = d.Word(n, where, []string{"artefact", "source"}) == "source"
		}),
	}
	special := map[string]func(*yaml.Node, string){
		"at_least":     func(n *yaml.Node, where string) { g.AtLeast = d.number(n, where, 1, anyNumber) },
		"max_warned":   func(n *yaml.Node, where string) { g.MaxWarned = d.number(n, where, 0, anyNumber) },
		"reviewers":    func(n *yaml.Node, where string) { g.Reviewers = d.number(n, where, 1, 16) },
		"at_most":      func(n *yaml.Node, where string) { d.atMost(n, where, &g) },
		"database_age": func(n *yaml.Node, where string) { g.DatabaseAge = d.duration(n, where, maxAge) },
		"vex":          func(n *yaml.Node, where string) { g.VEX = d.attesters(n, where) },
		"builders":     func(n *yaml.Node, where string) { g.Builders = d.texts(n, where) },
		"build_types":  func(n *yaml.Node, where string) { g.BuildTypes = d.texts(n, where) },
		"source":       func(n *yaml.Node, where string) { g.SourceURI = d.text(n, where) },
		"verifiers":    func(n *yaml.Node, where string) { g.Verifiers = d.texts(n, where) },
		"properties":   func(n *yaml.Node, where string) { g.Properties = d.texts(n, where) },
		"type":         func(n *yaml.Node, where string) { g.Type = d.customType(n, where) },
		"require":      func(n *yaml.Node, where string) { g.Require = d.require(n, where) },
	}
	required, optional := keysOf(g.Kind)
	for _, k := range slices.Concat(required, optional) {
		if slices.Contains(required, k) {
			fields = append(fields, strictyaml.Required(k, special[k]))
		} else {
			fields = append(fields, strictyaml.Optional(k, special[k]))
		}
	}
	if !slices.Contains(kinds, string(g.Kind)) { // do not blame the keys for the kind
		for k, read := range special {
			fields = append(fields, strictyaml.Optional(k, read))
		}
	}
	d.Mapping(n, where, fields)
	if g.Source && !g.needsRevision() {
		d.Problem(n, where, "evidence of kind "+string(g.Kind)+" is about an artefact", "remove `about: source`")
	}
	if g.Source && g.Kind == KindProvenance {
		d.Problem(n, where, "provenance is about an artefact", "remove `about: source`")
	}
	d.p.Gates = append(d.p.Gates, g)
}

func (d *document) gateName(n *yaml.Node, where string) string {
	s := d.label(n, where)
	switch {
	case slices.Contains([]string{reservedProduct, reservedRev, reservedEpoch, reservedRing}, s):
		d.Problem(n, where, "`"+s+"` is what the release itself is checked for", "choose another name")
	case s != "" && slices.ContainsFunc(d.p.Gates, func(g Gate) bool { return g.Name == s }):
		d.Problem(n, where, "`"+s+"` is taken", "choose another name")
	}
	return s
}

// atMost reads limits by level or severity. What is not named may not occur.
func (d *document) atMost(n *yaml.Node, where string, g *Gate) {
	words := Severities()
	if g.Kind == KindScan {
		words = levels()
	}
	var fields []strictyaml.Field
	for _, w := range words {
		fields = append(fields, strictyaml.Optional(w, func(n *yaml.Node, where string) {
			if n.Kind == yaml.ScalarNode && n.Value == "any" {
				g.AtMost[w] = anyNumber
				return
			}
			g.AtMost[w] = d.number(n, where, 0, anyNumber)
		}))
	}
	d.Mapping(n, where, fields)
}

func (d *document) customType(n *yaml.Node, where string) string {
	s := d.text(n, where)
	if k, _ := kindOf(s); s != "" && k != KindCustom {
		d.Problem(n, where, "`"+clip(s)+"` is not custom", "use `kind: "+string(k)+"`")
	}
	if s != "" && !strings.Contains(s, ":") {
		d.Problem(n, where, "`"+clip(s)+"` is no URI", "use the predicate type of the statement")
	}
	return s
}

func (d *document) require(n *yaml.Node, where string) map[string]string {
	out := map[string]string{}
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 || len(n.Content) > 2*maxList {
		d.Problem(n, where, "must be a mapping of fields to the values that they must have", "as in `{summary.result: pass}`")
		return out
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := where + "." + clip(k.Value)
		if _, dup := out[k.Value]; dup {
			d.Problem(k, at, "repeated", "remove one of the two")
		}
		if k.Kind != yaml.ScalarNode || v.Kind != yaml.ScalarNode || k.Value == "" || v.ShortTag() == "!!null" {
			d.Problem(k, at, "must be one word, number or text", "")
			continue
		}
		out[k.Value] = v.Value
	}
	return out
}
