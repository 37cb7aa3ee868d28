package host

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestBootOverrides(t *testing.T) {
	clean := map[string]string{
		"proc/cmdline": "BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro quiet systemd.unit=multi-user.target\n", "etc/default/grub": "# GRUB_CMDLINE_LINUX=\"init=/bin/sh\"\nGRUB_CMDLINE_LINUX=\"\"\n",
		"etc/systemd/system/nginx.service.d/a.conf": "", "etc/systemd/system/ringwall-agent.service.d/README": "",
	}
	for name, c := range map[string]struct {
		file, text, link, want string
	}{
		"a drop-in of root's":        {"etc/systemd/system/ringwall-agent.service.d/x.conf", "[Unit]\n", "", "/etc/systemd/system/ringwall-agent.service.d/x.conf: changes"},
		"of the prefix":              {"usr/lib/systemd/system/ringwall-.service.d/x.conf", "", "", "/usr/lib/systemd/system/ringwall-.service.d/x.conf: changes"},
		"of all services":            {"run/systemd/system/service.d/x.conf", "", "", "/run/systemd/system/service.d/x.conf: changes"},
		"a unit that comes before":   {"etc/systemd/system.control/ringwall-agent.service", "", "", "/etc/systemd/system.control/ringwall-agent.service: takes the place"},
		"a generator's mask":         {"run/systemd/generator.early/ringwall-agent.service", "", "/dev/null", "/run/systemd/generator.early/ringwall-agent.service: takes the place"},
		"sysinit.target masked":      {"etc/systemd/system/sysinit.target", "", "/dev/null", "/etc/systemd/system/sysinit.target: masked"},
		"the emergency target":       {"etc/systemd/system/default.target", "", "/usr/lib/systemd/system/emergency.target", "/etc/systemd/system/default.target: boots into emergency.target"},
		"another init":               {"proc/cmdline", "ro init=/bin/bash\n", "", "/proc/cmdline (init=/bin/bash): can keep"},
		"a mask on the command line": {"proc/cmdline", "systemd.mask=ringwall-agent.service ro", "", "/proc/cmdline (systemd.mask=ringwall-agent.service): can keep"},
		"at the next boot":           {"etc/default/grub", "GRUB_CMDLINE_LINUX=\"quiet emergency\"\n", "", "/etc/default/grub (emergency): can keep"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			writeTree(t, root, clean)
			if got := BootOverrides(root); len(got) != 0 {
				t.Fatalf("without it: %q", got)
			}
			path := filepath.Join(root, c.file)
			if c.link == "" {
				writeTree(t, root, map[string]string{c.file: c.text})
			} else if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(c.link, path)); err != nil {
				t.Fatal(err)
			}
			if got := BootOverrides(root); len(got) != 1 || !strings.HasPrefix(got[0], c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// The places for drop-ins are there to be guarded, and go with the rest.
func TestInstallBoot_dropInDirs(t *testing.T) {
	root := bootRoot(t)
	if _, err := InstallBoot(root); err != nil {
		t.Fatal(err)
	}
	for _, d := range dropInDirs() {
		if st, err := os.Stat(filepath.Join(root, d)); err != nil || !st.IsDir() || !slices.Contains(BootPaths(), "/"+d) {
			t.Errorf("%s: %v", d, err)
		}
	}
	writeTree(t, root, map[string]string{dropInDirs()[0] + "/own.conf": ""})
	if _, err := RemoveBoot(root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, dropInDirs()[0], "own.conf")); err != nil {
		t.Errorf("a person's drop-in is gone: %v", err)
	}
	if _, err := os.Stat(filepath.Join(root, dropInDirs()[1])); !os.IsNotExist(err) {
		t.Errorf("an empty directory is left: %v", err)
	}
}
