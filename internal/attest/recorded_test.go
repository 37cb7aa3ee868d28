package attest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// recorded reads the evidence of a virtual machine, see testdata/evidence.
func recorded(t testing.TB, name string) Evidence {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata/evidence", name+".json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var ev Evidence
	if err := json.NewDecoder(z).Decode(&ev); err != nil {
		t.Fatal(err)
	}
	return ev
}

// expected reads "name value" lines.
func expected(t testing.TB, name string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/evidence", name))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 2 {
			t.Fatalf("%s: %q", name, line)
		}
		out[f[0]] = f[1]
	}
	return out
}

// recordedPolicy accepts the good machine, by what its parts are and not by
// what it measured.
func recordedPolicy(t testing.TB, good Evidence) *Policy {
	t.Helper()
	sections, signer, programs, files := expected(t, "sections.txt"), expected(t, "signer.txt"), expected(t, "programs.txt"), expected(t, "files.txt")
	key := []string{signer["signer"]}
	p := Policy{
		Format: PolicyFormat, Name: "recorded", Version: 1, Bank: "sha256", EKBases: []Basis{BasisVTPMCA},
		PK: key, KEK: key, DB: key, Authorities: key,
		BootApplications: []string{programs["good"]}, BootLoader: []string{sections["options"], sections[".initrd"]},
		CommandLine: Cmdline{Require: []string{"lockdown=integrity"}},
	}
	for _, n := range []string{".linux", ".osrel", ".cmdline", ".initrd"} {
		p.UKI = append(p.UKI, Section{n, []string{sections[n]}})
	}
	for digest, path := range files {
		if path == policyPath {
			p.PolicyRecord = Record{Path: path, Digests: []string{"sha256:" + digest}}
		}
	}
	// The firmware's own are learned, and so is what its snakeoil dbx revokes.
	// PCR 1 holds the boot order, which a machine with another disk has not.
	profile := Profile{Name: "OVMF 2022.11"}
	for _, i := range []int{0, 2, 3} {
		profile.PCRs = append(profile.PCRs, PCRValue{i, FormatDigest(SHA256, good.PCRs[i])})
	}
	p.Firmware = []Profile{profile}
	boot := replayed(t, good)
	dbx, err := boot.secure.database("dbx")
	if err != nil {
		t.Fatal(err)
	}
	p.DBX = dbx
	return reparse(t, &p)
}

func replayed(t testing.TB, ev Evidence) *Boot {
	t.Helper()
	bank, err := NewBank(SHA256, ev.PCRs)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := Replay(mustParseLog(t, ev.EventLog), nil, bank, nil)
	if err != nil || boot.secure == nil {
		t.Fatal(err, boot)
	}
	return boot
}

// files is a catalogue of the programs that the machines run.
type files map[string]string

func (f files) Knows(alg string, digest []byte, _ bool) bool {
	path := f[hexText(digest)]
	return alg == "sha256" && path != "" && path != "/bin/rogue"
}
func (files) Names() []string { return []string{"files"} }

// Real firmware, loader, kernel and quotes: good and bad machines, each bad one
// with its own reasons.
func TestAppraise_recorded(t *testing.T) {
	good := recorded(t, "good")
	policy := recordedPolicy(t, good)
	for name, want := range map[string]map[Check]Reason{
		"good": nil,
		"rogue": {
			CheckBootApps: ReasonBootApp, CheckUsed: ReasonUnused, CheckUKI: ReasonUKI, CheckLoader: ReasonLoader, CheckCmdline: ReasonNoEvidence,
			CheckIMA: ReasonIMAUnknown, CheckViolations: ReasonIMAViolation,
		},
		"off": {
			// and the stub without Secure Boot starts the kernel as a program of its own
			CheckSecureBoot: ReasonSecureBootOff, CheckUsed: ReasonSecureBootOff, CheckPK: ReasonPK, CheckKEK: ReasonKEK, CheckDB: ReasonDB,
			CheckDBX: ReasonDBX, CheckBootApps: ReasonBootApp, CheckFirmware: ReasonFirmware,
		},
		"direct": {
			CheckUsed: ReasonUnused, CheckBootApps: ReasonNoEvidence, CheckUKI: ReasonNoEvidence, CheckCmdline: ReasonNoEvidence,
		},
	} {
		ev := recorded(t, name)
		ak, err := ParseAK(ev.AK)
		if err != nil {
			t.Fatal(err)
		}
		in := &Input{
			Enrolled: Enrolled{Host: "vm", AKName: ak.Name(), Basis: BasisVTPMCA},
			Challenge: Challenge{
				Nonce: bytes.Repeat([]byte{9}, NonceSize), Key: bytes.Repeat([]byte{8}, 32), Host: "vm", AKName: ak.Name(), Bank: "sha256", Issued: noon,
			},
			Evidence: ev, Policy: policy, Catalogues: files(expected(t, "files.txt")), Now: noon,
		}
		r, _, _ := Appraise(in)
		wantFailed(t, name, r, want)
	}
}

// A log of real firmware, with what other verifiers let through.
func TestReplay_recordedStripped(t *testing.T) {
	ev := recorded(t, "good")
	boot := replayed(t, ev)
	log := mustParseLog(t, ev.EventLog)
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 11} {
		stripped := *log
		stripped.Events = slices.DeleteFunc(slices.Clone(log.Events), func(e RawEvent) bool { return e.PCR == pcr })
		_, err := Replay(&stripped, nil, boot.Quoted, nil)
		wantReason(t, "stripped", err, ReasonPCRReplay)
	}
}

// What PCR 7 of real machines says can be accounted for.
func TestReadSecureBoot_corpus(t *testing.T) {
	on := map[string]bool{}
	for name, raw := range corpus(t) {
		l := mustParseLog(t, raw)
		a := l.Algs[len(l.Algs)-1]
		boot, err := Replay(l, nil, leadsTo(l, a), nil)
		if err != nil {
			t.Fatal(name, err)
		}
		if name == "short_no_action_eventlog" {
			wantReason(t, name, boot.unsure, ReasonUnexplained)
			continue
		}
		if boot.secure == nil {
			t.Errorf("%s: %v", name, boot.unsure)
			continue
		}
		on[name] = boot.secure.on() == nil
		for _, n := range []string{"PK", "KEK", "db", "dbx"} {
			if _, err := boot.secure.database(n); err != nil {
				t.Errorf("%s: %s: %v", name, n, err)
			}
		}
		if on[name] && len(boot.secure.authorities) == 0 {
			t.Errorf("%s: Secure Boot is on and verified nothing", name)
		}
	}
	for _, name := range []string{"rhel8-uefi", "debian-10", "cos-85-amd-sev", "cos-93-amd-sev", "cos-101-amd-sev", "sb_cert_eventlog", "option_rom_eventlog"} {
		if !on[name] {
			t.Errorf("%s: Secure Boot is off", name)
		}
		delete(on, name)
	}
	for name, v := range on {
		if v {
			t.Errorf("%s: Secure Boot is on", name)
		}
	}
}

// evmctl is the kernel developers' own verifier of IMA lists.
func TestReplayIMA_evmctl(t *testing.T) {
	tool, err := exec.LookPath("evmctl")
	if err != nil {
		t.Skip("SKIP: no evmctl here")
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	theirs := func(list, pcr []byte) bool {
		var b bytes.Buffer
		for i := range NumPCRs {
			v := make([]byte, len(pcr))
			if i == pcrIMA {
				v = pcr
			}
			fmt.Fprintf(&b, "PCR-%02d: % X\n", i, v)
		}
		out, err := exec.Command(tool, "ima_measurement", "--ignore-violations", "--pcrs", "sha256,"+write("pcrs", b.Bytes()), write("list", list)).CombinedOutput()
		return err == nil && !bytes.Contains(out, []byte("not match"))
	}
	lists := map[string][2][]byte{}
	for _, name := range []string{"good", "rogue", "off", "direct"} {
		ev := recorded(t, name)
		lists[name] = [2][]byte{ev.IMA, ev.PCRs[pcrIMA]}
	}
	made := &imaList{digestSize: SHA1Size}
	made.file(bootAggregate, "boot")
	buffer := []byte("root=/dev/vda1 quiet")
	made.add("ima-buf", false, append(ng("sha256", SHA256.sum(buffer), "kexec-cmdline"), field(buffer)...))
	made.add("ima-sig", false, append(ng("sha256", SHA256.sum([]byte("signed")), "/usr/bin/signed"), field([]byte{3, 2, 4, 1, 2, 3})...))
	made.add("ima-ng", true, ng("sha256", make([]byte, 32), "/var/log/open"))
	made.file("/usr/bin/last", "last")
	lists["made"] = [2][]byte{made.Bytes(), made.pcr(5)}
	compared := 0
	for name, l := range lists {
		size := IMADigestSize(l[0], SHA256)
		ends := []int{0}
		w := imaWalk{cursor: littleEndian(l[0]), digestSize: size}
		for len(w.b) > 0 {
			if _, err := w.read(len(ends)); err != nil {
				t.Fatal(err)
			}
			ends = append(ends, len(l[0])-len(w.b))
		}
		flipped := bytes.Clone(l[1])
		flipped[0] ^= 1
		cases := map[string][2][]byte{"as it is": l, "another value": {l[0], flipped}}
		for i := range ends[1:] {
			cases[fmt.Sprintf("entry %d dropped", i)] = [2][]byte{slices.Concat(l[0][:ends[i]], l[0][ends[i+1]:]), l[1]}
		}
		for what, c := range cases {
			_, _, err := ReplayIMA(c[0], size, IMAState{}, SHA256, c[1], nil)
			if got := theirs(c[0], c[1]); got != (err == nil) {
				t.Errorf("%s, %s: we say %v, evmctl %v", name, what, err, got)
			}
			compared++
		}
	}
	t.Logf("%d verdicts agree", compared)
}

// IMA's first template, whose digest is over a name padded to 256 bytes. The
// list has the digests of the quoted bank: each is compared.
func TestReplayIMA_oldest(t *testing.T) {
	ev := recorded(t, "oldest")
	replayed(t, ev) // so PCR 10 is the only one that is left
	size := IMADigestSize(ev.IMA, SHA256)
	if size != SHA256.Size() {
		t.Fatalf("digests of %d bytes", size)
	}
	var paths []string
	_, _, err := ReplayIMA(ev.IMA, size, IMAState{}, SHA256, ev.PCRs[pcrIMA], func(e *IMAEntry) error {
		word := e.Path
		if e.Violation {
			word = "violation"
		}
		if e.Template != templateIMA || e.Alg != "sha1" && !e.Violation {
			t.Errorf("%+v", e)
		}
		paths = append(paths, word)
		return nil
	})
	want := []string{bootAggregate, policyPath, "/bin/one", "/bin/two", "/bin/rogue", "violation", "/etc/open"}
	if err != nil || !slices.Equal(paths, want) {
		t.Errorf("%q, %v", paths, err)
	}
}

// A kernel that firmware handed over past Secure Boot can add what is missing
// afterwards. If only its users do, the kernel's own boot_aggregate tells; if the
// kernel does, nothing but the firmware's PCRs can: the limit that the design
// names.
func TestAppraise_addedAfterwards(t *testing.T) {
	good, direct := recorded(t, "good"), recorded(t, "direct")
	lied := mustParseLog(t, direct.EventLog)
	separated := false
	for _, e := range mustParseLog(t, good.EventLog).Events {
		separated = separated || e.PCR == 4 && e.Type == EventSeparator
		if separated && (e.Type == EventVariableAuthority || e.Type == EventApplication || e.PCR == pcrUKI) {
			lied.Events = append(lied.Events, e)
		}
	}
	f := newForger(t) // an honest TPM, extended with lies
	policy, catalogues := recordedPolicy(t, good), files(expected(t, "files.txt"))
	appraise := func(list, pcr []byte, p *Policy) *Result {
		bank := leadsTo(lied, SHA256)
		bank.Values[pcrIMA] = pcr
		in := newMachine().input(t, f)
		in.Evidence.EventLog, in.Evidence.IMA, in.Evidence.PCRs = encode(direct.EventLog, lied.Events), list, bank.Values[:]
		in.Evidence.Quote = f.sign(f.quote(in.Challenge.Qualifying(in.Evidence.Claims), bank, Clock{Resets: 1}))
		in.Policy, in.Catalogues, in.Enrolled.Basis = p, catalogues, BasisVTPMCA
		r, _, _ := Appraise(in)
		return r
	}
	r := appraise(direct.IMA, direct.PCRs[pcrIMA], policy)
	if !slices.Contains(r.Reasons(), ReasonIMABootAggregate) {
		t.Errorf("users of an honest kernel: %v", r.Reasons())
	}
	list := &imaList{digestSize: SHA1Size}
	list.add("ima-ng", false, ng("sha256", SHA256.sum(leadsTo(lied, SHA256).Values[:10]...), bootAggregate))
	list.file(policyPath, "policy 5\n")
	wantFailed(t, "a dishonest kernel", appraise(list.Bytes(), list.pcr(2), policy), nil)
	p := *policy
	p.Firmware = []Profile{{Name: "OVMF 2026.02", PCRs: []PCRValue{{0, sha("newer firmware")}}}}
	wantFailed(t, "firmware without the hole only", appraise(list.Bytes(), list.pcr(2), reparse(t, &p)), map[Check]Reason{CheckFirmware: ReasonFirmware})
}
