package agent

import (
	"fmt"
	"time"

	"ringwall/internal/enforce"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// Status is how a host stands. State is only ever "enforcing" when programs are
// refused by the kernel and the last canary proved it of late.
type Status struct {
	State string `json:"state"` // enforcing, auditing, relaxed, unproven, no-policy, off
	Text  string `json:"text"`  // the same for a person, with what to do
	Host  string `json:"host"`
	Agent bool   `json:"agent"` // an agent answers
	// Program is the SHA-256 of the agent's program.
	Program string `json:"program,omitempty"`
	// Mechanism is how content is checked.
	Mechanism string            `json:"mechanism,omitempty"`
	Scope     string            `json:"scope,omitempty"` // cgroup; "" is the whole host
	Since     *time.Time        `json:"since,omitempty"` // when the policy in force was put there
	Policy    *PolicyStatus     `json:"policy,omitempty"`
	Modes     map[string]string `json:"modes,omitempty"`
	Canary    *Canary           `json:"canary,omitempty"`
	Relaxed   *PermitAnswer     `json:"relaxed,omitempty"`
	Kernel    *enforce.Status   `json:"kernel,omitempty"`
	Events    *Flow             `json:"events,omitempty"`
	Sources   int               `json:"sources"` // releases and packages that are authorised
	Entries   int               `json:"entries"` // digests in the kernel's table
	// Bytecode is how far Python's is made.
	Bytecode BytecodeStatus `json:"bytecode"`
	// What is not as it should be.
	Skipped    []Skipped         `json:"not_believed,omitempty"`
	NotCovered []enforce.Problem `json:"not_covered,omitempty"`
	Unlisted   []RunningProcess  `json:"running_unlisted,omitempty"` // ran before, would not be allowed to start
	Knobs      []KnobStatus      `json:"knobs,omitempty"`            // only those that are not as wanted
	Boot       []string          `json:"boot_overrides,omitempty"`   // what can keep the agent from starting at the next boot
	Problems   []string          `json:"problems,omitempty"`
	Floor      string            `json:"epoch_floor,omitempty"`
	Link       *LinkStatus       `json:"fleet,omitempty"` // absent: this host is in none
}

// PolicyStatus names the policy in force.
type PolicyStatus struct {
	Name     string    `json:"name"`
	Epoch    uint64    `json:"epoch"`
	Digest   string    `json:"digest"`
	SignedBy string    `json:"signed_by"`
	SignedAt time.Time `json:"signed_at"`
}

// RunningProcess is a process whose program is not authorised.
type RunningProcess struct {
	PID     int    `json:"pid"`
	Program string `json:"program"`
	SHA256  string `json:"sha256"`
}

// KnobStatus is a kernel setting that is not as the policy wants it.
type KnobStatus struct {
	Name  string `json:"name"`
	Want  string `json:"want"`
	Have  string `json:"have"`
	State string `json:"state"`
}

// States: what the kernel's own status can say, and one more.
const (
	StateEnforcing = string(enforce.StateEnforcing)
	StateAuditing  = string(enforce.StateAuditing)
	StateRelaxed   = string(enforce.StateRelaxed)
	StateUnproven  = string(enforce.StateUnproven)
	StateOff       = string(enforce.StateOff)
	StateNoPolicy  = "no-policy"
)

const mechanism = "BPF LSM; content by dm-verity root, fs-verity digest, or SHA-256 computed by the kernel (IMA)"

// Status tells how this host stands.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{
		Host: a.state.Host(), Agent: true, Program: a.self.String(), NotCovered: a.opts.uncovered(), Scope: a.state.Settings().Scope, Mechanism: mechanism,
		Problems: a.problem, Floor: a.floor.Describe(), Bytecode: a.bytecode.status, Link: a.linkStatusLocked(),
	}
	if s.Scope == "" {
		s.Boot = host.BootOverrides("/")
	}
	s.State, s.Text = a.standing()
	if k, err := a.watcher.Status(); err == nil {
		s.Kernel = &k
	} else {
		s.Problems = append(s.Problems, err.Error())
	}
	if a.pipe != nil {
		f := a.pipe.flow()
		s.Events = &f
	}
	if a.loaded == nil {
		return s
	}
	l := a.loaded
	c, since := a.canary, a.applied
	s.Canary, s.Since = &c, &since
	s.Policy = &PolicyStatus{l.policy.Name, l.policy.Epoch, l.signed.Digest.String(), l.signed.Identity + " (" + l.signed.CA + ")", l.signed.SignedAt}
	s.Modes = modes(l.policy)
	s.Sources, s.Entries, s.Skipped = l.sources, len(l.compiled.Table.Entries), l.skipped
	if a.clock.now().Before(a.relaxed.until) {
		s.Relaxed = &PermitAnswer{Until: a.relaxed.until, Reason: a.relaxed.reason}
	}
	for _, r := range a.running {
		s.Unlisted = append(s.Unlisted, RunningProcess{r.PID, r.Exe, r.Digest.String()})
	}
	s.Knobs = knobs(l.policy)
	return s
}

// standing is the state in one word and in one sentence. a.mu is held.
func (a *Agent) standing() (state, text string) {
	if a.loaded == nil && a.lost {
		return StateNoPolicy, "no stored policy can be used; only what an earlier agent put into the kernel since the boot is refused; hand a signed policy in with `ringwall host apply`"
	}
	if a.loaded == nil {
		return StateNoPolicy, "no policy is in force and nothing is refused; hand one in with `ringwall host apply`"
	}
	if a.clock.now().Before(a.relaxed.until) {
		return StateRelaxed, "break-glass: nothing is refused until " + a.relaxed.until.UTC().Format(time.RFC3339)
	}
	if !a.canary.OK || a.opts.Now().Sub(a.canary.At) > 2*canaryEvery {
		return StateUnproven, "the policy is in the kernel, but the canary does not prove that it acts: " + a.canary.Error
	}
	p := a.loaded.policy
	where := "on this host"
	if sc := a.state.Settings().Scope; sc != "" {
		where = "in " + sc
	}
	if p.Modes[integrity.KindExec] == integrity.ModeEnforce {
		return StateEnforcing, fmt.Sprintf("only authorised software runs %s (policy %s, epoch %d)", where, p.Name, p.Epoch)
	}
	return StateAuditing, fmt.Sprintf("nothing is refused %s, what would be is reported (policy %s, epoch %d)", where, p.Name, p.Epoch)
}

func (a *Agent) headline() string {
	state, text := a.standing()
	return state + ": " + text
}

func modes(p *integrity.Policy) map[string]string {
	out := map[string]string{
		"memory": p.Process.Memory.String(), "ptrace": p.Process.Ptrace.String(),
		"block_writes": p.Process.BlockWrites.String(), "code_writes": p.Process.CodeWrites.String(),
	}
	for _, k := range integrity.Kinds() {
		out[k.String()] = p.Modes[k].String()
	}
	return out
}

func knobs(p *integrity.Policy) []KnobStatus {
	var want []host.Knob
	for _, k := range p.Knobs {
		want = append(want, hostKnob(k))
	}
	var out []KnobStatus
	for _, r := range (host.Knobs{Facts: host.Probe()}).Check(want) {
		if r.State != host.KnobOK && r.State != host.KnobNotApplicable {
			out = append(out, KnobStatus{r.Name, r.Want, r.Have, string(r.State)})
		}
	}
	return out
}
