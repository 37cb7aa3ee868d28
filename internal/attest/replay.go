package attest

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"ringwall/internal/errs"
)

// Event is an event of a log that led to the quoted values: its digest is
// what the TPM was extended with, at this place in the order of its PCR.
//
// The type is still a claim. Whoever decides because of an event must account
// for every event of that PCR, whatever its type says, or an event that is
// renamed would disappear.
type Event struct {
	Index  int // position in its log
	PCR    int
	Type   EventType
	Digest []byte
	// Measured is the part of the event's data from which the digest was
	// recomputed, and nil for every other event: firmware volumes, option
	// ROMs, tables and programs are measured by their content, and what the
	// log tells of them (addresses, device paths, names) is nobody's word.
	Measured []byte
	// Userspace: the event was logged by the running system, not by firmware
	// or boot loader.
	Userspace bool
}

// Boot is the part of the evidence that the quoted PCRs confirm.
type Boot struct {
	Alg    Alg
	Events []Event
	Quoted *Bank
	// Firmware is the bank when the kernel took over: what the firmware's log
	// alone leads to, which is where the kernel's boot_aggregate comes from.
	Firmware *Bank

	user   []byte      // SHA-256 of the userspace log
	secure *secureBoot // what PCR 7 says, or
	unsure error       // why it says nothing
}

// In yields the events of one PCR in order.
func (b *Boot) In(pcr int) []*Event {
	var out []*Event
	for i := range b.Events {
		if b.Events[i].PCR == pcr {
			out = append(out, &b.Events[i])
		}
	}
	return out
}

// LeadsTo computes what a log makes of the power-on values: where a machine
// would be that wrote it honestly. errs.NotFound: the log is not about the bank.
func (l *Log) LeadsTo(a Alg) (*Bank, error) {
	if a.Size() == 0 || !slices.Contains(l.Algs, a) {
		return nil, fmt.Errorf("event log without %v digests: %w", a, errs.NotFound)
	}
	b := PowerOn(a, l.Locality)
	for i := range l.Events {
		if e := &l.Events[i]; e.Type != EventNoAction {
			b.Extend(e.PCR, e.Digest(a))
		}
	}
	return b, nil
}

// Replay compares the logs with the values that a TPM quoted. Every PCR of the
// bank must be what its events make of the power-on value; a PCR without
// events must still hold that value. The only exceptions are the PCRs in
// unlogged, of which then nothing is known: PCR 16 and 23 can be reset and
// extended by anyone and are of no use as evidence.
//
// PCR 10 is left to the IMA list: the caller hands it to ReplayIMA, which
// starts from Firmware.
//
// It fails with ReasonPCRReplay and the number of the PCR.
func Replay(log *Log, user *UserspaceLog, quoted *Bank, unlogged []int) (*Boot, error) {
	a := quoted.Alg
	if !slices.Contains(log.Algs, a) {
		return nil, refuse(ReasonPCRReplay, "the event log has no %s digests", a)
	}
	boot := &Boot{Alg: a, Quoted: quoted}
	now := PowerOn(a, log.Locality)
	for i := range log.Events {
		raw := &log.Events[i]
		if raw.Type == EventNoAction {
			continue
		}
		d := raw.Digest(a)
		now.Extend(raw.PCR, d)
		boot.Events = append(boot.Events, Event{
			Index: raw.Index, PCR: raw.PCR, Type: raw.Type, Digest: d, Measured: measured(a, raw.Type, d, raw.Data),
		})
	}
	boot.Firmware = now.Clone()
	if user != nil {
		for _, u := range user.Events {
			d := u.Digests[a]
			if d == nil || u.PCR == pcrIMA {
				return nil, refusePCR(ReasonPCRReplay, u.PCR, "entry %d of the userspace log has no %s digest, or is the kernel's", u.Index, a)
			}
			now.Extend(u.PCR, d)
			e := Event{Index: u.Index, PCR: u.PCR, Type: EventAction, Digest: d, Userspace: true}
			if bytes.Equal(a.sum([]byte(u.Text)), d) {
				e.Measured = []byte(u.Text)
			}
			boot.Events = append(boot.Events, e)
		}
	}
	boot.addPhases(now)
	for pcr := range NumPCRs {
		if pcr == pcrIMA || slices.Contains(unlogged, pcr) || bytes.Equal(now.Values[pcr], quoted.Values[pcr]) {
			continue
		}
		return nil, refusePCR(ReasonPCRReplay, pcr, "the log's %d events lead to %x, the TPM quotes %x", len(boot.In(pcr)), now.Values[pcr], quoted.Values[pcr])
	}
	boot.Events = slices.DeleteFunc(boot.Events, func(e Event) bool { return slices.Contains(unlogged, e.PCR) })
	boot.secure, boot.unsure = readSecureBoot(boot)
	return boot, nil
}

// phases are the words that systemd-pcrphase extends PCR 11 with, in their
// order (systemd-pcrphase.service(8)). Before systemd 255 it wrote no log.
func phases() []string {
	return []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}
}

// addPhases explains PCR 11 by a run of phases that nobody logged, where that
// gives exactly the quoted value: their digests are computed here, so there is
// nothing to believe.
func (b *Boot) addPhases(now *Bank) {
	words := phases()
	for from := range words {
		v := now.Values[pcrUKI]
		for to := from; to < len(words); to++ {
			v = b.Alg.sum(v, b.Alg.sum([]byte(words[to])))
			if !bytes.Equal(v, b.Quoted.Values[pcrUKI]) {
				continue
			}
			for _, w := range words[from : to+1] {
				b.Events = append(b.Events, Event{
					PCR: pcrUKI, Type: EventAction, Digest: b.Alg.sum([]byte(w)), Measured: []byte(w), Userspace: true,
				})
			}
			now.Values[pcrUKI] = v
			return
		}
	}
}

// measured returns the part of data that the digest was made of, or nil.
//
// The forms, from the PC Client Platform Firmware Profile (section 10.4) and
// from what firmware and loaders really do:
//
//   - the whole of the data: variables of PCR 7 and their authorities,
//     separators, actions, versions, partition tables, and much of the rest;
//   - a variable's content without its name: EV_EFI_VARIABLE_BOOT;
//   - all but the last byte: authorities that shim before 15.3 logs;
//   - a text without its final NUL: GRUB, systemd-boot, older action events;
//   - the same behind GRUB's label ("grub_cmd: ", "kernel_cmdline: ", ...): the
//     label itself is then not covered;
//   - a section's name in ASCII with its NUL, logged in UTF-16: systemd-stub.
func measured(a Alg, t EventType, digest, data []byte) []byte {
	is := func(b []byte) bool { return bytes.Equal(a.sum(b), digest) }
	if is(data) {
		// never nil, also for no data
		return append([]byte{}, data...)
	}
	switch t {
	case EventVariableBoot, EventVariableBoot2, EventVariableConfig, EventVariableAuthority:
		if v, err := parseVariable(data); err == nil && is(v.Data) {
			return v.Data
		}
		if n := len(data) - 1; n > 0 && is(data[:n]) {
			return data[:n:n]
		}
	case EventIPL, EventTag, EventAction, EventEFIAction, EventPostCode:
		text := bytes.TrimSuffix(data, []byte{0})
		if is(text) {
			return text
		}
		for _, label := range []string{": ", " "} {
			if _, rest, found := bytes.Cut(text, []byte(label)); found && is(rest) {
				return rest
			}
		}
		if wide, ok := decodeUTF16(data); ok {
			if name := append([]byte(strings.TrimRight(wide, "\x00")), 0); is(name) {
				return name
			}
		}
	}
	return nil
}

// decodeUTF16 reads little-endian UTF-16; ok is false for an odd length.
func decodeUTF16(b []byte) (s string, ok bool) {
	if len(b)%2 != 0 {
		return "", false
	}
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = uint16(b[2*i]) | uint16(b[2*i+1])<<8
	}
	return string(utf16.Decode(u)), true
}

// DataText makes an event's data readable: the name of a variable, text in
// ASCII or UTF-16, else its first bytes in hexadecimal.
func DataText(data []byte) string {
	if v, err := parseVariable(data); err == nil && v.Name != "" {
		return fmt.Sprintf("%s, %d bytes", v.Name, len(v.Data))
	}
	printable := func(s string) bool {
		return s != "" && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
	}
	if s := strings.TrimRight(string(data), "\x00"); utf8.ValidString(s) && printable(s) {
		return s
	}
	if s, ok := decodeUTF16(data); ok && printable(strings.TrimRight(s, "\x00")) {
		return strings.TrimRight(s, "\x00")
	}
	const shown = 24
	if len(data) > shown {
		return fmt.Sprintf("%x… (%d bytes)", data[:shown], len(data))
	}
	return hex.EncodeToString(data)
}
