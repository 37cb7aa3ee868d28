package host

import (
	"maps"
	"reflect"
	"strings"
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
	good := map[string]string{
		"sys/kernel/security/lsm":                            "lockdown,capability,landlock,yama,apparmor,bpf",
		"sys/kernel/security/lockdown":                       "none [integrity] confidentiality\n",
		"sys/kernel/security/ima/runtime_measurements_count": "1\n",
		"sys/kernel/btf/vmlinux":                             "x",
		"proc/sys/kernel/ftrace_enabled":                     "1\n",
		"proc/cmdline":                                       "BOOT_IMAGE=/vmlinuz root=/dev/vda1 ro quiet lockdown=integrity\n",
		"sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": "\x06\x00\x00\x00\x01",
	}
	with := func(kv ...string) map[string]string {
		m := maps.Clone(good)
		for i := 0; i < len(kv); i += 2 {
			if kv[i+1] == "-" {
				delete(m, kv[i])
			} else {
				m[kv[i]] = kv[i+1]
			}
		}
		return m
	}
	tests := []struct {
		name, release string
		files         map[string]string
		missing       []string // What, in order
		fix           string
		warns         int
	}{
		{"Debian 12, all well", "6.1.0-40-amd64", good, nil, "", 0},
		{"too old", "5.10.0-33-amd64", good, []string{"kernel 6.1 or newer"}, "linux-image-amd64", 0},
		{"6.0", "6.0.12", good, []string{"kernel 6.1 or newer"}, "", 0},
		{"nonsense release", "banana", good, []string{"kernel version"}, "", 0},
		{
			"no bpf in lsm", "6.8.0-45-generic", with("sys/kernel/security/lsm", "lockdown,capability,apparmor\n"),
			[]string{"bpf in the LSM list"},
			"lsm=lockdown,capability,apparmor,bpf", 0,
		},
		{
			"no securityfs", "6.12.1", with("sys/kernel/security/lsm", "-", "sys/kernel/security/lockdown", "-", "sys/kernel/security/ima/runtime_measurements_count", "-"),
			[]string{"securityfs"},
			"mount -t securityfs", 1,
		},
		{"no BTF", "6.12.1", with("sys/kernel/btf/vmlinux", "-"), []string{"BTF"}, "CONFIG_DEBUG_INFO_BTF", 0},
		{"ftrace off", "6.12.1", with("proc/sys/kernel/ftrace_enabled", "0\n"), []string{"kernel.ftrace_enabled"}, "sysctl", 0},
		{"no IMA", "6.12.1", with("sys/kernel/security/ima/runtime_measurements_count", "-"), []string{"IMA"}, "CONFIG_IMA", 0},
		{"other IMA hash", "6.12.1", with("proc/cmdline", "ima_hash=sha512"), []string{"ima_hash=sha256"}, "remove ima_hash=sha512", 0},
		{"IMA policy", "6.12.1", with("proc/cmdline", "ima_policy=tcb"), nil, "", 1},
		{"no secure boot, no lockdown, container", "6.12.1", with(
			"sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c", "\x06\x00\x00\x00\x00",
			"sys/kernel/security/lockdown", "[none] integrity confidentiality", "run/systemd/container", "systemd-nspawn\n"), nil, "", 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := ProbeFS(tree(tt.files), tt.release)
			var got []string
			var fixes strings.Builder
			for _, p := range k.Missing() {
				if p.Why == "" || p.Fix == "" {
					t.Errorf("%q without why or fix", p.What)
				}
				got = append(got, p.What)
				fixes.WriteString(p.Fix)
			}
			if !reflect.DeepEqual(got, tt.missing) {
				t.Errorf("missing %q, want %q", got, tt.missing)
			}
			if !strings.Contains(fixes.String(), tt.fix) {
				t.Errorf("fix %q lacks %q", fixes.String(), tt.fix)
			}
			if w := k.Warnings(); len(w) != tt.warns {
				t.Errorf("warnings %v, want %d", w, tt.warns)
			}
		})
	}
}

func TestProbeEmptyTreeFailsClosed(t *testing.T) {
	k := ProbeFS(tree(nil), "")
	if n := len(k.Missing()); n < 3 {
		t.Errorf("an unseen kernel lacks only %d things: %v", n, k.Missing())
	}
}

func TestProbeHere(t *testing.T) {
	k := Probe()
	if k.Major < 3 || k.Release == "" || len(k.Cmdline) == 0 {
		t.Errorf("this machine: %+v", k)
	}
	t.Logf("%+v\nmissing: %+v", k, k.Missing())
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
	for _, b := range [][]byte{nil, {1}, {0, 0, 0, 0, 2}, {0, 0, 0, 0, 1, 0}} {
		if _, err := ParseEFIBool(b); err == nil {
			t.Errorf("%v accepted", b)
		}
	}
}
