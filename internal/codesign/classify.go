package codesign

import (
	"encoding/binary"
	"io/fs"
	"path"
	"strings"

	"ringwall/internal/integrity"
)

// ClassifierVersion is the version of the rules in this file. It is part of
// every catalogue: two catalogues of one artefact are only comparable if they
// were made by the same rules. Any change to the rules raises it.
const ClassifierVersion = 2

// HeadSize is how much of a file's beginning Classify looks at.
const HeadSize = 4096

// Flags say more about a member of a catalogue. They do not change what it may
// be used as.
type Flags uint16

// The flags.
const (
	FlagData    Flags = 1 << 0 // no code by itself; listed because an interpreter may read it (Options.AllFiles)
	FlagInner   Flags = 1 << 1 // what is inside a compressed module or firmware file, as the kernel sees it
	FlagSetID   Flags = 1 << 2 // set-user-ID or set-group-ID somewhere in the artefact
	FlagInstall Flags = 1 << 3 // a package's maintainer script
	FlagCaps    Flags = 1 << 4 // file capabilities somewhere in the artefact (classifier 2)
	FlagNested  Flags = 1 << 5 // only found inside an archive that is itself a member (classifier 2)

	knownFlags = FlagData | FlagInner | FlagSetID | FlagInstall | FlagCaps | FlagNested
)

// Class is what a file is.
type Class struct {
	Kinds      integrity.KindSet
	Flags      Flags
	Compressed string // "xz", "zst" or "gz": the kernel may load what is inside
}

// Classify says what a file may be used as, from its path within the artefact,
// its mode and its first HeadSize bytes (all of them, if it is shorter). An
// empty kind set means that it is no code.
func Classify(name string, mode fs.FileMode, head []byte) Class {
	return classOf(name, mode, sniff(head))
}

// sniffed is what a file's first bytes say.
type sniffed uint8

const (
	isOther     sniffed = iota
	isProgram           // ELF that cannot be a library: ET_EXEC
	isPIE               // ELF ET_DYN with an interpreter: a program (libc.so.6 is one too)
	isShared            // ELF ET_DYN without: a library, ld.so or a static PIE
	isObject            // ELF ET_REL
	isElf               // ELF of another type, or cut short
	isShebang           // #!
	isWasm              // WebAssembly
	isBytecode          // Java class or image of classes (jimage), .NET assembly, Lua, Erlang
	isBoot              // a kernel, or an image that firmware starts
	isInitramfs         // a cpio archive
	isPycOwn            // Python's byte code that stands for its source by time (PEP 552)
)

func sniff(head []byte) sniffed {
	has := func(s string) bool { return len(head) >= len(s) && string(head[:len(s)]) == s }
	switch {
	case has("\x7fELF"):
		return sniffELF(head)
	case has("#!"):
		return isShebang
	case has("\x00asm"):
		return isWasm
	case has("\xca\xfe\xba\xbe"), has("\xda\xda\xfe\xca"), has("\xca\xfe\xda\xda"), has("\x1bLua"),
		has("FOR1") && len(head) >= 12 && string(head[8:12]) == "BEAM":
		return isBytecode
	case has("MZ"):
		return sniffPE(head)
	case has("070701"), has("070702"):
		return isInitramfs
	case len(head) >= 16 && head[2] == '\r' && head[3] == '\n' && binary.LittleEndian.Uint32(head[4:]) == 0:
		return isPycOwn
	}
	return isOther
}

// sniffPE tells what the kernel or the firmware may start from what only an
// interpreter can. A Linux kernel is known by its own header (boot protocol,
// Documentation/arch/x86/boot.rst) with and without an EFI stub.
func sniffPE(head []byte) sniffed {
	if len(head) >= 0x206 && string(head[0x202:0x206]) == "HdrS" {
		return isBoot
	}
	le := binary.LittleEndian
	if len(head) < 64 {
		return isOther
	}
	at := uint64(le.Uint32(head[60:]))
	if at+24+96 > uint64(len(head)) || string(head[at:at+4]) != "PE\x00\x00" {
		return isOther
	}
	optional := head[at+24:]
	directories := 96
	if le.Uint16(optional) == 0x20b { // PE32+
		directories = 112
	}
	if s := le.Uint16(optional[68:]); s >= 10 && s <= 13 {
		return isBoot // EFI application, driver, ROM
	}
	const clr = 14
	if entry := directories + 8*clr; len(optional) >= entry+8 && le.Uint32(optional[entry:]) != 0 {
		return isBytecode
	}
	return isOther
}

func sniffELF(head []byte) sniffed {
	if len(head) < 64 {
		return isElf
	}
	var bo binary.ByteOrder = binary.LittleEndian
	if head[5] == 2 {
		bo = binary.BigEndian
	}
	const bpf = 247
	if bo.Uint16(head[18:]) == bpf {
		return isOther // loaded through bpf(2), which is judged by who loads it
	}
	switch bo.Uint16(head[16:]) {
	case 1:
		return isObject
	case 2:
		return isProgram
	case 3:
		return sniffDynamic(head, bo)
	}
	return isElf
}

func sniffDynamic(head []byte, bo binary.ByteOrder) sniffed {
	var off, size, n uint64
	if head[4] == 2 {
		off, size, n = bo.Uint64(head[32:]), uint64(bo.Uint16(head[54:])), uint64(bo.Uint16(head[56:]))
	} else {
		off, size, n = uint64(bo.Uint32(head[28:])), uint64(bo.Uint16(head[42:])), uint64(bo.Uint16(head[44:]))
	}
	for i := range n {
		at := off + i*size
		if off > uint64(len(head)) || at+4 > uint64(len(head)) || size < 4 {
			return isElf // the headers are further in: could be either
		}
		const ptInterp = 3
		if bo.Uint32(head[at:]) == ptInterp {
			return isPIE
		}
	}
	return isShared
}

func classOf(name string, mode fs.FileMode, s sniffed) Class {
	name = strings.TrimPrefix(path.Clean(name), "/")
	base := path.Base(name)
	var c Class
	if mode&(fs.ModeSetuid|fs.ModeSetgid) != 0 && mode&0o111 != 0 {
		c.Flags |= FlagSetID
	}
	add := func(k integrity.Kind) { c.Kinds |= integrity.SetOf(k) }
	plain, compressed := stripCompression(base)
	switch {
	case strings.HasSuffix(plain, ".ko"):
		add(integrity.KindModule)
		c.Compressed = compressed
	case strings.HasPrefix(name, "lib/firmware/") || strings.HasPrefix(name, "usr/lib/firmware/"):
		add(integrity.KindFirmware)
		c.Compressed = compressed
	case isKexec(name, base):
		add(integrity.KindKexec)
	}
	switch s {
	case isProgram, isPIE:
		add(integrity.KindExec)
	case isShared:
		add(integrity.KindLibrary)
		// A static PIE has no interpreter, and neither has ld.so, which ldd
		// and initramfs-tools run by name.
		if mode&0o111 != 0 && (!strings.Contains(base, ".so") || isLoader(base)) {
			add(integrity.KindExec)
		}
	case isElf:
		add(integrity.KindExec)
		add(integrity.KindLibrary)
	case isObject: // a module, by its name, or a compiler's intermediate file
	case isShebang, isWasm, isBytecode:
		add(integrity.KindScript)
	case isBoot:
		add(integrity.KindKexec)
		if mode&0o111 != 0 {
			add(integrity.KindScript) // for binfmt_misc, which takes any PE
		}
	case isPycOwn:
		// By rule, not by list: what Python wrote into __pycache__ changes with
		// the source's time stamp, and Python reads the source without it.
		if path.Base(path.Dir(name)) != "__pycache__" || mode&0o111 != 0 {
			add(integrity.KindScript)
		}
	case isInitramfs, isOther:
		// Whatever is not ELF and is handed to execve, the kernel calls a
		// script: text for a shell, or binfmt_misc.
		if codeSuffix(base) || (c.Kinds == 0 && mode&0o111 != 0) {
			add(integrity.KindScript)
		}
	}
	return c
}

func stripCompression(base string) (plain, compressed string) {
	for _, x := range []string{"xz", "zst", "gz"} {
		if p, ok := strings.CutSuffix(base, "."+x); ok {
			return p, x
		}
	}
	return base, ""
}

func isLoader(base string) bool {
	return strings.HasPrefix(base, "ld-") || strings.HasPrefix(base, "ld.so") || strings.HasPrefix(base, "ld64.so")
}

func isKexec(name, base string) bool {
	if !strings.HasPrefix(name, "boot/") && !strings.Contains(name, "lib/modules/") {
		return false
	}
	for _, p := range []string{"vmlinuz", "vmlinux", "bzImage", "initrd", "initramfs"} {
		if strings.HasPrefix(base, p) {
			return true
		}
	}
	return false
}

// codeSuffix says whether files of this name are read as code by an
// interpreter, whatever their mode: at least every suffix of an interpreter in
// the built-in policy baseline (a test compares).
func codeSuffix(base string) bool {
	switch strings.ToLower(path.Ext(base)) {
	case ".py", ".pyc", ".pyo", ".pyw", ".pyz", ".pth", ".egg", ".whl", ".zip",
		".pl", ".pm", ".ph", ".al", ".plx", ".t",
		".sh", ".bash", ".zsh", ".ksh", ".csh", ".tcsh", ".fish",
		".rb", ".ru", ".rbw", ".rake", ".gemspec",
		".js", ".mjs", ".cjs", ".ts",
		".lua", ".luac",
		".php", ".phar", ".phtml", ".inc",
		".awk", ".tcl", ".tk", ".exp", ".itcl",
		".jar", ".war", ".ear", ".class", ".java", ".jmod", ".jsh", ".wasm",
		".el", ".elc", ".beam", ".ex", ".exs", ".r", ".jl", ".scm":
		return true
	}
	return false
}
