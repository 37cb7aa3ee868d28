package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the log on disk: LogFiles files of about LogSize bytes.
const (
	LogSize  = 16 << 20
	LogFiles = 8
	logName  = "events.jsonl" // events.jsonl.1 is the file before it, and so on
)

// eventLog appends JSON lines to a file and rotates it. Used by one goroutine.
// A line that cannot be written (a full disk) is kept in memory, up to a bound,
// and written when there is room again; what does not fit there is counted.
type eventLog struct {
	dir     string
	f       *os.File
	size    int64
	waiting [][]byte
	bytes   int
	lost    uint64 // since the last line that could be written
}

const maxWaiting = 4 << 20 // bytes

// openLog always returns a log; an error says that it had to be begun anew. One
// that cannot be opened at all is tried again with each line.
func openLog(dir string) (*eventLog, error) {
	l := &eventLog{dir: dir}
	err := l.open()
	if err == nil || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return l, nil
	}
	name := filepath.Join(dir, logName)
	if back := os.Rename(name, fmt.Sprintf("%s.damaged-%d", name, time.Now().UnixNano())); back == nil {
		_ = l.open() // the next line tries again
	}
	return l, fmt.Errorf("the event log could not be opened and is begun anew: %w", err)
}

func (l *eventLog) open() error {
	f, err := os.OpenFile(filepath.Join(l.dir, logName), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	size, err := endLine(f, st.Size())
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.f, l.size = f, size
	return nil
}

// endLine completes a line that a crash or a full disk cut, and gives the size.
func endLine(f *os.File, size int64) (int64, error) {
	if size == 0 {
		return 0, nil
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], size-1); err != nil {
		return size, err
	}
	if last[0] == '\n' {
		return size, nil
	}
	n, err := f.Write([]byte{'\n'})
	return size + int64(n), err
}

// write appends a record. It does not fail: see eventLog.
func (l *eventLog) write(r *Record) {
	b, err := json.Marshal(r)
	if err != nil { // cannot be: the fields are plain
		l.lost++
		return
	}
	b = append(b, '\n')
	if l.bytes+len(b) > maxWaiting {
		l.lost++
		return
	}
	l.waiting = append(l.waiting, b)
	l.bytes += len(b)
	l.flush()
}

// flush writes what waits and reports whether all of it is written.
func (l *eventLog) flush() bool {
	for len(l.waiting) > 0 {
		b := l.waiting[0]
		if err := l.append(b); err != nil {
			return false
		}
		l.waiting = l.waiting[1:]
		l.bytes -= len(b)
	}
	return true
}

func (l *eventLog) append(b []byte) error {
	if l.f != nil && l.size+int64(len(b)) > LogSize {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	if l.f == nil {
		if err := l.open(); err != nil {
			return err
		}
	}
	n, err := l.f.Write(b)
	if err == nil {
		l.size += int64(n)
		return nil
	}
	// do not leave half a line
	if e := l.f.Truncate(l.size); e != nil {
		return errors.Join(err, e)
	}
	return err
}

// rotate makes room for a new file, which append opens. It happens only with a
// file that is full: to try again must not push old files out.
func (l *eventLog) rotate() error {
	_ = l.f.Close()
	l.f = nil
	name := filepath.Join(l.dir, logName)
	for i := LogFiles - 1; i >= 1; i-- {
		from := name
		if i > 1 {
			from += "." + strconv.Itoa(i-1)
		}
		if err := os.Rename(from, name+"."+strconv.Itoa(i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (l *eventLog) close() {
	l.flush()
	if l.f != nil {
		_ = l.f.Close()
	}
}

// LogPaths are the log files of a state directory that exist, oldest first.
func LogPaths(stateDir string) []string {
	name := filepath.Join(stateDir, dirEvents, logName)
	var out []string
	for i := LogFiles - 1; i >= 0; i-- {
		p := name
		if i > 0 {
			p += "." + strconv.Itoa(i)
		}
		if _, err := os.Stat(p); err == nil {
			out = append(out, p)
		}
	}
	return out
}
