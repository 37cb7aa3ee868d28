package kernelsig

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

// SBATEntry is a line of SBAT: a component and its security generation (shim's
// SBAT.md).
type SBATEntry struct {
	Component  string
	Generation uint32
	Vendor     string // and the fields after it; only for people
}

// ParseSBAT reads the text of a section .sbat, or of a revocation level such as
// shim's SbatLevel. Zeros at the end do not count.
func ParseSBAT(text []byte) ([]SBATEntry, error) {
	text, _, _ = bytes.Cut(text, []byte{0})
	if len(text) > maxSBAT {
		return nil, fmt.Errorf("SBAT: %d bytes (at most %d): %w", len(text), maxSBAT, errs.Invalid)
	}
	var out []SBATEntry
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			continue
		}
		f := strings.SplitN(line, ",", 3)
		if len(f) < 2 || f[0] == "" || len(out) == maxSBATEntries {
			return nil, fmt.Errorf("SBAT: line %.80q: %w", line, errs.Invalid)
		}
		n, err := strconv.ParseUint(f[1], 10, 32)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("SBAT: generation in %.80q: %w", line, errs.Invalid)
		}
		e := SBATEntry{Component: f[0], Generation: uint32(n)}
		if len(f) > 2 {
			e.Vendor = f[2]
		}
		out = append(out, e)
	}
	return out, nil
}

// SBAT returns the entries of the image's section .sbat; an image without one
// has none.
func (m *Image) SBAT() ([]SBATEntry, error) {
	text, ok := m.Section(".sbat")
	if !ok {
		return nil, nil
	}
	return ParseSBAT(text)
}

// CheckSBAT holds the image's entries against a revocation level: a component
// whose generation is below that of the level is errs.Untrusted. So is, unless
// the level is empty, an image without any entries, except a Linux kernel: shim
// does not ask for them where a boot loader starts it, and Debian's have none.
func (m *Image) CheckSBAT(level []SBATEntry) error {
	entries, err := m.SBAT()
	if err != nil {
		return err
	}
	if len(level) > 0 && len(entries) == 0 && !m.Linux() {
		return fmt.Errorf("SBAT: the image has no entries: %w", errs.Untrusted)
	}
	for _, l := range level {
		for _, e := range entries {
			if e.Component == l.Component && e.Generation < l.Generation {
				return fmt.Errorf("SBAT: %s is of generation %d, revoked below %d: %w", e.Component, e.Generation, l.Generation, errs.Untrusted)
			}
		}
	}
	return nil
}
