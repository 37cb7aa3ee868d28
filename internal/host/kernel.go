package host

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// Tri is an answer that may be unknown. The zero value is unknown.
type Tri string

// The answers.
const (
	Unknown Tri = ""
	Yes     Tri = "yes"
	No      Tri = "no"
)

func tri(b bool) Tri {
	if b {
		return Yes
	}
	return No
}

// KernelFacts is what one look at a running system shows of its kernel.
type KernelFacts struct {
	Release   string   `json:"release"`
	Major     int      `json:"major"`
	Minor     int      `json:"minor"`
	Arch      string   `json:"arch"`
	LSM       []string `json:"lsm"`        // nil: securityfs is not mounted
	BPFLSM    Tri      `json:"bpf_lsm"`    // bpf is in the LSM list
	BTF       Tri      `json:"btf"`        // /sys/kernel/btf/vmlinux exists
	Lockdown  string   `json:"lockdown"`   // none, integrity, confidentiality, or "" (unknown)
	Ftrace    Tri      `json:"ftrace"`     // kernel.ftrace_enabled is not 0
	IMA       Tri      `json:"ima"`        // the kernel has IMA
	IMAPolicy Tri      `json:"ima_policy"` // an IMA policy is loaded; unknown without CONFIG_IMA_READ_POLICY
	// SecureBoot is no on machines without UEFI.
	SecureBoot Tri    `json:"secure_boot"`
	Container  string `json:"container"` // "", or what this system runs in: docker, lxc, systemd-nspawn, …
	Cmdline    Params `json:"cmdline"`
}

// Problem is something that this kernel lacks, in words for a person.
type Problem struct {
	What string `json:"what"`
	Why  string `json:"why"`
	Fix  string `json:"fix"`
}

// Params are the kernel's boot parameters in order; a parameter may repeat.
type Params []Param

// Param is one boot parameter. A flag has no value and Set false.
type Param struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
	Set   bool   `json:"set"` // name=value rather than a bare name
}

// The smallest kernel, and the bounds of what is read.
const (
	MinMajor = 6
	MinMinor = 1

	maxSmallFile = 64 << 10
)

// Probe looks at the running kernel. It never fails: what cannot be seen is
// unknown, and Missing counts an unknown necessity as missing (fails closed).
func Probe() KernelFacts {
	var u unix.Utsname
	release := ""
	if err := unix.Uname(&u); err == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	return ProbeFS(os.DirFS("/"), release)
}

// ProbeFS is Probe over a file tree that stands for "/". The release may be
// empty: then it is read from the tree.
func ProbeFS(root fs.FS, release string) KernelFacts {
	k := KernelFacts{Release: release, Arch: runtime.GOARCH}
	if k.Release == "" {
		k.Release, _ = smallFile(root, "proc/sys/kernel/osrelease")
	}
	k.Major, k.Minor, _ = ParseRelease(k.Release)
	if s, ok := smallFile(root, "sys/kernel/security/lsm"); ok {
		k.LSM = ParseLSM(s)
		k.BPFLSM = tri(slices.Contains(k.LSM, "bpf"))
	}
	k.BTF = exists(root, "sys/kernel/btf/vmlinux")
	if s, ok := smallFile(root, "sys/kernel/security/lockdown"); ok {
		k.Lockdown = ParseLockdown(s)
	}
	if s, ok := smallFile(root, "proc/sys/kernel/ftrace_enabled"); ok {
		k.Ftrace = tri(s != "0")
	}
	k.IMA, k.IMAPolicy = probeIMA(root, k.LSM != nil)
	if s, ok := smallFile(root, "proc/cmdline"); ok {
		k.Cmdline = ParseCmdline(s)
	}
	k.SecureBoot = probeSecureBoot(root)
	k.Container = probeContainer(root)
	return k
}

// probeIMA says whether IMA is there and has a policy. Without a readable
// policy file, more than the boot aggregate in the measurement list proves one.
func probeIMA(root fs.FS, securityfs bool) (have, policy Tri) {
	const dir = "sys/kernel/security/ima"
	if have = exists(root, dir); have == No && !securityfs {
		return Unknown, Unknown
	}
	if have != Yes {
		return have, No
	}
	if s, ok := smallFile(root, dir+"/policy"); ok {
		return Yes, tri(strings.TrimSpace(s) != "")
	}
	if s, ok := smallFile(root, dir+"/runtime_measurements_count"); ok {
		if n, err := strconv.ParseUint(s, 10, 64); err == nil && n > 1 {
			return Yes, Yes
		}
	}
	if s, ok := smallFile(root, "proc/cmdline"); ok {
		p := ParseCmdline(s)
		if _, tcb := p.Get("ima_tcb"); tcb || p.Has("ima_policy") {
			return Yes, Yes
		}
	}
	return Yes, Unknown
}

func probeSecureBoot(root fs.FS) Tri {
	const dir = "sys/firmware/efi"
	if e := exists(root, dir); e != Yes {
		return e
	}
	b, ok := smallBytes(root, dir+"/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if !ok {
		return Unknown
	}
	on, err := ParseEFIBool(b)
	if err != nil {
		return Unknown
	}
	return tri(on)
}

func probeContainer(root fs.FS) string {
	if s, ok := smallFile(root, "run/systemd/container"); ok && s != "" {
		return s
	}
	if b, ok := smallBytes(root, "proc/1/environ"); ok {
		for v := range strings.SplitSeq(string(b), "\x00") {
			if c, ok := strings.CutPrefix(v, "container="); ok && c != "" {
				return c
			}
		}
	}
	switch {
	case exists(root, ".dockerenv") == Yes:
		return "docker"
	case exists(root, "run/.containerenv") == Yes:
		return "podman"
	}
	return ""
}

// Missing is what stands between this kernel and enforcement. A necessity that
// could not be seen is missing (fails closed); an empty answer still is no
// proof that programs load and deny: only the canary is.
func (k KernelFacts) Missing() []Problem {
	var out []Problem
	add := func(what, why, fix string) { out = append(out, Problem{what, why, fix}) }
	switch {
	case k.Major == 0:
		add("kernel version", fmt.Sprintf("the release %q cannot be read as a version", k.Release), fmt.Sprintf("run a kernel %d.%d or newer", MinMajor, MinMinor))
	case k.Major < MinMajor || k.Major == MinMajor && k.Minor < MinMinor:
		add(fmt.Sprintf("kernel %d.%d or newer", MinMajor, MinMinor),
			fmt.Sprintf("this is %s: its LSM hooks cannot digest a file when it is run", k.Release),
			"install a newer kernel, on Debian 12: apt-get install linux-image-amd64")
	}
	switch {
	case k.BPFLSM == Unknown:
		add("securityfs", "/sys/kernel/security/lsm cannot be read, so nobody knows which security modules run",
			"mount -t securityfs securityfs /sys/kernel/security")
	case k.BPFLSM == No:
		add("bpf in the LSM list", "the running list is "+strings.Join(k.LSM, ",")+": BPF programs would attach without an error and decide nothing",
			"put this on the kernel's command line and reboot: lsm="+strings.Join(append(slices.Clone(k.LSM), "bpf"), ","))
	}
	if k.BTF != Yes {
		add("BTF", "/sys/kernel/btf/vmlinux is not there, so programs cannot be fitted to this kernel", "use a kernel built with CONFIG_DEBUG_INFO_BTF=y")
	}
	if k.Ftrace == No {
		add("kernel.ftrace_enabled", "it is 0, which switches every BPF LSM program off", "sysctl kernel.ftrace_enabled=1, and on the command line: sysctl.kernel.ftrace_enabled=1")
	}
	if k.IMA == No {
		add("IMA", "the kernel cannot digest files by itself", "use a kernel built with CONFIG_IMA=y")
	}
	if h, ok := k.Cmdline.Get("ima_hash"); ok && h != "sha256" {
		add("ima_hash=sha256", "the kernel was told to digest with "+h, "remove ima_hash="+h+" from the kernel's command line")
	}
	return out
}

// Warnings is what does not stop enforcement but weakens it here.
func (k KernelFacts) Warnings() []Problem {
	var out []Problem
	if k.IMAPolicy == Yes {
		out = append(out, Problem{
			"IMA policy", "an IMA policy is loaded: on overlay file systems IMA may then answer with a digest from before a change",
			"boot without ima_policy= or do not run code from overlay file systems",
		})
	}
	if k.SecureBoot != Yes {
		out = append(out, Problem{
			"Secure Boot", "whoever can write the boot disk can boot another kernel or command line",
			"switch on Secure Boot and sign a unified kernel image",
		})
	}
	if k.Lockdown != "integrity" && k.Lockdown != "confidentiality" {
		out = append(out, Problem{"lockdown", "root may reach kernel memory by interfaces that no LSM hook sees", "boot with lockdown=integrity"})
	}
	if k.Container != "" {
		out = append(out, Problem{"container", "this system runs in " + k.Container + ": the kernel belongs to someone else", "run the agent on the host"})
	}
	return out
}

// ParseRelease reads the first two numbers of a kernel release.
func ParseRelease(s string) (major, minor int, err error) {
	a, rest, ok := strings.Cut(s, ".")
	end := 0
	for end < len(rest) && rest[end] >= '0' && rest[end] <= '9' {
		end++
	}
	major, e1 := strconv.Atoi(a)
	minor, e2 := strconv.Atoi(rest[:end])
	if !ok || e1 != nil || e2 != nil || major < 1 || major > 999 || minor > 9999 {
		return 0, 0, fmt.Errorf("kernel release %q: %w", s, errs.Invalid)
	}
	return major, minor, nil
}

// ParseLSM splits the kernel's list of security modules.
func ParseLSM(s string) []string {
	out := []string{}
	for n := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		if n != "" {
			out = append(out, n)
		}
	}
	return out
}

// ParseLockdown finds the mode in brackets; "" if there is none.
func ParseLockdown(s string) string {
	for w := range strings.FieldsSeq(s) {
		if strings.HasPrefix(w, "[") && strings.HasSuffix(w, "]") && len(w) > 2 {
			return w[1 : len(w)-1]
		}
	}
	return ""
}

// ParseEFIBool reads an efivarfs file that holds one byte: four bytes of
// attributes, then 0 or 1.
func ParseEFIBool(b []byte) (bool, error) {
	if len(b) != 5 || b[4] > 1 {
		return false, fmt.Errorf("EFI variable of %d bytes: %w", len(b), errs.Invalid)
	}
	return b[4] == 1, nil
}

// ParseCmdline splits a kernel command line as the kernel does: at spaces
// outside double quotes, up to a lone "--", after which all belongs to init.
func ParseCmdline(s string) Params {
	out := Params{}
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimLeft(s, " \t\n") {
		end, quoted := 0, false
		for end < len(s) && (quoted || !strings.ContainsRune(" \t\n", rune(s[end]))) {
			if s[end] == '"' {
				quoted = !quoted
			}
			end++
		}
		word := s[:end]
		s = s[end:]
		if word == "--" {
			break
		}
		if len(word) > 1 && word[0] == '"' && word[len(word)-1] == '"' {
			word = word[1 : len(word)-1]
		}
		name, value, set := strings.Cut(word, "=")
		if len(value) > 1 && value[0] == '"' && value[len(value)-1] == '"' {
			value = value[1 : len(value)-1]
		}
		out = append(out, Param{Name: name, Value: value, Set: set})
	}
	return out
}

// Get is the last value given to a parameter, which is the one that the kernel
// uses. The kernel takes - and _ in names for the same.
func (p Params) Get(name string) (value string, ok bool) {
	for _, x := range p {
		if paramName(x.Name) == paramName(name) {
			value, ok = x.Value, true
		}
	}
	return value, ok
}

// Has is whether a parameter was given.
func (p Params) Has(name string) bool {
	_, ok := p.Get(name)
	return ok
}

func paramName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func exists(root fs.FS, name string) Tri {
	_, err := fs.Stat(root, name)
	switch {
	case err == nil:
		return Yes
	case os.IsNotExist(err):
		return No
	}
	return Unknown
}

func smallBytes(root fs.FS, name string) ([]byte, bool) {
	f, err := root.Open(name)
	if err != nil {
		return nil, false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSmallFile))
	return b, err == nil
}

func smallFile(root fs.FS, name string) (string, bool) {
	b, ok := smallBytes(root, name)
	return strings.TrimSpace(string(b)), ok
}
