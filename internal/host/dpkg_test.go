package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

const status = `Package: hello
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Source: hello-src (1:2.0-1)
Version: 2.10-3
Conffiles:
 /etc/hello.conf 0cc175b9c0f1b6a831c399e269772661
 /etc/old name.conf 0cc175b9c0f1b6a831c399e269772661 obsolete
 /etc/new.conf newconffile
Description: x
 more
 .
 end

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1


Package: tool
Status: install ok installed
Architecture: all
Version: 3
Essential: yes
`

func TestParseDpkgStatus(t *testing.T) {
	p, err := ParseDpkgStatus(strings.NewReader(status))
	if err != nil || len(p) != 3 {
		t.Fatalf("%v, %v", p, err)
	}
	h := p[0]
	if h.Source != "hello-src" || h.SourceVersion != "1:2.0-1" || h.MultiArch != "same" || len(h.Conffiles) != 3 ||
		!h.Conffiles[1].Obsolete || h.Conffiles[1].Path != "/etc/old name.conf" || h.Conffiles[2].MD5 != "newconffile" {
		t.Errorf("%+v", h)
	}
	if p[1].OnDisk() || !p[2].OnDisk() || p[2].Source != "tool" || !p[2].Essential {
		t.Errorf("%+v", p[1:])
	}
	for name, bad := range map[string]string{
		"continuation first": " x\n",
		"no colon":           "Package hello\n",
		"no status":          "Package: a\nVersion: 1\n",
		"no name":            "Status: install ok installed\n",
		"twice":              "Package: a\nPackage: b\nStatus: install ok installed\n",
		"path in name":       "Package: ../../etc/shadow\nStatus: install ok installed\n",
		"short status":       "Package: a\nStatus: installed\n",
		"no version":         "Package: a\nStatus: install ok installed\nArchitecture: all\n",
		"relative conffile":  "Package: a\nStatus: install ok installed\nConffiles:\n ../x 0cc175b9c0f1b6a831c399e269772661\n",
		"odd conffile":       "Package: a\nStatus: install ok installed\nConffiles:\n /x\n",
		"long line":          "Package: a\nX: " + strings.Repeat("x", maxDpkgLine),
	} {
		if _, err := ParseDpkgStatus(strings.NewReader(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseDpkgStatus(f *testing.F) {
	f.Add([]byte(status))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := ParseDpkgStatus(strings.NewReader(string(b)))
		if err != nil {
			return
		}
		for _, p := range all {
			if p.Name == "" || strings.ContainsAny(p.Name+p.Arch, "/\x00") || p.State == "" {
				t.Errorf("%+v", p)
			}
		}
	})
}

func FuzzParseDpkgFiles(f *testing.F) {
	f.Add([]byte("/a\n/b\nc\n"))
	f.Add([]byte("0cc175b9c0f1b6a831c399e269772661  usr/bin/x\n"))
	f.Add([]byte("auto\n/usr/bin/x\nx.1\n/usr/share/x.1\n\n/usr/bin/y\n10\n/usr/share/y.1\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, err := ParseDiversions(b); err == nil {
			for _, d := range list {
				if !cleanAbs(d.From) || !cleanAbs(d.To) {
					t.Errorf("%+v", d)
				}
			}
		}
		_ = ParseMD5Sums(b, func(name, sum string) {
			if strings.HasPrefix(name, "../") || len(sum) != 32 {
				t.Errorf("%s %s", sum, name)
			}
		})
		_, _ = ParseAlternative("x", b)
	})
}

// fakeRoot is a system with merged /usr and a diverted file.
func fakeRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	const a = "0cc175b9c0f1b6a831c399e269772661" // of "a"
	writeTree(t, root, map[string]string{
		"usr/bin/hello":                         "a",
		"usr/bin/changed":                       "b",
		"usr/bin/tool.real":                     "a",
		"usr/bin/tool":                          "mine",
		"usr/bin/stray":                         "s",
		"usr/share/nosum":                       "n",
		"usr/bin/new":                           "a",
		"etc/hello.conf":                        "edited",
		"var/lib/dpkg/status":                   status,
		"var/lib/dpkg/diversions":               "/bin/tool\n/bin/tool.real\n:\n",
		"var/lib/dpkg/info/hello:amd64.list":    "/.\n/usr\n/bin/hello\n/usr/bin/changed\n/usr/bin/gone\n/usr/share/nosum\n/usr/share/link\n/etc/hello.conf\n",
		"var/lib/dpkg/info/hello:amd64.md5sums": a + "  bin/hello\n" + a + "  usr/bin/changed\n" + a + "  usr/bin/gone\n",
		"var/lib/dpkg/info/tool.list":           "/bin/tool\n",
		"var/lib/dpkg/info/tool.md5sums":        a + "  bin/tool\n",
		"var/lib/dpkg/info/fresh.list":          "/usr/bin/new\n",
		"var/lib/dpkg/info/fresh.md5sums":       a + "  usr/bin/new\n",
		"var/lib/dpkg/updates/0000":             "Package: fresh\nStatus: install ok unpacked\nArchitecture: all\nVersion: 1\n",
		"var/lib/dpkg/updates/tmp.i":            "half",
		"var/lib/dpkg/alternatives/ed":          "auto\n/usr/bin/ed\ned.1\n/usr/share/ed.1\n\n/usr/bin/hello\n10\n\n\n",
	})
	for name, to := range map[string]string{"bin": "usr/bin", "usr/share/link": "/usr/bin/hello", "usr/bin/ed": "/etc/alternatives/ed"} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestVerifyMD5(t *testing.T) {
	d, err := OpenDpkg(fakeRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	sum, err := d.VerifyMD5(t.Context(), VerifyOptions{Unowned: []string{"/bin", "/usr/share"}, Workers: 3}, func(f Finding) error {
		got = append(got, fmt.Sprintf("%s %s %s %v", f.Kind, f.Path, f.Package, f.Conffile))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(got)
	want := []string{
		"changed /etc/hello.conf hello true",
		"changed /usr/bin/changed hello false",
		"gone /usr/bin/gone hello false",
		"no-sum /usr/share/nosum hello false",
		"unowned /usr/bin/stray  false",
		"unowned /usr/bin/tool  false",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if sum.Packages != 3 || sum.Findings != len(want) {
		t.Errorf("%+v", sum)
	}
	if p, err := d.Package("hello:amd64"); err != nil || p.Version != "2.10-3" {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := d.Package("gone"); !errors.Is(err, errs.NotFound) {
		t.Errorf("gone: %v", err)
	}
}

func TestVerifyMD5Stops(t *testing.T) {
	d, err := OpenDpkg(fakeRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	if _, err := d.VerifyMD5(t.Context(), VerifyOptions{}, func(Finding) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("visitor's error: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := d.VerifyMD5(ctx, VerifyOptions{}, func(Finding) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestDpkgHere(t *testing.T) {
	if _, err := os.Stat("/var/lib/dpkg/status"); err != nil {
		t.Skip("SKIP: no dpkg database here")
	}
	d, err := OpenDpkg("/")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Architecture} ${Version} ${source:Package} ${source:Version}\n").Output()
	if err != nil {
		t.Skip("SKIP: no dpkg-query here:", err)
	}
	var want, got []string
	for l := range strings.Lines(string(out)) {
		if s, n, _ := strings.Cut(strings.TrimSpace(l), " "); s != "not-installed" && s != "config-files" {
			want = append(want, n)
		}
	}
	files, sums := 0, 0
	for _, p := range d.Packages() {
		got = append(got, p.Name+" "+p.Arch+" "+p.Version+" "+p.Source+" "+p.SourceVersion)
		ff, err := d.PackageFiles(p)
		if err != nil {
			t.Error(err)
		}
		for _, f := range ff {
			files++
			if f.MD5 != "" {
				sums++
			}
		}
	}
	sort.Strings(want)
	sort.Strings(got)
	if strings.Join(want, "\n") != strings.Join(got, "\n") {
		t.Errorf("dpkg-query lists %d packages, we list %d, or they differ", len(want), len(got))
	}
	alt, err := d.Alternatives()
	if err != nil {
		t.Error(err)
	}
	pid, err := DpkgBusy("/")
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d packages, %d files, %d sums, %d diversions, %d alternatives, busy %d", len(got), files, sums, len(d.Diversions()), len(alt), pid)
}

// TestVerifyMD5Here compares one real package with dpkg --verify's view.
func TestVerifyMD5Here(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: reads every packaged file")
	}
	d, err := OpenDpkg("/")
	if err != nil {
		t.Skip("SKIP: no dpkg database here:", err)
	}
	keep := d.packages[:0:0]
	for _, p := range d.packages {
		if p.Name == "coreutils" || p.Name == "libc6" || p.Name == "bash" {
			keep = append(keep, p)
		}
	}
	d.packages = keep
	sum, err := d.VerifyMD5(t.Context(), VerifyOptions{}, func(f Finding) error {
		if f.Kind == FileChanged && !f.Conffile {
			t.Logf("changed: %+v", f)
		}
		return nil
	})
	if err != nil || sum.Files < 200 {
		t.Errorf("%+v, %v", sum, err)
	}
	t.Logf("%+v", sum)
}

// TestLinks resolves directories below a root as a process with that root
// would: never out of it, and never for ever.
func TestLinks(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{"usr/lib/x/f": "", "etc/f": ""})
	for name, to := range map[string]string{
		"lib": "usr/lib", "abs": "/usr/lib/x", "out": "../../../../etc", "up": "/../../etc", "a": "b", "b": "a", "self": "self",
		"usr/lib/back": "../../lib/x", "chain": "usr/lib/back",
	} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for in, want := range map[string]string{
		"/lib/x/f": "/usr/lib/x/f", "/abs/f": "/usr/lib/x/f", "/out/passwd": "/etc/passwd", "/up/passwd": "/etc/passwd",
		"/chain/f": "/usr/lib/x/f", "/gone/f": "/gone/f", "/lib": "/lib", "/a/f": "", "/self/f": "",
	} {
		got, err := newLinks(root).parent(in)
		if got != want || (want == "") != errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %q, %v; want %q", in, got, err, want)
		}
	}
}
