package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
)

// A new agent must be authorised, and as the agent; then it is in the place of
// the old one, and Run ends for it.
func TestUpgrade(t *testing.T) {
	const roles = allowTool + "programs:\n  - {rule: agent, match: {product: tool, files: [tool]}, may: [agent]}\n"
	l := newLab(t)
	l.program = filepath.Join(l.dir, "installed")
	elf, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	next := string(elf) + "next"
	file := filepath.Join(l.dir, "next")
	if err := errors.Join(os.WriteFile(l.program, []byte("old"), 0o755), os.WriteFile(file, []byte(next), 0o600)); err != nil {
		t.Fatal(err)
	}
	l.prepare(l.policy(5, "enforce", allowTool))
	l.start()
	ask := func(file string) (a UpgradeAnswer, err error) {
		return a, l.client().Call(t.Context(), "upgrade", UpgradeRequest{File: file}, &a)
	}
	refused := func(what string, want error, words string) {
		t.Helper()
		_, err := ask(file)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", what, err)
		}
		if b, err := os.ReadFile(l.program); err != nil || string(b) != "old" {
			t.Errorf("%s: the program was replaced", what)
		}
	}
	refused("nobody signed it", errs.Denied, "add-release")
	var r ReleaseAnswer
	if err := l.client().Call(t.Context(), "release", l.release(next), &r); err != nil {
		t.Fatal(err)
	}
	refused("no rule makes it the agent", errs.Denied, "may: [agent]")
	l.hand(l.policy(6, "enforce", roles))
	if _, err := ask(filepath.Join(l.dir)); !errors.Is(err, errs.Invalid) {
		t.Errorf("a directory: %v", err)
	}
	a, err := ask(file)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(l.program); err != nil || string(b) != next || a.Was != l.agent.self.String() {
		t.Errorf("installed %d bytes, %v; %+v", len(b), err, a)
	}
	if st, err := os.Stat(l.program); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if ok, err := l.kernel.IsGuarded(l.program); err != nil || !ok {
		t.Error("the new program is not guarded")
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := l.client().Status(t.Context()); err != nil {
			break
		}
	}
	l.stop()
	if !l.agent.Upgraded() {
		t.Error("the caller is not told to execute it")
	}
	if left, err := os.ReadDir(filepath.Join(l.state(), dirIncoming)); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
