// Package hypervisor starts virtual machines with QEMU: a kernel and an
// initramfs that are handed over directly, disks, no network, and a virtio
// serial port by which the guest reports.
//
// A machine lives as long as the call that runs it: it is killed when the
// context ends, and with the program that started it. What a guest writes is
// bounded, and is data from outside: whoever reads it checks it.
//
// What this machine cannot do, such as a QEMU that is not installed, is
// errs.Unsupported.
package hypervisor
