package artefact_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ringwall/internal/artefact"
)

// realPackages are what Debian 12 ships, of every sort: servers, interpreters
// and their libraries, byte code, Java, a kernel, boot loaders, headers, wheels
// in a package, set-user-ID programs.
func realPackages() []string {
	return []string{
		"nginx", "nginx-common", "python3.11", "python3.11-minimal", "libpython3.11-stdlib", "libpython3.11-minimal", "python3-pip-whl",
		"python3-setuptools-whl", "perl", "perl-base", "perl-modules-5.36", "git", "git-man", "libc6-dev", "linux-libc-dev", "libssl-dev",
		"libcommons-lang3-java", "junit4", "openjdk-17-jre-headless", "bash", "dash", "coreutils", "util-linux", "sudo", "openssh-server",
		"systemd", "systemd-boot-efi", "iputils-ping", "openssl", "libruby3.1", "lua5.4", "tcl8.6", "php8.2-cli", "busybox-static", "dpkg",
		"apt", "grub-efi-amd64-bin", "initramfs-tools-core", "hello", "postgresql-common", "libc6", "tzdata", "mount",
	}
}

var packagesLock sync.Mutex

// debianPackages downloads them into the cache, once a week.
func debianPackages(t *testing.T) []string {
	t.Helper()
	if testing.Short() {
		t.Skip("SKIPPED, NOT CHECKED: real packages, with -short")
	}
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED, NOT CHECKED: %s is not installed; real packages are not tested", tool)
		}
	}
	dir, err := filepath.Abs("../../.cache/packages")
	if err != nil {
		t.Fatal(err)
	}
	packagesLock.Lock() // the tests of them run side by side
	defer packagesLock.Unlock()
	names := realPackages()
	if kernel := kernelPackage(); kernel != "" {
		names = append(names, kernel)
	}
	debs := func() []string {
		found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	done := filepath.Join(dir, "complete")
	if st, err := os.Stat(done); err != nil || time.Since(st.ModTime()) > 7*24*time.Hour {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, old := range debs() {
			_ = os.Remove(old)
		}
		c := exec.Command("apt-get", append([]string{"-q", "-o", "APT::Sandbox::User=root", "download"}, names...)...)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Skipf("SKIPPED, NOT CHECKED: no archive: apt-get download: %v: %.400s", err, out)
		}
		if err := os.WriteFile(done, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	found := debs()
	if len(found) < 30 {
		t.Fatalf("%d packages in %s", len(found), dir)
	}
	return found
}

// kernelPackage is the newest cloud kernel of the archive.
func kernelPackage() string {
	out, err := exec.Command("apt-cache", "depends", "linux-image-cloud-amd64").Output()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if _, name, ok := strings.Cut(line, "Depends: "); ok {
			return strings.TrimSpace(name)
		}
	}
	return ""
}

// Every member of real packages, with digest, mode and link, is what dpkg-deb
// unpacks, and nothing is missing.
func TestDeb_dpkg(t *testing.T) {
	t.Parallel()
	var files, nested int
	for _, p := range debianPackages(t) {
		t.Run(filepath.Base(p), func(t *testing.T) {
			a := open(t, p, artefact.Options{})
			got := members(t, a) // with what is in archives within: that can be read too
			if _, ok := a.Package(); !ok || a.Format != artefact.FormatDeb {
				t.Errorf("%s without a name", a.Format)
			}
			for n, w := range got {
				if strings.HasSuffix(w, " nested") {
					delete(got, n)
					nested++
				}
			}
			dir := t.TempDir()
			run(t, dir, "dpkg-deb", "-x", p, dir)
			run(t, dir, "dpkg-deb", "-e", p, filepath.Join(dir, "DEBIAN"))
			want := members(t, open(t, dir, artefact.Options{Depth: -1}))
			for n, w := range got {
				got[n] = strings.TrimSuffix(w, " install")
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("dpkg-deb unpacks something else: %s", d)
			}
			files += len(got)
		})
	}
	t.Logf("%d members agree, %d more lie in archives within", files, nested)
	if nested < 500 {
		t.Errorf("%d members in jars and wheels", nested)
	}
}

// debianTree unpacks some of the packages into one tree.
func debianTree(t *testing.T, packages ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range debianPackages(t) {
		name, _, _ := strings.Cut(filepath.Base(p), "_")
		if slices.Contains(packages, name) {
			run(t, dir, "dpkg-deb", "-x", p, dir)
		}
	}
	return dir
}

// Images made of real packages: what we read is what the native tool unpacks.
func TestImages_nativeTools(t *testing.T) {
	t.Parallel()
	dir := debianTree(t, "nginx", "python3.11-minimal", "libpython3.11-minimal", "perl-base", "lua5.4", "coreutils", "sudo", "iputils-ping",
		"libc6-dev", "junit4", "hello", "dash", "tzdata", "systemd-boot-efi", "busybox-static")
	// two formats get all of it, the others what differs in kind
	few := debianTree(t, "lua5.4", "sudo", "iputils-ping", "junit4", "hello", "dash", "libpython3.11-minimal", "systemd-boot-efi")
	out := t.TempDir()
	for _, c := range []struct{ name, pack, unpack string }{
		{"gzip.squashfs", "mksquashfs . OUT -quiet -no-progress -comp gzip", "unsquashfs -q -n -d TO OUT"},
		{"xz.squashfs", "mksquashfs . OUT -quiet -no-progress -comp xz", "unsquashfs -q -n -d TO OUT"},
		{"zstd.squashfs", "mksquashfs . OUT -quiet -no-progress -comp zstd", "unsquashfs -q -n -d TO OUT"},
		{"plain.erofs", "mkfs.erofs --quiet OUT .", "fsck.erofs --extract=TO OUT"},
		{"lz4hc.erofs", "mkfs.erofs --quiet -zlz4hc OUT .", "fsck.erofs --extract=TO OUT"},
		{"zst.tar", "tar --zstd -cf OUT .", "mkdir TO && tar -xpf OUT -C TO"},
		{"gnu.tar", "tar -cf OUT .", "mkdir TO && tar -xpf OUT -C TO"},
		{"initramfs", "find . | LC_ALL=C sort | cpio --quiet -o -H newc | zstd -q > OUT", "mkdir TO && zstd -qdc OUT | (cd TO && cpio --quiet -idm)"},
		{"files.zip", "zip -qry OUT .", "unzip -qq -d TO OUT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := dir
			if c.name != "zstd.squashfs" && c.name != "plain.erofs" {
				dir = few
			}
			whole := members(t, open(t, dir, artefact.Options{Depth: -1}))
			file, to := filepath.Join(out, c.name), filepath.Join(out, c.name+".d")
			fill := strings.NewReplacer("OUT", file, "TO", to)
			run(t, dir, "sh", "-ec", "("+fill.Replace(c.pack)+") >/dev/null")
			run(t, out, "sh", "-ec", "("+fill.Replace(c.unpack)+") >/dev/null")
			got := members(t, open(t, file, artefact.Options{Depth: -1}))
			if d := cmp.Diff(whole, got); d != "" {
				t.Errorf("differs from what was packed: %.4000s", d)
			}
			want := members(t, open(t, to, artefact.Options{Depth: -1}))
			if strings.HasPrefix(c.unpack, "fsck.erofs") || strings.HasPrefix(c.unpack, "unzip") {
				// these lose the set-user-ID bits on the way out
				for _, m := range []map[string]string{want, got} {
					for n, w := range m {
						m[n] = strings.TrimSuffix(w, " setuid")
					}
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("differs from what is unpacked: %.4000s", d)
			}
			t.Logf("%d members agree", len(got))
			_ = os.RemoveAll(to)
		})
	}
	t.Run("oci", func(t *testing.T) {
		file := filepath.Join(out, "layer.tar")
		run(t, dir, "tar", "-cf", file, ".")
		layer, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		m := newImage(t)
		m.image("amd64", "gzip", layer, layerOf(t, item{name: "usr/bin/.wh.hello"}))
		got := members(t, open(t, m.done(), artefact.Options{Depth: -1}))
		want := members(t, open(t, dir, artefact.Options{Depth: -1}))
		delete(want, "usr/bin/hello")
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%.4000s", d)
		}
	})
}

const rpmSpec = `Name: edged
Epoch: 3
Version: 4.7.0
Release: 1
Summary: x
License: x
%%define _binary_payload %s
%%define _build_id_links none
%%define __os_install_post %%{nil}
AutoReqProv: no
%%description
x
%%files
%%defattr(-,root,root)
/*
%%pre
echo before
%%post
echo after
%%postun -p <lua>
print("gone")
%%preun -p /sbin/ldconfig
%%triggerin -- nginx
echo triggered
%%filetriggerin -- /usr/lib
echo file trigger
%%transfiletriggerin -- /usr/lib
echo transaction
%%posttrans
echo posttrans
`

// RPM packages in every compression, made of real files by rpmbuild.
func TestRPM_rpm2cpio(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("rpmbuild"); err != nil {
		t.Skip("SKIPPED, NOT CHECKED: rpmbuild is not installed")
	}
	dir := debianTree(t, "lua5.4", "sudo", "junit4", "hello", "dash", "tzdata")
	for _, how := range []string{"w9.gzdio", "w2.xzdio", "w3.zstdio", "w1.lzdio", "w6.bzdio"} {
		t.Run(how, func(t *testing.T) {
			top := t.TempDir()
			spec := filepath.Join(top, "edged.spec")
			if err := os.WriteFile(spec, fmt.Appendf(nil, rpmSpec, how), 0o644); err != nil {
				t.Fatal(err)
			}
			root := filepath.Join(top, "root")
			run(t, top, "cp", "-a", dir, root)
			run(t, top, "rpmbuild", "--quiet", "-bb", "--buildroot", root, "--define", "_topdir "+top, "--define", "_rpmdir "+top,
				"--define", "__spec_install_pre true", "--define", "__spec_clean_pre true", "--noclean", "--target", "x86_64", spec)
			found, err := filepath.Glob(filepath.Join(top, "x86_64", "*.rpm"))
			if err != nil || len(found) != 1 {
				t.Fatalf("%v %v", found, err)
			}
			a := open(t, found[0], artefact.Options{Depth: -1})
			got := members(t, a)
			if p, ok := a.Package(); !ok || p != (artefact.Package{Name: "edged", Version: "3:4.7.0-1", Architecture: "x86_64"}) {
				t.Errorf("%+v", p)
			}
			to := filepath.Join(top, "to")
			run(t, top, "sh", "-ec", "mkdir to && rpm2cpio "+found[0]+" | (cd to && cpio --quiet -idm --no-absolute-filenames)")
			want := members(t, open(t, to, artefact.Options{Depth: -1}))
			for name, body := range map[string]string{
				"pre": "echo before", "post": "echo after", "postun": `print("gone")`, "trigger-0": "echo triggered",
				"filetrigger-0": "echo file trigger", "transfiletrigger-0": "echo transaction", "posttrans": "echo posttrans",
			} {
				want["RPM/"+name] = "0755 " + sum(body) + " install"
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%.4000s", d)
			}
			t.Logf("%d members agree", len(got))
		})
	}
}
