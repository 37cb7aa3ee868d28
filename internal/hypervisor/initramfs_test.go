package hypervisor_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/hypervisor"
)

// cpio(1) reads what the kernel will.
func TestInitramfs(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no cpio here; fix: apt-get install cpio")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!program"), 0o755); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	a := hypervisor.NewInitramfs(&b)
	a.Dir("proc")
	a.Copy("/sbin/ringwall", program)
	a.File("etc/deep/config.json", 0o600, []byte("{}x"))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("cpio", "-idm", "--quiet")
	c.Dir, c.Stdin = dir, &b
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	for name, want := range map[string]string{"sbin/ringwall": "#!program", "etc/deep/config.json": "{}x"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "sbin/ringwall")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode of the program: %v, %v", st, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "proc")); err != nil || !st.IsDir() {
		t.Errorf("proc: %v, %v", st, err)
	}
}

func TestInitramfs_refuses(t *testing.T) {
	for name, fill := range map[string]func(*hypervisor.Initramfs){
		"twice":     func(a *hypervisor.Initramfs) { a.File("x", 0o600, nil); a.File("/x", 0o600, nil) },
		"directory": func(a *hypervisor.Initramfs) { a.Copy("x", t.TempDir()) },
	} {
		a := hypervisor.NewInitramfs(&bytes.Buffer{})
		fill(a)
		if err := a.Close(); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	a := hypervisor.NewInitramfs(&bytes.Buffer{})
	a.Copy("x", filepath.Join(t.TempDir(), "none"))
	if err := a.Close(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func TestParseModinfo(t *testing.T) {
	got := hypervisor.ParseModinfo([]byte("license=GPL\x00depends=virtio,virtio_ring\x00softdep=pre: crc32c post: late\x00depends=\x00"))
	if len(got) != 3 || got[0] != "virtio" || got[1] != "virtio_ring" || got[2] != "crc32c" {
		t.Errorf("%q", got)
	}
}

func TestParseModinfo_soft(t *testing.T) {
	got := hypervisor.ParseModinfo([]byte("license=GPL\x00depends=dm-mod,dm-bufio\x00softdep=pre: sha256 post: other\x00depends=\x00"))
	if want := []string{"dm-mod", "dm-bufio", "sha256"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func FuzzModuleNeeds(f *testing.F) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(self[:4096])
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := hypervisor.ModuleNeeds(b); err != nil && !errors.Is(err, errs.Invalid) {
			t.Errorf("%v", err)
		}
	})
}
