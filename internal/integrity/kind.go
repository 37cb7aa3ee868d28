// Package integrity holds the code-integrity policy and the one function that
// decides whether an object may run. It is pure: no file, network or process
// access, so that agent, CSV, what-if and console all give the same answer.
package integrity

import (
	"encoding/hex"
	"fmt"
	"strings"

	"ringwall/internal/errs"
)

// Kind is what an object is about to be used as.
type Kind uint8

// The kinds. Their numbers are shared with the kernel programs
// (internal/enforce/bpf/ringwall.h) and must not be reordered.
const (
	KindExec     Kind = 1 // a program handed to execve
	KindLibrary  Kind = 2 // a file mapped executable: shared library, ELF interpreter
	KindScript   Kind = 3 // text or byte code that an interpreter reads
	KindModule   Kind = 4 // a kernel module
	KindFirmware Kind = 5 // device firmware loaded by the kernel
	KindKexec    Kind = 6 // a kernel or initramfs for kexec
	KindBPF      Kind = 7 // a program that may load BPF programs
)

var kindNames = [...]string{
	KindExec: "exec", KindLibrary: "library", KindScript: "script", KindModule: "module",
	KindFirmware: "firmware", KindKexec: "kexec", KindBPF: "bpf",
}

// Kinds lists every kind in order.
func Kinds() []Kind {
	return []Kind{KindExec, KindLibrary, KindScript, KindModule, KindFirmware, KindKexec, KindBPF}
}

// String returns the name that policies and events use.
func (k Kind) String() string {
	if k >= KindExec && k <= KindBPF {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// ParseKind is the inverse of String.
func ParseKind(s string) (Kind, error) {
	for _, k := range Kinds() {
		if kindNames[k] == s {
			return k, nil
		}
	}
	return 0, fmt.Errorf("kind %q (want one of %s): %w", s, strings.Join(kindNames[1:], ", "), errs.Invalid)
}

// KindSet is a set of kinds, bit 1<<Kind each.
type KindSet uint16

// SetOf returns the set of the kinds given.
func SetOf(ks ...Kind) KindSet {
	var s KindSet
	for _, k := range ks {
		s |= 1 << k
	}
	return s
}

// Has reports whether k is in the set.
func (s KindSet) Has(k Kind) bool { return s&(1<<k) != 0 }

// Digest is a SHA-256 value: of a file's content, of an fs-verity descriptor
// or of a dm-verity root, depending on its Space.
type Digest [32]byte

// String returns the digest in lower-case hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether the digest is unset.
func (d Digest) IsZero() bool { return d == Digest{} }

// ParseDigest reads 64 hex digits, with or without a "sha256:" prefix.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	b, err := hex.DecodeString(strings.TrimPrefix(s, "sha256:"))
	if err != nil || len(b) != len(d) {
		return d, fmt.Errorf("digest %q: want 64 hex digits: %w", s, errs.Invalid)
	}
	copy(d[:], b)
	return d, nil
}

// MarshalText implements encoding.TextMarshaler, in hex.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler for 64 hex digits.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 2*len(d) {
		return fmt.Errorf("digest of %d characters: want 64 hex digits: %w", len(b), errs.Invalid)
	}
	if _, err := hex.Decode(d[:], b); err != nil {
		return fmt.Errorf("digest %q: want 64 hex digits: %w", b, errs.Invalid)
	}
	return nil
}

// Space says what a Digest was computed over. Digests of different spaces
// never match each other. Shared with the kernel programs.
type Space uint32

// The spaces.
const (
	SpaceSHA256   Space = 0 // SHA-256 of the whole file
	SpaceFSVerity Space = 1 // fs-verity file digest (SHA-256), as FS_IOC_MEASURE_VERITY returns it
	SpaceDMVerity Space = 2 // dm-verity root hash (SHA-256)
)

// Mode is what happens when policy refuses an object.
type Mode uint8

// The modes. Shared with the kernel programs.
const (
	ModeOff     Mode = 0 // not checked; only for kinds that a kernel cannot check
	ModeAudit   Mode = 1 // allowed, with an event
	ModeEnforce Mode = 2 // refused, with an event
)

// String returns the name that policies use.
func (m Mode) String() string {
	switch m {
	case ModeOff:
		return "off"
	case ModeAudit:
		return "audit"
	case ModeEnforce:
		return "enforce"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}
