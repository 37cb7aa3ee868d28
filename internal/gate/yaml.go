package gate

import (
	"fmt"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"

	"ringwall/internal/strictyaml"
)

const (
	maxDocument = 256 << 10 // bytes of a release policy
	maxList     = 64
)

func limits() strictyaml.Limits {
	return strictyaml.Limits{What: "release policy", Bytes: maxDocument, Parts: 20_000, Depth: 10}
}

// list reads the items of a sequence that is not empty.
func (d *document) list(n *yaml.Node, where string, read func(n *yaml.Node, where string)) {
	d.List(n, where, maxList, read)
	d.NotEmpty(n, where)
}

// text reads a line that shows all that is in it.
func (d *document) text(n *yaml.Node, where string) string {
	s, ok := d.Text(n, where)
	if ok && !readable(s, 1, strictyaml.MaxText) {
		d.Problem(n, where, "has characters that cannot be seen", "remove them")
		return ""
	}
	return s
}

func (d *document) texts(n *yaml.Node, where string) []string {
	out := d.Texts(n, where, maxList, func(s string) (string, string) {
		if !readable(s, 1, strictyaml.MaxText) {
			return "has characters that cannot be seen", "remove them"
		}
		return "", ""
	})
	d.NotEmpty(n, where)
	return out
}

// label reads a name that can stand in commands, URLs and file names.
func (d *document) label(n *yaml.Node, where string) string {
	s := d.text(n, where)
	if s != "" && !isLabel(s) {
		d.Problem(n, where, "`"+clip(s)+"` is no name", "use up to 63 lower-case letters, digits, dots, dashes and underscores")
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

func (d *document) number(n *yaml.Node, where string, low, high int) int {
	return int(d.Number(n, where, uint64(low), uint64(high))) //nolint:gosec // low and high are constants
}

// duration reads one of up to most, in days, hours or minutes.
func (d *document) duration(n *yaml.Node, where string, most time.Duration) time.Duration {
	v, ok := parseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || !ok || v <= 0 || v > most {
		d.Problem(n, where, "is `"+clip(n.Value)+"`, must be a duration of up to "+formatDuration(most), "as in 30m, 24h or 7d")
		return 0
	}
	return v
}

func parseDuration(s string) (time.Duration, bool) {
	if n := len(s) - 1; n > 0 && s[n] == 'd' {
		days, err := strconv.ParseUint(s[:n], 10, 16)
		return time.Duration(days) * 24 * time.Hour, err == nil
	}
	d, err := time.ParseDuration(s)
	return d, err == nil
}

func formatDuration(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 2*day:
		return fmt.Sprintf("%dd", d/day)
	case d >= time.Hour && d%time.Hour == 0:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return d.Round(time.Second).String()
}

func clip(s string) string { return strictyaml.Clip(s) }
