package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// How long a number may be missing before its event counts as lost: processors
// draw numbers and send events in slightly different orders, and a full buffer
// is read for a while.
const (
	lateFor     = time.Second      // without any event
	lateForLong = 30 * time.Second // while others go on coming
)

// sequence accounts for the kernel's event numbers: each was received, is
// missing, or is lost. Used under one lock.
type sequence struct {
	last     uint64 // highest number that is known to have been raised
	received uint64
	lost     uint64
	heard    time.Time // when an event came last
	missing  []span    // in order; each cost an event that came after it
}

// span is a range of numbers, both ends in it.
type span struct {
	from, to uint64
	since    time.Time
}

// take notes an event.
func (s *sequence) take(n uint64, now time.Time) {
	s.received++
	s.heard = now
	if n <= s.last {
		s.late(n)
		return
	}
	if n > s.last+1 {
		s.missing = append(s.missing, span{s.last + 1, n - 1, now})
	}
	s.last = n
}

func (s *sequence) late(n uint64) {
	i := slices.IndexFunc(s.missing, func(x span) bool { return x.from <= n && n <= x.to })
	if i < 0 {
		return
	}
	x := s.missing[i]
	var rest []span
	if x.from < n {
		rest = append(rest, span{x.from, n - 1, x.since})
	}
	if n < x.to {
		rest = append(rest, span{n + 1, x.to, x.since})
	}
	s.missing = slices.Replace(s.missing, i, i+1, rest...)
}

// raised is what the kernel counted: numbers up to n were drawn, so those after
// the last event are missing too.
func (s *sequence) raised(n uint64, now time.Time) {
	if n > s.last {
		s.missing = append(s.missing, span{s.last + 1, n, now})
		s.last = n
	}
}

// overdue gives up what is missing for too long, and counts it as lost.
func (s *sequence) overdue(now time.Time) []span {
	var out []span
	s.missing = slices.DeleteFunc(s.missing, func(x span) bool {
		age := now.Sub(x.since)
		if age < lateFor || age < lateForLong && now.Sub(s.heard) < lateFor {
			return false
		}
		out = append(out, x)
		s.lost += x.to - x.from + 1
		return true
	})
	return out
}

// seenFile says up to which number a boot's events are told on the disk, so that
// what a killed agent had in its memory is a gap for the next one.
type seenFile struct {
	path, boot string
	written    uint64
}

const seenFormat = "%-40s %020d\n" // of one length: a full disk does not matter

func openSeen(path string) (*seenFile, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("id of this boot: %w", err)
	}
	return &seenFile{path: path, boot: strings.TrimSpace(string(b))}, nil
}

// read returns 0 for another boot, or where nothing is known.
func (s *seenFile) read() uint64 {
	b, err := readFile(s.path, 256)
	if err != nil {
		return 0
	}
	var boot string
	var n uint64
	if _, err := fmt.Sscanf(string(b), "%s %d\n", &boot, &n); err != nil || boot != s.boot {
		return 0
	}
	s.written = n
	return n
}

// write keeps n. It need not survive the machine: the numbers do not either.
func (s *seenFile) write(n uint64) error {
	if n == s.written {
		return nil
	}
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(fmt.Appendf(nil, seenFormat, s.boot, n), 0)
	if err = errors.Join(err, f.Close()); err == nil {
		s.written = n
	}
	return err
}
