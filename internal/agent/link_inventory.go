package agent

import (
	"context"
	"crypto/sha256"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/agentpb"
	"ringwall/internal/integrity"
)

// Bounds of the inventory.
const (
	maxInventory   = 20_000    // distinct executables
	maxProcesses   = 32 << 10  // looked at in one sample
	hashPerSample  = 128 << 20 // bytes
	maxExecutable  = 1 << 30   // bytes of one; a bigger one is not hashed
	maxFilesCached = 8192
	sampleUnits    = 3 // samples between two looks at units and isolation
)

// inventory is what ran here, for what-if and for how much a ring has tried. The
// kernel reports refusals only, and to have it report every execution would cost
// every program start; so the agent looks at /proc now and then. That is true of
// what it sees, and misses programs that start and end between two looks: it
// undercounts and never invents. What is refused or would be comes as blocks, all
// of it.
type inventory struct {
	seen     map[integrity.Digest]*ran
	files    map[fileID]integrity.Digest
	counted  map[processID]struct{}
	reported time.Time
}

type ran struct {
	path  string
	count uint64 // since it was reported
	last  time.Time
	fresh bool // not reported yet
}

// fileID is a file as it was when it was hashed.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

type processID struct {
	pid   int
	start uint64 // clock ticks after boot
}

// sampleLoop looks at what runs, and at units that failed.
func (l *link) sampleLoop(ctx context.Context) {
	tick := time.NewTicker(l.a.opts.pace.sampleTick)
	defer tick.Stop()
	for n := 0; ; n++ {
		if j, _, _ := l.now(); j != nil && j.Host != "" && n%sampleUnits == 0 {
			l.lookAtFailed(ctx)
			l.isolate(ctx)
		}
		select {
		case <-tick.C:
			if j, _, _ := l.now(); j != nil && j.Host != "" {
				l.sample("/proc")
			}
		case <-ctx.Done():
			return
		}
	}
}

// sample counts the processes that run and were not counted before.
func (l *link) sample(proc string) {
	es, err := os.ReadDir(proc)
	if err != nil {
		return
	}
	now := l.a.opts.Now()
	l.invMu.Lock()
	defer l.invMu.Unlock()
	if l.seen == nil {
		l.seen, l.files, l.counted = map[integrity.Digest]*ran{}, map[fileID]integrity.Digest{}, map[processID]struct{}{}
		l.reported = time.Now()
	}
	alive := map[processID]struct{}{}
	budget := int64(hashPerSample)
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || len(alive) == maxProcesses {
			continue
		}
		dir := proc + "/" + e.Name()
		id := processID{pid, startOf(dir)}
		if _, known := l.counted[id]; known {
			alive[id] = struct{}{}
			continue
		}
		path, err := os.Readlink(dir + "/exe")
		if err != nil { // a kernel thread, or gone
			continue
		}
		d, ok := l.hashOf(dir+"/exe", &budget)
		if !ok {
			continue // next time
		}
		alive[id] = struct{}{}
		l.ran(d, strings.TrimSuffix(path, " (deleted)"), now)
	}
	l.counted = alive
	if every := l.a.opts.pace.reportTick; time.Since(l.reported) >= every || l.resendAll {
		l.report(now)
	}
}

func (l *link) ran(d integrity.Digest, path string, now time.Time) {
	r := l.seen[d]
	if r == nil {
		if len(l.seen) == maxInventory {
			return
		}
		r = &ran{path: path}
		l.seen[d] = r
	}
	r.count++
	r.last, r.fresh = now, true
}

// startOf is when a process started, field 22 of its stat; 0 if it is gone.
func startOf(dir string) uint64 {
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return 0
	}
	_, rest, ok := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0
	}
	n, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// hashOf is the digest of the program that a process runs, hashed once for each
// state of a file and within a budget for each sample.
func (l *link) hashOf(exe string, budget *int64) (integrity.Digest, bool) {
	var none integrity.Digest
	f, err := os.Open(exe)
	if err != nil {
		return none, false
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxExecutable {
		return none, false
	}
	id := fileID{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim} //nolint:unconvert // another type elsewhere
	if d, ok := l.files[id]; ok {
		return d, true
	}
	if *budget < hashPerSample && st.Size > *budget {
		return none, false
	}
	*budget -= st.Size
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(f, maxExecutable)); err != nil {
		return none, false
	}
	var again unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &again); err != nil || again.Ctim != st.Ctim || again.Size != st.Size {
		return none, false // changed meanwhile
	}
	if len(l.files) == maxFilesCached {
		clear(l.files)
	}
	d := integrity.Digest(h.Sum(nil))
	l.files[id] = d
	return d, true
}

// report spools what ran since the last report. l.invMu is held.
func (l *link) report(now time.Time) {
	l.mu.Lock()
	s := l.inv
	l.mu.Unlock()
	if s == nil {
		return
	}
	in := l.a.pipe.current.Load()
	for d, r := range l.seen {
		if !r.fresh && !l.resendAll {
			continue
		}
		x := &agentpb.Execution{Kind: integrity.KindExec.String(), Path: clip(r.path, 4096), Sha256: d[:], Count: r.count, LastUs: r.last.UnixMicro()}
		if in != nil {
			o := in.compiled.Object(integrity.KindExec, integrity.Key{Digest: d})
			if x.Signer = "unsigned"; len(o.Memberships) > 0 {
				x.Signer = clip(signerText(o.Memberships[0].Origin), 1024)
			}
		}
		s.add(&agentpb.Record{AtUs: now.UnixMicro(), What: &agentpb.Record_Execution{Execution: x}})
		r.count, r.fresh = 0, false
	}
	l.reported, l.resendAll = time.Now(), false
}

// resend has everything that was seen reported again at the next sample.
func (l *link) resend() {
	l.invMu.Lock()
	defer l.invMu.Unlock()
	l.resendAll = true
}
