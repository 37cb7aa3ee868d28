package enforce

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// Problem is something that this kernel lacks, or that is in the way.
type Problem struct {
	What string `json:"what"`
	Why  string `json:"why"`
	Fix  string `json:"fix"`
}

// Problems is what stands between this kernel and enforcement.
type Problems []Problem

// Err is nil if there are none; else it wraps errs.Unsupported and names each
// with what to do about it.
func (p Problems) Err() error {
	if len(p) == 0 {
		return nil
	}
	var b strings.Builder
	for _, x := range p {
		fmt.Fprintf(&b, "\n  %s: %s\n    fix: %s", x.What, x.Why, x.Fix)
	}
	return fmt.Errorf("enforcement cannot start here:%s\n%w", b.String(), errs.Unsupported)
}

// Support probes the running kernel. It fails closed: what cannot be probed
// counts as missing. Where Ringwall refuses the probe itself, it says so and
// does not blame the kernel.
func Support() Problems { return support(DefaultPinDir) }

// support is Support where an engine may be pinned in another directory.
func support(pins string) Problems {
	var out Problems
	if os.Geteuid() != 0 {
		return Problems{{"privileges", "loading LSM programs needs root", "run as root"}}
	}
	lsm, err := os.ReadFile("/sys/kernel/security/lsm")
	switch {
	case err != nil:
		out = append(out, Problem{"securityfs", "cannot read /sys/kernel/security/lsm: " + err.Error(), "mount -t securityfs securityfs /sys/kernel/security"})
	case !slices.Contains(strings.Split(strings.TrimSpace(string(lsm)), ","), "bpf"):
		out = append(out, Problem{
			"BPF LSM", "the boot parameter lsm= leaves bpf out: programs would attach and do nothing",
			"boot with lsm=" + strings.TrimSpace(string(lsm)) + ",bpf",
		})
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		out = append(out, Problem{"BTF", "no /sys/kernel/btf/vmlinux", "use a kernel built with CONFIG_DEBUG_INFO_BTF=y"})
		return out
	}
	if b, err := os.ReadFile("/proc/sys/kernel/ftrace_enabled"); err == nil && strings.TrimSpace(string(b)) == "0" {
		out = append(out, Problem{"ftrace", "kernel.ftrace_enabled=0 switches BPF LSM programs off", "sysctl kernel.ftrace_enabled=1"})
	}
	return append(out, tryLoad(pins)...)
}

// tryLoad loads, but does not attach, the smallest LSM program that calls the
// helper that everything rests on.
func tryLoad(pins string) Problems {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, AttachTo: "bprm_check_security", License: "Dual BSD/GPL",
		Flags: unix.BPF_F_SLEEPABLE,
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, 0, asm.DWord),
			asm.FnGetCurrentPidTgid.Call(),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
	})
	if err == nil {
		prog.Close()
		return imaHelper()
	}
	if errors.Is(err, unix.EPERM) {
		if s, err := Inspect(pins); err == nil && s.Modes[integrity.KindBPF] == integrity.ModeEnforce {
			return Problems{{
				"Ringwall", "it enforces on this host already, and its policy lets no other program load kernel programs",
				"ask its agent: ringwall status",
			}}
		}
		return Problems{{
			"BPF LSM load", "the kernel answers EPERM to every LSM program",
			"use a stock distribution kernel (Debian 12 or newer); some hosted kernels forbid this program type",
		}}
	}
	return Problems{{"BPF LSM load", err.Error(), "use Linux 6.1 or newer with CONFIG_BPF_LSM=y"}}
}

// imaHelper asks for bpf_ima_file_hash, the in-kernel digest.
func imaHelper() Problems {
	if _, err := os.Stat("/sys/kernel/security/ima"); err != nil {
		return Problems{{
			"IMA", "no in-kernel file digest (bpf_ima_file_hash needs CONFIG_IMA=y)",
			"use a kernel with CONFIG_IMA=y; no IMA policy is needed",
		}}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return Problems{{"IMA", "cannot read /proc/cmdline: " + err.Error(), "mount -t proc proc /proc"}}
	}
	return imaHash(string(cmdline))
}

// imaHash looks for a boot parameter that makes the kernel digest with another
// algorithm: then no file has an identity. The last one counts.
func imaHash(cmdline string) Problems {
	hash := "sha256"
	for word := range strings.FieldsSeq(cmdline) {
		if h, ok := strings.CutPrefix(word, "ima_hash="); ok {
			hash = h
		}
	}
	if hash != "sha256" {
		return Problems{{"ima_hash", "the kernel was told to digest files with " + hash, "remove ima_hash=" + hash + " from the kernel's command line"}}
	}
	return nil
}

// signedModules is 1 if the kernel takes no module without a good signature.
// That can be switched on and never off again. What cannot be read counts as off.
func signedModules() uint32 {
	raw, err := os.ReadFile("/sys/module/module/parameters/sig_enforce")
	if err == nil && strings.TrimSpace(string(raw)) == "Y" {
		return 1
	}
	return 0
}

// dropUnsupported leaves out what this kernel has no hook for, what would only
// cost there, and of two forms of one program the one for other kernels.
// Uncovered tells what is lost.
func dropUnsupported(spec *ebpf.CollectionSpec) error {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return fmt.Errorf("read the kernel's types: %w", err)
	}
	params := func(hook string) int {
		var fn *btf.Func
		if kernel.TypeByName(hook, &fn) != nil {
			return -1
		}
		return len(fn.Type.(*btf.FuncProto).Params)
	}
	for name, p := range spec.Programs {
		hook := p.AttachTo
		if p.Type == ebpf.LSM {
			hook = "bpf_lsm_" + hook
		}
		if params(hook) < 0 {
			delete(spec.Programs, name)
		}
	}
	if params("bpf_lsm_file_post_open") >= 0 {
		delete(spec.Programs, "rw_open_early")
	} else {
		delete(spec.Programs, "rw_open")
	}
	if !hasAny(kernel, []string{"linux_binprm.is_check"}) {
		delete(spec.Programs, "rw_exec_check")
	}
	if params("bpf_lsm_inode_setattr") == 2 {
		delete(spec.Programs, "rw_setattr")
	} else {
		delete(spec.Programs, "rw_setattr_old")
	}
	return nil
}

// overlayShape says where overlayfs keeps the real file of an open one: 1 in
// private_data, 2 as first member of struct ovl_file (6.13 and newer).
func overlayShape() uint32 {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return 0
	}
	if mod, err := btf.LoadKernelModuleSpec("overlay"); err == nil {
		return shapeIn(mod)
	}
	var s *btf.Struct
	if kernel.TypeByName("ovl_file", &s) == nil {
		return 2
	}
	// The module is not loaded yet. Its shape changed with this field of the
	// backing file's; both came in 6.13.
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return 0
	}
	var major, minor int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); n != 2 {
		return 0
	}
	if major > 6 || major == 6 && minor >= 13 {
		return 2
	}
	return 1
}

func shapeIn(spec *btf.Spec) uint32 {
	var s *btf.Struct
	if spec.TypeByName("ovl_file", &s) == nil {
		return 2
	}
	return 1
}

// cgroupLevel is the depth of a cgroup v2 directory below its mount.
func cgroupLevel(dir string) (uint32, error) {
	var at unix.Stat_t
	if err := unix.Stat(dir, &at); err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", dir, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("cgroup %s: %w", dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s is not a cgroup v2 directory: %w", dir, errs.Invalid)
	}
	level := uint32(0)
	for p := filepath.Clean(dir); ; p = filepath.Dir(p) {
		var up unix.Stat_t
		if err := unix.Stat(filepath.Dir(p), &up); err != nil {
			return 0, fmt.Errorf("cgroup %s: %w", dir, err)
		}
		if up.Dev != at.Dev || p == "/" {
			return level, nil
		}
		level++
	}
}

func joinLines(lines []string) string { return strings.Join(lines, "\n") }
