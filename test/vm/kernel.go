package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// Newest names the newest kernel that Debian builds, beyond the stable ones.
const Newest = "newest"

// newestSuite is the suite of Debian that carries the newest kernel.
const newestSuite = "trixie-backports"

// Kernel is one of Debian's kernels for virtual machines, unpacked.
type Kernel struct {
	Name    string // what was asked for: 6.1, 6.12, newest
	Package string // Debian's package of the boot image
	Version string // and its version
	Release string // what uname -r says in the guest
	Image   string // path of the boot image
	Modules string // path of lib/modules/RELEASE
	Dir     string // where it is in the cache
	Debs    []string
	Lists   []string // the signed indexes that vouch for Debs; nil: the machine's own
}

// kernelPackages are the packages of each kernel: the pattern of the name.
var kernelPackages = map[string]*regexp.Regexp{
	"6.1":  regexp.MustCompile(`^linux-image-6\.1\.0-[0-9]+-cloud-amd64$`),
	"6.12": regexp.MustCompile(`^linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-amd64$`),
	Newest: regexp.MustCompile(`^linux-image-[0-9.]+\+deb[0-9]+-cloud-amd64$`),
}

// resolveEvery is how long a look into the package sources is good for. Within
// that time all runs on one machine use the same kernel.
const resolveEvery = 12 * time.Hour

// FindKernel returns the newest kernel of a series ("6.1", "6.12", Newest),
// fetched with apt and unpacked if it is not in the cache yet. It is
// errs.Unsupported where the package sources do not offer one or cannot be
// reached.
func FindKernel(ctx context.Context, name string) (Kernel, error) {
	k, err := findKernel(ctx, name)
	if err != nil {
		return k, fmt.Errorf("kernel %s: %w", name, err)
	}
	return k, nil
}

func findKernel(ctx context.Context, name string) (Kernel, error) {
	pattern, ok := kernelPackages[name]
	if !ok {
		return Kernel{}, fmt.Errorf("known are 6.1, 6.12 and newest: %w", errs.Invalid)
	}
	if runtime.GOARCH != "amd64" {
		return Kernel{}, fmt.Errorf("guests of %s: %w", runtime.GOARCH, errs.Unsupported)
	}
	cache, err := CacheDir()
	if err != nil {
		return Kernel{}, err
	}
	dir := filepath.Join(cache, "kernel")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Kernel{}, err
	}
	unlock, err := lock(filepath.Join(dir, name+".lock"))
	if err != nil {
		return Kernel{}, err
	}
	defer unlock()
	note := filepath.Join(dir, name+".json")
	known, age, haveKnown := readNote(note)
	if haveKnown && age < resolveEvery {
		return known, nil
	}
	k, err := fetchKernel(ctx, name, pattern)
	if err != nil {
		// An old kernel of the same series beats none, as long as it is there.
		if haveKnown && ctx.Err() == nil {
			return known, nil
		}
		return Kernel{}, err
	}
	b, err := json.Marshal(k)
	if err != nil {
		return Kernel{}, err
	}
	tmp := note + ".new"
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return Kernel{}, err
	}
	return k, os.Rename(tmp, note)
}

// readNote reads which kernel was found last and how long ago.
func readNote(path string) (k Kernel, age time.Duration, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &k) != nil {
		return Kernel{}, 0, false
	}
	st, err := os.Stat(path)
	if err != nil {
		return Kernel{}, 0, false
	}
	if _, err := os.Stat(k.Image); err != nil {
		return Kernel{}, 0, false
	}
	return k, time.Since(st.ModTime()), true
}

func fetchKernel(ctx context.Context, name string, pattern *regexp.Regexp) (Kernel, error) {
	var src aptSource
	if name == Newest {
		var err error
		if src, err = newSource(ctx, newestSuite); err != nil {
			return Kernel{}, err
		}
	}
	names, err := src.names(ctx, "linux-image-")
	if err != nil {
		return Kernel{}, err
	}
	var pkg string
	for _, n := range names {
		if pattern.MatchString(n) && (pkg == "" || newer(ctx, n, pkg)) {
			pkg = n
		}
	}
	if pkg == "" {
		return Kernel{}, fmt.Errorf("the package sources offer none (apt-get update?): %w", errs.Unsupported)
	}
	version, err := src.version(ctx, pkg)
	if err != nil {
		return Kernel{}, err
	}
	dir, err := cached(filepath.Join("kernel", pkg+"_"+version), func(dir string) error {
		return unpackKernel(ctx, src, pkg, version, dir)
	})
	if err != nil {
		return Kernel{}, err
	}
	k, err := openKernel(dir)
	k.Name, k.Package, k.Version = name, pkg, version
	return k, err
}

// newer compares the versions inside two package names as dpkg would.
func newer(ctx context.Context, a, b string) bool {
	_, err := command(ctx, "", "dpkg", "--compare-versions", strings.TrimPrefix(a, "linux-image-"), "gt", strings.TrimPrefix(b, "linux-image-"))
	return err == nil
}

// unpackKernel fetches a kernel package, and the parts into which newer ones
// are split, and unpacks them without running any of their scripts.
func unpackKernel(ctx context.Context, src aptSource, pkg, version, dir string) error {
	debs := filepath.Join(dir, "debs")
	root := filepath.Join(dir, "root")
	for _, d := range []string{debs, root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	want := []string{pkg + "=" + version}
	deps, err := src.depends(ctx, want[0])
	if err != nil {
		return err
	}
	for _, d := range deps {
		if strings.HasPrefix(d, "linux-binary-") || strings.HasPrefix(d, "linux-modules-") {
			want = append(want, d)
		}
	}
	if err := src.download(ctx, debs, want...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := command(ctx, "", "dpkg-deb", "-x", f, root); err != nil {
			return err
		}
	}
	return src.copyLists(filepath.Join(dir, "lists"))
}

// openKernel looks at an unpacked kernel.
func openKernel(dir string) (Kernel, error) {
	one := func(patterns ...string) (string, error) {
		for _, p := range patterns {
			m, err := filepath.Glob(filepath.Join(dir, p))
			if err != nil {
				return "", err
			}
			if len(m) == 1 {
				return m[0], nil
			}
		}
		return "", fmt.Errorf("%s: no single %s: %w", dir, patterns[0], errs.NotFound)
	}
	image, err := one("root/boot/vmlinuz-*", "root/usr/lib/modules/*/vmlinuz")
	if err != nil {
		return Kernel{}, err
	}
	modules, err := one("root/lib/modules/*", "root/usr/lib/modules/*")
	if err != nil {
		return Kernel{}, err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "debs/*.deb"))
	if err != nil {
		return Kernel{}, err
	}
	lists, err := filepath.Glob(filepath.Join(dir, "lists/*"))
	if err != nil {
		return Kernel{}, err
	}
	return Kernel{Lists: lists, Release: filepath.Base(modules), Image: image, Modules: modules, Dir: dir, Debs: debs}, nil
}
