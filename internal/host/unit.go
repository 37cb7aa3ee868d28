package host

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// The texts that tie the agent into a Debian system. They lie beside this file
// as they are installed, to be read and linted as what they are.
var (
	//go:embed boot/ringwall-agent.service
	unitText string
	//go:embed boot/run-ringwall-bpf.conf
	mountText string
	//go:embed boot/initramfs-hook
	hookText string
	//go:embed boot/initramfs-early
	earlyText string
	//go:embed boot/05ringwall
	aptText string
)

const (
	unitPath = "etc/systemd/system/ringwall-agent.service"
	// of the mount that the agent makes, see enforce.DefaultPinDir
	mountPath = "etc/systemd/system/run-ringwall-bpf.mount.d/ringwall.conf"
	wantPath  = "etc/systemd/system/sysinit.target.wants/ringwall-agent.service"
	wantLink  = "../ringwall-agent.service"

	maxBootFile = 256 << 10
)

// BootReport says what was done to a system's files.
type BootReport struct {
	Changed   []string // written or removed
	Unchanged []string // as it should be already
	Skipped   []string // with the reason
	// Next are commands that make the changes count.
	Next []string
}

// bootFile is one text and its place. needs is a directory without which it
// has no use: it is then left out, with a word.
type bootFile struct {
	path, text, comment, needs string
	mode                       fs.FileMode
	next                       string
}

func bootFiles() []bootFile {
	const initramfs = "update-initramfs -u -k all"
	return []bootFile{
		{unitPath, unitText, "#", "", 0o644, "systemctl daemon-reload"},
		{mountPath, mountText, "#", "", 0o644, "systemctl daemon-reload"},
		{"etc/initramfs-tools/hooks/ringwall", hookText, "#", "etc/initramfs-tools", 0o755, initramfs},
		{"etc/initramfs-tools/scripts/init-bottom/ringwall", earlyText, "#", "etc/initramfs-tools", 0o755, initramfs},
		{"etc/apt/apt.conf.d/05ringwall", aptText, "//", "etc/apt", 0o644, ""},
	}
}

// BootPaths are what InstallBoot writes and makes, and the program that this
// starts: what has to stay for enforcement to be there after the next boot.
func BootPaths() []string {
	out := []string{"/usr/bin/ringwall", "/" + wantPath}
	for _, f := range bootFiles() {
		out = append(out, "/"+f.path)
	}
	for _, d := range dropInDirs() {
		out = append(out, "/"+d)
	}
	return out
}

// InstallBoot writes below root what starts the agent early at boot (a systemd
// unit that is wanted by sysinit.target, and for initramfs-tools a hook and a
// script), and what makes apt ask before it installs. A second run changes
// nothing. It runs no command: see BootReport.Next.
//
// A file that somebody else wrote, or changed after we did, is kept: that is
// errs.Conflict, and files named before it are written (nothing is half
// written).
func InstallBoot(root string) (BootReport, error) {
	var r BootReport
	for _, f := range bootFiles() {
		if f.needs != "" {
			if _, err := os.Stat(filepath.Join(root, f.needs)); err != nil {
				r.Skipped = append(r.Skipped, fmt.Sprintf("/%s: there is no /%s", f.path, f.needs))
				continue
			}
		}
		if err := f.install(root, &r); err != nil {
			return r, fmt.Errorf("install %s: %w", f.path, err)
		}
	}
	for _, d := range dropInDirs() {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil { //nolint:gosec // as the system has them
			return r, fmt.Errorf("install %s: %w", d, kindOf(err))
		}
	}
	if err := installLink(root, &r); err != nil {
		return r, fmt.Errorf("install %s: %w", wantPath, err)
	}
	return r, nil
}

// RemoveBoot removes below root what InstallBoot of any version wrote, and
// nothing else: a file that was changed since is named in Skipped and kept.
func RemoveBoot(root string) (BootReport, error) {
	var r BootReport
	if target, err := os.Readlink(filepath.Join(root, wantPath)); err == nil && target == wantLink {
		if err := RemoveFile(filepath.Join(root, wantPath)); err != nil {
			return r, err
		}
		r.Changed = append(r.Changed, "/"+wantPath)
	}
	for _, d := range dropInDirs() {
		_ = os.Remove(filepath.Join(root, d)) // if nobody put anything there
	}
	for _, f := range bootFiles() {
		name := filepath.Join(root, f.path)
		have, err := readOwn(name)
		switch {
		case errors.Is(err, errs.NotFound):
			continue
		case err != nil:
			return r, fmt.Errorf("remove %s: %w", f.path, err)
		case !sealed(have, f.comment):
			r.Skipped = append(r.Skipped, "/"+f.path+": it is not as Ringwall wrote it")
			continue
		}
		if err := RemoveFile(name); err != nil {
			return r, err
		}
		r.changed(f)
	}
	return r, nil
}

func (f bootFile) install(root string, r *BootReport) error {
	name, want := filepath.Join(root, f.path), seal(f.text, f.comment)
	have, err := readOwn(name)
	switch {
	case errors.Is(err, errs.NotFound):
	case err != nil:
		return err
	case have == want:
		if fi, err := os.Stat(name); err == nil && fi.Mode().Perm() == f.mode {
			r.Unchanged = append(r.Unchanged, "/"+f.path)
			return nil
		}
	case !sealed(have, f.comment):
		return fmt.Errorf("it is there and not as Ringwall wrote it: move it away first: %w", errs.Conflict)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // as the system has them
		return kindOf(err)
	}
	if err := WriteFile(name, []byte(want), f.mode); err != nil {
		return err
	}
	r.changed(f)
	return nil
}

func (r *BootReport) changed(f bootFile) {
	r.Changed = append(r.Changed, "/"+f.path)
	if f.next != "" && !slices.Contains(r.Next, f.next) {
		r.Next = append(r.Next, f.next)
	}
}

func installLink(root string, r *BootReport) error {
	name := filepath.Join(root, wantPath)
	switch target, err := os.Readlink(name); {
	case err == nil && target == wantLink:
		r.Unchanged = append(r.Unchanged, "/"+wantPath)
		return nil
	case !os.IsNotExist(err):
		return fmt.Errorf("it is there and not as Ringwall made it: %w", errs.Conflict)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // as the system has them
		return kindOf(err)
	}
	if err := os.Symlink(wantLink, name); err != nil {
		return kindOf(err)
	}
	r.Changed = append(r.Changed, "/"+wantPath)
	return syncDir(filepath.Dir(name))
}

// readOwn reads a regular file; a link or the like is errs.Conflict.
func readOwn(name string) (string, error) {
	fi, err := os.Lstat(name)
	if err != nil {
		return "", kindOf(err)
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file: %w", name, errs.Conflict)
	}
	b, err := readBounded(name, maxBootFile)
	return string(b), err
}

const sealWords = " Written by ringwall; a change keeps it from being replaced or removed. sha256:"

// seal appends a line with the digest of the text, by which a later version
// knows that nobody changed it.
func seal(text, comment string) string {
	sum := sha256.Sum256([]byte(text))
	return text + comment + sealWords + hex.EncodeToString(sum[:]) + "\n"
}

func sealed(s, comment string) bool {
	i := strings.LastIndex(s, comment+sealWords)
	return i >= 0 && seal(s[:i], comment) == s
}
