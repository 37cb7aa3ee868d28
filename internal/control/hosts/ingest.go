package hosts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/incident"
	"ringwall/internal/integrity"
)

// Events is where what hosts report is stored; *store.Events is one.
type Events interface {
	AppendEvents(ctx context.Context, at time.Time, all []fleet.Event, positions []fleet.Position, node string, outbox []byte) error
	RecordRuns(ctx context.Context, all []fleet.Execution, p fleet.Position) (fresh int, err error)
	Position(ctx context.Context, host string, lane int) (*fleet.Position, error)
	Undelivered(ctx context.Context, node string, before time.Time, limit int) (ids []string, bodies [][]byte, err error)
	Delivered(ctx context.Context, id string) error
	RecordSignals(ctx context.Context, all []fleet.Signal) error
	SignalsSince(ctx context.Context, since time.Time) ([]fleet.Signal, error)
	PruneEvents(ctx context.Context, before time.Time) error
}

// Bounds of a batch and of a record.
const (
	maxRecords  = 1000
	maxRecord   = 16 << 10 // bytes
	maxPath     = 4096     // bytes
	maxName     = 256      // bytes of a kind, reason, code, name
	maxAncestry = 8
	maxNumber   = 1 << 62

	// gapGrace is how long numbers may be missing until they are taken for lost: a
	// batch that was overtaken comes within that.
	gapGrace = 2 * time.Second

	queue     = 256 // jobs that wait; more are put off
	mostAtOne = 4000
	busyPause = 50 * time.Millisecond
	fullPause = time.Second
)

// lane is how far one lane of a host is stored, as this replica knows it.
type lane struct {
	busy   bool // a batch is on its way
	loaded bool
	stream []byte
	upTo   uint64
	gap    uint64 // first number of a batch that came too early
	gapAt  time.Time
}

// job is a batch on its way to the disk.
type job struct {
	h         *host
	lane      int
	pos       fleet.Position
	events    []fleet.Event
	runs      []fleet.Execution
	incidents []incident.Event
	signals   []fleet.Signal
	done      chan error
}

type ingester struct {
	s    *Service
	jobs [2]chan *job // by lane
	kick chan struct{}
}

func newIngester(s *Service) *ingester {
	return &ingester{s: s, jobs: [2]chan *job{make(chan *job, queue), make(chan *job, queue)}, kick: make(chan struct{}, 1)}
}

// take stores a batch. Numbers that were stored already are passed over, so that
// a batch may come twice; numbers that are missing are waited for, and when they
// do not come, that is recorded and signalled.
func (s *Service) take(ctx context.Context, h *host, r *agentpb.IngestRequest) (*agentpb.IngestResponse, error) {
	n := int(r.GetLane()) - 1
	records := r.GetRecords()
	switch {
	case n != 0 && n != 1:
		return nil, fmt.Errorf("ingest: lane %d: %w", r.GetLane(), errs.Invalid)
	case len(r.GetStream()) != 16:
		return nil, fmt.Errorf("ingest: a stream of %d bytes: %w", len(r.GetStream()), errs.Invalid)
	case len(records) > maxRecords:
		return nil, fmt.Errorf("ingest: %d records (at most %d): %w", len(records), maxRecords, errs.Invalid)
	case r.GetFirst() == 0 || r.GetFirst() > maxNumber:
		return nil, fmt.Errorf("ingest: numbers begin at 1: %w", errs.Invalid)
	}
	j, answer, err := s.prepare(ctx, h, n, r)
	if err != nil || answer != nil {
		return answer, err
	}
	select {
	case s.ingest.jobs[n] <- j:
	default:
		s.finish(j, errs.Conflict) // nothing was stored
		return &agentpb.IngestResponse{Durable: j.before(), RetryUs: fullPause.Microseconds()}, nil
	}
	select {
	case err := <-j.done:
		if err != nil {
			return nil, err
		}
		return &agentpb.IngestResponse{Durable: j.pos.UpTo}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// before is how far the lane is stored without the job.
func (j *job) before() uint64 {
	j.h.mu.Lock()
	defer j.h.mu.Unlock()
	if l := &j.h.lanes[j.lane]; slices.Equal(l.stream, j.pos.Stream) {
		return l.upTo
	}
	return 0
}

// prepare decides what of a batch is new. It returns a job, or an answer when
// there is nothing to store now. The lane is busy until finish.
func (s *Service) prepare(ctx context.Context, h *host, n int, r *agentpb.IngestRequest) (*job, *agentpb.IngestResponse, error) {
	now := s.Now()
	h.mu.Lock()
	l := &h.lanes[n]
	if l.busy {
		defer h.mu.Unlock()
		return nil, &agentpb.IngestResponse{Durable: l.durable(r.GetStream()), RetryUs: busyPause.Microseconds()}, nil
	}
	l.busy = true
	known := l.loaded && (!s.Shared || slices.Equal(l.stream, r.GetStream()) && r.GetFirst() <= l.upTo+1)
	j := &job{h: h, lane: n, done: make(chan error, 1), pos: fleet.Position{Host: h.v.ID, Lane: n + 1, Stream: r.GetStream()}}
	where := h.v.Resource
	h.mu.Unlock()
	free := func() {
		h.mu.Lock()
		l.busy = false
		h.mu.Unlock()
	}
	if !known { // or another replica knows better
		if err := s.loadLane(ctx, h, n); err != nil {
			free()
			return nil, nil, err
		}
	}
	h.mu.Lock()
	durable, fresh := l.durable(r.GetStream()), len(l.stream) > 0 && !slices.Equal(l.stream, r.GetStream())
	early := r.GetFirst() > durable+1 && len(r.GetRecords()) > 0
	if early && !fresh && (l.gap != r.GetFirst() || now.Sub(l.gapAt) < gapGrace) {
		if l.gap != r.GetFirst() {
			l.gap, l.gapAt = r.GetFirst(), now
		}
		l.busy = false
		h.mu.Unlock()
		return nil, &agentpb.IngestResponse{Durable: durable, RetryUs: (gapGrace / 2).Microseconds()}, nil
	}
	h.mu.Unlock()
	records := r.GetRecords()
	first := r.GetFirst()
	if first <= durable { // came before, at least in part
		again := min(uint64(len(records)), durable+1-first)
		s.counters.duplicates.Add(again)
		records, first = records[again:], first+again
	}
	if len(records) == 0 {
		free()
		return nil, &agentpb.IngestResponse{Durable: durable}, nil
	}
	bound, rate := &h.use.blocks, s.Limits.Blocks
	if n == fleet.LaneInventory-1 {
		bound, rate = &h.use.runs, s.Limits.Runs
		if wait := h.use.items.take(s.Limits.NewItems, 0, now); wait > 0 {
			s.within(h, &h.use.items, s.Limits.NewItems, 0) //nolint:errcheck // counts it
			free()
			return nil, &agentpb.IngestResponse{Durable: durable, RetryUs: wait.Microseconds()}, nil
		}
	}
	if err := s.within(h, bound, rate, float64(len(records))); err != nil {
		limited, _ := errors.AsType[errLimited](err)
		free()
		return nil, &agentpb.IngestResponse{Durable: durable, RetryUs: limited.wait.Microseconds()}, nil
	}
	j.pos.UpTo = first + uint64(len(records)) - 1
	s.counters.malformed.Add(j.read(records, first, now.UTC(), where.Parent().String()))
	if fresh {
		j.notice(first, now.UTC(), where.Parent().String(), SignalSpool, "the host's spool was made anew: what it had not sent is gone", 1)
	}
	if early {
		missing := first - durable - 1
		s.counters.gaps.Add(1)
		j.notice(first, now.UTC(), where.Parent().String(), SignalGap, fmt.Sprintf("%d records are missing before number %d", missing, first), missing)
	}
	return j, nil, nil
}

func (l *lane) durable(stream []byte) uint64 {
	if slices.Equal(l.stream, stream) {
		return l.upTo
	}
	return 0
}

func (s *Service) loadLane(ctx context.Context, h *host, n int) error {
	p, err := s.Events.Position(ctx, h.v.ID, n+1)
	if err != nil && !errors.Is(err, errs.NotFound) {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l := &h.lanes[n]
	l.loaded = true
	if p != nil && (!slices.Equal(l.stream, p.Stream) || p.UpTo > l.upTo) {
		l.stream, l.upTo = p.Stream, p.UpTo
	}
	return nil
}

// finish ends a job: what was stored is known from now on.
func (s *Service) finish(j *job, err error) {
	j.h.mu.Lock()
	l := &j.h.lanes[j.lane]
	l.busy = false
	if err == nil {
		l.stream, l.upTo, l.gap = j.pos.Stream, j.pos.UpTo, 0
	}
	j.h.mu.Unlock()
	if err == nil {
		s.counters.records.Add(uint64(len(j.events) + len(j.runs)))
		if len(j.signals) > 0 {
			for _, sig := range j.signals {
				for _, fn := range s.hooks.signal {
					fn(sig)
				}
			}
		}
	}
	j.done <- err
}

// read turns records into what is stored of them. What is not understood is
// noted, counted, and otherwise left out: it must not hold up what follows.
func (j *job) read(records []*agentpb.Record, first uint64, now time.Time, scope string) (malformed uint64) {
	for i, r := range records {
		e := fleet.Event{Host: j.pos.Host, Stream: j.pos.Stream, Number: first + uint64(i), Received: now, At: stamp(r.GetAtUs())}
		if proto.Size(r) > maxRecord || !j.record(&e, r, scope) {
			malformed++
		}
	}
	if malformed > 0 {
		j.h.use.malformed.Add(malformed)
		j.notice(first, now, scope, SignalMalformed, fmt.Sprintf("%d records from number %d on were not understood", malformed, first), malformed)
	}
	return malformed
}

// record takes one record of its lane.
func (j *job) record(e *fleet.Event, r *agentpb.Record, scope string) bool {
	if x := r.GetExecution(); x != nil {
		if j.lane != fleet.LaneInventory-1 || len(x.GetSha256()) != sha256.Size || !within(maxPath, x.GetPath()) || x.GetPath() == "" || !within(maxName, x.GetKind()) || !within(maxText, x.GetSigner()) {
			return false
		}
		j.runs = append(j.runs, fleet.Execution{
			Host: e.Host, Kind: x.GetKind(), SHA256: integrity.Digest(x.GetSha256()), Path: x.GetPath(), Signer: x.GetSigner(), Count: x.GetCount(), At: e.Received,
		})
		return true
	}
	if lost := r.GetLost(); lost != nil { // both lanes may have lost something
		e.What, e.Name = "lost", "lost"
		if !within(maxText, lost.GetWhy()) {
			return false
		}
		j.notice(e.Number, e.Received, scope, "lost", fmt.Sprintf("the host lost %d records: %s", lost.GetRecords(), lost.GetWhy()), lost.GetRecords())
		return j.keep(e, r)
	}
	if j.lane != fleet.LaneBlocks-1 {
		return false
	}
	switch {
	case r.GetBlock() != nil:
		b := r.GetBlock()
		if !j.block(e, b, scope) {
			return false
		}
	case r.GetNotice() != nil:
		n := r.GetNotice()
		if !within(maxName, n.GetCode()) || !within(4*maxText, n.GetText()) || n.GetCode() == "" {
			return false
		}
		e.What, e.Name = "notice", n.GetCode()
		j.incidents = append(j.incidents, j.noticeEvent(e.Number, e.Received, scope, n.GetCode(), n.GetText(), 1))
	case r.GetSignal() != nil:
		sig := r.GetSignal()
		if !within(maxName, sig.GetName()) || !within(maxText, sig.GetText()) || sig.GetName() == "" {
			return false
		}
		e.What, e.Name = "signal", sig.GetName()
		j.signals = append(j.signals, fleet.Signal{Host: e.Host, Name: sig.GetName(), Text: sig.GetText(), At: e.Received})
	default:
		return false
	}
	return j.keep(e, r)
}

func (j *job) keep(e *fleet.Event, r *agentpb.Record) bool {
	if j.lane != fleet.LaneBlocks-1 {
		return true
	}
	b, err := proto.Marshal(r)
	if err != nil {
		return false
	}
	e.Body = b
	j.events = append(j.events, *e)
	return true
}

func (j *job) block(e *fleet.Event, b *agentpb.Block, scope string) bool {
	if len(b.GetSha256()) != 0 && len(b.GetSha256()) != sha256.Size || len(b.GetAncestry()) > maxAncestry || !within(maxPath, b.GetPath()) || b.GetReason() == "" ||
		!within(maxName, b.GetKind(), b.GetReason(), b.GetMode(), b.GetUnit()) || !within(maxText, b.GetSigner(), b.GetRule(), b.GetRelease()) {
		return false
	}
	e.What, e.Name, e.Path = "block", b.GetReason(), b.GetPath()
	copy(e.SHA256[:], b.GetSha256())
	i := incident.Event{
		ID: j.eventID(e.Number), Scope: scope, Host: e.Host, Kind: b.GetKind(), SHA256: hex.EncodeToString(b.GetSha256()), Signer: b.GetSigner(), Path: b.GetPath(),
		Rule: b.GetRule(), Reason: b.GetReason(), Mode: b.GetMode(), Epoch: b.GetEpoch(), Flip: b.GetFlip(), Count: max(1, b.GetCount()), At: e.Received,
	}
	if a := b.GetAncestry(); len(a) > 0 {
		i.Parent = a[0].GetPath()
	}
	j.incidents = append(j.incidents, i)
	return true
}

func (j *job) eventID(number uint64) string {
	return fmt.Sprintf("%s/%x/%d", j.pos.Host, j.pos.Stream, number)
}

func (j *job) noticeEvent(number uint64, at time.Time, scope, code, text string, count uint64) incident.Event {
	return incident.Event{
		ID: j.eventID(number) + "/" + code, Scope: scope, Host: j.pos.Host, Kind: KindNotice, Reason: code, Rule: text, Mode: "audit", Count: max(1, count), At: at,
	}
}

// KindNotice is the kind of events that are no blocks but what an agent, or the
// server about a host's records, has to say: Reason is the code, Rule the text.
const KindNotice = "notice"

// notice notes something that the server itself saw about a host's records.
func (j *job) notice(number uint64, at time.Time, scope, code, text string, count uint64) {
	j.signals = append(j.signals, fleet.Signal{Host: j.pos.Host, Name: code, Text: text, At: at})
	j.incidents = append(j.incidents, j.noticeEvent(number, at, scope, code, text, count))
}

// within reports whether texts are short enough.
func within(most int, texts ...string) bool {
	return !slices.ContainsFunc(texts, func(t string) bool { return len(t) > most })
}

// run stores jobs until ctx ends, one loop a lane, and hands blocks on.
func (g *ingester) run(ctx context.Context) {
	ended := make(chan struct{}, 3)
	go func() { g.blocks(ctx); ended <- struct{}{} }()
	go func() { g.inventory(ctx); ended <- struct{}{} }()
	go func() { g.deliver(ctx); ended <- struct{}{} }()
	for range 3 {
		<-ended
	}
}

// blocks stores what came meanwhile in one transaction.
func (g *ingester) blocks(ctx context.Context) {
	s := g.s
	for {
		var batch []*job
		select {
		case <-ctx.Done():
			g.drain(ctx, 0)
			return
		case j := <-g.jobs[0]:
			batch = append(batch, j)
		}
		for size := len(batch[0].events); size < mostAtOne; {
			select {
			case j := <-g.jobs[0]:
				batch, size = append(batch, j), size+len(j.events)
				continue
			default:
			}
			break
		}
		err := g.store(ctx, batch)
		if err != nil {
			s.Log.WarnContext(ctx, "events_not_stored", slog.Int("hosts", len(batch)), slog.Any("error", err))
		}
		for _, j := range batch {
			s.finish(j, err)
		}
		select {
		case g.kick <- struct{}{}:
		default:
		}
	}
}

func (g *ingester) store(ctx context.Context, batch []*job) error {
	var events []fleet.Event
	var positions []fleet.Position
	var incidents []incident.Event
	var signals []fleet.Signal
	for _, j := range batch {
		events, positions = append(events, j.events...), append(positions, j.pos)
		incidents, signals = append(incidents, j.incidents...), append(signals, j.signals...)
	}
	var outbox []byte
	if len(incidents) > 0 && g.s.Blocks != nil {
		var err error
		if outbox, err = json.Marshal(incidents); err != nil {
			return err
		}
	}
	if len(signals) > 0 { // before: rather twice than never
		if err := g.s.Events.RecordSignals(ctx, signals); err != nil {
			return err
		}
	}
	return g.s.Events.AppendEvents(ctx, g.s.Now(), events, positions, g.s.node, outbox)
}

// inventory stores what ran, and what the server noticed about it.
func (g *ingester) inventory(ctx context.Context) {
	s := g.s
	for {
		select {
		case <-ctx.Done():
			g.drain(ctx, 1)
			return
		case j := <-g.jobs[1]:
			err := g.storeRuns(ctx, j)
			if err != nil {
				s.Log.WarnContext(ctx, "inventory_not_stored", slog.String("host", j.pos.Host), slog.Any("error", err))
			}
			s.finish(j, err)
		}
	}
}

func (g *ingester) storeRuns(ctx context.Context, j *job) error {
	if len(j.incidents) > 0 { // notices only; before: rather twice than never
		notices := &job{h: j.h, pos: j.pos, incidents: j.incidents, signals: j.signals}
		if err := g.storeNotices(ctx, notices); err != nil {
			return err
		}
	}
	fresh, err := g.s.Events.RecordRuns(ctx, j.runs, j.pos)
	if err != nil {
		return err
	}
	if over := j.h.use.items.charge(g.s.Limits.NewItems, float64(fresh), g.s.Now()); over {
		g.s.signal(ctx, fleet.Signal{Host: j.pos.Host, Name: SignalFlood, Text: "many executables that nobody had seen before", At: g.s.Now().UTC()})
	}
	return nil
}

func (g *ingester) storeNotices(ctx context.Context, j *job) error {
	if err := g.s.Events.RecordSignals(ctx, j.signals); err != nil {
		return err
	}
	if g.s.Blocks == nil {
		return nil
	}
	outbox, err := json.Marshal(j.incidents)
	if err == nil {
		err = g.s.Events.AppendEvents(ctx, g.s.Now(), nil, nil, g.s.node, outbox)
	}
	return err
}

// drain refuses what waits when the process ends: hosts send it again.
func (g *ingester) drain(ctx context.Context, lane int) {
	for {
		select {
		case j := <-g.jobs[lane]:
			g.s.finish(j, ctx.Err())
		default:
			return
		}
	}
}

const (
	deliverEvery = 5 * time.Second
	// orphaned is how old another process's batch must be to be handed on by this
	// one.
	orphaned    = time.Minute
	deliverMany = 20
)

// deliver hands stored blocks on, in order, and forgets that it has to. A batch
// that fails is tried again, so that what follows waits: nothing is passed over.
func (g *ingester) deliver(ctx context.Context) {
	if g.s.Blocks == nil {
		<-ctx.Done()
		return
	}
	pause := time.NewTicker(deliverEvery)
	defer pause.Stop()
	before := g.s.Now() // at the start everything that was left is handed on, if no one else is there
	if g.s.Shared {
		before = before.Add(-orphaned)
	}
	for {
		for more := true; more && ctx.Err() == nil; {
			n, err := g.deliverSome(ctx, before)
			if err != nil && ctx.Err() == nil {
				g.s.counters.sinkErrors.Add(1)
				g.s.Log.WarnContext(ctx, "blocks_not_handed_on", slog.Any("error", err))
			}
			more = err == nil && n == deliverMany
		}
		select {
		case <-ctx.Done():
			return
		case <-g.kick:
		case <-pause.C:
		}
		before = g.s.Now().Add(-orphaned)
	}
}

func (g *ingester) deliverSome(ctx context.Context, before time.Time) (int, error) {
	ids, bodies, err := g.s.Events.Undelivered(ctx, g.s.node, before, deliverMany)
	if err != nil {
		return 0, err
	}
	for i, id := range ids {
		var all []incident.Event
		if err := json.Unmarshal(bodies[i], &all); err != nil {
			g.s.Log.ErrorContext(ctx, "stored_blocks_damaged", slog.String("id", id), slog.Any("error", err))
		} else if err := g.s.Blocks(ctx, all); err != nil {
			return i, err
		}
		if err := g.s.Events.Delivered(ctx, id); err != nil {
			return i, err
		}
	}
	return len(ids), nil
}
