package host

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ringwall/internal/errs"
)

func writeTree(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for n, s := range files {
		p := filepath.Join(root, n)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKnobs(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{
		"proc/sys/kernel/a":                        "0\n",
		"proc/sys/kernel/high":                     "3\n",
		"proc/sys/kernel/printk":                   "4\t4\t1\t7\n",
		"proc/sys/kernel/word":                     "abc\n",
		"proc/sys/net/ipv4/conf/eth0.1/rp_filter":  "0\n",
		"sys/module/module/parameters/sig_enforce": "Y\n",
		"proc/outside":                             "0\n",
	})
	k := Knobs{Root: root, Facts: KernelFacts{
		Major: 6, Minor: 1, LSM: []string{"capability", "bpf"}, Lockdown: "confidentiality",
		Cmdline: ParseCmdline("quiet debugfs=on"),
	}}
	want := []Knob{
		{Name: "kernel.a", Want: "1", Rule: AtLeast},
		{Name: "kernel.high", Want: "2", Rule: AtLeast},
		{Name: "kernel.printk", Want: "4 4 1 7"},
		{Name: "kernel.word", Want: "1", Rule: AtLeast},
		{Name: "net.ipv4.conf.eth0/1.rp_filter", Want: "1"},
		{Name: "kernel.gone", Want: "1"},
		{Name: "vm.new", Want: "1", Since: [2]int{6, 3}},
		{Name: "kernel.../outside", Want: "1"},
		{Name: "kernel", Want: "1"},
		{Name: "lsm", Want: "bpf", Rule: Contains, Boot: true},
		{Name: "lockdown", Want: "integrity", Boot: true},
		{Name: "module.sig_enforce", Want: "1", Boot: true},
		{Name: "proc_mem.force_override", Want: "never", Boot: true, Since: [2]int{6, 12}},
		{Name: "debugfs", Want: "off", Boot: true},
		{Name: "init_on_free", Want: "1", Boot: true},
		{Name: "quiet", Boot: true},
	}
	type r struct {
		state   KnobState
		applied bool
		err     error
	}
	check := func(got []KnobResult, want map[string]r) {
		t.Helper()
		if len(got) != len(want) {
			t.Errorf("%d results, want %d", len(got), len(want))
		}
		for _, g := range got {
			w := want[g.Name]
			if g.State != w.state || g.Applied != w.applied || !errors.Is(g.Err, w.err) {
				t.Errorf("%s: %+v, want %+v", g.Name, g, w)
			}
		}
	}
	exp := map[string]r{
		"kernel.a": {state: KnobDiffers}, "kernel.high": {state: KnobOK}, "kernel.printk": {state: KnobOK},
		"kernel.word": {state: KnobDiffers, err: errs.Invalid}, "net.ipv4.conf.eth0/1.rp_filter": {state: KnobDiffers},
		"kernel.gone": {state: KnobMissing}, "vm.new": {state: KnobNotApplicable},
		"kernel.../outside": {state: KnobDiffers, err: errs.Invalid}, "kernel": {state: KnobDiffers, err: errs.Invalid},
		"lsm": {state: KnobOK}, "lockdown": {state: KnobOK}, "module.sig_enforce": {state: KnobOK},
		"proc_mem.force_override": {state: KnobNotApplicable}, "debugfs": {state: KnobDiffers},
		"init_on_free": {state: KnobMissing}, "quiet": {state: KnobOK},
	}
	check(k.Check(want), exp)
	exp["kernel.a"] = r{state: KnobOK, applied: true}
	exp["net.ipv4.conf.eth0/1.rp_filter"] = r{state: KnobOK, applied: true}
	check(k.Apply(want), exp)
	for _, n := range []string{"kernel.a", "net.ipv4.conf.eth0/1.rp_filter"} {
		exp[n] = r{state: KnobOK}
	}
	check(k.Apply(want), exp) // idempotent
	for n, s := range map[string]string{"proc/sys/kernel/high": "3\n", "proc/outside": "0\n", "proc/sys/kernel/a": "1\n"} {
		if b, _ := os.ReadFile(filepath.Join(root, n)); string(b) != s {
			t.Errorf("%s is %q", n, b)
		}
	}
}

// TestKnobsHere only reads.
func TestKnobsHere(t *testing.T) {
	for _, r := range (Knobs{Facts: Probe()}).Check(DefaultKnobs()) {
		if r.Err != nil && !errors.Is(r.Err, errs.Denied) {
			t.Errorf("%+v", r)
		}
		t.Logf("%-36s want %-10s have %-10s %s", r.Name, r.Want, r.Have, r.State)
	}
}
