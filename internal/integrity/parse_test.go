package integrity_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/internal/strictyaml"
)

// certificate returns a CA's certificate as PEM, indented for YAML.
func certificate(t testing.TB) string {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	root, err := pki.NewRoot("Example build CA", key, noon())
	if err != nil {
		t.Fatal(err)
	}
	return indent(string(pki.EncodeCertificate(root.Cert)), 8)
}

func indent(s string, n int) string {
	pad := strings.Repeat(" ", n)
	return pad + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n"+pad)
}

const hex1 = "0101010101010101010101010101010101010101010101010101010101010101"

// full is a policy that uses every key.
func full(t testing.TB) string {
	t.Helper()
	return strings.NewReplacer("CERT", certificate(t), "HEX", hex1).Replace(`# a comment
version: 1
name: web-hosts
epoch: 12
baseline: 1
mode: enforce
modes: {script: audit, memory: audit, ptrace: enforce, block_writes: enforce, code_writes: enforce, bpf: audit, firmware: off, kexec: enforce, module: enforce, library: enforce, exec: enforce}
trust:
  authorities:
    - name: Example build CA
      signs: [build, policy, permit, supplement]
      certificate: |
CERT
  timestamps:
    - name: Example TSA
      certificate: |
CERT
  logs:
    - {name: fleet log, key: log.fleet.example+f3ae9601+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDES7Yo9ONnOcHJF738s38VW5BHgqt2PbDX1dvotT7YTayZHJuZ0kSYJfzCfmQJuyST1nv4vv8qDCundwKiYAwU=}
  archives:
    - {name: debian, origins: [Debian], keyring: "mQINBFyy5FABEADZdHDmiXKN7lnhF5xHFPQWFvVE4AABRLHd1Q=="}
allow:
  - {rule: edged, signer: {authority: Example build CA, identity: "spiffe://fleet.example/build/main", product: edged, min_epoch: 12}}
  - {rule: debian, package: {archive: debian, names: ["*"]}}
  - {rule: hotfix, sha256: [HEX], kinds: [exec, module], reason: "bug 12"}
  - {rule: r1, release: [HEX]}
  - {rule: v, fsverity: [HEX]}
  - {rule: img, dmverity: [HEX]}
deny:
  - {rule: leaked, certificate: [{sha256: HEX, from: 2031-01-01T00:00:00Z}, {sha256: HEX}], reason: key stolen}
  - {rule: old, product: [{name: edged, below_epoch: 11}]}
  - {rule: bad, sha256: [HEX], release: [HEX], package: {archive: debian, names: [telnetd]}}
exceptions:
  - {rule: vendor, sha256: [HEX], kinds: [exec], until: 2031-05-01T14:00:00+02:00, reason: "ticket 4711"}
programs:
  - {rule: own-node, match: {files: [usr/bin/node], package: nodejs}, may: [jit, jit-shared, bpf, debug, packages, block]}
  - {rule: other, match: {product: edged, sha256: [HEX]}, may: [jit]}
interpreters:
  - name: python
    match: [{files: ["usr/bin/python3*"]}, {sha256: [HEX]}]
    reads: strict
    inline: deny
    stdin: [tty, pipe, file, socket, null]
    options: {inline: "c", argument: "WX", stdin: "", inline_long: ["--eval"], argument_long: ["--check-hash"]}
    suffixes: [.py, .pyc]
    data: [/etc/, /usr/share/zoneinfo/]
knobs:
  - {sysctl: kernel.yama.ptrace_scope, want: "3", rule: at_least, apply: true}
  - {boot: lockdown, want: integrity}
  - {sysctl: vm.memfd_noexec, want: "2", rule: at_least, since: "6.3"}
`)
}

func TestParsePolicy(t *testing.T) {
	p, err := integrity.ParsePolicy([]byte(full(t)))
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "web-hosts" || p.Epoch != 12 || p.Digest.IsZero() {
		t.Errorf("name %q, epoch %d", p.Name, p.Epoch)
	}
	wantModes := [8]integrity.Mode{0, 2, 2, 1, 2, 0, 2, 1}
	if p.Modes != wantModes || p.Process != (integrity.ProcessRules{Memory: 1, Ptrace: 2, BlockWrites: 2, CodeWrites: 2}) {
		t.Errorf("modes %v, process %v", p.Modes, p.Process)
	}
	if len(p.Allow) != 7 || len(p.Deny) != 3 || len(p.Trust.Authorities) != 1 || len(p.Trust.Timestamps) != 1 || len(p.Trust.Archives) != 1 {
		t.Fatalf("%d allow, %d deny, %+v", len(p.Allow), len(p.Deny), p.Trust)
	}
	if s := p.Allow[0].Signer; *s != (integrity.Signer{Authority: "Example build CA", Identity: "spiffe://fleet.example/build/main", Product: "edged", MinEpoch: 12}) {
		t.Errorf("signer %+v", s)
	}
	if r := p.Allow[6]; r.Rule != "vendor" || !r.Until.Equal(time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC)) || r.Reason != "ticket 4711" ||
		r.Kinds != integrity.SetOf(integrity.KindExec) || len(r.SHA256) != 1 {
		t.Errorf("exception %+v", r)
	}
	if r := p.Deny[0]; len(r.Certificates) != 2 || r.Certificates[0].From.Year() != 2031 || !r.Certificates[1].From.IsZero() {
		t.Errorf("deny %+v", r)
	}
	if r := p.Programs[0]; r.May != integrity.RoleJIT|integrity.RoleJITShared|integrity.RoleBPF|integrity.RoleDebug|integrity.RolePackages|integrity.RoleBlock {
		t.Errorf("roles %v", r.May)
	}
	i := p.Interpreters[0]
	if i.Name != "python" || i.Reads != integrity.ReadsStrict || i.Inline != integrity.ModeEnforce || i.Stdin != 31 ||
		i.InlineFlags != "c" || i.ArgFlags != "WX" || len(i.InlineLong) != 1 || len(i.DataPaths) != 2 || len(i.Match) != 2 {
		t.Errorf("interpreter %+v", i)
	}
	if k := p.Knobs[2]; k.Since != [2]int{6, 3} || k.Rule != "at_least" || k.Apply {
		t.Errorf("knob %+v", k)
	}
	if k := p.Knobs[1]; k != (integrity.Knob{Name: "lockdown", Want: "integrity", Rule: "exactly", Boot: true}) {
		t.Errorf("knob %+v", k)
	}
}

// small is a policy that is only what it must be, to put lines after.
const small = "version: 1\nname: p\nepoch: 1\nmode: audit\n"

// bad is a document that is refused, and the beginning of the problems.
type bad struct {
	name, doc string
	want      []string
	// beyond: a JSON schema cannot express what is wrong.
	beyond bool
}

func badPolicies() []bad {
	return []bad{
		{"empty", "", []string{"p.yaml: empty"}, true},
		{"not YAML", "version: [1", []string{"p.yaml:1:1: not YAML: did not find expected"}, true},
		{"not UTF-8", "version: \"\xff\"", []string{"p.yaml: not UTF-8"}, true},
		{"a list", "- 1", []string{"p.yaml:1:1: is a list, must be a mapping"}, false},
		{"two documents", small + "---\n" + small, []string{"p.yaml:5:1: a second YAML document"}, true},
		{"an anchor", small + "allow: &a []\n", []string{"p.yaml:5:8: anchors are not allowed (fix: remove &a)"}, true},
		{"an alias", small + "allow: &a []\ndeny: *a\n", []string{"p.yaml:5:8: anchors", "p.yaml:6:7: aliases are not allowed"}, true},
		{"a tag", small + "name: !!str x\n", []string{"p.yaml:5:7: tags are not allowed"}, true},
		{"a merge", small + "<<: {name: x}\n", []string{"p.yaml:5:1: merge keys are not allowed"}, true},
		{"deep", small + "allow: " + strings.Repeat("[", 30) + strings.Repeat("]", 30) + "\n", []string{"p.yaml:5:19: nested too deeply"}, true},
		{
			"a log's key with another hash", small + "trust: {logs: [{name: l, key: log.fleet.example+00000000+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABDES7Yo9ONnOcHJF738s38VW5BHgqt2PbDX1dvotT7YTayZHJuZ0kSYJfzCfmQJuyST1nv4vv8qDCundwKiYAwU=}]}\n",
			[]string{"p.yaml:5:31: trust.logs[0].key: must be a log's key"},
			true,
		},
		{"a log without a key", small + "trust: {logs: [{name: l}]}\n", []string{"lacks key"}, false},
		{"everything missing", "{}", []string{"p.yaml:1:1: lacks version (fix: add `version: …`)", "lacks name", "lacks epoch", "lacks mode (fix: add `mode: audit` to begin with)"}, false},
		{"a typo", small + "alow: []\n", []string{"p.yaml:5:1: alow: unknown key (fix: did you mean allow?)"}, false},
		{"an unknown key", small + "frobnicate: 1\n", []string{"p.yaml:5:1: frobnicate: unknown key (fix: use one of version, name,"}, false},
		{"repeated", small + "epoch: 2\n", []string{"p.yaml:5:1: epoch: repeated; it stands in line 3 already"}, true},
		{"other version", "version: 2\nname: p\nepoch: 1\nmode: audit\n", []string{"p.yaml:1:10: version: is `2`, must be a number from 1 to 1"}, false},
		{"epoch in hex", "version: 1\nname: p\nepoch: 0x10\nmode: audit\n", []string{"p.yaml:3:8: epoch: is `0x10`, must be a number"}, true},
		{"epoch zero", "version: 1\nname: p\nepoch: 0\nmode: audit\n", []string{"p.yaml:3:8: epoch: is `0`"}, false},
		{"bad name", "version: 1\nname: Big Name\nepoch: 1\nmode: audit\n", []string{"p.yaml:2:7: name: `Big Name` is no name"}, false},
		{"bad mode", "version: 1\nname: p\nepoch: 1\nmode: enforced\n", []string{"p.yaml:4:7: mode: is `enforced`, must be one of audit, enforce (fix: did you mean enforce?)"}, false},
		{"mode off for all", "version: 1\nname: p\nepoch: 1\nmode: off\n", []string{"p.yaml:4:7: mode: is `off`"}, false},
		{"unknown in modes", small + "modes: {scripts: audit}\n", []string{"p.yaml:5:9: modes.scripts: unknown key (fix: did you mean script?)"}, false},
		{"nothing given", small + "allow:\n", []string{"p.yaml:5:7: allow: is nothing, must be a list"}, false},
		{"rule without a name", small + "allow: [{sha256: [" + hex1 + "]}]\n", []string{"p.yaml:5:9: allow[0]: lacks rule"}, false},
		{"rule without an indicator", small + "allow: [{rule: x}]\n", []string{"p.yaml:5:9: allow[0]: says nothing about what it allows"}, false},
		{
			"rule with two", small + "allow: [{rule: x, sha256: [" + hex1 + "], fsverity: [" + hex1 + "]}]\n",
			[]string{"p.yaml:5:9: allow[0]: has sha256 and fsverity (fix: one indicator a rule: make it 2 rules)"},
			false,
		},
		{
			"rules of one name", small + "allow: [{rule: x, sha256: [" + hex1 + "]}]\ndeny: [{rule: x, sha256: [" + hex1 + "]}]\n",
			[]string{"p.yaml:6:15: deny[0].rule: `x` is taken, in line 5"},
			true,
		},
		{"short digest", small + "allow: [{rule: x, sha256: [abcd]}]\n", []string{"p.yaml:5:28: allow[0].sha256[0]: is `abcd`, must be 64 hex digits"}, false},
		{"digest twice", small + "allow: [{rule: x, sha256: [" + hex1 + ", " + hex1 + "]}]\n", []string{"p.yaml:5:94: allow[0].sha256[1]: repeated"}, false},
		{"no digests", small + "allow: [{rule: x, sha256: []}]\n", []string{"p.yaml:5:27: allow[0].sha256: is empty"}, false},
		{"unknown kind", small + "allow: [{rule: x, sha256: [" + hex1 + "], kinds: [exe]}]\n", []string{"allow[0].kinds[0]: is `exe`, must be one of exec, library"}, false},
		{
			"kind bpf", small + "allow: [{rule: x, sha256: [" + hex1 + "], kinds: [bpf]}]\n",
			[]string{"allow[0].kinds[0]: no rule authorises bpf (fix: name the program under programs, with `may: [bpf]`)"},
			false,
		},
		{
			"unknown authority", small + "allow: [{rule: x, signer: {authority: ca}}]\n",
			[]string{"p.yaml:5:39: allow[0].signer.authority: `ca` is not trusted (fix: add it to trust.authorities)"},
			true,
		},
		{"identity that is none", small + "allow: [{rule: x, signer: {authority: ca, identity: build}}]\n", []string{"allow[0].signer.authority", "allow[0].signer.identity: `build` is no URI"}, false},
		{"epoch of no product", small + "allow: [{rule: x, signer: {authority: ca, min_epoch: 3}}]\n", []string{"allow[0].signer.authority", "allow[0].signer.min_epoch: epochs of different products"}, false},
		{
			"unknown archive", small + "allow: [{rule: x, package: {archive: debain, names: [\"*\"]}}]\ntrust: {archives: [{name: debian, keyring: mQINBFyy5FABEADZdHDmiXKN7lnhF5xHFPQWFvVE4A==}]}\n",
			[]string{"p.yaml:5:38: allow[0].package.archive: `debain` is not in trust.archives (fix: did you mean debian?)"},
			true,
		},
		{
			"bad pattern", small + "deny: [{rule: x, package: {archive: debian, names: [\"[\"]}}]\ntrust: {archives: [{name: debian, keyring: mQINBFyy5FABEADZdHDmiXKN7lnhF5xHFPQWFvVE4A==}]}\n",
			[]string{"p.yaml:5:53: deny[0].package.names[0]: `[` is no pattern"},
			true,
		},
		{"certificate that is none", small + "trust: {authorities: [{name: ca, signs: [build], certificate: x}]}\n", []string{"trust.authorities[0].certificate: must be a PEM certificate"}, false},
		{
			"signs what nobody does", small + "trust: {authorities: [{name: ca, signs: [builds], certificate: x}]}\n",
			[]string{"trust.authorities[0].signs[0]: `builds` must be one of build, breakglass, policy, permit, supplement (fix: did you mean build?)", "certificate"},
			false,
		},
		{"keyring that is none", small + "trust: {archives: [{name: debian, keyring: aGVsbG8=}]}\n", []string{"trust.archives[0].keyring: is no keyring"}, true},
		{"deny nothing", small + "deny: [{rule: x}]\n", []string{"deny[0]: says nothing about what it denies"}, false},
		{"epoch of a deny", small + "deny: [{rule: x, product: [{name: edged}]}]\n", []string{"deny[0].product[0]: lacks below_epoch"}, false},
		{"exception without an end", small + "exceptions: [{rule: x, sha256: [" + hex1 + "]}]\n", []string{"exceptions[0]: lacks reason", "exceptions[0]: lacks until"}, false},
		{
			"exception without a zone", small + "exceptions: [{rule: x, sha256: [" + hex1 + "], reason: y, until: 2031-05-01}]\n",
			[]string{"exceptions[0].until: must be a time with its zone (fix: as in 2031-05-01T12:00:00Z)"},
			false,
		},
		{"until in an allow rule", small + "allow: [{rule: x, sha256: [" + hex1 + "], until: 2031-05-01T12:00:00Z}]\n", []string{"allow[0].until: unknown key"}, false},
		{"match of nothing", small + "programs: [{rule: x, match: {}, may: [jit]}]\n", []string{"programs[0].match: matches nothing"}, false},
		{
			"absolute name", small + "programs: [{rule: x, match: {files: [/usr/bin/node]}, may: [jit]}]\n",
			[]string{"programs[0].match.files[0]: `/usr/bin/node` starts with a slash (fix: names are as in the package: usr/bin/node)"},
			false,
		},
		{"unknown role", small + "programs: [{rule: x, match: {files: [a]}, may: [root]}]\n", []string{"programs[0].may[0]: is `root`, must be one of agent, block, bpf"}, false},
		{"the agent's role by a name", small + "programs: [{rule: x, match: {files: [a]}, may: [agent]}]\n", []string{"programs[0]: the agent's role to whatever has such a name"}, true},
		{"interpreter half said", small + "interpreters: [{name: x, match: [{files: [a]}]}]\n", []string{"interpreters[0]: lacks reads", "interpreters[0]: lacks inline"}, true},
		{"interpreter with a long name", small + "interpreters: [{name: averyveryverylongname, match: [{files: [a]}], reads: any, inline: deny}]\n", []string{"interpreters[0].name: too long"}, false},
		{"long suffix", small + "interpreters: [{name: x, match: [{files: [a]}], reads: any, inline: deny, suffixes: [.javascript]}]\n", []string{"interpreters[0].suffixes[0]: `.javascript` is no suffix"}, false},
		{"long option", small + "interpreters: [{name: x, match: [{files: [a]}], reads: any, inline: deny, options: {inline_long: [-e]}}]\n", []string{"inline_long[0]: `-e` is no long option"}, false},
		{"letters twice", small + "interpreters: [{name: x, match: [{files: [a]}], reads: any, inline: deny, options: {inline: ee}}]\n", []string{"options.inline: must be option letters, each once"}, true},
		{"all is data", small + "interpreters: [{name: x, match: [{files: [a]}], reads: strict, inline: deny, data: [/]}]\n", []string{"data[0]: everything would be data"}, false},
		{"data with a star", small + "interpreters: [{name: x, match: [{files: [a]}], reads: strict, inline: deny, data: [/home/*/]}]\n", []string{"data[0]: `/home/*/` has a wildcard"}, false},
		{"no such built-in interpreter", small + "baseline: 1\ninterpreters: [{name: pithon, inline: deny}]\n", []string{"interpreters[0]: lacks match", "interpreters[0]: lacks reads"}, true},
		{"stdin from elsewhere", small + "interpreters: [{name: x, match: [{files: [a]}], reads: any, inline: deny, stdin: [net]}]\n", []string{"stdin[0]: is `net`, must be one of tty"}, false},
		{"knob of two sorts", small + "knobs: [{sysctl: a.b, boot: c, want: x}]\n", []string{"knobs[0]: must have one of sysctl and boot"}, false},
		{"knob twice", small + "knobs: [{sysctl: a.b, want: x}, {sysctl: a.b, want: y}]\n", []string{"knobs[1].sysctl: `a.b` is set in line 5 already"}, true},
		{"knob with a number", small + "knobs: [{sysctl: a.b, want: 1}]\n", []string{"knobs[0].want: must be a text (fix: put it in quotes)"}, false},
		{"boot parameter applied", small + "knobs: [{boot: c, want: x, apply: true}]\n", []string{"knobs[0].apply: a boot parameter cannot be applied"}, false},
		{"since nothing", small + "knobs: [{boot: c, want: x, since: \"6\"}]\n", []string{"knobs[0].since: must be a kernel version"}, false},
		{"unknown baseline", small + "baseline: 9\n", []string{"p.yaml:5:11: baseline: is `9`, must be a number from 0 to 1"}, false},
		{
			"supplement that does more", "version: 1\nname: s\nepoch: 1\nsupplements: p\nmode: audit\ndeny: []\n",
			[]string{"p.yaml:5:1: mode: a supplement may only hold allow and exceptions (fix: move it to policy p)", "p.yaml:6:1: deny: a supplement"},
			false,
		},
	}
}

func TestParsePolicy_refuses(t *testing.T) {
	for _, c := range badPolicies() {
		t.Run(c.name, func(t *testing.T) {
			p, err := integrity.ParseNamed("p.yaml", []byte(c.doc))
			var pe *strictyaml.Error
			if p != nil || !errors.As(err, &pe) || !errors.Is(err, errs.Invalid) {
				t.Fatalf("policy %v, error %v", p, err)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(c.want) {
				t.Fatalf("%d problems, want %d:\n%v", len(lines), len(c.want), err)
			}
			for i, w := range c.want {
				if !strings.Contains(lines[i], w) {
					t.Errorf("got  %s\nwant %s", lines[i], w)
				}
			}
		})
	}
}

func TestParsePolicy_bounds(t *testing.T) {
	if _, err := integrity.ParsePolicy(make([]byte, 5<<20)); !errors.Is(err, errs.Invalid) {
		t.Errorf("5 MiB: %v", err)
	}
	if _, err := integrity.ParsePolicy([]byte(small + "allow:\n" + strings.Repeat("- []\n", 400_000))); !errors.Is(err, errs.Invalid) {
		t.Errorf("many entries: %v", err)
	}
	_, err := integrity.ParsePolicy([]byte(small + "allow:\n" + strings.Repeat("- []\n", 4000)))
	var pe *strictyaml.Error
	if !errors.As(err, &pe) || len(pe.Problems) != 50 || pe.More != 3950 || !strings.HasSuffix(err.Error(), "and 3950 more") {
		t.Errorf("many problems: %.200v", err)
	}
}

func TestParsePolicy_largeIsFine(t *testing.T) {
	var b strings.Builder
	b.WriteString(small + "allow:\n  - rule: many\n    sha256:\n")
	for i := range 40_000 {
		fmt.Fprintf(&b, "      - %064x\n", i+1)
	}
	p, err := integrity.ParsePolicy([]byte(b.String()))
	if err != nil || len(p.Allow[0].SHA256) != 40_000 {
		t.Fatalf("%.200v", err)
	}
}

func TestParsePolicy_supplement(t *testing.T) {
	base, err := integrity.ParsePolicy([]byte(full(t)))
	if err != nil {
		t.Fatal(err)
	}
	s, err := integrity.ParsePolicy([]byte("version: 1\nname: team\nepoch: 3\nsupplements: web-hosts\nallow:\n" +
		"  - {rule: team-app, signer: {authority: Example build CA, product: app}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := integrity.Join(base, s)
	if err != nil {
		t.Fatal(err)
	}
	if r := p.Allow[len(p.Allow)-1]; r.Rule != "team-app" || r.Supplement != "team" || len(base.Allow) != len(p.Allow)-1 || p.Digest != base.Digest {
		t.Errorf("joined rule %+v", r)
	}
	for name, doc := range map[string]string{
		"other base":      "version: 1\nname: team\nepoch: 3\nsupplements: db-hosts\n",
		"rule exists":     "version: 1\nname: team\nepoch: 3\nsupplements: web-hosts\nallow: [{rule: edged, sha256: [" + hex1 + "]}]\n",
		"deny name":       "version: 1\nname: team\nepoch: 3\nsupplements: web-hosts\nallow: [{rule: leaked, sha256: [" + hex1 + "]}]\n",
		"authority":       "version: 1\nname: team\nepoch: 3\nsupplements: web-hosts\nallow: [{rule: x, signer: {authority: other}}]\n",
		"unknown archive": "version: 1\nname: team\nepoch: 3\nsupplements: web-hosts\nallow: [{rule: x, package: {archive: other, names: [x]}}]\n",
		"a base policy":   small,
	} {
		s, err := integrity.ParsePolicy([]byte(doc))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := integrity.Join(base, s); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := integrity.Join(s, s); !errors.Is(err, errs.Invalid) {
		t.Errorf("supplement of a supplement: %v", err)
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(full(f)))
	for _, c := range badPolicies() {
		f.Add([]byte(c.doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		p, err := integrity.ParsePolicy(doc)
		if err != nil {
			if p != nil || !errors.Is(err, errs.Invalid) || err.Error() == "" {
				t.Fatalf("%v, %v", p, err)
			}
			return
		}
		h := (&dice{b: doc}).host()
		for _, o := range h.objects() {
			integrity.Evaluate(p, &o, noon())
		}
		if _, err := integrity.Compile(p, h.sources(), integrity.CompileOptions{Now: noon()}); err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatal(err)
		}
	})
}
