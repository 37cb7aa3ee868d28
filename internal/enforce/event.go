package enforce

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Event is one refusal by the kernel, or one would-be refusal in audit mode.
type Event struct {
	// Seq grows by one for each event that the kernel raised, also for those
	// that found no room: a gap is a number of lost events.
	Seq         uint64
	SinceBoot   time.Duration // CLOCK_BOOTTIME
	Epoch       uint64        // policy epoch that decided
	Kind        integrity.Kind
	Reason      Reason
	Refused     bool // false: audit, it went ahead
	Space       integrity.Space
	Digest      integrity.Digest // zero when there is none
	Errno       int32            // why there is no digest; 0 or negative errno
	Path        string           // as the process saw it; a bare name where the hook gives no path
	Detail      string           // the argument or name that decided
	Interpreter uint8            // slot of the interpreter rule, or 0
	Device      uint32           // kernel dev_t
	Inode       uint64
	Cgroup      uint64
	PID, TGID   uint32
	UID, GID    uint32
	Comm        string
	Ancestors   []Ancestor // parent first
}

// Ancestor is a process above the one that an event is about.
type Ancestor struct {
	PID  uint32 `json:"pid"`
	Comm string `json:"comm"`
}

// parseEvent decodes one record of the ring buffer.
func parseEvent(raw []byte) (Event, error) {
	var e engineEvent
	if err := binary.Read(bytes.NewReader(raw), binary.NativeEndian, &e); err != nil {
		return Event{}, fmt.Errorf("kernel event of %d bytes: %w", len(raw), errs.Invalid)
	}
	out := Event{
		Seq: e.Seq, SinceBoot: time.Duration(e.TimeNs), Epoch: e.Epoch,
		Kind: integrity.Kind(e.Kind), Reason: Reason(e.Reason), Refused: e.Mode == uint8(integrity.ModeEnforce),
		Space: integrity.Space(e.Space), Digest: e.Digest, Errno: e.Error, Path: text(e.Path[:]), Detail: text(e.Detail[:]),
		Interpreter: e.Interpreter, Device: e.Device, Inode: e.Inode, Cgroup: e.Cgroup,
		PID: e.Pid, TGID: e.Tgid, UID: e.Uid, GID: e.Gid, Comm: text(e.Comm[:]),
	}
	for _, a := range e.Ancestors {
		if a.Tgid == 0 {
			break
		}
		out.Ancestors = append(out.Ancestors, Ancestor{PID: a.Tgid, Comm: text(a.Comm[:])})
		if a.Tgid == 1 {
			break
		}
	}
	return out, nil
}

// text is the C string in b.
func text(b []int8) string {
	out := make([]byte, 0, len(b))
	for _, c := range b {
		if c == 0 {
			break
		}
		out = append(out, byte(c))
	}
	return string(out)
}

// Events calls fn for every event until ctx ends, in order, from one goroutine.
// Events that were raised while nobody read are delivered first. The caller
// must not run it twice at the same time: the buffer has one reader.
func (e *Engine) Events(ctx context.Context, fn func(Event)) error {
	r, err := ringbuf.NewReader(e.objs.Events)
	if err != nil {
		return fmt.Errorf("read kernel events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	defer r.Close()
	var rec ringbuf.Record
	for {
		if err := r.ReadInto(&rec); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read kernel events: %w", err)
		}
		ev, err := parseEvent(rec.RawSample)
		if err != nil {
			return err
		}
		fn(ev)
	}
}

// Counters are the kernel's own counts since the maps were made.
type Counters struct {
	Raised     uint64 `json:"events_raised"` // events, sent or not
	Dropped    uint64 `json:"events_dropped"`
	Refused    uint64 `json:"refused"`
	Audited    uint64 `json:"audited"`
	CacheHits  uint64 `json:"digest_cache_hits"`
	Misses     uint64 `json:"digest_cache_misses"`
	Hashed     uint64 `json:"files_hashed"`
	HashErrors uint64 `json:"hash_errors"`
	Quiet      uint64 `json:"bytecode_skipped"` // an interpreter's own byte code that was not authorised
}

// Counters reads them.
func (e *Engine) Counters() (Counters, error) { return readCounters(e.objs.Counters) }

func readCounters(m *ebpf.Map) (Counters, error) {
	var c engineCounts
	if err := m.Lookup(uint32(0), &c); err != nil {
		return Counters{}, fmt.Errorf("read kernel counters: %w", err)
	}
	return Counters{
		Raised: c.Seq, Dropped: c.Drops, Refused: c.Denied, Audited: c.Audited,
		CacheHits: c.Hits, Misses: c.Misses, Hashed: c.Hashed, HashErrors: c.HashErrors, Quiet: c.Quiet,
	}, nil
}
