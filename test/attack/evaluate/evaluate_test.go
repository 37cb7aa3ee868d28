package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
)

func TestCatalogue(t *testing.T) {
	id := regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	seen := map[string]bool{}
	groups := map[int]bool{}
	agent := false
	for _, q := range catalogue() {
		if !id.MatchString(q.ID) || seen[q.ID] {
			t.Errorf("id %q is malformed or there twice", q.ID)
		}
		seen[q.ID] = true
		groups[q.Group] = true
		if q.Title == "" || q.Stop == "" || q.Run == nil || q.As&asBoth == 0 {
			t.Errorf("%s lacks a title, what stops it, who tries it or its code", q.ID)
		}
		if agent && !q.Agent {
			t.Errorf("%s comes after attacks on the agent", q.ID)
		}
		agent = agent || q.Agent
	}
	// what one guest cannot show: replies of a server (43), the boot (44, 45), the operator adding trust (40)
	for g := 1; g <= 47; g++ {
		if g != 40 && (g < 43 || g > 45) && !groups[g] {
			t.Errorf("no technique of group %d", g)
		}
	}
}

func TestFillSlot(t *testing.T) {
	room := slotMark + strings.Repeat("\x01", 512-len(slotMark))
	tests := []struct {
		name, raw, marker string
		wantErr           bool
	}{
		{name: "filled", raw: "head" + room + "tail", marker: "/m"},
		{name: "no slot", raw: "head", marker: "/m", wantErr: true},
		{name: "slot cut short", raw: room[:100], marker: "/m", wantErr: true},
		{name: "marker too long", raw: room, marker: strings.Repeat("x", 500), wantErr: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := fillSlot([]byte(tt.raw), "token", tt.marker)
			if tt.wantErr {
				if !errors.Is(err, errs.Invalid) {
					t.Fatalf("error %v, want Invalid", err)
				}
				return
			}
			want := "head" + "token\x00/m\x00" + strings.Repeat("\x00", 512-9) + "tail"
			if err != nil || string(got) != want {
				t.Fatalf("got %q, %v", got, err)
			}
		})
	}
}

func TestMarkerHolds(t *testing.T) {
	p := filepath.Join(t.TempDir(), "marker")
	if markerHolds(p, "abc") {
		t.Error("a marker that is not there counts")
	}
	for text, want := range map[string]bool{"abc": true, "abc\n": true, "": false, "abd": false, "abcabc": false} {
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := markerHolds(p, "abc"); got != want {
			t.Errorf("marker %q: %v", text, got)
		}
	}
}

func TestCompare(t *testing.T) {
	stock := []result{
		{ID: "a", Group: 1, As: "root", Outcome: ran},
		{ID: "a", Group: 1, As: "user", Outcome: ran},
		{ID: "b", Group: 1, As: "root", Outcome: ran},
		{ID: "c", Group: 2, As: "root", Outcome: ran},
		{ID: "d", Group: 2, As: "root", Outcome: stopped},
		{ID: "e", Group: 2, As: "root", Outcome: notHere},
		{ID: "f", Group: 3, As: "root", Outcome: ran},
		{ID: "g", Group: 3, As: "root", Outcome: ran},
	}
	protected := []result{
		{ID: "a", Group: 1, As: "root", Outcome: stopped},
		{ID: "a", Group: 1, As: "user", Outcome: ran, Alerted: new(true)},
		{ID: "b", Group: 1, As: "root", Outcome: ran, Alerted: new(false)},
		{ID: "d", Group: 2, As: "root", Outcome: ran},
		{ID: "f", Group: 3, As: "root", Outcome: notHere},
		{ID: "g", Group: 3, As: "root", Outcome: broken},
		{ID: "x", Group: 35, As: "root", Outcome: stopped, Agent: true, Alerted: new(true)},
	}
	var out bytes.Buffer
	if err := compare(&out, stock, protected); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(out.String()), " ")
	// c was not tried, f and g say nothing: all three count as remaining
	for _, want := range []string{
		"all 5 4 1 1", "user a 1 ran alerted", "root b 1 ran NOT ALERTED", "root c 2 not tried", "root f 3 unavailable", "root g 3 broken",
		"root x 35 stopped alerted",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
	if strings.Contains(got, "root a 1") || strings.Contains(got, "root d 2") {
		t.Errorf("something that was stopped, or did not work on stock, remains:\n%s", out.String())
	}
}

func TestSummarise(t *testing.T) {
	var out bytes.Buffer
	err := summarise(&out, []result{
		{ID: "a", Group: 1, As: "root", Outcome: ran},
		{ID: "b", Group: 1, As: "root", Outcome: stopped},
		{ID: "c", Group: 1, As: "user", Outcome: notHere},
		{ID: "d", Group: 36, As: "user", Outcome: ran, Agent: true},
	})
	if err != nil || !strings.Contains(strings.Join(strings.Fields(out.String()), " "), "all 1 2 0 0") {
		t.Errorf("%v\n%s", err, out.String())
	}
	if !strings.Contains(out.String(), "ran: 1 of 1") {
		t.Errorf("attacks on the agent are not counted:\n%s", out.String())
	}
	if err := summarise(&out, []result{{ID: "a", As: "root", Outcome: broken}}); err == nil {
		t.Error("an attempt that could not be made is no error")
	}
}

func TestParseResults(t *testing.T) {
	tests := []struct {
		name, in string
		want     int
		wantErr  bool
	}{
		{name: "two", in: "{\"id\":\"a\",\"as\":\"root\"}\n\n{\"id\":\"a\",\"as\":\"user\"}\n", want: 2},
		{name: "twice", in: "{\"id\":\"a\",\"as\":\"root\"}\n{\"id\":\"a\",\"as\":\"root\"}\n", wantErr: true},
		{name: "no id", in: "{}\n", wantErr: true},
		{name: "cut", in: "{\"id\":\"a\"", wantErr: true},
		{name: "long line", in: strings.Repeat("x", 1<<17), wantErr: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseResults(strings.NewReader(tt.in))
			if len(got) != tt.want || (err != nil) != tt.wantErr || err != nil && !errors.Is(err, errs.Invalid) {
				t.Fatalf("%d results, error %v", len(got), err)
			}
		})
	}
}

func FuzzParseResults(f *testing.F) {
	f.Add([]byte("{\"id\":\"a\",\"as\":\"root\"}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := parseResults(bytes.NewReader(raw))
		if err != nil && got != nil {
			t.Fatal("results beside an error")
		}
	})
}

func TestMarkAlerted(t *testing.T) {
	p := filepath.Join(t.TempDir(), "events")
	since := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	later := since.Add(time.Minute)
	text := `{"time":"2026-01-01T00:00:00Z","pid":8}` + "\n" + `{"time":"2026-01-02T00:02:00Z","count":2,"first":"2026-01-02T00:00:50Z","last":"2026-01-02T00:01:10Z","process":{"program":"/k/evaluate","uid":5}}` + "\n" + `{"pid":12,"path":"/x"}` + "\n" + `not json` + "\n" + `{"path":"/tmp/rw-cafe","ancestors":[{"pid":30,"comm":"a"}],"size":40}` + "\n"
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p+".1", []byte(`{"pid":55}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	results := []result{
		{ID: "own", pid: 12, token: "1111"},
		{ID: "ancestor", pid: 30, token: "2222"},
		{ID: "path", pid: 99, token: "cafe"},
		{ID: "old", pid: 8, token: "3333"},
		{ID: "number", pid: 40, token: "4444"},
		{ID: "repeated", token: "5555", uid: 5, start: later, end: later.Add(time.Second)},
		{ID: "repeated by another", token: "6666", uid: 6, start: later, end: later.Add(time.Second)},
		{ID: "repeated too late", token: "7777", uid: 5, start: later.Add(time.Hour), end: later.Add(2 * time.Hour)},
		{ID: "rotated", pid: 55, token: "8888"},
		{ID: "untried"},
	}
	if err := markAlerted(p, "/k/evaluate", since, results); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"own": true, "ancestor": true, "path": true, "old": false, "number": false, "repeated": true, "repeated by another": false, "repeated too late": false, "rotated": true}
	for _, r := range results {
		w, tried := want[r.ID]
		if (r.Alerted != nil) != tried || tried && *r.Alerted != w {
			t.Errorf("%s: alerted %v, want %v", r.ID, r.Alerted, w)
		}
	}
}

func FuzzReadTraces(f *testing.F) {
	f.Add([]byte(`{"a":[{"pid":1,"b":"c"}]}` + "\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got := traces{pids: map[int]bool{}}
		if err := got.read(bytes.NewReader(raw)); err == nil && got.lines > bytes.Count(raw, []byte("\n"))+1 {
			t.Fatalf("%d lines", got.lines)
		}
	})
}

func TestFindAgent(t *testing.T) {
	proc := t.TempDir()
	for pid, line := range map[string]string{
		"10": "/bin/sh\x00-c\x00ringwall agent\x00",
		"20": "/usr/bin/ringwall\x00status\x00",
		"30": "/usr/bin/ringwall\x00agent\x00run\x00",
	} {
		if err := os.MkdirAll(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := findAgent(proc); got != 30 {
		t.Errorf("agent %d, want 30", got)
	}
}

func TestTail(t *testing.T) {
	w := &tail{}
	for range 200 {
		if _, err := w.Write([]byte("0123456789")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write([]byte("\nend")); err != nil {
		t.Fatal(err)
	}
	if len(w.kept) != 300 || !strings.HasSuffix(w.String(), " end") {
		t.Errorf("%d bytes: %s", len(w.kept), w)
	}
}
