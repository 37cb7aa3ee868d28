package integrity

import "strings"

// Table is a policy compiled for one host: what the kernel programs look at.
// It is derived data; Evaluate stays the definition of every decision, and a
// test compares the two.
type Table struct {
	PolicyDigest Digest // SHA-256 of the signed policy's payload
	Epoch        uint64 // policy epoch; only grows
	Modes        [8]Mode
	Entries      map[Key]Entry
	Interpreters []Interpreter // Entry.Interpreter is 1 + index into this; at most MaxInterpreters
	Process      ProcessRules
}

// MaxInterpreters bounds Table.Interpreters (the kernel side is an array).
const MaxInterpreters = 63

// Key identifies content.
type Key struct {
	Space  Space
	Digest Digest
}

// String spells a key as events do: its space, a colon, hex digits.
func (k Key) String() string {
	switch k.Space {
	case SpaceFSVerity:
		return "fsverity:" + k.Digest.String()
	case SpaceDMVerity:
		return "dmverity:" + k.Digest.String()
	}
	return "sha256:" + k.Digest.String()
}

// ParseKey is the inverse of Key.String. Hex digits alone are a SHA-256.
func ParseKey(s string) (Key, error) {
	k := Key{Space: SpaceSHA256}
	if rest, ok := strings.CutPrefix(s, "fsverity:"); ok {
		s, k.Space = rest, SpaceFSVerity
	} else if rest, ok := strings.CutPrefix(s, "dmverity:"); ok {
		s, k.Space = rest, SpaceDMVerity
	}
	var err error
	k.Digest, err = ParseDigest(s)
	return k, err
}

// Entry says what content may be used as, and what a process that executes it
// may do.
type Entry struct {
	Kinds       KindSet
	Roles       Role
	Interpreter uint8 // 0: not an interpreter; else 1 + index into Table.Interpreters
}

// Role is a set of permissions and duties of a process that runs an entry.
type Role uint16

// The roles. Shared with the kernel programs.
const (
	RoleAgent     Role = 1 << 0 // Ringwall itself: may touch its own maps and state
	RoleJIT       Role = 1 << 1 // may make anonymous memory executable
	RoleJITShared Role = 1 << 2 // may map memfd or shared anonymous memory executable
	RoleBPF       Role = 1 << 3 // may load BPF programs
	RoleDebug     Role = 1 << 4 // may ptrace others
	RolePackages  Role = 1 << 5 // a package manager; inherited by everything it starts
	RoleBlock     Role = 1 << 6 // may write to mounted block devices
	RoleModules   Role = 1 << 7 // may hand kernel modules over from memory (a kmod that decompresses), where the kernel insists on signatures
)

// Reads says which files an interpreter may open.
type Reads uint8

// The read rules. Shared with the kernel programs.
const (
	ReadsAny    Reads = 0 // any file; only the named script is checked
	ReadsCode   Reads = 1 // files with a code suffix, and the named script, must be authorised
	ReadsStrict Reads = 2 // every regular file outside the data paths, and the named script, must be authorised
)

// Stdin is a set of things an interpreter may read code from as its standard
// input, when it is given neither a script nor inline code.
type Stdin uint8

// The stdin forms. Shared with the kernel programs.
const (
	StdinTTY    Stdin = 1 << 0
	StdinPipe   Stdin = 1 << 1
	StdinFile   Stdin = 1 << 2
	StdinSocket Stdin = 1 << 3
	StdinNull   Stdin = 1 << 4
)

// Word is what an interpreter takes its first argument for that is no option.
type Word uint8

// Shared with the kernel programs.
const (
	WordScript Word = iota // the script's name
	WordCode               // inline code, unless an option of ScriptFlags came before
	WordOther              // neither, such as make's target
)

// Interpreter is the rule for programs that read code from files, arguments or
// standard input.
type Interpreter struct {
	Name        string
	Reads       Reads
	Inline      Mode     // ModeOff: inline code is allowed without an event; ModeAudit; ModeEnforce: refused
	Stdin       Stdin    // allowed forms; others are treated as Inline says, or refused when Inline is off
	InlineFlags string   // ASCII letters of short options that carry inline code, e.g. "c" for sh, "eE" for perl
	ArgFlags    string   // ASCII letters of other short options that take an argument; with "o" here and "s" in StdinFlags, options are read as a Bourne shell does
	StdinFlags  string   // ASCII letters of short options that force code from stdin, e.g. "s" for sh
	ScriptFlags string   // ASCII letters of options whose argument is the script's name, e.g. "f" for awk
	Word        Word     // what the first argument is that is no option
	InlineLong  []string // long options that carry inline code, e.g. "--eval"; at most 8; of longer ones the first 16 bytes count
	ArgLong     []string // other long options that take a separate argument; same bounds
	Environment []string // variables that carry code, e.g. "PERL5OPT", or with a star at the end the beginning of their names; at most 8, each at most 15 bytes
	CodeSuffix  []string // file name endings that ReadsCode checks, e.g. ".py"; at most 8, each at most 7 bytes
	Bytecode    []string // those of CodeSuffix that the interpreter writes for itself into __pycache__: not authorised, they are not there, and no event is raised
	DataPaths   []string // directories ("/etc/", with the slash) and files that ReadsStrict leaves alone; each at most 62 bytes
}

// ProcessRules are the decisions that do not depend on a file's content.
type ProcessRules struct {
	Memory      Mode // W^X: executable anonymous, writable+executable and patched file mappings
	Ptrace      Mode // attaching to and writing into other processes, /proc/PID/mem
	BlockWrites Mode // writing to block devices that carry a mounted file system
	CodeWrites  Mode // opening mapped, authorised code for writing
}
