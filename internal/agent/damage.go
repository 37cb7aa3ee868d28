package agent

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// A damaged state file must not open the host: whoever could write one file
// before a boot, or a disk fault, would else turn enforcement off. What counts is
// kept twice, the policy before too, and the agent goes on with the best that is
// left, loudly. Nothing unsigned is believed for that.

// damage notes what is not as it should be. It shows in the status, as a
// problem, and raises an alert.
func (s *State) noteDamage(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(s.damage, text) {
		s.damage = append(s.damage, text)
	}
}

// readAnchor reads the anchor, or its copy if it is damaged.
func (s *State) readAnchor() error {
	first := s.parseAnchor(fileAnchor)
	if first == nil {
		return nil
	}
	if err := s.parseAnchor(fileAnchorCopy); err != nil {
		if errors.Is(first, errs.NotFound) && !errors.Is(err, errs.NotFound) {
			return err
		}
		return first
	}
	s.noteDamage("the trust anchor is damaged and its copy is used: %v", first)
	return nil
}

func (s *State) parseAnchor(name string) error {
	b, err := readFile(s.path(name), maxAnchor)
	if err != nil {
		return err
	}
	var a Anchor
	if err := pki.UnmarshalStrict(b, &a, maxAnchor); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if _, err := a.roots(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if a.Host == "" || len(a.Authorities) == 0 || len(a.Timestamps) == 0 {
		return fmt.Errorf("%s: no host id, or nobody who may sign a policy: %w", name, errs.Invalid)
	}
	s.anchor = a
	return nil
}

// repair makes the directories that are missing, and moves away what is in the
// place of one, or of a file, and is none.
func (s *State) repair() error {
	for _, f := range []string{fileAnchor, fileAnchorCopy, filePolicy, filePolicyCopy, filePrevious, fileBundle, fileBundleCopy, fileBundlePrev, fileTrial, fileOutcome, fileLink} {
		if st, err := os.Lstat(s.path(f)); err == nil && !st.Mode().IsRegular() {
			s.noteDamage("%s was no file and is moved away", f)
			_ = s.moveAway(f) // what then cannot be written is told where it is written
		}
	}
	for _, d := range stateDirs() {
		if st, err := os.Stat(s.path(d)); err == nil {
			if st.IsDir() {
				continue
			}
			if err := s.moveAway(d); err != nil {
				return fmt.Errorf("repair the state: %w", err)
			}
		}
		if err := os.Mkdir(s.path(d), 0o700); err != nil {
			return fmt.Errorf("repair the state: %w", err)
		}
		s.noteDamage("the directory %s was gone, or something else, and is made anew", d)
	}
	for _, d := range fleetDirs() {
		if st, err := os.Lstat(s.path(d)); err == nil && !st.IsDir() {
			s.noteDamage("%s was no directory and is moved away", d)
			_ = s.moveAway(d)
		}
		_ = os.MkdirAll(s.path(d), 0o700) // of an earlier version, or read-only: who needs it says so
	}
	return nil
}

func (s *State) moveAway(name string) error {
	return os.Rename(s.path(name), s.path(fmt.Sprintf(".damaged-%s-%d", strings.ReplaceAll(name, "/", "-"), time.Now().UnixNano())))
}

// generation is one stored policy.
type generation struct {
	file   string
	bundle []byte
	epoch  uint64
	err    error // why it is not believed
}

// generations are the stored policies, the highest epoch that is believed
// first; among equals the one that should be in force.
func (s *State) generations() []generation {
	var out []generation
	for _, f := range []string{filePolicy, filePolicyCopy, filePrevious} {
		g := generation{file: f}
		if g.bundle, g.err = readFile(s.path(f), maxBundle); g.err == nil {
			var p *integrity.Policy
			if p, _, g.err = s.believe(g.bundle); g.err == nil {
				g.epoch = p.Epoch
			}
		}
		out = append(out, g)
	}
	// what is not believed has epoch 0
	slices.SortStableFunc(out, func(a, b generation) int { return cmp.Compare(b.epoch, a.epoch) })
	return out
}

// confirmed loads the policy that this host confirmed, or the best that is left
// of it. errs.NotFound if there never was one.
//
// It fails open as little as can be: an older policy than this host has had is
// enforced if nothing newer is left, since that is better than none, with an
// alert; the floor still keeps any other old one out.
func (a *Agent) confirmed(made map[string]module) (*loaded, error) {
	least, ferr := a.floor.Get()
	all := a.state.generations()
	var failed error
	for i, g := range all {
		if g.err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", g.file, g.err))
			continue
		}
		l, err := a.state.load(g.bundle, a.compileOptions(), made)
		if err != nil {
			all[i].err = err
			failed = errors.Join(failed, fmt.Errorf("%s: %w", g.file, err))
			continue
		}
		a.tellGeneration(g, all, least, ferr)
		return l, nil
	}
	if ferr == nil && least == 0 && !slices.ContainsFunc(all, func(g generation) bool { return !errors.Is(g.err, errs.NotFound) }) {
		return nil, fmt.Errorf("no policy: %w", errs.NotFound)
	}
	// not errs.NotFound: that would look like a host that never had one
	return nil, fmt.Errorf("no stored policy can be used: %v: %w", failed, errs.Untrusted) //nolint:errorlint // on purpose
}

// tellGeneration notes what is wrong with the stored policies, of which g is used.
func (a *Agent) tellGeneration(g generation, all []generation, least uint64, ferr error) {
	for _, x := range all {
		switch {
		case x.err != nil && x.file == filePrevious, x.file == filePolicyCopy && errors.Is(x.err, errs.NotFound):
			// not needed and, after a change of authorities, not believed; or a host of an earlier version
		case x.err != nil:
			a.state.noteDamage("the stored policy %s is damaged, %s with epoch %d is used: %v", x.file, g.file, g.epoch, x.err)
		case x.file == filePolicy && x.epoch < g.epoch:
			a.state.noteDamage("the stored policy has epoch %d: someone put an old one back; the copy with epoch %d is used", x.epoch, g.epoch)
		}
	}
	if ferr == nil && g.epoch < least {
		a.state.noteDamage("the newest policy that is left has epoch %d, this host has had %d: it is enforced, since an older policy is better than none; apply the newest one", g.epoch, least)
	}
}

// confirm makes a policy the one that the next start begins with. The one before
// is kept, if it is one.
func (s *State) confirm(bundle []byte) error {
	old, err := readFile(s.path(filePolicy), maxBundle)
	if err == nil && !bytes.Equal(old, bundle) {
		if _, _, berr := s.believe(old); berr == nil {
			if err := host.WriteFile(s.path(filePrevious), old, 0o600); err != nil {
				return fmt.Errorf("keep the previous policy: %w", err)
			}
		}
	}
	if b, err := readFile(s.path(filePrevious), maxBundle); err == nil {
		if _, _, err := s.believe(b); err != nil {
			_ = os.Remove(s.path(filePrevious)) // of no use
		}
	}
	for _, f := range []string{filePolicy, filePolicyCopy} {
		have, err := readFile(s.path(f), maxBundle)
		if err == nil && bytes.Equal(have, bundle) {
			continue // a start with a full disk must not fail here
		}
		if err := host.WriteFile(s.path(f), bundle, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// openFloor opens the floor. One that is damaged keeps every new policy out, but
// not the agent: see brokenFloor.
func (s *State) openFloor() host.Floor {
	f, err := host.OpenFloor(s.path(dirFloor), s.Settings().TPM)
	if err != nil {
		s.noteDamage("the epoch floor is damaged: the newest policy that is left is enforced, and no other is accepted: %v", err)
		return brokenFloor{err}
	}
	return f
}

// brokenFloor stands for a floor that cannot be read. It fails closed: no policy
// is known to be new enough.
type brokenFloor struct{ err error }

func (f brokenFloor) Get() (uint64, error) { return 0, f.err }
func (f brokenFloor) Raise(uint64) error   { return f.err }
func (f brokenFloor) Describe() string     { return "DAMAGED: " + f.err.Error() }

// renewFloor makes a damaged floor anew, for a policy that is newer than the one
// in force and was just proven: all that a damaged floor can still ask.
func (a *Agent) renewFloor() error {
	if _, broken := a.floor.(brokenFloor); !broken {
		return nil
	}
	dir, tpm := a.state.path(dirFloor), a.state.Settings().TPM
	if err := host.ResetFloor(dir, tpm, nil); err != nil {
		return err
	}
	f, err := host.InitFloor(dir, tpm, nil)
	if err != nil {
		return err
	}
	a.floor = f
	return nil
}

// tellDamage raises an alert for what was found damaged, and writes the anchor
// and its copy as they should be.
func (a *Agent) tellDamage() {
	for _, d := range a.state.damage {
		a.note("state: " + d)
		a.pipe.notice(noticeState, d)
	}
	a.state.damage = nil
	first, err := readFile(a.state.path(fileAnchor), maxAnchor)
	second, err2 := readFile(a.state.path(fileAnchorCopy), maxAnchor)
	if err == nil && err2 == nil && bytes.Equal(first, second) {
		return
	}
	if err := a.state.saveAnchor(); err != nil {
		a.note("state: write the trust anchor and its copy: " + err.Error())
	}
}
