package host

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

func bootRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	writeTree(t, root, map[string]string{"etc/initramfs-tools/modules": "", "etc/apt/apt.conf.d/70other": "", "etc/systemd/system/other.service": ""})
	return root
}

func allFiles(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, strings.TrimPrefix(name, root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestInstallBoot(t *testing.T) {
	root := bootRoot(t)
	before := allFiles(t, root)
	r, err := InstallBoot(root)
	if err != nil || len(r.Changed) != 6 || !slices.Equal(r.Next, []string{"systemctl daemon-reload", "update-initramfs -u -k all"}) || len(r.Skipped) != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if b, err := os.ReadFile(filepath.Join(root, wantPath)); err != nil || !strings.HasPrefix(string(b), unitText) {
		t.Errorf("the wanted unit: %v", err)
	}
	for _, f := range bootFiles() {
		if fi, err := os.Stat(filepath.Join(root, f.path)); err != nil || fi.Mode().Perm() != f.mode {
			t.Errorf("%s: %v", f.path, err)
		}
	}
	if r, err := InstallBoot(root); err != nil || len(r.Changed) != 0 || len(r.Unchanged) != 6 || len(r.Next) != 0 {
		t.Errorf("second run: %+v, %v", r, err)
	}
	// An older version's text is replaced, a person's is not.
	writeTree(t, root, map[string]string{unitPath: seal("[Unit]\n", "#")})
	if r, err := InstallBoot(root); err != nil || !slices.Equal(r.Changed, []string{"/" + unitPath}) {
		t.Errorf("upgrade: %+v, %v", r, err)
	}
	unit := filepath.Join(root, unitPath)
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	writeTree(t, root, map[string]string{unitPath: strings.Replace(string(b), "Restart=always", "Restart=no", 1)})
	if _, err := InstallBoot(root); !errors.Is(err, errs.Conflict) {
		t.Errorf("an edited unit: %v", err)
	}
	r, err = RemoveBoot(root)
	if err != nil || len(r.Changed) != 5 || len(r.Skipped) != 1 {
		t.Errorf("remove: %+v, %v", r, err)
	}
	want := append(slices.Clone(before), "/"+unitPath)
	slices.Sort(want)
	if got := allFiles(t, root); !slices.Equal(got, want) {
		t.Errorf("left: %v, want %v", got, want)
	}
}

func TestInstallBootElsewhere(t *testing.T) {
	root := t.TempDir()
	if r, err := InstallBoot(root); err != nil || len(r.Changed) != 3 || len(r.Skipped) != 3 {
		t.Errorf("without initramfs-tools and apt: %+v, %v", r, err)
	}
	if r, err := RemoveBoot(root); err != nil || len(r.Changed) != 3 || len(allFiles(t, root)) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := RemoveBoot(root); err != nil || len(r.Changed) != 0 {
		t.Errorf("second removal: %+v, %v", r, err)
	}
	for _, path := range []string{unitPath, wantPath} {
		root := t.TempDir()
		writeTree(t, root, map[string]string{"etc/systemd/system/x": "", "etc/systemd/system/sysinit.target.wants/x": ""})
		if err := os.Symlink("/dev/null", filepath.Join(root, path)); err != nil {
			t.Fatal(err)
		}
		if _, err := InstallBoot(root); !errors.Is(err, errs.Conflict) {
			t.Errorf("a link at %s: %v", path, err)
		}
	}
}

// TestUnitVerifies lets systemd judge the unit in a boot of this system's own
// units: what it does not know, and cycles in the order.
func TestUnitVerifies(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("SKIP: no systemd-analyze here")
	}
	dir := t.TempDir()
	text := strings.ReplaceAll(unitText, "/usr/bin/ringwall agent", "/bin/true")
	writeTree(t, dir, map[string]string{"ringwall-agent.service": text, "sysinit.target.wants/x": ""})
	if err := os.Symlink(wantLink, filepath.Join(dir, "sysinit.target.wants/ringwall-agent.service")); err != nil {
		t.Fatal(err)
	}
	verify := func() string {
		c := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", "multi-user.target", "ringwall-agent.service")
		c.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
		out, _ := c.CombinedOutput()
		var mine []string
		for l := range strings.Lines(string(out)) {
			if strings.Contains(l, "ringwall") || strings.Contains(l, "cycle") {
				mine = append(mine, l)
			}
		}
		return strings.Join(mine, "")
	}
	if got := verify(); got != "" {
		t.Errorf("systemd says:\n%s", got)
	}
	// That it would have said so: an unknown word, and a cycle.
	for _, bad := range []string{"[Service]\nRestartt=always", "[Unit]\nAfter=basic.target\n[Service]"} {
		writeTree(t, dir, map[string]string{"ringwall-agent.service": strings.Replace(text, "[Service]", bad, 1)})
		if verify() == "" {
			t.Errorf("systemd does not mind %q", bad)
		}
	}
}

func TestUnitMakesNoMountNamespace(t *testing.T) {
	for line := range strings.Lines(unitText) {
		for _, bad := range []string{
			"Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "BindPaths", "BindReadOnly", "RootDirectory",
			"TemporaryFileSystem", "RuntimeDirectory", "MountFlags", "DynamicUser", "MountAPIVFS", "RootImage", "NoExecPaths", "ExecPaths",
		} {
			if strings.HasPrefix(line, bad) {
				t.Errorf("%sthe agent's bpffs would end with it", line)
			}
		}
	}
}

func TestBootScripts(t *testing.T) {
	for _, name := range []string{"boot/initramfs-hook", "boot/initramfs-early"} {
		if out, err := exec.CommandContext(t.Context(), "sh", "-n", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		if _, err := exec.LookPath("shellcheck"); err != nil {
			t.Log("SKIP: no shellcheck here")
		} else if out, err := exec.CommandContext(t.Context(), "shellcheck", "-s", "dash", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		if out, err := exec.CommandContext(t.Context(), "sh", name, "prereqs").CombinedOutput(); err != nil || strings.Contains(string(out), "/") {
			t.Errorf("%s prereqs: %v: %s", name, err, out)
		}
	}
}

// TestAptConf lets apt read its file and call the hook.
func TestAptConf(t *testing.T) {
	if _, err := exec.LookPath("apt-config"); err != nil {
		t.Skip("SKIP: no apt-config here")
	}
	root := bootRoot(t)
	if _, err := InstallBoot(root); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "apt-config", "dump")
	c.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(root, "etc/apt/apt.conf.d/05ringwall"))
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`DPkg::Pre-Install-Pkgs:: "/usr/bin/ringwall packages trust --apt || test ! -x /usr/bin/ringwall";`,
		`DPkg::Tools::Options::/usr/bin/ringwall::Version "3";`,
		`DPkg::Post-Invoke:: "if test -x /usr/bin/ringwall; then /usr/bin/ringwall packages trust --apt-done || true; fi";`,
	} {
		if !strings.Contains(string(out), want+"\n") {
			t.Errorf("apt does not have %s", want)
		}
	}
}

// TestEarlyScript runs the initramfs script with other paths and a stand-in for
// the agent.
func TestEarlyScript(t *testing.T) {
	for _, c := range []struct {
		name, agent  string
		state        bool
		failed, kmsg string
	}{
		{"loads", "exit 0", true, "", "ringwall: the policy is in the kernel\n"},
		{"fails", "echo why; exit 7", true, "7\n", "ringwall: no policy in the kernel yet, see RUN/early.log\n"},
		{"no state", "exit 0", false, "", ""},
		{"no agent", "", true, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			writeTree(t, dir, map[string]string{"root/x": "", "bin/x": ""})
			if c.state {
				writeTree(t, dir, map[string]string{"root/var/lib/ringwall/x": ""})
			}
			if c.agent != "" {
				script := "#!/bin/sh\necho \"$*\" >" + dir + "/called\n" + c.agent + "\n"
				if err := os.WriteFile(filepath.Join(dir, "bin/ringwall"), []byte(script), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			text := strings.NewReplacer("/usr/bin/ringwall", dir+"/bin/ringwall", "/run/ringwall", dir+"/run", "/dev/kmsg", dir+"/kmsg",
				"/sys/kernel/security/lsm", dir).Replace(earlyText)
			sh := exec.CommandContext(t.Context(), "sh", "-c", text, "early")
			sh.Env = append(os.Environ(), "rootmnt="+dir+"/root")
			if out, err := sh.CombinedOutput(); err != nil || len(out) != 0 {
				t.Errorf("%v: %s", err, out)
			}
			get := func(name string) string { b, _ := os.ReadFile(filepath.Join(dir, name)); return string(b) }
			if want := map[bool]string{true: "agent --early --state " + dir + "/root/var/lib/ringwall\n"}[c.kmsg != ""]; get("called") != want {
				t.Errorf("called with %q, want %q", get("called"), want)
			}
			if get("run/early.failed") != c.failed || get("kmsg") != strings.ReplaceAll(c.kmsg, "RUN", dir+"/run") {
				t.Errorf("failed %q, kmsg %q", get("run/early.failed"), get("kmsg"))
			}
		})
	}
}

// TestAptConf_refuses lets apt install a package while our hook allows it,
// refuses it, or is not there.
func TestAptConf_refuses(t *testing.T) {
	for _, c := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(c); err != nil {
			t.Skip("SKIP: no", c)
		}
	}
	for name, c := range map[string]struct {
		hook     string
		installs bool
	}{"allowed": {"exit 0", true}, "refused": {"exit 1", false}, "killed": {"kill -9 $$", false}, "not there": {"", true}} {
		t.Run(name, func(t *testing.T) {
			hook, installs := c.hook, c.installs
			dir := t.TempDir()
			deb := buildDeb(t, dir)
			bin := filepath.Join(dir, "bin-ringwall")
			text := strings.ReplaceAll(aptText, "/usr/bin/ringwall", bin)
			writeTree(t, dir, map[string]string{"conf": aptDirs(dir) + `Dir::Bin::dpkg "` + dir + `/dpkg";` + "\n" + text})
			scripts := map[string]string{"dpkg": "[ \"$1\" = --print-foreign-architectures ] || echo \"$*\" >>" + dir + "/unpacked"}
			if hook != "" {
				scripts["bin-ringwall"] = "echo \"$*\" >>" + dir + "/asked\n[ \"$3\" = --apt ] || exit 1\ncat >" + dir + "/said\n" + hook
			}
			for name, s := range scripts {
				if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+s+"\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			apt := exec.CommandContext(t.Context(), "apt-get", "install", "-y", deb)
			apt.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(dir, "conf"))
			out, err := apt.CombinedOutput()
			unpacked, _ := os.ReadFile(filepath.Join(dir, "unpacked"))
			if (err == nil) != installs || strings.Contains(string(unpacked), "--unpack") != installs {
				t.Errorf("apt: %v, dpkg was asked: %q\n%s", err, unpacked, out)
			}
			if hook == "" {
				return
			}
			if b, err := os.ReadFile(filepath.Join(dir, "said")); err != nil || !strings.HasPrefix(string(b), "VERSION 3\n") {
				t.Errorf("the hook was told %.20q, %v", b, err)
			}
			if b, _ := os.ReadFile(filepath.Join(dir, "asked")); strings.Contains(string(b), "packages trust --apt-done") != installs {
				t.Errorf("the hook was asked %q", b)
			}
		})
	}
}
