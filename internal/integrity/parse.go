package integrity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/errs"
)

// Bounds of a policy document.
const (
	maxDocument = 4 << 20
	maxParts    = 300_000 // an upper bound of its YAML nodes, counted before parsing
	maxDepth    = 12
	maxProblems = 50 // reported; the rest is counted
	maxText     = 1024
)

// Problem is one thing that is wrong with a document, and what to do.
type Problem struct {
	Line   int    `json:"line"` // from 1; 0: the whole document
	Column int    `json:"column"`
	Path   string `json:"path"` // as in "allow[3].signer.identity"; may be empty
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"`
}

// ParseError is everything that is wrong with a document, in its order. It is
// an errs.Invalid.
type ParseError struct {
	Name     string    `json:"name"` // of the document
	Problems []Problem `json:"problems"`
	More     int       `json:"more,omitempty"` // problems that are not listed
}

// Error returns a line for each problem.
func (e *ParseError) Error() string {
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
func (e *ParseError) Unwrap() error { return errs.Invalid }

// reader walks the nodes of a document and collects problems.
type reader struct {
	err ParseError
}

func (r *reader) problem(n *yaml.Node, where, text, fix string) {
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

func (r *reader) failed() error {
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

// document returns the root mapping of a one-document stream, or nil.
func (r *reader) document(doc []byte) *yaml.Node {
	switch {
	case len(doc) > maxDocument:
		r.problem(nil, "", fmt.Sprintf("%d bytes", len(doc)), fmt.Sprintf("a policy has at most %d bytes: sign catalogues instead of listing digests", maxDocument))
		return nil
	case parts(doc) > maxParts:
		r.problem(nil, "", "too many entries", fmt.Sprintf("a policy has at most %d: sign catalogues instead of listing digests", maxParts))
		return nil
	case !utf8.Valid(doc):
		r.problem(nil, "", "not UTF-8", "save it as UTF-8")
		return nil
	}
	d := yaml.NewDecoder(bytes.NewReader(doc))
	var n yaml.Node
	if err := d.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			r.problem(nil, "", "empty", "start with `version: 1`")
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
			r.problem(&second, "", "a second YAML document", "one file holds one policy; remove the line `---`")
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
func (r *reader) yamlError(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	var n *yaml.Node
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if at, what, ok := strings.Cut(rest, ": "); ok {
			if line, err := strconv.Atoi(at); err == nil {
				n, text = &yaml.Node{Line: line, Column: 1}, what
			}
		}
	}
	r.problem(n, "", "not YAML: "+text, "")
}

// plain refuses what makes a document mean something else than it shows.
func (r *reader) plain(n *yaml.Node, depth int) {
	switch {
	case depth > maxDepth:
		r.problem(n, "", "nested too deeply", "")
		return
	case n.Kind == yaml.AliasNode:
		r.problem(n, "", "aliases are not allowed", "write the value out")
		return
	case n.Anchor != "":
		r.problem(n, "", "anchors are not allowed", "remove &"+clip(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		r.problem(n, "", "tags are not allowed", "remove "+clip(n.Tag))
	}
	for _, c := range n.Content {
		r.plain(c, depth+1)
	}
}

// clip keeps what is quoted in a message short.
func clip(s string) string {
	if len(s) > 60 {
		return strings.ToValidUTF8(s[:57], "") + "..."
	}
	return s
}

// field is one key of a mapping.
type field struct {
	key      string
	required bool
	read     func(n *yaml.Node, where string)
}

// mapping reads the keys of a mapping, each at most once.
func (r *reader) mapping(n *yaml.Node, where string, fields []field) {
	if n.Kind != yaml.MappingNode {
		r.wrongType(n, where, "a mapping (key: value)")
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := dotted(where, clip(k.Value))
		f := slices.IndexFunc(fields, func(f field) bool { return f.key == k.Value })
		switch line, dup := seen[k.Value]; {
		case k.Kind != yaml.ScalarNode:
			r.problem(k, where, "a key must be a word", "")
		case k.Value == "<<" && k.ShortTag() == "!!merge":
			r.problem(k, where, "merge keys are not allowed", "write the keys out")
		case f < 0:
			r.problem(k, at, "unknown key", suggest(k.Value, keysOf(fields)))
		case dup:
			r.problem(k, at, fmt.Sprintf("repeated; it stands in line %d already", line), "remove one of the two")
		default:
			seen[k.Value] = k.Line
			fields[f].read(v, at)
		}
	}
	for _, f := range fields {
		if _, ok := seen[f.key]; !ok && f.required {
			r.problem(n, where, "lacks "+f.key, "add `"+f.key+": …`")
		}
	}
}

func dotted(where, key string) string {
	if where == "" {
		return key
	}
	return where + "." + key
}

func keysOf(fields []field) []string {
	out := make([]string, len(fields))
	for i := range fields {
		out[i] = fields[i].key
	}
	return out
}

func (r *reader) wrongType(n *yaml.Node, where, want string) {
	have := "a list"
	switch n.Kind {
	case yaml.MappingNode:
		have = "a mapping"
	case yaml.ScalarNode:
		if have = "`" + clip(n.Value) + "`"; n.ShortTag() == "!!null" {
			have = "nothing"
		}
	}
	r.problem(n, where, "is "+have+", must be "+want, "")
}

// list reads the items of a sequence.
func (r *reader) list(n *yaml.Node, where string, limit int, read func(n *yaml.Node, where string)) {
	if n.Kind != yaml.SequenceNode {
		r.wrongType(n, where, "a list")
		return
	}
	if len(n.Content) > limit {
		r.problem(n, where, fmt.Sprintf("%d entries", len(n.Content)), fmt.Sprintf("at most %d", limit))
		return
	}
	for i, c := range n.Content {
		read(c, where+"["+strconv.Itoa(i)+"]")
	}
}

// text reads a string that is not empty.
func (r *reader) text(n *yaml.Node, where string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		fix := ""
		if n.Kind == yaml.ScalarNode && n.ShortTag() != "!!null" {
			fix = "put it in quotes"
		}
		r.problem(n, where, "must be a text", fix)
		return "", false
	}
	if n.Value == "" || len(n.Value) > maxText || strings.ContainsFunc(n.Value, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		r.problem(n, where, fmt.Sprintf("must be a line of 1 to %d bytes", maxText), "")
		return "", false
	}
	return n.Value, true
}

func (r *reader) texts(n *yaml.Node, where string, limit int, check func(s string) (problem, fix string)) []string {
	var out []string
	r.list(n, where, limit, func(n *yaml.Node, where string) {
		s, ok := r.text(n, where)
		if !ok {
			return
		}
		if slices.Contains(out, s) {
			r.problem(n, where, "`"+clip(s)+"` is repeated", "remove one of the two")
			return
		}
		if check != nil {
			if bad, fix := check(s); bad != "" {
				r.problem(n, where, bad, fix)
				return
			}
		}
		out = append(out, s)
	})
	return out
}

// word reads one of the words given.
func (r *reader) word(n *yaml.Node, where string, words []string) string {
	if n.Kind == yaml.ScalarNode && slices.Contains(words, n.Value) {
		return n.Value
	}
	if n.Kind != yaml.ScalarNode {
		r.wrongType(n, where, "one of "+strings.Join(words, ", "))
		return ""
	}
	r.problem(n, where, "is `"+clip(n.Value)+"`, must be one of "+strings.Join(words, ", "), suggest(n.Value, words))
	return ""
}

func (r *reader) number(n *yaml.Node, where string, low, high uint64) uint64 {
	v, err := strconv.ParseUint(n.Value, 10, 64)
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < low || v > high {
		r.wrongType(n, where, fmt.Sprintf("a number from %d to %d", low, high))
		return 0
	}
	return v
}

func (r *reader) boolean(n *yaml.Node, where string) bool {
	return r.word(n, where, []string{"true", "false"}) == "true"
}

func (r *reader) time(n *yaml.Node, where string) time.Time {
	t, err := time.Parse(time.RFC3339, n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		r.problem(n, where, "must be a time with its zone", "as in 2031-05-01T12:00:00Z")
		return time.Time{}
	}
	return t.UTC()
}

// digest reads a SHA-256; YAML may take one of digits only for a number.
func (r *reader) digest(n *yaml.Node, where string) (Digest, bool) {
	if n.Kind != yaml.ScalarNode {
		r.wrongType(n, where, "64 hex digits")
		return Digest{}, false
	}
	d, err := ParseDigest(n.Value)
	if err != nil || d.IsZero() {
		r.problem(n, where, "is `"+clip(n.Value)+"`, must be 64 hex digits", "`sha256sum FILE` prints them")
		return Digest{}, false
	}
	return d, true
}

func (r *reader) digests(n *yaml.Node, where string) []Digest {
	var out []Digest
	seen := map[Digest]bool{}
	r.list(n, where, maxDigests, func(n *yaml.Node, where string) {
		d, ok := r.digest(n, where)
		switch {
		case !ok:
		case seen[d]:
			r.problem(n, where, "repeated", "remove one of the two")
		default:
			seen[d] = true
			out = append(out, d)
		}
	})
	r.notEmpty(n, where)
	return out
}

func (r *reader) notEmpty(n *yaml.Node, where string) {
	if n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		r.problem(n, where, "is empty", "remove it, or list something")
	}
}

// checkPattern checks a path.Match pattern.
func checkPattern(s string) (problem, fix string) {
	if _, err := path.Match(s, ""); err != nil {
		return "`" + clip(s) + "` is no pattern", "close the bracket, or put \\ before a [ that is meant"
	}
	return "", ""
}

// suggest names the word that was probably meant.
func suggest(s string, words []string) string {
	best, score := "", 3
	if len(s) < 4 {
		score = 2
	}
	for _, w := range words {
		if d := distance(s, w, score); d < score {
			best, score = w, d
		}
	}
	if best == "" {
		return "use one of " + strings.Join(words, ", ")
	}
	return "did you mean " + best + "?"
}

// distance is the number of edits between two words, limit if it is not lower.
func distance(a, b string, limit int) int {
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
