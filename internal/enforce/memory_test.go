package enforce

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// memoryRole makes memory executable in some way.
func memoryRole(name string) error {
	const rw, rx, rwx = unix.PROT_READ | unix.PROT_WRITE, unix.PROT_READ | unix.PROT_EXEC, unix.PROT_READ | unix.PROT_WRITE | unix.PROT_EXEC
	const private, shared = unix.MAP_PRIVATE | unix.MAP_ANON, unix.MAP_SHARED | unix.MAP_ANON
	switch name {
	case "anonymous":
		_, err := unix.Mmap(-1, 0, 4096, rx, private)
		return err
	case "anonymous, writable":
		_, err := unix.Mmap(-1, 0, 4096, rwx, private)
		return err
	case "anonymous, later":
		b, err := unix.Mmap(-1, 0, 4096, rw, private)
		if err != nil {
			return err
		}
		return unix.Mprotect(b, rx)
	case "shared anonymous":
		_, err := unix.Mmap(-1, 0, 4096, rx, shared)
		return err
	case "memfd twice", "memfd, later":
		fd, err := unix.MemfdCreate("jit", 0)
		if err != nil {
			return err
		}
		if err := unix.Ftruncate(fd, 4096); err != nil {
			return err
		}
		b, err := unix.Mmap(fd, 0, 4096, rw, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		if name == "memfd, later" {
			return unix.Mprotect(b, rx)
		}
		_, err = unix.Mmap(fd, 0, 4096, rx, unix.MAP_SHARED)
		return err
	case "userfaultfd, alone":
		fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
		if e != 0 {
			return e
		}
		return unix.Close(int(fd))
	case "userfaultfd": // a page that user space supplies at its first use
		return userfault()
	}
	return unix.EINVAL
}

// userfault maps memory executable that userfaultfd(2) would fill.
func userfault() error {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if e != 0 {
		return e
	}
	defer unix.Close(int(fd))
	_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	return err
}

func TestMemory(t *testing.T) {
	l := newLab(t)
	ways := []string{"anonymous", "anonymous, writable", "anonymous, later", "shared anonymous", "memfd twice", "memfd, later", "userfaultfd"}
	for _, c := range []struct {
		role  integrity.Role
		works map[string]bool
	}{
		{0, nil},
		{integrity.RoleDebug | integrity.RolePackages | integrity.RoleBPF, nil},
		{integrity.RoleJIT, map[string]bool{"anonymous": true, "anonymous, writable": true, "anonymous, later": true, "shared anonymous": true, "userfaultfd": true}},
		{integrity.RoleJITShared, map[string]bool{
			"anonymous": true, "anonymous, writable": true, "anonymous, later": true, "shared anonymous": true, "userfaultfd": true, "memfd twice": true, "memfd, later": true,
		}},
	} {
		l.allow(l.read("/proc/self/exe"), c.role, 0)
		l.apply()
		for _, way := range ways {
			err := l.role("memory", way)
			if c.works[way] && err != nil || !c.works[way] && !refusedWith(err, 1) {
				t.Errorf("role %b, %s: %v, want works=%v", c.role, way, err, c.works[way])
			}
		}
	}
}

func TestPersonality(t *testing.T) {
	l := newLab(t)
	if err := l.role("personality-query"); err != nil {
		t.Errorf("asking is no offence: %v", err)
	}
	if _, ok := l.e.links["rw_personality"]; !ok {
		t.Skip("SKIPPED, NOT TESTED: this kernel does not let personality(2) be watched")
	}
	l.drain()
	if err := l.role("personality"); !refusedWith(err, -1) {
		t.Errorf("READ_IMPLIES_EXEC was given: %v", err)
	}
	l.event(Personality)
	l.allow(l.read("/proc/self/exe"), integrity.RoleJIT, 0)
	l.apply()
	if err := l.role("personality"); err != nil {
		t.Errorf("a program that may make code: %v", err)
	}
}

// elf is a program that exits, as 64- or 32-bit code, with the flags of
// PT_GNU_STACK; 0 leaves that header out.
func elf(bits int, stack uint32) []byte {
	le := binary.LittleEndian
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	code, machine, ehdr, phdr := []byte{0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05}, uint16(62), uint16(64), uint16(56)
	word := func(v uint64) { b = le.AppendUint64(b, v) }
	if bits == 32 {
		b[4] = 1
		code, machine, ehdr, phdr = []byte{0x31, 0xdb, 0xb8, 1, 0, 0, 0, 0xcd, 0x80}, 3, 52, 32
		word = func(v uint64) { b = le.AppendUint32(b, uint32(v)) }
	}
	headers := uint16(1)
	if stack != 0 {
		headers = 2
	}
	const base = 0x400000
	start := uint64(ehdr + headers*phdr)
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	word(base + start)
	word(uint64(ehdr))
	word(0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{ehdr, phdr, headers, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	header := func(kind, flags uint32, at, size uint64) {
		b = le.AppendUint32(b, kind)
		if bits == 64 {
			b = le.AppendUint32(b, flags)
		}
		word(0)
		word(at)
		word(at)
		word(size)
		word(size)
		if bits == 32 {
			b = le.AppendUint32(b, flags)
		}
		word(0x1000)
	}
	size := start + uint64(len(code))
	header(1, 5, base, size)
	if stack != 0 {
		header(0x6474e551, stack, 0, 0)
	}
	return append(b, code...)
}

func TestStack(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		name  string
		bits  int
		flags uint32
		role  integrity.Role
		works bool
	}{
		{"64 bits, no header", 64, 0, 0, true},
		{"64 bits, stack not executable", 64, 6, 0, true},
		{"64 bits, executable stack", 64, 7, 0, false},
		{"64 bits, executable stack, may make code", 64, 7, integrity.RoleJIT, true},
		{"32 bits, stack not executable", 32, 6, 0, true},
		{"32 bits, executable stack", 32, 7, 0, false},
		{"32 bits, no header: everything readable is executable", 32, 0, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			program := elf(c.bits, c.flags)
			l.allow(program, c.role, 0)
			l.apply()
			l.drain()
			err := l.run(l.file("stack", program))
			if (err == nil) != c.works {
				t.Errorf("works: %v (%v), want %v", err == nil, err, c.works)
				l.logEvents()
			}
			if !c.works {
				l.event(MemoryWX)
			}
			if err := os.Remove(l.dir + "/stack"); err != nil {
				t.Fatal(err)
			}
		})
	}
}
