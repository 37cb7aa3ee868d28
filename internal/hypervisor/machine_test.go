package hypervisor_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/hypervisor"
)

func TestMachine_args(t *testing.T) {
	m := hypervisor.Machine{
		Kernel: "/boot/vmlinuz", Initramfs: "/tmp/initrd", Cmdline: "rdinit=/x -- csv",
		Disks: []hypervisor.Disk{{Path: "/a,b", Format: "qcow2"}, {Path: "/c", Format: "raw", Serial: "payload", ReadOnly: true}},
	}
	line := strings.Join(m.Args(false), " ")
	for _, want := range []string{
		"-nic none", "-no-reboot", "-smp 2", "-m 1024", "-accel tcg,thread=multi", "panic=-1 no_timer_check rdinit=/x -- csv",
		"file=/a,,b,format=qcow2,if=none,id=d0", "file=/c,format=raw,if=none,id=d1,cache=unsafe,readonly=on", "drive=d1,serial=payload",
		"virtserialport,chardev=report,name=" + hypervisor.ReportPort,
	} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in: %s", want, line)
		}
	}
	for _, bad := range []string{"netdev", "-accel kvm", "virtio-net"} {
		if strings.Contains(line, bad) {
			t.Errorf("%q in: %s", bad, line)
		}
	}
	m.CPUs, m.MemMiB = 4, 512
	if kvm := m.Args(true); !slices.Contains(kvm, "kvm") || !slices.Contains(kvm, "512") || !slices.Contains(kvm, "4") {
		t.Errorf("with KVM: %q", kvm)
	}
}

// emulator puts a shell script in the place of QEMU.
func emulator(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"qemu-system-x86_64": script, "qemu-img": "exit 0"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
}

func TestMachine_Run(t *testing.T) {
	emulator(t, `echo early; echo 'Kernel panic - not syncing: no' >&3; echo late`)
	var got string
	r, err := (&hypervisor.Machine{}).Run(t.Context(), func(in io.Reader) error {
		b, err := io.ReadAll(in)
		got = string(b)
		return err
	})
	if err != nil || got != "early\nlate\n" || !r.Panicked() {
		t.Fatalf("%v, report %q, console %q", err, got, r.Console)
	}
}

// A machine that goes on after its report is not waited for.
func TestMachine_Run_enough(t *testing.T) {
	emulator(t, "echo all; exec sleep 600")
	began := time.Now()
	_, err := (&hypervisor.Machine{}).Run(t.Context(), func(in io.Reader) error {
		_, err := io.ReadFull(in, make([]byte, 4))
		return err
	})
	if took := time.Since(began); err != nil || took > 20*time.Second {
		t.Errorf("%v, after %v", err, took)
	}
}

func TestMachine_Run_refuses(t *testing.T) {
	read := func(in io.Reader) error { _, err := io.Copy(io.Discard, in); return err }
	broken := errors.New("this report is no report")
	for name, c := range map[string]struct {
		script string
		report func(io.Reader) error
		limit  time.Duration
		want   error
		words  string
	}{
		"fails":      {script: "echo no such image >&2; exit 1", report: read, words: "no such image"},
		"endless":    {script: "exec sleep 600", report: read, limit: 300 * time.Millisecond, want: context.DeadlineExceeded},
		"bad report": {script: "echo x; exec sleep 600", report: func(io.Reader) error { return broken }, want: broken},
		"too much":   {script: "exec head -c 70000000 /dev/zero", report: read, want: errs.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			emulator(t, c.script)
			ctx := t.Context()
			if c.limit > 0 {
				var cancel func()
				ctx, cancel = context.WithTimeout(ctx, c.limit)
				defer cancel()
			}
			began := time.Now()
			_, err := (&hypervisor.Machine{}).Run(ctx, c.report)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v", err)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("stopped after %v only", took)
			}
		})
	}
}

func TestCheck_missing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if err := hypervisor.Check(); !errors.Is(err, errs.Unsupported) {
		t.Errorf("without QEMU: %v", err)
	}
	if _, err := (&hypervisor.Machine{}).Run(t.Context(), nil); !errors.Is(err, errs.Unsupported) {
		t.Errorf("without QEMU: %v", err)
	}
}

func TestFormatOf(t *testing.T) {
	dir := t.TempDir()
	for content, want := range map[string]string{"QFI\xfb more": "qcow2", "QF": "raw", "": "raw", "something else": "raw"} {
		f := filepath.Join(dir, "disk")
		if err := os.WriteFile(f, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := hypervisor.FormatOf(f); err != nil || got != want {
			t.Errorf("%q: %s, %v", content, got, err)
		}
	}
	if _, err := hypervisor.FormatOf(filepath.Join(dir, "none")); err == nil {
		t.Error("an image that is not there has a format")
	}
}
