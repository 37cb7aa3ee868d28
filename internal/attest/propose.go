package attest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Propose makes a policy of what a machine booted: a proposal for a person, who
// decides whether this machine is one that others should be like. It accepts
// the machine's boot and no other. What runs later (IMA, the integrity policy)
// and why its TPM is believed is left to the person.
func Propose(b *Boot, name string) *Policy {
	p := &Policy{Format: PolicyFormat, Name: name, Version: 1, Bank: b.Alg.String()}
	f := Profile{Name: name}
	// PCR 1 holds the machine's settings, its boot order among them: of one
	// machine and not of a kind
	for _, i := range []int{0, 2, 3} {
		f.PCRs = append(f.PCRs, PCRValue{i, FormatDigest(b.Alg, b.Quoted.Values[i])})
	}
	p.Firmware = []Profile{f}
	if s := b.secure; s != nil {
		p.Authorities = sorted(s.authorities)
		for name, to := range map[string]*[]string{"PK": &p.PK, "KEK": &p.KEK, "db": &p.DB, "dbx": &p.DBX} {
			if list, err := s.database(name); err == nil {
				*to = sorted(list)
			}
		}
	}
	for _, e := range b.In(4) {
		if !isSeparator(e) && !slices.Contains(bootTexts(), strings.TrimRight(string(e.Measured), "\x00")) {
			p.BootApplications = append(p.BootApplications, FormatDigest(b.Alg, e.Digest))
		}
	}
	p.BootApplications = sorted(p.BootApplications)
	for _, e := range p.unknownToLoader(b) {
		p.BootLoader = append(p.BootLoader, FormatDigest(b.Alg, e.Digest))
	}
	p.BootLoader = sorted(p.BootLoader)
	for _, e := range b.In(8) {
		if text, ok := commandLine(e); ok {
			p.CommandLine.Allow = append(p.CommandLine.Allow, strings.Fields(text)...)
		}
	}
	p.CommandLine.Allow = sorted(p.CommandLine.Allow)
	p.UKI = b.sections()
	return p
}

// sections are those that PCR 11 says an image had: names that were recomputed,
// each with the digest that follows it.
func (b *Boot) sections() []Section {
	var out []Section
	events := b.In(pcrUKI)
	for i := 0; i+1 < len(events); i++ {
		name, ok := bytes.CutSuffix(events[i].Measured, []byte{0})
		if !ok || !bytes.HasPrefix(name, []byte(".")) || len(name) > 8 {
			continue
		}
		out = append(out, Section{string(name), []string{FormatDigest(b.Alg, events[i+1].Digest)}})
		i++
	}
	return out
}

func sorted(list []string) []string {
	out := slices.Clone(list)
	slices.Sort(out)
	return slices.Compact(out)
}

// References are expected measurements of boot components, predicted from the
// files themselves: what is signed may be booted. Digests are SHA-256.
type References struct {
	Format     string      `json:"format"`
	Components []Component `json:"components"`
}

// Component is one file that is booted.
type Component struct {
	Name string `json:"name"`
	File string `json:"file"` // SHA-256 of the file
	// Image is its Authenticode digest, which firmware measures into PCR 4.
	Image string `json:"image,omitempty"`
	// Kernel is the Authenticode digest of the kernel in a unified image: without
	// Secure Boot the stub starts it as a program of its own.
	Kernel   string    `json:"kernel,omitempty"`
	Sections []Section `json:"sections,omitempty"` // of a unified image, PCR 11
	// Options is the digest that the kernel measures of a unified image's command
	// line, see OptionsDigest.
	Options string `json:"options,omitempty"`
	// Records are the digests of the records that a host shows whose agent
	// enforces this integrity policy, see RecordDigests.
	Records []string `json:"records,omitempty"`
	// Loaded is SHA-256 of an initrd or other file that a boot loader measures
	// into PCR 9.
	Loaded string `json:"loaded,omitempty"`
}

// ReferencesFormat is the format of reference values.
const ReferencesFormat = "ringwall-attestation-references/1"

// StubSections are the sections of a unified kernel image that systemd-stub
// measures, in its order (unified_sections of systemd's src/fundamental/uki.c).
func StubSections() []string {
	return []string{
		".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile", ".dtbauto", ".hwids",
	}
}

// AddTo makes a policy accept the components. Values that a policy has stay:
// old images are taken out by people, when no host needs them any more.
func (r *References) AddTo(p *Policy) error {
	if p.Bank != SHA256.String() {
		return fmt.Errorf("reference values are of SHA-256, the policy's bank is %s: %w", p.Bank, errs.Invalid)
	}
	for _, c := range r.Components {
		if c.Image != "" {
			p.BootApplications = sorted(append(p.BootApplications, c.Image))
		}
		for _, d := range []string{c.Loaded, c.Options} {
			if d != "" {
				p.BootLoader = sorted(append(p.BootLoader, d))
			}
		}
		if len(c.Records) > 0 {
			if p.PolicyRecord.Path == "" {
				p.PolicyRecord.Path = PolicyRecordPath
			}
			p.PolicyRecord.Digests = sorted(append(p.PolicyRecord.Digests, c.Records...))
		}
		for _, s := range c.Sections {
			i := slices.IndexFunc(p.UKI, func(o Section) bool { return o.Name == s.Name })
			if i < 0 {
				p.UKI = append(p.UKI, Section{Name: s.Name})
				i = len(p.UKI) - 1
			}
			p.UKI[i].Digests = sorted(append(slices.Clone(p.UKI[i].Digests), s.Digests...))
			// the stub measures the same initrd again as the kernel takes it
			if s.Name == ".initrd" {
				p.BootLoader = sorted(append(p.BootLoader, s.Digests...))
			}
		}
	}
	p.applications, p.loaderFiles, p.digest = nil, nil, ""
	return nil
}

// OptionsDigest is what the kernel's EFI stub measures into PCR 9 for a command
// line that it is started with: SHA-256 of the text in UTF-16 with its NUL.
func OptionsDigest(cmdline string) string {
	var wide []byte
	for _, u := range utf16.Encode([]rune(cmdline)) {
		wide = binary.LittleEndian.AppendUint16(wide, u)
	}
	return FormatDigest(SHA256, SHA256.sum(wide, []byte{0, 0}))
}

// ImagePart is a section of an image, by its content.
type ImagePart struct {
	Name string
	Data []byte
}

// Predict makes the reference values of a boot image: file is all of it, image
// its Authenticode digest, parts its sections, and kernel the Authenticode
// digest of what its section .linux holds, for a unified image.
func Predict(name string, file []byte, image [32]byte, parts []ImagePart, kernel *[32]byte) Component {
	c := Component{Name: name, File: FormatDigest(SHA256, SHA256.sum(file)), Image: FormatDigest(SHA256, image[:])}
	if kernel == nil {
		return c
	}
	c.Kernel = FormatDigest(SHA256, kernel[:])
	for _, want := range StubSections() {
		for _, p := range parts {
			if p.Name != want {
				continue
			}
			c.Sections = append(c.Sections, Section{p.Name, []string{FormatDigest(SHA256, SHA256.sum(p.Data))}})
			if p.Name == ".cmdline" {
				c.Options = OptionsDigest(strings.TrimRight(string(p.Data), "\x00\n "))
			}
		}
	}
	return c
}

// recordChanges is how often a host may change between policies and modes within
// a boot and still be recognised.
const recordChanges = 64

// PredictPolicy makes the reference values of an integrity policy that is to be
// enforced: text is what was signed.
func PredictPolicy(name string, text []byte) Component {
	sum := SHA256.sum(text)
	records, _ := RecordDigests([][32]byte{[32]byte(sum)}, ModeEnforce, recordChanges) // few enough
	return Component{Name: name, File: FormatDigest(SHA256, sum), Records: records}
}

// PredictFile makes the reference value of a file that a boot loader reads, such
// as an initrd.
func PredictFile(name string, file []byte) Component {
	d := FormatDigest(SHA256, SHA256.sum(file))
	return Component{Name: name, File: d, Loaded: d}
}

const maxReferences = 16 << 20

// ParseReferences reads what ringwall attest predict wrote where the images were
// signed: strict JSON, at most 16 MiB, no digest that is none.
func ParseReferences(b []byte) (*References, error) {
	var r References
	if err := pki.UnmarshalStrict(b, &r, maxReferences); err != nil {
		return nil, fmt.Errorf("reference values: %w", err)
	}
	if r.Format != ReferencesFormat {
		return nil, fmt.Errorf("reference values: format %.40q: %w", r.Format, errs.Invalid)
	}
	for _, c := range r.Components {
		list := slices.DeleteFunc(append([]string{c.File, c.Image, c.Kernel, c.Options, c.Loaded}, c.Records...), func(s string) bool { return s == "" })
		for _, s := range c.Sections {
			if !slices.Contains(StubSections(), s.Name) {
				return nil, fmt.Errorf("reference values: %.80q: section %.20q: %w", c.Name, s.Name, errs.Invalid)
			}
			list = append(list, s.Digests...)
		}
		if err := digestsOf(SHA256, list); err != nil {
			return nil, fmt.Errorf("reference values: %.80q: %w: %w", c.Name, err, errs.Invalid)
		}
	}
	return &r, nil
}
