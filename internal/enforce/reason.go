package enforce

import "fmt"

// Reason says why the kernel refused something. Numbers are those of enum
// reason in bpf/ringwall.h and stand in recorded events.
type Reason uint16

// The reasons.
const (
	Unlisted    Reason = iota + 1 // content known, not authorised for this kind
	NoIdentity                    // content cannot be pinned down
	MemoryAnon                    // anonymous memory made executable
	MemoryWX                      // memory writable and executable at once
	MemoryFile                    // a mapped file's pages made executable later
	Ptrace                        // attach to another process
	ProcMem                       // write access to /proc/PID/mem
	FromMemory                    // kernel code handed over from memory
	BPFLoad                       // BPF program loaded without the privilege
	Inline                        // interpreter given code as an argument
	Stdin                         // interpreter reading code from a refused standard input
	Arguments                     // interpreter whose arguments could not be read
	CodeWrite                     // authorised code opened for writing
	BlockWrite                    // mounted block device or physical memory opened for writing
	GuardSignal                   // signal to the agent
	GuardBPF                      // Ringwall's maps, programs or links
	GuardFile                     // Ringwall's pins or state
	GuardSysctl                   // a setting that would switch the programs off
	Personality                   // READ_IMPLIES_EXEC asked for
	GuardAgent                    // limits, priority, cgroup or /proc files of the agent
	Userfault                     // userfaultfd(2) asked for
)

var reasonText = [...]struct{ name, text string }{
	Unlisted:    {"unlisted", "content is not authorised by any rule"},
	NoIdentity:  {"no-identity", "content cannot be pinned down: it is being written, lies on a file system without stable content, or is unsealed memory"},
	MemoryAnon:  {"memory-anonymous", "anonymous memory was to become executable"},
	MemoryWX:    {"memory-wx", "memory was to be writable and executable at once"},
	MemoryFile:  {"memory-file", "pages of a mapped file were to become executable after mapping, when they may have been changed"},
	Ptrace:      {"ptrace", "attach to another process"},
	ProcMem:     {"proc-mem", "write access to another view of process memory"},
	FromMemory:  {"from-memory", "kernel code handed over from memory instead of a file"},
	BPFLoad:     {"bpf-load", "BPF program load without the bpf privilege"},
	Inline:      {"inline-code", "interpreter given code as an argument"},
	Stdin:       {"stdin-code", "interpreter reading code from its standard input"},
	Arguments:   {"arguments", "interpreter whose arguments could not be read"},
	CodeWrite:   {"code-write", "authorised code opened for writing; replace the file instead (write a new one and rename it)"},
	BlockWrite:  {"block-write", "device of a mounted file system, or physical memory, opened for writing"},
	GuardSignal: {"guard-signal", "signal to the Ringwall agent"},
	GuardBPF:    {"guard-bpf", "change to Ringwall's kernel objects"},
	GuardFile:   {"guard-file", "change to Ringwall's pins or state"},
	GuardSysctl: {"guard-sysctl", "setting that would switch enforcement off"},
	Personality: {"personality", "READ_IMPLIES_EXEC asked for, which makes memory executable unseen"},
	GuardAgent:  {"guard-agent", "change to the limits, priority, cgroup or /proc files of the Ringwall agent"},
	Userfault:   {"userfaultfd", "userfaultfd asked for, which supplies the pages of code that is mapped"},
}

// String returns the short name used in events.
func (r Reason) String() string {
	if r >= Unlisted && r <= Userfault {
		return reasonText[r].name
	}
	return fmt.Sprintf("reason(%d)", uint16(r))
}

// Text explains the reason to a person.
func (r Reason) Text() string {
	if r >= Unlisted && r <= Userfault {
		return reasonText[r].text
	}
	return "unknown reason"
}
