// Command demo is the quickstart: it builds the parts, prepares a host (see
// prepare.sh) and takes the tour of it (see tour.sh), on this machine if its
// kernel can enforce, in a scope that leaves everything else alone; otherwise
// in a QEMU guest made of Debian's own packages and kernel.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"ringwall/internal/enforce"
	"ringwall/test/vm"
)

// budget bounds everything after the build, on a slow machine.
const budget = 20 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := demo{out: os.Stdout}
	flag.StringVar(&d.ringwall, "ringwall", "", "the ringwall binary")
	flag.StringVar(&d.kernel, "kernel", "6.1", "kernel of the guest: 6.1, 6.12 or newest")
	flag.StringVar(&d.part, "part", partBoth, "what to show: host, fleet or both")
	flag.BoolVar(&d.guest, "guest", false, "use a guest even if this machine's kernel can enforce")
	flag.BoolVar(&d.keep, "keep", false, "keep the working directory")
	flag.Parse()
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

type demo struct {
	ringwall, kernel string
	part             string
	guest, keep      bool
	out              io.Writer
	dir              string
}

func (d *demo) run(ctx context.Context) error {
	var err error
	if d.dir, err = os.MkdirTemp("", "ringwall-quickstart-"); err != nil {
		return err
	}
	if d.keep {
		fmt.Fprintln(d.out, "working in", d.dir)
	} else {
		defer os.RemoveAll(d.dir)
	}
	if err := d.parts(ctx); err != nil {
		return fmt.Errorf("build the parts: %w", err)
	}
	problems := enforce.Support()
	native := !d.guest && problems.Err() == nil
	if !native && !d.guest {
		fmt.Fprintf(d.out, "\nThis machine's own kernel cannot enforce:\n")
		for _, p := range problems {
			fmt.Fprintf(d.out, "  %s: %s\n", p.What, p.Why)
		}
		fmt.Fprintln(d.out, "so the tour runs in a virtual machine with Debian's.")
	}
	if native && d.part != partFleet {
		if err := d.onThisMachine(ctx); err != nil {
			return err
		}
	}
	if native && d.part == partHost {
		return nil
	}
	g, err := d.makeGuest(ctx)
	if err == nil && !native && d.part != partFleet {
		err = d.inGuest(ctx, g)
	}
	if err == nil && d.part != partHost {
		err = d.fleet(ctx, g)
	}
	return err
}

// The parts of the quickstart.
const (
	partBoth  = "both"
	partHost  = "host"
	partFleet = "fleet"
)

func (d *demo) path(names ...string) string {
	return filepath.Join(append([]string{d.dir}, names...)...)
}

// parts builds what the tour needs: the authorised and the unauthorised.
func (d *demo) parts(ctx context.Context) error {
	p := d.path("parts")
	if err := os.MkdirAll(p, 0o755); err != nil { //nolint:gosec // programs for everyone
		return err
	}
	for _, argv := range [][]string{
		{"go", "build", "-trimpath", "-o", p + "/greeter", "./demo/greeter"},
		{"gcc", "-O1", "-Wall", "-static", "-o", p + "/attack", "demo/src/attack.c"},
		{"gcc", "-O1", "-Wall", "-static", "-o", p + "/evil", "demo/src/evil.c"},
		{"gcc", "-O1", "-Wall", "-shared", "-fPIC", "-DLIBRARY", "-o", p + "/evil.so", "demo/src/evil.c"},
		{"cp", d.ringwall, p + "/ringwall"},
		{"cp", "demo/tour.sh", "demo/fleet.sh", "demo/prepare.sh", p},
	} {
		if err := d.command(ctx, nil, argv...); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) command(ctx context.Context, env []string, argv ...string) error {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	c.Env = append(c.Env, env...)
	c.Stdout, c.Stderr = d.out, os.Stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("%v: %w", argv, err)
	}
	return nil
}

// onThisMachine takes the tour in a cgroup: its processes are governed, and
// nothing else of this machine is.
func (d *demo) onThisMachine(ctx context.Context) error {
	cgroup := fmt.Sprintf("/sys/fs/cgroup/ringwall-quickstart-%d", os.Getpid())
	if err := os.Mkdir(cgroup, 0o755); err != nil { //nolint:gosec // a cgroup
		return fmt.Errorf("make a cgroup: %w", err)
	}
	defer os.Remove(cgroup)
	debs := d.path("debs")
	if err := d.command(ctx, nil, "demo/fetch-installed.sh", debs); err != nil {
		return err
	}
	err := d.command(ctx, []string{"RINGWALL_SCOPE=" + cgroup, "RINGWALL_DEBS=" + debs}, "sh", d.path("parts", "prepare.sh"), d.path("parts"), d.path("prepared"))
	if err != nil {
		return err
	}
	dir, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer dir.Close()
	c := exec.CommandContext(ctx, "sh", d.path("parts", "tour.sh"), d.path("parts"), d.path("prepared"))
	c.Env = append(os.Environ(), "RINGWALL_SCOPE="+cgroup)
	c.Stdout, c.Stderr = d.out, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return c.Run()
}

// guest is a Debian system for virtual machines, and the disk that they get.
type guest struct {
	image   vm.Image
	kernel  vm.Kernel
	payload string
}

// makeGuest makes the system, unless it is there, and prepares a host's state
// for it.
func (d *demo) makeGuest(ctx context.Context) (*guest, error) {
	fmt.Fprintln(d.out, "\nMaking a Debian 12 guest with systemd, nginx and Python (kept for the next time) …")
	k, err := vm.FindKernel(ctx, d.kernel)
	if err != nil {
		return nil, err
	}
	image, err := vm.DebianImage(ctx, vm.Options{Packages: vm.Lean(), Kernels: []vm.Kernel{k}})
	if err != nil {
		return nil, err
	}
	root := d.path("root", "var/lib/apt")
	if err := errors.Join(os.MkdirAll(root, 0o755), os.Symlink(image.Lists, root+"/lists")); err != nil { //nolint:gosec // public indices
		return nil, err
	}
	g := &guest{image: image, kernel: k, payload: d.path("payload")}
	prepared := filepath.Join(g.payload, "prepared")
	if err := os.Mkdir(g.payload, 0o755); err != nil { //nolint:gosec // a disk's root
		return nil, err
	}
	err = d.command(ctx, []string{"RINGWALL_ROOT=" + d.path("root"), "RINGWALL_DEBS=" + image.Debs}, "sh", d.path("parts", "prepare.sh"), d.path("parts"), prepared)
	if err != nil {
		return nil, err
	}
	return g, d.command(ctx, nil, "cp", "-a", d.path("parts"), g.payload)
}

// inGuest takes the tour in a virtual machine, where all of it is governed.
func (d *demo) inGuest(ctx context.Context, g *guest) error {
	fmt.Fprintf(d.out, "\nBooting it with kernel %s; the whole system will be governed …\n", g.kernel.Release)
	r, err := vm.RunDebian(ctx, vm.DebianGuest{
		Image: g.image, Kernel: g.kernel, Payload: g.payload, Script: "#!/bin/sh\nexec /payload/parts/tour.sh /payload/parts /payload/prepared\n", Output: d.out,
		Machine: vm.Machine{CPUs: 2, MemMiB: 2048},
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out, r.Line())
	if r.Exit != 0 {
		return fmt.Errorf("the tour found something wrong (exit %d), see above", r.Exit)
	}
	return nil
}
