package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// markAlerted sets Alerted on each result that was tried, from the agent's
// events since the run began. An event belongs to an attempt if it names the
// attempt's scratch directory or token, or has its process as subject or
// ancestor; a record of repetitions also if it is about this evaluator, run by
// the same user, at the time of the attempt.
func markAlerted(path, self string, since time.Time, results []result) error {
	t := traces{pids: map[int]bool{}, since: since}
	// the agent rotates: path.1 is the file before path
	for n := 8; n >= 0; n-- {
		name := path
		if n > 0 {
			name = fmt.Sprintf("%s.%d", path, n)
		}
		f, err := os.Open(name)
		if n > 0 && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("events: %w", err)
		}
		err = t.read(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("events %s: %w", name, err)
		}
	}
	for i := range results {
		r := &results[i]
		if r.token == "" {
			continue
		}
		hit := t.pids[r.pid]
		for _, s := range t.texts {
			hit = hit || strings.Contains(s, r.token)
		}
		for _, x := range t.repeats {
			hit = hit || x.Process.Program == self && x.Process.UID == r.uid && !x.First.After(r.end) && !x.Last.Before(r.start)
		}
		r.Alerted = &hit
	}
	return nil
}

// traces is what events tell of who did it.
type traces struct {
	since   time.Time // older events are not of this run
	pids    map[int]bool
	texts   []string
	repeats []repetition
	lines   int
}

// repetition is the agent's record of events that it told once and then counted.
type repetition struct {
	Time        time.Time
	Count       int
	First, Last time.Time
	Process     struct {
		Program string
		UID     int
	}
}

// maxEvents bounds what one run's events may need in memory.
const maxEvents = 200_000

// read takes JSON lines. Names of processes and files are looked for at any
// depth. Lines that are no JSON are passed over: they raise no alert.
func (t *traces) read(in io.Reader) error {
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	for ; s.Scan() && t.lines < maxEvents; t.lines++ {
		var v any
		if json.Unmarshal(s.Bytes(), &v) != nil {
			continue
		}
		var r repetition
		if json.Unmarshal(s.Bytes(), &r) == nil {
			if !r.Time.IsZero() && r.Time.Before(t.since) {
				continue
			}
			if r.Count > 0 {
				t.repeats = append(t.repeats, r)
			}
		}
		t.add("", v, 0)
	}
	return s.Err()
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
