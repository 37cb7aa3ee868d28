package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/agentpb"
	"ringwall/internal/enforce"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
)

// DefaultRunDir holds the control socket and the pins; it is empty after a boot.
const DefaultRunDir = "/run/ringwall"

// How often the agent looks after things.
const (
	canaryEvery = 5 * time.Minute
	tickEvery   = 20 * time.Second
)

// stepWait is how long the service manager is asked to wait for the next step of
// a start: there is no limit to a start that goes on, however slow the machine.
const stepWait = 15 * time.Minute

// Enforcer is what the agent asks of the kernel engine; *enforce.Engine is one.
// The process has the agent's role on it.
type Enforcer interface {
	Guards
	// Adopt gives running processes the roles of their programs and returns
	// those processes.
	Adopt(ctx context.Context) ([]enforce.Running, error)
	// Apply puts a table in force, whole or not at all.
	Apply(t *integrity.Table) error
	// Protect turns the guards on.
	Protect() error
	// Relax lets everything pass, with events, for a time; 0 ends that.
	Relax(d time.Duration) error
	// TrustVolume says which dm-verity root a device carries.
	TrustVolume(dev uint64, root integrity.Digest) error
	// ForgetVolume undoes TrustVolume.
	ForgetVolume(dev uint64) error
	// Canary proves that the kernel refuses an unlisted program and runs a
	// listed one.
	Canary(ctx context.Context) error
}

// Guards keep everyone but the agent from changing files and directories.
type Guards interface {
	// Guard adds to them.
	Guard(paths ...string) error
	// Unguard takes away from them; before a guarded file is removed, since
	// guards go by inode numbers.
	Unguard(paths ...string) error
	// IsGuarded says whether an agent guarded a path before.
	IsGuarded(path string) (bool, error)
}

// Watcher is what the engine tells; *enforce.Engine is one.
type Watcher interface {
	// Events calls fn for every event until ctx ends.
	Events(ctx context.Context, fn func(enforce.Event)) error
	// MustMeasure says that scripts have to be measured before they are read.
	MustMeasure() bool
	// Measure has the kernel compute and keep a file's digest.
	Measure(f *os.File) error
	// IsCanary says that an event is the agent's own proof, not an attack.
	IsCanary(e enforce.Event) bool
	Status() (enforce.Status, error)
	// Close lets go; what is pinned goes on.
	Close() error
	// Remove takes everything out of the kernel.
	Remove() error
}

// Options say where an agent works.
type Options struct {
	StateDir string
	RunDir   string
	Log      *slog.Logger
	Now      func() time.Time
	// NoBytecode leaves Python's byte code alone.
	NoBytecode bool
	// Program is where this agent's own program lies; "" if it is not to be replaced.
	Program string
	usrLib  string // where Python's libraries are; "" is /usr/lib, tests have their own
	// Open puts the engine into the kernel, or takes over the one that is there.
	Open func(enforce.Options) (Enforcer, Watcher, error)
	// Units is how the service manager is asked; the zero value knows nothing.
	Units Units
	// Version of the agent, for the server.
	Version string
	// Attest proves to the server what this host booted, when it asks for that;
	// nil: this host cannot.
	Attest func(context.Context, agentpb.AgentClient) error

	// Isolate lets this machine talk to itself and to these only, again and again,
	// or, without any, to everyone again; nil: this agent cannot.
	Isolate func(ctx context.Context, to []netip.AddrPort) error

	uncovered func() []enforce.Problem // enforce.Uncovered; it reads the kernel's types

	pace  pace              // the zero value is normalPace
	crash func(step string) // tests look at what a crash would leave
}

// Agent is the host process. Make one with New and call Run once.
type Agent struct {
	opts   Options
	log    *slog.Logger
	self   integrity.Digest // SHA-256 of its program
	verity integrity.Digest // its fs-verity digest; zero if it has none
	clock  *clock
	floor  host.Floor

	enforcer Enforcer
	watcher  Watcher
	pipe     *pipeline
	measurer *measurer // nil where the kernel needs none
	bytecode *bytecode
	link     *link

	mu      sync.Mutex // over what follows, and over every change of policy
	state   *State
	loaded  *loaded // nil: no policy yet
	started time.Time
	applied time.Time
	canary  Canary
	relaxed relaxation
	// regime grows whenever what shields a compiler of byte code may end.
	regime uint64
	// trial is a manifest in force that is not confirmed; nil: none.
	trial   *trial
	outcome outcome
	// unsettled: what is in force could not be stored yet; see settle.
	unsettled bool
	upgraded  bool
	lost      bool              // no stored policy could be used
	running   []enforce.Running // unlisted, when enforcement began
	stop      context.CancelFunc
	volumes   map[uint64]integrity.Digest
	boot      []string // what was told of BootOverrides
	problem   []string // what went wrong and has not been put right
}

// Canary is the last proof that the kernel acts on the policy.
type Canary struct {
	At    time.Time `json:"at"`
	OK    bool      `json:"ok"`
	Error string    `json:"error,omitempty"`
}

// relaxation is a break-glass permit in force.
type relaxation struct {
	until  time.Time
	permit string
	reason string
}

// New makes an agent for a host that was set up.
func New(o Options) (*Agent, error) {
	s, err := OpenState(o.StateDir)
	if err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	self, verity, err := identity("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("start agent: hash its own program: %w", err)
	}
	if err := s.repair(); err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	c, err := openClock(s.path(dirFloor, "clock"), o.Now)
	if err != nil {
		s.noteDamage("%v: expired permits and exceptions are told by the machine's clock and the time of the policy's signature", err)
	}
	a := &Agent{
		opts: o, log: o.Log, self: self, clock: c, verity: verity, floor: s.openFloor(), state: s, started: o.Now(), volumes: map[uint64]integrity.Digest{},
	}
	if a.opts.uncovered == nil {
		a.opts.uncovered = enforce.Uncovered
	}
	if a.opts.pace == (pace{}) {
		a.opts.pace = normalPace()
	}
	if u := s.Settings().Units; len(u) > 0 {
		a.opts.Units.Watch = u
	}
	a.outcome = s.readOutcome()
	a.link = newLink(a)
	a.bytecode = &bytecode{a: a, log: o.Log, lib: cmp.Or(o.usrLib, "/usr/lib"), status: BytecodeStatus{State: bytecodeWaiting, Why: "the agent has just started"}}
	if o.NoBytecode {
		a.bytecode.status = BytecodeStatus{State: bytecodeOff, Why: "the agent was started so"}
	}
	return a, nil
}

// identity is the SHA-256 of a file, and its fs-verity digest, by which a newer
// kernel knows it, if it has one.
func identity(name string) (sha, verity integrity.Digest, err error) {
	if sha, err = hashFile(name); err != nil {
		return sha, verity, err
	}
	f, err := os.Open(name)
	if err != nil {
		return sha, verity, err
	}
	defer f.Close()
	if d, ok := host.FileVerity(f); ok {
		verity = d
	}
	return sha, verity, nil
}

func hashFile(name string) (integrity.Digest, error) {
	var d integrity.Digest
	f, err := os.Open(name)
	if err != nil {
		return d, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, err
	}
	h.Sum(d[:0])
	return d, nil
}

// Run enforces until ctx ends. What is in the kernel stays there.
//
// It fails closed at the start: an agent that cannot put the policy in force
// returns an error and never says that it enforces. errs.Unsupported means that
// this kernel cannot.
func (a *Agent) Run(ctx context.Context) error {
	if err := os.MkdirAll(a.opts.RunDir, 0o755); err != nil { //nolint:gosec // the socket in it has its own mode
		return fmt.Errorf("run agent: %w", err)
	}
	// whatever the service manager's umask is: the compiler of byte code is another user
	if err := os.Chmod(a.opts.RunDir, 0o755); err != nil { //nolint:gosec // as above
		return fmt.Errorf("run agent: %w", err)
	}
	lock, err := lockDir(a.opts.RunDir)
	if err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	defer lock.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	a.stop = stop
	a.step("kernel programs")
	if err := a.open(); err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	defer a.watcher.Close()
	if a.pipe, err = newPipeline(a); err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	a.link.open()
	defer a.link.close() // after the last record
	a.pipe.tell = a.link.record
	// the pipeline ends last: it tells what the others say at their end
	piping, endPipe := context.WithCancel(context.WithoutCancel(ctx))
	var pipe, workers sync.WaitGroup
	defer pipe.Wait()
	defer endPipe()
	defer workers.Wait()
	defer stop()
	a.pipe.deaf.Store(true)
	pipe.Go(func() { a.pipe.run(piping) })
	a.measurer = newMeasurer(a.watcher)
	defer a.measurer.close()
	workers.Go(func() { a.measurer.watch(ctx) })
	if err := a.begin(ctx); err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	// The kernel keeps events until here, where the policy that explains them is known.
	failed := make(chan error, 2)
	a.pipe.deaf.Store(false)
	workers.Go(func() { failed <- a.watcher.Events(ctx, a.take) })
	workers.Go(func() { a.judge(ctx) })
	workers.Go(func() { a.link.run(ctx) })
	srv, err := newControl(ctx, a)
	if err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	workers.Go(func() { failed <- srv.serve(ctx) })
	if err := a.enforcer.Guard(a.opts.RunDir); err != nil {
		return fmt.Errorf("run agent: %w", err)
	}
	if !a.opts.NoBytecode {
		workers.Go(func() { a.bytecode.run(ctx) })
	}
	now := a.Status()
	workers.Go(func() { tellReady(ctx, now) })
	a.log.InfoContext(ctx, "agent runs", slog.String("state", now.State), slog.String("text", now.Text), slog.String("host", now.Host))
	return a.look(ctx, failed)
}

// step tells the service manager that the start goes on.
func (a *Agent) step(what string) {
	if !a.applied.IsZero() {
		return // it was started already
	}
	_ = host.Notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=starting: %s", stepWait.Microseconds(), what)) // the next step tells it again
}

// tellReady tells the service manager that the start is over, until it has
// heard it: one that is busy does not, and would end the agent for that.
func tellReady(ctx context.Context, now Status) {
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for host.Notify("READY=1\nSTATUS="+now.State+": "+now.Text) != nil {
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// Early puts the confirmed policy into the kernel and ends: what is pinned goes
// on until Run takes over. It is for the initramfs, where the state directory
// can still be read-only, and writes nothing to it. It fails closed: an error
// means that nothing is claimed, and the policy may not be in force.
func (a *Agent) Early(ctx context.Context) error {
	if err := os.MkdirAll(a.opts.RunDir, 0o755); err != nil { //nolint:gosec // the socket in it has its own mode
		return fmt.Errorf("early start: %w", err)
	}
	l, err := a.confirmed(nil)
	if err != nil {
		return fmt.Errorf("early start: %w", err)
	}
	if err := a.open(); err != nil {
		return fmt.Errorf("early start: %w", err)
	}
	defer a.watcher.Close()
	if err := a.enforcer.Apply(l.compiled.Table); err != nil {
		return fmt.Errorf("early start: %w", err)
	}
	if err := a.enforcer.Canary(ctx); err != nil {
		return fmt.Errorf("early start: %w", err)
	}
	if err := a.enforcer.Protect(); err != nil {
		return fmt.Errorf("early start: %w", err)
	}
	a.log.InfoContext(ctx, "the policy is in the kernel", slog.String("policy", l.policy.Name), slog.Uint64("epoch", l.policy.Epoch))
	return nil
}

// open takes the engine and guards the state directory.
func (a *Agent) open() error {
	set := a.state.Settings()
	e, w, err := a.opts.Open(enforce.Options{
		PinDir: filepath.Join(a.opts.RunDir, "bpf"), ScopeCgroup: set.Scope, CanaryDir: a.state.path(dirCanary),
	})
	if err != nil {
		return err
	}
	a.enforcer, a.watcher = e, w
	if err := a.sameState(); err != nil {
		return errors.Join(err, w.Close())
	}
	guard := []string{a.state.dir}
	for _, d := range slices.Concat(stateDirs(), fleetDirs()) {
		guard = append(guard, a.state.path(d))
	}
	if set.Scope == "" {
		for _, p := range host.BootPaths() {
			if _, err := os.Lstat(p); err == nil {
				guard = append(guard, p)
			}
		}
	}
	if err := e.Guard(guard...); err != nil {
		return errors.Join(err, w.Close())
	}
	return nil
}

// take accepts an event. A script that was refused only because it had not been
// measured is measured for the next time.
func (a *Agent) take(e enforce.Event) {
	if a.measurer != nil && e.Kind == integrity.KindScript && e.Errno == -int32(unix.ENOENT) && filepath.IsAbs(e.Path) {
		a.measurer.expect([]string{e.Path})
	}
	a.pipe.take(e)
}

// sameState refuses to take over an engine that another state directory filled:
// whoever is root could else start this very program with a state of his own.
func (a *Agent) sameState() error {
	st, err := a.watcher.Status()
	if err != nil {
		return err
	}
	if !st.Protected {
		return nil
	}
	mine, err := a.enforcer.IsGuarded(a.state.dir)
	if err != nil {
		return err
	}
	if !mine {
		return fmt.Errorf("the policy in the kernel does not come from %s: %w", a.state.dir, errs.Denied)
	}
	return nil
}

// begin puts the confirmed policy in force. A host without one waits for it.
func (a *Agent) begin(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.trustVolumes(); err != nil {
		a.note("dm-verity volumes: " + err.Error())
	}
	a.step("policy")
	l, err := a.confirmed(a.recallModules())
	if errors.Is(err, errs.NotFound) {
		a.log.WarnContext(ctx, "no policy yet: nothing is enforced until `ringwall host apply`")
		a.tellDamage()
		return a.enforcer.Protect()
	}
	if errors.Is(err, errs.Untrusted) {
		// an agent that runs can be handed a policy; what an earlier one put into the kernel stays
		a.state.noteDamage("%v", err)
		a.lost = true
		a.tellDamage()
		return a.enforcer.Protect()
	}
	if err != nil {
		return err
	}
	a.clock.atLeast(l.signed.SignedAt)
	a.clock.tick() // now: a file that was damaged is whole before the next boot, however soon that is
	a.tellDamage()
	a.tellEarly()
	if err := a.state.sweep(); err != nil {
		a.log.WarnContext(ctx, "what a crash left behind", slog.Any("error", err))
	}
	if err := a.enact(ctx, l); err != nil {
		return err
	}
	a.step("processes")
	a.resume(ctx)
	err = a.settle(ctx, a.loaded)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		a.note(err.Error()) // it is enforced all the same, and without an agent nobody would tell
		return nil
	}
	return err
}

// tellEarly raises an alert if the early start at boot failed: then programs ran
// before the policy was in the kernel.
func (a *Agent) tellEarly() {
	code, err := readFile(filepath.Join(a.opts.RunDir, "early.failed"), 64)
	if err != nil {
		return
	}
	a.pipe.notice(noticeEarly, "the early start at boot failed (exit code "+strings.TrimSpace(string(code))+", see "+filepath.Join(a.opts.RunDir, "early.log")+"): what ran before this was not checked")
	_ = os.Remove(filepath.Join(a.opts.RunDir, "early.failed"))
}

// enact puts a policy in force and proves it; on failure the one before it is
// put back.
func (a *Agent) enact(ctx context.Context, l *loaded) error {
	a.step("table")
	if err := a.enforcer.Apply(l.compiled.Table); err != nil {
		return err
	}
	a.step("proof")
	before := a.loaded
	if before == nil || before.signed.Digest != l.signed.Digest {
		a.regime++
	}
	a.loaded = l
	a.pipe.use(l)
	if there, measured := a.measurer.all(ctx, l.scripts); measured < there {
		a.log.WarnContext(ctx, "not every authorised script could be measured; the others are refused to interpreters", slog.Int("scripts", there), slog.Int("measured", measured))
	}
	err := a.prove(ctx)
	if err == nil {
		a.applied = a.opts.Now()
		return nil
	}
	if before == nil {
		return err
	}
	a.loaded = before
	a.pipe.use(before)
	if back := a.enforcer.Apply(before.compiled.Table); back != nil {
		return errors.Join(err, fmt.Errorf("put the policy before back: %w", back))
	}
	return fmt.Errorf("%w; the policy before, epoch %d, is in force", err, before.policy.Epoch)
}

// settle confirms what enact put in force: it survives a restart from here on.
// If that fails (a full disk), the policy stays in force and tend tries again:
// after a restart before that, the one before is in force.
func (a *Agent) settle(ctx context.Context, l *loaded) error {
	a.unsettled = true
	if err := a.enforcer.Protect(); err != nil {
		return err
	}
	all, err := a.enforcer.Adopt(ctx)
	if err != nil {
		return err
	}
	a.running = a.running[:0]
	for _, r := range all {
		if !r.Listed {
			a.running = append(a.running, r)
		}
	}
	// In this order: load makes sure that whoever signed a policy is among those
	// that it trusts, so a crash between the two leaves one that is believed.
	if err := a.state.confirm(l.bundle); err != nil {
		return fmt.Errorf("epoch %d is in force, but not stored: %w", l.policy.Epoch, err)
	}
	a.at("confirmed")
	if err := a.state.follow(l.policy); err != nil {
		return err
	}
	a.at("authorities followed")
	if least, err := a.floor.Get(); err == nil && l.policy.Epoch >= least { // else it was told, see confirmed
		if err := a.floor.Raise(l.policy.Epoch); err != nil {
			return fmt.Errorf("raise the epoch floor: %w", err)
		}
	}
	a.at("floor raised")
	if err := a.state.commitBundle(l.bundle); err != nil {
		return fmt.Errorf("keep what came with epoch %d: %w", l.policy.Epoch, err)
	}
	a.unsettled = false
	a.applyKnobs()
	a.pipe.notice(noticePolicy, fmt.Sprintf("policy %s, epoch %d, is in force: %s", l.policy.Name, l.policy.Epoch, a.headline()))
	for _, s := range l.skipped {
		a.pipe.notice(noticeSkipped, s.What+" is not believed and authorises nothing: "+s.Why)
	}
	return nil
}

// prove runs the canary and keeps its result.
func (a *Agent) prove(ctx context.Context) error {
	err := a.enforcer.Canary(ctx)
	a.canary = Canary{At: a.opts.Now(), OK: err == nil}
	if err != nil {
		a.canary.Error = err.Error()
		a.pipe.notice(noticeCanary, "the canary failed, enforcement is not proven: "+err.Error())
		return fmt.Errorf("canary: %w", err)
	}
	return nil
}

// look is the agent's life after the start.
func (a *Agent) look(ctx context.Context, failed <-chan error) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			a.pipe.notice(noticeStop, "the agent was asked to stop; what is in the kernel stays in force")
			return nil
		case err := <-failed:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("run agent: %w", err)
		case <-tick.C:
			a.tend(ctx)
		}
	}
}

// tend does what is due.
func (a *Agent) tend(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if back := a.clock.tick(); back > 0 {
		a.pipe.notice(noticeClock, fmt.Sprintf("the clock went back by %v; what runs out is judged by the latest time seen", back))
	}
	if err := a.trustVolumes(); err != nil {
		a.log.WarnContext(ctx, "dm-verity volumes", slog.Any("error", err))
	}
	a.tellBoot()
	if a.loaded == nil {
		return
	}
	if next := a.loaded.compiled.NextChange; !next.IsZero() && !a.clock.now().Before(next) {
		if err := a.recompile(ctx); err != nil {
			a.note("recompile after an exception ran out: " + err.Error())
		}
	}
	if a.unsettled && a.trial == nil {
		if err := a.settle(ctx, a.loaded); err != nil {
			a.log.ErrorContext(ctx, "the policy in force is not confirmed", slog.Any("error", err))
		}
	}
	if a.opts.Now().Sub(a.canary.At) >= canaryEvery {
		_ = a.prove(ctx) // kept in a.canary, told by notice
	}
	_ = host.Notify("STATUS=" + a.headline())
}

// tellBoot raises an alert when something new would change how the agent starts
// at the next boot: a drop-in, a mask, another init.
func (a *Agent) tellBoot() {
	if a.state.Settings().Scope != "" {
		return
	}
	now := host.BootOverrides("/")
	for _, x := range now {
		if !slices.Contains(a.boot, x) {
			a.pipe.notice(noticeBoot, "the next boot may be without the agent, or with another start of it: "+x)
		}
	}
	a.boot = now
}

// recompile puts the policy in force again with what is stored now.
func (a *Agent) recompile(ctx context.Context) error {
	l, err := a.state.load(a.loaded.bundle, a.compileOptions(), a.modules())
	if err != nil {
		return err
	}
	return a.enact(ctx, l)
}

func (a *Agent) note(problem string) {
	a.problem = append(a.problem, problem)
	if len(a.problem) > 20 {
		a.problem = a.problem[1:]
	}
	a.log.Error("agent", slog.String("problem", problem))
}

// trustVolumes tells the kernel which devices are dm-verity volumes now. One
// that is no more is forgotten: its number may come back with other content.
func (a *Agent) trustVolumes() error {
	list, err := host.VerityVolumes()
	if err != nil {
		return err
	}
	now := make(map[uint64]integrity.Digest, len(list))
	for _, v := range list {
		now[v.Dev] = v.Root
	}
	for dev := range a.volumes {
		if _, there := now[dev]; !there {
			if err := a.enforcer.ForgetVolume(dev); err != nil {
				return err
			}
			delete(a.volumes, dev)
		}
	}
	for dev, root := range now {
		if a.volumes[dev] == root {
			continue
		}
		if err := a.enforcer.TrustVolume(dev, root); err != nil {
			return err
		}
		a.volumes[dev] = root
	}
	return nil
}

func (a *Agent) applyKnobs() {
	var apply []host.Knob
	for _, k := range a.loaded.policy.Knobs {
		if k.Apply {
			apply = append(apply, hostKnob(k))
		}
	}
	for _, r := range (host.Knobs{Facts: host.Probe()}).Apply(apply) {
		if r.Err != nil {
			a.note("knob " + r.Name + ": " + r.Err.Error())
		}
	}
}

func hostKnob(k integrity.Knob) host.Knob {
	return host.Knob{Name: k.Name, Want: k.Want, Rule: host.KnobRule(k.Rule), Boot: k.Boot, Since: k.Since}
}

// lockDir takes a lock that lasts as long as the process. It is on a directory,
// since a file lock of the agent is how the engine is told to measure a file.
func lockDir(name string) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another agent runs on this host: %w", errs.Conflict)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
	}
	return f, nil
}
