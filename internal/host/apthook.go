package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"ringwall/internal/errs"
)

// AptDeb is a package file that apt is about to unpack. Package, Version and
// Arch are what apt says that it is, to be compared with the signed index; they
// are empty if apt spoke version 1 of its protocol, Arch also in version 2.
type AptDeb struct {
	Path                   string
	Package, Version, Arch string
}

// Bounds of what apt may say.
const (
	maxHookLine  = 64 << 10
	maxHookLines = 500_000
	maxHookBytes = 64 << 20
)

// ParseAptHook reads what apt writes to a DPkg::Pre-Install-Pkgs command
// (apt.conf(5)), in version 1, 2 or 3 of that protocol, and returns the package
// files in apt's order. Removals and configurations bring no file and are left
// out. It is strict: a line of an unknown shape, a relative path or an end
// before the list is errs.Invalid, and apt then stops (fails closed).
func ParseAptHook(r io.Reader) ([]AptDeb, error) {
	in := &hookLines{Scanner: bufio.NewScanner(io.LimitReader(r, maxHookBytes))}
	in.Buffer(make([]byte, 4<<10), maxHookLine)
	debs, err := parseAptHook(in)
	if err == nil {
		err = in.Err()
	}
	if errors.Is(err, bufio.ErrTooLong) {
		err = fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if err != nil {
		return nil, fmt.Errorf("what apt says, line %d: %w", in.line, err)
	}
	return debs, nil
}

type hookLines struct {
	*bufio.Scanner
	line, bytes int
}

func (h *hookLines) next() bool {
	if !h.Scan() {
		return false
	}
	h.line++
	h.bytes += len(h.Bytes()) + 1
	return true
}

// bounded is an error once apt has said too much.
func (h *hookLines) bounded() error {
	if h.line > maxHookLines || h.bytes >= maxHookBytes {
		return fmt.Errorf("more than %d lines or %d bytes: %w", maxHookLines, maxHookBytes, errs.Invalid)
	}
	return nil
}

func parseAptHook(in *hookLines) ([]AptDeb, error) {
	if !in.next() {
		return nil, nil // version 1 with nothing to unpack
	}
	var fields int
	switch first := in.Text(); {
	case first == "VERSION 2":
		fields = 5
	case first == "VERSION 3":
		fields = 9
	case strings.HasPrefix(first, "VERSION "):
		return nil, fmt.Errorf("protocol %.40q: %w", first, errs.Unsupported)
	default:
		return parseAptFiles(in, first)
	}
	for { // apt's configuration, up to an empty line
		if !in.next() {
			return nil, fmt.Errorf("ends within the configuration: %w", errs.Invalid)
		}
		if err := in.bounded(); err != nil {
			return nil, err
		}
		if in.Text() == "" {
			break
		}
		if !strings.Contains(in.Text(), "=") {
			return nil, fmt.Errorf("configuration %.80q: %w", in.Text(), errs.Invalid)
		}
	}
	var debs []AptDeb
	for in.next() {
		if err := in.bounded(); err != nil {
			return nil, err
		}
		d, err := parseAptAction(in.Text(), fields)
		if err != nil {
			return nil, err
		}
		if d.Path != "" {
			debs = append(debs, d)
		}
	}
	return debs, nil
}

// parseAptFiles is version 1: nothing but paths.
func parseAptFiles(in *hookLines, first string) ([]AptDeb, error) {
	var debs []AptDeb
	for line := first; ; line = in.Text() {
		p, err := debPath(line)
		if err != nil {
			return nil, err
		}
		debs = append(debs, AptDeb{Path: p})
		if !in.next() {
			return debs, nil
		}
		if err := in.bounded(); err != nil {
			return nil, err
		}
	}
}

// parseAptAction reads "name old direction new action" or, in version 3, the
// same with architecture and Multi-Arch after each version. Only the action,
// at the end, may hold spaces.
func parseAptAction(line string, fields int) (AptDeb, error) {
	f := strings.SplitN(line, " ", fields)
	if len(f) != fields {
		return AptDeb{}, fmt.Errorf("action %.120q: %w", line, errs.Invalid)
	}
	d := AptDeb{Package: f[0], Version: f[3]}
	dir := f[2]
	if fields == 9 {
		d.Version, d.Arch, dir = f[5], f[6], f[4]
	}
	if dir != "<" && dir != ">" && dir != "=" {
		return AptDeb{}, fmt.Errorf("action %.120q: direction: %w", line, errs.Invalid)
	}
	action := f[fields-1]
	if action == "**CONFIGURE**" || action == "**REMOVE**" {
		return AptDeb{}, nil
	}
	p, err := debPath(action)
	if err != nil {
		return AptDeb{}, err
	}
	if !dpkgName(d.Package, "+.-") || d.Version == "-" || !dpkgName(strings.ToLower(d.Version), ".+-:~") ||
		fields == 9 && !dpkgName(d.Arch, "-") {
		return AptDeb{}, fmt.Errorf("action %.120q: %w", line, errs.Invalid)
	}
	d.Path = p
	return d, nil
}

func debPath(s string) (string, error) {
	p := path.Clean(s)
	if !strings.HasPrefix(s, "/") || !cleanAbs(p) {
		return "", fmt.Errorf("package file %.200q: %w", s, errs.Invalid)
	}
	return p, nil
}
