// Package incident turns blocks on hosts into few incidents that people work
// on: which events are one alert, which alerts are one incident, whom to page
// and when again, and what an incident has to say before it is closed.
//
// Everything is pure: the caller stores what changes and sends what comes out.
// Hosts are counted inside an alert and never part of its key, so a block on
// five thousand hosts is one incident and one page.
package incident

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"strings"
	"time"
)

// Event is a block, or a would-be block, as a host reports it. A host merges
// repeats by itself and counts them.
type Event struct {
	ID     string `json:"id"`               // the host's, unique: the same event may come twice
	Scope  string `json:"scope"`            // where in the resource tree the host is
	Host   string `json:"host"`             // its id
	Name   string `json:"name,omitempty"`   // in the tree; empty: unknown
	Kind   string `json:"kind"`             // exec, library, script, …
	SHA256 string `json:"sha256,omitempty"` // hex; empty when the content had no stable digest
	Signer string `json:"signer,omitempty"` // identity of the signer; empty or Unsigned: nobody
	Path   string `json:"path,omitempty"`
	Parent string `json:"parent,omitempty"` // the program that started it
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason"`          // the reason's stable name
	Mode   string `json:"mode"`            // enforce or audit
	Epoch  uint64 `json:"epoch,omitempty"` // of the policy in force
	// Flip: the policy before would have allowed it, so the change of policy is
	// the cause.
	Flip  bool      `json:"flip,omitempty"`
	Count uint64    `json:"count"` // how often; at least 1
	At    time.Time `json:"at"`    // when the server received it: a host's clock proves nothing
}

// Unsigned is what hosts call the signer of what nobody signed.
const Unsigned = "unsigned"

// KindNotice is the kind of events that are no blocks but what an agent, or the
// server about its reports, has to say: Reason is the code, Rule the text.
const KindNotice = "notice"

func (e *Event) name() string { return cmp.Or(e.Name, e.Host) }

func (e *Event) signed() bool { return e.Signer != "" && e.Signer != Unsigned }

// Matters says whether an event is anything to work on. Blocks are; of what an
// agent says, only what it does not say when all is well.
func (e *Event) Matters() bool {
	if e.Kind != KindNotice {
		return true
	}
	return strings.HasPrefix(e.Reason, "rollout-") || slices.Contains([]string{
		"canary", "permit", "not-believed", "clock-went-back", "early-start", "agent-stops", "log", "reverted", "state-damaged", // the agent's codes
		"lost", "gap", "malformed", "attestation", // the server's
	}, e.Reason)
}

// Key names an alert: the same content (or signer), kind, class of place and
// reason in one scope, on however many hosts.
type Key string

// KeyOf is the alert that an event belongs to.
func KeyOf(e *Event) Key {
	what := "sha256 " + e.SHA256
	if e.SHA256 == "" {
		what = "signer " + e.Signer
	}
	h := sha256.New()
	var n [8]byte
	for _, s := range []string{strings.ToLower(e.Scope), e.Kind, what, PathClass(e.Path), e.Reason} {
		binary.BigEndian.PutUint64(n[:], uint64(len(s))) // no two lists of fields hash alike
		h.Write(n[:])
		h.Write([]byte(s))
	}
	return Key(hex.EncodeToString(h.Sum(nil)[:16]))
}

// PathClass says what sort of place a path is, so that a file with a random name
// in a home directory is the same alert in every home directory.
func PathClass(path string) string {
	for _, c := range []struct{ prefix, class string }{
		{"/tmp/", "temporary"},
		{"/var/tmp/", "temporary"},
		{"/dev/shm/", "temporary"},
		{"/run/user/", "temporary"},
		{"/home/", "home"},
		{"/root/", "home"},
		{"/var/lib/docker/", "container"},
		{"/var/lib/containers/", "container"},
		{"/usr/local/", "local"},
		{"/opt/", "local"},
		{"/srv/", "local"},
		{"/usr/", "system"},
		{"/bin/", "system"},
		{"/sbin/", "system"},
		{"/lib", "system"},
		{"/boot/", "system"},
		{"/etc/", "system"},
		{"/var/", "state"},
	} {
		if strings.HasPrefix(path, c.prefix) {
			return c.class
		}
	}
	if strings.HasPrefix(path, "memfd:") || strings.HasPrefix(path, "/memfd:") || path == "" {
		return "memory"
	}
	return "other"
}

// MaxHosts is how many hosts an incident names, over all its alerts; the rest are
// counted.
const MaxHosts = 50_000

// Alert is all events of one key.
type Alert struct {
	Key    Key       `json:"key"`
	Sample Event     `json:"sample"` // the first one
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
	Count  uint64    `json:"count"` // blocks
	Hosts  []string  `json:"hosts"` // sorted
	More   int       `json:"more"`  // events of hosts that are not named
	Flip   bool      `json:"flip"`
}

// add counts an event and says whether its host is new to the alert. Without
// room a new host is counted and not named.
func (a *Alert) add(e *Event, room bool) (newHost bool) {
	if a.Count == 0 {
		a.Key, a.Sample, a.First = KeyOf(e), *e, e.At
	}
	a.Count += max(e.Count, 1)
	a.Flip = a.Flip || e.Flip
	if e.At.After(a.Last) {
		a.Last = e.At
	}
	i, known := slices.BinarySearch(a.Hosts, e.name())
	switch {
	case known:
		return false
	case !room:
		a.More++
		return false
	}
	a.Hosts = slices.Insert(a.Hosts, i, e.name())
	return true
}
