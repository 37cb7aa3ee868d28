package attest

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"unicode/utf16"
)

// bootTexts are what firmware itself measures into PCR 4 beside programs.
func bootTexts() []string {
	return []string{
		"Calling EFI Application from Boot Option", "Returning from EFI Application from Boot Option", "BOOT ATTEMPTS OMITTED",
	}
}

// isSeparator: all zeros or all ones, nothing else is normal (profile, table 27).
func isSeparator(e *Event) bool {
	return len(e.Measured) == 4 && (allZero(e.Measured) || allOnes(e.Measured))
}

// bootApplications accounts for every event of PCR 4: separators, firmware's
// own texts, and otherwise digests of programs, all of which must be
// authorised, whatever the log calls them. It counts those that are.
func bootApplications(p *Policy, b *Boot) (programs int, err error) {
	for _, e := range b.In(4) {
		if isSeparator(e) || slices.Contains(bootTexts(), strings.TrimRight(string(e.Measured), "\x00")) {
			continue
		}
		if d := FormatDigest(b.Alg, e.Digest); listed(p.applications, p.BootApplications, d) {
			programs++
		} else if err == nil {
			err = refusePCR(ReasonBootApp, 4, "event %d: %s", e.Index, d)
		}
	}
	if programs == 0 && err == nil {
		err = refusePCR(ReasonNoEvidence, 4, "no program was measured")
	}
	return programs, err
}

// loader accounts for the PCRs of boot loaders: GRUB's commands and files (8,
// 9), the kernel's initrds and options (9), systemd-stub's command line,
// credentials and extensions (12, 13), shim's lists (14). Everything must be
// known by its digest, or be a command line, which is judged by its words.
func (p *Policy) loader(b *Boot) error {
	unknown := p.unknownToLoader(b)
	options := p.options(b.Alg, unknown)
	for _, e := range unknown {
		if text, ok := commandLine(e); ok && p.CommandLine.permits(text) == nil || options[string(e.Digest)] {
			continue
		}
		return refusePCR(ReasonLoader, e.PCR, "event %d: %s %.80q", e.Index, FormatDigest(b.Alg, e.Digest), e.Measured)
	}
	return nil
}

// unknownToLoader are the loader's events that the policy does not list.
func (p *Policy) unknownToLoader(b *Boot) []*Event {
	var out []*Event
	for _, pcr := range []int{8, 9, 12, 13, 14} {
		for _, e := range b.In(pcr) {
			if !isSeparator(e) && !p.listsFile(b.Alg, e) {
				out = append(out, e)
			}
		}
	}
	return out
}

// commandLine reads an event as a kernel command line: GRUB's text of PCR 8,
// or systemd-stub's UTF-16 of PCR 12.
func commandLine(e *Event) (string, bool) {
	switch {
	case len(e.Measured) == 0:
		return "", false
	case e.PCR == 8:
		return strings.TrimRight(string(e.Measured), "\x00"), true
	case e.PCR == 12:
		s, ok := decodeUTF16(e.Measured)
		return strings.TrimRight(s, "\x00"), ok
	}
	return "", false
}

// permits judges a command line by its words. GRUB puts the kernel's path
// first, which must be allowed like any other word.
func (c *Cmdline) permits(text string) error {
	words := strings.Fields(text)
	for _, w := range words {
		if !slices.ContainsFunc(c.Allow, func(a string) bool { return fits(a, w) }) && !slices.Contains(c.Require, w) {
			return refuse(ReasonCmdline, "%.80q is not allowed in %.400q", w, text)
		}
	}
	for _, r := range c.Require {
		if !slices.Contains(words, r) {
			return refuse(ReasonCmdline, "%.80q is missing in %.400q", r, text)
		}
	}
	return nil
}

func fits(pattern, word string) bool {
	if head, open := strings.CutSuffix(pattern, "*"); open {
		return strings.HasPrefix(word, head)
	}
	return pattern == word
}

func (p *Policy) listsFile(a Alg, e *Event) bool {
	return listed(p.loaderFiles, p.BootLoader, FormatDigest(a, e.Digest))
}

// options are digests of what the command lines among the events, as far as
// they are permitted, look like to the kernel's EFI stub: it measures its
// options into PCR 9 in UTF-16, without the kernel's path, and logs only that
// it did.
func (p *Policy) options(a Alg, events []*Event) map[string]bool {
	out := map[string]bool{}
	for _, e := range events {
		text, ok := commandLine(e)
		if !ok || p.CommandLine.permits(text) != nil {
			continue
		}
		_, short, _ := strings.Cut(text, " ")
		for _, s := range []string{text, short} {
			var wide []byte
			for _, u := range utf16.Encode([]rune(s)) {
				wide = binary.LittleEndian.AppendUint16(wide, u)
			}
			out[string(a.sum(wide))], out[string(a.sum(wide, []byte{0, 0}))] = true, true
		}
	}
	return out
}

// commandLines judges the command lines that were measured by themselves. One
// that is a section of a unified kernel image is that section's matter; where
// neither is there, nobody knows what the kernel was told.
func (p *Policy) commandLines(b *Boot) error {
	found := false
	for _, e := range p.unknownToLoader(b) {
		text, ok := commandLine(e)
		if !ok {
			continue
		}
		found = true
		if err := p.CommandLine.permits(text); err != nil {
			return err
		}
	}
	if found || p.knownSection(b, ".cmdline") || p.listedCommandLine(b) {
		return nil
	}
	return refuse(ReasonNoEvidence, "no command line was measured")
}

// listedCommandLine: one that the policy lists by digest and permits by words.
func (p *Policy) listedCommandLine(b *Boot) bool {
	for _, pcr := range []int{8, 12} {
		for _, e := range b.In(pcr) {
			if text, ok := commandLine(e); ok && p.listsFile(b.Alg, e) && p.CommandLine.permits(text) == nil {
				return true
			}
		}
	}
	return false
}

// knownSection: the image has the section, with content that the policy lists.
func (p *Policy) knownSection(b *Boot, name string) bool {
	events := b.In(pcrUKI)
	want := b.Alg.sum([]byte(name + "\x00"))
	i := slices.IndexFunc(events, func(e *Event) bool { return bytes.Equal(e.Digest, want) })
	if i < 0 || i+1 == len(events) {
		return false
	}
	d := FormatDigest(b.Alg, events[i+1].Digest)
	return slices.ContainsFunc(p.UKI, func(s Section) bool { return s.Name == name && slices.Contains(s.Digests, d) })
}

// uki accounts for PCR 11: systemd-stub measures each section's name and then
// its content, the running system adds its phases.
func (p *Policy) uki(b *Boot) error {
	var section *Section
	kernel := false
	for _, e := range b.In(pcrUKI) {
		d := FormatDigest(b.Alg, e.Digest)
		switch {
		case section != nil:
			if !slices.Contains(section.Digests, d) {
				return refusePCR(ReasonUKI, pcrUKI, "event %d: section %s is %s", e.Index, section.Name, d)
			}
			kernel = kernel || section.Name == ".linux"
			section = nil
		case isSeparator(e), e.Userspace && slices.Contains(phases(), string(e.Measured)):
		default:
			i := slices.IndexFunc(p.UKI, func(s Section) bool { return bytes.Equal(b.Alg.sum([]byte(s.Name+"\x00")), e.Digest) })
			if i < 0 {
				return refusePCR(ReasonUKI, pcrUKI, "event %d: %s is no section that the policy knows", e.Index, d)
			}
			section = &p.UKI[i]
		}
	}
	if section != nil || !kernel {
		return refusePCR(ReasonNoEvidence, pcrUKI, "no kernel was measured")
	}
	return nil
}

// firmware compares PCR 0 to 3 with the profiles.
func (p *Policy) firmware(b *Boot) error {
	nearest, differ := "", []int(nil)
	for _, f := range p.Firmware {
		var bad []int
		for _, v := range f.PCRs {
			if v.Digest != FormatDigest(b.Alg, b.Quoted.Values[v.PCR]) {
				bad = append(bad, v.PCR)
			}
		}
		if len(bad) == 0 {
			return nil
		}
		if nearest == "" || len(bad) < len(differ) {
			nearest, differ = f.Name, bad
		}
	}
	if nearest == "" {
		return refuse(ReasonNoEvidence, "the policy knows no firmware")
	}
	return refusePCR(ReasonFirmware, differ[0], "none of %d profiles; the nearest, %.80q, differs in PCR %v", len(p.Firmware), nearest, differ)
}
