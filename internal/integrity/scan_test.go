package integrity_test

import (
	"slices"
	"strings"
	"testing"

	"ringwall/internal/integrity"
)

// scan follows scan_argument of internal/enforce/bpf/interpreter.h: what the
// kernel programs take an interpreter's arguments for.
func scan(r *integrity.Interpreter, args []string) string {
	var skip, done, stdin, script, doubt bool
	candidate := ""
	long := func(options []string, a string) (match, attached bool) {
		for _, o := range options {
			o = o[:min(len(o), 16)]
			if rest, ok := strings.CutPrefix(a, o); ok && (rest == "" || rest[0] == '=' || len(o) == 16) {
				return true, strings.HasPrefix(rest, "=")
			}
		}
		return false, false
	}
	for _, a := range args {
		switch {
		case skip:
			skip = false
		case script:
			return "script " + a
		case !done && a == "--":
			done = true
		case !done && strings.HasPrefix(a, "--"):
			if is, _ := long(r.InlineLong, a); is {
				return "inline"
			}
			doubt = !strings.Contains(a, "=")
			if is, attached := long(r.ArgLong, a); is {
				skip, doubt = !attached, false
			}
		case !done && len(a) > 1 && (a[0] == '-' || a[0] == '+'):
			for i := 1; i < min(len(a), 12); i++ {
				c := rune(a[i])
				if strings.ContainsRune(r.InlineFlags, c) {
					return "inline"
				}
				if strings.ContainsRune(r.ScriptFlags, c) {
					script = true
					break
				}
				stdin = stdin || strings.ContainsRune(r.StdinFlags, c)
				if strings.ContainsRune(r.ArgFlags, c) {
					skip = i+1 == len(a)
					break
				}
			}
		case stdin || a == "-":
			return "stdin"
		case candidate != "":
			return candidate
		case r.Word == integrity.WordCode:
			return "inline"
		case doubt && !done:
			candidate = "script " + a
		default:
			return "script " + a
		}
	}
	if candidate != "" {
		return candidate
	}
	return "stdin"
}

// Command lines that people and programs write, as the programs of Debian 12
// take them.
func TestBaseline_commandLines(t *testing.T) {
	p, err := integrity.ParsePolicy([]byte(small + "baseline: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, line, want string }{
		{"shell", "sh -c CODE", "inline"},
		{"shell", "bash -ec CODE", "inline"},
		{"shell", "bash -eo pipefail -c CODE", "inline"},
		{"shell", "bash --rcfile F -c CODE", "inline"},
		{"shell", "bash --norc F -c x", "inline"},
		{"shell", "bash +O extglob F", "script F"},
		{"shell", "sh -e F", "script F"},
		{"shell", "bash -s a b", "stdin"},
		{"shell", "bash -l", "stdin"},
		{"shell", "bash -- F", "script F"},
		{"python", "python3 -c CODE", "inline"},
		{"python", "python3 -Bc CODE", "inline"},
		{"python", "python3 -W ignore -X dev F", "script F"},
		{"python", "python3 -Wignore::c F -c x", "script F"},
		{"python", "python3 -m http.server -c x", "script http.server"},
		{"python", "python3 -", "stdin"},
		{"python", "python3 -i", "stdin"},
		{"perl", "perl -we CODE", "inline"},
		{"perl", "perl -I lib -E CODE", "inline"},
		{"perl", "perl -Mstrict;CODE F", "inline"},
		{"perl", "perl -Ilib/e -w F", "script F"},
		{"perl", "perl -T F", "script F"},
		{"ruby", "ruby -ne CODE", "inline"},
		{"ruby", "ruby -r set -C /tmp -E UTF-8 F", "script F"},
		{"ruby", "ruby --encoding utf-8 -e CODE", "inline"},
		{"ruby", "ruby -W0 -rset F", "script F"},
		{"node", "node -pe CODE", "inline"},
		{"node", "node --eval=CODE", "inline"},
		{"node", "node --import data:x F", "inline"},
		{"node", "node -r ./x.js --require fs F", "script F"},
		{"node", "node --conditions x --no-warnings F", "script F"},
		{"php", "php -n -d a=b -r CODE", "inline"},
		{"php", "php --process-code CODE", "inline"},
		{"php", "php -f F", "script F"},
		{"php", "php -c /etc/php.ini F", "script F"},
		{"php", "php -S localhost:80 -t root", "stdin"},
		{"lua", "lua5.4 -l mod -e CODE", "inline"},
		{"lua", "luajit -joff F", "script F"},
		{"lua", "luajit -j off F", "script F"},
		{"tcl", "expect -c CODE", "inline"},
		{"tcl", "expect -f F", "script F"},
		{"awk", "mawk -F : -v x=1 -f F data", "script F"},
		{"awk", "gawk --source CODE", "inline"},
		{"awk", "mawk -F : CODE data", "inline"},
		{"awk", "gawk -i F CODE", "inline"},
		{"python", "python3 --check-hash-based-pycs default F", "script F"},
		{"perl", "perl -d:MOD;CODE F", "inline"},
		{"node", "node --unknown D -e CODE", "inline"},
		{"node", "node --diagnostic-dir D F", "script F"},
		{"node", "node --no-warnings F", "script F"},
		{"fish", "fish --init-command CODE F", "inline"},
		{"busybox", "sh -c CODE", "inline"},
		{"java", "java Main", "script Main"},
	} {
		i := slices.IndexFunc(p.Interpreters, func(r integrity.InterpreterRule) bool { return r.Name == c.name })
		if i < 0 {
			t.Fatalf("no interpreter %s", c.name)
		}
		if got := scan(&p.Interpreters[i].Interpreter, strings.Fields(c.line)[1:]); got != c.want {
			t.Errorf("%s: taken for %q, want %q", c.line, got, c.want)
		}
	}
}

// Programs of Debian 12, by the names that their packages give them.
func TestBaseline_programs(t *testing.T) {
	debian := integrity.Archive{Name: "debian"}
	p, err := integrity.ParsePolicy([]byte(small + "baseline: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	p.Trust.Archives = []integrity.Archive{debian}
	p.Allow = []integrity.AllowRule{{Rule: "debian", Package: &integrity.PackageSet{Archive: "debian", Names: []string{"*"}}}}
	p.Prepare()
	for _, c := range []struct {
		pkg, file, interpreter string
		roles                  integrity.Role
	}{
		{"bash", "bin/bash", "shell", 0},
		{"dash", "bin/dash", "shell", 0},
		{"zsh", "bin/zsh5", "shell", 0},
		{"ksh93u+m", "bin/ksh93", "shell", 0},
		{"busybox-static", "bin/busybox", "busybox", 0},
		{"python3.11-minimal", "usr/bin/python3.11", "python", 0},
		{"pypy3", "usr/bin/pypy3.9", "python", integrity.RoleJIT},
		{"perl-base", "usr/bin/perl", "perl", 0},
		{"kmod", "bin/kmod", "", integrity.RoleModules},
		{"perl", "usr/bin/perl5.36-x86_64-linux-gnu", "perl", 0},
		{"ruby3.1", "usr/bin/ruby3.1", "ruby", 0},
		{"nodejs", "usr/bin/node", "node", integrity.RoleJIT},
		{"php8.2-cli", "usr/bin/php8.2", "php", integrity.RoleJIT},
		{"lua5.4", "usr/bin/lua5.4", "lua", 0},
		{"luajit", "usr/bin/luajit", "lua", integrity.RoleJIT},
		{"tcl8.6", "usr/bin/tclsh8.6", "tcl", 0},
		{"expect", "usr/bin/expect", "tcl", 0},
		{"mawk", "usr/bin/mawk", "awk", 0},
		{"openjdk-17-jre-headless", "usr/lib/jvm/java-17-openjdk-amd64/bin/java", "java", integrity.RoleJIT},
		{"firefox-esr", "usr/lib/firefox-esr/firefox-esr", "", integrity.RoleJIT | integrity.RoleJITShared},
		{"qemu-system-x86", "usr/bin/qemu-system-x86_64", "", integrity.RoleJIT | integrity.RoleJITShared},
		{"systemd", "lib/systemd/systemd", "", integrity.RoleBPF},
		{"runc", "usr/sbin/runc", "", integrity.RoleBPF},
		{"dpkg", "usr/bin/dpkg", "", integrity.RolePackages},
		{"apt", "usr/bin/apt-get", "", integrity.RolePackages},
		{"e2fsprogs", "sbin/e2fsck", "", integrity.RoleBlock},
		{"coreutils", "bin/ls", "", 0},
		{"evil", "usr/bin/node", "node", 0},
		{"evil", "usr/bin/dpkg", "", 0},
	} {
		o := integrity.Object{Kind: integrity.KindExec, SHA256: digest(1), Memberships: []integrity.Membership{{
			Origin: &integrity.Origin{Archive: "debian", Package: c.pkg}, Kinds: integrity.SetOf(integrity.KindExec), Names: []string{c.file},
		}}}
		v := integrity.Evaluate(p, &o, noon())
		if !v.Allow || v.Interpreter != c.interpreter || v.Roles != c.roles {
			t.Errorf("%s of %s: interpreter %q, roles %v; want %q, %v", c.file, c.pkg, v.Interpreter, v.Roles, c.interpreter, c.roles)
		}
	}
}

func TestBaseline_inherited(t *testing.T) {
	p, err := integrity.ParsePolicy([]byte(small + "baseline: 1\n" +
		"interpreters: [{name: shell, inline: deny, stdin: [tty]}]\n" +
		"programs: [{rule: node, match: {files: [x]}, may: [bpf]}]\n" +
		"knobs: [{sysctl: vm.memfd_noexec, want: \"2\", apply: true}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	r := p.Interpreters[0]
	if r.Name != "shell" || r.Inline != integrity.ModeEnforce || r.Stdin != integrity.StdinTTY || r.InlineFlags != "c" || len(r.Match) == 0 || r.Reads != integrity.ReadsCode {
		t.Errorf("shell: %+v", r)
	}
	count := 0
	for _, r := range p.Interpreters {
		if r.Name == "shell" {
			count++
		}
	}
	for _, r := range p.Programs {
		if r.Rule == "node" {
			count += 10
			if r.May != integrity.RoleBPF {
				t.Errorf("node: %+v", r)
			}
		}
	}
	for _, k := range p.Knobs {
		if k.Name == "vm.memfd_noexec" {
			count += 100
			if k.Want != "2" || !k.Apply {
				t.Errorf("knob %+v", k)
			}
		}
	}
	if count != 111 {
		t.Errorf("entries of one name: %d", count)
	}
}
