package csv_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

// judge asks about a build of hello, which is signed, and helper, which is not.
func (l *lab) judge(mode, rules string, run *csv.Run) *csv.Report {
	l.t.Helper()
	const helper = "#!/bin/sh\necho help\n"
	release := l.sign(codesign.DirSource(tree(map[string]string{"usr/bin/hello*": hello})), codesign.ReleaseInfo{})
	r, err := csv.JudgeRun(context.Background(), csv.Trial{
		Candidate: csv.Candidate{
			Source:  codesign.DirSource(tree(map[string]string{"usr/bin/hello*": hello, "usr/bin/helper*": helper})),
			Subject: func() csv.Subject { return csv.Subject{Name: "dist", Format: "directory"} }, Release: release,
		},
		Cell: cell("", 0, l.policy("base", 7, mode, allowFleet+"\n"+rules)), Run: run,
	}, csv.Options{Now: l.now.Add(time.Second)})
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

func TestJudgeRun(t *testing.T) {
	l := newLab(t)
	event := func(phase, kind, path, content string, more ...func(*csv.RunEvent)) csv.RunEvent {
		e := csv.RunEvent{Phase: phase, Reason: "unlisted", Text: "not authorised", Kind: kind, Path: path, SHA256: sum(content)}
		for _, f := range more {
			f(&e)
		}
		return e
	}
	old := func(e *csv.RunEvent) { e.Old = true }
	unmeasured := func(e *csv.RunEvent) { e.Reason = "no-identity" }
	gone := func(e *csv.RunEvent) { e.SHA256, e.Reason = "", "no-identity" }
	did := func(reason string) csv.RunEvent {
		return csv.RunEvent{Phase: csv.PhaseSmoke, Reason: reason, Text: "it did", Process: "/usr/bin/node"}
	}
	const helper = "#!/bin/sh\necho help\n"
	for name, c := range map[string]struct {
		mode, rules string
		events      []csv.RunEvent
		want        map[csv.ID][]string
		exit        int
	}{
		"nothing": {},
		"shipped and unlisted": {
			events: []csv.RunEvent{event(csv.PhaseSmoke, "script", "/usr/bin/helper", helper), event(csv.PhaseSmoke, "script", "/usr/bin/helper", helper)},
			want:   map[csv.ID][]string{csv.Unauthorised: {"block [0] usr/bin/helper"}}, exit: csv.ExitBlock,
		},
		"made at install": {
			events: []csv.RunEvent{event(csv.PhaseInstall, "exec", "/usr/lib/x/made", "made")},
			want:   map[csv.ID][]string{csv.MadeAtInstall: {"block [0] usr/lib/x/made"}}, exit: csv.ExitBlock,
		},
		"gone again": {
			events: []csv.RunEvent{event(csv.PhaseInstall, "script", "/tmp/x", "", gone)},
			want:   map[csv.ID][]string{csv.MadeAtInstall: {"block [0] tmp/x"}}, exit: csv.ExitBlock,
		},
		"listed, and the kernel had not measured it": {events: []csv.RunEvent{event(csv.PhaseSmoke, "script", "/usr/bin/hello", hello, unmeasured)}},
		"the image's own": {
			events: []csv.RunEvent{event(csv.PhaseInstall, "exec", "/usr/sbin/adduser", "adduser", old)},
			want:   map[csv.ID][]string{csv.Unauthorised: {"warn [0] usr/sbin/adduser"}},
		},
		"before the candidate came": {events: []csv.RunEvent{event(csv.PhaseBoot, "exec", "/usr/sbin/cron", "cron", old)}},
		"denied": {
			rules:  "deny:\n  - {rule: bad, sha256: [" + sum(helper) + "], reason: it is bad}",
			events: []csv.RunEvent{event(csv.PhaseSmoke, "script", "/usr/bin/helper", helper)},
			want:   map[csv.ID][]string{csv.DeniedByRule: {"block [0] usr/bin/helper"}}, exit: csv.ExitBlock,
		},
		"a policy that audits": {
			mode:   "audit",
			events: []csv.RunEvent{event(csv.PhaseInstall, "exec", "/usr/lib/x/made", "made"), did("memory-wx")},
			want:   map[csv.ID][]string{csv.MadeAtInstall: {"warn [0] usr/lib/x/made"}, csv.Behaviour: {"warn [0] usr/bin/node"}},
		},
		"switched off": {rules: "modes: {script: off, ptrace: off}", events: []csv.RunEvent{event(csv.PhaseInstall, "script", "/x", "made"), did("ptrace")}},
		"behaviour": {
			events: []csv.RunEvent{did("memory-wx"), did("inline-code"), {Phase: csv.PhaseBoot, Reason: "ptrace", Process: "/usr/bin/gdb"}},
			want:   map[csv.ID][]string{csv.Behaviour: {"block [0] usr/bin/node", "block [0] usr/bin/node"}}, exit: csv.ExitBlock,
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := *l
			l.t = t
			mode := c.mode
			if mode == "" {
				mode = "enforce"
			}
			r := l.judge(mode, c.rules, &csv.Run{Kernel: "6.1.0", Events: c.events, Ended: true, Lines: 1})
			wantFindings(t, r, c.want)
			if got := r.Exit(false); got != c.exit || r.Cells[0].Kernel != "6.1.0" {
				t.Errorf("exit code %d, want %d; kernel %q", got, c.exit, r.Cells[0].Kernel)
			}
			if r.WriteJSON(&bytes.Buffer{}) != nil || r.WriteSARIF(&bytes.Buffer{}, "1") != nil || r.WriteJUnit(&bytes.Buffer{}) != nil {
				t.Error("a form of the report cannot be written")
			}
		})
	}
}

// What was not seen to its end never passes.
func TestJudgeRun_holds(t *testing.T) {
	l := newLab(t)
	for name, run := range map[string]csv.Run{
		"cut off":           {Lines: 3},
		"events lost":       {Ended: true, Lost: 2},
		"no installation":   {Ended: true, Failed: []csv.RunFailed{{What: "installation", Output: "dpkg: no", Command: true}}},
		"the agent did not": {Failed: []csv.RunFailed{{What: "start the agent", Output: "BPF LSM is off"}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := *l
			l.t = t
			r := l.judge("enforce", "", &run)
			if got := find(r, csv.DidNotRun); len(got) != 1 || r.Exit(false) != csv.ExitHold {
				t.Errorf("%q, exit code %d", got, r.Exit(false))
			}
		})
	}
}

func TestParseRun(t *testing.T) {
	text := `{"version":1,"kernel":"6.1.0-56","step":"the kernel is up"}
{"version":1,"event":{"phase":"smoke","reason":"unlisted","text":"x","kind":"script","path":"/x","sha256":"` + sum("x") + `"}}
{"version":1,"failed":{"what":"false","command":true}}
{"version":1,"lost":3,"blind":true}
{"version":1,"end":true}
after the end`
	var steps []string
	r, err := csv.ParseRun(strings.NewReader(text), func(s string) { steps = append(steps, s) })
	if err != nil || !r.Ended || r.Lost != 3 || !r.Blind || len(r.Events) != 1 || len(r.Failed) != 1 || r.Kernel != "6.1.0-56" || len(steps) != 1 {
		t.Errorf("%+v, %v, %q", r, err, steps)
	}
	if r, err := csv.ParseRun(strings.NewReader(text[:100]), nil); err != nil || r.Ended {
		t.Errorf("cut: %+v, %v", r, err)
	}
	for name, bad := range map[string]string{
		"no JSON": "hello\n", "version": `{"version":2,"end":true}` + "\n", "phase": `{"version":1,"event":{"phase":"later"}}` + "\n",
		"kind": `{"version":1,"event":{"phase":"boot","kind":"poem"}}` + "\n", "digest": `{"version":1,"event":{"phase":"boot","sha256":"xy"}}` + "\n",
		"long": `{"version":1,"step":"` + strings.Repeat("x", 300<<10) + `"}` + "\n",
	} {
		if _, err := csv.ParseRun(strings.NewReader(bad), nil); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseRun(f *testing.F) {
	f.Add([]byte(`{"version":1,"kernel":"6.1","event":{"phase":"boot","reason":"unlisted","kind":"exec"}}` + "\n" + `{"version":1,"end":true}` + "\n"))
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := csv.ParseRun(bytes.NewReader(b), func(string) {})
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("%v", err)
			}
			return
		}
		if _, err := json.Marshal(r); err != nil {
			t.Error(err)
		}
	})
}

func TestAuditCopy(t *testing.T) {
	l := newLab(t)
	roots := l.a.Roots(pki.PurposePolicy)
	ca, tsa := roots.CAs[0].Cert, roots.TSAs[0].Cert
	const rules = `allow:
  - {rule: digits, sha256: ["1111111111111111111111111111111111111111111111111111111111111111"]}
  - {rule: own, signer: {authority: Fleet build CA}} # a comment
interpreters:
  - {name: python, inline: deny}
modes: {memory: enforce, firmware: off}
baseline: 1`
	before := l.policy("base", 7, "enforce", rules)
	doc := l.document("base", 7, "enforce", rules)
	out, err := csv.AuditCopy([]byte(doc), ca, tsa)
	if err != nil {
		t.Fatal(err)
	}
	after, err := integrity.ParsePolicy(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range integrity.Kinds() {
		want := integrity.ModeAudit
		if k == integrity.KindFirmware {
			want = integrity.ModeOff
		}
		if after.Modes[k] != want {
			t.Errorf("mode of %v: %v", k, after.Modes[k])
		}
	}
	if p := after.Process; p.Memory != integrity.ModeAudit || p.Ptrace != integrity.ModeAudit || p.BlockWrites != integrity.ModeAudit || p.CodeWrites != integrity.ModeAudit {
		t.Errorf("%+v", p)
	}
	if diff := cmp.Diff(before, after, cmpopts.IgnoreFields(integrity.Policy{}, "Digest", "Modes", "Process", "Trust"), cmpopts.IgnoreUnexported(integrity.Policy{})); diff != "" {
		t.Errorf("more than modes and trust changed:\n%s", diff)
	}
	if n := len(after.Trust.Authorities); n != 2 || !after.Trust.Authorities[1].Certificate.Equal(ca) || len(after.Trust.Logs) != 0 {
		t.Errorf("%d authorities, %d logs", n, len(after.Trust.Logs))
	}
}

// Every policy that the documentation shows can be tried.
func TestAuditCopy_examples(t *testing.T) {
	l := newLab(t)
	roots := l.a.Roots(pki.PurposePolicy)
	n := 0
	for _, dir := range []string{"../../docs/examples", "../integrity/testdata"} {
		es, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, x := range es {
			b, err := os.ReadFile(dir + "/" + x.Name())
			if err != nil {
				continue
			}
			p, err := integrity.ParsePolicy(b)
			if err != nil || p.Supplements != "" {
				continue
			}
			n++
			if _, err := csv.AuditCopy(b, roots.CAs[0].Cert, roots.TSAs[0].Cert); err != nil {
				t.Errorf("%s: %v", x.Name(), err)
			}
		}
	}
	if n == 0 {
		t.Error("no example was found")
	}
	if _, err := csv.AuditCopy([]byte("version: 1\nname: more\nepoch: 1\nsupplements: base\nallow: []\n"), nil, nil); !errors.Is(err, errs.Invalid) {
		t.Errorf("a supplement: %v", err)
	}
}
