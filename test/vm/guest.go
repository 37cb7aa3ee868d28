package vm

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/hypervisor"
	"ringwall/test/vm/internal/guest"
)

// Guest is one run of one program in a fresh guest.
type Guest struct {
	Kernel  Kernel
	Cmdline string   // appended to the kernel's command line
	Argv    []string // Argv[0] is a path in the guest
	Env     []string
	Dir     string   // working directory in the guest; "" is /
	Files   []File   // what the guest's file system holds
	Modules []string // kernel modules beside the default ones
	Disks   []Disk
	Machine Machine
	Output  io.Writer // what the program writes, as it comes; nil discards it
}

// Machine is the hardware of a guest. The zero value is 2 processors and
// 1 GiB.
type Machine struct {
	CPUs   int
	MemMiB int
	// ICount makes the guest's clock count executed instructions, one per
	// nanosecond, so that measured times do not depend on the load of the
	// host. It implies one processor and no hardware acceleration.
	ICount bool
	// Firmware is an image of UEFI firmware and Variables one of its variables,
	// which is written to; empty: a BIOS.
	Firmware, Variables string
	// Network gives the guest an interface (virtio_net) with a network of its own,
	// 10.0.2.0/24, in which 10.0.2.2 is this machine's loopback. The guest sets its
	// address itself: 10.0.2.15. Without it a guest has no network at all.
	Network bool
	// Console gets the kernel's messages as they come.
	Console io.Writer
}

// Disk is a virtio block device. They appear as /dev/vda, /dev/vdb, … in order.
type Disk struct {
	Path     string
	Format   string // raw or qcow2; "" is raw
	ReadOnly bool
}

// Result tells how a guest ended.
type Result struct {
	Exit    int           // of the program; 128+n after signal n
	Release string        // of the kernel, as the guest says
	Boots   int           // how often the kernel started
	Boot    time.Duration // from the start of QEMU until the program (Debian: the system) was ready
	Total   time.Duration
	Console string // the end of the kernel's messages
}

// Line is the summary of a run.
func (r Result) Line() string {
	return fmt.Sprintf("vm: kernel %s boot %.1fs total %.1fs exit %d", r.Release, r.Boot.Seconds(), r.Total.Seconds(), r.Exit)
}

// Run boots the guest, runs the program and stops the guest. An error means
// that there is no exit code: the guest did not boot, crashed, or ctx ended;
// the error then shows the end of the kernel's messages.
func Run(ctx context.Context, g Guest) (Result, error) {
	r, err := g.run(ctx)
	if err != nil {
		return r, fmt.Errorf("guest on kernel %s: %w", g.Kernel.Name, err)
	}
	return r, nil
}

func (g Guest) run(ctx context.Context) (Result, error) {
	if len(g.Argv) == 0 || !filepath.IsAbs(g.Argv[0]) {
		return Result{}, fmt.Errorf("program %q: %w", g.Argv, errs.Invalid)
	}
	tmp, err := os.MkdirTemp("", "ringwall-vm-")
	if err != nil {
		return Result{}, err
	}
	defer os.RemoveAll(tmp)
	c := guest.Config{
		Nonce: newNonce(), Argv: g.Argv, Dir: g.Dir,
		Env: append([]string{"PATH=/usr/bin:/usr/sbin:/bin:/sbin", "HOME=/root", "TMPDIR=/tmp", "USER=root", "RINGWALL_GUEST=" + g.Kernel.Name}, g.Env...),
	}
	if c.Dir == "" {
		c.Dir = "/"
	}
	initrd := filepath.Join(tmp, "initrd")
	if err := writeInitramfs(ctx, initrd, g.Kernel, append(defaultModules, g.Modules...), c, g.Files); err != nil {
		return Result{}, fmt.Errorf("initramfs: %w", err)
	}
	q := qemu{dir: tmp, kernel: g.Kernel, initrd: initrd, cmdline: g.Cmdline, disks: g.Disks, machine: g.Machine, bare: true, nonce: c.Nonce, output: g.Output}
	return q.run(ctx)
}

// writeInitramfs writes the first file system of a guest to path.
func writeInitramfs(ctx context.Context, path string, k Kernel, modules []string, c guest.Config, files []File) error {
	initBinary, err := buildInit(ctx)
	if err != nil {
		return err
	}
	order, err := hypervisor.LoadOrder(k.Modules, modules, k.plainModule)
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newCPIO(f)
	for _, d := range []string{"dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var/tmp", guest.ModuleDir} {
		a.dir(d)
	}
	if c.Dir != "" {
		a.dir(c.Dir)
	}
	a.copy("init", initBinary)
	for i, m := range order {
		name := strconv.Itoa(i) + "-" + m.Name
		c.Modules = append(c.Modules, name)
		a.file(guest.ModuleDir+"/"+name, 0o600, string(m.Data))
	}
	for _, x := range files {
		if err := a.add(x); err != nil {
			return err
		}
	}
	// Only where the caller brought none.
	a.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n")
	a.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")
	a.file("etc/hosts", 0o644, "127.0.0.1 localhost guest\n")
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	a.file(guest.ConfigPath, 0o600, string(b))
	if err := a.Close(); err != nil {
		return err
	}
	return f.Close()
}

// buildInit builds the guest's first process. Go's own build cache makes the
// second time cheap.
func buildInit(ctx context.Context) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(cache, "vminit.lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	// go build leaves the file alone when it is up to date, and otherwise
	// replaces it, so a reader sees the old or the new one whole.
	// Each source tree that shares the cache has its own.
	tree := sha256.Sum256([]byte(root))
	path := filepath.Join(cache, fmt.Sprintf("vminit-%x", tree[:4]))
	if _, err := command(ctx, root, "env", "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "ringwall/test/vm/vminit"); err != nil {
		return "", err
	}
	return path, nil
}
