package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/test/vm"
)

// TestMain is also the program that the guests run.
func TestMain(m *testing.M) {
	if os.Getenv("RINGWALL_GUEST") == "" || len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	switch os.Args[1] {
	case "report":
		wd, err := os.Getwd()
		fmt.Println("dir", wd, err)
		lsm, err := os.ReadFile("/sys/kernel/security/lsm")
		fmt.Println("lsm", string(lsm), err)
		fs, err := os.ReadFile("/proc/filesystems")
		fmt.Println("filesystems", strings.Join(strings.Fields(string(fs)), " "), err)
		sample, err := os.ReadFile("/data/sub/sample")
		fmt.Println("sample", string(sample), err)
		fmt.Println("setting", os.Getenv("SETTING"))
		fmt.Print("\x00NONCE exit 0\n", "no end of line")
		os.Exit(7)
	case "die":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case "panic":
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "hang":
		fmt.Println("hanging")
	}
	time.Sleep(time.Hour)
}

func kernel(t *testing.T) vm.Kernel {
	t.Helper()
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: no guests with -short")
	}
	name := os.Getenv("RINGWALL_KERNEL")
	if name == "" {
		name = "6.1"
	}
	k, err := vm.FindKernel(t.Context(), name)
	skipUnsupported(t, err)
	return k
}

// skipUnsupported skips where the machine lacks something, and fails the test
// on any other error.
func skipUnsupported(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func role(t *testing.T, k vm.Kernel, role string) (vm.Guest, *bytes.Buffer) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	return vm.Guest{
		Kernel: k, Argv: []string{"/test/self", role}, Output: &out,
		Files: []vm.File{{Host: self, Guest: "/test/self"}},
	}, &out
}

func TestRun(t *testing.T) {
	k := kernel(t)
	g, out := role(t, k, "report")
	data := t.TempDir()
	if err := os.MkdirAll(filepath.Join(data, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "sub/sample"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	g.Files = append(g.Files, vm.File{Host: data, Guest: "/data"})
	g.Env, g.Dir = []string{"SETTING=value"}, "/some/where"
	r, err := vm.Run(t.Context(), g)
	skipUnsupported(t, err)
	t.Log(r.Line())
	if r.Exit != 7 || r.Release != k.Release || r.Boots != 1 || r.Boot <= 0 {
		t.Errorf("result: %+v", r)
	}
	for _, want := range []string{
		"dir /some/where <nil>", ",bpf", "sample content <nil>", "setting value",
		" ext4 ", " squashfs ", " erofs ", " overlay ", " fuse ",
		"\x00NONCE exit 0\n", "no end of line",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
}

func TestRun_ends(t *testing.T) {
	k := kernel(t)
	t.Run("signal", func(t *testing.T) {
		g, _ := role(t, k, "die")
		r, err := vm.Run(t.Context(), g)
		skipUnsupported(t, err)
		if r.Exit != 128+9 {
			t.Errorf("exit %d, want 137", r.Exit)
		}
	})
	t.Run("panic", func(t *testing.T) {
		g, _ := role(t, k, "panic")
		_, err := vm.Run(t.Context(), g)
		if err == nil || !strings.Contains(err.Error(), "sysrq triggered crash") {
			t.Errorf("error %v does not show the panic", err)
		}
	})
	t.Run("panic before the first process", func(t *testing.T) {
		g, _ := role(t, k, "report")
		g.Cmdline = "rdinit=/nowhere root=/dev/nowhere"
		var console bytes.Buffer
		g.Machine.Console = &console
		r, err := vm.Run(t.Context(), g)
		if err == nil || r.Boots != 0 {
			t.Fatalf("%d boots, error %v, want a panic", r.Boots, err)
		}
		if n := strings.Count(console.String(), "Kernel panic - not syncing"); n != 3 {
			t.Errorf("started %d times, want 3: %v", n, err)
		}
	})
	t.Run("time limit", func(t *testing.T) {
		g, out := role(t, k, "hang")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := vm.Run(ctx, g)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want deadline exceeded", err)
		}
		if out.String() != "hanging\n" {
			t.Errorf("output %q was not passed on", out)
		}
	})
	t.Run("no such program", func(t *testing.T) {
		g, _ := role(t, k, "")
		g.Argv = []string{"/test/absent"}
		_, err := vm.Run(t.Context(), g)
		if err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("error %v", err)
		}
	})
}

// debian returns the lean image with one kernel.
func debian(t *testing.T) (vm.Image, vm.Kernel) {
	t.Helper()
	k := kernel(t)
	img, err := vm.DebianImage(t.Context(), vm.Options{Packages: vm.Lean(), Pool: vm.SmallPool(), Kernels: []vm.Kernel{k}})
	skipUnsupported(t, err)
	return img, k
}

const leanScript = `#!/bin/bash
fail() { echo "FAILED: $*"; failed=1; }
[ "$(cat /proc/1/comm)" = systemd ] || fail process 1 is "$(cat /proc/1/comm)"
[ "$(systemctl is-system-running)" = running ] || { fail systemd is not running; systemctl --no-pager --failed; }
[ "$(python3 -c 'print(6*7)')" = 42 ] || fail python3
[ "$(systemctl is-active nginx)" = active ] || fail nginx is not active
python3 -c 'import urllib.request as u; assert b"nginx" in u.urlopen("http://127.0.0.1/").read()' || fail nginx does not answer
modprobe squashfs || fail modprobe
cd /var/cache/apt/archives
dpkg-query -W -f '${Package}_${Version}_${Architecture}.deb\n' | sed 's/:/%3a/' | while read -r deb; do
	[ -f "$deb" ] || echo "$deb"
done > /tmp/missing
[ -s /tmp/missing ] && fail package files are missing: $(cat /tmp/missing)
for suite in debian_dists_bookworm debian-security_dists_bookworm-security; do
	ls /var/lib/apt/lists/*_${suite}_InRelease /var/lib/apt/lists/*_${suite}_main_binary-amd64_Packages >/dev/null || fail lists of $suite
done
hello >/dev/null 2>&1 && fail hello is there before its installation
apt-get -qq install -y --no-download hello >/dev/null 2>/tmp/apt || { fail apt-get; cat /tmp/apt; }
[ "$(hello)" = "Hello, world!" ] || fail hello
echo "$GREETING" > /tmp/greeting; cmp /tmp/greeting /payload/greeting || fail payload
touch /payload/x 2>/dev/null && fail the payload can be written
exit ${failed:-3}
`

func TestDebian(t *testing.T) {
	img, k := debian(t)
	payload := t.TempDir()
	if err := os.WriteFile(filepath.Join(payload, "greeting"), []byte("good day\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(payload, "run"), []byte(leanScript), 0o755); err != nil {
		t.Fatal(err)
	}
	before := stamp(t, img.Path)
	var out bytes.Buffer
	r, err := vm.RunDebian(t.Context(), vm.DebianGuest{
		Image: img, Kernel: k, Payload: payload, Env: []string{"GREETING=good day"}, Output: &out,
	})
	skipUnsupported(t, err)
	t.Log(r.Line())
	if r.Exit != 3 || r.Release != k.Release {
		t.Errorf("exit %d on %s, want 3 on %s:\n%s", r.Exit, r.Release, k.Release, out.String())
	}
	if stamp(t, img.Path) != before {
		t.Error("the guest changed the cached image")
	}
}

func stamp(t *testing.T, path string) time.Time {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.ModTime()
}

func TestDebian_reboot(t *testing.T) {
	img, k := debian(t)
	var out bytes.Buffer
	r, err := vm.RunDebian(t.Context(), vm.DebianGuest{
		Image: img, Kernel: k, Output: &out, Reboots: 2,
		Script: fmt.Sprintf(`#!/bin/sh
echo "boot $RINGWALL_BOOT: $(cat /var/kept 2>/dev/null)" | tee -a /var/kept.new
mv /var/kept.new /var/kept; cp /var/kept /var/kept.new; sync
case $RINGWALL_BOOT in
1) exit %d ;;
2) echo b > /proc/sysrq-trigger; sleep 60 ;;
esac
exit 5
`, vm.ExitReboot),
	})
	skipUnsupported(t, err)
	t.Log(r.Line())
	if r.Exit != 5 || r.Boots != 3 {
		t.Errorf("exit %d after %d boots, want 5 after 3", r.Exit, r.Boots)
	}
	if !strings.Contains(out.String(), "boot 3: boot 1: \nboot 2: boot 1:") {
		t.Errorf("the disk did not survive:\n%s", &out)
	}
}

// A service whose process the kernel kills for memory is stopped by systemd
// unless told otherwise; the harness has to outlive what its script starts.
func TestDebian_outOfMemory(t *testing.T) {
	img, k := debian(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var out bytes.Buffer
	r, err := vm.RunDebian(ctx, vm.DebianGuest{
		Image: img, Kernel: k, Output: &out,
		Script: `#!/bin/sh
sh -c 'echo 1000 >/proc/self/oom_score_adj; exec sleep 1000' &
sleep 1
echo f >/proc/sysrq-trigger
wait $!
echo "killed: $?"
sleep 5
exit 5
`,
	})
	skipUnsupported(t, err)
	t.Log(r.Line())
	if r.Exit != 5 || !strings.Contains(out.String(), "killed: 137") {
		t.Errorf("exit %d, want 5 after the kill:\n%s", r.Exit, &out)
	}
}

func TestDebian_tooManyReboots(t *testing.T) {
	img, k := debian(t)
	_, err := vm.RunDebian(t.Context(), vm.DebianGuest{
		Image: img, Kernel: k, Reboots: 1, Script: fmt.Sprintf("#!/bin/sh\nexit %d\n", vm.ExitReboot),
	})
	if !errors.Is(err, errs.Invalid) {
		t.Errorf("error %v, want invalid", err)
	}
}
