package attest

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

// corpus returns the logs of real machines by name.
func corpus(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/eventlog/*.gz")
	if err != nil || len(paths) == 0 {
		t.Fatal("no logs", err)
	}
	out := map[string][]byte{}
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		out[strings.TrimSuffix(filepath.Base(p), ".bin.gz")] = b
	}
	return out
}

func mustParseLog(t testing.TB, b []byte) *Log {
	t.Helper()
	l, err := ParseLog(b)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func leadsTo(l *Log, a Alg) *Bank {
	b, err := l.LeadsTo(a)
	if err != nil {
		panic(err)
	}
	return b
}

// encode writes a log's events behind the header of raw.
func encode(raw []byte, events []RawEvent) []byte {
	le := binary.LittleEndian
	out := bytes.Clone(raw[:32+le.Uint32(raw[28:])])
	for i := range events {
		e := &events[i]
		out = le.AppendUint32(out, uint32(e.PCR))
		out = le.AppendUint32(out, uint32(e.Type))
		out = le.AppendUint32(out, uint32(e.count))
		for _, d := range e.digests[:e.count] {
			out = append(le.AppendUint16(out, uint16(d.alg)), d.sum...)
		}
		out = append(le.AppendUint32(out, uint32(len(e.Data))), e.Data...)
	}
	return out
}

// The values were recorded on the machines that wrote the logs.
func TestReplay_recorded(t *testing.T) {
	logs := corpus(t)
	text, err := os.ReadFile("testdata/eventlog/pcrs.json")
	if err != nil {
		t.Fatal(err)
	}
	var recorded map[string]map[string]map[string]string
	if err := json.Unmarshal(text, &recorded); err != nil {
		t.Fatal(err)
	}
	compared := 0
	for name, banks := range recorded {
		log := mustParseLog(t, logs[strings.TrimSuffix(name, ".bin")])
		for algName, pcrs := range banks {
			a, err := ParseAlg(algName)
			if err != nil {
				t.Fatal(err)
			}
			got := leadsTo(log, a)
			quoted := got.Clone()
			for pcr, want := range pcrs {
				i, _ := strconv.Atoi(pcr)
				if quoted.Values[i], err = hex.DecodeString(want); err != nil {
					t.Fatal(err)
				}
				compared++
			}
			boot, err := Replay(log, nil, quoted, nil)
			if err != nil {
				t.Errorf("%s, %s: %v", name, a, err)
				continue
			}
			covered := 0
			for _, e := range boot.Events {
				if e.Measured != nil {
					covered++
				}
			}
			t.Logf("%-34s %-6s %3d events, %3d with data that the digest covers, locality %d", name, a, len(boot.Events), covered, log.Locality)
			if covered == 0 {
				t.Errorf("%s: no event's data could be recomputed", name)
			}
		}
	}
	if compared < 200 {
		t.Errorf("only %d values were compared", compared)
	}
}

// tpm2_eventlog ignores the startup locality, so it is no judge of PCR 0 there.
func TestParseLog_tpm2Tools(t *testing.T) {
	tool, err := exec.LookPath("tpm2_eventlog")
	if err != nil {
		t.Skip("SKIP: no tpm2_eventlog here")
	}
	value := regexp.MustCompile(`^ +([0-9]+) *: 0x([0-9a-f]+)$`)
	compared := 0
	for name, raw := range corpus(t) {
		if name == "short_no_action_eventlog" {
			continue // a log without events
		}
		log := mustParseLog(t, raw)
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(tool, path).Output()
		if err != nil {
			t.Logf("%s: tpm2_eventlog cannot read it: %v", name, err)
			continue
		}
		_, pcrs, found := strings.Cut(string(out), "\npcrs:\n")
		if !found {
			t.Errorf("%s: tpm2_eventlog gives no PCRs", name)
			continue
		}
		var bank *Bank
		for line := range strings.SplitSeq(pcrs, "\n") {
			if a, err := ParseAlg(strings.TrimSuffix(strings.TrimSpace(line), ":")); err == nil {
				bank = leadsTo(log, a)
				continue
			}
			m := value.FindStringSubmatch(line)
			if m == nil || bank == nil {
				continue
			}
			i, _ := strconv.Atoi(m[1])
			if i == 0 && log.Locality != 0 {
				continue
			}
			compared++
			if got := hex.EncodeToString(bank.Values[i]); got != m[2] {
				t.Errorf("%s, %s, PCR %d: %s, tpm2_eventlog says %s", name, bank.Alg, i, got, m[2])
			}
		}
	}
	if compared < 300 {
		t.Errorf("only %d values were compared", compared)
	}
	t.Logf("%d values agree", compared)
}

// What other verifiers of event logs let through.
func TestReplay_mutations(t *testing.T) {
	raw := corpus(t)["rhel8-uefi"]
	log := mustParseLog(t, raw)
	if !bytes.Equal(encode(raw, log.Events), raw) {
		t.Fatal("a log does not survive being written again")
	}
	quoted := leadsTo(log, SHA256)
	if _, err := Replay(log, nil, quoted, nil); err != nil {
		t.Fatal(err)
	}
	without := func(drop func(i int, e *RawEvent) bool) []RawEvent {
		events := slices.Clone(log.Events)
		i := -1
		return slices.DeleteFunc(events, func(e RawEvent) bool { i++; return drop(i, &e) })
	}
	last := len(log.Events)
	swapped := slices.Clone(log.Events)
	for i := range swapped[:last-1] {
		if swapped[i].PCR == 7 && swapped[i+1].PCR == 7 {
			swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
			break
		}
	}
	flipped := slices.Clone(log.Events)
	for i := range flipped {
		if flipped[i].Type == EventApplication {
			sum := bytes.Clone(flipped[i].Digest(SHA256))
			sum[0] ^= 1
			for j := range flipped[i].digests {
				if flipped[i].digests[j].alg == SHA256 {
					flipped[i].digests[j].sum = sum
				}
			}
			break
		}
	}
	extra := append(slices.Clone(log.Events), log.Events[last-1])
	hidden := slices.Clone(log.Events)
	for i := range hidden {
		if hidden[i].Type == EventApplication {
			hidden[i].Type = EventNoAction // so that it looks as if it had not been measured
		}
	}
	moved := slices.Clone(log.Events)
	moved[last-1].PCR = 15
	cases := map[string][]RawEvent{
		"last events cut": without(func(i int, _ *RawEvent) bool { return i >= last-3 }),
		"swapped":         swapped, "digest changed": flipped, "event repeated": extra, "hidden as no action": hidden, "moved to another PCR": moved,
		"no events at all": nil,
	}
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14} {
		cases[fmt.Sprintf("all of PCR %d stripped", pcr)] = without(func(_ int, e *RawEvent) bool { return e.PCR == pcr })
	}
	for what, events := range cases {
		bad := mustParseLog(t, encode(raw, events))
		_, err := Replay(bad, nil, quoted, nil)
		wantReason(t, what, err, ReasonPCRReplay)
		var e *Error
		if _, pcr, found := strings.Cut(what, "all of PCR "); found && errors.As(err, &e) && strconv.Itoa(e.PCR)+" stripped" != pcr {
			t.Errorf("%s: names PCR %d", what, e.PCR)
		}
		if !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v is not of the kind Untrusted", what, err)
		}
	}
	// a PCR that was extended without an event, for each that can be
	for pcr := range NumPCRs {
		if pcr == pcrIMA {
			continue
		}
		extended := quoted.Clone()
		extended.Extend(pcr, SHA256.sum([]byte("evil")))
		_, err := Replay(log, nil, extended, nil)
		wantReason(t, fmt.Sprintf("PCR %d extended without an event", pcr), err, ReasonPCRReplay)
		if _, err := Replay(log, nil, extended, []int{pcr}); err != nil {
			t.Errorf("PCR %d is excepted: %v", pcr, err)
		}
	}
	// another machine's log
	other := mustParseLog(t, corpus(t)["ubuntu-2104-no-dbx"])
	_, err := Replay(other, nil, quoted, nil)
	wantReason(t, "another machine's log", err, ReasonPCRReplay)
	// a bank that the log does not have
	_, err = Replay(mustParseLog(t, corpus(t)["debian-10"]), nil, quoted, nil)
	wantReason(t, "SHA-1 log", err, ReasonPCRReplay)
}

// An event's data is shown only where its digest is of that data.
func TestReplay_dataOnlyWhereCovered(t *testing.T) {
	raw := corpus(t)["rhel8-uefi"]
	log := mustParseLog(t, raw)
	quoted := leadsTo(log, SHA256)
	honest, err := Replay(log, nil, quoted, nil)
	if err != nil {
		t.Fatal(err)
	}
	changed, opaque := 0, 0
	for i := range log.Events {
		events := slices.Clone(log.Events)
		e := &events[i]
		if len(e.Data) == 0 || e.Type == EventNoAction {
			continue
		}
		e.Data = bytes.Clone(e.Data)
		e.Data[len(e.Data)/2] ^= 0x20
		boot, err := Replay(mustParseLog(t, encode(raw, events)), nil, quoted, nil)
		if err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
		for j := range boot.Events {
			got, before := boot.Events[j], honest.Events[j]
			if got.Index != e.Index {
				continue
			}
			switch {
			case before.Measured == nil:
				opaque++
				if got.Measured != nil {
					t.Errorf("event %d (%v): changed data became covered", i, e.Type)
				}
			case got.Measured != nil && !bytes.Equal(got.Measured, before.Measured):
				t.Errorf("event %d (%v): changed data is shown as fact", i, e.Type)
			case got.Measured == nil:
				changed++
			}
		}
	}
	if changed < 20 || opaque == 0 {
		t.Errorf("%d events with covered data, %d without", changed, opaque)
	}
	t.Logf("%d events lost their data with it, %d had none to lose", changed, opaque)
}

func TestReplay_startupLocality(t *testing.T) {
	raw := corpus(t)["glinux-alex"]
	log := mustParseLog(t, raw)
	if log.Locality != 3 {
		t.Fatalf("locality %d", log.Locality)
	}
	quoted := leadsTo(log, SHA256)
	for i := range log.Events {
		e := log.Events[i]
		if e.PCR != 0 || !bytes.HasPrefix(e.Data, []byte("StartupLocality\x00")) {
			continue
		}
		// software cannot claim another start than the TPM had
		for _, v := range []byte{0, 4} {
			events := slices.Clone(log.Events)
			events[i].Data = append(bytes.Clone(e.Data[:16]), v)
			_, err := Replay(mustParseLog(t, encode(raw, events)), nil, quoted, nil)
			wantReason(t, "another locality", err, ReasonPCRReplay)
		}
		for what, data := range map[string][]byte{
			"locality 2": append(bytes.Clone(e.Data[:16]), 2), "long": append(bytes.Clone(e.Data), 0), "short": e.Data[:16],
		} {
			events := slices.Clone(log.Events)
			events[i].Data = data
			_, err := ParseLog(encode(raw, events))
			wantReason(t, what, err, ReasonMalformed)
		}
		_, err := ParseLog(encode(raw, append(slices.Clone(log.Events), e)))
		wantReason(t, "twice, and late", err, ReasonMalformed)
		return
	}
	t.Fatal("no such event")
}

func TestParseLog_refuses(t *testing.T) {
	raw := corpus(t)["rhel8-uefi"]
	le := binary.LittleEndian
	header := int(32 + le.Uint32(raw[28:]))
	edit := func(offset int, v uint32) []byte {
		b := bytes.Clone(raw)
		le.PutUint32(b[offset:], v)
		return b
	}
	for what, c := range map[string]struct {
		b    []byte
		want Reason
	}{
		"empty":                   {nil, ReasonMalformed},
		"bytes follow":            {append(bytes.Clone(raw), 0), ReasonMalformed},
		"padding follows":         {append(bytes.Clone(raw), bytes.Repeat([]byte{0xff}, 64)...), ReasonMalformed},
		"a cut":                   {raw[:len(raw)-1], ReasonMalformed},
		"header only in part":     {raw[:20], ReasonMalformed},
		"4 GiB header":            {edit(28, 0xffffffff), ReasonTooLarge},
		"too many algorithms":     {edit(32+24, 0xffffffff), ReasonMalformed},
		"no algorithms":           {edit(32+24, 0), ReasonMalformed},
		"size of an algorithm":    {edit(32+28, uint32(SHA1)|32<<16), ReasonMalformed},
		"algorithm twice":         {edit(32+32, uint32(SHA1)|20<<16), ReasonMalformed},
		"PCR 24":                  {edit(header, 24), ReasonMalformed},
		"4 billion digests":       {edit(header+8, 0xffffffff), ReasonMalformed},
		"no digests":              {edit(header+8, 0), ReasonMalformed},
		"one digest less":         {edit(header+8, 2), ReasonMalformed},
		"4 GiB of data":           {edit(header+12+22+34+50, 0xffffffff), ReasonTooLarge},
		"header with a digest":    {edit(8, 1), ReasonMalformed},
		"a log of 17 MiB":         {make([]byte, 17<<20), ReasonTooLarge},
		"a million tiny events":   {bytes.Repeat(make([]byte, 32), 1<<17), ReasonTooLarge},
		"legacy event that wraps": {append(make([]byte, 28), 0xff, 0xff, 0xff, 0x7f), ReasonTooLarge},
	} {
		_, err := ParseLog(c.b)
		wantReason(t, what, err, c.want)
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v is not of the kind Invalid", what, err)
		}
	}
}

func TestUserspaceLog(t *testing.T) {
	log := mustParseLog(t, corpus(t)["rhel8-uefi"])
	quoted := leadsTo(log, SHA256)
	record := func(pcr int, text string) string {
		return fmt.Sprintf("\x1e{\"pcr\":%d,\"digests\":[{\"hashAlg\":\"sha384\",\"digest\":\"%x\"},{\"hashAlg\":\"sha256\",\"digest\":\"%x\"}],\"content_type\":\"systemd\",\"content\":{\"eventType\":\"phase\",\"string\":%q,\"bootId\":\"x\"}}\n",
			pcr, SHA384.sum([]byte(text)), SHA256.sum([]byte(text)), text)
	}
	extend := func(pcr int, text string) { quoted.Extend(pcr, SHA256.sum([]byte(text))) }
	text := record(11, "enter-initrd") + record(15, "machine-id:abc") + "\x1e{\"nv_index\":30474752,\"digests\":[]}\n" + record(11, "leave-initrd")
	extend(11, "enter-initrd")
	extend(15, "machine-id:abc")
	extend(11, "leave-initrd")
	user, err := ParseUserspaceLog([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	boot, err := Replay(log, user, quoted, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := boot.In(15); len(got) != 1 || string(got[0].Measured) != "machine-id:abc" || !got[0].Userspace {
		t.Errorf("%+v", got)
	}
	// an old systemd extends PCR 11 and logs nothing
	short, err := ParseUserspaceLog([]byte(record(15, "machine-id:abc")))
	if err != nil {
		t.Fatal(err)
	}
	boot, err = Replay(log, short, quoted, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := boot.In(11); len(got) != 2 || string(got[1].Measured) != "leave-initrd" {
		t.Errorf("%+v", got)
	}
	_, err = Replay(log, nil, quoted, nil)
	wantReason(t, "no userspace log", err, ReasonPCRReplay)
	renamed, err := ParseUserspaceLog([]byte(strings.Replace(text, `"machine-id:abc"`, `"machine-id:xyz"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	boot, err = Replay(log, renamed, quoted, nil)
	if err != nil || boot.In(15)[0].Measured != nil {
		t.Errorf("a renamed record: %v, %q", err, boot.In(15)[0].Measured)
	}
	for what, bad := range map[string]string{
		"no JSON": "\x1e{", "no PCR": "\x1e{}", "PCR 24": "\x1e{\"pcr\":24}", "PCR -1": "\x1e{\"pcr\":-1}",
		"short digest": "\x1e{\"pcr\":1,\"digests\":[{\"hashAlg\":\"sha256\",\"digest\":\"00\"}]}",
		"long":         strings.Repeat(" ", maxUserspaceLog+1),
		"many":         strings.Repeat("\x1e{\"pcr\":1}", maxUserspaceEvents+1),
		"deep":         "\x1e" + strings.Repeat("[", 500000),
	} {
		if _, err := ParseUserspaceLog([]byte(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseLog(f *testing.F) {
	for _, raw := range corpus(f) {
		if len(raw) < 20000 {
			f.Add(raw)
		}
	}
	f.Add(encode(corpus(f)["rhel8-uefi"], nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLog(b)
		if err != nil {
			return
		}
		for _, a := range l.Algs {
			if a.Size() == 0 {
				continue
			}
			boot, err := Replay(l, nil, leadsTo(l, a), nil)
			if err != nil {
				t.Errorf("a log does not lead where it leads: %v", err)
				continue
			}
			for i := range boot.Events {
				if v, err := parseVariable(boot.Events[i].Measured); err == nil {
					_, _ = parseSignatures(v.Data)
				}
			}
		}
	})
}

func FuzzParseUserspaceLog(f *testing.F) {
	f.Add([]byte("\x1e{\"pcr\":11,\"digests\":[{\"hashAlg\":\"sha256\",\"digest\":\"00\"}],\"content\":{\"string\":\"x\"}}\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = ParseUserspaceLog(b) })
}

func BenchmarkReplay(b *testing.B) {
	raw := corpus(b)["rhel8-uefi"]
	quoted := leadsTo(mustParseLog(b, raw), SHA256)
	b.ReportAllocs()
	for b.Loop() {
		l, err := ParseLog(raw)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := Replay(l, nil, quoted, nil); err != nil {
			b.Fatal(err)
		}
	}
}
