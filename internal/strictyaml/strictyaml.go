// Package strictyaml reads YAML documents in which people say what shall be
// trusted: nothing is ignored, nothing means anything else than it shows, and
// every problem comes with its place and what to do.
//
// Refused are unknown and repeated keys, wrong types, anchors, aliases, merge
// keys, tags, a second document, and whatever is beyond the limits given.
package strictyaml

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
)

const maxProblems = 50 // reported; the rest is counted

// MaxText is the longest text that Reader.Text reads, in bytes.
const MaxText = 1024

// Limits bound a document before it is parsed.
type Limits struct {
	What  string // what it is, for messages: "policy"
	Bytes int
	Parts int    // an upper bound of its YAML nodes
	Depth int    // of nesting
	Hint  string // what to do when it is too large; may be empty
}

// Problem is one thing that is wrong with a document, and what to do.
type Problem struct {
	Line   int    `json:"line"` // from 1; 0: the whole document
	Column int    `json:"column"`
	Path   string `json:"path"` // as in "allow[3].signer.identity"; may be empty
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"`
}

// Error is everything that is wrong with a document, in its order. It is
// an errs.Invalid.
type Error struct {
	Name     string    `json:"name"` // of the document
	Problems []Problem `json:"problems"`
	More     int       `json:"more,omitempty"` // problems that are not listed
}

// Error returns a line for each problem.
func (e *Error) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(e.Name)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
		}
		b.WriteString(": ")
		if p.Path != "" {
			b.WriteString(p.Path + ": ")
		}
		b.WriteString(p.Text)
		if p.Fix != "" {
			b.WriteString(" (fix: " + p.Fix + ")")
		}
	}
	if e.More > 0 {
		fmt.Fprintf(&b, "\n%s: and %d more", e.Name, e.More)
	}
	return b.String()
}

// Unwrap returns errs.Invalid.
func (e *Error) Unwrap() error { return errs.Invalid }

// Reader walks the nodes of a document and collects problems. Paths ("where")
// are as in Problem. It is used by one goroutine.
type Reader struct {
	limits Limits
	err    Error
}

// NewReader returns a Reader of a document whose name stands in errors.
func NewReader(name string, l Limits) Reader {
	return Reader{limits: l, err: Error{Name: name}}
}

// Problem notes that something is wrong at a node, or, if it is nil, with the
// whole document.

func (r *Reader) Problem(n *yaml.Node, where, text, fix string) {
	if len(r.err.Problems) == maxProblems {
		r.err.More++
		return
	}
	p := Problem{Path: where, Text: text, Fix: fix}
	if n != nil {
		p.Line, p.Column = n.Line, n.Column
	}
	r.err.Problems = append(r.err.Problems, p)
}

// Err returns all problems as an *Error, or nil.
func (r *Reader) Err() error {
	if len(r.err.Problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.err.Problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return &r.err
}

// Root returns the root of a one-document stream, or nil.
func (r *Reader) Root(doc []byte) *yaml.Node {
	switch {
	case len(doc) > r.limits.Bytes:
		r.tooLarge(fmt.Sprintf("%d bytes", len(doc)), fmt.Sprintf("%d bytes", r.limits.Bytes))
		return nil
	case parts(doc) > r.limits.Parts:
		r.tooLarge("too many entries", strconv.Itoa(r.limits.Parts))
		return nil
	case !utf8.Valid(doc):
		r.Problem(nil, "", "not UTF-8", "save it as UTF-8")
		return nil
	}
	d := yaml.NewDecoder(bytes.NewReader(doc))
	var n yaml.Node
	if err := d.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			r.Problem(nil, "", "empty", "start with `version: 1`")
		} else {
			r.yamlError(err)
		}
		return nil
	}
	var second yaml.Node
	if err := d.Decode(&second); !errors.Is(err, io.EOF) {
		if err != nil {
			r.yamlError(err)
		} else {
			r.Problem(&second, "", "a second YAML document", "one file holds one "+r.limits.What+"; remove the line `---`")
		}
		return nil
	}
	before := len(r.err.Problems)
	r.plain(&n, 0)
	if len(r.err.Problems) > before || n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
		return nil
	}
	return n.Content[0]
}

func (r *Reader) tooLarge(is, limit string) {
	fix := "a " + r.limits.What + " has at most " + limit
	if r.limits.Hint != "" {
		fix += ": " + r.limits.Hint
	}
	r.Problem(nil, "", is, fix)
}

// parts bounds the number of nodes that YAML can make of the document.
func parts(doc []byte) int {
	n := 0
	for _, c := range doc {
		switch c {
		case '\n', ',', '[', '{', ':', '-':
			n++
		}
	}
	// dashes and line ends of certificates and keyrings make no nodes
	return n - bytes.Count(doc, []byte("-----"))*5
}

// yamlError turns "yaml: line 3: what" into a problem with a position.
func (r *Reader) yamlError(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	var n *yaml.Node
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if at, what, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(at); err == nil {
				n, text = &yaml.Node{Line: line, Column: 1}, what
			}
		}
	}
	r.Problem(n, "", "not YAML: "+text, "")
}

// plain refuses what makes a document mean something else than it shows.
func (r *Reader) plain(n *yaml.Node, depth int) {
	switch {
	case depth > r.limits.Depth:
		r.Problem(n, "", "nested too deeply", "")
		return
	case n.Kind == yaml.AliasNode:
		r.Problem(n, "", "aliases are not allowed", "write the value out")
		return
	case n.Anchor != "":
		r.Problem(n, "", "anchors are not allowed", "remove &"+Clip(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		r.Problem(n, "", "tags are not allowed", "remove "+Clip(n.Tag))
	}
	for _, c := range n.Content {
		r.plain(c, depth+1)
	}
}

// Clip keeps what is quoted in a message short.
func Clip(s string) string {
	if len(s) > 60 {
		return strings.ToValidUTF8(s[:57], "") + "..."
	}
	return s
}

// Field is one key of a mapping, see Required and Optional.
type Field struct {
	key      string
	required bool
	read     func(n *yaml.Node, where string)
}

// Required is a key that must be there; read is given its value.
func Required(key string, read func(n *yaml.Node, where string)) Field { return Field{key, true, read} }

// Optional is a key that may be there; read is given its value.
func Optional(key string, read func(n *yaml.Node, where string)) Field {
	return Field{key, false, read}
}

// Key is the name of the field.
func (f Field) Key() string { return f.key }

// Mapping reads the keys of a mapping, each at most once.
func (r *Reader) Mapping(n *yaml.Node, where string, fields []Field) {
	if n.Kind != yaml.MappingNode {
		r.WrongType(n, where, "a mapping (key: value)")
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := dotted(where, Clip(k.Value))
		f := slices.IndexFunc(fields, func(f Field) bool { return f.key == k.Value })
		switch line, dup := seen[k.Value]; {
		case k.Kind != yaml.ScalarNode:
			r.Problem(k, where, "a key must be a word", "")
		case k.Value == "<<" && k.ShortTag() == "!!merge":
			r.Problem(k, where, "merge keys are not allowed", "write the keys out")
		case f < 0:
			r.Problem(k, at, "unknown key", Suggest(k.Value, keysOf(fields)))
		case dup:
			r.Problem(k, at, fmt.Sprintf("repeated; it stands in line %d already", line), "remove one of the two")
		default:
			seen[k.Value] = k.Line
			fields[f].read(v, at)
		}
	}
	for _, f := range fields {
		if _, ok := seen[f.key]; !ok && f.required {
			r.Problem(n, where, "lacks "+f.key, "add `"+f.key+": …`")
		}
	}
}

func dotted(where, key string) string {
	if where == "" {
		return key
	}
	return where + "." + key
}

func keysOf(fields []Field) []string {
	out := make([]string, len(fields))
	for i := range fields {
		out[i] = fields[i].key
	}
	return out
}

// WrongType notes that a node is not what it must be.
func (r *Reader) WrongType(n *yaml.Node, where, want string) {
	have := "a list"
	switch n.Kind {
	case yaml.MappingNode:
		have = "a mapping"
	case yaml.ScalarNode:
		if have = "`" + Clip(n.Value) + "`"; n.ShortTag() == "!!null" {
			have = "nothing"
		}
	}
	r.Problem(n, where, "is "+have+", must be "+want, "")
}

// List reads the items of a sequence.
func (r *Reader) List(n *yaml.Node, where string, limit int, read func(n *yaml.Node, where string)) {
	if n.Kind != yaml.SequenceNode {
		r.WrongType(n, where, "a list")
		return
	}
	if len(n.Content) > limit {
		r.Problem(n, where, fmt.Sprintf("%d entries", len(n.Content)), fmt.Sprintf("at most %d", limit))
		return
	}
	for i, c := range n.Content {
		read(c, where+"["+strconv.Itoa(i)+"]")
	}
}

// Text reads a string that is not empty.
func (r *Reader) Text(n *yaml.Node, where string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		fix := ""
		if n.Kind == yaml.ScalarNode && n.ShortTag() != "!!null" {
			fix = "put it in quotes"
		}
		r.Problem(n, where, "must be a text", fix)
		return "", false
	}
	if n.Value == "" || len(n.Value) > MaxText || strings.ContainsFunc(n.Value, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		r.Problem(n, where, fmt.Sprintf("must be a line of 1 to %d bytes", MaxText), "")
		return "", false
	}
	return n.Value, true
}

// Texts reads a list of different strings. check returns what is wrong with one;
// nil: nothing is.
func (r *Reader) Texts(n *yaml.Node, where string, limit int, check func(s string) (problem, fix string)) []string {
	var out []string
	r.List(n, where, limit, func(n *yaml.Node, where string) {
		s, ok := r.Text(n, where)
		if !ok {
			return
		}
		if slices.Contains(out, s) {
			r.Problem(n, where, "`"+Clip(s)+"` is repeated", "remove one of the two")
			return
		}
		if check != nil {
			if bad, fix := check(s); bad != "" {
				r.Problem(n, where, bad, fix)
				return
			}
		}
		out = append(out, s)
	})
	return out
}

// Word reads one of the words given.
func (r *Reader) Word(n *yaml.Node, where string, words []string) string {
	if n.Kind == yaml.ScalarNode && slices.Contains(words, n.Value) {
		return n.Value
	}
	if n.Kind != yaml.ScalarNode {
		r.WrongType(n, where, "one of "+strings.Join(words, ", "))
		return ""
	}
	r.Problem(n, where, "is `"+Clip(n.Value)+"`, must be one of "+strings.Join(words, ", "), Suggest(n.Value, words))
	return ""
}

// Number reads a number between two bounds, which belong to it.
func (r *Reader) Number(n *yaml.Node, where string, low, high uint64) uint64 {
	v, err := strconv.ParseUint(n.Value, 10, 64)
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < low || v > high {
		r.WrongType(n, where, fmt.Sprintf("a number from %d to %d", low, high))
		return 0
	}
	return v
}

// Boolean reads true or false.
func (r *Reader) Boolean(n *yaml.Node, where string) bool {
	return r.Word(n, where, []string{"true", "false"}) == "true"
}

// Time reads an RFC 3339 time.
func (r *Reader) Time(n *yaml.Node, where string) time.Time {
	t, err := time.Parse(time.RFC3339, n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		r.Problem(n, where, "must be a time with its zone", "as in 2031-05-01T12:00:00Z")
		return time.Time{}
	}
	return t.UTC()
}

// NotEmpty notes that a list has no items.
func (r *Reader) NotEmpty(n *yaml.Node, where string) {
	if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		r.Problem(n, where, "is empty", "remove it, or list something")
	}
}

// Suggest names the word that was probably meant.
func Suggest(s string, words []string) string {
	best, score := "", 3
	if len(s) < 4 {
		score = 2
	}
	for _, w := range words {
		if d := Distance(s, w, score); d < score {
			best, score = w, d
		}
	}
	if best == "" {
		return "use one of " + strings.Join(words, ", ")
	}
	return "did you mean " + best + "?"
}

// Distance is the number of edits (Levenshtein) between two words, limit if it is
// not lower.
func Distance(a, b string, limit int) int {
	if len(a) > 64 || len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := before
			if a[i] != b[j] {
				cost++
			}
			before, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
