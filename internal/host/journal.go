package host

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Bounds of a journal entry: it must fit into one datagram.
const (
	maxJournalValue = 8 << 10
	maxJournalEntry = 128 << 10
)

// Facility and priorities of syslog(3).
const (
	facilityAuthPriv = 10 // not for everybody's eyes
	priorityWarning  = 4
	priorityNotice   = 5
)

// Journal tells the system's log. It never waits: an entry that the log does
// not take at once is dropped and counted, because a log daemon that itself
// waits for a verdict must not stop the agent. It may be used from several
// goroutines.
type Journal struct {
	tag     string
	journal string // socket of journald
	syslog  string // socket of another log daemon
	now     func() time.Time
	dropped atomic.Uint64
}

// OpenJournal makes a Journal whose entries carry tag as their identifier. The
// log need not run yet, and may restart.
func OpenJournal(tag string) *Journal { return openJournal("/", tag) }

func openJournal(root, tag string) *Journal {
	return &Journal{
		tag: tag, now: time.Now,
		journal: filepath.Join(root, "run/systemd/journal/socket"), syslog: filepath.Join(root, "dev/log"),
	}
}

// Send tells a message with fields, whose names are of A–Z, 0–9 and _, and of
// which others are left out. It goes to journald in its native protocol
// (systemd.io/JOURNAL_NATIVE_PROTOCOL), or without one to /dev/log in the form
// that syslog(3) writes there. Values longer than 8 KiB are cut. It says
// whether a log has taken it.
func (j *Journal) Send(alert bool, text string, fields map[string]string) bool {
	priority := priorityNotice
	if alert {
		priority = priorityWarning
	}
	names := make([]string, 0, len(fields))
	for n := range fields {
		if journalName(n) {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	if sendUnix(j.journal, j.native(priority, text, names, fields)) == nil ||
		sendUnix(j.syslog, j.classic(priority, text, names, fields)) == nil {
		return true
	}
	j.dropped.Add(1)
	return false
}

// Dropped is how many entries no log has taken.
func (j *Journal) Dropped() uint64 { return j.dropped.Load() }

func (j *Journal) native(priority int, text string, names []string, fields map[string]string) []byte {
	var b []byte
	add := func(name, value string) {
		value = cutValue(value)
		if len(b)+len(name)+len(value)+16 > maxJournalEntry {
			return
		}
		b = append(b, name...)
		if strings.ContainsRune(value, '\n') {
			b = append(b, '\n')
			b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
		} else {
			b = append(b, '=')
		}
		b = append(b, value...)
		b = append(b, '\n')
	}
	add("MESSAGE", text)
	add("PRIORITY", strconv.Itoa(priority))
	add("SYSLOG_FACILITY", strconv.Itoa(facilityAuthPriv))
	add("SYSLOG_IDENTIFIER", j.tag)
	add("SYSLOG_PID", strconv.Itoa(os.Getpid()))
	for _, n := range names {
		add(n, fields[n])
	}
	return b
}

// classic is what every reader of /dev/log understands; the fields follow the
// message, quoted.
func (j *Journal) classic(priority int, text string, names []string, fields map[string]string) []byte {
	b := []byte("<" + strconv.Itoa(facilityAuthPriv<<3|priority) + ">" + j.now().Format(time.Stamp) + " " + j.tag +
		"[" + strconv.Itoa(os.Getpid()) + "]: " + oneLine(cutValue(text)))
	for _, n := range names {
		more := " " + n + "=" + strconv.Quote(cutValue(fields[n]))
		if len(b)+len(more) > maxJournalValue {
			break
		}
		b = append(b, more...)
	}
	return b
}

func cutValue(s string) string {
	if len(s) > maxJournalValue {
		return s[:maxJournalValue]
	}
	return s
}

// oneLine keeps what others chose, such as a path, from looking like a line of
// its own.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

// journalName is what journald takes for a field that a program sets.
func journalName(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < 'A' || c > 'Z') && (c < '0' || c > '9' || i == 0) && (c != '_' || i == 0) {
			return false
		}
	}
	switch s {
	case "MESSAGE", "PRIORITY", "SYSLOG_FACILITY", "SYSLOG_IDENTIFIER", "SYSLOG_PID":
		return false
	}
	return s != "" && len(s) <= 64
}
