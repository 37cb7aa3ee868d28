package attest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"os"
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
