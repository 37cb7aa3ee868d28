package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/agentpb"
	"ringwall/internal/enforce"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// How the link stands.
const (
	linkJoining     = "joining"
	linkConnecting  = "connecting"
	linkConnected   = "connected"
	linkUnreachable = "unreachable"
	linkExpired     = "expired"
)

// Signals that a rollout watches.
const (
	signalReverted = "reverted"
	signalRestart  = "agent-restart"
	signalUnit     = "unit-failed"
)

// fleetState is how this host stands, from what the kernel really enforces.
func (a *Agent) fleetState() *agentpb.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &agentpb.State{
		BootId: bootID(), StartedUs: a.started.UnixMicro(), AgentVersion: clip(a.opts.Version, 128), EnforcementProven: a.canary.OK,
		Phase: a.phase(), Epoch: 0, Reason: a.outcome.Reason, Flips: uint64(a.pipe.flipCount()), //nolint:gosec // a count
	}
	if !a.outcome.Failed.IsZero() {
		s.Failed = a.outcome.Failed[:]
	}
	var problems []string
	if l := a.loaded; l != nil {
		s.Epoch, s.Mode, s.AppliedUs = l.policy.Epoch, l.policy.Modes[integrity.KindExec].String(), a.applied.UnixMicro()
		if l.own {
			m := l.given.Manifest
			s.Manifest = m[:]
		} else if !l.given.isZero() {
			problems = append(problems, "a policy that was handed in on the host itself is in force")
		}
		for _, x := range l.skipped {
			problems = append(problems, "not believed: "+x.What+": "+x.Why)
		}
		k, err := a.watcher.Status()
		if err != nil {
			problems = append(problems, err.Error())
		} else {
			d := a.link.table.of(l.compiled.Table, &k)
			s.KernelTable = d[:]
		}
	}
	if state, text := a.standing(); state != StateEnforcing && state != StateAuditing {
		problems = append([]string{state + ": " + text}, problems...)
	}
	if n := len(a.problem); n > 0 {
		problems = append(problems, a.problem[n-1])
	}
	a.link.describe(s, problems)
	return s
}

// phase is where this host stands with its manifest. a.mu is held.
func (a *Agent) phase() agentpb.State_Phase {
	switch {
	case a.trial != nil:
		return agentpb.State_PHASE_PROVISIONAL
	case a.outcome.Phase == phaseReverted:
		return agentpb.State_PHASE_REVERTED
	case a.outcome.Phase == phaseRefused:
		return agentpb.State_PHASE_REFUSED
	case a.loaded != nil && a.loaded.own:
		return agentpb.State_PHASE_CONFIRMED
	}
	return agentpb.State_PHASE_NONE
}

// describe adds what the link knows.
func (l *link) describe(s *agentpb.State, problems []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.AgentStarts, s.Isolated, s.FailedUnits = l.starts, l.isolated, l.units
	if l.problem != "" {
		problems = append(problems, l.problem)
	}
	if l.isolation != nil {
		problems = append(problems, "isolation: "+l.isolation.Error())
	}
	s.Problem = clip(strings.Join(problems, "\n"), maxReason)
	if l.joined != nil {
		s.Labels = ownLabels(l.joined.Labels)
	}
	for _, p := range []*spool{l.blocks, l.inv} {
		if p != nil {
			b, d := p.waiting()
			s.SpooledBytes += b
			s.Dropped += d
		}
	}
}

// linkStatus is the link for `ringwall status`; nil: this host is in no fleet.
func (a *Agent) linkStatus() *LinkStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.linkStatusLocked()
}

func (a *Agent) linkStatusLocked() *LinkStatus {
	l := a.link
	l.mu.Lock()
	defer l.mu.Unlock()
	j := l.joined
	if j == nil {
		return nil
	}
	out := &LinkStatus{Server: j.Server, Host: j.Host, Name: j.Name, Resource: j.Resource, Isolated: l.isolated, Reason: a.outcome.Reason, State: linkConnected}
	_, out.CA, _ = j.pool() // shown only
	out.Phase = strings.ToLower(strings.TrimPrefix(a.phase().String(), "PHASE_"))
	if a.loaded != nil && a.loaded.own {
		out.Manifest = a.loaded.given.Manifest.String()
	}
	if !a.outcome.Failed.IsZero() {
		out.Failed = a.outcome.Failed.String()
	}
	if a.loaded != nil {
		out.LocalItems = a.loaded.local
	}
	if !l.answered.IsZero() {
		t := l.answered
		out.Answered = &t
	}
	for _, p := range []*spool{l.blocks, l.inv} {
		if p != nil {
			b, d := p.waiting()
			out.Spooled += b
			out.Dropped += d
		}
	}
	switch {
	case j.Host == "":
		out.State = linkJoining
	case l.failure != nil:
		out.State, out.Error = linkUnreachable, l.failure.Error()
	case l.answered.IsZero():
		out.State = linkConnecting
	}
	if pair, err := j.keyPair(); err == nil {
		end := pair.Leaf.NotAfter
		if out.Expires = &end; a.opts.Now().After(end) {
			out.State = linkExpired
		}
	}
	return out
}

// bootID is the kernel's id of this boot, 16 bytes; nil if it cannot be read.
func bootID() []byte {
	b, err := readFile("/proc/sys/kernel/random/boot_id", 64)
	if err != nil {
		return nil
	}
	id, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", ""))
	if err != nil || len(id) != 16 {
		return nil
	}
	return id
}

// countStart counts the agent's starts since the boot: the run directory is empty
// after one.
func (a *Agent) countStart() uint32 {
	name := filepath.Join(a.opts.RunDir, "starts")
	n := uint64(0)
	if b, err := readFile(name, 32); err == nil {
		n, _ = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 31) // 0 if it cannot be read
	}
	n++
	_ = host.WriteFile(name, fmt.Appendf(nil, "%d\n", n), 0o600) // a count for people
	return uint32(n)
}

// tableDigest is the SHA-256 of the compiled table, made once for each.
type tableDigest struct {
	table  *integrity.Table
	digest integrity.Digest
}

// of is the digest of the table that the kernel enforces. The kernel names the
// policy, the epoch, the number of contents and the modes that it decides by: when
// these are not those of the table that the agent put there, the digest is of what
// the kernel says, and equals no table's. a.mu is held.
func (d *tableDigest) of(t *integrity.Table, k *enforce.Status) integrity.Digest {
	if k.Epoch != t.Epoch || k.Policy != t.PolicyDigest || k.Entries != uint64(len(t.Entries)) || k.Modes != t.Modes || k.Process != t.Process {
		return sha256.Sum256(fmt.Appendf(nil, "another table: %v %d %d %v %v", k.Policy, k.Epoch, k.Entries, k.Modes, k.Process))
	}
	if d.table != t {
		d.table, d.digest = t, digestTable(t)
	}
	return d.digest
}

func digestTable(t *integrity.Table) integrity.Digest {
	h := sha256.New()
	fmt.Fprintf(h, "ringwall table 1\n%v %d %v %v %d\n", t.PolicyDigest, t.Epoch, t.Modes, t.Process, len(t.Entries))
	for i := range t.Interpreters {
		fmt.Fprintf(h, "%#v\n", t.Interpreters[i])
	}
	keys := slices.SortedFunc(maps.Keys(t.Entries), func(a, b integrity.Key) int {
		return cmp.Or(cmp.Compare(a.Space, b.Space), slices.Compare(a.Digest[:], b.Digest[:]))
	})
	var b []byte
	for _, k := range keys {
		e := t.Entries[k]
		b = append(binary.BigEndian.AppendUint32(b[:0], uint32(k.Space)), k.Digest[:]...)
		b = binary.BigEndian.AppendUint16(b, uint16(e.Kinds))
		b = binary.BigEndian.AppendUint16(b, uint16(e.Roles))
		h.Write(append(b, e.Interpreter))
	}
	return integrity.Digest(h.Sum(nil))
}

// record keeps a record of the event log for the server. Called by the pipeline.
func (l *link) record(r *Record) {
	l.mu.Lock()
	s := l.blocks
	l.mu.Unlock()
	if s == nil {
		return
	}
	out := &agentpb.Record{AtUs: r.Time.UnixMicro()}
	switch r.Type {
	case typeGap:
		out.What = &agentpb.Record_Lost{Lost: &agentpb.Lost{Records: r.Lost, Why: clip(r.Reason, 256)}}
	case typeNotice:
		out.What = &agentpb.Record_Notice{Notice: &agentpb.Notice{Code: r.Reason, Text: clip(r.Text, 4096)}}
	default:
		out.What = &agentpb.Record_Block{Block: l.block(r)}
	}
	s.add(out)
}

func (l *link) block(r *Record) *agentpb.Block {
	b := &agentpb.Block{
		Kind: r.Kind, Path: clip(r.Path, 4096), Signer: clip(r.Signer, 1024), Rule: clip(r.Rule, 1024), Reason: r.Reason, Mode: "audit",
		Flip: r.Flip, Count: uint64(max(r.Count, 1)), Event: r.Seq,
	}
	if r.Type == typeBlock {
		b.Mode = "enforce"
	}
	if r.Policy != nil {
		b.Epoch = r.Policy.Epoch
	}
	if k, err := integrity.ParseKey(r.Digest); r.Digest != "" && err == nil {
		b.Sha256, b.Release = l.contentOf(k)
	}
	if p := r.Process; p != nil {
		b.Uid = p.UID
		b.Unit = unitOf(p.Cgroup)
		b.Ancestry = append(b.Ancestry, &agentpb.Process{Path: clip(cmp.Or(p.Program, p.Name), 4096), Pid: p.PID, Uid: p.UID})
	}
	for _, x := range r.Ancestors[:min(len(r.Ancestors), 7)] {
		b.Ancestry = append(b.Ancestry, &agentpb.Process{Path: clip(x.Comm, 64), Pid: x.PID})
	}
	return b
}

// contentOf is the SHA-256 of content that the kernel knows by another digest, and
// the release that it belongs to, as far as they are known.
func (l *link) contentOf(k integrity.Key) (sum []byte, release string) {
	if k.Space == integrity.SpaceSHA256 {
		sum = k.Digest[:]
	}
	in := l.a.pipe.current.Load()
	if in == nil {
		return sum, ""
	}
	o := in.compiled.Object(integrity.KindExec, k)
	if sum == nil && !o.SHA256.IsZero() {
		sum = o.SHA256[:]
	}
	for _, m := range o.Memberships {
		if !m.Origin.Release.IsZero() {
			return sum, m.Origin.Release.String()
		}
	}
	return sum, ""
}

// unitOf is the systemd unit that a cgroup belongs to, or the cgroup.
func unitOf(cgroup string) string {
	parts := strings.Split(cgroup, "/")
	for _, p := range slices.Backward(parts) {
		if strings.HasSuffix(p, ".service") || strings.HasSuffix(p, ".scope") {
			return clip(p, 256)
		}
	}
	return clip(cgroup, 256)
}

// signal keeps something that a rollout watches.
func (l *link) signal(name, text string) {
	l.mu.Lock()
	s := l.blocks
	l.mu.Unlock()
	if s != nil {
		s.add(&agentpb.Record{AtUs: l.a.opts.Now().UnixMicro(), What: &agentpb.Record_Signal{Signal: &agentpb.Signal{Name: name, Text: clip(text, maxReason)}}})
	}
}

// lookAtFailed asks for the units that failed and tells of new ones.
func (l *link) lookAtFailed(ctx context.Context) {
	now := l.a.opts.Units.failed(ctx)
	l.mu.Lock()
	was := l.units
	l.units = now
	first := !l.unitsKnown
	l.unitsKnown = true
	l.mu.Unlock()
	for _, u := range now {
		if !slices.Contains(was, u) && !first {
			l.signal(signalUnit, u)
		}
	}
	if first && l.starts > 1 {
		l.signal(signalRestart, fmt.Sprintf("start %d since the boot", l.starts))
	}
}

// direct does what the server wants beside a manifest. It can only tighten.
func (l *link) direct(ctx context.Context, d *agentpb.Directives, serverUs int64) error {
	if d.GetResendInventory() {
		l.resend()
	}
	if err := l.update(func(j *joined) bool { j.Revision, j.Isolated = d.GetRevision(), d.GetIsolated(); return true }); err != nil {
		return fmt.Errorf("keep the server's directives: %w", err)
	}
	l.isolate(ctx)
	l.attest(ctx, d.GetAttestUs(), serverUs)
	return nil
}

// attest proves to the server what this host booted, if it asked for that since
// the last time.
func (l *link) attest(ctx context.Context, since, serverUs int64) {
	l.mu.Lock()
	c, due := l.conn, since != 0 && l.attested < since && !l.attesting
	if l.a.opts.Attest == nil && since != 0 {
		l.problem = "the server asks for attestation, which this agent cannot do"
		due = false
	}
	l.attesting = l.attesting || due
	l.mu.Unlock()
	if !due || c == nil {
		return
	}
	l.others.Go(func() {
		ctx, stop := context.WithTimeout(ctx, 5*time.Minute)
		defer stop()
		err := l.a.opts.Attest(ctx, c.AgentClient)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.attesting = false
		if l.problem = ""; err != nil {
			l.problem = "attestation: " + err.Error()
			return
		}
		l.attested = max(serverUs, since)
	})
}
