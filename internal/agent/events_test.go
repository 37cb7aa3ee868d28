package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ringwall/internal/enforce"
	"ringwall/internal/integrity"
)

// records reads the log until it holds n records that want accepts, or gives up.
func (l *lab) records(n int, want func(*Record) bool) []Record {
	l.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		var out []Record
		for _, p := range LogPaths(l.state()) {
			f, err := os.Open(p)
			if err != nil {
				l.t.Fatal(err)
			}
			for s := bufio.NewScanner(f); s.Scan(); {
				var r Record
				if err := json.Unmarshal(s.Bytes(), &r); err != nil {
					l.t.Fatalf("log line %q: %v", s.Text(), err)
				}
				if want(&r) {
					out = append(out, r)
				}
			}
			f.Close()
		}
		if len(out) >= n || time.Now().After(deadline) {
			return out
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func block(seq uint64, path string) enforce.Event {
	return enforce.Event{
		Seq: seq, Epoch: 5, Kind: integrity.KindExec, Reason: enforce.Unlisted, Refused: true, Path: path,
		Digest: integrity.Digest{1, byte(len(path))}, PID: 77, TGID: 77, UID: 1000, Comm: "sh", Ancestors: []enforce.Ancestor{{PID: 1, Comm: "init"}},
	}
}

func TestEvents_recordedExplainedFolded(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", ""))
	l.start()
	for i := range uint64(50) {
		l.kernel.events <- block(i+1, "/tmp/evil")
	}
	got := l.records(1, func(r *Record) bool { return r.Type == "block" })
	if len(got) != 1 {
		t.Fatalf("%d records of 50 equal events, want the first one only", len(got))
	}
	r := got[0]
	if r.Path != "/tmp/evil" || r.Kind != "exec" || r.Signer != "unsigned" || r.Why == "" || !r.Alert || r.Policy.Name != "test" || r.Process.Name != "sh" || len(r.Ancestors) != 1 {
		t.Errorf("record %+v", r)
	}
	l.stop() // tells what was counted
	got = l.records(2, func(r *Record) bool { return r.Type == "block" })
	if len(got) != 2 || got[1].Count != 49 || got[1].Alert {
		t.Errorf("records %+v", got)
	}
}

func TestEvents_gap(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", ""))
	l.start()
	l.kernel.events <- block(1, "/a")
	l.kernel.events <- block(9, "/b")
	got := l.records(1, func(r *Record) bool { return r.Type == "gap" })
	if len(got) != 1 || got[0].Lost != 7 || !got[0].Alert {
		t.Fatalf("gaps %+v, want one of 7", got)
	}
	if f := l.status().Events; f.Received != 2 || f.Lost != 7 {
		t.Errorf("flow %+v", f)
	}
}

func TestEvents_webhook(t *testing.T) {
	posts := make(chan []byte, 16)
	fails := 1
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fails > 0 { // an alert is not lost with the first try
			fails--
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		b, _ := io.ReadAll(r.Body)
		posts <- b
	}))
	defer srv.Close()
	l := newLab(t)
	a := l.anchor()
	a.Settings.Webhook = srv.URL
	if _, err := Prepare(t.Context(), l.state(), Setup{Anchor: a, Policy: l.policy(5, "enforce", "")}, l.now()); err != nil {
		t.Fatal(err)
	}
	l.start()
	l.kernel.events <- block(1, "/tmp/evil")
	select {
	case b := <-posts:
		var r Record
		if err := json.Unmarshal(b, &r); err != nil || r.Path != "/tmp/evil" {
			t.Errorf("posted %s: %v", b, err)
		}
	case <-time.After(10 * time.Second):
		t.Error("no alert was posted")
	}
}

func TestCheckWebhook(t *testing.T) {
	for u, ok := range map[string]bool{
		"https://alerts.example/x": true, "http://127.0.0.1:8/x": true, "http://[::1]:8/": true,
		"http://alerts.example/": false, "ftp://x/": false, "https://user:pw@x/": false, "": false, "x": false,
	} {
		if err := checkWebhook(u); (err == nil) != ok {
			t.Errorf("%q: %v", u, err)
		}
	}
}

func TestEventLog_rotates(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, dirEvents), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := openLog(filepath.Join(dir, dirEvents))
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	for i := range 3 {
		l.size = LogSize
		l.write(&Record{Seq: uint64(i)})
	}
	paths := LogPaths(dir)
	if len(paths) != 4 {
		t.Fatalf("files %v", paths)
	}
	b, err := os.ReadFile(paths[3])
	if err != nil {
		t.Fatal(err)
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil || r.Seq != 2 {
		t.Errorf("the newest file holds %s (%v)", b, err)
	}
}

// A disk without room: nothing blocks, what fits into memory is written later,
// and what does not is counted.
func TestEventLog_diskFull(t *testing.T) {
	dir := t.TempDir()
	l, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	disk := l.f
	l.f = full
	for i := range 40_000 {
		l.write(&Record{Seq: uint64(i), Path: "/a/rather/long/path/to/fill/the/memory/that/is/set/aside/for/this"})
	}
	if l.lost == 0 || l.bytes > maxWaiting {
		t.Errorf("lost %d, %d bytes wait", l.lost, l.bytes)
	}
	kept := len(l.waiting)
	l.f = disk
	if !l.flush() {
		t.Fatal("does not write although there is room")
	}
	l.close()
	f, err := os.Open(filepath.Join(dir, logName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := 0
	for s := bufio.NewScanner(f); s.Scan(); lines++ {
		if !json.Valid(s.Bytes()) {
			t.Fatalf("half a line: %q", s.Text())
		}
	}
	if lines != kept {
		t.Errorf("%d lines written, %d were kept", lines, kept)
	}
}

// A log that cannot be opened for a while costs no older file, however often it
// is tried.
func TestEventLog_cannotOpen(t *testing.T) {
	dir := t.TempDir()
	l, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	older := filepath.Join(dir, logName+".1")
	if err := os.WriteFile(older, []byte("{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.size = LogSize
	blocked := filepath.Join(dir, logName) // by a directory, once the full file has moved on
	l.write(&Record{Seq: 1})
	if err := errors.Join(l.f.Close(), os.Remove(blocked), os.Mkdir(blocked, 0o700)); err != nil {
		t.Fatal(err)
	}
	l.f = nil
	for i := range 20 {
		l.write(&Record{Seq: uint64(2 + i)})
	}
	if b, err := os.ReadFile(filepath.Join(dir, logName+".2")); err != nil || string(b) != "{}\n" {
		t.Errorf("the older file is gone: %q, %v", b, err)
	}
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	if !l.flush() || len(l.waiting) != 0 {
		t.Error("does not write although it can")
	}
	l.close()
}

// A line that a crash cut does not spoil the next one.
func TestEventLog_halfLine(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, logName), []byte(`{"seq":1}`+"\n"+`{"se`), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	l.write(&Record{Seq: 2})
	l.close()
	b, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil {
		t.Fatal(err)
	}
	var r Record
	lines := splitLines(b)
	if err := json.Unmarshal(lines[len(lines)-1], &r); err != nil || r.Seq != 2 {
		t.Errorf("%q: %v", b, err)
	}
}

func splitLines(b []byte) [][]byte {
	var out [][]byte
	for len(b) > 0 {
		i := 0
		for i < len(b) && b[i] != '\n' {
			i++
		}
		out = append(out, b[:i])
		b = b[min(i+1, len(b)):]
	}
	return out
}

func TestClock_neverGoesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "clock")
	now := time.Unix(1_900_000_000, 0)
	wall := func() time.Time { return now }
	c, err := openClock(path, wall)
	if err != nil {
		t.Fatal(err)
	}
	if back := c.tick(); back != 0 {
		t.Errorf("back by %v", back)
	}
	now = now.Add(-48 * time.Hour)
	if got := c.now(); got.Unix() != 1_900_000_000 {
		t.Errorf("now %v", got)
	}
	if back := c.tick(); back < 47*time.Hour {
		t.Errorf("back by %v", back)
	}
	again, err := openClock(path, wall)
	if err != nil || again.now().Unix() != 1_900_000_000 {
		t.Errorf("after a restart: %v, %v", again.now(), err)
	}
	if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openClock(path, wall); err == nil {
		t.Error("a damaged clock file was taken for a first start")
	}
}

// What waits in the kernel for an agent that is still starting is not lost.
func TestEvents_noGapBeforeTheyAreRead(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", ""))
	l.start()
	l.stop()
	p := l.agent.pipe
	l.kernel.counters.Raised = 3
	later := time.Now().Add(time.Hour)
	p.deaf.Store(true)
	p.checkGaps(later)
	p.checkGaps(later)
	if f := p.flow(); f.Lost != 0 {
		t.Errorf("%d are told as lost and were not read", f.Lost)
	}
	p.deaf.Store(false)
	p.checkGaps(later)
	if f := p.flow(); f.Lost != 3 {
		t.Errorf("%d are told as lost of 3 that never came", f.Lost)
	}
}
