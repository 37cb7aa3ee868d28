package integrity_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"ringwall/internal/integrity"
)

func schema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(integrity.Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("policy.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("policy.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// plain is a YAML node as JSON has it: times and long digit strings are texts.
func plain(t *testing.T, n *yaml.Node) any {
	t.Helper()
	switch n.Kind {
	case yaml.DocumentNode:
		return plain(t, n.Content[0])
	case yaml.MappingNode:
		m := map[string]any{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			m[n.Content[i].Value] = plain(t, n.Content[i+1])
		}
		return m
	case yaml.SequenceNode:
		l := []any{}
		for _, c := range n.Content {
			l = append(l, plain(t, c))
		}
		return l
	}
	switch n.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		return n.Value == "true"
	case "!!int":
		if len(n.Value) < 20 {
			return json.Number(n.Value)
		}
	}
	return n.Value
}

func TestSchema(t *testing.T) {
	s := schema(t)
	valid := examples(t)
	valid["full"] = []byte(full(t))
	valid["supplement"] = []byte("version: 1\nname: s\nepoch: 1\nsupplements: p\nallow: [{rule: x, sha256: [" + hex1 + "]}]\n")
	for name, doc := range valid {
		var n yaml.Node
		if err := yaml.Unmarshal(doc, &n); err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(plain(t, &n)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, c := range badPolicies() {
		if c.beyond {
			continue
		}
		var n yaml.Node
		if err := yaml.Unmarshal([]byte(c.doc), &n); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if err := s.Validate(plain(t, &n)); err == nil {
			t.Errorf("%s: the schema lets it pass", c.name)
		}
	}
}
