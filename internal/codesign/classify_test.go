package codesign_test

import (
	"encoding/binary"
	"io/fs"
	"os"
	"testing"

	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
)

// elf returns the beginning of a 64-bit little-endian ELF file.
func elf(kind uint16, segments ...uint32) string {
	b := make([]byte, 64+56*len(segments))
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], kind)
	le.PutUint16(b[18:], 62)
	le.PutUint64(b[32:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], uint16(len(segments)))
	for i, s := range segments {
		le.PutUint32(b[64+56*i:], s)
	}
	return string(b)
}

// pe returns the beginning of a PE32+ file.
func pe(subsystem uint16, clr uint32) string {
	b := make([]byte, 512)
	copy(b, "MZ")
	le := binary.LittleEndian
	le.PutUint32(b[60:], 128)
	copy(b[128:], "PE\x00\x00")
	o := b[152:]
	le.PutUint16(o, 0x20b)
	le.PutUint16(o[68:], subsystem)
	le.PutUint32(o[112+8*14:], clr)
	return string(b)
}

// kernel returns the beginning of a bzImage.
func kernel() string {
	b := make([]byte, 1024)
	copy(b, "MZ")
	copy(b[0x202:], "HdrS")
	return string(b)
}

const (
	pycTime   = "\xa7\x0d\x0d\x0a\x00\x00\x00\x00\x01\x02\x03\x04\x10\x00\x00\x00\xe3"
	pycHashed = "\xa7\x0d\x0d\x0a\x03\x00\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\xe3"
)

func TestClassify(t *testing.T) {
	const (
		exec, lib, script   = integrity.KindExec, integrity.KindLibrary, integrity.KindScript
		mod, firmware, kexe = integrity.KindModule, integrity.KindFirmware, integrity.KindKexec
	)
	for _, c := range []struct {
		name  string
		mode  fs.FileMode
		head  string
		kinds []integrity.Kind
		flags codesign.Flags
		inner string
	}{
		{"usr/bin/static", 0o755, elf(2, 1), []integrity.Kind{exec}, 0, ""},
		{"usr/bin/pie", 0o755, elf(3, 6, 3, 1), []integrity.Kind{exec}, 0, ""},
		{"usr/bin/static-pie", 0o755, elf(3, 1), []integrity.Kind{exec, lib}, 0, ""},
		{"usr/lib/libx.so.1", 0o644, elf(3, 1, 2), []integrity.Kind{lib}, 0, ""},
		{"usr/lib/libx.so.1", 0o755, elf(3, 1, 2), []integrity.Kind{lib}, 0, ""},
		{"usr/lib/libc.so.6", 0o755, elf(3, 6, 3, 1), []integrity.Kind{exec}, 0, ""},
		{"lib64/ld-linux-x86-64.so.2", 0o755, elf(3, 1, 2), []integrity.Kind{exec, lib}, 0, ""},
		{"usr/lib/plugin", 0o644, elf(3, 1), []integrity.Kind{lib}, 0, ""},
		{"usr/lib/far-headers", 0o644, elf(3, 1, 3)[:100], []integrity.Kind{exec, lib}, 0, ""},
		{"usr/lib/cut", 0o644, "\x7fELF", []integrity.Kind{exec, lib}, 0, ""},
		{"usr/lib/core", 0o644, elf(4), []integrity.Kind{exec, lib}, 0, ""},
		{"usr/lib/a.o", 0o644, elf(1), nil, 0, ""},
		{"usr/bin/sudo", 0o755 | fs.ModeSetuid, elf(3, 3), []integrity.Kind{exec}, codesign.FlagSetID, ""},
		{"srv/shared", 0o644 | fs.ModeSetgid, "data", nil, 0, ""},
		{"lib/modules/6.1/a.ko", 0o644, elf(1), []integrity.Kind{mod}, 0, ""},
		{"lib/modules/6.1/a.ko.xz", 0o644, "\xfd7zXZ\x00", []integrity.Kind{mod}, 0, "xz"},
		{"lib/modules/6.1/a.ko.zst", 0o644, "\x28\xb5\x2f\xfd", []integrity.Kind{mod}, 0, "zst"},
		{"lib/modules/6.1/a.ko.gz", 0o644, "\x1f\x8b", []integrity.Kind{mod}, 0, "gz"},
		{"lib/firmware/x.bin", 0o644, "\x00\x01", []integrity.Kind{firmware}, 0, ""},
		{"usr/lib/firmware/x.bin.xz", 0o644, "\xfd7zXZ\x00", []integrity.Kind{firmware}, 0, "xz"},
		{"boot/vmlinuz-6.1", 0o644, "MZ", []integrity.Kind{kexe}, 0, ""},
		{"boot/initrd.img-6.1", 0o644, "\x28\xb5\x2f\xfd", []integrity.Kind{kexe}, 0, ""},
		{"boot/config-6.1", 0o644, "CONFIG", nil, 0, ""},
		{"usr/share/doc/vmlinuz", 0o644, "text", nil, 0, ""},
		{"usr/bin/a", 0o755, "#!/bin/sh\n", []integrity.Kind{script}, 0, ""},
		{"usr/share/a", 0o644, "#! /usr/bin/perl", []integrity.Kind{script}, 0, ""},
		{"usr/lib/python3/a.py", 0o644, "import os", []integrity.Kind{script}, 0, ""},
		{"usr/lib/python3/__init__.py", 0o644, "", []integrity.Kind{script}, 0, ""},
		{"usr/lib/A.PY", 0o644, "import os", []integrity.Kind{script}, 0, ""},
		{"a.pyc", 0o644, "\xa7\x0d", []integrity.Kind{script}, 0, ""},
		{"x/__pycache__/a.cpython-311.pyc", 0o644, pycTime, nil, 0, ""},
		{"x/__pycache__/a.cpython-311.pyc", 0o755, pycTime, []integrity.Kind{script}, 0, ""},
		{"x/__pycache__/a.cpython-311.pyc", 0o644, pycHashed, []integrity.Kind{script}, 0, ""},
		{"x/a.pyc", 0o644, pycTime, []integrity.Kind{script}, 0, ""},
		{"usr/lib/systemd/boot/efi/systemd-bootx64.efi", 0o644, pe(10, 0), []integrity.Kind{kexe}, 0, ""},
		{"usr/lib/x.efi", 0o755, pe(10, 0), []integrity.Kind{kexe, script}, 0, ""},
		{"srv/images/linux", 0o644, kernel(), []integrity.Kind{kexe}, 0, ""},
		{"usr/lib/mono/mscorlib.dll", 0o644, pe(3, 0x2008), []integrity.Kind{script}, 0, ""},
		{"usr/share/win/setup.exe", 0o644, pe(3, 0), nil, 0, ""},
		{"srv/root.cpio", 0o644, "070701", nil, 0, ""},
		{"usr/lib/x.zip", 0o644, "PK\x03\x04", []integrity.Kind{script}, 0, ""},
		{"a.jar", 0o644, "PK\x03\x04", []integrity.Kind{script}, 0, ""},
		{"a", 0o644, "\xca\xfe\xba\xbe", []integrity.Kind{script}, 0, ""},
		{"usr/lib/jvm/lib/modules", 0o644, "\xda\xda\xfe\xca\x00\x00", []integrity.Kind{script}, 0, ""},
		{"usr/share/app/main", 0o644, "\x1bLuaT", []integrity.Kind{script}, 0, ""},
		{"usr/lib/erlang/x", 0o644, "FOR1\x00\x00\x00\x00BEAM", []integrity.Kind{script}, 0, ""},
		{"usr/share/x.aiff", 0o644, "FORM\x00\x00\x00\x00AIFF", nil, 0, ""},
		{"a", 0o644, "\x00asm\x01", []integrity.Kind{script}, 0, ""},
		{"usr/bin/text", 0o755, "echo hello", []integrity.Kind{script}, 0, ""},
		{"usr/bin/windows.exe", 0o755, "MZ", []integrity.Kind{script}, 0, ""},
		{"etc/config", 0o644, "a=b", nil, 0, ""},
		{"usr/share/doc/a.gz", 0o644, "\x1f\x8b", nil, 0, ""},
		{"/usr/share/x/../y.py", 0o644, "", []integrity.Kind{script}, 0, ""},
	} {
		got := codesign.Classify(c.name, c.mode, []byte(c.head))
		if got.Kinds != integrity.SetOf(c.kinds...) || got.Flags != c.flags || got.Compressed != c.inner {
			t.Errorf("%s %v: %+v, want %v", c.name, c.mode, got, c.kinds)
		}
	}
}

// The test's own binary is a program; what runs it is Go, not a fixture.
func TestClassify_ownBinary(t *testing.T) {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, codesign.HeadSize)
	n, err := f.Read(head)
	if err != nil {
		t.Fatal(err)
	}
	if c := codesign.Classify(path, 0o755, head[:n]); !c.Kinds.Has(integrity.KindExec) {
		t.Errorf("%+v", c)
	}
}

// What an interpreter of the baseline calls code must be listed, or hosts
// refuse it.
func TestClassify_baselineSuffixes(t *testing.T) {
	p, err := integrity.ParsePolicy([]byte("version: 1\nname: x\nepoch: 1\nmode: audit\nbaseline: 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, i := range p.Interpreters {
		for _, s := range i.CodeSuffix {
			n++
			if codesign.Classify("usr/share/x/file"+s, 0o644, []byte("words")).Kinds == 0 {
				t.Errorf("%s (%s) is no code", s, i.Name)
			}
		}
	}
	if n < 20 {
		t.Errorf("%d suffixes seen", n)
	}
}

func FuzzClassify(f *testing.F) {
	f.Add("usr/bin/x", uint32(0o755), []byte(elf(3, 1, 3)))
	f.Fuzz(func(t *testing.T, name string, mode uint32, head []byte) {
		c := codesign.Classify(name, fs.FileMode(mode), head)
		if c.Kinds.Has(integrity.KindBPF) {
			t.Error("a file's content cannot grant the right to load BPF")
		}
		if mode&0o111 != 0 && c.Kinds == 0 && len(head) > 0 && head[0] != 0x7f {
			t.Errorf("executable %q is nothing", name)
		}
	})
}
