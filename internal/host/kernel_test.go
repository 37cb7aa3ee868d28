package host

import (
	"reflect"
	"testing"
	"testing/fstest"
)

func tree(files map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for n, s := range files {
		m[n] = &fstest.MapFile{Data: []byte(s), Mode: 0o644}
	}
	return m
}

func TestProbeFS(t *testing.T) {
	k := ProbeFS(tree(map[string]string{
		"sys/kernel/security/lsm":      "lockdown,capability,landlock,yama,apparmor,bpf",
		"sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
		"proc/sys/kernel/osrelease":    "6.1.0-40-amd64\n",
		"proc/cmdline":                 "BOOT_IMAGE=/vmlinuz ro lockdown=integrity\n",
	}), "")
	want := KernelFacts{
		Release: "6.1.0-40-amd64", Major: 6, Minor: 1, LSM: []string{"lockdown", "capability", "landlock", "yama", "apparmor", "bpf"}, Lockdown: "integrity",
		Cmdline: Params{{"BOOT_IMAGE", "/vmlinuz", true}, {"ro", "", false}, {"lockdown", "integrity", true}},
	}
	if !reflect.DeepEqual(k, want) {
		t.Errorf("got %+v\nwant %+v", k, want)
	}
	// unknown, not good
	if k := ProbeFS(tree(nil), "banana"); k.Major != 0 || k.LSM != nil || k.Lockdown != "" || k.Cmdline != nil {
		t.Errorf("an unseen kernel: %+v", k)
	}
}

func TestProbeHere(t *testing.T) {
	k := Probe()
	if k.Major < 3 || k.Release == "" || len(k.Cmdline) == 0 {
		t.Errorf("this machine: %+v", k)
	}
}

func TestParseRelease(t *testing.T) {
	for s, want := range map[string][2]int{
		"6.1.0-40-cloud-amd64": {6, 1}, "6.18.44": {6, 18}, "7.0-rc1": {7, 0}, "10.2": {10, 2},
		"": {}, "6": {}, "6.": {}, "x.y": {}, "-6.1": {}, "6.99999": {},
	} {
		a, b, err := ParseRelease(s)
		if [2]int{a, b} != want || (err != nil) != (want == [2]int{}) {
			t.Errorf("%q: %d.%d, %v", s, a, b, err)
		}
	}
}

func TestParseCmdline(t *testing.T) {
	p := ParseCmdline(`quiet dyndbg="file a.c +p; x" "spaced name=1 2" lsm=a,b lsm=c init-x=1 a=b=c -- lsm=no` + "\n")
	for name, want := range map[string]string{"quiet": "", "dyndbg": "file a.c +p; x", "spaced name": "1 2", "lsm": "c", "init_x": "1", "a": "b=c"} {
		if v, ok := p.Get(name); !ok || v != want {
			t.Errorf("%s: %q, %v; want %q", name, v, ok, want)
		}
	}
	if p.Has("nothing") || len(p) != 7 {
		t.Errorf("%v", p)
	}
	if p[0].Set || !p[1].Set {
		t.Error("flags and values are mixed up")
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add(`a="b c" d -- e`)
	f.Add(`"`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, p := range ParseCmdline(s) {
			if p.Name == "" && p.Value == "" && !p.Set && s == "" {
				t.Error("a word out of nothing")
			}
		}
	})
}

func TestParseSmall(t *testing.T) {
	if got := ParseLockdown("none [confidentiality]"); got != "confidentiality" {
		t.Error(got)
	}
	if got := ParseLockdown("none"); got != "" {
		t.Error(got)
	}
}
