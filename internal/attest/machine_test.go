package attest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"ringwall/internal/errs"
)

// machine is a host with Secure Boot and a unified kernel image, made of the
// events that its firmware and kernel measure.
type machine struct {
	events []event
	user   []byte
	ima    *imaList
	files  []string // path, content, path, content, …
	clock  Clock
}

// event is one measurement: digest of data, or of content where that is set.
type event struct {
	pcr           int
	kind          EventType
	data, content []byte
}

func wide(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// guidBytes is the inverse of guid.String.
func guidBytes(s string) []byte {
	var a uint32
	var b, c uint16
	var d []byte
	if _, err := fmt.Sscanf(s[:18], "%08x-%04x-%04x", &a, &b, &c); err != nil {
		panic(err)
	}
	if _, err := fmt.Sscanf(s[19:23]+s[24:], "%x", &d); err != nil {
		panic(err)
	}
	le := binary.LittleEndian
	return append(le.AppendUint16(le.AppendUint16(le.AppendUint32(nil, a), b), c), d...)
}

func variableData(guid, name string, data []byte) []byte {
	le := binary.LittleEndian
	b := guidBytes(guid)
	b = le.AppendUint64(b, uint64(len(name)))
	b = le.AppendUint64(b, uint64(len(data)))
	return append(append(b, wide(name)...), data...)
}

func certificate(name string) []byte {
	body := []byte("certificate of " + name)
	return append([]byte{0x30, 0x82, 0, byte(len(body))}, body...)
}

func signatureList(kind string, entries ...[]byte) []byte {
	size := 16 + len(entries[0])
	le := binary.LittleEndian
	b := le.AppendUint32(guidBytes(kind), uint32(28+size*len(entries)))
	b = le.AppendUint32(le.AppendUint32(b, 0), uint32(size))
	for _, e := range entries {
		b = append(append(b, make([]byte, 16)...), e...)
	}
	return b
}

func revokedHash(i int) []byte { return SHA256.sum([]byte{byte(i)}) }

func config(name string, data []byte) event {
	g := guidGlobal
	if name == "db" || name == "dbx" {
		g = guidSecurity
	}
	return event{pcr: 7, kind: EventVariableConfig, data: variableData(g, name, data)}
}

func authority(cert []byte) event {
	return event{pcr: 7, kind: EventVariableAuthority, data: variableData(guidSecurity, "db", append(make([]byte, 16), cert...))}
}

func program(name string) event {
	return event{pcr: 4, kind: EventApplication, data: []byte("a device path"), content: []byte(name)}
}

func separator(pcr int) event { return event{pcr: pcr, kind: EventSeparator, data: make([]byte, 4)} }

func section(name, content string) []event {
	return []event{
		{pcr: 11, kind: EventIPL, data: wide(name + "\x00"), content: []byte(name + "\x00")},
		{pcr: 11, kind: EventIPL, data: wide(name + "\x00"), content: []byte(content)},
	}
}

const policyPath = "/etc/ringwall/policy.yaml"

func newMachine() *machine {
	m := &machine{clock: Clock{Milliseconds: 1000, Resets: 7, Safe: true, Firmware: 0x20191023}}
	m.events = append(m.events,
		event{pcr: 0, kind: EventCRTMVersion, data: wide("1.2\x00")},
		event{pcr: 0, kind: EventFirmwareBlob2, data: []byte("address and length"), content: []byte("firmware 1.2")},
		config("SecureBoot", []byte{1}),
		config("PK", signatureList(guidX509, certificate("owner"))),
		config("KEK", signatureList(guidX509, certificate("kek"))),
		config("db", signatureList(guidX509, certificate("builds"))),
		config("dbx", signatureList(guidSHA256, revokedHash(1), revokedHash(2), revokedHash(3))),
		event{pcr: 4, kind: EventEFIAction, data: []byte("Calling EFI Application from Boot Option")},
	)
	for pcr := range 8 {
		m.events = append(m.events, separator(pcr))
	}
	m.events = append(m.events, authority(certificate("builds")), program("signed image"))
	for _, s := range [][2]string{{".linux", "kernel"}, {".osrel", "Debian"}, {".cmdline", "root=/dev/vda1 lockdown=integrity"}, {".initrd", "initrd"}} {
		m.events = append(m.events, section(s[0], s[1])...)
	}
	m.events = append(m.events, event{pcr: 5, kind: EventEFIAction, data: []byte("Exit Boot Services Returned with Success")})
	m.files = []string{"/usr/bin/true", "true", policyPath, "policy 5", "/usr/bin/cat", "cat"}
	return m
}

// raw is the log with digests of two banks.
func (m *machine) raw() []byte {
	le := binary.LittleEndian
	spec := append([]byte(specIDHeader), make([]byte, 8)...)
	spec = le.AppendUint32(spec, 2)
	for _, a := range []Alg{SHA256, SHA384} {
		spec = le.AppendUint16(le.AppendUint16(spec, uint16(a)), uint16(a.Size()))
	}
	spec = append(spec, 0)
	b := slices.Concat(make([]byte, 4), le.AppendUint32(nil, uint32(EventNoAction)), make([]byte, 20), field(spec))
	for _, e := range m.events {
		content := e.content
		if content == nil {
			content = e.data
		}
		b = le.AppendUint32(le.AppendUint32(le.AppendUint32(b, uint32(e.pcr)), uint32(e.kind)), 2)
		for _, a := range []Alg{SHA256, SHA384} {
			b = append(le.AppendUint16(b, uint16(a)), a.sum(content)...)
		}
		b = append(b, field(e.data)...)
	}
	return b
}

// list is the IMA list, made once.
func (m *machine) list(t testing.TB) *imaList {
	if m.ima == nil {
		m.ima = &imaList{digestSize: SHA1Size}
		boot := leadsTo(mustParseLog(t, m.raw()), SHA256)
		m.ima.add("ima-ng", false, ng("sha256", SHA256.sum(boot.Values[:10]...), bootAggregate))
		for i := 0; i < len(m.files); i += 2 {
			m.ima.file(m.files[i], m.files[i+1])
		}
	}
	return m.ima
}

func (m *machine) bank(t testing.TB) *Bank {
	b := leadsTo(mustParseLog(t, m.raw()), SHA256)
	user, err := ParseUserspaceLog(m.user)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range user.Events {
		b.Extend(u.PCR, u.Digests[SHA256])
	}
	l := m.list(t)
	b.Values[pcrIMA] = l.pcr(len(l.extended))
	return b
}

// memory is a store of challenges.
type memory struct {
	sync.Mutex
	open map[string]Challenge
}

func (m *memory) PutChallenge(c Challenge) error {
	m.Lock()
	defer m.Unlock()
	if _, there := m.open[string(c.Nonce)]; there {
		return errs.Conflict
	}
	if m.open == nil {
		m.open = map[string]Challenge{}
	}
	m.open[string(c.Nonce)] = c
	return nil
}

func (m *memory) TakeChallenge(nonce []byte) (Challenge, error) {
	m.Lock()
	defer m.Unlock()
	c, there := m.open[string(nonce)]
	if !there {
		return c, errs.NotFound
	}
	delete(m.open, string(nonce))
	return c, nil
}

// catalogue is a set of contents.
type catalogue struct {
	name  string
	known map[string]bool
}

func newCatalogue(contents ...string) *catalogue {
	c := &catalogue{name: "sha256:" + hexText(SHA256.sum([]byte(fmt.Sprint(contents)))), known: map[string]bool{}}
	for _, s := range contents {
		c.known[string(SHA256.sum([]byte(s)))] = true
	}
	return c
}

func (c *catalogue) Knows(alg string, digest []byte, verity bool) bool {
	return alg == "sha256" && !verity && c.known[string(digest)]
}
func (c *catalogue) Names() []string { return []string{c.name} }

func sha(content string) string { return FormatDigest(SHA256, SHA256.sum([]byte(content))) }

// goodPolicy accepts newMachine and nothing else.
func goodPolicy(t testing.TB) *Policy {
	t.Helper()
	one := func(b []byte) []string { return []string{FormatDigest(SHA256, SHA256.sum(b))} }
	p := Policy{
		Format: PolicyFormat, Name: "servers", Version: 3, Bank: "sha256",
		EKBases: []Basis{BasisVendorCA}, PK: one(certificate("owner")), KEK: one(certificate("kek")), DB: one(certificate("builds")),
		DBX: []string{FormatDigest(SHA256, revokedHash(1)), FormatDigest(SHA256, revokedHash(2))}, Authorities: one(certificate("builds")),
		BootApplications: []string{sha("signed image")},
		UKI: []Section{
			{".linux", []string{sha("kernel")}},
			{".osrel", []string{sha("Debian")}},
			{".cmdline", []string{sha("root=/dev/vda1 lockdown=integrity")}},
			{".initrd", []string{sha("initrd")}},
		},
		CommandLine:  Cmdline{Allow: []string{"root=*", "quiet", "/vmlinuz-*"}, Require: []string{"lockdown=integrity"}},
		PolicyRecord: Record{Path: policyPath, Digests: []string{sha("policy 4"), sha("policy 5")}},
	}
	boot := leadsTo(mustParseLog(t, newMachine().raw()), SHA256)
	profile := Profile{Name: "firmware 1.2"}
	for i := range 4 {
		profile.PCRs = append(profile.PCRs, PCRValue{i, FormatDigest(SHA256, boot.Values[i])})
	}
	p.Firmware = []Profile{profile}
	return reparse(t, &p)
}

func reparse(t testing.TB, p *Policy) *Policy {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	out, err := ParsePolicy(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var noon = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// input is an honest answer of the machine, signed by a TPM that we play.
func (m *machine) input(t testing.TB, f *forger) *Input {
	t.Helper()
	c := Challenge{
		Nonce: bytes.Repeat([]byte{9}, NonceSize), Host: "h1", AKName: f.ak.Name(), Key: SHA256.sum([]byte("key")), Bank: "sha256", Issued: noon,
	}
	bank := m.bank(t)
	ev := Evidence{
		AK: f.ak.Public, Bank: "sha256", PCRs: bank.Values[:], EventLog: m.raw(), UserspaceLog: m.user, IMA: m.list(t).Bytes(), Claims: []byte(`{"agent":"1"}`),
	}
	ev.Quote = f.sign(f.quote(c.Qualifying(ev.Claims), bank, m.clock))
	return &Input{
		Enrolled: Enrolled{Host: "h1", AKName: f.ak.Name(), Basis: BasisVendorCA}, Challenge: c, Evidence: ev,
		Policy: goodPolicy(t), Catalogues: newCatalogue("true", "cat"), Now: noon,
	}
}
