package vm

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// Options says what a Debian image holds.
type Options struct {
	// Packages are installed beside the essential ones, with what they depend
	// on. Lean and Full are ready-made sets.
	Packages []string
	// Pool are packages that apt-get install --no-download can install in the
	// guest, which has no network.
	Pool []string
	// Kernels are installed as packages, so that their modules are there. A
	// kernel that this Debian does not offer is only unpacked.
	Kernels []Kernel
}

// Lean is a system that boots fast and still is one: systemd, a scripting
// language and a service.
func Lean() []string {
	return []string{"systemd-sysv", "udev", "kmod", "procps", "iproute2", "python3", "nginx-light"}
}

// Full is a system that compiles, interprets and contains. Go is a package of
// its own ("golang-go"), because of its size.
func Full() []string {
	return append(Lean(), "dbus", "perl", "gcc", "libc6-dev", "make", "busybox", "gawk", "lua5.4", "nodejs", "runc", "fuse3", "squashfs-tools", "cryptsetup-bin", "gdb")
}

// SmallPool are a few small packages for tests of installation.
func SmallPool() []string { return []string{"hello", "sl", "bc", "tree", "jq"} }

// Image is a disk image of Debian 12.
type Image struct {
	Path  string // ext4 in a raw file; never opened for writing
	Debs  string // directory: every package file that is installed or in the pool
	Lists string // directory: the signed indexes that vouch for them
}

// imageRecipe is part of an image's name in the cache: raise it when the way
// in which images are made changes.
const imageRecipe = 2

// DebianImage returns an image with what o asks for, building it with
// mmdebstrap from the package sources of this machine if the cache has none.
// An image is as old as the first call that needed it; delete the cache for a
// newer one. It needs root, and is errs.Unsupported where a tool is missing
// or the packages cannot be had.
func DebianImage(ctx context.Context, o Options) (Image, error) {
	if os.Geteuid() != 0 {
		return Image{}, fmt.Errorf("build a Debian image: needs root: %w", errs.Unsupported)
	}
	key, err := json.Marshal(struct {
		Recipe                  int
		Packages, Pool, Kernels []string
	}{imageRecipe, sorted(o.Packages), sorted(o.Pool), kernelNames(o.Kernels)})
	if err != nil {
		return Image{}, err
	}
	sum := sha256.Sum256(key)
	dir, err := cached(filepath.Join("image", fmt.Sprintf("%x", sum[:8])), func(dir string) error {
		b := imageBuilder{options: o, dir: dir, root: filepath.Join(dir, "root"), machineID: fmt.Sprintf("%x", sum[:16])}
		return b.build(ctx)
	})
	if err != nil {
		return Image{}, fmt.Errorf("image of Debian: %w", err)
	}
	return Image{Path: filepath.Join(dir, "disk"), Debs: filepath.Join(dir, "debs"), Lists: filepath.Join(dir, "lists")}, nil
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

func kernelNames(ks []Kernel) []string {
	var names []string
	for _, k := range ks {
		names = append(names, k.Package+"="+k.Version)
	}
	return sorted(names)
}

type imageBuilder struct {
	options   Options
	dir       string // what becomes the cache's entry
	root      string // the system, while it is a directory
	machineID string
}

func (b *imageBuilder) build(ctx context.Context) error {
	for _, step := range []func(context.Context) error{b.bootstrap, b.kernels, b.pool, b.settle, b.pack} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(b.dir, "InRelease")); err != nil {
		return err
	}
	return removeTree(b.root)
}

// bootstrap installs the packages. The package files and the indexes stay.
func (b *imageBuilder) bootstrap(ctx context.Context) error {
	mirror, security, err := debianMirrors(ctx)
	if err != nil {
		return err
	}
	// What fails from here on is a fault and no lack, as long as the mirror
	// answers.
	if _, err := command(ctx, b.dir, "/usr/lib/apt/apt-helper", "download-file", mirror+"/dists/bookworm/InRelease", filepath.Join(b.dir, "InRelease")); err != nil {
		return fmt.Errorf("%w: %w", err, errs.Unsupported)
	}
	include := sorted(b.options.Packages)
	for _, k := range b.options.Kernels {
		if k.Lists == nil {
			// Nothing needs the boot image of the package; its dependency on a
			// maker of one is met by the smallest.
			include = append(include, k.Package+"="+k.Version, "initramfs-tools")
		}
	}
	args := []string{
		"--mode=root", "--variant=apt", "--include=" + strings.Join(sorted(include), ","),
		"--skip=essential/unlink,cleanup/apt", "--quiet",
		`--aptopt=Acquire::Languages "none"`, `--aptopt=APT::Install-Recommends "false"`, `--aptopt=Acquire::Retries "2"`,
		"bookworm", b.root,
	}
	for _, suite := range []string{mirror + " bookworm", mirror + " bookworm-updates", security + " bookworm-security"} {
		args = append(args, "deb [signed-by="+debianKeyring+"] "+suite+" main")
	}
	_, err = isolated(ctx, "mmdebstrap", args...)
	return err
}

// kernels unpacks the kernels that could not be installed.
func (b *imageBuilder) kernels(ctx context.Context) error {
	for _, k := range b.options.Kernels {
		if k.Lists == nil {
			continue
		}
		parent := filepath.Join(b.root, "usr/lib/modules")
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return err
		}
		to := filepath.Join(parent, k.Release)
		if _, err := command(ctx, "", "cp", "-a", k.Modules, to); err != nil {
			return err
		}
		if _, err := b.chroot(ctx, "depmod", k.Release); err != nil {
			return err
		}
		for _, f := range k.Debs {
			if err := copyFile(filepath.Join(b.root, "var/cache/apt/archives", filepath.Base(f)), f); err != nil {
				return err
			}
		}
		for _, f := range k.Lists {
			if err := copyFile(filepath.Join(b.root, "var/lib/apt/lists", filepath.Base(f)), f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *imageBuilder) pool(ctx context.Context) error {
	if len(b.options.Pool) == 0 {
		return nil
	}
	_, err := b.chroot(ctx, "apt-get", append([]string{"-qq", "install", "--download-only", "-y"}, b.options.Pool...)...)
	return err
}

func (b *imageBuilder) chroot(ctx context.Context, name string, args ...string) (string, error) {
	return command(ctx, "", "chroot", append([]string{b.root, name}, args...)...)
}

// settle does what a first boot would do, so that it need not be done under
// emulation each time.
func (b *imageBuilder) settle(ctx context.Context) error {
	if _, err := b.chroot(ctx, "apt-cache", "gencaches"); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"etc/machine-id": b.machineID + "\n",
		"etc/hostname":   "guest\n",
		"etc/hosts":      "127.0.0.1 localhost guest\n",
		"etc/fstab":      "",
		// A unit with ConditionNeedsUpdate= is skipped while these are newer
		// than /usr.
		"etc/.updated": "",
		"var/.updated": "",
	} {
		if err := os.WriteFile(filepath.Join(b.root, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(b.root, "payload"), 0o755)
}

// freeMiB is how much a guest can write to its root file system.
const freeMiB = 2048

// pack makes the disk. ext4 with 4 KiB blocks is what fs-verity needs.
func (b *imageBuilder) pack(ctx context.Context) error {
	for name, from := range map[string]string{"debs": "var/cache/apt/archives", "lists": "var/lib/apt/lists"} {
		if err := os.Mkdir(filepath.Join(b.dir, name), 0o755); err != nil {
			return err
		}
		entries, err := os.ReadDir(filepath.Join(b.root, from))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !e.Type().IsRegular() || e.Name() == "lock" {
				continue
			}
			if err := copyFile(filepath.Join(b.dir, name, e.Name()), filepath.Join(b.root, from, e.Name())); err != nil {
				return err
			}
		}
	}
	return makeDisk(ctx, filepath.Join(b.dir, "disk"), b.root, freeMiB)
}

// makeDisk makes a sparse ext4 image at path from the directory root.
func makeDisk(ctx context.Context, path, root string, freeMiB int64) error {
	var size, files int64
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		files++
		if st.Mode().IsRegular() {
			size += (st.Size() + 4095) &^ 4095
		} else {
			size += 4096
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Inodes take 256 bytes each, the journal and the tables some more.
	mib := size>>20 + size>>24 + files*256>>20 + 48 + freeMiB
	// lazy_itable_init=0: no kernel thread finishes the work in the guest.
	_, err = command(ctx, "", "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", "-m", "0",
		"-E", "root_owner=0:0,lazy_itable_init=0", "-N", fmt.Sprint(files+files/4+65536), "-d", root, path, fmt.Sprintf("%dM", mib))
	return err
}
