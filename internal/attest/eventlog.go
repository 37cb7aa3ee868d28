package attest

import (
	"bytes"
	"fmt"
)

// EventType is the type of a boot event. It is a claim: no digest covers it,
// so nothing may be believed because of it alone.
type EventType uint32

// Event types of the TCG PC Client Platform Firmware Profile, table 27.
const (
	EventPostCode          EventType = 0x1
	EventNoAction          EventType = 0x3
	EventSeparator         EventType = 0x4
	EventAction            EventType = 0x5
	EventTag               EventType = 0x6
	EventCRTMVersion       EventType = 0x8
	EventIPL               EventType = 0xd
	EventVariableConfig    EventType = 0x80000001
	EventVariableBoot      EventType = 0x80000002
	EventApplication       EventType = 0x80000003
	EventBootDriver        EventType = 0x80000004
	EventRuntimeDriver     EventType = 0x80000005
	EventGPT               EventType = 0x80000006
	EventEFIAction         EventType = 0x80000007
	EventFirmwareBlob      EventType = 0x80000008
	EventHandoffTables     EventType = 0x80000009
	EventFirmwareBlob2     EventType = 0x8000000a
	EventHandoffTables2    EventType = 0x8000000b
	EventVariableBoot2     EventType = 0x8000000c
	EventHCRTM             EventType = 0x80000010
	EventVariableAuthority EventType = 0x800000e0
)

// String gives the profile's name of the type.
func (t EventType) String() string {
	switch t {
	case EventPostCode:
		return "EV_POST_CODE"
	case EventNoAction:
		return "EV_NO_ACTION"
	case EventSeparator:
		return "EV_SEPARATOR"
	case EventAction:
		return "EV_ACTION"
	case EventTag:
		return "EV_EVENT_TAG"
	case EventCRTMVersion:
		return "EV_S_CRTM_VERSION"
	case EventIPL:
		return "EV_IPL"
	case EventVariableConfig:
		return "EV_EFI_VARIABLE_DRIVER_CONFIG"
	case EventVariableBoot:
		return "EV_EFI_VARIABLE_BOOT"
	case EventApplication:
		return "EV_EFI_BOOT_SERVICES_APPLICATION"
	case EventBootDriver:
		return "EV_EFI_BOOT_SERVICES_DRIVER"
	case EventRuntimeDriver:
		return "EV_EFI_RUNTIME_SERVICES_DRIVER"
	case EventGPT:
		return "EV_EFI_GPT_EVENT"
	case EventEFIAction:
		return "EV_EFI_ACTION"
	case EventFirmwareBlob:
		return "EV_EFI_PLATFORM_FIRMWARE_BLOB"
	case EventHandoffTables:
		return "EV_EFI_HANDOFF_TABLES"
	case EventFirmwareBlob2:
		return "EV_EFI_PLATFORM_FIRMWARE_BLOB2"
	case EventHandoffTables2:
		return "EV_EFI_HANDOFF_TABLES2"
	case EventVariableBoot2:
		return "EV_EFI_VARIABLE_BOOT2"
	case EventHCRTM:
		return "EV_EFI_HCRTM_EVENT"
	case EventVariableAuthority:
		return "EV_EFI_VARIABLE_AUTHORITY"
	}
	return fmt.Sprintf("event(%#x)", uint32(t))
}

// Bounds of a log. The largest that a PC is known to write is some 200 KiB and
// 300 events; firmware allots at most a few MiB.
const (
	MaxLog       = 16 << 20
	maxEvents    = 1 << 16
	maxEventData = 4 << 20
	maxAlgs      = 8
)

// RawEvent is one record of a log: claims of the host. The slices alias the
// log's bytes.
type RawEvent struct {
	Index   int // position in the log; the header is 0
	PCR     int // -1: none, an event that extends nothing
	Type    EventType
	Data    []byte
	digests [maxAlgs]taggedDigest
	count   int
}

type taggedDigest struct {
	alg Alg
	sum []byte
}

// Digest returns the claimed digest of one algorithm, or nil.
func (e *RawEvent) Digest(a Alg) []byte {
	for _, d := range e.digests[:e.count] {
		if d.alg == a {
			return d.sum
		}
	}
	return nil
}

// Log is a parsed event log. Nothing in it is to be believed before Replay.
type Log struct {
	Algs   []Alg // the banks that the log is about
	Events []RawEvent
	// Locality from which the TPM was started, and PCR 0's first value: a
	// claim that a replay confirms.
	Locality byte
}

const specIDHeader = "Spec ID Event03\x00"

// ParseLog reads a firmware event log in the crypto-agile format (TCG PC
// Client Platform Firmware Profile, section 10.4), or, where it does not begin
// with that format's header, in the SHA-1 format of TPM 1.2. It reads to the
// exact end: bytes that are no whole event are an error. The log is bounded
// (MaxLog); the result aliases b.
func ParseLog(b []byte) (*Log, error) {
	if len(b) > MaxLog {
		return nil, tooLarge("event log of %d bytes (at most %d)", len(b), MaxLog)
	}
	c := littleEndian(b)
	first, err := parseLegacyEvent(&c, 0)
	if err != nil {
		return nil, err
	}
	if first.PCR != 0 || first.Type != EventNoAction || !bytes.HasPrefix(first.Data, []byte(specIDHeader)) {
		return parseLegacyLog(b)
	}
	if !allZero(first.Digest(SHA1)) {
		return nil, malformed("event log: the header has a digest")
	}
	l := &Log{}
	sizes, err := parseSpecID(first.Data)
	if err != nil {
		return nil, err
	}
	for _, s := range sizes {
		l.Algs = append(l.Algs, s.alg)
	}
	for i := 1; len(c.b) > 0; i++ {
		if i > maxEvents {
			return nil, tooLarge("event log of more than %d events", maxEvents)
		}
		e, err := parseEvent(&c, i, sizes)
		if err != nil {
			return nil, err
		}
		l.Events = append(l.Events, e)
	}
	return l, l.startupLocality()
}

type algSize struct {
	alg  Alg
	size uint16
}

// parseSpecID reads TCG_EfiSpecIdEvent. Algorithms that we cannot compute are
// kept with the size that the header gives, so that their digests can be
// stepped over.
func parseSpecID(data []byte) ([]algSize, error) {
	c := littleEndian(data[len(specIDHeader):])
	c.bytes(4 + 1 + 1 + 1 + 1) // platform class, minor, major, errata, size of UINTN
	n := c.u32()
	if c.short || n == 0 || n > maxAlgs {
		return nil, malformed("event log: header names %d algorithms (1 to %d)", n, maxAlgs)
	}
	var sizes []algSize
	for range n {
		s := algSize{alg: Alg(c.u16()), size: c.u16()}
		known := s.alg.Size()
		if s.size == 0 || s.size > 64 || (known != 0 && int(s.size) != known) {
			return nil, malformed("event log: header gives %v %d bytes", s.alg, s.size)
		}
		for _, before := range sizes {
			if before.alg == s.alg {
				return nil, malformed("event log: header names %v twice", s.alg)
			}
		}
		sizes = append(sizes, s)
	}
	c.bytes(uint64(c.u8())) // the vendor's information
	if !c.done() {
		return nil, malformed("event log: header of %d bytes does not end where it says", len(data))
	}
	return sizes, nil
}

// parseHead reads PCR and type. Only an event that extends nothing may name a
// PCR that does not exist (old firmware writes 0xffffffff there).
func parseHead(c *cursor, index int) (RawEvent, error) {
	pcr, typ := c.u32(), EventType(c.u32())
	switch {
	case pcr < NumPCRs:
		return RawEvent{Index: index, PCR: int(pcr), Type: typ}, nil
	case typ == EventNoAction:
		return RawEvent{Index: index, PCR: -1, Type: typ}, nil
	}
	return RawEvent{}, malformed("event %d: PCR %d", index, pcr)
}

func parseEvent(c *cursor, index int, sizes []algSize) (RawEvent, error) {
	e, err := parseHead(c, index)
	if err != nil {
		return e, err
	}
	n := c.u32()
	if c.short || int64(n) != int64(len(sizes)) {
		return e, malformed("event %d: %d digests (the header names %d)", index, n, len(sizes))
	}
	for range n {
		alg := Alg(c.u16())
		var size uint16
		for _, s := range sizes {
			if s.alg == alg {
				size = s.size
			}
		}
		if size == 0 || e.Digest(alg) != nil {
			return e, malformed("event %d: a digest of %v that the header does not name, or a second one", index, alg)
		}
		e.digests[e.count] = taggedDigest{alg, c.bytes(uint64(size))}
		e.count++
	}
	err = e.readData(c, index)
	return e, err
}

// readData reads what both forms of an event end with.
func (e *RawEvent) readData(c *cursor, index int) error {
	size := c.u32()
	if size > maxEventData {
		return tooLarge("event %d: %d bytes of data (at most %d)", index, size, maxEventData)
	}
	e.Data = c.bytes(uint64(size))
	if c.short {
		return malformed("event %d: the log ends within it", index)
	}
	return nil
}

// parseLegacyEvent reads a TCG_PCClientPCREvent.
func parseLegacyEvent(c *cursor, index int) (RawEvent, error) {
	e, err := parseHead(c, index)
	if err != nil {
		return e, err
	}
	e.digests[0], e.count = taggedDigest{SHA1, c.bytes(SHA1Size)}, 1
	err = e.readData(c, index)
	return e, err
}

func parseLegacyLog(b []byte) (*Log, error) {
	l := &Log{Algs: []Alg{SHA1}}
	c := littleEndian(b)
	for i := 0; len(c.b) > 0; i++ {
		if i > maxEvents {
			return nil, tooLarge("event log of more than %d events", maxEvents)
		}
		e, err := parseLegacyEvent(&c, i)
		if err != nil {
			return nil, err
		}
		l.Events = append(l.Events, e)
	}
	return l, nil
}

// startupLocality finds the event that says what PCR 0 started from (profile,
// section 10.4.5.3). Only 0, 3 and 4 exist, at most once, before PCR 0 was
// extended for the first time.
func (l *Log) startupLocality() error {
	const signature = "StartupLocality\x00"
	seen, extended := false, false
	for i := range l.Events {
		e := &l.Events[i]
		if e.PCR != 0 {
			continue
		}
		if e.Type != EventNoAction {
			extended = true
			continue
		}
		if !bytes.HasPrefix(e.Data, []byte(signature)) {
			continue
		}
		if len(e.Data) != len(signature)+1 || seen || extended {
			return malformed("event %d: a startup locality of %d bytes, a second one, or one that comes late", e.Index, len(e.Data))
		}
		seen = true
		switch v := e.Data[len(signature)]; v {
		case 0, 3, 4:
			l.Locality = v
		default:
			return malformed("event %d: startup locality %d", e.Index, v)
		}
	}
	return nil
}
