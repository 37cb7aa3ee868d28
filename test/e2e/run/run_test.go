package run_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// TestRun tries two builds of a package: one does what was signed, the other
// brings a helper that nobody signed, and its postinst makes a script and runs it.
// Exactly those two are found.
func TestRun(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots two guests (-short)")
	}
	k, err := vm.FindKernel(t.Context(), "6.1")
	skipUnsupported(t, err)
	// the image of test/vm's own test, which is there already
	image, err := vm.DebianImage(t.Context(), vm.Options{Packages: vm.Lean(), Pool: vm.SmallPool(), Kernels: []vm.Kernel{k}})
	skipUnsupported(t, err)
	l := &lab{T: t, dir: t.TempDir(), image: image, kernel: k}
	t.Setenv("PATH", l.dir+":"+os.Getenv("PATH"))
	l.prepare()

	t.Run("bad, by systemd", func(t *testing.T) {
		code, findings := l.try(t, "bad", "systemd")
		want := []string{"CSV001 block usr/lib/tryme/helper", "CSV009 block usr/lib/tryme/made"}
		if code != 1 || !slices.Equal(blocks(findings), want) {
			t.Errorf("exit code %d, %q, want 1, %q", code, findings, want)
		}
	})
	t.Run("good, without an init", func(t *testing.T) {
		code, findings := l.try(t, "good", "none")
		if code != 0 || len(blocks(findings)) > 0 {
			t.Errorf("exit code %d, %q", code, findings)
		}
	})
}

// blocks are the findings that are more than warnings.
func blocks(findings []string) []string {
	var out []string
	for _, f := range findings {
		if !strings.Contains(f, " warn ") {
			out = append(out, f)
		}
	}
	return out
}

func skipUnsupported(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

type lab struct {
	*testing.T
	dir    string
	image  vm.Image
	kernel vm.Kernel
}

func (l *lab) run(name string, args ...string) string {
	l.Helper()
	c := exec.CommandContext(l.Context(), name, args...)
	c.Dir = l.dir
	out, err := c.Output()
	if err != nil {
		l.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (l *lab) write(name, text string, mode os.FileMode) {
	l.Helper()
	path := filepath.Join(l.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
		l.Fatal(err)
	}
}

// hostPackages are those without which the installation of a package cannot be
// watched; the rest of the image is warned of.
func hostPackages() []string {
	return []string{
		"dash_*", "dpkg_*", "libc6_*", "libselinux1_*", "libpcre2-8-0_*", "zlib1g_*", "liblzma5_*", "libbz2-1.0_*", "libzstd1_*", "libmd0_*",
		"tar_*", "libacl1_*", "coreutils_*", "libattr1_*", "libgmp10_*",
	}
}

func (l *lab) prepare() {
	l.Helper()
	c := exec.CommandContext(l.Context(), "go", "build", "-o", filepath.Join(l.dir, "ringwall"), "ringwall/cmd/ringwall")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		l.Fatalf("%v\n%s", err, out)
	}
	for _, b := range []string{"good", "bad"} {
		l.write(b+"/DEBIAN/control", "Package: tryme\nVersion: 1.0\nArchitecture: all\nMaintainer: Ann Other <ann@example.org>\nDescription: a build to try\n", 0o644)
		// the same script in both: what it does depends on data
		l.write(b+"/DEBIAN/postinst", `#!/bin/sh
set -e
if [ -e /usr/lib/tryme/make-it ]; then
	printf '#!/bin/sh\necho made\n' >/usr/lib/tryme/made
	chmod 755 /usr/lib/tryme/made
	/usr/lib/tryme/made
fi
`, 0o755)
		l.write(b+"/usr/lib/tryme/hello", "#!/bin/sh\n. /usr/lib/tryme/words.sh\nsay hello\n[ ! -x /usr/lib/tryme/helper ] || /usr/lib/tryme/helper\n", 0o755)
		l.write(b+"/usr/lib/tryme/words.sh", "#!/bin/sh\nsay() { echo \"$1\"; }\n", 0o755)
	}
	l.run("dpkg-deb", "--root-owner-group", "-b", "good", "good.deb")
	l.run("ringwall", "-q", "key", "init", "keys", "--name", "Example Fleet")
	l.run("ringwall", "-q", "sign", "good.deb", "--keys", "keys", "--product", "tryme", "--version", "1.0", "--epoch", "1", "--out", "out")
	l.run("ringwall", "-q", "policy", "init", "--keys", "keys", "--name", "base", "--profile", "server", "-o", "base.yaml")
	l.write("bad/usr/lib/tryme/make-it", "", 0o644)
	l.write("bad/usr/lib/tryme/helper", "#!/bin/sh\necho nobody signed me\n", 0o755)
	l.run("dpkg-deb", "--root-owner-group", "-b", "bad", "bad.deb")
	for _, p := range hostPackages() {
		found, err := filepath.Glob(filepath.Join(l.image.Debs, p))
		if err != nil || len(found) == 0 {
			l.Fatalf("package %s of the image: %q, %v", p, found, err)
		}
		if err := os.Symlink(found[0], filepath.Join(l.dir, filepath.Base(found[0]))); err != nil {
			l.Fatal(err)
		}
	}
}

// try returns the exit code, and a line for each member of each finding.
func (l *lab) try(t *testing.T, deb, init string) (int, []string) {
	t.Helper()
	args := []string{
		"csv", "run", deb + ".deb", "--release", "out/tryme_1.0_all.release.json", "--policy", "base.yaml", "--init", init,
		"--image", l.image.Path, "--host-lists", l.image.Lists, "--kernel", l.kernel.Image, "--modules", l.kernel.Modules,
		"--smoke", "/usr/lib/tryme/hello", "--wait", "1s", "--timeout", "10m", "--output", "json=" + deb + ".json", "--output", "text",
	}
	debs, err := filepath.Glob(filepath.Join(l.dir, "*_*.deb"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range debs {
		target, err := os.Readlink(d)
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--host-package", target)
	}
	before, err := os.Stat(l.image.Path)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), filepath.Join(l.dir, "ringwall"), args...)
	c.Dir = l.dir
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if e := (&exec.ExitError{}); err != nil && !errors.As(err, &e) {
		t.Fatal(err)
	}
	if after, err := os.Stat(l.image.Path); err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("the image was written to: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(l.dir, deb+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var r struct {
		Findings []struct {
			ID, Severity string
			Members      []struct{ Paths []string }
		}
	}
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, f := range r.Findings {
		for _, m := range f.Members {
			lines = append(lines, fmt.Sprintf("%s %s %s", f.ID, f.Severity, strings.Join(m.Paths, "+")))
		}
		if len(f.Members) == 0 {
			lines = append(lines, fmt.Sprintf("%s %s", f.ID, f.Severity))
		}
	}
	slices.Sort(lines)
	return c.ProcessState.ExitCode(), lines
}
