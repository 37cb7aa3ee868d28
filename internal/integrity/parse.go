package integrity

import (
	"path"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/strictyaml"
)

// limits bound a policy document.
func limits() strictyaml.Limits {
	return strictyaml.Limits{What: "policy", Bytes: 4 << 20, Parts: 300_000, Depth: 12, Hint: "sign catalogues instead of listing digests"}
}

// digest reads a SHA-256; YAML may take one of digits only for a number.
func (d *document) digest(n *yaml.Node, where string) (Digest, bool) {
	if n.Kind != yaml.ScalarNode {
		d.WrongType(n, where, "64 hex digits")
		return Digest{}, false
	}
	v, err := ParseDigest(n.Value)
	if err != nil || v.IsZero() {
		d.Problem(n, where, "is `"+strictyaml.Clip(n.Value)+"`, must be 64 hex digits", "`sha256sum FILE` prints them")
		return Digest{}, false
	}
	return v, true
}

func (d *document) digests(n *yaml.Node, where string) []Digest {
	var out []Digest
	seen := map[Digest]bool{}
	d.List(n, where, maxDigests, func(n *yaml.Node, where string) {
		v, ok := d.digest(n, where)
		switch {
		case !ok:
		case seen[v]:
			d.Problem(n, where, "repeated", "remove one of the two")
		default:
			seen[v] = true
			out = append(out, v)
		}
	})
	d.NotEmpty(n, where)
	return out
}

// checkPattern checks a path.Match pattern.
func checkPattern(s string) (problem, fix string) {
	if _, err := path.Match(s, ""); err != nil {
		return "`" + strictyaml.Clip(s) + "` is no pattern", "close the bracket, or put \\ before a [ that is meant"
	}
	return "", ""
}
