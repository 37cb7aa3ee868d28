package artefact

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// A unified kernel image is a PE file with a kernel, an initramfs and more in
// its sections (UAPI group, Unified Kernel Image).

const (
	maxSections  = 96 // PE has no more
	peSection    = 40
	maxPEHeaders = 64 << 10
)

type section struct {
	name     string
	at, size int64
}

// peSections reads the section table of a PE file from its beginning.
func peSections(head []byte) ([]section, error) {
	bad := func(what string) ([]section, error) { return nil, fmt.Errorf("PE file: %s: %w", what, errs.Invalid) }
	if len(head) < 64 || string(head[:2]) != "MZ" {
		return bad("no header")
	}
	le := binary.LittleEndian
	at := int64(le.Uint32(head[60:]))
	if at+24 > int64(len(head)) || string(head[at:at+4]) != "PE\x00\x00" {
		return bad("no PE header")
	}
	n, optional := int64(le.Uint16(head[at+6:])), int64(le.Uint16(head[at+20:]))
	table := at + 24 + optional
	if n > maxSections || table+n*peSection > int64(len(head)) {
		return bad("section table is out of bounds")
	}
	sections := make([]section, 0, n)
	for i := range n {
		h := head[table+i*peSection:][:peSection]
		virtual, raw := int64(le.Uint32(h[8:])), int64(le.Uint32(h[16:]))
		sections = append(sections, section{
			name: strings.TrimRight(string(h[:8]), "\x00"), at: int64(le.Uint32(h[20:])),
			// the file's size is rounded up to its alignment; what is loaded is this
			size: min(virtual, raw),
		})
	}
	return sections, nil
}

func isUKI(head []byte) bool {
	sections, err := peSections(head)
	if err != nil {
		return false
	}
	for _, s := range sections {
		if s.name == ".linux" || s.name == ".initrd" {
			return true
		}
	}
	return false
}

// readUKI yields the sections of an image. What the firmware's stub hands to
// the kernel, or starts, counts as kexec: it becomes the running kernel.
func readUKI(src *io.SectionReader, visit func(codesign.Member, io.Reader) error) error {
	head := make([]byte, min(src.Size(), maxPEHeaders))
	if _, err := io.ReadFull(io.NewSectionReader(src, 0, src.Size()), head); err != nil {
		return fmt.Errorf("read UKI: %w", err)
	}
	sections, err := peSections(head)
	if err != nil {
		return fmt.Errorf("read UKI: %w", err)
	}
	seen := make(map[string]int)
	for _, s := range sections {
		if s.at+s.size > src.Size() {
			return fmt.Errorf("read UKI: section %q ends at %d, the file at %d: %w", s.name, s.at+s.size, src.Size(), errs.Invalid)
		}
		m := codesign.Member{Path: s.name, Mode: 0o644, Size: s.size}
		switch s.name {
		case ".linux", ".initrd", ".ucode", ".efifw", ".dtb", ".dtbauto":
			m.Kinds = integrity.SetOf(integrity.KindKexec)
		case ".cmdline", ".osrel", ".uname", ".splash", ".pcrsig", ".pcrpkey", ".sbat", ".profile", ".hwids":
		default:
			continue // the stub's own code and data; the image as a whole covers it
		}
		// Profiles repeat sections.
		if seen[s.name]++; seen[s.name] > 1 {
			m.Path = fmt.Sprintf("%s-%d", s.name, seen[s.name])
		}
		if err := visit(m, io.NewSectionReader(src, s.at, s.size)); err != nil {
			return err
		}
	}
	return nil
}
