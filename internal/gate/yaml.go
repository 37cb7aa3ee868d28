package gate

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

// Bounds of a release policy.
const (
	maxDocument = 256 << 10
	maxParts    = 20_000 // an upper bound of its YAML nodes, counted before parsing
	maxDepth    = 10
	maxProblems = 50
	maxText     = 1024
	maxList     = 64
)

// Problem is one thing that is wrong with a release policy, and what to do.
type Problem struct {
	Line   int    `json:"line"` // from 1; 0: the whole document
	Column int    `json:"column"`
	Path   string `json:"path"` // as in "gates[2].max_age"; may be empty
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"`
}

// ParseError is everything that is wrong with a release policy, in its order.
// It is an errs.Invalid.
type ParseError struct {
	Name     string    `json:"name"`
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

// reader walks the nodes of a document and collects problems, in the manner of
// the integrity policy's.
type reader struct{ err ParseError }

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

// document returns the root of a one-document stream, or nil.
func (r *reader) document(doc []byte) *yaml.Node {
	parts := bytes.Count(doc, []byte{'\n'})
	for _, c := range []byte(",[{:-") {
		parts += bytes.Count(doc, []byte{c})
	}
	switch {
	case len(doc) > maxDocument, parts > maxParts:
		r.problem(nil, "", "too large", fmt.Sprintf("a release policy has at most %d bytes and some %d entries", maxDocument, maxParts))
		return nil
	case !utf8.Valid(doc):
		r.problem(nil, "", "not UTF-8", "save it as UTF-8")
		return nil
	}
	d := yaml.NewDecoder(bytes.NewReader(doc))
	var n, second yaml.Node
	if err := d.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			r.problem(nil, "", "empty", "start with `version: 1`")
		} else {
			r.yamlError(err)
		}
		return nil
	}
	if err := d.Decode(&second); !errors.Is(err, io.EOF) {
		r.problem(&second, "", "a second YAML document", "one file holds one policy; remove the line `---`")
		return nil
	}
	r.plain(&n, 0)
	if len(r.err.Problems) > 0 || n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
		return nil
	}
	return n.Content[0]
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

func (r *reader) mapping(n *yaml.Node, where string, fields []field) {
	if n.Kind != yaml.MappingNode {
		r.wrongType(n, where, "a mapping (key: value)")
		return
	}
	keys := make([]string, len(fields))
	for i := range fields {
		keys[i] = fields[i].key
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		at := strings.TrimPrefix(where+"."+clip(k.Value), ".")
		f := slices.Index(keys, k.Value)
		switch line, dup := seen[k.Value]; {
		case k.Kind != yaml.ScalarNode:
			r.problem(k, where, "a key must be a word", "")
		case f < 0:
			r.problem(k, at, "unknown key", suggest(k.Value, keys))
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

// list reads the items of a sequence that is not empty.
func (r *reader) list(n *yaml.Node, where string, read func(n *yaml.Node, where string)) {
	if n.Kind != yaml.SequenceNode {
		r.wrongType(n, where, "a list")
		return
	}
	if len(n.Content) == 0 || len(n.Content) > maxList {
		r.problem(n, where, fmt.Sprintf("%d entries", len(n.Content)), fmt.Sprintf("1 to %d", maxList))
		return
	}
	for i, c := range n.Content {
		read(c, where+"["+strconv.Itoa(i)+"]")
	}
}

// text reads a line that is not empty.
func (r *reader) text(n *yaml.Node, where string) string {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		fix := ""
		if n.Kind == yaml.ScalarNode && n.ShortTag() != "!!null" {
			fix = "put it in quotes"
		}
		r.problem(n, where, "must be a text", fix)
		return ""
	}
	if !readable(n.Value, 1, maxText) {
		r.problem(n, where, fmt.Sprintf("must be a line of 1 to %d bytes", maxText), "")
		return ""
	}
	return n.Value
}

func (r *reader) texts(n *yaml.Node, where string) []string {
	var out []string
	r.list(n, where, func(n *yaml.Node, where string) {
		s := r.text(n, where)
		if s != "" && slices.Contains(out, s) {
			r.problem(n, where, "`"+clip(s)+"` is repeated", "remove one of the two")
			return
		}
		out = append(out, s)
	})
	return out
}

// label reads a name that can stand in commands, URLs and file names.
func (r *reader) label(n *yaml.Node, where string) string {
	s := r.text(n, where)
	if s != "" && !isLabel(s) {
		r.problem(n, where, "`"+clip(s)+"` is no name", "use up to 63 lower-case letters, digits, dots, dashes and underscores")
		return ""
	}
	return s
}

func isLabel(s string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || i == len(s)-1 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= 63
}

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

func (r *reader) number(n *yaml.Node, where string, low, high int) int {
	v, err := strconv.ParseUint(n.Value, 10, 63)
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil || v < uint64(low) || v > uint64(high) { //nolint:gosec // the bounds are constants
		r.wrongType(n, where, fmt.Sprintf("a number from %d to %d", low, high))
		return low
	}
	return int(v) //nolint:gosec // bounded by high
}

// duration reads one of up to most, in days, hours or minutes.
func (r *reader) duration(n *yaml.Node, where string, most time.Duration) time.Duration {
	d, ok := parseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || !ok || d <= 0 || d > most {
		r.problem(n, where, "is `"+clip(n.Value)+"`, must be a duration of up to "+formatDuration(most), "as in 30m, 24h or 7d")
		return 0
	}
	return d
}

func parseDuration(s string) (time.Duration, bool) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * 24 * time.Hour, err == nil //nolint:gosec // 16 bits
	}
	d, err := time.ParseDuration(s)
	return d, err == nil
}

func formatDuration(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 2*day:
		return strconv.Itoa(int(d/day)) + "d"
	case d >= time.Hour && d%time.Hour == 0:
		return strconv.Itoa(int(d/time.Hour)) + "h"
	}
	return d.Round(time.Second).String()
}

// suggest names the word that was probably meant.
func suggest(s string, words []string) string {
	best, score := "", 3
	if len(s) < 4 {
		score = 2
	}
	for _, w := range words {
		if d := distance(s, w); d < score {
			best, score = w, d
		}
	}
	if best == "" {
		return "use one of " + strings.Join(words, ", ")
	}
	return "did you mean " + best + "?"
}

// distance is Levenshtein's; long words are far from everything.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
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
