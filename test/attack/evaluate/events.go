package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// markAlerted sets Alerted on each result that was tried, from the events
// written after offset from. An event belongs to an attempt if it names the
// attempt's scratch directory or token, or has its process as subject or
// ancestor.
func markAlerted(path string, from int64, results []result) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return fmt.Errorf("events: %w", err)
	}
	traces, err := readTraces(f)
	if err != nil {
		return fmt.Errorf("events %s: %w", path, err)
	}
	for i := range results {
		r := &results[i]
		if r.token == "" {
			continue
		}
		hit := traces.pids[r.pid]
		for _, s := range traces.texts {
			if hit {
				break
			}
			hit = strings.Contains(s, r.token)
		}
		r.Alerted = &hit
	}
	return nil
}

// traces is what events tell of who did it.
type traces struct {
	pids  map[int]bool
	texts []string
}

// maxEvents bounds what one run's events may need in memory.
const maxEvents = 200_000

// readTraces takes JSON lines of any shape: the field names are the agent's
// business. Lines that are no JSON are passed over: they raise no alert.
func readTraces(in io.Reader) (traces, error) {
	out := traces{pids: map[int]bool{}}
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	for n := 0; s.Scan() && n < maxEvents; n++ {
		var v any
		if json.Unmarshal(s.Bytes(), &v) != nil {
			continue
		}
		out.add("", v, 0)
	}
	return out, s.Err()
}

func (t *traces) add(key string, v any, depth int) {
	if depth > 16 {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			t.add(k, x, depth+1)
		}
	case []any:
		for _, x := range v {
			t.add(key, x, depth+1)
		}
	case string:
		t.texts = append(t.texts, v)
	case float64:
		switch key {
		case "pid", "tgid", "ppid":
			t.pids[int(v)] = true
		}
	}
}
