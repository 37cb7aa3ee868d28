package enforce

import (
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// gap is something that a kernel may be unable to check.
type gap struct {
	types []string // any of these kernel types makes up for it
	Problem
}

func gaps() []gap {
	return []gap{
		{[]string{"bpf_lsm_file_post_open"}, Problem{
			"scripts that an interpreter opens", "the kernel cannot hash a file at the moment of opening: a script, or whatever a strict interpreter reads, is refused if it was neither executed nor mapped nor measured by the agent before, also if it is authorised",
			"use Linux 6.9 or newer, or keep the agent running: it measures authorised files",
		}},
		{[]string{"bpf_get_fsverity_digest"}, Problem{
			"fs-verity digests", "they cannot be asked for: files are identified by SHA-256 alone", "use Linux 6.12 or newer",
		}},
		{[]string{"bpf_lsm_bdev_setintegrity"}, Problem{
			"dm-verity volumes", "the kernel does not say which root a volume has: volumes are trusted when the agent has looked at them, and a device number that is given to another volume is noticed only when the agent looks again", "use Linux 6.12 or newer",
		}},
		{[]string{"linux_binprm.is_check"}, Problem{
			"AT_EXECVE_CHECK", "the kernel has no such question, so interpreters that would ask before they run a script cannot; what they open is judged all the same", "use Linux 6.14 or newer",
		}},
		{[]string{"__x64_sys_personality", "__arm64_sys_personality"}, Problem{
			"READ_IMPLIES_EXEC", "personality(2) cannot be watched: a program may ask for it and then get executable memory from brk(2)", "use a kernel whose type information lists system calls",
		}},
		{[]string{"bpf_lsm_file_ioctl_compat", "__arm64_sys_ioctl"}, Problem{
			"chattr by 32-bit programs", "file flags of guarded files can be changed by a 32-bit program of root, which stops the agent from writing them, loudly", "use Linux 6.8 or newer",
		}},
	}
}

// Uncovered lists what this kernel does not let the engine check, and what no
// kernel does, in plain words. It fails closed: what cannot be found out counts
// as not covered.
func Uncovered() []Problem {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return []Problem{{"everything", "the kernel's type information cannot be read: " + err.Error(), "use a kernel built with CONFIG_DEBUG_INFO_BTF=y"}}
	}
	var out []Problem
	for _, g := range gaps() {
		if !hasAny(kernel, g.types) {
			out = append(out, g.Problem)
		}
	}
	if overlayShape() == 0 {
		out = append(out, Problem{"overlayfs", "it is not known where this kernel keeps the real file of an overlay: nothing on an overlay has an identity, so nothing there runs", "load the overlay module before the agent starts"})
	}
	if b, err := os.ReadFile("/sys/kernel/security/ima/runtime_measurements_count"); err != nil || !slices.Contains([]string{"0", "1"}, strings.TrimSpace(string(b))) {
		out = append(out, Problem{"overlayfs under an IMA policy", "IMA may answer with the digest from before a layer's file was changed", "boot without ima_policy=, or run no code from overlays"})
	}
	if b, err := os.ReadFile("/proc/cmdline"); err != nil || !strings.Contains(string(b), "proc_mem.force_override=never") {
		out = append(out, Problem{"writes through /proc/PID/mem by debuggers", "a program with the debug role can write to code pages through /proc/PID/mem", "boot with proc_mem.force_override=never (Linux 6.12)"})
	}
	return append(out, beyond()...)
}

// beyond is what no kernel lets us check.
func beyond() []Problem {
	return []Problem{
		{"code that an interpreter makes itself", "data that an authorised interpreter turns into code inside its process (eval of a download, sh reading a pipe that policy allows) is not seen; the programs that it starts are", "forbid inline code and pipes for that interpreter"},
		{"links that an interpreter resolves itself", "a script that is named through a link to a file without a code suffix is not recognised when the interpreter (such as node) opens only the file that the link leads to", "let that interpreter read authorised files only (reads: strict)"},
		{"descriptors that an interpreter was given", "a file that another process opened and handed over is read without an open of its own", "forbid standard input from files for that interpreter"},
		{"storage under device mapper and MD", "a volume that is built on a loop or network device is not told from one on a disk: who may change what lies below can change files after they were hashed", "let nobody but root make such volumes; use dm-verity or fs-verity for what must hold against root"},
		{"commands to a disk past its file system", "SCSI and NVMe passthrough write to a disk without opening it for writing", "enable lockdown, or allow nobody CAP_SYS_RAWIO"},
		{"the agent's life", "root can move the agent to another cgroup and kill or freeze it there; the kernel goes on enforcing, but nothing is reported or updated until it is restarted", "watch for a missing heartbeat"},
	}
}

// hasAny reports whether the kernel has one of the types; "a.b" is a member.
func hasAny(kernel *btf.Spec, names []string) bool {
	for _, name := range names {
		structure, member, isMember := strings.Cut(name, ".")
		types, err := kernel.AnyTypesByName(structure)
		if err != nil {
			continue
		}
		if !isMember {
			return true
		}
		for _, t := range types {
			if s, ok := t.(*btf.Struct); ok && hasMember(s, member) {
				return true
			}
		}
	}
	return false
}

// hasMember looks into unnamed structures and unions too.
func hasMember(s *btf.Struct, name string) bool {
	for _, m := range s.Members {
		if m.Name == name {
			return true
		}
		switch t := m.Type.(type) {
		case *btf.Struct:
			if m.Name == "" && hasMember(t, name) {
				return true
			}
		case *btf.Union:
			if m.Name == "" && hasMember(&btf.Struct{Members: t.Members}, name) {
				return true
			}
		}
	}
	return false
}
