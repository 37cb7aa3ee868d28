package rollouts

import (
	"context"
	"slices"
	"strings"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/fleet"
	"ringwall/internal/rollout"
)

// The signals that changed and unchanged hosts are compared by. Their number
// divides the chance of a false alarm, so it is fixed.
const (
	signalRestart     = "agent-restart"
	signalUnit        = "unit-failed"
	signalLost        = "lost"
	signalAttestation = "attestation"
	signalProbe       = "probe-failed" // of the host's own
)

func signals() []string {
	return []string{signalRestart, signalUnit, signalLost, signalAttestation, signalProbe}
}

// Hits that are evidence by themselves.
const (
	hitFlip    = "flip"
	hitRefused = "refused"
)

// silentAfter is how long a host that waits for the server may not be heard of.
const silentAfter = 3 * Heartbeat

// watched is what is known of the hosts of a rollout.
type watched struct {
	paged map[string]bool // codes of reasons that people were told
	hosts map[string]*rollout.Record
	hits  map[string]map[string]rollout.Hit // by host and signal
	now   map[string]*fleet.Host            // as they are
	step  rollout.Step                      // of this round
	asks  *prober
	check *checked
	// blind: this process has not been there for long enough to know who is silent.
	blind bool

	coverage     float64
	coverageRing int
	coverageAt   time.Time
	incidents    []string
	incidentsAt  time.Time
}

// watch reads what is remembered, once, and what is now. Hits are read each
// time: other replicas add to them.
func (r *run) watch(ctx context.Context, x *entry) (*watched, error) {
	w := r.state[x.key()]
	if w == nil {
		w = &watched{asks: newProber(r.MayAsk)}
	}
	if err := r.load(ctx, x, w); err != nil {
		return nil, err
	}
	w.blind = r.Now().Sub(r.since) < 2*silentAfter && w.awaits(r.since)
	r.state[x.key()] = w
	return w, nil
}

// awaits says whether hosts have not come back that were there before a time.
func (w *watched) awaits(since time.Time) bool {
	for id := range w.hosts {
		if h := w.now[id]; h != nil && !h.Online && h.Seen.Before(since) {
			return true
		}
	}
	return false
}

// silent says whether a host that should be heard of is not. As long as the
// server was away itself, nobody is.
func (w *watched) silent(h *fleet.Host, now time.Time) bool {
	return !w.blind && !h.Online && now.Sub(h.Seen) > silentAfter
}

// quiet is rollout.View.Quiet.
func (w *watched) quiet(now time.Time) float64 {
	others, silent := 0, 0
	for id, rec := range w.hosts {
		if h := w.now[id]; h != nil && rec.Applied.IsZero() && !rec.Entered.IsZero() {
			others++
			if w.silent(h, now) {
				silent++
			}
		}
	}
	if others == 0 {
		return 1
	}
	return float64(silent) / float64(others)
}

// cutOff is the share of other hosts that must be silent so that it is the
// server that is cut off, and silence is held against nobody.
const cutOff = 1.0 / 3

func (e *Engine) load(ctx context.Context, x *entry, w *watched) error {
	err := e.Store.Read(ctx, func(tx control.Tx) error {
		rec, err := records(tx)
		if err != nil {
			return err
		}
		if w.hosts == nil {
			all, err := rec.RolloutHosts(ctx, x.key())
			if err != nil {
				return err
			}
			w.hosts = make(map[string]*rollout.Record, len(all))
			for i := range all {
				w.hosts[all[i].Host] = &all[i]
			}
		}
		hits, err := rec.RolloutHits(ctx, x.key())
		if err != nil {
			return err
		}
		w.hits = map[string]map[string]rollout.Hit{}
		for _, h := range hits {
			w.addHit(h)
		}
		return nil
	})
	if err != nil {
		return err
	}
	all, err := e.Fleet.Hosts(ctx, x.scope())
	if err != nil {
		return err
	}
	w.now = make(map[string]*fleet.Host, len(all))
	for i := range all {
		if !all[i].Revoked {
			w.now[all[i].ID] = &all[i]
		}
	}
	return nil
}

// fresh is a hit if there is none like it.
func (w *watched) fresh(h rollout.Hit) []rollout.Hit {
	if _, old := w.hits[h.Host][h.Signal]; old {
		return nil
	}
	return []rollout.Hit{h}
}

func (w *watched) addHit(h rollout.Hit) {
	if w.hits[h.Host] == nil {
		w.hits[h.Host] = map[string]rollout.Hit{}
	}
	w.hits[h.Host][h.Signal] = h
}

// observe stores what hosts show for the first time, before anything is decided
// by it.
func (r *run) observe(ctx context.Context, x *entry, w *watched, now time.Time) error {
	changed, hits := r.look(x, w, now)
	hits = append(hits, w.told(r.signals)...)
	if len(changed)+len(hits) == 0 {
		return nil
	}
	err := r.store.Write(ctx, func(tx control.Tx) error {
		if _, err := unchanged(ctx, tx, x); err != nil {
			return err
		}
		rec, err := records(tx)
		if err != nil {
			return err
		}
		if err := rec.PutRolloutHosts(ctx, x.key(), changed); err != nil {
			return err
		}
		return rec.AddRolloutHits(ctx, x.key(), hits)
	})
	if err != nil {
		return r.settled(err)
	}
	w.take(changed, hits)
	return nil
}

// told are the signals that are new to hosts of the rollout, one of each.
func (w *watched) told(all []fleet.Signal) (out []rollout.Hit) {
	seen := map[[2]string]bool{}
	for _, s := range all {
		rec := w.hosts[s.Host]
		k := [2]string{s.Host, s.Name}
		if rec == nil || rec.Entered.IsZero() || s.At.Before(rec.Entered) || seen[k] || !slices.Contains(signals(), s.Name) {
			continue
		}
		if _, old := w.hits[s.Host][s.Name]; !old {
			seen[k] = true
			out = append(out, rollout.Hit{Host: s.Host, Signal: s.Name, At: s.At, Text: clip(s.Text, maxText)})
		}
	}
	return out
}

func (w *watched) take(changed []rollout.Record, hits []rollout.Hit) {
	for i := range changed {
		w.hosts[changed[i].Host] = &changed[i]
	}
	for _, h := range hits {
		w.addHit(h)
	}
}

// look finds what is new: hosts that came, hosts that applied the change, and
// first hits.
func (e *Engine) look(x *entry, w *watched, now time.Time) (changed []rollout.Record, hits []rollout.Hit) {
	if x.at(rollout.Proposed) {
		return nil, nil
	}
	plan := x.plan()
	cut := w.quiet(now) > cutOff
	joins := x.at(rollout.Running) || x.at(rollout.Done)
	for id, h := range w.now {
		var rec rollout.Record
		known := w.hosts[id]
		switch {
		case known != nil:
			rec = *known
		case !joins || !x.r.selects(h.Labels):
			continue
		default:
			rec = rollout.Record{Host: id, Ring: plan.Join(id, x.r.Status.Ring)}
		}
		fresh := known == nil
		if rec.Entered.IsZero() && h.Online {
			rec.Entered, rec.Base, fresh = now, baseOf(h), true
		}
		if rec.Applied.IsZero() && !rec.Admitted.IsZero() && h.Report.Manifest == x.r.Manifest {
			rec.Applied, fresh = h.Report.At, true
			if rec.Applied.Before(rec.Admitted) {
				rec.Applied = now
			}
		}
		if fresh {
			changed = append(changed, rec)
		}
		if lost := w.silent(h, now); lost && !cut && !rec.Entered.IsZero() {
			hits = append(hits, w.fresh(rollout.Hit{Host: id, Signal: signalLost, At: now, Text: "last heard of " + h.Seen.UTC().Format(time.RFC3339)})...)
		}
		for _, hit := range hitsOf(x, &rec, h) {
			hits = append(hits, w.fresh(hit)...)
		}
	}
	slices.SortFunc(changed, func(a, b rollout.Record) int { return strings.Compare(a.Host, b.Host) })
	return changed, hits
}

func baseOf(h *fleet.Host) rollout.Base {
	return rollout.Base{Boot: h.Report.Boot, AgentStarts: h.Report.AgentStarts, FailedUnits: h.Report.FailedUnits}
}

// hitsOf is what speaks against the change in a host's report.
func hitsOf(x *entry, rec *rollout.Record, h *fleet.Host) (out []rollout.Hit) {
	if rec.Entered.IsZero() {
		return nil
	}
	hit := func(signal, text string, at time.Time) {
		out = append(out, rollout.Hit{Host: rec.Host, Signal: signal, At: at, Text: clip(text, maxText)})
	}
	p := &h.Report
	starts := p.AgentStarts
	if p.Boot == rec.Base.Boot {
		starts = max(p.AgentStarts, rec.Base.AgentStarts) - rec.Base.AgentStarts
	} else if starts > 0 {
		starts-- // the boot's own
	}
	if starts > 0 {
		hit(signalRestart, "the agent was started again", p.At)
	}
	for _, u := range p.FailedUnits {
		if !slices.Contains(rec.Base.FailedUnits, u) {
			hit(signalUnit, u, p.At)
			break
		}
	}
	if rec.Admitted.IsZero() {
		return out
	}
	if p.Manifest == x.r.Manifest && p.Flips > 0 {
		hit(hitFlip, "the agent counts denials that the bundle before allows", p.At)
	}
	if (p.Phase == fleet.Reverted || p.Phase == fleet.Refused) && p.Failed == x.r.Manifest && p.At.After(rec.Admitted) {
		hit(hitRefused, string(p.Phase)+": "+p.Reason, p.At)
	}
	return out
}

// view is what the rules decide by.
func (r *run) view(ctx context.Context, x *entry, w *watched, now time.Time) (*rollout.View, error) {
	v := r.members(x, w, now)
	if err := r.readStops(ctx, x, v, now); err != nil {
		return nil, err
	}
	if !x.at(rollout.Running) {
		return v, nil
	}
	v.Probes = w.asks.answers(ctx, x.r.Probes, now)
	if err := r.cover(ctx, x, w, now); err != nil {
		return nil, err
	}
	v.Coverage = w.coverage
	if r.Incidents != nil && now.Sub(w.incidentsAt) >= lookEvery {
		open, err := r.Incidents(ctx, x.scope(), x.r.Status.Epoch)
		if err != nil {
			return nil, err
		}
		w.incidents, w.incidentsAt = open, now
	}
	v.Incidents = w.incidents
	return v, nil
}

// Pauses between questions that cost much.
const (
	lookEvery  = 5 * time.Second
	coverEvery = 30 * time.Second
)

// cover asks how much of what the next ring runs was seen under the change.
// Without an inventory it is nothing.
func (r *run) cover(ctx context.Context, x *entry, w *watched, now time.Time) error {
	at := x.r.Status.Ring
	plan := x.plan()
	if r.Inventory == nil || x.r.Status.Baking.IsZero() || at+1 >= len(plan.Rings) || plan.Rings[at].Bake.Coverage == 0 {
		w.coverage = 0
		return nil
	}
	if w.coverageRing == at && now.Sub(w.coverageAt) < coverEvery {
		return nil
	}
	var of, by []string
	since := now
	for id, rec := range w.hosts {
		switch {
		case w.now[id] == nil:
		case rec.Ring == at+1:
			of = append(of, id)
		case rec.Ring <= at && !rec.Applied.IsZero():
			by = append(by, id)
			if rec.Applied.Before(since) {
				since = rec.Applied
			}
		}
	}
	c, err := r.Inventory.Coverage(ctx, of, by, since)
	if err != nil {
		return err
	}
	w.coverage = 0
	if c.Uses > 0 {
		w.coverage = float64(c.UsesCovered) / float64(c.Uses)
	}
	w.coverageRing, w.coverageAt = at, now
	return nil
}

func (e *Engine) readStops(ctx context.Context, x *entry, v *rollout.View, now time.Time) error {
	var s stops
	err := e.Store.Read(ctx, func(tx control.Tx) (err error) {
		s, err = stopsAt(ctx, tx, x.scope(), now)
		return err
	})
	v.Halt, v.Freeze = s.halt, s.freeze
	if v.Halt == "" {
		v.Halt = x.r.Status.Paused
	}
	return err
}

// members are the hosts and what happened to them.
func (e *Engine) members(x *entry, w *watched, now time.Time) *rollout.View {
	v := &rollout.View{Members: make([]rollout.Member, 0, len(w.hosts))}
	ids := make([]string, 0, len(w.hosts))
	for id := range w.hosts {
		if w.now[id] != nil {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	last := max(len(x.r.Status.rings())-1, 0)
	for _, id := range ids {
		rec, h := w.hosts[id], w.now[id]
		hits := w.hits[id]
		m := rollout.Member{
			Host: rollout.Host{ID: id, Stratum: h.Stratum(), Critical: h.Critical},
			Ring: min(rec.Ring, last), Admitted: rec.Admitted, Applied: rec.Applied,
			Online:  h.Online || now.Sub(h.Seen) < e.Offline,
			Silent:  !rec.Applied.IsZero() && w.silent(h, now),
			Refused: hits[hitRefused].Text, Back: x.back(h),
		}
		if _, flipped := hits[hitFlip]; flipped {
			m.Flips = int(min(max(h.Report.Flips, 1), 1<<30))
		}
		v.Members = append(v.Members, m)
	}
	v.Signals, v.Quiet = compare(w, ids, now), w.quiet(now)
	if w.blind {
		v.Blind = "the server was away or has just begun to look: hosts come back first"
	}
	return v
}

// taken is how long after an assignment a report may have been on its way.
const taken = 2 * time.Second

// back says whether a host that was sent back has no more of the change: it has
// the rollback, or asked since then and runs something else.
func (x *entry) back(h *fleet.Host) bool {
	s := x.r.Status
	if s.Phase != rollout.RollingBack && s.Phase != rollout.RolledBack || x.r.Rollback == nil {
		return false
	}
	switch p := &h.Report; {
	case p.Manifest == *x.r.Rollback || p.Epoch > s.Undo:
		return true
	case p.Manifest == x.r.Manifest || h.Assigned != *x.r.Rollback:
		return false
	default:
		return p.At.After(h.AssignedAt.Add(taken))
	}
}

// compare is every signal on every host. A host that is offline leaves the
// comparison, except for the signal that says that it is.
func compare(w *watched, ids []string, now time.Time) []rollout.Signal {
	out := make([]rollout.Signal, 0, len(signals()))
	for _, name := range signals() {
		s := rollout.Signal{Name: name, Subjects: make([]rollout.Subject, 0, len(ids))}
		for _, id := range ids {
			rec, h := w.hosts[id], w.now[id]
			if rec.Entered.IsZero() {
				continue
			}
			sub := rollout.Subject{ID: id, Entered: rec.Entered, Activated: rec.Applied, Hit: w.hits[id][name].At}
			if name != signalLost && w.silent(h, now) {
				sub.Left = h.Seen
			}
			s.Subjects = append(s.Subjects, sub)
		}
		out = append(out, s)
	}
	return out
}

// place gives every host its ring.
func (r *run) place(x *entry, w *watched, now time.Time) ([]rollout.Record, error) {
	plan := x.plan()
	place, err := plan.Place(candidates(x, w))
	if err != nil {
		return nil, err
	}
	out := make([]rollout.Record, 0, len(place))
	for id, ring := range place {
		rec := rollout.Record{Host: id, Ring: ring}
		if h := w.now[id]; h.Online {
			rec.Entered, rec.Base = now, baseOf(h)
		}
		out = append(out, rec)
	}
	slices.SortFunc(out, func(a, b rollout.Record) int { return strings.Compare(a.Host, b.Host) })
	return out, nil
}

// candidates are the hosts that the rollout is for, as the rules know hosts.
func candidates(x *entry, w *watched) []rollout.Host {
	var out []rollout.Host
	for id, h := range w.now {
		if x.r.selects(h.Labels) {
			out = append(out, rollout.Host{ID: id, Stratum: h.Stratum(), Critical: h.Critical})
		}
	}
	slices.SortFunc(out, func(a, b rollout.Host) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// ordered puts those first that must go back first.
func (r *run) ordered(as []fleet.Assignment) []fleet.Assignment {
	rank := map[string]int{}
	for i := range r.docs {
		if w := r.state[r.docs[i].key()]; w != nil {
			for k, id := range w.step.Return {
				rank[id] = k - len(w.step.Return)
			}
		}
	}
	slices.SortFunc(as, func(a, b fleet.Assignment) int {
		if rank[a.Host] != rank[b.Host] {
			return rank[a.Host] - rank[b.Host]
		}
		return strings.Compare(a.Host, b.Host)
	})
	return as
}

func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most]
	}
	return strings.ToValidUTF8(s, "?")
}
