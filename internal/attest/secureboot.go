package attest

import (
	"bytes"
	"slices"
	"strings"
)

// The reasons of checks that look at what was booted.
const (
	ReasonUnexplained   Reason = "unexplained-event"  // an event whose meaning nothing confirms
	ReasonSecureBootOff Reason = "secure-boot-off"    // or in setup mode
	ReasonUnused        Reason = "secure-boot-unused" // on, and nothing was verified: another way of booting
	ReasonAuthority     Reason = "boot-authority"     // what was booted was signed by somebody else
	ReasonPK            Reason = "platform-key"       // not ours
	ReasonKEK           Reason = "key-exchange-key"   // not ours
	ReasonDB            Reason = "db-entry"           // a signer or digest that is not allowed
	ReasonDBX           Reason = "dbx-outdated"       // something is not revoked that must be
	ReasonDebug         Reason = "debug-on"           // the firmware can be debugged
	ReasonDMA           Reason = "dma-unprotected"    // devices may write memory while booting
	ReasonBootApp       Reason = "boot-application"   // a program that is not authorised ran before the kernel
	ReasonLoader        Reason = "boot-loader"        // a command or file of the boot loader that is not known
	ReasonUKI           Reason = "uki-section"        // a part of the kernel image that is not known
	ReasonCmdline       Reason = "command-line"       // a word that is not allowed, or one that is missing
	ReasonFirmware      Reason = "firmware-profile"   // firmware that nobody has approved
	ReasonIMAUnknown    Reason = "ima-unknown"        // something ran that is in no catalogue
	ReasonIMAViolation  Reason = "ima-violation"      // a file changed while it was measured
	ReasonPolicyRecord  Reason = "policy-record"      // not the integrity policy that the host should have
	ReasonNoEvidence    Reason = "no-evidence"        // nothing to look at
)

// Texts that firmware measures (PC Client Platform Firmware Profile, 10.4.4).
const (
	actionDebug = "UEFI Debug Mode"
	actionDMA   = "DMA Protection Disabled"
)

// secureBoot is what PCR 7 says. It is read by content and order, never by the
// events' types, which nobody vouches for.
type secureBoot struct {
	variables   map[string]*variable // the first of each, from before the separator
	authorities []string             // see authorityID
	debug, dma  bool
}

// readSecureBoot accounts for every event of PCR 7. Firmware measures the five
// variables first, then a separator, and the authority of each image as it
// verifies it; shim adds its own. Whatever else is there is refused.
func readSecureBoot(b *Boot) (*secureBoot, error) {
	s := &secureBoot{variables: map[string]*variable{}}
	separated := false
	events := b.In(7)
	for _, e := range events {
		if e.Measured == nil {
			return nil, refusePCR(ReasonUnexplained, 7, "event %d: its digest is not the one of its data", e.Index)
		}
		if isSeparator(e) {
			if separated {
				return nil, refusePCR(ReasonUnexplained, 7, "event %d: a second separator", e.Index)
			}
			separated = true
			continue
		}
		v, err := parseVariable(e.Measured)
		if err != nil {
			switch text := strings.TrimRight(string(e.Measured), "\x00"); {
			case text == actionDebug:
				s.debug = true
			case text == actionDMA:
				s.dma = true
			default:
				return nil, refusePCR(ReasonUnexplained, 7, "event %d: neither a variable nor a known text", e.Index)
			}
			continue
		}
		if err := s.variable(v, separated); err != nil {
			return nil, err
		}
	}
	if !separated {
		return nil, refusePCR(ReasonUnexplained, 7, "no separator among %d events", len(events))
	}
	return s, nil
}

func (s *secureBoot) variable(v *variable, separated bool) error {
	known := v.is(guidGlobal, "SecureBoot") || v.is(guidGlobal, "PK") || v.is(guidGlobal, "KEK") ||
		v.is(guidSecurity, "db") || v.is(guidSecurity, "dbx")
	switch {
	case known && !separated && s.variables[v.Name] == nil:
		s.variables[v.Name] = v
	case v.is(guidSecurity, "db") && s.variables["db"] != nil:
		// the database is measured once; then its name stands for its entries
		s.authorities = append(s.authorities, authorityID(v.Data))
	case known:
		// root can measure a second, better one after the boot
		return refusePCR(ReasonUnexplained, 7, "variable %s for a second time, or too late", v.Name)
	case v.is(guidShim, "SbatLevel"), v.is(guidShim, "MokListTrusted"):
		// shim's own state: which versions it refuses, and whether it is asked at all
	case !separated && v.GUID == guidGlobal, !separated && v.GUID == guidSecurity:
		// AuditMode, DeployedMode, SetupMode, dbt, dbr: say nothing that is used here
	default:
		s.authorities = append(s.authorities, authorityID(v.Data))
	}
	return nil
}

// authorityID names what an image was verified with: SHA-256 of the
// certificate, with or without the owner's GUID before it (firmware writes it,
// shim does not), the digest if the image itself is listed, else SHA-256 of the
// data.
func authorityID(data []byte) string {
	const owner = 16
	certificate := func(b []byte) bool {
		return len(b) > 4 && b[0] == 0x30 && b[1] == 0x82 && int(b[2])<<8+int(b[3])+4 == len(b)
	}
	switch {
	case certificate(data):
	case len(data) > owner && certificate(data[owner:]):
		data = data[owner:]
	case len(data) == owner+SHA256.Size():
		return FormatDigest(SHA256, data[owner:])
	}
	return FormatDigest(SHA256, SHA256.sum(data))
}

func (s *secureBoot) on() error {
	v := s.variables["SecureBoot"]
	if v == nil {
		return refusePCR(ReasonNoEvidence, 7, "SecureBoot was not measured")
	}
	if !bytes.Equal(v.Data, []byte{1}) {
		return refusePCR(ReasonSecureBootOff, 7, "SecureBoot is %x", v.Data)
	}
	if pk := s.variables["PK"]; pk == nil || len(pk.Data) == 0 {
		return refusePCR(ReasonSecureBootOff, 7, "there is no platform key")
	}
	return nil
}

// used: Secure Boot being on says nothing about a kernel that was started past
// it (QEMU's -kernel with the firmware of 2022 does that): something must have
// been verified, all of it with an authority that is allowed, and a known
// program must have run.
func (s *secureBoot) used(p *Policy, b *Boot) error {
	if err := s.on(); err != nil {
		return err
	}
	if len(s.authorities) == 0 {
		return refusePCR(ReasonUnused, 7, "nothing that was booted was verified")
	}
	for _, id := range s.authorities {
		if !slices.Contains(p.Authorities, id) {
			return refusePCR(ReasonAuthority, 7, "%s verified what was booted", id)
		}
	}
	if n, _ := bootApplications(p, b); n == 0 {
		return refusePCR(ReasonUnused, 4, "no authorised program was started")
	}
	return nil
}

// entries compares a signature database with what is allowed: every entry must
// be, and there must be one.
func (s *secureBoot) entries(name string, allowed []string, reason Reason) error {
	list, err := s.database(name)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return refusePCR(reason, 7, "%s is empty", name)
	}
	for _, id := range list {
		if !slices.Contains(allowed, id) {
			return refusePCR(reason, 7, "%s holds %s", name, id)
		}
	}
	return nil
}

func (s *secureBoot) database(name string) ([]string, error) {
	v := s.variables[name]
	if v == nil {
		return nil, refusePCR(ReasonNoEvidence, 7, "%s was not measured", name)
	}
	signatures, err := parseSignatures(v.Data)
	if err != nil {
		return nil, err
	}
	var out []string
	for i := range signatures {
		out = append(out, signatures[i].id())
	}
	return out, nil
}

func (s *secureBoot) revoked(required []string) error {
	list, err := s.database("dbx")
	if err != nil {
		return err
	}
	have := make(map[string]bool, len(list))
	for _, id := range list {
		have[id] = true
	}
	if len(required) == 0 {
		return refusePCR(ReasonNoEvidence, 7, "the policy does not say what must be revoked")
	}
	for _, id := range required {
		if !have[id] {
			return refusePCR(ReasonDBX, 7, "%s is not revoked; dbx has %d entries", id, len(list))
		}
	}
	return nil
}

func (s *secureBoot) debugOff() error {
	if s.debug {
		return refusePCR(ReasonDebug, 7, "%s", actionDebug)
	}
	if s.dma {
		return refusePCR(ReasonDMA, 7, "%s", actionDMA)
	}
	return nil
}
