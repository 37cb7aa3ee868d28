package vm

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"ringwall/test/vm/internal/guest"
)

// What a script in a Debian guest has to know of the harness.
const (
	// RunnerPath is the program that starts the script. A policy that lists
	// every program must list it: it is not part of Debian.
	RunnerPath = guest.RunnerPath
	// ScriptPath is where DebianGuest.Script is in the guest.
	ScriptPath = guest.ScriptPath
	// ExitReboot is the exit code by which a script asks to be run again after
	// a reboot. RINGWALL_BOOT in its environment counts the boots from 1.
	ExitReboot = guest.ExitReboot
)

// DebianGuest is one run of a script in a Debian system.
type DebianGuest struct {
	Image   Image
	Kernel  Kernel
	Cmdline string // appended to the kernel's command line
	// Payload is a directory of the host. The guest has it, read-only, as
	// /payload; "" is none.
	Payload string
	// Script runs as root after the system is up, with what it writes going to
	// Output. It starts with "#!". "" runs the program /payload/run.
	Script string
	Env    []string
	// Reboots is how often the guest may restart. What it writes to its disk
	// survives that, and nothing else does.
	Reboots int
	// Unmask are units that are to run though they only slow the boot down.
	Unmask  []string
	Machine Machine
	Output  io.Writer // nil discards it
}

// slowUnits do nothing that a guest without network, people and a future
// needs. They are masked in /run, not in the image.
func slowUnits() []string {
	return []string{
		"apt-daily.timer", "apt-daily-upgrade.timer", "apt-daily.service", "apt-daily-upgrade.service",
		"dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "logrotate.timer", "man-db.timer", "systemd-tmpfiles-clean.timer",
		"getty@.service", "serial-getty@.service", "getty.target", "console-getty.service",
		"systemd-udev-settle.service", "systemd-timesyncd.service", "systemd-networkd.service", "networking.service", "systemd-pstore.service",
		"systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-journal-flush.service", "systemd-hwdb-update.service",
		"systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
	}
}

// RunDebian boots the guest, runs the script and stops the guest. The disk
// image stays as it was. An error means that there is no exit code.
func RunDebian(ctx context.Context, g DebianGuest) (Result, error) {
	r, err := g.run(ctx)
	if err != nil {
		return r, fmt.Errorf("guest with Debian on kernel %s: %w", g.Kernel.Name, err)
	}
	return r, nil
}

func (g DebianGuest) run(ctx context.Context) (Result, error) {
	tmp, err := os.MkdirTemp("", "ringwall-vm-")
	if err != nil {
		return Result{}, err
	}
	defer os.RemoveAll(tmp)
	disk := filepath.Join(tmp, "disk.qcow2")
	if _, err := command(ctx, "", "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", g.Image.Path, disk); err != nil {
		return Result{}, err
	}
	disks := []Disk{{Path: disk, Format: "qcow2"}}
	if g.Payload != "" {
		p := filepath.Join(tmp, "payload")
		if err := makeDisk(ctx, p, g.Payload, 0); err != nil {
			return Result{}, fmt.Errorf("payload %s: %w", g.Payload, err)
		}
		disks = append(disks, Disk{Path: p, ReadOnly: true})
	}
	var mask []string
	for _, u := range slowUnits() {
		keep := false
		for _, k := range g.Unmask {
			keep = keep || k == u
		}
		if !keep {
			mask = append(mask, u)
		}
	}
	c := guest.Config{
		Nonce:  newNonce(),
		Env:    append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LANG=C.UTF-8", "RINGWALL_GUEST=" + g.Kernel.Name}, g.Env...),
		Debian: &guest.Debian{Payload: g.Payload != "", Script: g.Script, Mask: mask},
	}
	initrd := filepath.Join(tmp, "initrd")
	if err := writeInitramfs(ctx, initrd, g.Kernel, []string{"virtio_pci", "virtio_blk", "virtio_rng", "crc32c_generic", "ext4"}, c, nil); err != nil {
		return Result{}, fmt.Errorf("initramfs: %w", err)
	}
	q := qemu{
		dir: tmp, kernel: g.Kernel, initrd: initrd, disks: disks, machine: g.Machine, reboots: g.Reboots, nonce: c.Nonce, output: g.Output,
		cmdline: "systemd.unit=multi-user.target systemd.show_status=error modprobe.blacklist=kvm,kvm_amd " + g.Cmdline,
	}
	return q.run(ctx)
}
