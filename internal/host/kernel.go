package host

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// KernelFacts is what one look at a running system shows of its kernel.
type KernelFacts struct {
	Release  string   `json:"release"`
	Major    int      `json:"major"` // 0: the release cannot be read as a version
	Minor    int      `json:"minor"`
	LSM      []string `json:"lsm"`      // nil: securityfs is not mounted
	Lockdown string   `json:"lockdown"` // none, integrity, confidentiality, or "" (unknown)
	Cmdline  Params   `json:"cmdline"`
}

// Params are the kernel's boot parameters in order; a parameter may repeat.
type Params []Param

// Param is one boot parameter. A flag has no value and Set false.
type Param struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
	Set   bool   `json:"set"` // name=value rather than a bare name
}

// maxSmallFile bounds what is read of a file.
const maxSmallFile = 64 << 10

// Probe looks at the running kernel. It never fails: what cannot be seen is
// unknown.
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
	k := KernelFacts{Release: release}
	if k.Release == "" {
		k.Release, _ = smallFile(root, "proc/sys/kernel/osrelease")
	}
	k.Major, k.Minor, _ = ParseRelease(k.Release)
	if s, ok := smallFile(root, "sys/kernel/security/lsm"); ok {
		k.LSM = ParseLSM(s)
	}
	if s, ok := smallFile(root, "sys/kernel/security/lockdown"); ok {
		k.Lockdown = ParseLockdown(s)
	}
	if s, ok := smallFile(root, "proc/cmdline"); ok {
		k.Cmdline = ParseCmdline(s)
	}
	return k
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
