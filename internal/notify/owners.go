package notify

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// Bounds of an owners file.
const (
	maxOwners      = 1 << 20
	maxOwnerRules  = 10_000
	maxOwnerPieces = 1024 // bytes of a pattern
)

// Owners says who owns which paths.
type Owners struct{ rules []ownerRule }

type ownerRule struct {
	match  *regexp.Regexp // nil: everything
	owners []string
}

// ParseOwners reads a CODEOWNERS file (a pattern and its owners on a line; the
// last that matches wins) or an OWNERS file (an owner on a line, or a YAML list
// of approvers).
func ParseOwners(doc []byte) (*Owners, error) {
	if len(doc) > maxOwners {
		return nil, fmt.Errorf("owners: %d bytes, at most %d: %w", len(doc), maxOwners, errs.Invalid)
	}
	o := &Owners{}
	var everybody []string
	listed := true // of an OWNERS file's lists, the one that is read
	for i, line := range strings.Split(string(bytes.ToValidUTF8(doc, []byte("?"))), "\n") {
		if n := strings.IndexByte(line, '#'); n == 0 || n > 0 && (line[n-1] == ' ' || line[n-1] == '\t') {
			line = line[:n]
		}
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || words[0] == "set" || strings.HasPrefix(words[0], "[") || strings.HasPrefix(words[0], "^["):
		case len(words) == 1 && strings.HasSuffix(words[0], ":"):
			listed = words[0] == "approvers:"
		case words[0] == "-" && len(words) == 2:
			if listed {
				everybody = append(everybody, words[1])
			}
		case len(words) == 1 && isOwner(words[0]):
			everybody = append(everybody, words[0])
		default:
			if len(o.rules) == maxOwnerRules || len(words[0]) > maxOwnerPieces {
				return nil, fmt.Errorf("owners: line %d: too many rules or too long a pattern: %w", i+1, errs.Invalid)
			}
			re, err := ownerPattern(words[0])
			if err != nil {
				return nil, fmt.Errorf("owners: line %d: pattern %.80q: %w", i+1, words[0], errs.Invalid)
			}
			o.rules = append(o.rules, ownerRule{re, words[1:]})
		}
	}
	if len(everybody) > 0 {
		o.rules = append([]ownerRule{{nil, everybody}}, o.rules...)
	}
	return o, nil
}

func isOwner(s string) bool {
	return len(s) > 1 && strings.Contains(s, "@") && !strings.Contains(s, "/*")
}

// ownerPattern turns a pattern of CODEOWNERS, which is one of .gitignore's
// without negation, into an expression. Go's run in linear time.
func ownerPattern(p string) (*regexp.Regexp, error) {
	if p == "*" || p == "**" || p == "/" {
		return nil, nil //nolint:nilnil // everything
	}
	anchored := strings.Contains(strings.TrimSuffix(p, "/"), "/")
	p = strings.TrimPrefix(p, "/")
	var b strings.Builder
	b.WriteString("^")
	if !anchored {
		b.WriteString("(?:.*/)?")
	}
	for i := 0; i < len(p); i++ {
		switch {
		case strings.HasPrefix(p[i:], "**/"):
			b.WriteString("(?:.*/)?")
			i += 2
		case strings.HasPrefix(p[i:], "**"):
			b.WriteString(".*")
			i++
		case p[i] == '*':
			b.WriteString("[^/]*")
		case p[i] == '?':
			b.WriteString("[^/]")
		case p[i] == '/' && i == len(p)-1:
			// a directory: what is below it
		default:
			b.WriteString(regexp.QuoteMeta(p[i : i+1]))
		}
	}
	b.WriteString("(?:/.*)?$")
	return regexp.Compile(b.String())
}

// Of returns the owners of all the paths, each once; those of everything when
// there are none.
func (o *Owners) Of(paths []string) []string {
	var out []string
	add := func(names []string) {
		for _, n := range names {
			if !slices.Contains(out, n) {
				out = append(out, n)
			}
		}
	}
	for _, p := range paths {
		p = strings.TrimPrefix(p, "/")
		for _, r := range slices.Backward(o.rules) {
			if r.match == nil || r.match.MatchString(p) {
				add(r.owners)
				break
			}
		}
	}
	if len(paths) == 0 {
		for _, r := range slices.Backward(o.rules) {
			if r.match == nil {
				add(r.owners)
				break
			}
		}
	}
	return out
}
