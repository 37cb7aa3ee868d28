package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"ringwall/internal/errs"
)

// Bounds of the state.
const (
	maxState   = 4 << 20
	stateKeeps = 90 * 24 * time.Hour
)

// Notifier sends messages to all targets, and the same one not twice.
type Notifier struct {
	Targets []Target
	// State is the file that remembers what was told to whom; empty: nothing is
	// remembered, and everything is told.
	State string
	Again time.Duration // tell the same once more after this; 0: never
	Now   func() time.Time
}

// remembered is what is known of one subject.
type remembered struct {
	Fingerprint string               `json:"fingerprint"`
	Told        map[string]time.Time `json:"told"` // by target
}

// state is by subject.
type state map[string]*remembered

// Result is what came of one message.
type Result struct {
	Sent    []string // targets that have it now
	Skipped []string // targets that had it already
}

// Notify sends a message to every target that has not been told yet. One that
// fails does not keep the others from being told, and is tried again next time.
// A state that cannot be read is an error after everything was sent: rather told
// twice than never.
func (n *Notifier) Notify(ctx context.Context, m *Message) (Result, error) {
	var out Result
	unlock, s, err := n.open()
	problems := []error{err}
	defer unlock()
	r := s[m.Subject]
	if r == nil || r.Fingerprint != m.Fingerprint {
		r = &remembered{Fingerprint: m.Fingerprint, Told: map[string]time.Time{}}
		s[m.Subject] = r
	}
	for _, t := range n.Targets {
		if at, ok := r.Told[t.Name()]; ok && (n.Again == 0 || n.Now().Sub(at) < n.Again) {
			out.Skipped = append(out.Skipped, t.Name())
			continue
		}
		if err := t.Send(ctx, m); err != nil {
			problems = append(problems, fmt.Errorf("notify %s: %w", t.Name(), err))
			continue
		}
		r.Told[t.Name()] = n.Now().UTC()
		out.Sent = append(out.Sent, t.Name())
	}
	return out, errors.Join(append(problems, n.save(s))...)
}

// Resolve forgets a subject: it is well again, and its next problem is news.
func (n *Notifier) Resolve(subject string) error {
	unlock, s, err := n.open()
	defer unlock()
	if err != nil || s[subject] == nil {
		return err
	}
	delete(s, subject)
	return n.save(s)
}

// open locks and reads the state. The state returned can always be used.
func (n *Notifier) open() (unlock func(), s state, err error) {
	if n.State == "" {
		return func() {}, state{}, nil
	}
	lock, err := os.OpenFile(n.State+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return func() {}, state{}, fmt.Errorf("notify: state: %w", err)
	}
	unlock = func() { _ = lock.Close() }
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return unlock, state{}, fmt.Errorf("notify: lock state: %w", err)
	}
	s, err = readState(n.State)
	return unlock, s, err
}

func readState(file string) (state, error) {
	b, err := readFile(file, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("notify: state: %w", err)
	}
	s := state{}
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, fmt.Errorf("notify: state %s is damaged, and is made anew: %w", file, errs.Invalid)
	}
	for k, r := range s {
		if r == nil || r.Told == nil {
			delete(s, k)
		}
	}
	return s, nil
}

// save replaces the state at once or not at all, and drops what is old.
func (n *Notifier) save(s state) error {
	if n.State == "" {
		return nil
	}
	for subject, r := range s {
		last := time.Time{}
		for _, at := range r.Told {
			if at.After(last) {
				last = at
			}
		}
		if n.Now().Sub(last) > stateKeeps {
			delete(s, subject)
		}
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("notify: state: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(n.State), ".notify-*")
	if err != nil {
		return fmt.Errorf("notify: state: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), n.State)
	}
	if err != nil {
		return fmt.Errorf("notify: state: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}
