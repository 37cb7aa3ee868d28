package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// A manifest's policy is put in force for a trial: it is in the kernel, and what
// the disk calls confirmed is still the policy before. It becomes the confirmed
// one, and the floor rises, only when the host has seen that it goes on working.
// So going back needs no way around the epochs: the trial ends, and what is
// confirmed is in force again. A crash or a reboot at any moment does the same.

// outcome is what became of the last manifest, for the server and for the next
// start.
type outcome struct {
	Received integrity.Digest `json:"received"` // of the signed document, for good or bad
	Phase    string           `json:"phase,omitempty"`
	Failed   integrity.Digest `json:"failed"`
	Reason   string           `json:"reason,omitempty"`
	// Cut counts how often a trial of one manifest was cut off: once may be
	// chance, and is tried again.
	Cut      int              `json:"cut,omitempty"`
	CutTrial integrity.Digest `json:"cut_trial"`
}

const (
	phaseReverted = "reverted"
	phaseRefused  = "refused"
	maxOutcome    = 16 << 10
	maxReason     = 1000
	maxCut        = 2
)

// trial is a manifest whose policy is in force and not confirmed. a.mu is over it.
type trial struct {
	given    *bundle
	before   *loaded
	began    time.Time // by the monotonic clock: stepping the other one changes nothing
	units    []string  // that were active before
	down     []string  // of those, the last time that somebody looked
	looked   time.Time
	answered bool // by the server, to a call that began after the policy was in force
}

// pace is how long things take; tests have their own.
type pace struct {
	trialMin   time.Duration // not confirmed before
	trialMax   time.Duration // taken back then
	trialTick  time.Duration
	unitsEvery time.Duration
	bake       time.Duration // how long the policy before is kept to compare with
	waitFor    time.Duration // of one call that is held
	backoff    time.Duration // the first one
	backoffMax time.Duration
	sampleTick time.Duration
	reportTick time.Duration
	idle       time.Duration // between two answers that brought nothing
}

func normalPace() pace {
	return pace{
		trialMin: 10 * time.Second, trialMax: 120 * time.Second, trialTick: time.Second, unitsEvery: 5 * time.Second, bake: 24 * time.Hour,
		waitFor: 45 * time.Second, backoff: 5 * time.Second, backoffMax: time.Minute, sampleTick: 10 * time.Second, reportTick: 5 * time.Minute, idle: time.Second,
	}
}

// maxFlips is how many distinct contents a manifest may deny that the one before
// allowed, before the host goes back by itself. The server stops a rollout
// earlier than that. Settings may say otherwise.
const maxFlips = 5

// errLater is for what may be right later: the manifest is tried again.
var errLater = errors.New("not now")

// at is where a test looks at what a crash would leave.
func (a *Agent) at(step string) {
	if a.opts.crash != nil {
		a.opts.crash(step)
	}
}

// takeManifest decides about a signed manifest that the server means for this
// host, whose place in the tree is where: it fetches what is missing and puts
// it in force, for a trial. A manifest that the host may not take is refused for
// good, and that is no error here; an error means that it should be tried again.
//
// It fails closed: nothing about it is believed but what the authorities of the
// confirmed policy signed.
func (a *Agent) takeManifest(ctx context.Context, raw []byte, where resource.ID, fetch fetcher) error {
	id := integrity.Digest(sha256.Sum256(raw))
	a.mu.Lock()
	known := a.outcome.Received == id
	a.mu.Unlock()
	if known {
		return nil
	}
	m, err := a.admit(raw, where)
	if err == nil && m == nil {
		return a.remember(outcome{Received: id})
	}
	var policy []byte
	if err == nil {
		if policy, err = a.state.obtainAll(ctx, m, fetch); err != nil {
			err = fmt.Errorf("manifest of epoch %d: %w", m.Epoch, err)
		}
	}
	if err == nil {
		err = a.try(ctx, m, policy)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errLater):
		return err
	}
	phase := phaseRefused
	if _, tried := errors.AsType[revertedError](err); tried {
		phase = phaseReverted
	}
	a.pipe.notice(noticeManifest, fmt.Sprintf("manifest %v is %s: %v", id, phase, err))
	a.log.ErrorContext(ctx, "manifest not taken", slog.String("manifest", id.String()), slog.Any("error", err))
	return a.remember(outcome{Received: id, Failed: id, Phase: phase, Reason: err.Error()})
}

// revertedError says that a policy was in the kernel and was taken out again.
type revertedError struct{ error }

func (e revertedError) Unwrap() error { return e.error }

// admit decides whether this host may take a manifest at all; nil, nil: it has it.
func (a *Agent) admit(raw []byte, where resource.ID) (*codesign.Manifest, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	roots, err := a.state.anchor.roots()
	if err != nil {
		return nil, err
	}
	m, err := codesign.VerifyManifest(raw, roots)
	if err != nil {
		return nil, err
	}
	scope, err := resource.ParseID(m.Scope)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	switch {
	case !scope.Contains(where):
		return nil, fmt.Errorf("it is for %v, this host is %v: %w", scope, where, errs.Denied)
	case a.trial != nil && a.trial.given.Manifest == m.Digest:
		return nil, nil //nolint:nilnil // it is in force
	case a.trial == nil && a.loaded != nil && a.loaded.own && a.loaded.given.Manifest == m.Digest:
		return nil, nil //nolint:nilnil // as above
	}
	if err := a.newEnough(m); err != nil {
		return nil, err
	}
	switch now := a.clock.now(); {
	case now.After(m.NotAfter):
		return nil, fmt.Errorf("hosts may begin with it until %s, it is %s: %w", m.NotAfter.Format(time.RFC3339), now.UTC().Format(time.RFC3339), errs.Denied)
	case now.Before(m.NotBefore):
		return nil, fmt.Errorf("hosts may begin with it at %s: %w", m.NotBefore.Format(time.RFC3339), errLater)
	}
	return m, nil
}

// newEnough compares a manifest's epoch with every one that this host has had,
// and what it undoes with what this host has. a.mu is held.
func (a *Agent) newEnough(m *codesign.Manifest) error {
	least, err := a.floor.Get()
	if _, broken := a.floor.(brokenFloor); err != nil && !(broken && a.loaded != nil) {
		return fmt.Errorf("epoch floor: %w", err)
	}
	if a.loaded != nil {
		least = max(least, a.loaded.policy.Epoch)
	}
	if m.Epoch < least || m.Epoch == least && a.loaded != nil {
		return fmt.Errorf("it has epoch %d, this host has had %d: %w", m.Epoch, least, errs.Conflict)
	}
	if m.Undoes.IsZero() || a.loaded == nil {
		return nil
	}
	has := integrity.Digest{}
	if a.loaded.own {
		has = a.loaded.given.Manifest
	}
	// What is taken back has the epoch before: a host with less never had it, or went back from it.
	if has == m.Undoes || least+1 < m.Epoch || a.outcome.Failed == m.Undoes {
		return nil
	}
	return fmt.Errorf("it takes back manifest %v, and this host has another with epoch %d: %w", m.Undoes, least, errs.Conflict)
}

// try puts a manifest in force that admit let through.
func (a *Agent) try(ctx context.Context, m *codesign.Manifest, policy []byte) error {
	units := a.opts.Units.active(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.newEnough(m); err != nil { // again: a policy may have been handed in meanwhile
		return err
	}
	p, _, err := a.state.believe(policy)
	if err != nil {
		return err
	}
	if p.Epoch != m.Epoch {
		return fmt.Errorf("it says epoch %d and its policy %d: %w", m.Epoch, p.Epoch, errs.Invalid)
	}
	if a.trial != nil {
		if err := a.back(ctx, "another manifest is meant for this host"); err != nil {
			return fmt.Errorf("%w: %w", err, errLater)
		}
	}
	if a.unsettled {
		return fmt.Errorf("the policy in force is not stored yet: %w", errLater)
	}
	given := &bundle{Manifest: m.Digest, Epoch: m.Epoch, Policy: m.Policy, Index: m.Index, Tightens: m.Tightens, Since: a.opts.Now().UnixMicro()}
	a.at("before trial")
	if err := a.state.writeBundle(fileTrial, given); err != nil {
		return fmt.Errorf("%w: %w", err, errLater)
	}
	a.at("trial written")
	if err := a.begun(ctx, given, policy, units); err != nil {
		return errors.Join(err, host.RemoveFile(a.state.path(fileTrial)))
	}
	return nil
}

// begun compiles a manifest's policy, puts it in force, and either confirms it or
// begins the trial. a.mu is held, and the trial is on the disk.
func (a *Agent) begun(ctx context.Context, given *bundle, policy []byte, units []string) error {
	l, err := a.state.load(policy, a.compileOptions(), a.modules())
	if err != nil {
		return err
	}
	if !l.own || l.given.Manifest != given.Manifest {
		return fmt.Errorf("what was stored of the manifest is gone: %w", errLater)
	}
	for _, s := range l.skipped {
		if s.given {
			return fmt.Errorf("%s, which it lists: %s: %w", s.What, s.Why, errs.Untrusted)
		}
	}
	if err := a.lockout(l); err != nil {
		return err
	}
	before := a.loaded
	if err := a.enact(ctx, l); err != nil {
		return revertedError{err}
	}
	a.at("in the kernel")
	// Without a policy before there is nothing to go back to.
	if given.Tightens || before == nil {
		return a.keep(ctx)
	}
	a.trial = &trial{given: given, before: before, began: time.Now(), units: units}
	a.outcome.Received, a.outcome.Failed, a.outcome.Phase, a.outcome.Reason = given.Manifest, integrity.Digest{}, "", ""
	a.saveOutcome()
	a.at("outcome written")
	a.pipe.compareWith(before, a.opts.pace.bake)
	a.pipe.notice(noticeManifest, fmt.Sprintf("manifest %v, epoch %d, is in force for a trial of %v", given.Manifest, given.Epoch, a.opts.pace.trialMax))
	a.link.changed(true)
	return nil
}

// keep confirms the manifest that is in force. a.mu is held.
func (a *Agent) keep(ctx context.Context) error {
	a.trial = nil
	l := a.loaded
	if err := a.renewFloor(); err != nil {
		a.note("make the epoch floor anew: " + err.Error())
	}
	err := a.settle(ctx, l)
	if err != nil {
		a.note("a manifest is in force and could not be stored yet: " + err.Error()) // tend tries again
	}
	a.outcome = outcome{Received: l.given.Manifest}
	a.saveOutcome()
	a.at("kept")
	a.link.changed(false)
	a.link.collectSoon()
	return nil
}

// back ends a trial: the confirmed policy is in force again. a.mu is held. On an
// error the trial goes on and is ended at the next look.
func (a *Agent) back(ctx context.Context, why string) error {
	t := a.trial
	a.at("before back")
	// first on the disk: whatever happens next, this manifest is not begun again
	a.outcome = outcome{Received: t.given.Manifest, Failed: t.given.Manifest, Phase: phaseReverted, Reason: why}
	a.saveOutcome()
	a.at("failure written")
	if err := a.enforcer.Apply(t.before.compiled.Table); err != nil {
		return fmt.Errorf("put the confirmed policy back: %w", err)
	}
	a.at("back in the kernel")
	a.regime++
	a.loaded, a.trial, a.applied = t.before, nil, a.opts.Now()
	a.pipe.use(a.loaded)
	a.pipe.compareWith(nil, 0)
	_ = a.prove(ctx) // told by itself; there is nothing else to put in force
	a.pipe.notice(noticeReverted, fmt.Sprintf("manifest %v, epoch %d, was taken back: %s; epoch %d is in force again", t.given.Manifest, t.given.Epoch, why, a.loaded.policy.Epoch))
	a.link.signal(signalReverted, why)
	if err := host.RemoveFile(a.state.path(fileTrial)); err != nil {
		a.note("end of a trial: " + err.Error()) // the next start ends it once more
	}
	a.at("trial removed")
	// an exception may have run out, a package may have come
	if err := a.recompile(ctx); err != nil {
		a.note("compile the confirmed policy anew: " + err.Error())
	}
	a.link.changed(false)
	a.link.collectSoon()
	return nil
}

// judge looks after a trial until ctx ends. It does not need the server.
func (a *Agent) judge(ctx context.Context) {
	a.recallBefore()
	tick := time.NewTicker(a.opts.pace.trialTick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.lookAtUnits(ctx)
			a.judgeTrial(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// lookAtUnits asks for the units without keeping anyone waiting.
func (a *Agent) lookAtUnits(ctx context.Context) {
	a.mu.Lock()
	t := a.trial
	due := t != nil && len(t.units) > 0 && time.Since(t.looked) >= a.opts.pace.unitsEvery
	a.mu.Unlock()
	if !due {
		return
	}
	now := a.opts.Units.active(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	t.looked = time.Now()
	t.down = slices.DeleteFunc(slices.Clone(t.units), func(u string) bool { return slices.Contains(now, u) })
}

// judgeTrial confirms a trial once the host's own checks pass, and ends it when
// they did not for too long.
func (a *Agent) judgeTrial(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.trial
	if t == nil {
		return
	}
	age := time.Since(t.began)
	var missing []string
	if !t.answered {
		missing = append(missing, "the server has not answered since")
	}
	if len(t.down) > 0 {
		missing = append(missing, "no longer active: "+strings.Join(t.down, ", "))
	}
	if len(t.units) > 0 && t.looked.IsZero() {
		missing = append(missing, "units not looked at yet")
	}
	var err error
	most := cmp.Or(a.state.Settings().Flips, maxFlips)
	switch flips := a.pipe.flipCount(); {
	case flips > most:
		err = a.back(ctx, fmt.Sprintf("it denies %d contents that the manifest before allows and that were used (at most %d)", flips, most))
	case !a.canary.OK:
		err = a.back(ctx, "the canary failed: "+a.canary.Error)
	case len(missing) == 0 && age >= a.opts.pace.trialMin:
		err = a.keep(ctx)
	case age >= a.opts.pace.trialMax:
		err = a.back(ctx, fmt.Sprintf("after %v: %s", a.opts.pace.trialMax, strings.Join(missing, "; ")))
	}
	if err != nil {
		a.log.ErrorContext(ctx, "end of a trial", slog.Any("error", err))
	}
}

// answered notes that the server answered a call.
func (a *Agent) answered(began time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trial != nil && began.After(a.trial.began) {
		a.trial.answered = true
	}
}

// recallBefore has an agent that has just started compare with the policy before
// as the last one did.
func (a *Agent) recallBefore() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded == nil || !a.loaded.own || a.trial != nil {
		return
	}
	left := a.opts.pace.bake - a.opts.Now().Sub(time.UnixMicro(a.loaded.given.Since))
	if left <= 0 || left > a.opts.pace.bake {
		return
	}
	raw, err := readFile(a.state.path(filePrevious), maxBundle)
	if err != nil {
		return // there was none
	}
	before, err := a.state.load(raw, a.compileOptions(), nil)
	if err != nil {
		a.log.Warn("the policy before cannot be compared with", slog.Any("error", err))
		return
	}
	a.pipe.compareWith(before, left)
}

// resume does what a crash in the middle of a trial leaves to do, once the
// confirmed policy is in force. a.mu is held.
func (a *Agent) resume(ctx context.Context) {
	a.state.healBundle()
	t, err := a.state.readBundle(fileTrial)
	if errors.Is(err, errs.NotFound) || err == nil && a.loaded != nil && a.loaded.own && a.loaded.given.Manifest == t.Manifest {
		return // settle completes the second
	}
	if err != nil {
		a.pipe.notice(noticeState, "the record of a trial is damaged; the confirmed policy is in force: "+err.Error())
		_ = host.RemoveFile(a.state.path(fileTrial))
		return
	}
	if t.Tightens {
		policy, err := a.state.chunk(t.Policy, maxBundle)
		if err == nil {
			err = a.begun(ctx, t, policy, nil)
		}
		if err == nil {
			return
		}
		a.note("go on with a manifest that tightens: " + err.Error()) // the server sends it again
		a.outcome.Received = integrity.Digest{}
	} else {
		cut := 1
		if a.outcome.CutTrial == t.Manifest {
			cut += a.outcome.Cut
		}
		why := "the agent or the host ended before it was confirmed"
		if a.outcome.Failed == t.Manifest && a.outcome.Reason != "" {
			cut, why = maxCut, a.outcome.Reason // it was being taken back
		}
		a.outcome = outcome{Cut: cut, CutTrial: t.Manifest}
		if cut >= maxCut {
			a.outcome = outcome{Received: t.Manifest, Failed: t.Manifest, Phase: phaseReverted, Reason: why}
			a.link.signal(signalReverted, why)
		}
		a.pipe.notice(noticeReverted, fmt.Sprintf("manifest %v, epoch %d, was not confirmed: %s", t.Manifest, t.Epoch, why))
	}
	a.saveOutcome()
	if err := host.RemoveFile(a.state.path(fileTrial)); err != nil {
		a.note("end of a trial: " + err.Error())
	}
}

// remember keeps what became of a manifest.
func (a *Agent) remember(o outcome) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.outcome = o
	a.saveOutcome()
	a.link.changed(false)
	return nil
}

// saveOutcome keeps it for the next start; without it the server sends the last
// manifest once more.
func (a *Agent) saveOutcome() {
	a.outcome.Reason = clip(a.outcome.Reason, maxReason)
	if err := a.state.writeJSON(fileOutcome, a.outcome); err != nil {
		a.log.Error("keep what became of a manifest", slog.Any("error", err))
	}
}

func (s *State) readOutcome() outcome {
	var o outcome
	raw, err := readFile(s.path(fileOutcome), maxOutcome)
	if err != nil || pki.UnmarshalStrict(raw, &o, maxOutcome) != nil {
		return outcome{}
	}
	return o
}

// clip makes text fit for a message: at most n bytes, and valid UTF-8.
func clip(s string, n int) string { return strings.ToValidUTF8(s[:min(len(s), n)], "") }
