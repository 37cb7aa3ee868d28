package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"ringwall/internal/errs"
)

// outcome of one attempt.
type outcome string

const (
	ran     outcome = "ran"
	stopped outcome = "stopped"
	notHere outcome = "unavailable" // what it needs is not on this host
	broken  outcome = "broken"      // the evaluator itself failed: says nothing about the host
)

// result is one line of a run.
type result struct {
	ID      string  `json:"id"`
	Group   int     `json:"group"`
	Title   string  `json:"title"`
	As      string  `json:"as"`
	Outcome outcome `json:"outcome"`
	Error   string  `json:"error,omitempty"` // the last that the attempt said
	Ran     string  `json:"counts_as_ran"`
	Stop    string  `json:"expected_to_stop_it"`
	Agent   bool    `json:"against_ringwall,omitempty"`
	Alerted *bool   `json:"alerted,omitempty"` // absent: no event file was given
	Hung    bool    `json:"hung,omitempty"`
	Seconds float64 `json:"seconds"`

	pid, uid   int
	token      string
	start, end time.Time
}

func (r result) key() string { return r.As + " " + r.ID }

func writeResults(path string, results []result) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	for _, r := range results {
		if err := e.Encode(r); err != nil {
			return fmt.Errorf("result %s: %w", r.ID, err)
		}
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}

// maxResults bounds what compare reads from one file.
const maxResults = 10_000

// parseResults reads JSON lines. A line that is no result is an error: a
// comparison with half a run would flatter.
func parseResults(in io.Reader) ([]result, error) {
	var out []result
	seen := map[string]bool{}
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<16)
	for s.Scan() {
		var r result
		if len(bytes.TrimSpace(s.Bytes())) == 0 {
			continue
		}
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("line %d: %w: %w", len(out)+1, err, errs.Invalid)
		}
		if r.ID == "" || seen[r.key()] || len(out) == maxResults {
			return nil, fmt.Errorf("line %d: %q has no id, is there twice or is one too many: %w", len(out)+1, r.key(), errs.Invalid)
		}
		seen[r.key()] = true
		out = append(out, r)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("results: %w: %w", err, errs.Invalid)
	}
	return out, nil
}

type tally struct{ ran, tried int }

// summarise prints one run: per group what ran of what could be tried.
func summarise(out io.Writer, results []result) error {
	groups, total := map[int]map[string]*tally{}, map[string]*tally{"root": {}, "user": {}}
	var wrong []string
	var agent tally
	for _, r := range results {
		if r.Agent && (r.Outcome == ran || r.Outcome == stopped) {
			agent.tried++
			if r.Outcome == ran {
				agent.ran++
			}
		}
		if r.Outcome == broken {
			wrong = append(wrong, r.key()+": "+r.Error)
		}
		if r.Outcome == notHere || r.Outcome == broken || r.Agent {
			continue
		}
		g := groups[r.Group]
		if g == nil {
			g = map[string]*tally{"root": {}, "user": {}}
			groups[r.Group] = g
		}
		for _, t := range []*tally{g[r.As], total[r.As]} {
			t.tried++
			if r.Outcome == ran {
				t.ran++
			}
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "group\troot ran\tof\tuser ran\tof")
	for _, g := range sortedKeys(groups) {
		r, u := groups[g]["root"], groups[g]["user"]
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\n", g, r.ran, r.tried, u.ran, u.tried)
	}
	fmt.Fprintf(w, "all\t%d\t%d\t%d\t%d\n", total["root"].ran, total["root"].tried, total["user"].ran, total["user"].tried)
	fmt.Fprintf(w, "attacks on Ringwall itself after which an unlisted program ran: %d of %d\n", agent.ran, agent.tried)
	if err := w.Flush(); err != nil {
		return err
	}
	if len(wrong) > 0 {
		return fmt.Errorf("attempts that could not be made:\n  %s", strings.Join(wrong, "\n  "))
	}
	return nil
}

func sortedKeys(m map[int]map[string]*tally) []int {
	var keys []int
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func compareFiles(out io.Writer, stockPath, protectedPath string) error {
	var runs [2][]result
	for i, path := range []string{stockPath, protectedPath} {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		runs[i], err = parseResults(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return compare(out, runs[0], runs[1])
}

// compare says what protection is worth: of the techniques that work on the
// stock host, how many still do. One that was not tried again counts as
// remaining: absence of a result is no proof.
func compare(out io.Writer, stock, protected []result) error {
	after := map[string]result{}
	for _, r := range protected {
		after[r.key()] = r
	}
	groups, total := map[int]map[string]*tally{}, map[string]*tally{"root": {}, "user": {}}
	var remain []string
	for _, r := range stock {
		if r.Outcome != ran || r.Agent {
			continue
		}
		g := groups[r.Group]
		if g == nil {
			g = map[string]*tally{"root": {}, "user": {}}
			groups[r.Group] = g
		}
		now, tried := after[r.key()]
		still := !tried || now.Outcome != stopped
		for _, t := range []*tally{g[r.As], total[r.As]} {
			t.tried++
			if still {
				t.ran++
			}
		}
		if still {
			remain = append(remain, remaining(r, now, tried))
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "group\troot: work on stock\tremain\tuser: work on stock\tremain")
	for _, g := range sortedKeys(groups) {
		r, u := groups[g]["root"], groups[g]["user"]
		fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\n", g, r.tried, r.ran, u.tried, u.ran)
	}
	fmt.Fprintf(w, "all\t%d\t%d\t%d\t%d\n", total["root"].tried, total["root"].ran, total["user"].tried, total["user"].ran)
	fmt.Fprintln(w, "\nremaining:")
	for _, line := range remain {
		fmt.Fprintln(w, line)
	}
	fmt.Fprintln(w, "\nagainst Ringwall itself:")
	for _, r := range protected {
		if r.Agent {
			fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", r.As, r.ID, r.Group, r.Outcome, alertWord(r))
		}
	}
	return w.Flush()
}

func remaining(stock, now result, tried bool) string {
	state := string(now.Outcome)
	if !tried {
		state = "not tried"
	}
	return fmt.Sprintf("%s\t%s\t%d\t%s\t%s\t%s", stock.As, stock.ID, stock.Group, state, alertWord(now), stock.Title)
}

func alertWord(r result) string {
	switch {
	case r.Alerted == nil:
		return "alert unknown"
	case *r.Alerted:
		return "alerted"
	}
	return "NOT ALERTED"
}
