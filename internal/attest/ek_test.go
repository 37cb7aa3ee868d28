package attest

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"ringwall/internal/errs"
)

func TestTemplates(t *testing.T) {
	ak, tls := AKTemplate(), SigningTemplate()
	if !bytes.Equal(prefix(&ak, emptyPoint), akPrefix()) || !bytes.Equal(prefix(&tls, emptyPoint), signingPrefix()) {
		t.Errorf("%x, %x", prefix(&ak, emptyPoint), prefix(&tls, emptyPoint))
	}
	// PolicyB is PolicyOR of the endorsement authorisation and a policy in NV
	// (EK Credential Profile, annex B.6): recomputed for SHA-256.
	const policyOR = 0x171
	inNV := []byte("\x37\x67\xe2\xed\xd4\x3f\xf4\x5a\x3a\x7e\x1e\xae\xfc\xef\x78\x64\x3d\xca\x96\x46\x32\xe7\xaa\xd8\x2c\x67\x3a\x30\xd8\x63\x3f\xde")
	want := SHA256.sum(make([]byte, 32), binary.BigEndian.AppendUint32(nil, policyOR), tpm2.RSAEKTemplate.AuthPolicy.Buffer, inNV)
	if !bytes.Equal(highPolicy(tpm2.TPMAlgSHA256), want) || len(highPolicy(tpm2.TPMAlgSHA384)) != 48 {
		t.Errorf("%x", want)
	}
}

func TestParseEK_onlyTheTemplates(t *testing.T) {
	c := startChip(t)
	for name, template := range map[string]tpm2.TPMTPublic{"rsa": tpm2.RSAEKTemplate, "ecc": tpm2.ECCEKTemplate} {
		k := c.primary(tpm2.TPMRHEndorsement, template)
		c.flush(k)
		ek, err := ParseEK(k.public)
		if err != nil {
			t.Fatal(name, err)
		}
		if len(ek.ID()) != 64 {
			t.Errorf("id %q", ek.ID())
		}
		for i := range 58 {
			bad := bytes.Clone(k.public)
			bad[i] ^= 1
			_, err := ParseEK(bad)
			wantReason(t, name, err, ReasonEKTemplate)
		}
		for what, bad := range map[string][]byte{"cut": k.public[:len(k.public)-1], "longer": append(bytes.Clone(k.public), 0), "head": k.public[:60]} {
			_, err := ParseEK(bad)
			wantReason(t, name+" "+what, err, ReasonEKTemplate)
		}
	}
	// a storage key that is no endorsement key
	k := c.primary(tpm2.TPMRHOwner, tpm2.ECCSRKTemplate)
	_, err := ParseEK(k.public)
	wantReason(t, "storage root key", err, ReasonEKTemplate)
}

func testEK(t *testing.T) *EK {
	t.Helper()
	template := tpm2.ECCEKTemplate
	ek, err := ParseEK(append(prefix(&template, 2*(2+32)), pointOf(t)...))
	if err != nil {
		t.Fatal(err)
	}
	return ek
}

func TestEKCertificate(t *testing.T) {
	v, stranger := newVendor(t, "vendor"), newVendor(t, "vendor") // of the same name
	ek := testEK(t)
	roots := []*x509.Certificate{v.cert}
	now := time.Now()
	der := v.certify(t, ek, nil)
	cert, err := ParseEKCertificate(append(bytes.Clone(der), bytes.Repeat([]byte{0xff}, 100)...)) // as NV pads it
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.Verify(ek, roots, nil, now); err != nil {
		t.Fatal(err)
	}
	if cert.Chip != (Chip{Manufacturer: "id:00001014", Model: "swtpm", Version: "id:20191023"}) {
		t.Errorf("%+v", cert.Chip)
	}
	if _, err := cert.cert.Verify(x509.VerifyOptions{Roots: x509.NewCertPool()}); err == nil {
		t.Error("nobody's roots verify it")
	}
	for what, c := range map[string]struct {
		change func(*x509.Certificate)
		roots  []*x509.Certificate
		ek     *EK
		now    time.Time
		want   Reason
	}{
		"unknown CA of the same name": {nil, []*x509.Certificate{stranger.cert}, ek, now, ReasonEKTrust},
		"no roots":                    {nil, nil, ek, now, ReasonEKTrust},
		"another TPM's key":           {nil, roots, testEK(t), now, ReasonEKCertificate},
		"expired":                     {nil, roots, ek, now.Add(2 * time.Hour), ReasonEKTrust},
		"no usage":                    {func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, roots, ek, now, ReasonEKCertificate},
		"a server's usage": {func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, roots, ek, now, ReasonEKCertificate},
		"a platform's usage": {func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{tcg(8, 2)} }, roots, ek, now, ReasonEKCertificate},
		"a CA":               {func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, roots, ek, now, ReasonEKCertificate},
		"an unknown critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: tcg(99), Critical: true, Value: []byte{5, 0}})
		}, roots, ek, now, ReasonEKTrust},
	} {
		cert, err := ParseEKCertificate(v.certify(t, ek, c.change))
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		wantReason(t, what, cert.Verify(c.ek, c.roots, nil, c.now), c.want)
	}
	vendorID := pkix.AttributeTypeAndValue{Type: tcg(2, 1), Value: "id:00001014"}
	for what, x := range map[string]pkix.Extension{
		"no manufacturer": chipName(t, pkix.AttributeTypeAndValue{Type: tcg(2, 2), Value: "x"}),
		"two":             chipName(t, vendorID, vendorID),
		"empty":           chipName(t, pkix.AttributeTypeAndValue{Type: tcg(2, 1), Value: ""}),
		"no sequence":     {Id: oidSAN(), Critical: true, Value: []byte{0x30, 0x02, 0xa4, 0x00}},
	} {
		der := v.certify(t, ek, func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{x} })
		if _, err := ParseEKCertificate(der); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, b := range map[string][]byte{
		"empty": nil, "cut": der[:len(der)-1], "something follows": append(bytes.Clone(der), 1), "long": make([]byte, maxEKCertificate+1), "no certificate": {0x30, 0},
	} {
		if _, err := ParseEKCertificate(b); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	err = cert.Verify(ek, roots, make([]*x509.Certificate, maxIntermediates+1), now)
	wantReason(t, "many intermediates", err, ReasonTooLarge)
}

func TestEKPolicy(t *testing.T) {
	v, ours := newVendor(t, "vendor"), newVendor(t, "vTPM CA")
	ek := testEK(t)
	now := time.Now()
	parse := func(v *vendor, k *EK) *EKCertificate {
		c, err := ParseEKCertificate(v.certify(t, k, nil))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	vendors, id := []*x509.Certificate{v.cert}, []HostID{ek.ID()}
	for what, c := range map[string]struct {
		policy EKPolicy
		cert   *EKCertificate
		basis  Basis
		reason Reason
	}{
		"nobody is believed":                  {EKPolicy{}, parse(v, ek), "", ReasonEKTrust},
		"no certificate":                      {EKPolicy{VendorCAs: vendors}, nil, "", ReasonEKTrust},
		"vendor":                              {EKPolicy{VendorCAs: vendors}, parse(v, ek), BasisVendorCA, ""},
		"our own virtual TPM":                 {EKPolicy{VendorCAs: vendors, VTPMCAs: []*x509.Certificate{ours.cert}}, parse(ours, ek), BasisVTPMCA, ""},
		"unknown vendor":                      {EKPolicy{VendorCAs: vendors}, parse(ours, ek), "", ReasonEKTrust},
		"denied":                              {EKPolicy{VendorCAs: vendors, Denied: id, Allowed: id}, parse(v, ek), "", ReasonEKTrust},
		"allowed without certificate":         {EKPolicy{Allowed: id}, nil, BasisAllowList, ""},
		"allowed, unknown vendor":             {EKPolicy{VendorCAs: vendors, Allowed: id}, parse(ours, ek), BasisAllowList, ""},
		"another is allowed":                  {EKPolicy{Allowed: []HostID{testEK(t).ID()}}, nil, "", ReasonEKTrust},
		"allowed, with another's certificate": {EKPolicy{VendorCAs: vendors, Allowed: id}, parse(v, testEK(t)), "", ReasonEKCertificate},
		"first use":                           {EKPolicy{FirstUseUntil: now.Add(time.Hour)}, nil, "", ReasonEKPending},
		"first use, approved":                 {EKPolicy{FirstUseUntil: now.Add(time.Hour), Approved: id}, nil, BasisFirstUse, ""},
		"approved, too late":                  {EKPolicy{FirstUseUntil: now, Approved: id}, nil, "", ReasonEKTrust},
	} {
		basis, err := c.policy.Trust(ek, c.cert, nil, now)
		if basis != c.basis || (err == nil) != (c.reason == "") || (err != nil && ReasonOf(err) != c.reason) {
			t.Errorf("%s: %q, %v", what, basis, err)
		}
	}
}

// A TPM that swtpm's own tools made, with certificates from their CA.
func TestEKCertificate_swtpm(t *testing.T) {
	if _, err := exec.LookPath("swtpm_setup"); err != nil {
		t.Skip("SKIP: no swtpm_setup here")
	}
	ca := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(ca, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	local := write("localca.conf", "statedir = "+ca+"\nsigningkey = "+ca+"/key.pem\nissuercert = "+ca+"/cert.pem\ncertserial = "+ca+"/serial\n")
	options := write("options", "--platform-manufacturer Test\n--platform-version 1\n--platform-model QEMU\n")
	setup := write("setup.conf", "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = "+local+"\ncreate_certs_tool_options = "+options+"\nactive_pcr_banks = sha256\n")
	c := startChip(t)
	c.powerOff()
	state, err := filepath.Glob(filepath.Join(c.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range state {
		_ = os.Remove(f)
	}
	out, err := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", c.Dir, "--create-ek-cert", "--lock-nvram", "--config", setup, "--pcr-banks", "sha256").CombinedOutput()
	if err != nil {
		t.Fatalf("swtpm_setup: %v: %s", err, out)
	}
	c.powerOn()
	// This TPM has a SHA-256 bank only. It quotes any other as an empty
	// selection, and whoever compares no values finds them all equal.
	akKey := c.ak()
	ak, err := ParseAK(akKey.public)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{5}, 32)
	q := c.quoteSelection(akKey, nonce, everyPCR(SHA384))
	if !bytes.Contains(q.Attest, []byte{0, 0, 0, 1, 0, 0x0c, 3, 0, 0, 0}) {
		t.Errorf("a bank that is not there is quoted as %x", q.Attest)
	}
	_, err = VerifyQuote(ak, q, nonce, PowerOn(SHA384, 0))
	wantReason(t, "bank that is not there", err, ReasonPCRSelection)
	q, bank := c.quote(akKey, nonce, SHA256)
	if _, err := VerifyQuote(ak, q, nonce, bank); err != nil {
		t.Error(err)
	}
	c.flush(akKey)

	var roots, intermediates []*x509.Certificate
	for _, name := range []string{"swtpm-localca-rootca-cert.pem", "cert.pem"} {
		text, err := os.ReadFile(filepath.Join(ca, name))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if name == "cert.pem" {
			intermediates = append(intermediates, cert)
		} else {
			roots = append(roots, cert)
		}
	}
	for handle, nv := range map[tpm2.TPMHandle]tpm2.TPMHandle{0x81010001: 0x01c00002, 0x81010016: 0x01c00016} {
		r, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(c.tpm)
		if err != nil {
			t.Fatal(err)
		}
		ek, err := ParseEK(r.OutPublic.Bytes())
		if err != nil {
			t.Fatalf("%#x: %x: %v", handle, r.OutPublic.Bytes()[:64], err)
		}
		cert, err := ParseEKCertificate(readNV(t, c.tpm, nv))
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.Verify(ek, roots, intermediates, time.Now()); err != nil {
			t.Errorf("%#x: %v", handle, err)
		}
		if cert.Chip.Manufacturer != "id:00001014" || cert.Chip.Model != "swtpm" {
			t.Errorf("%+v", cert.Chip)
		}
		wantReason(t, "without the intermediate", cert.Verify(ek, roots, nil, time.Now()), ReasonEKTrust)
		// and the credential opens for this form of key too
		akKey := c.ak()
		ak, err := ParseAK(akKey.public)
		if err != nil {
			t.Fatal(err)
		}
		secret, cred, err := MakeCredential(ek, ak)
		if err != nil {
			t.Fatal(err)
		}
		policy := tpm2.Policy(tpm2.TPMIAlgHash(binary.BigEndian.Uint16(ek.Public[2:])), 16, endorsementPolicy)
		if handle == 0x81010016 {
			policy = tpm2.PasswordAuth(nil) // the high range's keys may be used with their own, empty, password
		}
		opened, err := tpm2.ActivateCredential{
			ActivateHandle: akKey.auth(), KeyHandle: tpm2.AuthHandle{Handle: handle, Name: r.Name, Auth: policy},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: cred.Blob}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: cred.Secret},
		}.Execute(c.tpm)
		if err != nil || !bytes.Equal(opened.CertInfo.Buffer, secret) {
			t.Errorf("%#x: activation: %v", handle, err)
		}
		c.flush(akKey)
	}
}

func readNV(t *testing.T, tpm transport.TPM, index tpm2.TPMHandle) []byte {
	t.Helper()
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	p, err := pub.NVPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for len(out) < int(p.DataSize) {
		r, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Size:       uint16(min(512, int(p.DataSize)-len(out))), Offset: uint16(len(out)),
		}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r.Data.Buffer...)
	}
	return out
}

// open is what a host does with a sealed secret.
func (c *chip) open(ek *key, s *Sealed, pcrs []int) ([]byte, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](s.Public)
	if err != nil {
		return nil, err
	}
	parent := tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsementPolicy)}
	imported, err := tpm2.Import{
		ParentHandle: parent, ObjectPublic: tpm2.New2B(*public), Duplicate: tpm2.TPM2BPrivate{Buffer: s.Duplicate},
		InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: s.Seed}, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(c.tpm)
	if err != nil {
		return nil, err
	}
	loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: imported.OutPrivate, InPublic: tpm2.New2B(*public)}.Execute(c.tpm)
	if err != nil {
		return nil, err
	}
	defer c.flush(&key{handle: loaded.ObjectHandle})
	selection, _ := selectPCRs(PowerOn(SHA256, 0), pcrs)
	r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: loaded.ObjectHandle, Name: loaded.Name,
		Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection}.Execute(t)
			return err
		}),
	}}.Execute(c.tpm)
	if err != nil {
		return nil, err
	}
	return r.OutData.Buffer, nil
}

func TestSeal(t *testing.T) {
	c, other := startChip(t), startChip(t)
	c.extend(7, SHA256.sum([]byte("boot")))
	ekKey, otherKey := c.ek(), other.ek()
	ek, err := ParseEK(ekKey.public)
	if err != nil {
		t.Fatal(err)
	}
	secret, pcrs := []byte("one hour's certificate and its key"), []int{11, 4, 7}
	s, err := Seal(ek, c.bank(SHA256), pcrs, secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.open(ekKey, s, pcrs)
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%q, %v", got, err)
	}
	if got, err := other.open(otherKey, s, pcrs); err == nil {
		t.Errorf("opens on another host: %q", got)
	}
	bad := *s
	bad.Public = bytes.Clone(s.Public)
	bad.Public[len(bad.Public)-1] ^= 1
	if _, err := c.open(ekKey, &bad, pcrs); !errors.Is(err, tpm2.TPMRCIntegrity) {
		t.Errorf("changed: %v", err)
	}
	if _, err := c.open(ekKey, s, []int{4, 7}); !errors.Is(err, tpm2.TPMRCPolicyFail) {
		t.Errorf("fewer PCRs: %v", err)
	}
	c.extend(11, SHA256.sum([]byte("enter-initrd")))
	if got, err := c.open(ekKey, s, pcrs); !errors.Is(err, tpm2.TPMRCPolicyFail) {
		t.Errorf("opens in another state: %q, %v", got, err)
	}
	for what, err := range map[string]error{
		"no PCRs":  second(Seal(ek, c.bank(SHA256), nil, secret)),
		"nothing":  second(Seal(ek, c.bank(SHA256), pcrs, nil)),
		"too much": second(Seal(ek, c.bank(SHA256), pcrs, make([]byte, maxSealed+1))),
		"SHA-1":    second(Seal(ek, PowerOn(SHA1, 0), pcrs, secret)),
	} {
		if !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func FuzzParseEKCertificate(f *testing.F) {
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = ParseEKCertificate(b)
		_, _ = parseChip(b)
	})
}
