package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"ringwall/internal/enforce"
)

func TestSequence(t *testing.T) {
	at := time.Now()
	for name, c := range map[string]struct {
		numbers   []uint64
		raised    uint64
		wait      time.Duration
		lost, got uint64
		spans     int
	}{
		"in order":                      {[]uint64{1, 2, 3}, 3, time.Minute, 0, 3, 0},
		"in a slightly different order": {[]uint64{1, 3, 2, 5, 4}, 5, time.Minute, 0, 5, 0},
		"a gap":                         {[]uint64{1, 9}, 9, time.Minute, 7, 2, 1},
		"a gap, half of it late":        {[]uint64{1, 9, 4, 5}, 9, time.Minute, 5, 4, 2},
		"not yet a gap":                 {[]uint64{1, 9}, 9, lateFor / 2, 0, 2, 0},
		"the last ones are lost":        {[]uint64{1, 2}, 10, time.Minute, 8, 2, 1},
		"the first ones are lost":       {[]uint64{8}, 8, time.Minute, 7, 1, 1},
		"the same again":                {[]uint64{1, 2, 2}, 2, time.Minute, 0, 3, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var s sequence
			for _, n := range c.numbers {
				s.take(n, at)
			}
			s.raised(c.raised, at)
			spans := s.overdue(at.Add(c.wait))
			if s.lost != c.lost || s.received != c.got || len(spans) != c.spans {
				t.Errorf("lost %d, received %d, %d spans; want %d, %d, %d", s.lost, s.received, len(spans), c.lost, c.got, c.spans)
			}
			if again := s.overdue(at.Add(c.wait)); len(again) != 0 {
				t.Errorf("told twice: %v", again)
			}
		})
	}
}

// While events come, a gap may still be filled; it does not wait for ever.
func TestSequence_whileOthersCome(t *testing.T) {
	at := time.Now()
	var s sequence
	s.take(1, at)
	s.take(5, at)
	s.take(6, at.Add(5*time.Second))
	if got := s.overdue(at.Add(5 * time.Second)); len(got) != 0 {
		t.Errorf("given up early: %v", got)
	}
	s.take(7, at.Add(lateForLong))
	if got := s.overdue(at.Add(lateForLong)); len(got) != 1 || s.lost != 3 {
		t.Errorf("%v, %d lost", got, s.lost)
	}
}

func TestSeenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen")
	s, err := openSeen(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.read(); n != 0 {
		t.Errorf("%d without a file", n)
	}
	for _, n := range []uint64{7, 123456} {
		if err := s.write(n); err != nil {
			t.Fatal(err)
		}
		if got := s.read(); got != n {
			t.Errorf("%d, want %d", got, n)
		}
	}
	other := &seenFile{path: path, boot: "another"}
	if n := other.read(); n != 0 {
		t.Errorf("%d of another boot", n)
	}
	if err := os.WriteFile(path, []byte("\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := s.read(); n != 0 {
		t.Errorf("%d of a broken file", n)
	}
}

// What a killed agent had read and not written is a gap for the next one.
func TestEvents_killedAgent(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "enforce", ""))
	l.kernel.raise(40)
	seen, err := openSeen(filepath.Join(l.state(), dirEvents, "seen"))
	if err != nil {
		t.Fatal(err)
	}
	if err := seen.write(30); err != nil { // of 31 to 34 there is no record
		t.Fatal(err)
	}
	l.start()
	for n := uint64(35); n <= 40; n++ {
		l.kernel.events <- block(n, "/tmp/evil")
	}
	got := l.records(1, func(r *Record) bool { return r.Type == "gap" })
	if len(got) != 1 || got[0].Lost != 4 || got[0].Seq != 31 {
		t.Fatalf("gaps %+v, want one of 4 from 31", got)
	}
	l.stop()
	if n := seen.read(); n != 40 {
		t.Errorf("told up to %d, want 40", n)
	}
}

// raise sets how many events the kernel says that it raised.
func (k *fakeKernel) raise(n uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.counters = enforce.Counters{Raised: n}
}

// An event that found no room in the queue is told as that, and not as a gap too.
func TestPipeline_overflowIsNoGap(t *testing.T) {
	p := &pipeline{queue: make(chan any, 1)}
	for n := uint64(1); n <= 3; n++ {
		p.take(block(n, "/tmp/evil"))
	}
	first, ok := (<-p.queue).(enforce.Event)
	if !ok {
		t.Fatal("no event in the queue")
	}
	p.count(&first)
	p.seq.raised(3, time.Now())
	if lost := p.seq.overdue(time.Now().Add(time.Hour)); len(lost) != 0 || p.overflow.Load() != 2 {
		t.Errorf("gaps %v, %d did not fit", lost, p.overflow.Load())
	}
}
