package kernelsig

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// Bounds of EFI images.
const (
	maxImage         = 1 << 30
	maxSections      = 96 // the format's own limit
	maxPESignatures  = 16
	maxSBAT          = 64 << 10
	maxSBATEntries   = 1024
	peHeader32       = 0x10b
	peHeader64       = 0x20b
	securityEntry    = 4 // IMAGE_DIRECTORY_ENTRY_SECURITY
	certificateHead  = 8 // WIN_CERTIFICATE up to its content
	certificateV2    = 0x0200
	certificatePKCS7 = 0x0002
)

// Image is a parsed PE image (EFI application, shim, kernel with EFI stub,
// unified kernel image). Its fields say what is in the file, not who vouches
// for it: see VerifyImage.
type Image struct {
	Machine    uint16 // IMAGE_FILE_MACHINE_*: 0x8664 is amd64, 0xaa64 arm64
	Sections   []Section
	Signatures [][]byte // DER of the CMS in each WIN_CERTIFICATE

	data                []byte
	checksum, directory int // places that the hash leaves out
	headers             int // length of the headers
	certificates        int // where the certificate table begins; the file's end without one
}

// Section is a part of an image.
type Section struct {
	Name string
	// Data is what is loaded: a part of the image's bytes, not a copy, without
	// padding.
	Data     []byte
	start, n int // in the file, with padding
}

// ParseImage reads the headers of a PE image. It refuses whatever leaves a doubt
// about what a signature covers: sections that overlap or leave gaps, a
// certificate table that is not at the end, names that appear twice.
func ParseImage(data []byte) (*Image, error) {
	m, err := parseImage(data)
	if err != nil {
		return nil, fmt.Errorf("EFI image: %w", err)
	}
	return m, nil
}

func parseImage(data []byte) (*Image, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	le := binary.LittleEndian
	if len(data) > maxImage {
		return nil, bad("%d bytes (at most %d)", len(data), maxImage)
	}
	if len(data) < 64 || string(data[:2]) != "MZ" {
		return nil, bad("no MZ header")
	}
	at := le.Uint32(data[0x3c:])
	if uint64(at)+24 > uint64(len(data)) || string(data[at:at+4]) != "PE\x00\x00" {
		return nil, bad("no PE header")
	}
	coff := int(at) + 4
	m := &Image{data: data, Machine: le.Uint16(data[coff:])}
	count, optional := int(le.Uint16(data[coff+2:])), int(le.Uint16(data[coff+16:]))
	head := coff + 20
	if count == 0 || count > maxSections || head+optional+40*count > len(data) {
		return nil, bad("%d sections, optional header of %d bytes", count, optional)
	}
	opt := data[head : head+optional]
	var directories int
	switch {
	case optional >= 2 && le.Uint16(opt) == peHeader32:
		directories = 96
	case optional >= 2 && le.Uint16(opt) == peHeader64:
		directories = 112
	default:
		return nil, bad("optional header's magic")
	}
	entry := directories + 8*securityEntry
	if optional < entry+8 || le.Uint32(opt[directories-4:]) <= securityEntry {
		return nil, bad("it has no room for a signature")
	}
	m.checksum, m.directory = head+64, head+entry
	m.headers = int(le.Uint32(opt[60:]))
	if m.headers < head+optional+40*count || m.headers > len(data) {
		return nil, bad("headers of %d bytes", m.headers)
	}
	m.certificates = len(data)
	where, size := le.Uint32(opt[entry:]), le.Uint32(opt[entry+4:])
	if where != 0 || size != 0 {
		if uint64(where)+uint64(size) != uint64(len(data)) || int(where) < m.headers || size == 0 {
			return nil, bad("certificate table of %d bytes at %d is not at the end of %d", size, where, len(data))
		}
		m.certificates = int(where)
	}
	if err := m.readSections(head+optional, count); err != nil {
		return nil, err
	}
	return m, m.readCertificates()
}

func (m *Image) readSections(at, count int) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errs.Invalid)
	}
	for i := range count {
		h := m.data[at+40*i : at+40*(i+1)]
		name := string(bytes.TrimRight(h[:8], "\x00"))
		virtual, size, start := binary.LittleEndian.Uint32(h[8:]), binary.LittleEndian.Uint32(h[16:]), binary.LittleEndian.Uint32(h[20:])
		if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' }) {
			return bad("section %d has the name %q", i+1, name)
		}
		s := Section{Name: name}
		if size > 0 {
			if uint64(start)+uint64(size) > uint64(m.certificates) || //nolint:gosec // not negative
				int(start) < m.headers {
				return bad("section %q of %d bytes at %d", name, size, start)
			}
			s.start, s.n = int(start), int(size)
			// Alignment fills the file up; in memory the rest is zero.
			s.Data = m.data[start : start+min(virtual, size)]
		}
		if slices.ContainsFunc(m.Sections, func(o Section) bool { return o.Name == name }) && name != "" {
			return bad("two sections %q", name)
		}
		m.Sections = append(m.Sections, s)
	}
	end := m.headers
	for _, s := range m.inFile() {
		if s.start != end {
			return bad("section %q begins at %d, not at %d: tools disagree about what is signed", s.Name, s.start, end)
		}
		end += s.n
	}
	return nil
}

// inFile are the sections that have bytes in the file, in its order.
func (m *Image) inFile() []Section {
	var out []Section
	for _, s := range m.Sections {
		if s.n > 0 {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b Section) int { return a.start - b.start })
	return out
}

// readCertificates reads the table of WIN_CERTIFICATE.
func (m *Image) readCertificates() error {
	for b := m.data[m.certificates:]; len(b) > 0; {
		if len(b) < certificateHead {
			return fmt.Errorf("certificate table is cut: %w", errs.Invalid)
		}
		n := binary.LittleEndian.Uint32(b)
		revision, kind := binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])
		if n <= certificateHead || uint64(n) > uint64(len(b)) || len(m.Signatures) == maxPESignatures {
			return fmt.Errorf("certificate of %d bytes in %d: %w", n, len(b), errs.Invalid)
		}
		if revision != certificateV2 || kind != certificatePKCS7 {
			return fmt.Errorf("certificate of revision %#x, type %#x: %w", revision, kind, errs.Unsupported)
		}
		m.Signatures = append(m.Signatures, trimPadding(b[certificateHead:n]))
		b = b[min((uint64(n)+7)&^7, uint64(len(b))):]
	}
	return nil
}

// Hash is the image's Authenticode digest with SHA-256: all of the file except
// its checksum, the directory entry of the certificates, and these themselves
// (Microsoft's "Windows Authenticode Portable Executable Signature Format").
func (m *Image) Hash() [32]byte {
	h := sha256.New()
	m.hashTo(h)
	return [32]byte(h.Sum(nil))
}

func (m *Image) hashTo(h hash.Hash) {
	for _, part := range [][]byte{
		m.data[:m.checksum], m.data[m.checksum+4 : m.directory], m.data[m.directory+8 : m.certificates],
	} {
		_, _ = h.Write(part) // never fails
	}
}

// Section returns the named section's content, such as ".linux", ".initrd",
// ".cmdline", ".osrel" or ".uname" of a unified kernel image; false: there is
// none.
func (m *Image) Section(name string) ([]byte, bool) {
	for _, s := range m.Sections {
		if s.Name == name {
			return s.Data, true
		}
	}
	return nil, false
}

// Linux says whether the image is a Linux kernel: an x86 or arm64 one, or one
// that decompresses itself (EFI zboot). A unified kernel image is none, it holds
// one.
func (m *Image) Linux() bool {
	d := m.data
	return len(d) > 0x206 && (string(d[0x202:0x206]) == "HdrS" || string(d[56:60]) == "ARM\x64" || string(d[4:8]) == "zimg")
}

// UKI says whether the image is a unified kernel image: one with a kernel in
// the section .linux (the UAPI group's specification).
func (m *Image) UKI() bool {
	_, ok := m.Section(".linux")
	return ok
}
