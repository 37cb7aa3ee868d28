package integrity

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/strictyaml"
)

// ownInterpreter is an interpreter of the policy itself: it may leave out what
// the baseline says under the same name.
type ownInterpreter struct {
	n     *yaml.Node
	where string
	seen  map[string]bool
}

// mergeInterpreters completes the policy's own interpreters from the built-in
// ones and adds those that it does not name.
func (d *document) mergeInterpreters(builtin []InterpreterRule) {
	for i := range d.ownInterpreters {
		own, r := d.ownInterpreters[i], &d.p.Interpreters[i]
		for j := range builtin {
			if b := &builtin[j]; b.Name == r.Name {
				inherit(r, b, own.seen)
				own.seen = map[string]bool{"match": true, "reads": true, "inline": true}
			}
		}
		for _, key := range []string{"match", "reads", "inline"} {
			if own.n.Kind == yaml.MappingNode && !own.seen[key] {
				d.Problem(own.n, own.where, "lacks "+key, "add `"+key+": …`")
			}
		}
	}
	for _, b := range builtin {
		if _, own := d.interpreterLine[b.Name]; !own {
			d.p.Interpreters = append(d.p.Interpreters, b)
		}
	}
}

// inherit takes what r does not say itself from b.
func inherit(r, b *InterpreterRule, seen map[string]bool) {
	if !seen["match"] {
		r.Match = b.Match
	}
	if !seen["reads"] {
		r.Reads = b.Reads
	}
	if !seen["inline"] {
		r.Inline = b.Inline
	}
	if !seen["stdin"] {
		r.Stdin = b.Stdin
	}
	if !seen["options"] {
		r.InlineFlags, r.ArgFlags, r.StdinFlags, r.InlineLong, r.ArgLong = b.InlineFlags, b.ArgFlags, b.StdinFlags, b.InlineLong, b.ArgLong
		r.ScriptFlags, r.Word, r.Environment = b.ScriptFlags, b.Word, b.Environment
	}
	if !seen["suffixes"] {
		r.CodeSuffix = b.CodeSuffix
	}
	if !seen["bytecode"] {
		r.Bytecode = b.Bytecode
	}
	if !seen["data"] {
		r.DataPaths = b.DataPaths
	}
}

func (d *document) interpreter(n *yaml.Node, where string) {
	var r InterpreterRule
	own := ownInterpreter{n: n, where: where, seen: map[string]bool{}}
	for i := 0; i+1 < len(n.Content); i += 2 {
		own.seen[n.Content[i].Value] = true
	}
	d.ownInterpreters = append(d.ownInterpreters, own)
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Required("name", func(n *yaml.Node, where string) {
			r.Name = d.unique(n, where, d.interpreterLine)
			if len(r.Name) > maxShortName {
				d.Problem(n, where, "too long", fmt.Sprintf("at most %d bytes", maxShortName))
			}
		}),
		strictyaml.Optional("match", func(n *yaml.Node, where string) {
			d.List(n, where, maxMatches, func(n *yaml.Node, where string) { r.Match = append(r.Match, d.match(n, where)) })
			d.NotEmpty(n, where)
		}),
		strictyaml.Optional("reads", func(n *yaml.Node, where string) {
			switch d.Word(n, where, []string{"any", "code", "strict"}) {
			case "code":
				r.Reads = ReadsCode
			case "strict":
				r.Reads = ReadsStrict
			}
		}),
		strictyaml.Optional("inline", func(n *yaml.Node, where string) {
			switch d.Word(n, where, []string{"allow", "audit", "deny"}) {
			case "audit":
				r.Inline = ModeAudit
			case "deny":
				r.Inline = ModeEnforce
			}
		}),
		strictyaml.Optional("stdin", func(n *yaml.Node, where string) { r.Stdin = d.stdin(n, where) }),
		strictyaml.Optional("options", func(n *yaml.Node, where string) { d.options(n, where, &r.Interpreter) }),
		strictyaml.Optional("suffixes", func(n *yaml.Node, where string) { r.CodeSuffix = d.suffixes(n, where) }),
		strictyaml.Optional("bytecode", func(n *yaml.Node, where string) { r.Bytecode = d.suffixes(n, where) }),
		strictyaml.Optional("data", func(n *yaml.Node, where string) {
			r.DataPaths = d.Texts(n, where, maxDataPaths, func(s string) (string, string) {
				switch {
				case !strings.HasPrefix(s, "/") || len(s) > maxDataPath:
					return "`" + strictyaml.Clip(s) + "` is no data path", fmt.Sprintf("an absolute path of at most %d bytes; a directory ends in a slash", maxDataPath)
				case strings.ContainsAny(s, "*?["):
					return "`" + strictyaml.Clip(s) + "` has a wildcard", "name the directory, with a slash at its end"
				case s == "/":
					return "everything would be data", "use `reads: code`"
				}
				return "", ""
			})
		}),
	})
	d.p.Interpreters = append(d.p.Interpreters, r)
}

func (d *document) suffixes(n *yaml.Node, where string) []string {
	return d.Texts(n, where, maxSuffixes, func(s string) (string, string) {
		if len(s) > maxSuffix || strings.Contains(s, "/") {
			return "`" + strictyaml.Clip(s) + "` is no suffix", fmt.Sprintf("1 to %d bytes, as in .py", maxSuffix)
		}
		return "", ""
	})
}

func (d *document) stdin(n *yaml.Node, where string) Stdin {
	var out Stdin
	forms := []string{"tty", "pipe", "file", "socket", "null"} // in the order of their bits
	d.List(n, where, len(forms), func(n *yaml.Node, where string) {
		w := d.Word(n, where, forms)
		for i, f := range forms {
			if f == w {
				out |= StdinTTY << i
			}
		}
	})
	return out
}

func (d *document) options(n *yaml.Node, where string, r *Interpreter) {
	letters := func(to *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) {
			if n.Kind == yaml.ScalarNode && n.Value == "" {
				return
			}
			s, _ := d.Text(n, where)
			for i, c := range s {
				if c <= ' ' || c > '~' || c == '-' || strings.ContainsRune(s[:i], c) {
					d.Problem(n, where, "must be option letters, each once", `as in "ce"`)
					return
				}
			}
			*to = s
		}
	}
	long := func(to *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, where string) {
			*to = d.Texts(n, where, maxOptions, func(s string) (string, string) {
				if len(s) > maxOption || len(s) < 3 || !strings.HasPrefix(s, "--") || strings.ContainsAny(s, "= ") {
					return "`" + strictyaml.Clip(s) + "` is no long option", fmt.Sprintf("with both dashes and at most %d bytes, as in --eval", maxOption)
				}
				return "", ""
			})
		}
	}
	d.Mapping(n, where, []strictyaml.Field{
		strictyaml.Optional("inline", letters(&r.InlineFlags)),
		strictyaml.Optional("argument", letters(&r.ArgFlags)),
		strictyaml.Optional("stdin", letters(&r.StdinFlags)),
		strictyaml.Optional("script", letters(&r.ScriptFlags)),
		strictyaml.Optional("word", func(n *yaml.Node, where string) {
			switch d.Word(n, where, []string{"script", "code", "other"}) {
			case "code":
				r.Word = WordCode
			case "other":
				r.Word = WordOther
			}
		}),
		strictyaml.Optional("inline_long", long(&r.InlineLong)),
		strictyaml.Optional("argument_long", long(&r.ArgLong)),
		strictyaml.Optional("environment", func(n *yaml.Node, where string) {
			r.Environment = d.Texts(n, where, maxOptions, func(s string) (string, string) {
				name := strings.TrimSuffix(s, "*")
				if name == "" || len(name) > maxVariable || strings.ContainsAny(name, "=*? ") {
					return "`" + strictyaml.Clip(s) + "` is no variable", fmt.Sprintf("a name of at most %d bytes; a star at its end stands for the rest", maxVariable)
				}
				return "", ""
			})
		}),
	})
}
