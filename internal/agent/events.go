package agent

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/enforce"
	"ringwall/internal/host"
)

// Bounds of the pipeline.
const (
	queueLen    = 8192             // kernel events and notices that wait for the writer
	repeatFor   = 10 * time.Second // the same again within this time is counted, not told
	maxRepeats  = 4096             // distinct events that are counted at a time
	flushPeriod = 2 * time.Second
)

// pipeline takes events from the kernel and notices from the agent, explains
// them, folds repetitions and hands them to the log, the journal and the
// webhook. Nothing that the kernel decides waits for it.
//
// take and notice never block: what does not fit is counted, and the count
// shows as a gap.
type pipeline struct {
	queue    chan any // enforce.Event or Record
	overflow atomic.Uint64
	// deaf: the kernel's events are not read yet and wait there; they are not lost.
	deaf    atomic.Bool
	current atomic.Pointer[loaded]
	rec     recorder
	log     *eventLog
	syslog  *host.Journal
	hook    *webhook
	now     func() time.Time
	canary  func(enforce.Event) bool

	mu   sync.Mutex
	seq  sequence
	seen *seenFile
	// raised is how many events the kernel has raised; 0 if that is not known.
	raised func() uint64

	repeats map[repeatKey]*repeat
	flips   flips
	// tell has a record for the fleet's server; nil: nobody wants it.
	tell func(*Record)
}

// repeatKey is what makes two events the same to a person.
type repeatKey struct {
	reason, kind, path, detail, digest, program string
	refused                                     bool
	uid                                         uint32
}

type repeat struct {
	record      Record
	count       int
	first, last time.Time
	since       time.Time // by the monotonic clock: the other one may be moved
	from        uint64    // number of the first one that is counted here
}

func newPipeline(a *Agent) (*pipeline, error) {
	log, err := openLog(a.state.path(dirEvents))
	if err != nil {
		a.state.noteDamage("%v", err)
	}
	booted, err := bootTime(a.opts.Now)
	if err != nil {
		return nil, err
	}
	seen, err := openSeen(a.state.path(dirEvents, "seen"))
	if err != nil {
		return nil, err
	}
	p := &pipeline{
		seen: seen,
		raised: func() uint64 {
			s, err := a.watcher.Status()
			if err != nil {
				return 0
			}
			return s.Counters.Raised
		},
		queue: make(chan any, queueLen), log: log, now: a.opts.Now,
		rec:     recorder{host: a.state.Host(), booted: booted, lookup: host.NewLookup("/")},
		syslog:  host.OpenJournal("ringwall"),
		hook:    newWebhook(a.state.Settings().Webhook, a.log),
		canary:  a.watcher.IsCanary,
		repeats: map[repeatKey]*repeat{},
	}
	// fewer than that: the kernel's programs were taken out and put in anew
	if n := seen.read(); n <= p.raised() {
		p.seq.last = n
	}
	return p, nil
}

// use says which policy is in force, for explanations.
func (p *pipeline) use(l *loaded) { p.current.Store(l) }

// take accepts an event from the kernel.
func (p *pipeline) take(e enforce.Event) {
	select {
	case p.queue <- e:
	default:
		p.count(&e) // or it would be told as a gap, too
		p.overflow.Add(1)
	}
}

// notice tells something that the agent did or found.
func (p *pipeline) notice(reason, text string) {
	r := Record{Version: 1, Time: p.now().UTC(), Host: p.rec.host, Type: typeNotice, Reason: reason, Text: text, Alert: alerting(reason)}
	select {
	case p.queue <- r:
	default:
		p.overflow.Add(1)
	}
}

// run writes until ctx ends, and then what is still waiting.
func (p *pipeline) run(ctx context.Context) {
	hookDone := p.hook.start(ctx)
	tick := time.NewTicker(flushPeriod)
	defer tick.Stop()
	for {
		select {
		case x := <-p.queue:
			p.handle(x)
		case <-tick.C:
			p.expire(time.Now())
			p.checkGaps(time.Now())
			p.checkLog()
		case <-ctx.Done():
			p.drain()
			p.expire(time.Now().Add(repeatFor))
			p.checkGaps(time.Now().Add(lateForLong))
			p.checkLog()
			p.log.close()
			<-hookDone
			return
		}
	}
}

func (p *pipeline) drain() {
	for {
		select {
		case x := <-p.queue:
			p.handle(x)
		default:
			return
		}
	}
}

func (p *pipeline) handle(x any) {
	switch x := x.(type) {
	case Record:
		p.emit(&x)
	case enforce.Event:
		p.count(&x)
		if p.canary(x) {
			return
		}
		l := p.current.Load()
		r := p.rec.record(&x, l)
		r.Flip = p.flips.look(&x, l, r.Time)
		p.fold(r)
	}
}

// count notes the number: the kernel numbers what it raises, sent or not.
func (p *pipeline) count(e *enforce.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq.take(e.Seq, time.Now())
}

// checkGaps tells of numbers whose event did not come.
func (p *pipeline) checkGaps(now time.Time) {
	if p.deaf.Load() {
		return
	}
	n := p.raised()
	p.mu.Lock()
	p.seq.raised(n, time.Now())
	lost := p.seq.overdue(now)
	p.mu.Unlock()
	for _, x := range lost {
		n := x.to - x.from + 1
		p.emit(&Record{
			Version: 1, Time: p.now().UTC(), Host: p.rec.host, Type: typeGap, Alert: true, Seq: x.from, Lost: n, Reason: "events-lost",
			Text: fmt.Sprintf("%d events from number %d on were raised and lost: refusals were made as always, but there is no record of these", n, x.from),
		})
	}
}

// fold tells the first of a kind at once and counts the others.
func (p *pipeline) fold(r Record) {
	k := repeatKey{
		reason: r.Reason, kind: r.Kind, path: r.Path, detail: r.Detail, digest: r.Digest, program: r.Process.Program,
		refused: r.Type == typeBlock, uid: r.Process.UID,
	}
	if old := p.repeats[k]; old != nil {
		if old.count == 0 {
			old.from = r.Seq
		}
		old.count++
		old.last = r.Time
		old.record.Seq = r.Seq
		return
	}
	if len(p.repeats) < maxRepeats {
		p.repeats[k] = &repeat{record: r, first: r.Time, last: r.Time, since: time.Now()}
	}
	p.emit(&r)
}

// expire tells the counts of what has not come again for a while.
func (p *pipeline) expire(now time.Time) {
	for k, x := range p.repeats {
		if now.Sub(x.since) < repeatFor {
			continue
		}
		delete(p.repeats, k)
		if x.count == 0 {
			continue
		}
		r := x.record
		r.Count, r.First, r.Last, r.Alert = x.count, &x.first, &x.last, false // the first one was the alert
		p.emit(&r)
	}
}

func (p *pipeline) emit(r *Record) {
	p.log.write(r)
	p.syslog.Send(r.Alert, r.Text+describe(r), journalFields(r))
	if r.Alert {
		p.hook.post(r)
	}
	if p.tell != nil {
		p.tell(r)
	}
}

// checkLog tells of lines that could not be kept, once there is room again.
func (p *pipeline) checkLog() {
	n := p.overflow.Swap(0)
	if p.log.flush() {
		n += p.log.lost
		p.log.lost = 0
		_ = p.seen.write(p.told()) // without it the next agent tells a gap that is none
	} else if n > 0 {
		p.overflow.Add(n)
		return
	}
	if n > 0 {
		p.emit(&Record{
			Version: 1, Time: p.now().UTC(), Host: p.rec.host, Type: typeGap, Alert: true, Lost: n, Reason: "records-lost",
			Text: fmt.Sprintf("%d records found no room on the disk or in memory and are lost", n),
		})
	}
}

// told is the number up to which every event is in the log, or in it as lost.
func (p *pipeline) told() uint64 {
	p.mu.Lock()
	n := p.seq.last
	for _, x := range p.seq.missing {
		n = min(n, x.from-1)
	}
	p.mu.Unlock()
	for _, x := range p.repeats {
		if x.count > 0 {
			n = min(n, x.from-1)
		}
	}
	return n
}

// Flow is how many events came through.
type Flow struct {
	Received uint64 `json:"received"`
	Lost     uint64 `json:"lost"`
}

func (p *pipeline) flow() Flow {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Flow{Received: p.seq.received, Lost: p.seq.lost}
}

func describe(r *Record) string {
	out := ""
	if r.Path != "" {
		out += ": " + r.Path
	}
	if r.Process != nil {
		out += fmt.Sprintf(" (by %s, pid %d, uid %d)", r.Process.Name, r.Process.PID, r.Process.UID)
	}
	return out
}

func journalFields(r *Record) map[string]string {
	f := map[string]string{"RINGWALL_TYPE": r.Type, "RINGWALL_REASON": r.Reason}
	for k, v := range map[string]string{"RINGWALL_KIND": r.Kind, "RINGWALL_PATH": r.Path, "RINGWALL_DIGEST": r.Digest, "RINGWALL_RULE": r.Rule, "RINGWALL_SIGNER": r.Signer} {
		if v != "" {
			f[k] = v
		}
	}
	return f
}

// bootTime is the wall-clock time of boot, to which kernel times are added.
func bootTime(now func() time.Time) (time.Time, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}, fmt.Errorf("boot clock: %w", err)
	}
	return now().Add(-time.Duration(ts.Nano())), nil
}
