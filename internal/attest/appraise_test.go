package attest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ringwall/internal/errs"
)

// wantFailed compares what an appraisal refused, by check and reason.
func wantFailed(t *testing.T, what string, r *Result, want map[Check]Reason) {
	t.Helper()
	for _, c := range r.Checks {
		if reason, expected := want[c.Check]; expected {
			if c.Outcome != Fail || c.Reason != reason {
				t.Errorf("%s: %s: %s %s %s (want %s)", what, c.Check, c.Outcome, c.Reason, c.Detail, reason)
			}
			continue
		}
		if c.Outcome == Fail {
			t.Errorf("%s: %s fails: %s: %s", what, c.Check, c.Reason, c.Detail)
		}
	}
	if want := map[bool]Status{true: Affirming, false: Contraindicated}[len(want) == 0]; r.Status != want {
		t.Errorf("%s: %s (want %s)", what, r.Status, want)
	}
}

// insert puts events before the first one that match finds.
func insert(events []event, match func(e *event) bool, add ...event) []event {
	i := slices.IndexFunc(events, func(e event) bool { return match(&e) })
	return slices.Insert(slices.Clone(events), i, add...)
}

func without(events []event, match func(e *event) bool) []event {
	return slices.DeleteFunc(slices.Clone(events), func(e event) bool { return match(&e) })
}

func isConfig(name string) func(*event) bool {
	return func(e *event) bool { return e.kind == EventVariableConfig && bytes.Contains(e.data, wide(name)) }
}

func setVariable(m *machine, name string, data []byte) {
	for i := range m.events {
		if v, err := parseVariable(m.events[i].data); err == nil && v.Name == name && m.events[i].kind == EventVariableConfig {
			m.events[i] = config(name, data)
		}
	}
}

// What each kind of bad host is refused for. Every case is a machine whose
// TPM honestly quotes what happened: only the appraisal can find it.
func TestAppraise_hosts(t *testing.T) {
	f := newForger(t)
	isAuthority := func(e *event) bool { return e.kind == EventVariableAuthority }
	isProgram := func(e *event) bool { return e.kind == EventApplication }
	inPCR := func(n int) func(*event) bool { return func(e *event) bool { return e.pcr == n } }
	last := func(m *machine, add ...event) { m.events = append(m.events, add...) }
	for what, c := range map[string]struct {
		change func(m *machine)
		want   map[Check]Reason
	}{
		"the good one": {func(*machine) {}, nil},
		"secure boot off": {
			func(m *machine) { setVariable(m, "SecureBoot", []byte{0}) },
			map[Check]Reason{CheckSecureBoot: ReasonSecureBootOff, CheckUsed: ReasonSecureBootOff},
		},
		"secure boot unset": {
			func(m *machine) { setVariable(m, "SecureBoot", nil) },
			map[Check]Reason{CheckSecureBoot: ReasonSecureBootOff, CheckUsed: ReasonSecureBootOff},
		},
		"setup mode": {
			func(m *machine) { setVariable(m, "PK", nil) },
			map[Check]Reason{CheckSecureBoot: ReasonSecureBootOff, CheckUsed: ReasonSecureBootOff, CheckPK: ReasonPK},
		},
		"secure boot never measured": {
			func(m *machine) { m.events = without(m.events, isConfig("SecureBoot")) },
			map[Check]Reason{CheckSecureBoot: ReasonNoEvidence, CheckUsed: ReasonNoEvidence},
		},
		"secure boot off, and root measures a better one after the boot": {
			func(m *machine) {
				setVariable(m, "SecureBoot", []byte{0})
				last(m, config("SecureBoot", []byte{1}))
			},
			map[Check]Reason{
				CheckSecureBoot: ReasonUnexplained, CheckUsed: ReasonUnexplained, CheckPK: ReasonUnexplained, CheckKEK: ReasonUnexplained,
				CheckDB: ReasonUnexplained, CheckDBX: ReasonUnexplained, CheckDebug: ReasonUnexplained,
			},
		},
		"secure boot never measured, but by root after the boot": {
			func(m *machine) {
				m.events = without(m.events, isConfig("SecureBoot"))
				last(m, config("SecureBoot", []byte{1}))
			},
			map[Check]Reason{
				CheckSecureBoot: ReasonUnexplained, CheckUsed: ReasonUnexplained, CheckPK: ReasonUnexplained, CheckKEK: ReasonUnexplained,
				CheckDB: ReasonUnexplained, CheckDBX: ReasonUnexplained, CheckDebug: ReasonUnexplained,
			},
		},
		"a known program that nothing verified": {
			func(m *machine) { m.events = without(m.events, isAuthority) },
			map[Check]Reason{CheckUsed: ReasonUnused},
		},
		"direct kernel boot: on, and nothing was verified": {
			func(m *machine) {
				m.events = without(m.events, func(e *event) bool { return isAuthority(e) || isProgram(e) || e.pcr == 11 })
			},
			map[Check]Reason{CheckUsed: ReasonUnused, CheckBootApps: ReasonNoEvidence, CheckUKI: ReasonNoEvidence, CheckCmdline: ReasonNoEvidence},
		},
		"another signer": {
			func(m *machine) {
				m.events = insert(without(m.events, isAuthority), isProgram, authority(certificate("somebody")))
			},
			map[Check]Reason{CheckUsed: ReasonAuthority},
		},
		"another platform key": {
			func(m *machine) { setVariable(m, "PK", signatureList(guidX509, certificate("thief"))) },
			map[Check]Reason{CheckPK: ReasonPK},
		},
		"another key exchange key": {
			func(m *machine) {
				setVariable(m, "KEK", signatureList(guidX509, certificate("kek"), certificate("bad")))
			},
			map[Check]Reason{CheckKEK: ReasonKEK},
		},
		"db with an extra certificate": {
			func(m *machine) {
				setVariable(m, "db", append(signatureList(guidX509, certificate("builds")), signatureList(guidX509, certificate("extra"))...))
			},
			map[Check]Reason{CheckDB: ReasonDB},
		},
		"db with an extra digest": {
			func(m *machine) {
				setVariable(m, "db", append(signatureList(guidX509, certificate("builds")), signatureList(guidSHA256, revokedHash(9))...))
			},
			map[Check]Reason{CheckDB: ReasonDB},
		},
		"db that cannot be read": {
			func(m *machine) { setVariable(m, "db", signatureList(guidX509, certificate("builds"))[:40]) },
			map[Check]Reason{CheckDB: ReasonMalformed},
		},
		"old dbx": {
			func(m *machine) { setVariable(m, "dbx", signatureList(guidSHA256, revokedHash(1))) },
			map[Check]Reason{CheckDBX: ReasonDBX},
		},
		"empty dbx": {func(m *machine) { setVariable(m, "dbx", nil) }, map[Check]Reason{CheckDBX: ReasonDBX}},
		"UEFI debug mode": {
			func(m *machine) {
				m.events = insert(m.events, isConfig("SecureBoot"), event{pcr: 7, kind: EventEFIAction, data: []byte(actionDebug)})
			},
			map[Check]Reason{CheckDebug: ReasonDebug},
		},
		"no DMA protection": {
			func(m *machine) {
				m.events = insert(m.events, isConfig("SecureBoot"), event{pcr: 7, kind: EventEFIAction, data: []byte(actionDMA)})
			},
			map[Check]Reason{CheckDebug: ReasonDMA},
		},
		"program that is not authorised": {
			func(m *machine) { m.events = insert(m.events, isProgram, program("bootkit")) },
			map[Check]Reason{CheckBootApps: ReasonBootApp},
		},
		"the same under another name": {
			func(m *machine) {
				e := program("bootkit")
				e.kind = EventPostCode
				m.events = insert(m.events, isProgram, e)
			},
			map[Check]Reason{CheckBootApps: ReasonBootApp},
		},
		"bootkit that calls itself firmware's text": {
			func(m *machine) {
				e := program("bootkit")
				e.kind, e.data = EventEFIAction, []byte(bootTexts()[0])
				m.events = insert(m.events, isProgram, e)
			},
			map[Check]Reason{CheckBootApps: ReasonBootApp},
		},
		"another kernel": {
			func(m *machine) {
				m.events = append(without(m.events, inPCR(11)), section(".linux", "other kernel")...)
				last(m, section(".cmdline", "root=/dev/vda1 lockdown=integrity")...)
			},
			map[Check]Reason{CheckUKI: ReasonUKI},
		},
		"another initrd": {
			func(m *machine) {
				for i := range m.events {
					if string(m.events[i].content) == "initrd" {
						m.events[i].content = []byte("other initrd")
					}
				}
			},
			map[Check]Reason{CheckUKI: ReasonUKI},
		},
		"an unknown section":  {func(m *machine) { last(m, section(".evil", "x")...) }, map[Check]Reason{CheckUKI: ReasonUKI}},
		"a section's end cut": {func(m *machine) { last(m, section(".osrel", "x")[0]) }, map[Check]Reason{CheckUKI: ReasonNoEvidence}},
		"command line from outside": {
			func(m *machine) {
				last(m, event{pcr: 12, kind: EventIPL, data: wide("root=/dev/vda1 lockdown=integrity init=/bin/sh\x00")})
			},
			map[Check]Reason{CheckCmdline: ReasonCmdline, CheckLoader: ReasonLoader},
		},
		"command line from outside, allowed": {
			func(m *machine) {
				last(m, event{pcr: 12, kind: EventIPL, data: wide("root=/dev/vda2 lockdown=integrity\x00")})
			}, nil,
		},
		"command line without lockdown": {
			func(m *machine) { last(m, event{pcr: 12, kind: EventIPL, data: wide("root=/dev/vda2\x00")}) },
			map[Check]Reason{CheckCmdline: ReasonCmdline, CheckLoader: ReasonLoader},
		},
		"credentials": {
			func(m *machine) {
				last(m, event{pcr: 12, kind: EventIPL, data: wide("creds\x00"), content: []byte("cpio")})
			},
			map[Check]Reason{CheckLoader: ReasonLoader},
		},
		"GRUB's command line": {
			func(m *machine) {
				text := "/vmlinuz-6.12 root=/dev/vda1 quiet lockdown=integrity"
				last(m, event{pcr: 8, kind: EventIPL, data: []byte("kernel_cmdline: " + text + "\x00"), content: []byte(text)},
					event{pcr: 9, kind: EventTag, data: []byte("LOADED_IMAGE::LoadOptions\x00"), content: wide("root=/dev/vda1 quiet lockdown=integrity\x00")})
			}, nil,
		},
		"GRUB's command line, and other options for the kernel": {
			func(m *machine) {
				text := "/vmlinuz-6.12 root=/dev/vda1 quiet lockdown=integrity"
				last(m, event{pcr: 8, kind: EventIPL, data: []byte("kernel_cmdline: " + text + "\x00"), content: []byte(text)},
					event{pcr: 9, kind: EventTag, data: []byte("LOADED_IMAGE::LoadOptions\x00"), content: wide("root=/dev/vda1 quiet\x00")})
			},
			map[Check]Reason{CheckLoader: ReasonLoader},
		},
		"a GRUB command that calls itself a command line": {
			func(m *machine) {
				last(m, event{pcr: 8, kind: EventIPL, data: []byte("kernel_cmdline: insmod evil\x00"), content: []byte("insmod evil")})
			},
			map[Check]Reason{CheckLoader: ReasonLoader, CheckCmdline: ReasonCmdline},
		},
		"other firmware": {
			func(m *machine) { m.events[1].content = []byte("firmware 0.9") },
			map[Check]Reason{CheckFirmware: ReasonFirmware},
		},
		"rogue binary": {
			func(m *machine) { m.files = append(m.files, "/tmp/rogue", "rogue") },
			map[Check]Reason{CheckIMA: ReasonIMAUnknown},
		},
		"an old integrity policy": {
			func(m *machine) { m.files[3] = "policy 3" },
			map[Check]Reason{CheckPolicy: ReasonPolicyRecord, CheckIMA: ReasonIMAUnknown},
		},
		"the previous one": {func(m *machine) { m.files[3] = "policy 4" }, nil},
		"an old policy loaded after the good one": {
			func(m *machine) { m.files = append(m.files, policyPath, "policy 3") },
			map[Check]Reason{CheckPolicy: ReasonPolicyRecord, CheckIMA: ReasonIMAUnknown},
		},
		"a program under the policy's name": {
			func(m *machine) { m.files = append([]string{policyPath, "rogue"}, m.files...) },
			map[Check]Reason{CheckIMA: ReasonIMAUnknown},
		},
		"no integrity policy": {
			func(m *machine) { m.files = append(m.files[:2:2], m.files[4:]...) },
			map[Check]Reason{CheckPolicy: ReasonNoEvidence},
		},
		"file open for writing": {
			func(m *machine) { m.list(t).add("ima-ng", true, ng("sha256", make([]byte, 32), "/var/lib/x")) },
			map[Check]Reason{CheckViolations: ReasonIMAViolation},
		},
		"list of another boot": {
			func(m *machine) {
				m.ima = &imaList{digestSize: SHA1Size}
				m.ima.file(bootAggregate, "another boot's")
			},
			map[Check]Reason{CheckIMAReplay: ReasonIMABootAggregate},
		},
		"list without its beginning": {
			func(m *machine) {
				m.ima = &imaList{digestSize: SHA1Size}
				m.ima.file("/usr/bin/true", "true")
			},
			map[Check]Reason{CheckIMAReplay: ReasonIMABootAggregate},
		},
		"no IMA": {
			func(m *machine) { m.ima = &imaList{digestSize: SHA1Size} },
			map[Check]Reason{CheckIMA: ReasonNoEvidence, CheckViolations: ReasonNoEvidence, CheckPolicy: ReasonNoEvidence},
		},
	} {
		m := newMachine()
		c.change(m)
		r, next, boot := Appraise(m.input(t, f))
		if c.want[CheckIMAReplay] != "" {
			for _, check := range Checks() {
				if !check.mandatory() {
					c.want[check] = ReasonNoEvidence
				}
			}
			if next != nil || boot != nil {
				t.Errorf("%s: there is a state", what)
			}
		}
		wantFailed(t, what, r, c.want)
	}
}

// What each lie is refused for: evidence that does not belong together.
func TestAppraise_lies(t *testing.T) {
	f, other := newForger(t), newForger(t)
	for what, c := range map[string]struct {
		change func(in *Input)
		check  Check
		reason Reason
	}{
		"another host's challenge": {func(in *Input) { in.Challenge.Host = "h2" }, CheckQuote, ReasonAK},
		"another key asks":         {func(in *Input) { in.Challenge.Key = SHA256.sum([]byte("thief")) }, CheckQuote, ReasonNonce},
		"an old nonce":             {func(in *Input) { in.Challenge.Nonce = make([]byte, NonceSize) }, CheckQuote, ReasonNonce},
		"claims exchanged":         {func(in *Input) { in.Evidence.Claims = []byte("{}") }, CheckQuote, ReasonNonce},
		"another TPM's key":        {func(in *Input) { in.Evidence.AK = other.ak.Public }, CheckQuote, ReasonAK},
		"another TPM's key, enrolled for somebody else": {func(in *Input) {
			in.Evidence.AK, in.Challenge.AKName = other.ak.Public, other.ak.Name()
		}, CheckQuote, ReasonAK},
		"signed by another TPM": {func(in *Input) { in.Evidence.Quote = other.sign(in.Evidence.Quote.Attest) }, CheckQuote, ReasonSignature},
		"another bank":          {func(in *Input) { in.Evidence.Bank = "sha384" }, CheckQuote, ReasonPCRSelection},
		"no values":             {func(in *Input) { in.Evidence.PCRs = nil }, CheckQuote, ReasonMalformed},
		"empty values": {func(in *Input) {
			in.Evidence.PCRs = make([][]byte, NumPCRs)
		}, CheckQuote, ReasonMalformed},
		"a better value": {func(in *Input) {
			in.Evidence.PCRs = slices.Clone(in.Evidence.PCRs)
			in.Evidence.PCRs[7] = make([]byte, 32)
		}, CheckQuote, ReasonPCRDigest},
		"no log": {func(in *Input) { in.Evidence.EventLog = nil }, CheckReplay, ReasonNoEvidence},
		"a better machine's log": {func(in *Input) {
			m := newMachine()
			m.events[1].content = []byte("firmware 1.3")
			in.Evidence.EventLog = m.raw()
		}, CheckReplay, ReasonPCRReplay},
		"garbage for a log":           {func(in *Input) { in.Evidence.EventLog = []byte("garbage") }, CheckReplay, ReasonMalformed},
		"garbage for a userspace log": {func(in *Input) { in.Evidence.UserspaceLog = []byte("garbage") }, CheckReplay, ReasonMalformed},
		"IMA list cut":                {func(in *Input) { in.Evidence.IMA = in.Evidence.IMA[:len(in.Evidence.IMA)/2] }, CheckIMAReplay, ReasonMalformed},
		"no IMA list":                 {func(in *Input) { in.Evidence.IMA = nil }, CheckIMAReplay, ReasonIMAReplay},
		"garbage for a list":          {func(in *Input) { in.Evidence.IMA = []byte("garbage, garbage, garbage, garbage, garbage, garbage") }, CheckIMAReplay, ReasonMalformed},
		"IMA list from the middle":    {func(in *Input) { in.Evidence.IMAFrom = 2 }, CheckIMAReplay, ReasonIMAPosition},
		"policy for another bank": {func(in *Input) {
			p := *in.Policy
			p.Bank = "sha384"
			in.Policy = &p
		}, CheckQuote, ReasonPCRSelection},
	} {
		in := newMachine().input(t, f)
		c.change(in)
		r, next, _ := Appraise(in)
		if next != nil {
			t.Errorf("%s: there is a state", what)
		}
		if r.Status != Contraindicated || !slices.Contains(r.Reasons(), c.reason) {
			t.Errorf("%s: %s for %v", what, r.Status, r.Reasons())
		}
		for _, k := range r.Checks {
			switch {
			case k.Check == c.check && (k.Outcome != Fail || k.Reason != c.reason):
				t.Errorf("%s: %s: %s %s %s", what, k.Check, k.Outcome, k.Reason, k.Detail)
			case !k.Check.mandatory() && k.Outcome == Pass:
				t.Errorf("%s: %s passes without evidence", what, k.Check)
			}
		}
	}
}

func TestAppraise_modes(t *testing.T) {
	f := newForger(t)
	m := newMachine()
	m.files = append(m.files, "/tmp/rogue", "rogue")
	for mode, want := range map[Mode]Status{ModeEnforce: Contraindicated, ModeAudit: Warning, ModeOff: Affirming} {
		in := m.input(t, f)
		p := *in.Policy
		p.Checks = []CheckMode{{CheckIMA, mode}}
		in.Policy = reparse(t, &p)
		r, _, _ := Appraise(in)
		if r.Status != want {
			t.Errorf("%s: %s", mode, r.Status)
		}
		if r.Passed(CheckIMA) || !r.Passed(CheckSecureBoot) {
			t.Errorf("%s: a gate gets the wrong answer", mode)
		}
		if r.IMA.Unknown[0].Path != "/tmp/rogue" || r.IMA.Unknown[0].Digest != sha("rogue") {
			t.Errorf("%+v", r.IMA)
		}
	}
	// a policy that says nothing accepts nobody
	in := newMachine().input(t, f)
	in.Policy = reparse(t, &Policy{Format: PolicyFormat, Name: "empty", Version: 1, Bank: "sha256"})
	in.Catalogues = nil
	r, _, _ := Appraise(in)
	for _, c := range r.Checks {
		// what asks for no reference value, and loader: it measured nothing
		quiet := c.Check.mandatory() || slices.Contains([]Check{CheckReset, CheckSecureBoot, CheckDebug, CheckViolations, CheckLoader}, c.Check)
		if (c.Outcome == Pass) != quiet {
			t.Errorf("an empty policy: %s: %s %s", c.Check, c.Outcome, c.Reason)
		}
	}
}

func TestAppraise_rounds(t *testing.T) {
	f := newForger(t)
	m := newMachine()
	first := m.input(t, f)
	r, state, boot := Appraise(first)
	wantFailed(t, "first", r, nil)

	// later: more programs, the log left out, the list from where it ended
	later := func(change func(m *machine, in *Input)) *Input {
		was := m.list(t).Len()
		n := len(m.list(t).extended)
		next := &machine{events: m.events, files: m.files, clock: m.clock, ima: &imaList{digestSize: SHA1Size}}
		next.ima.Write(m.list(t).Bytes())
		next.ima.extended = slices.Clone(m.list(t).extended)
		next.ima.file("/usr/bin/cat", "cat")
		next.clock.Milliseconds += 5000
		in := &Input{}
		change(next, in)
		got := next.input(t, f)
		got.State, got.BootLog, got.Boot = state, first.Evidence.EventLog, boot
		got.Evidence.EventLog, got.Evidence.IMA, got.Evidence.IMAFrom = nil, got.Evidence.IMA[was:], n
		got.Announced = in.Announced
		return got
	}
	same := func(*machine, *Input) {}
	in := later(same)
	r, next, _ := Appraise(in)
	wantFailed(t, "second", r, nil)
	if next.IMA.Entries != state.IMA.Entries+1 || r.IMA.PolicyRecord != sha("policy 5") {
		t.Errorf("%+v", next.IMA)
	}
	in.Boot = nil
	r, _, _ = Appraise(in)
	wantFailed(t, "second, log read again", r, nil)
	other := newMachine() // a log that leads to the same values
	other.events[1].data = []byte("another address")
	in.BootLog = other.raw()
	r, _, _ = Appraise(in)
	for _, k := range r.Checks {
		if k.Check == CheckReplay && k.Reason != ReasonNoEvidence {
			t.Errorf("another log from the store: %+v", k)
		}
	}

	in = later(func(m *machine, _ *Input) { m.ima.file("/tmp/rogue", "rogue") })
	r, _, _ = Appraise(in)
	wantFailed(t, "rogue later", r, map[Check]Reason{CheckIMA: ReasonIMAUnknown})

	in = later(same)
	in.Evidence.IMA = nil
	r, _, _ = Appraise(in)
	if got := r.Reasons(); !slices.Contains(got, ReasonIMAReplay) {
		t.Errorf("log stops growing while PCR 10 moves: %v", got)
	}
	in = later(same)
	in.Evidence.IMAFrom--
	r, _, _ = Appraise(in)
	if got := r.Reasons(); !slices.Contains(got, ReasonIMAPosition) {
		t.Errorf("index rolled back: %v", got)
	}
	in = later(same)
	in.Catalogues = newCatalogue("cat")
	r, _, _ = Appraise(in)
	if got := r.Reasons(); !slices.Contains(got, ReasonIMAPosition) {
		t.Errorf("a catalogue was withdrawn: %v", got)
	}

	for what, c := range map[string]struct {
		change func(m *machine, in *Input)
		whole  bool // a new boot sends all
		want   Reason
	}{
		"clock backwards":            {func(m *machine, _ *Input) { m.clock.Milliseconds = 1 }, false, ReasonReset},
		"other TPM firmware":         {func(m *machine, _ *Input) { m.clock.Firmware++ }, false, ReasonReset},
		"reboot that nobody ordered": {func(m *machine, _ *Input) { m.clock.Resets++ }, true, ReasonReset},
		"ordered reboot":             {func(m *machine, in *Input) { m.clock.Resets++; in.Announced = true }, true, ""},
		"a boot in between":          {func(m *machine, in *Input) { m.clock.Resets += 2; in.Announced = true }, true, ReasonReset},
		"counter went back":          {func(m *machine, in *Input) { m.clock.Resets--; in.Announced = true }, true, ReasonReset},
		"new boot, log left out":     {func(m *machine, in *Input) { m.clock.Resets++; in.Announced = true }, false, ReasonNoEvidence},
		"resumed from sleep":         {func(m *machine, _ *Input) { m.clock.Restarts++ }, false, ""},
	} {
		in := later(c.change)
		if c.whole {
			in.Evidence.EventLog, in.Evidence.IMAFrom = in.BootLog, 0
			in.Evidence.IMA = append(bytes.Clone(m.list(t).Bytes()), in.Evidence.IMA...)
		}
		r, _, _ := Appraise(in)
		if got := r.Reasons(); c.want == "" && len(got) > 0 || c.want != "" && !slices.Contains(got, c.want) {
			t.Errorf("%s: %v", what, got)
		}
	}
}

// In audit mode what was found once stays found, until a catalogue explains it.
func TestAppraise_findingsStay(t *testing.T) {
	f := newForger(t)
	m := newMachine()
	for i := range maxFindings + 5 {
		m.files = append(m.files, fmt.Sprintf("/tmp/rogue%d", i), fmt.Sprintf("rogue%d", i))
	}
	in := m.input(t, f)
	r, state, _ := Appraise(in)
	if len(r.IMA.Unknown) != maxFindings || r.IMA.MoreUnknown != 5 {
		t.Fatalf("%d unknown and %d more", len(r.IMA.Unknown), r.IMA.MoreUnknown)
	}
	in = m.input(t, f)
	in.State, in.Evidence.IMAFrom, in.Evidence.IMA = state, state.IMA.Entries, nil
	r, _, _ = Appraise(in)
	wantFailed(t, "again", r, map[Check]Reason{CheckIMA: ReasonIMAUnknown})
	c := newCatalogue("true", "cat")
	for i := range maxFindings {
		c.known[string(SHA256.sum(fmt.Appendf(nil, "rogue%d", i)))] = true
	}
	in.Catalogues = c
	r, _, _ = Appraise(in)
	wantFailed(t, "those without room stay", r, map[Check]Reason{CheckIMA: ReasonIMAUnknown})
	in = m.input(t, f)
	for i := range maxFindings + 5 {
		c.known[string(SHA256.sum(fmt.Appendf(nil, "rogue%d", i)))] = true
	}
	in.State, in.Catalogues = state, c
	r, _, _ = Appraise(in)
	wantFailed(t, "whole list, all known", r, nil)
}

func TestChallenge(t *testing.T) {
	f := newForger(t)
	store := &memory{}
	ask := func() *Challenge {
		t.Helper()
		c, err := Ask(store, "h1", f.ak, f.ak.Key, SHA256, noon)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	seen := map[string]bool{}
	for range 1000 {
		c := ask()
		if q := string(c.Qualifying(nil)); seen[q] || len(q) != 32 {
			t.Fatal("two challenges are equal")
		} else {
			seen[q] = true
		}
	}
	c := ask()
	if _, err := Redeem(store, c.Nonce, "h1", noon.Add(ChallengeLife)); err != nil {
		t.Fatal(err)
	}
	_, err := Redeem(store, c.Nonce, "h1", noon)
	wantReason(t, "used twice", err, ReasonNonce)
	if !errors.Is(err, errs.NotFound) {
		t.Errorf("%v", err)
	}
	for what, redeem := range map[string]func(c *Challenge) error{
		"too late": func(c *Challenge) error {
			_, err := Redeem(store, c.Nonce, "h1", noon.Add(ChallengeLife+1))
			return err
		},
		"too early":    func(c *Challenge) error { _, err := Redeem(store, c.Nonce, "h1", noon.Add(-1)); return err },
		"another host": func(c *Challenge) error { _, err := Redeem(store, c.Nonce, "h2", noon); return err },
	} {
		c := ask()
		wantReason(t, what, redeem(c), ReasonNonce)
		_, err := Redeem(store, c.Nonce, "h1", noon)
		wantReason(t, "after "+what, err, ReasonNonce)
	}
	// of many who answer one challenge, one is heard
	c = ask()
	var heard atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := Redeem(store, c.Nonce, "h1", noon); err == nil {
				heard.Add(1)
			}
		})
	}
	wg.Wait()
	if heard.Load() != 1 {
		t.Errorf("%d are heard", heard.Load())
	}
	_, err = Redeem(store, nil, "h1", noon)
	wantReason(t, "no nonce", err, ReasonNonce)
	if _, err := Ask(store, "h1", f.ak, f.ak.Key, SHA1, noon); !errors.Is(err, errs.Invalid) {
		t.Errorf("SHA-1: %v", err)
	}
	a, b := *c, *c
	b.Key = SHA256.sum(nil)
	if bytes.Equal(a.Qualifying(nil), b.Qualifying(nil)) || bytes.Equal(a.Qualifying(nil), a.Qualifying([]byte("x"))) {
		t.Error("key or claims are not bound")
	}
}

func TestParsePolicy(t *testing.T) {
	head := `{"format":"ringwall-attestation/1","name":"n","version":1,"bank":"sha256"`
	if _, err := ParsePolicy([]byte(head + `}`)); err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{
		"another format": strings.Replace(head, "/1", "/2", 1) + `}`, "SHA-1": strings.Replace(head, "sha256", "sha1", 1) + `}`,
		"no version":       strings.Replace(head, `"version":1`, `"version":0`, 1) + `}`,
		"unknown key":      head + `,"x":1}`,
		"unknown check":    head + `,"checks":[{"check":"x","mode":"off"}]}`,
		"unknown mode":     head + `,"checks":[{"check":"db","mode":"maybe"}]}`,
		"check twice":      head + `,"checks":[{"check":"db","mode":"off"},{"check":"db","mode":"audit"}]}`,
		"quote off":        head + `,"checks":[{"check":"quote","mode":"off"}]}`,
		"replay audited":   head + `,"checks":[{"check":"pcr-replay","mode":"audit"}]}`,
		"PCR 7 unlogged":   head + `,"unlogged":[7]}`,
		"unknown basis":    head + `,"ek_bases":["anybody"]}`,
		"bad digest":       head + `,"db":["sha256:00"]}`,
		"upper case":       head + `,"db":["sha256:` + strings.Repeat("AB", 32) + `"]}`,
		"another bank":     head + `,"boot_applications":["sha384:` + strings.Repeat("ab", 48) + `"]}`,
		"empty profile":    head + `,"firmware":[{"name":"x","pcrs":[]}]}`,
		"PCR 4 as profile": head + `,"firmware":[{"name":"x","pcrs":[{"pcr":4,"digest":"` + sha("x") + `"}]}]}`,
		"section":          head + `,"uki":[{"name":"linux","digests":[]}]}`,
	} {
		if _, err := ParsePolicy([]byte(text)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add([]byte(`{"format":"ringwall-attestation/1","name":"n","version":1,"bank":"sha256"}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = ParsePolicy(b) })
}

func benchmarkAppraise(b *testing.B, in *Input) {
	b.ReportAllocs()
	began := cpuSeconds(b)
	for b.Loop() {
		if r, _, _ := Appraise(in); r.Status != Affirming {
			b.Fatal(r.Reasons())
		}
	}
	b.ReportMetric(float64(b.N)/(cpuSeconds(b)-began), "hosts/cpu-s")
}

// cpuSeconds is what this process has used: other work on the machine does not
// count.
func cpuSeconds(b *testing.B) float64 {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// A host's whole evidence with 10,000 entries.
func BenchmarkAppraise_full(b *testing.B) {
	m := newMachine()
	var known []string
	for i := range 10_000 {
		m.files = append(m.files, fmt.Sprintf("/usr/lib/x86_64-linux-gnu/library-with-a-usual-name-%06d.so.1", i), fmt.Sprint(i))
		known = append(known, fmt.Sprint(i))
	}
	in := m.input(b, newForger(b))
	in.Catalogues = newCatalogue(append(known, "true", "cat")...)
	benchmarkAppraise(b, in)
}

// A later round: 100 new entries.
func BenchmarkAppraise_incremental(b *testing.B) {
	f := newForger(b)
	m := newMachine()
	first := m.input(b, f)
	_, state, boot := Appraise(first)
	l := m.list(b)
	was := l.Len()
	known := []string{"true", "cat"}
	for i := range 100 {
		l.file(fmt.Sprintf("/usr/lib/x86_64-linux-gnu/library-with-a-usual-name-%06d.so.1", i), fmt.Sprint(i))
		known = append(known, fmt.Sprint(i))
	}
	m.clock.Milliseconds += uint64(time.Minute.Milliseconds())
	in := m.input(b, f)
	c := newCatalogue(known...)
	c.name = first.Catalogues.Names()[0]
	in.State, in.Boot, in.BootLog, in.Catalogues = state, boot, first.Evidence.EventLog, c
	in.Evidence.EventLog, in.Evidence.IMA, in.Evidence.IMAFrom = nil, in.Evidence.IMA[was:], state.IMA.Entries
	benchmarkAppraise(b, in)
}
