package host

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

const hook3 = `VERSION 3
APT::Architecture=amd64
APT::Architectures::=amd64
DPkg::Pre-Install-Pkgs::=/x %25

hello 2.9-1 amd64 none < 2.10-3 amd64 foreign /var/cache/apt/archives/hello_2.10-3_amd64.deb
tool - - none < 1:3 all none /home/a b/tool.deb
gone 1 amd64 same > - - none **REMOVE**
hello 2.9-1 amd64 none < 2.10-3 amd64 foreign **CONFIGURE**
`

func TestParseAptHook(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want []AptDeb
	}{
		"version 3": {hook3, []AptDeb{
			{"/var/cache/apt/archives/hello_2.10-3_amd64.deb", "hello", "2.10-3", "amd64"},
			{"/home/a b/tool.deb", "tool", "1:3", "all"},
		}},
		"version 2":         {"VERSION 2\na=b\n\nhello - < 1 /x.deb\nhello - < 1 **CONFIGURE**\n", []AptDeb{{"/x.deb", "hello", "1", ""}}},
		"version 1":         {"/a.deb\n/tmp/../b c.deb\n", []AptDeb{{Path: "/a.deb"}, {Path: "/b c.deb"}}},
		"nothing":           {"", nil},
		"only the settings": {"VERSION 3\n\n", nil},
	} {
		if got, err := ParseAptHook(strings.NewReader(c.in)); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for name, in := range map[string]string{
		"cut in settings": "VERSION 3\na=b\n",
		"odd setting":     "VERSION 3\nab\n\n",
		"short action":    "VERSION 3\n\nhello - < 1 /x.deb\n",
		"relative":        "VERSION 2\n\nhello - < 1 x.deb\n",
		"direction":       "VERSION 2\n\nhello - ? 1 /x.deb\n",
		"no version":      "VERSION 2\n\nhello 1 > - /x.deb\n",
		"package name":    "VERSION 2\n\n../x - < 1 /x.deb\n",
		"empty line":      "/a.deb\n\n/b.deb\n",
		"not a path":      "hello\n",
		"long line":       "/" + strings.Repeat("a", maxHookLine),
		"zero":            "/a\x00b\n",
		"too many lines":  strings.Repeat("/a\n", maxHookLines+1),
	} {
		if got, err := ParseAptHook(strings.NewReader(in)); !errors.Is(err, errs.Invalid) || got != nil {
			t.Errorf("%s: %.3v, %v", name, got, err)
		}
	}
	if _, err := ParseAptHook(strings.NewReader("VERSION 4\n\n")); !errors.Is(err, errs.Unsupported) {
		t.Errorf("version 4: %v", err)
	}
}

// TestParseAptHook_apt lets the real apt speak: it believes to install a
// package that was just built, with a dpkg that does nothing.
func TestParseAptHook_apt(t *testing.T) {
	for _, c := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(c); err != nil {
			t.Skip("SKIP: no", c)
		}
	}
	dir := t.TempDir()
	deb := buildDeb(t, dir)
	for version := range map[string]bool{"1": true, "2": true, "3": true} {
		said := filepath.Join(dir, "said-"+version)
		hook := filepath.Join(dir, "hook-"+version)
		if err := os.WriteFile(hook, []byte("#!/bin/sh\ncat >"+said+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		conf := filepath.Join(dir, "conf-"+version)
		writeTree(t, dir, map[string]string{"conf-" + version: aptDirs(dir) + `Dir::Bin::dpkg "/bin/true";
DPkg::Pre-Install-Pkgs {"` + hook + ` --apt";}; DPkg::Tools::Options::` + hook + `::Version "` + version + `";
`})
		apt := exec.CommandContext(t.Context(), "apt-get", "install", "-y", deb)
		apt.Env = append(os.Environ(), "APT_CONFIG="+conf)
		out, err := apt.CombinedOutput()
		b, e := os.ReadFile(said)
		if e != nil {
			t.Skipf("SKIP: apt did not call the hook: %v, %v: %s", err, e, out)
		}
		got, err := ParseAptHook(bytes.NewReader(b))
		want := AptDeb{Path: deb}
		if version != "1" {
			want.Package, want.Version = "ringwall-probe", "1:2.0~x+1"
		}
		if version == "3" {
			want.Arch = "all"
		}
		if err != nil || !slices.Equal(got, []AptDeb{want}) {
			t.Errorf("version %s: %+v, %v; apt said\n%s", version, got, err, b)
		}
	}
}

// buildDeb builds a package whose file name has a space in it.
func buildDeb(t *testing.T, dir string) string {
	t.Helper()
	writeTree(t, dir, map[string]string{
		"p/DEBIAN/control": "Package: ringwall-probe\nVersion: 1:2.0~x+1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: probe\n",
		"state/status":     "",
		"state/lists/x":    "",
		"cache/archives/x": "",
	})
	deb := filepath.Join(dir, "ringwall probe.deb")
	if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "--build", filepath.Join(dir, "p"), deb).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return deb
}

// aptDirs is a configuration that keeps apt away from the system's.
func aptDirs(dir string) string {
	return strings.ReplaceAll(`Dir::Etc "/nonexistent"; Dir::Etc::parts "/nonexistent"; Dir::State "DIR/state"; Dir::State::status "DIR/state/status";
Dir::Cache "DIR/cache"; Dir::Log "DIR"; Debug::NoLocking "1"; APT::Sandbox::User "root";
`, "DIR", dir)
}

func FuzzParseAptHook(f *testing.F) {
	f.Add([]byte(hook3))
	f.Add([]byte("VERSION 2\na=b\n\nhello - < 1 /x.deb\n"))
	f.Add([]byte("/a.deb\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		debs, err := ParseAptHook(bytes.NewReader(b))
		if err != nil {
			return
		}
		for _, d := range debs {
			if !cleanAbs(d.Path) || strings.ContainsAny(d.Package+d.Arch, "/\x00 ") {
				t.Errorf("%+v", d)
			}
		}
	})
}
