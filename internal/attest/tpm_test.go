package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"ringwall/internal/testkit"
)

// chip is a software TPM, and what a host does with it.
type chip struct {
	*testkit.TPM
	t   *testing.T
	tpm transport.TPMCloser
}

func startChip(t *testing.T) *chip {
	t.Helper()
	c := &chip{TPM: testkit.StartTPM(t), t: t}
	t.Cleanup(c.powerOff)
	c.connect()
	return c
}

func (c *chip) connect() {
	c.t.Helper()
	tpm, err := linuxudstpm.Open(c.Path)
	if err != nil {
		c.t.Fatal(err)
	}
	c.tpm = tpm
}

func (c *chip) powerOn() {
	c.t.Helper()
	c.Start()
	c.connect()
}

func (c *chip) powerOff() {
	if c.tpm != nil {
		_ = c.tpm.Close()
		c.tpm = nil
	}
	c.Stop()
}

// key is a loaded key.
type key struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public []byte
}

func (k *key) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: tpm2.PasswordAuth(nil)}
}

func (c *chip) primary(hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic) *key {
	c.t.Helper()
	r, err := tpm2.CreatePrimary{PrimaryHandle: hierarchy, InPublic: tpm2.New2B(template)}.Execute(c.tpm)
	if err != nil {
		c.t.Fatal(err)
	}
	return &key{handle: r.ObjectHandle, name: r.Name, public: r.OutPublic.Bytes()}
}

func (c *chip) flush(keys ...*key) {
	for _, k := range keys {
		_, _ = tpm2.FlushContext{FlushHandle: k.handle}.Execute(c.tpm)
	}
}

func (c *chip) ak() *key { return c.primary(tpm2.TPMRHEndorsement, AKTemplate()) }

func (c *chip) ek() *key { return c.primary(tpm2.TPMRHEndorsement, tpm2.ECCEKTemplate) }

func endorsementPolicy(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session, NonceTPM: nonce,
	}.Execute(t)
	return err
}

func (c *chip) activate(ek, ak *key, cred Credential) ([]byte, error) {
	r, err := tpm2.ActivateCredential{
		ActivateHandle: ak.auth(),
		KeyHandle:      tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsementPolicy)},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: cred.Blob},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: cred.Secret},
	}.Execute(c.tpm)
	if err != nil {
		return nil, err
	}
	return r.CertInfo.Buffer, nil
}

func everyPCR(a Alg) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgID(a), PCRSelect: []byte{0xff, 0xff, 0xff}}}}
}

func (c *chip) quoteSelection(ak *key, qualifying []byte, selection tpm2.TPMLPCRSelection) Quote {
	c.t.Helper()
	r, err := tpm2.Quote{
		SignHandle: ak.auth(), QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selection,
	}.Execute(c.tpm)
	if err != nil {
		c.t.Fatal(err)
	}
	return Quote{Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}
}

func (c *chip) quote(ak *key, qualifying []byte, a Alg) (Quote, *Bank) {
	c.t.Helper()
	return c.quoteSelection(ak, qualifying, everyPCR(a)), c.bank(a)
}

func (c *chip) bank(a Alg) *Bank {
	c.t.Helper()
	var values [][]byte
	for i := range NumPCRs {
		mask := make([]byte, 3)
		mask[i/8] = 1 << (i % 8)
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgID(a), PCRSelect: mask}}}}.Execute(c.tpm)
		if err != nil || len(r.PCRValues.Digests) != 1 {
			c.t.Fatalf("PCR %d: %v", i, err)
		}
		values = append(values, r.PCRValues.Digests[0].Buffer)
	}
	b, err := NewBank(a, values)
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

// extend extends the SHA-256 bank.
func (c *chip) extend(pcr int, digest []byte) {
	c.t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}.Execute(c.tpm)
	if err != nil {
		c.t.Fatal(err)
	}
}

// boot does to the TPM what a machine with these logs did.
func (c *chip) boot(log *Log, imaDigests ...[]byte) {
	c.t.Helper()
	for i := range log.Events {
		if e := &log.Events[i]; e.Type != EventNoAction {
			c.extend(e.PCR, e.Digest(SHA256))
		}
	}
	for _, d := range imaDigests {
		c.extend(pcrIMA, d)
	}
}

// vendor is a certificate authority for TPMs.
type vendor struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newVendor(t *testing.T, name string) *vendor {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	return &vendor{key: k, cert: issue(t, template, template, k.Public(), k)}
}

func issue(t *testing.T, template, parent *x509.Certificate, public, signer any) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// chipName is the alternative name of an EK certificate.
func chipName(t *testing.T, attributes ...pkix.AttributeTypeAndValue) pkix.Extension {
	t.Helper()
	set := pkix.RelativeDistinguishedNameSET(attributes)
	name, err := asn1.Marshal(pkix.RDNSequence{set})
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagDirectoryName, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSAN(), Critical: true, Value: der}
}

func genuineName(t *testing.T) pkix.Extension {
	t.Helper()
	return chipName(t,
		pkix.AttributeTypeAndValue{Type: tcg(2, 1), Value: "id:00001014"},
		pkix.AttributeTypeAndValue{Type: tcg(2, 2), Value: "swtpm"},
		pkix.AttributeTypeAndValue{Type: tcg(2, 3), Value: "id:20191023"})
}

// certify issues an EK certificate; change edits it first.
func (v *vendor) certify(t *testing.T, ek *EK, change func(*x509.Certificate)) []byte {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: []asn1.ObjectIdentifier{tcg(8, 1)},
		ExtraExtensions: []pkix.Extension{genuineName(t)},
	}
	if change != nil {
		change(template)
	}
	return issue(t, template, v.cert, ek.Key, v.key).Raw
}

func wantReason(t *testing.T, what string, err error, want Reason) {
	t.Helper()
	if err == nil || ReasonOf(err) != want {
		t.Errorf("%s: %v (want %s)", what, err, want)
	}
}
