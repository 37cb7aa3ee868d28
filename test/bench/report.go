package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// Configurations, in the order of the table.
const (
	cfgNone      = "none"             // no program of Ringwall, no daemon
	cfgAttached  = "attached"         // Ringwall enforces, the work is outside its scope
	cfgScope     = "scope"            // the work is inside its scope
	cfgHost      = "host"             // Ringwall governs the whole host
	cfgFapolicyd = "fapolicyd"        // integrity = none, its default
	cfgSHA256    = "fapolicyd-sha256" // integrity = sha256
)

func configs() []string {
	return []string{cfgAttached, cfgScope, cfgHost, cfgFapolicyd, cfgSHA256}
}

// Sample is one measurement. Rounds count from 0 in each stretch of a
// configuration; round 0 warms caches up and is not counted.
type Sample struct {
	Config       string  `json:"config"`
	Workload     string  `json:"workload"`
	Stretch      int     `json:"stretch"`
	Round        int     `json:"round"`
	Instructions float64 `json:"instructions"` // of one operation
}

// Fact is a figure that is not a ratio.
type Fact struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// Row is what a workload costs.
type Row struct {
	Workload string          `json:"workload"`
	About    string          `json:"about"`
	Kind     string          `json:"kind,omitempty"`
	Baseline float64         `json:"baseline_instructions"`
	Noise    float64         `json:"baseline_spread"` // (max-min)/median of the baseline's own samples
	Ratios   map[string]Cost `json:"configs"`
}

// Cost is a workload under one configuration.
type Cost struct {
	Instructions float64 `json:"instructions"`
	Ratio        float64 `json:"ratio"`
	Samples      int     `json:"samples"`
}

// Report is the outcome of a run.
type Report struct {
	Kernel  string   `json:"kernel"`
	Rows    []Row    `json:"rows"`
	Facts   []Fact   `json:"facts"`
	Missed  []string `json:"missed_goals"`
	Samples []Sample `json:"samples"`
}

// goals are the ratios that a workload of each kind must not exceed.
func goals() map[string]float64 {
	return map[string]float64{kindExec: 1.03, kindOpen: 1.01, kindReal: 1.02}
}

// summarise makes rows of samples. Every ratio is of medians, against the
// baseline of the same boot.
func summarise(samples []Sample, list []workload) []Row {
	values := func(config, work string) []float64 {
		var v []float64
		for _, s := range samples {
			if s.Config == config && s.Workload == work && s.Round > 0 {
				v = append(v, s.Instructions)
			}
		}
		slices.Sort(v)
		return v
	}
	var rows []Row
	for _, w := range list {
		base := values(cfgNone, w.name)
		if len(base) == 0 {
			continue
		}
		b := median(base)
		r := Row{Workload: w.name, About: w.about, Kind: w.kind, Baseline: b, Noise: (base[len(base)-1] - base[0]) / b, Ratios: map[string]Cost{}}
		for _, c := range configs() {
			if v := values(c, w.name); len(v) > 0 {
				m := median(v)
				r.Ratios[c] = Cost{Instructions: m, Ratio: m / b, Samples: len(v)}
			}
		}
		rows = append(rows, r)
	}
	return rows
}

// median of a sorted, non-empty list.
func median(v []float64) float64 {
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}

// missed lists the goals that Ringwall misses by more than margin.
func missed(rows []Row, margin float64) []string {
	var out []string
	for _, r := range rows {
		goal, ok := goals()[r.Kind]
		if !ok {
			continue
		}
		for _, c := range []string{cfgScope, cfgHost} {
			if cost, measured := r.Ratios[c]; measured && cost.Ratio > goal+margin {
				out = append(out, fmt.Sprintf("%s, %s: %.3f, goal %.2f", r.Workload, c, cost.Ratio, goal))
			}
		}
	}
	return out
}

func (r *Report) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "kernel %s\tbaseline\t± spread\t%s\tgoal\t\n", r.Kernel, strings.Join(configs(), "\t"))
	for _, row := range r.Rows {
		fmt.Fprintf(t, "%s\t%s\t%.1f%%", row.Workload, short(row.Baseline), row.Noise*100)
		for _, c := range configs() {
			if cost, ok := row.Ratios[c]; ok {
				fmt.Fprintf(t, "\t%.3f", cost.Ratio)
			} else {
				fmt.Fprint(t, "\t-")
			}
		}
		if g, ok := goals()[row.Kind]; ok {
			fmt.Fprintf(t, "\t≤ %.2f", g)
		} else {
			fmt.Fprint(t, "\t")
		}
		fmt.Fprintln(t, "\t")
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, f := range r.Facts {
		fmt.Fprintf(w, "%-52s %s %s\n", f.Name, short(f.Value), f.Unit)
	}
	for _, m := range r.Missed {
		fmt.Fprintln(w, "goal missed:", m)
	}
	return nil
}

// short writes a number for a person.
func short(v float64) string {
	switch {
	case v >= 1e9:
		return fmt.Sprintf("%.3fG", v/1e9)
	case v >= 1e6:
		return fmt.Sprintf("%.3fM", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%.1fk", v/1e3)
	}
	return fmt.Sprintf("%.4g", v)
}

// mark starts a line of results in the guest's output.
const mark = "BENCH "

// message is what such a line holds: one of the two.
type message struct {
	Sample *Sample `json:"sample,omitempty"`
	Fact   *Fact   `json:"fact,omitempty"`
}

// maxResultLine bounds what is kept of a line without an end.
const maxResultLine = 4096

// collector passes a guest's output on and keeps the results.
type collector struct {
	to      io.Writer
	line    []byte
	samples []Sample
	facts   []Fact
}

func (c *collector) Write(p []byte) (int, error) {
	for _, b := range p {
		if len(c.line) < maxResultLine {
			c.line = append(c.line, b)
		}
		if b != '\n' {
			continue
		}
		err := c.take()
		c.line = c.line[:0]
		if err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (c *collector) take() error {
	// results too: they are what is left of a run that fails later
	if _, err := c.to.Write(c.line); err != nil {
		return err
	}
	rest, ok := strings.CutPrefix(string(c.line), mark)
	if !ok {
		return nil
	}
	var m message
	if err := json.Unmarshal([]byte(rest), &m); err != nil {
		return fmt.Errorf("a result of the guest: %w", err)
	}
	if m.Sample != nil {
		c.samples = append(c.samples, *m.Sample)
	}
	if m.Fact != nil {
		c.facts = append(c.facts, *m.Fact)
	}
	return nil
}
