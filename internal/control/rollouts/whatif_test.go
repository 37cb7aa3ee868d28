package rollouts_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/control/rollouts"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
)

// What ran and would be refused is found before anybody can approve, and may be
// waived; what only hosts can judge is counted apart.
func TestCheck_whatIf(t *testing.T) {
	k := newKeys(t)
	c := k.content
	kept, keptProgram := c.release(t, k, "1.0", "#!/bin/sh\nexit 0\n")
	dropped, droppedProgram := c.release(t, k, "1.1", "#!/bin/sh\nexit 1\n")
	added, addedProgram := c.release(t, k, "2.0", "#!/bin/sh\nexit 2\n")
	byHash, denied, unknown := integrity.Digest{0x11}, integrity.Digest{0x22}, integrity.Digest{0x33}
	lines := "allow:\n- {rule: ours, signer: {authority: builds}}\n- {rule: tools, sha256: [%s]}\n"
	const packages = `- {rule: debian, package: {archive: debian, names: ["*"]}}` + "\n"
	before := c.put(t, k, 1, integrity.Digest{}, fmt.Sprintf(lines, byHash.String()+", "+denied.String())+packages, kept, dropped)
	next := c.put(t, k, 2, integrity.Digest{}, fmt.Sprintf(lines, byHash.String())+packages+"deny:\n- {rule: malware, sha256: ["+denied.String()+"]}\n- {rule: tools-of-attackers, package: {archive: debian, names: [netcat]}}\n", kept, added)
	item := func(kind string, sum integrity.Digest, hosts int) fleet.Item {
		return fleet.Item{SHA256: sum, Kind: kind, Path: "/opt/" + sum.String()[:4], Hosts: hosts}
	}
	check := func(spec string, base bool) *rollouts.Check {
		t.Helper()
		w := newWorld(t, 10, k)
		for _, x := range w.fleet.all {
			if x.Report.Manifest, x.Report.Epoch = before, 1; !base {
				x.Report.Manifest, x.Report.Epoch = integrity.Digest{}, 0
			}
		}
		w.inventory.all = []fleet.Item{
			item("script", keptProgram, 10), item("script", droppedProgram, 3), item("script", addedProgram, 1), item("exec", byHash, 2),
			{SHA256: integrity.Digest{0x44}, Kind: "exec", Path: "/usr/bin/ls", Hosts: 9, Signer: "package coreutils 9.1-1 of archive debian"},
			{SHA256: integrity.Digest{0x55}, Kind: "exec", Path: "/usr/bin/nc", Hosts: 4, Signer: "package netcat 1.2 of archive debian"},
			item("exec", denied, 7), item("exec", unknown, 9), item("memory", unknown, 9), item("exec", droppedProgram, 2),
		}
		w.put(change, fmt.Sprintf(`{"manifest":%q,"no_rollback":true%s}`, next, spec))
		w.must(ana(), change, "start", `{}`)
		w.tick(0)
		return w.status(change).Check
	}
	got := check("", true)
	what := got.WhatIf
	if what.Asked != 9 || what.Allowed != 4 || what.Unknown != 1 || len(what.Flips) != 3 || what.Hosts != 7 {
		t.Errorf("%+v", what)
	}
	if f := what.Flips[0]; f.SHA256 != denied || f.Hosts != 7 || !strings.Contains(f.Reason, "malware") {
		t.Errorf("the worst is %+v", f)
	}
	if len(got.Problems) != 1 || got.Problems[0].Code != "flips" || !strings.Contains(got.Problems[0].Text, "3 executables that ran would be refused, such as /opt/2200 on 7 hosts") {
		t.Errorf("%+v", got.Problems)
	}
	if got.Base != before.String() || got.Releases.Added != 1 || got.Releases.Removed != 1 || !slices.Equal(got.Releases.Names, []string{"+ edge 2.0", "- edge 1.1"}) {
		t.Errorf("base %s, releases %+v", got.Base, got.Releases)
	}
	if !slices.ContainsFunc(got.Changes, func(x integrity.Change) bool { return x.Effect == integrity.Stricter && x.Where == "deny malware" }) {
		t.Errorf("changes %+v", got.Changes)
	}

	waive := fmt.Sprintf(`,"waive":[{"sha256":%q,"reason":"it is malware"},{"sha256":%q,"reason":"nobody needs it"},{"sha256":%q,"reason":"nor this"}]`, denied, droppedProgram, integrity.Digest{0x55})
	got = check(waive, true)
	if len(got.Problems) != 0 || len(got.WhatIf.Flips) != 3 || got.WhatIf.Flips[0].Waived == "" {
		t.Errorf("%+v %+v", got.Problems, got.WhatIf)
	}

	// Without anything to compare with, what the manifest knows and refuses counts.
	got = check("", false)
	if got.Base != "" || len(got.WhatIf.Flips) != 2 || got.WhatIf.Flips[0].SHA256 != denied || got.WhatIf.Unknown != 3 {
		t.Errorf("%+v", got.WhatIf)
	}

	// A release that its own policy does not trust, or that was changed.
	for d := range c.chunks {
		if d == kept.Release.Catalogue {
			c.chunks[d] = []byte("something else")
		}
	}
	if got = check("", true); len(got.Problems) == 0 || got.Problems[0].Code != "malformed" && got.Problems[0].Code != "untrusted" {
		t.Errorf("a catalogue that is another: %+v", got.Problems)
	}
}
