package attest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"ringwall/internal/errs"
)

// What hosts send is read whole and strictly, or not at all.
func TestParseMessages(t *testing.T) {
	in := newMachine().input(t, newForger(t))
	good, err := json.Marshal(Answer{Nonce: in.Challenge.Nonce, CSR: []byte{1}, Evidence: in.Evidence})
	if err != nil {
		t.Fatal(err)
	}
	a, err := ParseAnswer(good)
	if err != nil || !bytes.Equal(a.Evidence.EventLog, in.Evidence.EventLog) {
		t.Fatal(err)
	}
	request := []byte(`{"identity":{"ek":"AAA=","ak":"AAA="},"key":"AAA="}`)
	r, err := ParseRequest(request)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.PublicKey(); !errors.Is(err, errs.Invalid) {
		t.Errorf("no key: %v", err)
	}
	for what, b := range map[string][]byte{
		"empty": nil, "not JSON": []byte("{"), "unknown key": bytes.Replace(good, []byte(`{"nonce"`), []byte(`{"x":1,"nonce"`), 1),
		"twice": bytes.Replace(good, []byte(`{"nonce"`), []byte(`{"csr":"AA==","nonce"`), 1), "more": append(slices.Clone(good), '1'),
		"another case": bytes.Replace(good, []byte(`"nonce"`), []byte(`"Nonce"`), 1),
		"deep":         []byte(strings.Repeat(`{"evidence":`, 40) + strings.Repeat("}", 40)),
	} {
		if _, err := ParseAnswer(b); !errors.Is(err, errs.Invalid) || ReasonOf(err) != ReasonMalformed {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"answer":  second(ParseAnswer(bytes.Repeat([]byte(" "), MaxAnswer+1))),
		"request": second(ParseRequest(bytes.Repeat([]byte(" "), MaxRequest+1))),
		"many":    second(ParseRequest([]byte(`{"identity":{"ek":"","ak":"","intermediates":["","","","","","",""]},"key":""}`))),
	} {
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseAnswer(f *testing.F) {
	in := newMachine().input(f, newForger(f))
	b, err := json.Marshal(Answer{Nonce: in.Challenge.Nonce, CSR: []byte{1}, Evidence: in.Evidence})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"nonce":"","csr":"","evidence":{"pcrs":[null]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAnswer(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		// whatever it holds, an appraisal ends and refuses it
		in := newMachine().input(t, newForger(t))
		in.Evidence = a.Evidence
		if r, _, _ := Appraise(in); r.Status != Contraindicated {
			t.Fatalf("accepted: %q", b)
		}
		_, _ = in.Challenge.CheckCSR(a.CSR)
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"identity":{"ek":"AAA=","ak":"AAA=","certificate":"MAA="},"key":"MAA="}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRequest(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		_, _ = r.PublicKey()
		_, _ = ParseEK(r.Identity.EK)
		_, _ = ParseAK(r.Identity.AK)
		_, _ = ParseEKCertificate(r.Identity.Certificate)
	})
}

// A sealed certificate opens with its key and no other, and not when changed.
func TestSealedCertificate(t *testing.T) {
	c := startChip(t)
	ekKey := c.ek()
	ek, err := ParseEK(ekKey.public)
	if err != nil {
		t.Fatal(err)
	}
	pcrs := []int{4, 7, 11}
	der := bytes.Repeat([]byte("certificate"), 100) // longer than a TPM seals
	s, err := SealCertificate(ek, c.bank(SHA256), pcrs, der)
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.open(ekKey, &s.Key, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Open(key); err != nil || !bytes.Equal(got, der) {
		t.Fatal(err)
	}
	if _, err := s.Open(make([]byte, 32)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("another key: %v", err)
	}
	s.Cipher[0] ^= 1
	if _, err := s.Open(key); !errors.Is(err, errs.Untrusted) {
		t.Errorf("changed: %v", err)
	}
	s.Nonce = nil
	if _, err := s.Open(key); !errors.Is(err, errs.Invalid) {
		t.Errorf("no nonce: %v", err)
	}
}

func TestSkipIMA(t *testing.T) {
	l := &imaList{digestSize: SHA1Size}
	ends := []int{0}
	for _, n := range []string{bootAggregate, "/a", "/b"} {
		l.file(n, n)
		ends = append(ends, l.Len())
	}
	list := l.Bytes()
	for n, at := range ends {
		if rest, err := SkipIMA(list, SHA1Size, n); err != nil || !bytes.Equal(rest, list[at:]) {
			t.Errorf("%d entries: %d bytes, %v", n, len(rest), err)
		}
	}
	if _, err := SkipIMA(list, SHA1Size, 4); !errors.Is(err, errs.Invalid) {
		t.Errorf("more than there are: %v", err)
	}
	if _, err := SkipIMA(list[:len(list)-1], SHA1Size, 3); !errors.Is(err, errs.Invalid) {
		t.Errorf("a list that is cut: %v", err)
	}
}

// The values predicted of recorded images, by other tools from the files, are
// what their machines measured; a policy of them accepts the one and not the other.
func TestReferences(t *testing.T) {
	good := recorded(t, "good")
	sections, programs := expected(t, "sections.txt"), expected(t, "programs.txt")
	refs := References{Components: []Component{{Name: "good", Image: programs["good"], Options: sections["options"]}}}
	for _, n := range []string{".linux", ".osrel", ".cmdline", ".initrd"} {
		refs.Components[0].Sections = append(refs.Components[0].Sections, Section{n, []string{sections[n]}})
	}
	p := recordedPolicy(t, good)
	p.BootApplications, p.BootLoader, p.UKI = nil, nil, nil
	if err := refs.AddTo(p); err != nil {
		t.Fatal(err)
	}
	p = reparse(t, p)
	for name, want := range map[string]bool{"good": true, "rogue": false} {
		boot := replayed(t, recorded(t, name))
		_, apps := bootApplications(p, boot)
		if err := errors.Join(apps, p.uki(boot), p.loader(boot)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := OptionsDigest("console=ttyS0 quiet ima_hash=sha256 lockdown=integrity"); got != sections["options"] {
		t.Errorf("options %s, iconv and sha256sum say %s", got, sections["options"])
	}
	p.Bank = "sha384"
	if err := refs.AddTo(p); !errors.Is(err, errs.Invalid) {
		t.Errorf("another bank: %v", err)
	}
	// through systemd-pcrlock's format and back
	text, err := refs.Components[0].PCRLock()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParsePCRLock("good", text)
	if err != nil || back.Image != programs["good"] || back.Options != sections["options"] || len(back.Sections) != 4 || back.Sections[3].Digests[0] != sections[".initrd"] {
		t.Errorf("%+v, %v", back, err)
	}
}

// A proposal accepts the machine that it was made of, and no other boot.
func TestPropose(t *testing.T) {
	good := recorded(t, "good")
	p := reparse(t, Propose(replayed(t, good), "learned"))
	for name, want := range map[string]bool{"good": true, "rogue": false, "off": false, "direct": false} {
		boot := replayed(t, recorded(t, name))
		_, apps := bootApplications(p, boot)
		err := errors.Join(apps, p.uki(boot), p.loader(boot), p.firmware(boot), boot.secure.used(p, boot),
			boot.secure.entries("PK", p.PK, ReasonPK), boot.secure.entries("KEK", p.KEK, ReasonKEK), boot.secure.entries("db", p.DB, ReasonDB), boot.secure.revoked(p.DBX))
		if (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(p.EKBases) > 0 || p.PolicyRecord.Path != "" {
		t.Error("a proposal decides what a person must")
	}
}

func TestParsePCRLock_refuses(t *testing.T) {
	digest := `[{"hashAlg":"sha1","digest":"00"},{"hashAlg":"sha256","digest":"` + strings.Repeat("ab", 32) + `"}]`
	for what, tc := range map[string]struct {
		text string
		want error
	}{
		"empty":          {`{"records":[]}`, errs.Invalid},
		"no JSON":        {`records`, errs.Invalid},
		"short digest":   {`{"records":[{"pcr":4,"digests":[{"hashAlg":"sha256","digest":"ab"}]}]}`, errs.Invalid},
		"sha1 only":      {`{"records":[{"pcr":4,"digests":[{"hashAlg":"sha1","digest":"ab"}]}]}`, errs.Unsupported},
		"PCR 7":          {`{"records":[{"pcr":7,"digests":` + digest + `}]}`, errs.Unsupported},
		"two in PCR 4":   {`{"records":[{"pcr":4,"digests":` + digest + `},{"pcr":4,"digests":` + digest + `}]}`, errs.Unsupported},
		"no section":     {`{"records":[{"pcr":11,"digests":` + digest + `}]}`, errs.Unsupported},
		"name at an end": {`{"records":[{"pcr":11,"digests":[{"hashAlg":"sha256","digest":"` + hexText(SHA256.sum([]byte(".linux\x00"))) + `"}]}]}`, errs.Invalid},
	} {
		if _, err := ParsePCRLock(what, []byte(tc.text)); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParseReferences(f *testing.F) {
	b, err := json.Marshal(References{Format: ReferencesFormat, Components: []Component{PredictPolicy("x", []byte("y")), PredictFile("z", nil)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseReferences(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		p := goodPolicy(t)
		if err := r.AddTo(p); err != nil {
			t.Fatal(err)
		}
		reparse(t, p) // what was read is what a policy takes
	})
}

func FuzzParsePCRLock(f *testing.F) {
	f.Add([]byte(`{"records":[{"pcr":4,"digests":[{"hashAlg":"sha256","digest":"` + strings.Repeat("ab", 32) + `"}]}]}`))
	f.Add([]byte(`{"records":[{"pcr":-1}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParsePCRLock("x", b)
		if err != nil {
			return
		}
		p := goodPolicy(t)
		if err := (&References{Components: []Component{*c}}).AddTo(p); err != nil {
			t.Fatal(err)
		}
		reparse(t, p) // what was read is what a policy takes
	})
}

func FuzzParseCollected(f *testing.F) {
	file, err := os.Open("../../cmd/ringwall/testdata/attest/evidence.json.gz")
	if err != nil {
		f.Fatal(err)
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		f.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	policy := goodPolicy(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseCollected(b)
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		if in, err := c.Input(BasisVendorCA, policy, nil, noon); err == nil {
			if r, _, _ := Appraise(in); r.Status != Contraindicated {
				t.Fatal("a policy of another machine accepts it")
			}
		}
		_, _ = c.Propose("x")
	})
}

func TestRecordDigests(t *testing.T) {
	list, err := RecordDigests([][32]byte{{1}, {2}}, ModeEnforce, 3)
	if err != nil || len(list) != 6 || list[4] != FormatDigest(SHA256, SHA256.sum(PolicyRecordText([32]byte{2}, ModeEnforce, 2))) {
		t.Errorf("%v, %v", list, err)
	}
	if slices.Contains(list, FormatDigest(SHA256, SHA256.sum(PolicyRecordText([32]byte{1}, ModeAudit, 1)))) {
		t.Error("audit counts as enforce")
	}
	if _, err := RecordDigests(make([][32]byte, 5000), ModeEnforce, 1); !errors.Is(err, errs.Invalid) {
		t.Errorf("too many: %v", err)
	}
}
