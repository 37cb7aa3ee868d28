package main

import (
	"bytes"
	"strings"
	"testing"
)

func sample(config, work string, round int, v float64) Sample {
	return Sample{Config: config, Workload: work, Round: round, Instructions: v}
}

func TestSummarise(t *testing.T) {
	list := []workload{{name: "w", kind: kindExec}, {name: "unmeasured"}}
	rows := summarise([]Sample{
		sample(cfgNone, "w", 0, 900), sample(cfgNone, "w", 1, 99), sample(cfgNone, "w", 2, 101), sample(cfgNone, "w", 3, 100),
		sample(cfgScope, "w", 0, 5000), sample(cfgScope, "w", 1, 104), sample(cfgScope, "w", 2, 106),
	}, list)
	if len(rows) != 1 {
		t.Fatalf("%d rows, want one: %+v", len(rows), rows)
	}
	r := rows[0]
	if r.Baseline != 100 || r.Noise != 0.02 {
		t.Errorf("baseline %v, spread %v; want 100 and 0.02: round 0 does not count", r.Baseline, r.Noise)
	}
	if c := r.Ratios[cfgScope]; c.Ratio != 1.05 || c.Samples != 2 {
		t.Errorf("cost %+v, want ratio 1.05 of 2 samples", c)
	}
	if _, ok := r.Ratios[cfgHost]; ok {
		t.Error("a configuration that was not measured has a cost")
	}
}

func TestMissed(t *testing.T) {
	row := func(kind, config string, ratio float64) Row {
		return Row{Workload: "w", Kind: kind, Ratios: map[string]Cost{config: {Ratio: ratio}}}
	}
	for _, c := range []struct {
		row    Row
		margin float64
		want   int
	}{
		{row(kindExec, cfgScope, 1.03), 0, 0},
		{row(kindExec, cfgScope, 1.031), 0, 1},
		{row(kindExec, cfgHost, 1.035), 0.01, 0},
		{row(kindExec, cfgHost, 1.045), 0.01, 1},
		{row(kindOpen, cfgScope, 1.02), 0, 1},
		{row(kindReal, cfgScope, 1.021), 0, 1},
		{row("", cfgScope, 3), 0, 0},
		{row(kindReal, cfgFapolicyd, 3), 0, 0},
	} {
		if got := missed([]Row{c.row}, c.margin); len(got) != c.want {
			t.Errorf("%+v, margin %v: missed %q", c.row, c.margin, got)
		}
	}
}

func TestCollector(t *testing.T) {
	var to bytes.Buffer
	c := collector{to: &to}
	for _, part := range []string{"hello\nBENCH {\"sam", "ple\":{\"config\":\"none\",\"workload\":\"w\",\"round\":1,\"instructions\":7}}\nBENCH {\"fact\":{\"name\":\"n\",\"value\":2}}\n", "end\n"} {
		if _, err := c.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if s := to.String(); !strings.HasPrefix(s, "hello\n") || !strings.HasSuffix(s, "end\n") || strings.Count(s, "\n") != 4 {
		t.Errorf("passed on %q", s)
	}
	if len(c.samples) != 1 || c.samples[0].Instructions != 7 || len(c.facts) != 1 || c.facts[0].Value != 2 {
		t.Errorf("samples %+v, facts %+v", c.samples, c.facts)
	}
	if _, err := c.Write([]byte(mark + "{\n")); err == nil {
		t.Error("half a result is accepted")
	}
	if _, err := c.Write([]byte(strings.Repeat("x", 2*maxResultLine) + "\n")); err != nil || len(c.line) != 0 {
		t.Errorf("a long line: %v, %d bytes kept", err, len(c.line))
	}
}

func FuzzCollector(f *testing.F) {
	f.Add([]byte("BENCH {\"fact\":{}}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := collector{to: &bytes.Buffer{}}
		_, _ = c.Write(b)
		if len(c.line) > maxResultLine {
			t.Errorf("%d bytes are kept", len(c.line))
		}
	})
}

func TestReport_print(t *testing.T) {
	r := Report{
		Kernel: "6.1.0", Facts: []Fact{{"memory", 12.5, "MiB"}}, Missed: []string{"w"},
		Rows: []Row{{Workload: "exec", Kind: kindExec, Baseline: 211_900, Ratios: map[string]Cost{cfgScope: {Ratio: 1.0312}}}},
	}
	var b bytes.Buffer
	if err := r.print(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"kernel 6.1.0", "211.9k", "1.031", "≤ 1.03", "memory", "12.5 MiB", "goal missed: w"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
}

func TestNumbered_differs(t *testing.T) {
	seen := map[[32]byte]bool{}
	for i := range 100_000 {
		seen[numbered(i)] = true
	}
	if len(seen) != 100_000 {
		t.Errorf("%d digests of 100000 numbers", len(seen))
	}
}

func TestWorkloads_named(t *testing.T) {
	seen := map[string]bool{}
	for _, w := range workloads(10) {
		if seen[w.name] || w.about == "" || w.ops < 1 {
			t.Errorf("workload %+v", w)
		}
		seen[w.name] = true
	}
}
