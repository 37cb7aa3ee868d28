package host

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

// KnobRule says when a value that is there is good enough.
type KnobRule string

// The rules.
const (
	Exactly  KnobRule = "exactly"  // the same words
	AtLeast  KnobRule = "at_least" // the same number or a higher one; never lowered
	Contains KnobRule = "contains" // boot parameters: one of the comma-separated items
)

// Knob is one wanted setting of the kernel.
type Knob struct {
	Name string   `json:"name"` // sysctl in dotted form, or boot parameter
	Want string   `json:"want"` // "" for a boot parameter that is a bare flag
	Rule KnobRule `json:"rule"` // "" means exactly
	Boot bool     `json:"boot"` // a boot parameter: checked and reported, never applied
	// Since is the first kernel that has it; on an older one the knob is not
	// applicable instead of missing. Zero: every kernel.
	Since [2]int `json:"since,omitzero"`
}

// KnobState is how a knob stands.
type KnobState string

// The states.
const (
	KnobOK            KnobState = "ok"
	KnobDiffers       KnobState = "differs"
	KnobMissing       KnobState = "missing"        // the kernel has no such knob, or the parameter was not given
	KnobNotApplicable KnobState = "not-applicable" // this kernel is too old to have it
)

// KnobResult is what was found, and done, for one knob. Err is set when it
// could not be read or written; its state then is differs (fails closed).
type KnobResult struct {
	Name    string    `json:"name"`
	Boot    bool      `json:"boot"`
	Want    string    `json:"want"`
	Have    string    `json:"have"`
	State   KnobState `json:"state"`
	Applied bool      `json:"applied"`
	Err     error     `json:"-"`
}

// Knobs checks and applies a baseline of kernel settings.
type Knobs struct {
	Root  string      // stands for "/"; "" is "/"
	Facts KernelFacts // for boot parameters and versions
}

// DefaultKnobs is the baseline that costs nothing in code: it alone stops about
// half of what root can do to a stock kernel. Some of it breaks things
// (containers without root, debuggers): a policy chooses from it.
func DefaultKnobs() []Knob {
	return []Knob{
		{Name: "kernel.ftrace_enabled", Want: "1"},
		{Name: "kernel.kexec_load_disabled", Want: "1", Rule: AtLeast},
		{Name: "kernel.unprivileged_bpf_disabled", Want: "1", Rule: AtLeast},
		{Name: "kernel.yama.ptrace_scope", Want: "3", Rule: AtLeast},
		{Name: "kernel.kptr_restrict", Want: "1", Rule: AtLeast},
		{Name: "net.core.bpf_jit_harden", Want: "2", Rule: AtLeast},
		{Name: "user.max_user_namespaces", Want: "0"},
		{Name: "vm.memfd_noexec", Want: "2", Rule: AtLeast, Since: [2]int{6, 3}},
		{Name: "fs.protected_fifos", Want: "1", Rule: AtLeast},
		{Name: "fs.protected_hardlinks", Want: "1", Rule: AtLeast},
		{Name: "fs.protected_regular", Want: "1", Rule: AtLeast},
		{Name: "fs.protected_symlinks", Want: "1", Rule: AtLeast},
		{Name: "lsm", Want: "bpf", Rule: Contains, Boot: true},
		{Name: "lockdown", Want: "integrity", Boot: true},
		{Name: "module.sig_enforce", Want: "1", Boot: true},
		{Name: "proc_mem.force_override", Want: "never", Boot: true, Since: [2]int{6, 12}},
	}
}

// Check reports each knob, sorted by name. It changes nothing.
func (k Knobs) Check(want []Knob) []KnobResult { return k.each(want, false) }

// Apply writes each sysctl that differs and reads it back; one that the kernel
// did not take is reported as differing. It never lowers a value that is to be
// at least something, never touches boot parameters, goes on after a failure,
// and a second run writes nothing.
func (k Knobs) Apply(want []Knob) []KnobResult { return k.each(want, true) }

func (k Knobs) each(want []Knob, apply bool) []KnobResult {
	out := make([]KnobResult, 0, len(want))
	for _, w := range want {
		if w.Boot {
			out = append(out, k.boot(w))
		} else {
			out = append(out, k.sysctl(w, apply))
		}
	}
	slices.SortStableFunc(out, func(a, b KnobResult) int {
		if a.Boot != b.Boot {
			if a.Boot {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return out
}

func (k Knobs) sysctl(w Knob, apply bool) KnobResult {
	r := KnobResult{Name: w.Name, Want: w.Want, State: KnobDiffers}
	rel, err := sysctlPath(w.Name)
	if err != nil {
		r.Err = err
		return r
	}
	// An os.Root keeps a name, and links below a test's root, inside.
	root, err := os.OpenRoot(path.Join(k.rootDir(), "proc/sys"))
	if err != nil {
		r.Err = fmt.Errorf("sysctl %s: %w", w.Name, kindOf(err))
		return r
	}
	defer root.Close()
	if r.Have, err = readSysctl(root, rel); err != nil {
		if os.IsNotExist(err) {
			r.State = k.absent(w)
			return r
		}
		r.Err = fmt.Errorf("sysctl %s: %w", w.Name, kindOf(err))
		return r
	}
	if good, err := w.good(r.Have); good || err != nil {
		r.Err = err
		if good {
			r.State = KnobOK
		}
		return r
	}
	if !apply {
		return r
	}
	if err := writeSysctl(root, rel, w.Want); err != nil {
		r.Err = fmt.Errorf("sysctl %s=%s: %w", w.Name, w.Want, kindOf(err))
		return r
	}
	if r.Have, err = readSysctl(root, rel); err != nil {
		r.Err = fmt.Errorf("sysctl %s: read back: %w", w.Name, kindOf(err))
		return r
	}
	good, err := w.good(r.Have)
	if good {
		r.State, r.Applied = KnobOK, true
		return r
	}
	if err == nil {
		err = fmt.Errorf("sysctl %s: the kernel kept %q: %w", w.Name, r.Have, errs.Denied)
	}
	r.Err = err
	return r
}

// boot checks a parameter; where the kernel shows what it really does (some
// settings can be made by other means, too), that counts.
func (k Knobs) boot(w Knob) KnobResult {
	r := KnobResult{Name: w.Name, Boot: true, Want: w.Want, State: KnobDiffers}
	have, given := k.Facts.Cmdline.Get(w.Name)
	switch w.Name {
	case "lsm":
		if k.Facts.LSM != nil {
			have, given = strings.Join(k.Facts.LSM, ","), true
		}
	case "lockdown":
		if k.Facts.Lockdown != "" {
			have, given = k.Facts.Lockdown, true
			if have == "confidentiality" && w.Want == "integrity" {
				r.Have, r.State = have, KnobOK
				return r
			}
		}
	case "module.sig_enforce":
		if s, ok := smallFile(os.DirFS(k.rootDir()), "sys/module/module/parameters/sig_enforce"); ok {
			have, given = "0", true
			if s == "Y" {
				have = "1"
			}
		} else if given && have == "" {
			have = "1" // the bare flag means yes
		}
	}
	if !given {
		r.State = k.absent(w)
		return r
	}
	r.Have = have
	good, err := w.good(have)
	if r.Err = err; good {
		r.State = KnobOK
	}
	return r
}

func (k Knobs) rootDir() string {
	if k.Root == "" {
		return "/"
	}
	return k.Root
}

// absent tells a knob that the kernel is too old for from one that it lacks. An
// unknown version counts as new enough (fails closed).
func (k Knobs) absent(w Knob) KnobState {
	f := k.Facts
	if f.Major != 0 && (f.Major < w.Since[0] || f.Major == w.Since[0] && f.Minor < w.Since[1]) {
		return KnobNotApplicable
	}
	return KnobMissing
}

func (w Knob) good(have string) (bool, error) {
	switch w.Rule {
	case Exactly, "":
		return strings.Join(strings.Fields(have), " ") == strings.Join(strings.Fields(w.Want), " "), nil
	case AtLeast:
		a, err := strconv.ParseInt(strings.TrimSpace(have), 0, 64)
		if err != nil {
			return false, fmt.Errorf("%s: %q is no number: %w", w.Name, have, errs.Invalid)
		}
		b, err := strconv.ParseInt(w.Want, 0, 64)
		if err != nil {
			return false, fmt.Errorf("%s: %q is no number: %w", w.Name, w.Want, errs.Invalid)
		}
		return a >= b, nil
	case Contains:
		return slices.Contains(strings.Split(have, ","), w.Want), nil
	}
	return false, fmt.Errorf("%s: rule %q: %w", w.Name, w.Rule, errs.Invalid)
}

// sysctlPath turns a dotted name into a path; a slash in it stands for a dot
// that belongs to a name, as in net.ipv4.conf.eth0/1.rp_filter.
func sysctlPath(name string) (string, error) {
	p := strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
	if len(name) > 255 || !fs.ValidPath(p) || !strings.Contains(p, "/") || strings.ContainsFunc(name, func(r rune) bool {
		return r <= ' ' || r > '~'
	}) {
		return "", fmt.Errorf("sysctl name %q: %w", name, errs.Invalid)
	}
	return p, nil
}

func readSysctl(root *os.Root, rel string) (string, error) {
	f, err := root.Open(rel)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := readAllBounded(f, rel, maxSmallFile)
	return strings.TrimSpace(string(b)), err
}

func writeSysctl(root *os.Root, rel, value string) error {
	f, err := root.OpenFile(rel, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}
