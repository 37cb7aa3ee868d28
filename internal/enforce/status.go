package enforce

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// CanaryInterval is how often the agent is expected to run a canary. After two
// intervals without one, Status.State does not claim anything any more.
const CanaryInterval = 10 * time.Minute

// State is what may be claimed about a host.
type State string

// The states.
const (
	StateOff       State = "off"       // nothing decides: no programs or no policy
	StateUnproven  State = "unproven"  // programs and policy are there, but no recent canary has shown that they act
	StateAuditing  State = "auditing"  // programs that are not authorised run, with an event
	StateRelaxed   State = "relaxed"   // a break-glass permit is in force
	StateEnforcing State = "enforcing" // a canary has recently been refused
)

// Status is what the kernel's maps say.
type Status struct {
	Epoch        uint64                 `json:"epoch"`
	Policy       integrity.Digest       `json:"policy"`
	Applied      time.Time              `json:"applied"` // by the host's clock
	Entries      uint64                 `json:"entries"` // of the policy; content that was added later is not counted
	Modes        [8]integrity.Mode      `json:"modes"`   // by integrity.Kind
	Process      integrity.ProcessRules `json:"process"`
	Programs     []string               `json:"programs"` // attached to their hooks
	ScopeCgroup  uint64                 `json:"scope_cgroup,omitempty"`
	Protected    bool                   `json:"protected"`
	RelaxedUntil time.Duration          `json:"relaxed_until,omitempty"` // CLOCK_BOOTTIME; 0 if no permit is in force
	Canary       time.Duration          `json:"canary"`                  // CLOCK_BOOTTIME of the last one that passed; 0 never
	CanaryMode   integrity.Mode         `json:"canary_mode"`             // what it proved
	Now          time.Duration          `json:"now"`                     // CLOCK_BOOTTIME
	TookOver     bool                   `json:"took_over"`
	Counters     Counters               `json:"counters"`
}

// State sums the status up. It fails closed: without a recent canary nothing
// is claimed.
func (s Status) State() State {
	mode := s.Modes[integrity.KindExec]
	switch {
	case len(s.Programs) == 0 || s.Epoch == 0 && s.Entries == 0 || mode == integrity.ModeOff:
		return StateOff
	case s.RelaxedUntil > s.Now:
		return StateRelaxed
	case s.Canary == 0 || s.Now-s.Canary > 2*CanaryInterval || s.CanaryMode != mode:
		return StateUnproven
	case mode == integrity.ModeEnforce:
		return StateEnforcing
	}
	return StateAuditing
}

// Status reads the state of the engine.
func (e *Engine) Status() (Status, error) {
	s, err := readStatus(e.objs.Control, e.objs.Settings, e.objs.Counters)
	if err != nil {
		return s, err
	}
	for name := range e.links {
		s.Programs = append(s.Programs, name)
	}
	slices.Sort(s.Programs)
	s.TookOver = e.TookOver
	return s, nil
}

// Inspect reads the same from the pins in dir, without changing anything and
// without the agent's role, for when the agent is not there. It wraps
// errs.NotFound if no engine is pinned there. The caller needs CAP_BPF and
// CAP_SYS_ADMIN.
func Inspect(dir string) (Status, error) {
	var maps [3]*ebpf.Map
	for i, name := range []string{engineMapControl, engineMapSettings, engineMapCounters} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return Status{}, fmt.Errorf("no engine is pinned in %s: %w", dir, errs.NotFound)
			}
			return Status{}, fmt.Errorf("open the pinned map %s: %w", name, err)
		}
		defer m.Close()
		maps[i] = m
	}
	s, err := readStatus(maps[0], maps[1], maps[2])
	if err != nil {
		return s, err
	}
	pins, err := filepath.Glob(filepath.Join(dir, linkPrefix+"*"))
	if err != nil {
		return s, fmt.Errorf("list the pins: %w", err)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			continue // not a link: not a program that runs
		}
		l.Close()
		s.Programs = append(s.Programs, strings.TrimPrefix(filepath.Base(pin), linkPrefix))
	}
	slices.Sort(s.Programs)
	return s, nil
}

func readStatus(control, settings, counters *ebpf.Map) (Status, error) {
	var st engineSteering
	var g engineGeneration
	if err := control.Lookup(uint32(0), &st); err != nil {
		return Status{}, fmt.Errorf("read the control map: %w", err)
	}
	if st.Layout != layout {
		return Status{}, fmt.Errorf("kernel maps of layout %d, this program speaks %d: %w", st.Layout, layout, errs.Conflict)
	}
	if err := settings.Lookup(st.Active&1, &g); err != nil {
		return Status{}, fmt.Errorf("read the settings: %w", err)
	}
	n, err := readCounters(counters)
	if err != nil {
		return Status{}, err
	}
	now, err := sinceBoot()
	if err != nil {
		return Status{}, err
	}
	s := Status{
		Epoch: g.Epoch, Policy: g.Policy, Entries: g.Entries,
		Process: integrity.ProcessRules{
			Memory: integrity.Mode(g.Memory), Ptrace: integrity.Mode(g.Ptrace),
			BlockWrites: integrity.Mode(g.BlockWrites), CodeWrites: integrity.Mode(g.CodeWrites),
		},
		ScopeCgroup: st.ScopeCgroup, Protected: st.Protect != 0,
		Canary: time.Duration(st.CanaryNs), CanaryMode: integrity.Mode(st.CanaryMode), Now: now, Counters: n,
	}
	if g.AppliedUs != 0 {
		s.Applied = time.UnixMicro(int64(g.AppliedUs)).UTC()
	}
	for k := range s.Modes {
		s.Modes[k] = integrity.Mode(g.Modes[k])
	}
	if st.Relaxed != 0 && st.RelaxedUntilNs > uint64(now) {
		s.RelaxedUntil = time.Duration(st.RelaxedUntilNs)
	}
	return s, nil
}
