package agent

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// What the server has not acknowledged waits on the disk, in two lanes: blocks
// go before inventory, and a full one does not stop the other.
const (
	dirSpool     = "spool"
	spoolSegment = 1 << 20  // bytes of one file, about
	spoolBlocks  = 64 << 20 // bytes of a lane
	spoolInv     = 32 << 20
	maxSpooled   = 64 << 10 // bytes of one record
	sendRecords  = 1000
	sendBytes    = 1<<20 - 64<<10
	frameHead    = 8
	segSuffix    = ".seg"
	lostEvery    = time.Second
)

// spool is one lane: records in files of frames, numbered without a gap. It may
// be used from several goroutines.
//
// A record is written when it is added, so that it survives the death of the
// agent, and synced before it is sent: a number that the server has seen is never
// used for another record, even after the power went. Power that goes before that
// takes what was not sent yet, which is in the event log too. What was
// acknowledged is noted without a sync: it may be sent twice.
//
// When the lane or the disk is full, new records are dropped and counted, and a
// record of the loss goes in as soon as there is room: what is there keeps its
// numbers and its order.
type spool struct {
	lane  agentpb.Lane
	dir   string
	limit int64

	mu      sync.Mutex
	stream  [16]byte
	segs    []segment // in order; the last one is written to
	f       *os.File
	dirty   bool
	acked   uint64 // everything up to it is durable at the server
	lost    uint64 // and not told
	noted   time.Time
	dropped uint64 // since the agent started
	wake    chan struct{}
}

type segment struct {
	first uint64
	count uint64
	size  int64
}

func (s *segment) end() uint64 { return s.first + s.count } // number after the last

// openSpool opens a lane in a directory that exists. What a crash cut off at the
// end is dropped; a lane that is damaged otherwise is begun anew, as another
// stream, with a record of the loss.
func openSpool(dir string, lane agentpb.Lane, limit int64) (*spool, error) {
	s := &spool{lane: lane, dir: dir, limit: limit, wake: make(chan struct{}, 1)}
	err := s.load()
	if err == nil {
		s.poke()
		return s, nil
	}
	if errors.Is(err, errs.NotFound) {
		return s, s.begin(0)
	}
	if again := s.begin(1); again != nil {
		return nil, fmt.Errorf("open spool %s: %w", dir, errors.Join(err, again))
	}
	return s, nil
}

// begin makes a new stream in place of what is there.
func (s *spool) begin(lost uint64) error {
	if s.f != nil {
		_ = s.f.Close()
	}
	s.f, s.segs, s.acked, s.lost = nil, nil, 0, lost
	es, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
			return err
		}
	}
	_, _ = rand.Read(s.stream[:]) // never fails, see crypto/rand
	if err := host.WriteFile(filepath.Join(s.dir, "stream"), s.stream[:], 0o600); err != nil {
		return err
	}
	s.note("acked", 0)
	s.note("lost", lost)
	return s.roll(1)
}

func (s *spool) load() error {
	raw, err := readFile(filepath.Join(s.dir, "stream"), 64)
	if err != nil {
		return err
	}
	if len(raw) != len(s.stream) {
		return fmt.Errorf("spool: stream id of %d bytes: %w", len(raw), errs.Invalid)
	}
	copy(s.stream[:], raw)
	names, err := filepath.Glob(filepath.Join(s.dir, "*"+segSuffix))
	if err != nil {
		return err
	}
	slices.Sort(names)
	for i, n := range names {
		g, err := s.readSegment(n, i == len(names)-1)
		if err != nil {
			return err
		}
		if i > 0 && s.segs[i-1].end() != g.first {
			return fmt.Errorf("spool: records %d to %d are gone: %w", s.segs[i-1].end(), g.first, errs.Untrusted)
		}
		s.segs = append(s.segs, g)
	}
	if len(s.segs) == 0 {
		return fmt.Errorf("spool: no file of records: %w", errs.Untrusted)
	}
	last := &s.segs[len(s.segs)-1]
	if s.acked = s.noted64("acked"); s.acked >= last.end() {
		return fmt.Errorf("spool: acknowledged up to %d, and it ends before: %w", s.acked, errs.Untrusted)
	}
	s.acked = max(s.acked, s.segs[0].first-1)
	s.lost = s.noted64("lost")
	s.f, err = os.OpenFile(s.file(last.first), os.O_WRONLY|os.O_APPEND, 0o600)
	s.dirty = true // nobody knows
	return err
}

func (s *spool) file(first uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%020d%s", first, segSuffix))
}

func (s *spool) readSegment(name string, last bool) (segment, error) {
	first, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(name), segSuffix), 10, 64)
	if err != nil || first == 0 {
		return segment{}, fmt.Errorf("spool: file %s: %w", name, errs.Invalid)
	}
	raw, err := readFile(name, spoolSegment+maxSpooled+frameHead)
	if err != nil {
		return segment{}, err
	}
	frames, good := parseFrames(raw)
	if good != len(raw) {
		if !last {
			return segment{}, fmt.Errorf("spool: file %s is damaged: %w", name, errs.Untrusted)
		}
		if err := os.Truncate(name, int64(good)); err != nil {
			return segment{}, err
		}
	}
	return segment{first: first, count: uint64(len(frames)), size: int64(good)}, nil
}

// parseFrames cuts a file into its records, up to the first that is not whole.
func parseFrames(raw []byte) (frames [][]byte, good int) {
	for good+frameHead <= len(raw) {
		n := int(binary.BigEndian.Uint32(raw[good:]))
		sum := binary.BigEndian.Uint32(raw[good+4:])
		if n == 0 || n > maxSpooled || good+frameHead+n > len(raw) {
			break
		}
		body := raw[good+frameHead:][:n]
		if crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) != sum {
			break
		}
		frames = append(frames, body)
		good += frameHead + n
	}
	return frames, good
}

func frame(body []byte) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, frameHead+len(body)), uint32(len(body))) //nolint:gosec // bounded by maxSpooled
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	return append(b, body...)
}

// roll begins a file, durably: its name says which number comes next.
func (s *spool) roll(first uint64) error {
	if s.f != nil {
		if err := errors.Join(s.f.Sync(), s.f.Close()); err != nil {
			return err
		}
		s.f = nil
	}
	if err := host.WriteFile(s.file(first), nil, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(s.file(first), os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	s.f, s.dirty = f, false
	s.segs = append(s.segs, segment{first: first})
	s.trim()
	return nil
}

// trim removes files whose records are all acknowledged, but the last.
func (s *spool) trim() {
	for len(s.segs) > 1 && s.segs[0].end() <= s.acked+1 {
		if os.Remove(s.file(s.segs[0].first)) != nil {
			return
		}
		s.segs = s.segs[1:]
	}
}

// add keeps a record; it does not fail, see spool.
func (s *spool) add(r *agentpb.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.poke()
	if s.lost > 0 {
		told := &agentpb.Record{AtUs: r.GetAtUs(), What: &agentpb.Record_Lost{Lost: &agentpb.Lost{Records: s.lost, Why: "no room in the spool"}}}
		if s.write(told) == nil {
			s.lost = 0
			s.note("lost", 0)
		}
	}
	if err := s.write(r); err != nil {
		s.lost++
		s.dropped++
		if time.Since(s.noted) >= lostEvery {
			s.noted = time.Now()
			s.note("lost", s.lost)
		}
	}
}

func (s *spool) write(r *agentpb.Record) error {
	body, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	if len(body) == 0 || len(body) > maxSpooled {
		return fmt.Errorf("record of %d bytes: %w", len(body), errs.Invalid)
	}
	var size int64
	for i := range s.segs {
		size += s.segs[i].size
	}
	b := frame(body)
	if size+int64(len(b)) > s.limit {
		return fmt.Errorf("spool is full: %w", errs.Conflict)
	}
	if s.f == nil {
		last := s.segs[len(s.segs)-1]
		if s.f, err = os.OpenFile(s.file(last.first), os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
			return err
		}
	}
	if last := s.segs[len(s.segs)-1]; last.size >= spoolSegment {
		if err := s.roll(last.end()); err != nil {
			return err
		}
	}
	last := &s.segs[len(s.segs)-1]
	if _, err := s.f.Write(b); err != nil {
		return errors.Join(err, s.f.Truncate(last.size)) // no half frame
	}
	last.count++
	last.size += int64(len(b))
	s.dirty = true
	return nil
}

// batch returns the next records that were not acknowledged, with the number of
// the first, synced. Without any it returns none.
func (s *spool) batch() (_ uint64, out []*agentpb.Record, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first, end := s.acked+1, s.segs[len(s.segs)-1].end()
	if f := s.f; s.dirty && f != nil {
		s.dirty = false
		s.mu.Unlock() // nobody who adds a record waits for the disk
		err := f.Sync()
		s.mu.Lock()
		if err != nil && f == s.f { // else it was synced and closed meanwhile
			s.dirty = true
			return 0, nil, fmt.Errorf("sync spool: %w", err)
		}
	}
	next, size := first, 0
	for i := range s.segs {
		g := &s.segs[i]
		if g.end() <= next {
			continue
		}
		raw, err := readFile(s.file(g.first), spoolSegment+maxSpooled+frameHead)
		if err != nil {
			return 0, nil, err
		}
		frames, _ := parseFrames(raw)
		if uint64(len(frames)) < g.count {
			return 0, nil, fmt.Errorf("spool: %s was damaged: %w", s.file(g.first), errs.Untrusted)
		}
		for _, body := range frames[next-g.first : g.count] {
			if next == end { // not synced
				return first, out, nil
			}
			if len(out) == sendRecords || size+len(body) > sendBytes {
				return first, out, nil
			}
			r := &agentpb.Record{}
			if err := proto.Unmarshal(body, r); err != nil {
				return 0, nil, fmt.Errorf("spool: record %d: %w: %w", next, err, errs.Untrusted)
			}
			out = append(out, r)
			size += len(body) + 8
			next++
		}
	}
	return first, out, nil
}

// ack notes that the server keeps everything up to a number.
func (s *spool) ack(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n = min(n, s.segs[len(s.segs)-1].end()-1)
	if n <= s.acked {
		return
	}
	s.acked = n
	s.note("acked", n)
	s.trim()
}

// reset begins a new stream after the disk damaged what was there.
func (s *spool) reset() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.segs[len(s.segs)-1].end() - 1 - s.acked
	s.dropped += n
	return s.begin(n)
}

// waiting is how many bytes are kept, about, and how many records were dropped.
func (s *spool) waiting() (bytes, dropped uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.acked+1 < s.segs[len(s.segs)-1].end() {
		for i := range s.segs {
			bytes += uint64(s.segs[i].size) //nolint:gosec // sizes
		}
	}
	return bytes, s.dropped
}

func (s *spool) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// note keeps a number, without a sync, in a file of one length: a full disk does
// not matter.
func (s *spool) note(name string, n uint64) {
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	_, _ = f.WriteAt(fmt.Appendf(nil, "%020d\n", n), 0) // without it records are sent twice
	_ = f.Close()
}

func (s *spool) noted64(name string) uint64 {
	raw, err := readFile(filepath.Join(s.dir, name), 64)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (s *spool) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost > 0 {
		s.note("lost", s.lost)
	}
	if s.f != nil {
		_ = errors.Join(s.f.Sync(), s.f.Close())
		s.f = nil
	}
}

// remove forgets the lane.
func (s *spool) remove() error {
	s.close()
	es, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var all error
	for _, e := range es {
		all = errors.Join(all, os.RemoveAll(filepath.Join(s.dir, e.Name())))
	}
	return all
}
