package csv_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func modeOf(m int) fs.FileMode { return fs.FileMode(m) }

const (
	loader = "/lib64/ld-linux-x86-64.so.2"
	hello  = "#!/bin/sh\necho hello\n"
)

// hostHas are files that a cell's hosts have from elsewhere.
func hostHas(t testing.TB, l *lab, files map[string]string) integrity.Source {
	t.Helper()
	r := l.sign(codesign.DirSource(tree(files)), codesign.ReleaseInfo{Product: "base", Version: "1", Epoch: 1})
	p := l.policy("any", 1, "enforce", allowFleet)
	rel, c, err := codesign.VerifyRelease(r.Bundle, r.Catalogue, codesign.Roots(p, codesign.SignsBuild))
	if err != nil {
		t.Fatal(err)
	}
	s, err := codesign.ReleaseSource(rel, c, r.Names)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func userland(t testing.TB, l *lab) integrity.Source {
	return hostHas(t, l, map[string]string{
		"usr/bin/dash*": elfImage{kind: 3, interp: loader}.bytes(), "usr/bin/env*": elfImage{kind: 3, interp: loader, now: true}.bytes(),
		"usr/bin/python3.11*":                    elfImage{kind: 3, interp: loader, needed: []string{"libc.so.6"}}.bytes(),
		"usr/lib64/ld-linux-x86-64.so.2*":        elfImage{kind: 3, soname: "ld-linux-x86-64.so.2"}.bytes(),
		"usr/lib/x86_64-linux-gnu/libc.so.6":     elfImage{kind: 3, soname: "libc.so.6"}.bytes(),
		"usr/lib/x86_64-linux-gnu/libz.so.1.2.1": elfImage{kind: 3, soname: "libz.so.1"}.bytes(),
	})
}

func TestVerify_passes(t *testing.T) {
	l := newLab(t)
	files := tree(map[string]string{
		"usr/bin/edged*":       elfImage{kind: 3, interp: loader, needed: []string{"libc.so.6", "libz.so.1", "libedge.so.1"}}.bytes(),
		"usr/lib/libedge.so.1": elfImage{kind: 3, soname: "libedge.so.1", needed: []string{"libc.so.6"}}.bytes(),
		"usr/bin/run*":         hello, "usr/share/edged/x.py": "#!/usr/bin/env python3\n", "usr/share/doc/README": "text",
	})
	src := codesign.DirSource(files)
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{},
		cell("canary", 2, l.policy("base", 91, "enforce", allowFleet), userland(t, l)),
		cell("prod", 40, l.policy("base", 90, "enforce", allowFleet), userland(t, l)))
	wantFindings(t, r, nil)
	if r.Outcome != csv.Note || r.Exit(true) != csv.ExitPass || r.Hosts != 42 || r.HostsBlocked != 0 {
		t.Errorf("outcome %s, exit %d, hosts %d, blocked %d", r.Outcome, r.Exit(true), r.Hosts, r.HostsBlocked)
	}
	for _, c := range r.Cells {
		if c.Allowed != 4 || c.Blocked+c.Logged+c.Unasked != 0 {
			t.Errorf("cell %+v", c)
		}
	}
	if len(r.Unchecked) != 1 || !strings.Contains(r.Unchecked[0], "gate") {
		t.Errorf("unchecked: %q", r.Unchecked)
	}
}

// What is allowed by the policy that comes is blocked by the one that is there.
func TestVerify_policyFirst(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"usr/lib/edged/a.py": "a", "usr/lib/edged/b.py": "b", "usr/bin/tool.py": "c"}))
	old := l.policy("base", 89, "enforce", "")
	next := l.policy("base", 90, "enforce", allowFleet)
	other := l.policy("edge", 95, "enforce", allowFleet) // another policy's epochs are nobody's business
	audit := l.policy("base", 88, "audit", "")
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{},
		cell("canary", 12, next), cell("prod", 9812, old), cell("prod", 41, audit), cell("edge", 1, other))
	all := "usr/bin/tool.py usr/lib/edged/a.py usr/lib/edged/b.py"
	wantFindings(t, r, map[csv.ID][]string{csv.PolicyFirst: {"block [1] " + all, "warn [2] " + all}})
	f := r.Findings[0]
	if !strings.Contains(f.Cause, "since epoch 90") || !strings.Contains(f.Fix, "policy base epoch 90") || f.Hosts != 9812 {
		t.Errorf("%+v", f)
	}
	if r.HostsBlocked != 9812 || r.Exit(false) != csv.ExitBlock {
		t.Errorf("%d hosts blocked, exit %d", r.HostsBlocked, r.Exit(false))
	}
	if c := r.Cells[2]; c.Logged != 3 || c.Blocked != 0 || c.Outcome != csv.Warn {
		t.Errorf("audit cell: %+v", c)
	}
}

func TestVerify_unsigned(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a"}))
	r := l.verify(src, nil, csv.Options{}, cell("p", 1, l.policy("base", 1, "enforce", allowFleet)))
	wantFindings(t, r, map[csv.ID][]string{csv.Unauthorised: {"block [0] a.py"}})
	if !strings.Contains(r.Findings[0].Fix, "--release") {
		t.Errorf("fix: %s", r.Findings[0].Fix)
	}
}

func TestVerify_denied(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a", "b.py": "b"}))
	deny := func(what string) *integrity.Policy {
		return l.policy("base", 1, "enforce", allowFleet+"\ndeny:\n  - {rule: gone, reason: bad, "+what+"}")
	}
	ca := "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb" // of "a"
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{},
		cell("one", 1, deny("sha256: ["+ca+"]")), cell("two", 1, deny("product: [{name: edged, below_epoch: 4}]")))
	wantFindings(t, r, map[csv.ID][]string{csv.DeniedByRule: {"block [0] a.py", "block [1] a.py b.py"}})
}

func TestVerify_release(t *testing.T) {
	l := newLab(t)
	other := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a"}))
	p := l.policy("base", 1, "enforce", allowFleet)
	for _, tc := range []struct {
		name, cause string
		r           *csv.SignedRelease
		at          time.Time
	}{
		{"foreign", "does not believe", other.sign(src, codesign.ReleaseInfo{}), time.Time{}},
		{"used up", "use-by", l.sign(src, codesign.ReleaseInfo{Product: "edged", Version: "1", NotAfter: l.now.Add(time.Hour)}), l.now.Add(2 * time.Hour)},
		{"future", "in the future", l.sign(src, codesign.ReleaseInfo{}), l.now.Add(-time.Hour)},
		{"garbage", "malformed", &csv.SignedRelease{Bundle: []byte("{}")}, time.Time{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := l.verify(src, tc.r, csv.Options{Now: tc.at}, cell("p", 1, p))
			got := find(r, csv.BadRelease)
			if len(got) != 1 || !strings.HasPrefix(got[0], "block [0]") || r.Exit(false) != csv.ExitBlock {
				t.Fatalf("%q, exit %d, %+v", got, r.Exit(false), r.Findings)
			}
			if !strings.Contains(r.Findings[0].Cause, tc.cause) {
				t.Errorf("cause %q, want %q", r.Findings[0].Cause, tc.cause)
			}
			if n := find(r, csv.Unauthorised); len(n) > 0 { // one cause is told once
				t.Errorf("and %q", n)
			}
			if r.Cells[0].Blocked != 1 {
				t.Errorf("%+v", r.Cells[0])
			}
		})
	}
	// Where nothing enforces it is a warning.
	r := l.verify(src, other.sign(src, codesign.ReleaseInfo{}), csv.Options{}, cell("p", 1, l.policy("base", 1, "audit", "")))
	wantFindings(t, r, map[csv.ID][]string{csv.BadRelease: {"warn [0] "}})
}

// Every difference from what was signed is told, once.
func TestVerify_changedAfterSigning(t *testing.T) {
	l := newLab(t)
	before := tree(map[string]string{"a.py": "a", "b.py": "b", "gone.py": "g", "tool": hello, "data": "d"})
	r := l.sign(codesign.DirSource(before), codesign.ReleaseInfo{})
	after := tree(map[string]string{"a.py": "a", "b.py": "B", "new.py": "n", "tool*": hello, "data": "D"})
	rep := l.verify(codesign.DirSource(after), r, csv.Options{}, cell("p", 5, l.policy("base", 1, "enforce", allowFleet), userland(t, l)))
	wantFindings(t, rep, map[csv.ID][]string{csv.OtherContent: {"block [] b.py", "block [] gone.py", "block [] new.py"}})
	if rep.Cells[0].Blocked != 2 || rep.HostsBlocked != 5 {
		t.Errorf("%+v", rep.Cells[0])
	}
}

func TestVerify_closure(t *testing.T) {
	l := newLab(t)
	files := map[string]string{
		"usr/bin/prog*":           elfImage{kind: 3, interp: loader, needed: []string{"libwrap.so.0", "libc.so.6"}}.bytes(),
		"usr/lib/edged/plugin.so": elfImage{kind: 3, needed: []string{"libopt.so.1"}}.bytes(),
		"usr/bin/ruby-tool*":      "#!/usr/bin/env ruby\n",
		"usr/share/x/example.rb":  "#!/usr/bin/env ruby\nputs 1\n",
		"usr/bin/rel*":            "#!perl -w\n",
	}
	src := codesign.DirSource(tree(files))
	rel := l.sign(src, codesign.ReleaseInfo{})
	p := l.policy("base", 1, "enforce", allowFleet)
	t.Run("nothing is known", func(t *testing.T) {
		r := l.verify(src, rel, csv.Options{}, cell("p", 1, p))
		wantFindings(t, r, map[csv.ID][]string{csv.BadInterpreter: {"block [0] usr/bin/rel"}})
		if len(r.Unchecked) < 4 {
			t.Errorf("unchecked: %q", r.Unchecked)
		}
	})
	t.Run("missing in the baseline", func(t *testing.T) {
		b, err := csv.ListBaseline(strings.NewReader("/usr/bin/env\n/lib64/ld-linux-x86-64.so.2\n/lib/x86_64-linux-gnu/libc.so.6\n"))
		if err != nil {
			t.Fatal(err)
		}
		r := l.verify(src, rel, csv.Options{Baseline: b}, cell("p", 1, p))
		wantFindings(t, r, map[csv.ID][]string{
			csv.BadInterpreter: {"block [0] usr/bin/rel", "block [0] usr/bin/ruby-tool", "warn [0] usr/share/x/example.rb"},
			csv.MissingLibrary: {"block [0] usr/bin/prog", "warn [0] usr/lib/edged/plugin.so"},
		})
	})
	t.Run("there, and not authorised", func(t *testing.T) {
		root := fstest.MapFS{
			"usr/bin/ruby": {Mode: fs.ModeSymlink, Data: []byte("/etc/alternatives/ruby")}, "etc/alternatives/ruby": {Mode: fs.ModeSymlink, Data: []byte("../../usr/bin/ruby3.1")},
			"usr/bin/ruby3.1": {Data: []byte("ruby"), Mode: 0o755}, "usr/bin/env": {Data: []byte("env"), Mode: 0o755},
			"usr/lib64/ld-linux-x86-64.so.2": {Data: []byte("ld"), Mode: 0o755}, "usr/lib/x86_64-linux-gnu/libc.so.6": {Data: []byte("libc")},
			"usr/lib/x86_64-linux-gnu/libwrap.so.0": {Data: []byte("wrap")}, "usr/lib/x86_64-linux-gnu/libopt.so.1": {Data: []byte("opt")},
			"lib64": {Mode: fs.ModeSymlink, Data: []byte("usr/lib64")},
		}
		r := l.verify(src, rel, csv.Options{Baseline: csv.TreeBaseline(root)},
			cell("p", 1, p), cell("a", 1, l.policy("base", 2, "audit", allowFleet)))
		for _, id := range []csv.ID{csv.BadInterpreter, csv.MissingLibrary} {
			for _, f := range r.Findings {
				if f.ID == id && f.Severity == csv.Block && !strings.Contains(f.Cause, "not absolute") && !strings.Contains(f.Cause, "these are not authorised there") {
					t.Errorf("%+v", f)
				}
			}
		}
		// libwrap and libc of the program, libopt of the plugin
		want := "block [0] usr/bin/prog,warn [0 1] usr/lib/edged/plugin.so,warn [1] usr/bin/prog"
		if got := strings.Join(find(r, csv.MissingLibrary), ","); got != want {
			t.Errorf("libraries: %q", got)
		}
	})
}

func TestVerify_unhardened(t *testing.T) {
	l := newLab(t)
	files := tree(map[string]string{
		"fixed*": elfImage{kind: 2, interp: loader}.bytes(),
		"rwx*":   elfImage{kind: 3, interp: loader, rwx: true}.bytes(),
		"stack*": elfImage{kind: 3, interp: loader, stackX: true}.bytes(),
		"relro*": elfImage{kind: 3, interp: loader, noRelro: true}.bytes(),
		"upx*":   strings.Replace(elfImage{kind: 3, interp: loader, soname: "xxxxUPX!"}.bytes(), "zzz", "", 1),
		"self*":  "#!/bin/sh\nsed 1,2d $0 | tar x\n\x00\x01",
	})
	files["suid"] = &fstest.MapFile{Data: []byte(hello), Mode: 0o755 | fs.ModeSetuid}
	src := codesign.DirSource(files)
	loose := strings.Replace(allowFleet, "allow:", "modes: {memory: audit}\nallow:", 1)
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{},
		cell("tight", 1, l.policy("base", 1, "enforce", allowFleet), userland(t, l)), cell("loose", 1, l.policy("base", 2, "enforce", loose), userland(t, l)))
	wantFindings(t, r, map[csv.ID][]string{
		csv.Unhardened: {"block [0] rwx", "block [0] stack", "warn [1] rwx", "warn [1] stack", "warn [] fixed", "warn [] relro"},
		csv.Payload:    {"block [0] upx", "warn [1] upx", "warn [] self"},
		csv.Privileged: {"warn [] suid"},
	})
}

// What may make code itself may have such memory.
func TestVerify_jit(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"usr/bin/js*": elfImage{kind: 3, interp: loader, rwx: true}.bytes()}))
	p := l.policy("base", 1, "enforce", allowFleet+"\nprograms:\n  - {rule: js, match: {files: [usr/bin/js]}, may: [jit]}")
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{}, cell("p", 1, p, userland(t, l)))
	wantFindings(t, r, nil)
}

func TestVerify_failsClosed(t *testing.T) {
	l := newLab(t)
	p := l.policy("base", 1, "enforce", allowFleet)
	// An ELF file whose headers lead nowhere.
	bad := []byte(elfImage{kind: 3, interp: loader}.bytes())
	bad[32] = 0xff
	bad[33] = 0xff
	files := tree(map[string]string{"bad*": string(bad)})
	src := codesign.DirSource(files)
	r := l.verify(src, l.sign(src, codesign.ReleaseInfo{}), csv.Options{}, cell("p", 1, p))
	wantFindings(t, r, map[csv.ID][]string{csv.Unparsable: {"block [] bad"}})

	// A member that cannot be read at all.
	src = codesign.DirSource(tree(map[string]string{"usr/lib/modules/x.ko.xz": "not xz", "a.py": "a"}))
	r = l.verify(src, nil, csv.Options{}, cell("p", 7, p))
	wantFindings(t, r, map[csv.ID][]string{csv.Unparsable: {"block [] usr/lib/modules/x.ko.xz"}})
	if r.Exit(false) != csv.ExitBlock || r.HostsBlocked != 7 {
		t.Errorf("exit %d, %d hosts", r.Exit(false), r.HostsBlocked)
	}
	// An archive that is cut.
	r = l.verify(codesign.TarSource(strings.NewReader("x")), nil, csv.Options{}, cell("p", 1, p))
	if got := find(r, csv.Unparsable); len(got) != 1 {
		t.Errorf("%q", got)
	}
}

// failing is a policy that cannot be loaded.
func failing(err error) func(context.Context) (*csv.Live, error) {
	return func(context.Context) (*csv.Live, error) { return nil, err }
}

func TestVerify_hold(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a"}))
	rel := l.sign(src, codesign.ReleaseInfo{})
	good := cell("canary", 1, l.policy("base", 1, "enforce", allowFleet))
	for _, err := range []error{fmt.Errorf("base.yaml: %w", errs.Invalid), fs.ErrNotExist} {
		r := l.verify(src, rel, csv.Options{}, good, csv.Cell{Ring: "prod", Hosts: 9, Load: failing(err)})
		wantFindings(t, r, map[csv.ID][]string{csv.UnloadablePolicy: {"hold [1] "}})
		if r.Exit(false) != csv.ExitHold || !r.Cells[1].Unloaded || r.Cells[0].Outcome != csv.Note {
			t.Errorf("exit %d, %+v", r.Exit(false), r.Cells)
		}
	}
	v := &csv.Inventory{Taken: l.now.Add(-48 * time.Hour), Rings: []string{"canary", "empty"}, Cells: []csv.Cell{good}}
	r, err := csv.Verify(t.Context(), csv.Candidate{Source: src, Release: rel, Subject: func() csv.Subject { return csv.Subject{} }}, v,
		csv.Options{Now: l.now.Add(time.Second), MaxAge: 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if got := find(r, csv.UnloadablePolicy); len(got) != 2 || r.Exit(false) != csv.ExitHold {
		t.Errorf("stale, and a ring without cells: %q", got)
	}
	if _, err := csv.Verify(t.Context(), csv.Candidate{Source: src}, &csv.Inventory{}, csv.Options{}); !errors.Is(err, errs.Invalid) {
		t.Errorf("no cells: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := csv.Verify(ctx, csv.Candidate{Source: src, Subject: func() csv.Subject { return csv.Subject{} }}, v, csv.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Evidence that is missing or bad is the caller's to find; it stops the build.
func TestVerify_gates(t *testing.T) {
	l := newLab(t)
	src := codesign.DirSource(tree(map[string]string{"a.py": "a"}))
	rel := l.sign(src, codesign.ReleaseInfo{})
	for want, issue := range map[int]csv.Severity{csv.ExitBlock: csv.Block, csv.ExitHold: csv.Hold} {
		gates := func(_ context.Context, s csv.Subject, r *codesign.Release) ([]csv.GateIssue, error) {
			if s.Name != "dist" || r == nil || r.Product != "edged" {
				t.Errorf("asked about %+v, %+v", s, r)
			}
			return []csv.GateIssue{{issue, "gate review: no evidence", "review it"}}, nil
		}
		r := l.verify(src, rel, csv.Options{Gates: gates}, cell("p", 1, l.policy("base", 1, "enforce", allowFleet)))
		if got := find(r, csv.BadGate); len(got) != 1 || r.Exit(false) != want {
			t.Errorf("%q, exit %d, want %d", got, r.Exit(false), want)
		}
	}
}

// The same question through the compiler that agents use gets the same answer.
func TestVerify_sameAsCompiled(t *testing.T) {
	l := newLab(t)
	files := map[string]string{"usr/bin/p*": elfImage{kind: 3, interp: loader, soname: "p"}.bytes(), "usr/lib/l.so": elfImage{kind: 3}.bytes(), "s.py": "s", "t.sh*": hello, "usr/lib/modules/m.ko": "\x7fELF"}
	src := codesign.DirSource(tree(files))
	rel := l.sign(src, codesign.ReleaseInfo{})
	for i, rules := range []string{
		allowFleet, "", "allow:\n  - {rule: x, kinds: [exec], signer: {authority: Fleet build CA}}",
		"allow:\n  - {rule: x, signer: {authority: Fleet build CA, product: edged, min_epoch: 9}}", allowFleet + "\ndeny:\n  - {rule: d, reason: r, product: [{name: edged, below_epoch: 9}]}",
		"modes: {script: audit}\nallow:\n  - {rule: x, kinds: [library], signer: {authority: Fleet build CA, product: edged}}",
	} {
		p := l.policy("base", 1, "enforce", rules)
		r := l.verify(src, rel, csv.Options{}, cell("p", 1, p, userland(t, l)))
		v, c, err := codesign.VerifyRelease(rel.Bundle, rel.Catalogue, codesign.Roots(p, codesign.SignsBuild))
		if err != nil {
			t.Fatal(err)
		}
		s, err := codesign.ReleaseSource(v, c, rel.Names)
		if err != nil {
			t.Fatal(err)
		}
		compiled, err := integrity.Compile(p, []integrity.Source{s}, integrity.CompileOptions{Now: l.now})
		if err != nil {
			t.Fatal(err)
		}
		allowed, blocked, logged := 0, 0, 0
		for _, rec := range c.All() {
			deny, soft := false, false
			for _, k := range integrity.Kinds() {
				if rec.Kinds.Has(k) && !compiled.Table.Allows(integrity.Key{Digest: rec.Digest}, k) {
					deny = deny || p.Modes[k] == integrity.ModeEnforce
					soft = soft || p.Modes[k] == integrity.ModeAudit
				}
			}
			switch {
			case deny:
				blocked++
			case soft:
				logged++
			default:
				allowed++
			}
		}
		if got := r.Cells[0]; got.Allowed != allowed || got.Blocked != blocked || got.Logged != logged {
			t.Errorf("policy %d: %d, %d, %d; compiled %d, %d, %d", i, got.Allowed, got.Blocked, got.Logged, allowed, blocked, logged)
		}
	}
}

// Two runs say the same, byte by byte.
func TestVerify_deterministic(t *testing.T) {
	l := newLab(t)
	files := map[string]string{}
	for i := range 200 {
		files[fmt.Sprintf("d%d/f%d.py", i%7, i)] = fmt.Sprint(i)
	}
	src := codesign.DirSource(tree(files))
	var first []byte
	for range 5 {
		r := l.verify(src, nil, csv.Options{}, cell("a", 1, l.policy("base", 1, "enforce", "")), cell("b", 1, l.policy("base", 2, "audit", "")))
		var b bytes.Buffer
		if err := r.WriteJSON(&b); err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b.Bytes()
		} else if !bytes.Equal(first, b.Bytes()) {
			t.Fatal("two reports differ")
		}
	}
}
