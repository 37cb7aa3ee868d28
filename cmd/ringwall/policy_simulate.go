package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// maxEventLine bounds a line of an event log.
const maxEventLine = 1 << 20

// simulation is what a policy would have done.
type simulation struct {
	Policy  string         `json:"policy"`
	Asked   int            `json:"asked"`   // uses of content that were judged
	Allowed int            `json:"allowed"` // of them
	Rules   map[string]int `json:"rules"`   // uses that each rule allows
	Denied  []denial       `json:"denied"`
	Skipped map[string]int `json:"skipped,omitempty"` // events that content does not decide, by reason
	Unread  []string       `json:"unread,omitempty"`
}

// denial is a use that the policy refuses.
type denial struct {
	verdict
	Paths []string `json:"paths"`
	Count int      `json:"count,omitempty"` // how often, in recorded events
}

func newPolicySimulateCommand(e *env) *cobra.Command {
	var q whatIf
	var events string
	var limit int
	c := &cobra.Command{
		Use:   "simulate --policy FILE DIR | --events FILE",
		Short: "Say what a policy would block, in a tree or in recorded events",
		Long: `Judges every program, library, script, module and firmware file below DIR (the
root of a tree, such as / or an unpacked image; other file systems below it are
left out), or every recorded execution in an event log.

Exit code 1 means that something is not allowed, even if the policy's mode is
audit: that is what would be blocked in enforce mode. What could not be read is
reported and is exit code 1 too.

JSON: {"policy", "asked", "allowed", "rules": {RULE: COUNT}, "denied": [{as in
policy explain, "paths", "count"}], "skipped": {REASON: COUNT}, "unread"}`,
		Example: `  ringwall policy simulate --policy base.yaml --package /var/cache/apt/archives /
  ringwall policy simulate --policy base.yaml --events events.jsonl`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if (len(args) == 0) == (events == "") {
				return usage(errors.New("ringwall policy simulate: give a directory or --events, one of them"))
			}
			compiled, now, err := q.load(c.Context(), e)
			if err != nil {
				return err
			}
			out := &simulation{Policy: compiled.Policy.Name, Rules: map[string]int{}, Denied: []denial{}}
			if events != "" {
				err = out.replay(e, compiled, events, now)
			} else {
				err = out.walk(c.Context(), e, compiled, args[0], now)
			}
			if err != nil {
				return err
			}
			out.sort()
			if err := e.emit(out, func(w io.Writer) { out.write(w, limit) }); err != nil {
				return err
			}
			return out.verdict()
		},
	}
	q.flags(c)
	require(c, "policy")
	c.Flags().StringVar(&events, "events", "", "an event log, JSON lines as ringwall events --output json prints them (- for standard input)")
	c.Flags().IntVar(&limit, "limit", 50, "print at most `N` denials as text; 0 prints all")
	return c
}

// verdict is the exit code.
func (s *simulation) verdict() error {
	switch {
	case len(s.Denied) > 0:
		return fmt.Errorf("policy %s does not allow %d of %d: %w", s.Policy, len(s.Denied), s.Asked, errs.Denied)
	case len(s.Unread) > 0:
		return fmt.Errorf("%d files could not be read, so nobody knows: %w", len(s.Unread), errs.Denied)
	}
	return nil
}

// walk judges a tree.
func (s *simulation) walk(ctx context.Context, e *env, c *integrity.Compiled, dir string, now time.Time) error {
	t := &tree{root: dir, ctx: ctx, e: e}
	contents, err := measure(t, codesign.Options{})
	if err != nil {
		return err
	}
	s.Unread = t.unread
	for _, m := range contents {
		for _, k := range integrity.Kinds() {
			if m.Kinds.Has(k) {
				s.judge(c, integrity.Key{Digest: m.Digest}, k, m.paths, 0, now)
			}
		}
	}
	return nil
}

func (s *simulation) judge(c *integrity.Compiled, key integrity.Key, k integrity.Kind, paths []string, count int, now time.Time) {
	v, _ := judge(c, key, k, now)
	s.Asked++
	if v.Allow {
		s.Allowed++
		s.Rules[v.Rule]++
		return
	}
	s.Denied = append(s.Denied, denial{verdict: v, Paths: paths, Count: count})
}

// recorded is what matters here of a line of the event log.
type recorded struct {
	Type   string `json:"type"`
	Reason string `json:"reason"`
	Kind   string `json:"kind"`
	Path   string `json:"path"`
	Digest string `json:"digest"`
	Count  int    `json:"count"`

	Process *struct {
		Program string `json:"program"`
	} `json:"process"`
}

// replay judges recorded events. The same content used as the same kind is
// judged once and counted.
func (s *simulation) replay(e *env, c *integrity.Compiled, file string, now time.Time) error {
	type use struct {
		key  integrity.Key
		kind integrity.Kind
	}
	type seen struct {
		paths []string
		count int
	}
	uses := map[use]*seen{}
	var order []use
	s.Skipped = map[string]int{}
	err := readEventLines(e, file, func(r *recorded) error {
		n := max(r.Count, 1)
		k, err := integrity.ParseKind(r.Kind)
		key, err2 := integrity.ParseKey(r.Digest)
		if err != nil || err2 != nil {
			// Memory, ptrace, notices and gaps are not about a content.
			s.Skipped[cmp.Or(r.Reason, r.Type, "unknown")] += n
			return nil
		}
		u := use{key, k}
		if uses[u] == nil {
			uses[u] = &seen{}
			order = append(order, u)
		}
		uses[u].count += n
		if p := uses[u].paths; len(p) < 16 && !slices.Contains(p, r.Path) {
			uses[u].paths = append(p, r.Path)
		}
		return nil
	})
	for _, u := range order {
		s.judge(c, u.key, u.kind, uses[u].paths, uses[u].count, now)
	}
	return err
}

// readEventLines reads JSON lines. Fields that this version does not know are
// left alone; a line that is no record is an error.
func readEventLines(e *env, file string, visit func(*recorded) error) error {
	in := e.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return fmt.Errorf("events: %w", err)
		}
		defer f.Close()
		in = f
	}
	sc := bufio.NewScanner(in)
	sc.Buffer(make([]byte, 64<<10), maxEventLine)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" {
			continue
		}
		var r recorded
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return fmt.Errorf("events: %s:%d: %w: %w", file, n, err, errs.Invalid)
		}
		if err := visit(&r); err != nil {
			return fmt.Errorf("events: %s:%d: %w", file, n, err)
		}
	}
	if err := sc.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("a line of more than %d bytes: %w", maxEventLine, errs.Invalid)
		}
		return fmt.Errorf("events: %s: %w", file, err)
	}
	return nil
}

func (s *simulation) sort() {
	for i := range s.Denied {
		slices.Sort(s.Denied[i].Paths)
	}
	slices.SortStableFunc(s.Denied, func(a, b denial) int {
		return cmp.Or(strings.Compare(strings.Join(a.Paths, "\n"), strings.Join(b.Paths, "\n")), strings.Compare(a.Kind, b.Kind))
	})
	slices.Sort(s.Unread)
}

func (s *simulation) write(w io.Writer, limit int) {
	printed := 0
	for _, d := range s.Denied {
		if printed++; limit > 0 && printed > limit {
			fmt.Fprintf(w, "… and %d more (--limit 0 prints all)\n", len(s.Denied)-limit)
			break
		}
		name := d.Digest
		if len(d.Paths) > 0 {
			name = shown(d.Paths[0])
		}
		fmt.Fprintf(w, "%-9s %-8s %s", d.Effect, d.Kind, name)
		if n := len(d.Paths) - 1; n > 0 {
			fmt.Fprintf(w, " and %d other names", n)
		}
		if d.Count > 0 {
			fmt.Fprintf(w, ", %d times", d.Count)
		}
		fmt.Fprintf(w, ": %s\n", d.Reason)
	}
	for _, u := range s.Unread {
		fmt.Fprintf(w, "unread    %s\n", u)
	}
	fmt.Fprintf(w, "policy %s: %d asked, %d allowed, %d not\n", s.Policy, s.Asked, s.Allowed, len(s.Denied))
	for _, rule := range sortedKeys(s.Rules) {
		fmt.Fprintf(w, "  allowed by rule %s: %d\n", shown(rule), s.Rules[rule])
	}
	for _, reason := range sortedKeys(s.Skipped) {
		fmt.Fprintf(w, "  not about content: %s, %d\n", reason, s.Skipped[reason])
	}
}

func sortedKeys(m map[string]int) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
