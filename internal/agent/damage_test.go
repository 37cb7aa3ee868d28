package agent

import (
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// aged is a host whose policy has been replaced once: epoch 6 is in force, 5 was
// before. All that is signed lies in the returned map, by epoch.
func aged(t *testing.T) (*lab, map[int][]byte) {
	t.Helper()
	l := newLab(t)
	p := map[int][]byte{4: l.policy(4, "enforce", allowTool), 5: l.policy(5, "enforce", allowTool), 6: l.policy(6, "enforce", allowTool), 7: l.policy(7, "enforce", allowTool)}
	l.prepare(p[5], l.release("#!/bin/sh\n"))
	l.start()
	l.hand(p[6])
	l.stop()
	return l, p
}

// again is the same host on another disk, as it is now.
func (l *lab) again(t *testing.T) *lab {
	t.Helper()
	c := &lab{t: t, dir: t.TempDir(), keys: l.keys, kernel: newFakeKernel(), clock: l.now()}
	if err := os.CopyFS(c.state(), os.DirFS(l.state())); err != nil {
		t.Fatal(err)
	}
	return c
}

func (l *lab) hand(policy []byte) {
	l.t.Helper()
	if err := l.tryHand(policy); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) tryHand(policy []byte) error {
	var s Status
	return l.client().Call(l.t.Context(), "policy", PolicyRequest{Policy: policy, Force: true}, &s)
}

func (l *lab) put(file string, b []byte) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.state(), file), b, 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// reboot starts the agent on a kernel that knows nothing.
func (l *lab) reboot() {
	l.t.Helper()
	l.kernel = newFakeKernel()
	l.start()
}

// One damaged file, whichever it is, does not keep the policy from being
// enforced after the next boot, and is told.
func TestDamage_oneFile(t *testing.T) {
	host, _ := aged(t)
	kinds := map[string]func(name string) error{
		"empty":     func(n string) error { return os.WriteFile(n, nil, 0o600) },
		"cut":       func(n string) error { st, err := os.Stat(n); return errors.Join(err, os.Truncate(n, st.Size()/2)) },
		"gone":      func(n string) error { return nil },
		"directory": func(n string) error { return os.MkdirAll(filepath.Join(n, "full"), 0o700) },
		"fifo":      func(n string) error { return unix.Mkfifo(n, 0o600) },
	}
	for _, file := range []string{fileAnchor, filePolicy, filePolicyCopy, filePrevious, "floor/epoch", "floor/key", "floor/clock", "events/events.jsonl"} {
		for kind, do := range kinds {
			t.Run(file+" "+kind, func(t *testing.T) {
				t.Parallel()
				l := host.again(t)
				name := filepath.Join(l.state(), file)
				if _, err := os.Stat(name); err != nil && file != "floor/clock" {
					t.Fatal(err)
				}
				if kind == "gone" || kind == "directory" || kind == "fifo" {
					if err := os.RemoveAll(name); err != nil {
						t.Fatal(err)
					}
				} else if file == "floor/clock" {
					l.put(file, []byte("1700000000\n"))
				}
				if err := do(name); err != nil {
					t.Fatal(err)
				}
				l.reboot()
				s := l.status()
				if s.State != StateEnforcing || s.Policy == nil || s.Policy.Epoch != 6 {
					t.Fatalf("state %s: %s, %+v", s.State, s.Text, s.Problems)
				}
				if !l.kernel.protected {
					t.Error("no guards")
				}
				harmless := kind == "gone" && file != fileAnchor && file != filePolicy && !strings.HasPrefix(file, "floor/") ||
					file == "floor/clock" && (kind == "gone" || kind == "cut") || file == filePrevious && kind != "directory" && kind != "fifo" || file == "events/events.jsonl" && kind != "directory"
				told := strings.Contains(strings.Join(s.Problems, "\n"), "state: ")
				if told == harmless {
					t.Errorf("told: %v, problems %q", told, s.Problems)
				}
				if told {
					l.waitFor(`"state-damaged"`)
				}
				// the next start finds everything in order, but a floor, and what no file can replace
				stays := file == "floor/epoch" || file == "floor/key" || file == "floor/clock" && kind == "directory"
				l.stop()
				l.reboot()
				if p := l.status().Problems; len(p) > 0 && !stays {
					t.Errorf("after another start: %q", p)
				}
			})
		}
	}
}

// waitFor waits until the event log has a text.
func (l *lab) waitFor(text string) {
	l.t.Helper()
	var b []byte
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if b, _ = os.ReadFile(filepath.Join(l.state(), "events/events.jsonl")); strings.Contains(string(b), text) {
			return
		}
	}
	l.t.Errorf("the log lacks %s:\n%s", text, b)
}

// Directories of the state may be gone or something else.
func TestDamage_directories(t *testing.T) {
	host, _ := aged(t)
	for _, d := range stateDirs() {
		t.Run(d, func(t *testing.T) {
			t.Parallel()
			l := host.again(t)
			name := filepath.Join(l.state(), d)
			if err := errors.Join(os.RemoveAll(name), os.WriteFile(name, []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
			l.reboot()
			if s := l.status(); s.State != StateEnforcing || s.Policy.Epoch != 6 || len(s.Problems) == 0 {
				t.Errorf("%s, %q", s.State, s.Problems)
			}
			allows := l.kernel.live().Allows(integrity.Key{Digest: sha256.Sum256([]byte("#!/bin/sh\n"))}, integrity.KindScript)
			if allows != (d != dirReleases) {
				t.Errorf("the release is authorised: %v", allows)
			}
		})
	}
}

// An old policy that was signed once is never preferred to a newer one that is
// left, and the newest that is left is enforced even if the host has had newer ones.
func TestDamage_oldPolicies(t *testing.T) {
	host, p := aged(t)
	for name, c := range map[string]struct {
		put  map[string]int // epoch by file; 0: garbage
		want uint64
		says string
	}{
		"put over the one in force":   {map[string]int{filePolicy: 4}, 6, "an old one back"},
		"over the copy":               {map[string]int{filePolicyCopy: 4}, 6, ""},
		"over both":                   {map[string]int{filePolicy: 4, filePolicyCopy: 4}, 5, "is enforced, since an older policy"},
		"over all":                    {map[string]int{filePolicy: 4, filePolicyCopy: 4, filePrevious: 4}, 4, "is enforced, since an older policy"},
		"only the one before is left": {map[string]int{filePolicy: 0, filePolicyCopy: 0}, 5, "is enforced, since an older policy"},
		"a newer one that was signed": {map[string]int{filePolicyCopy: 7}, 7, "an old one back"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := host.again(t)
			for f, epoch := range c.put {
				l.put(f, append([]byte(nil), p[epoch]...))
			}
			l.reboot()
			s := l.status()
			if s.State != StateEnforcing || s.Policy.Epoch != c.want || !strings.Contains(strings.Join(s.Problems, "\n"), c.says) {
				t.Errorf("%s, epoch %d, %q", s.State, s.Policy.Epoch, s.Problems)
			}
			if c.want >= 6 {
				return
			}
			// the floor still keeps other old policies out, and lets new ones in
			for epoch, want := range map[int]error{4: errs.Conflict, 5: errs.Conflict} {
				if uint64(epoch) == c.want {
					continue
				}
				if err := l.tryHand(p[epoch]); !errors.Is(err, want) {
					t.Errorf("epoch %d: %v", epoch, err)
				}
			}
			l.agent.tend(t.Context())
			l.hand(p[7])
			l.stop()
			l.reboot()
			if s := l.status(); s.Policy.Epoch != 7 || len(s.Problems) > 0 {
				t.Errorf("after a new policy: epoch %d, %q", s.Policy.Epoch, s.Problems)
			}
		})
	}
}

// Nothing that is left can be enforced: the agent says so, does not take that
// for a host without a policy, and can be handed one.
func TestDamage_noPolicyLeft(t *testing.T) {
	for name, garbage := range map[string]bool{"damaged": true, "gone": false} {
		t.Run(name, func(t *testing.T) {
			l, p := aged(t)
			for _, f := range []string{filePolicy, filePolicyCopy, filePrevious} {
				if err := os.Remove(filepath.Join(l.state(), f)); err != nil {
					t.Fatal(err)
				}
				if garbage {
					l.put(f, []byte("x"))
				}
			}
			l.reboot()
			s := l.status()
			if s.State != StateNoPolicy || !strings.Contains(s.Text, "no stored policy can be used") || len(s.Problems) == 0 || !l.kernel.protected {
				t.Errorf("%s: %s, %q", s.State, s.Text, s.Problems)
			}
			l.waitFor(`"state-damaged"`)
			if err := l.tryHand(p[5]); !errors.Is(err, errs.Conflict) {
				t.Errorf("an old one: %v", err)
			}
			l.hand(p[6])
			if s := l.status(); s.State != StateEnforcing || s.Policy.Epoch != 6 {
				t.Errorf("%s, %+v", s.State, s.Policy)
			}
		})
	}
}

// A damaged floor lets no policy in but one that is newer than what is in force,
// and that makes it anew.
func TestDamage_floor(t *testing.T) {
	l, p := aged(t)
	l.put("floor/epoch", []byte(`{"version":1,"kind":"local","epoch":1}`+"\n"+strings.Repeat("0", 64)+"\n"))
	l.reboot()
	if s := l.status(); s.State != StateEnforcing || s.Policy.Epoch != 6 || !strings.Contains(s.Floor, "DAMAGED") {
		t.Errorf("%s, %+v, %s", s.State, s.Policy, s.Floor)
	}
	if err := l.tryHand(p[5]); !errors.Is(err, errs.Conflict) {
		t.Errorf("an older policy: %v", err)
	}
	l.hand(p[7])
	if s := l.status(); strings.Contains(s.Floor, "DAMAGED") {
		t.Error(s.Floor)
	}
	l.stop()
	l.reboot()
	if s := l.status(); len(s.Problems) > 0 || s.Policy.Epoch != 7 {
		t.Errorf("%+v, %q", s.Policy, s.Problems)
	}
}

// Neither the anchor nor its copy: nobody can say whom to believe.
func TestDamage_anchorAndCopy(t *testing.T) {
	l, _ := aged(t)
	l.put(fileAnchor, nil)
	l.put(fileAnchorCopy, nil)
	if err := l.tryStart(); err == nil || errors.Is(err, errs.NotFound) {
		t.Errorf("started, or taken for a host that was never set up: %v", err)
	}
}

// A latest time seen that was damaged is whole again as soon as the agent runs:
// a host that boots once more at once must not find it damaged again.
func TestDamage_clockIsMadeAnewAtOnce(t *testing.T) {
	l := newLab(t)
	l.prepare(l.policy(5, "audit", ""))
	name := filepath.Join(l.state(), "floor", "clock")
	if err := os.WriteFile(name, []byte("noon\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.start()
	b, err := os.ReadFile(name)
	if n, parse := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err != nil || parse != nil || n != l.now().Unix() {
		t.Errorf("the latest time seen is %q, %v", b, err)
	}
	if p := strings.Join(l.status().Problems, "\n"); !strings.Contains(p, "latest time seen") {
		t.Errorf("and the status says %q", p)
	}
}
