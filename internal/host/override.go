package host

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const unitName = "ringwall-agent.service"

// dropInDirs are those below which systemd looks for changes to the unit first.
// InstallBoot makes them, so that the agent can keep everybody else from filling
// them: what is not there cannot be guarded.
func dropInDirs() []string {
	return []string{"etc/systemd/system/" + unitName + ".d", "etc/systemd/system/ringwall-.service.d"}
}

// unitDirs are systemd's places for units, see systemd.unit(5); before says which
// of them come before the one that the unit is installed in.
func unitDirs() (before, all []string) {
	before = []string{"etc/systemd/system.control", "run/systemd/system.control", "run/systemd/transient", "run/systemd/generator.early"}
	return before, append(slices.Clone(before), "etc/systemd/system", "etc/systemd/system.attached", "run/systemd/system", "run/systemd/generator",
		"usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system", "run/systemd/generator.late")
}

// BootOverrides lists, for a person, what on the system below root can keep the
// agent from starting at the next boot, or changes how it starts, although its
// own files are as they were installed. Some of it may be meant. What cannot be
// looked at is left out: this informs, and decides nothing.
func BootOverrides(root string) []string {
	var out []string
	add := func(path, what string) {
		if !slices.ContainsFunc(out, func(s string) bool { return strings.HasPrefix(s, path+": ") }) {
			out = append(out, path+": "+what)
		}
	}
	before, all := unitDirs()
	for _, d := range before {
		if _, err := os.Lstat(filepath.Join(root, d, unitName)); err == nil {
			add("/"+d+"/"+unitName, "takes the place of the installed unit")
		}
	}
	for _, d := range all {
		for _, n := range []string{unitName + ".d", "ringwall-.service.d", "service.d"} {
			confs, _ := filepath.Glob(filepath.Join(root, d, n, "*.conf")) // only a bad pattern is an error
			for _, c := range confs {
				add("/"+filepath.Join(d, n, filepath.Base(c)), "changes the unit")
			}
		}
		for _, n := range []string{"sysinit.target", "basic.target"} {
			if to, err := os.Readlink(filepath.Join(root, d, n)); err == nil && to == "/dev/null" {
				add("/"+filepath.Join(d, n), "masked, and the agent starts with it")
			}
		}
		if to, err := os.Readlink(filepath.Join(root, d, "default.target")); err == nil && strings.HasPrefix(filepath.Base(to), "emergency") {
			add("/"+filepath.Join(d, "default.target"), "boots into "+filepath.Base(to)+", which does not start the agent")
		}
	}
	for _, f := range []string{"proc/cmdline", "etc/default/grub", "etc/kernel/cmdline"} {
		b, err := readBounded(filepath.Join(root, f), maxBootFile)
		if err != nil {
			continue
		}
		for _, w := range bootWords(string(b)) {
			add(fmt.Sprintf("/%s (%s)", f, w), "can keep the agent from starting")
		}
	}
	return out
}

// bootWords finds the kernel parameters that choose another init, mask the unit,
// or boot into a target without it.
func bootWords(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		for _, w := range strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\"'", r) }) {
			key, value, _ := strings.Cut(w, "=")
			switch {
			case key == "init", key == "rdinit", w == "emergency", w == "-b",
				key == "systemd.mask" && (value == unitName || value == "sysinit.target"),
				key == "systemd.unit" && strings.HasPrefix(value, "emergency"):
				out = append(out, w)
			}
		}
	}
	return out
}
