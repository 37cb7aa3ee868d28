package agent

import (
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/enforce"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// Record is one line of the event log: a refusal, a would-be refusal in audit
// mode, or a notice of the agent. It is the format of `ringwall events`, of the
// log files and of alerts. Fields are only ever added.
type Record struct {
	Version int       `json:"version"` // 1
	Time    time.Time `json:"time"`
	Host    string    `json:"host"`
	// Type is block, audit (it went ahead), gap (events were lost), or notice.
	Type  string `json:"type"`
	Alert bool   `json:"alert,omitempty"` // someone should look at once
	// Seq is the kernel's number of the event; notices have none.
	Seq  uint64 `json:"seq,omitempty"`
	Lost uint64 `json:"lost,omitempty"` // of a gap: how many events

	Reason string `json:"reason"`         // short and stable: unlisted, memory-wx, guard-file, …
	Text   string `json:"text"`           // for a person
	Kind   string `json:"kind,omitempty"` // exec, library, script, module, …
	Path   string `json:"path,omitempty"`
	Detail string `json:"detail,omitempty"`
	Digest string `json:"digest,omitempty"` // sha256:…, fsverity:… or dmverity:…
	Device string `json:"device,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	Errno  int32  `json:"errno,omitempty"` // why there is no digest
	// What the policy says of this content.
	Signer    string `json:"signer,omitempty"` // who vouches for it, or "unsigned"
	Rule      string `json:"rule,omitempty"`
	Indicator string `json:"indicator,omitempty"`
	Why       string `json:"why,omitempty"`

	Process   *Process           `json:"process,omitempty"`
	Ancestors []enforce.Ancestor `json:"ancestors,omitempty"` // parent first

	Policy *PolicyRef `json:"policy,omitempty"`
	// Flip: what the fleet's manifest before this one would have let go ahead.
	Flip bool `json:"flip,omitempty"`
	// Count is how often the same happened from First to Last; the first one is
	// told at once, the others together when they stop.
	Count int        `json:"count,omitempty"`
	First *time.Time `json:"first,omitempty"`
	Last  *time.Time `json:"last,omitempty"`
}

// Process is who did it.
type Process struct {
	PID       uint32 `json:"pid"`
	Thread    uint32 `json:"thread,omitempty"` // if not the first
	Name      string `json:"name"`
	Program   string `json:"program,omitempty"` // as far as it can still be seen
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	User      string `json:"user,omitempty"`
	Cgroup    string `json:"cgroup,omitempty"`
	Container string `json:"container,omitempty"` // runtime:id
}

// PolicyRef names the policy that decided.
type PolicyRef struct {
	Name   string `json:"name,omitempty"`
	Epoch  uint64 `json:"epoch"`
	Digest string `json:"digest,omitempty"`
}

// Types of records.
const (
	typeBlock  = "block"
	typeAudit  = "audit"
	typeGap    = "gap"
	typeNotice = "notice"
)

// Reasons of notices.
const (
	noticePolicy  = "policy"          // another policy is in force
	noticeSkipped = "not-believed"    // a stored document does not verify
	noticeCanary  = "canary"          // enforcement is not proven
	noticePermit  = "permit"          // break-glass
	noticeClock   = "clock-went-back" // see clock
	noticeEarly   = "early-start"     // programs ran before the policy was in the kernel
	noticeStop    = "agent-stops"
	noticeStart   = "agent-starts"
	noticePackage = "package"
	noticeLog     = "log"
	noticeBoot    = "boot" // something changes how the agent starts at the next boot
	noticeUpgrade = "agent-upgraded"
	// Of the fleet.
	noticeManifest = "manifest"
	noticeReverted = "reverted" // a manifest was taken back
	noticeLink     = "fleet-link"
	noticeIsolated = "isolated"
	noticeState    = "state-damaged" // a file of the state was, and another is used
)

// alerting says whether a notice is for someone to look at at once.
func alerting(notice string) bool {
	switch notice {
	case noticeSkipped, noticeCanary, noticeEarly, noticePermit, noticeClock, noticeStop, noticeLog, noticeState, noticeUpgrade, noticeBoot, noticeReverted, noticeIsolated:
		return true
	}
	return false
}

// recorder turns kernel events into records. It never waits for anything but
// /proc, and what is gone there stays empty.
type recorder struct {
	host   string
	booted time.Time
	lookup *host.Lookup
}

func (r *recorder) record(e *enforce.Event, l *loaded) Record {
	out := Record{
		Version: 1, Time: r.booted.Add(e.SinceBoot).UTC(), Host: r.host, Type: typeAudit, Seq: e.Seq,
		Reason: e.Reason.String(), Text: e.Reason.Text(), Path: e.Path, Detail: e.Detail, Inode: e.Inode, Errno: e.Errno,
		Ancestors: e.Ancestors, Process: r.process(e), Policy: &PolicyRef{Epoch: e.Epoch}, Count: 1,
	}
	if e.Refused {
		out.Type, out.Alert = typeBlock, true
	}
	if e.Device != 0 {
		out.Device = strconv.Itoa(int(e.Device>>20)) + ":" + strconv.Itoa(int(e.Device&0xfffff))
	}
	if e.Kind != 0 {
		out.Kind = e.Kind.String()
	}
	if e.Reason == enforce.NoIdentity && e.Errno == -int32(unix.ENOENT) {
		out.Text = "content has not been measured yet, and this kernel cannot do it at the moment of opening; it is measured now: try again"
	}
	if !e.Digest.IsZero() {
		out.Digest = spaceName(e.Space) + ":" + e.Digest.String()
	}
	if l != nil && l.policy.Epoch == e.Epoch {
		out.Policy.Name, out.Policy.Digest = l.policy.Name, l.signed.Digest.String()
		r.explain(e, l, &out)
	}
	return out
}

// explain adds what the evaluator says of the content.
func (r *recorder) explain(e *enforce.Event, l *loaded, out *Record) {
	if e.Kind == 0 || e.Digest.IsZero() {
		return
	}
	o := l.compiled.Object(e.Kind, integrity.Key{Space: e.Space, Digest: e.Digest})
	v := l.compiled.Evaluate(&o, out.Time)
	out.Rule, out.Why = v.Rule, v.Reason
	if v.Indicator.Type != "" {
		out.Indicator = v.Indicator.Type + " " + v.Indicator.Value
	}
	out.Signer = "unsigned"
	if len(o.Memberships) > 0 {
		out.Signer = signerText(o.Memberships[0].Origin)
	}
}

func signerText(o *integrity.Origin) string {
	if o.Package != "" {
		return "package " + o.Package + " " + o.Version + " of archive " + o.Archive
	}
	return o.Identity + " (" + o.Authority + "), " + o.Product + " " + o.Version
}

func spaceName(s integrity.Space) string {
	switch s {
	case integrity.SpaceFSVerity:
		return "fsverity"
	case integrity.SpaceDMVerity:
		return "dmverity"
	}
	return "sha256"
}

func (r *recorder) process(e *enforce.Event) *Process {
	p := &Process{PID: e.TGID, Name: e.Comm, UID: e.UID, GID: e.GID}
	if e.PID != e.TGID {
		p.Thread = e.PID
	}
	p.User = r.lookup.User(e.UID)
	p.Program = r.lookup.Program(int(e.TGID))
	p.Cgroup = r.lookup.Cgroup(e.Cgroup)
	if c := host.ContainerOf(p.Cgroup); c.ID != "" {
		p.Container = c.Runtime + ":" + c.ID
	}
	return p
}
