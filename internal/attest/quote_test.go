package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"ringwall/internal/errs"
)

func parseKeys(t *testing.T, ek, ak *key) (*EK, *AK) {
	t.Helper()
	e, err := ParseEK(ek.public)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ParseAK(ak.public)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Name(), ak.name.Buffer) {
		t.Fatalf("name %x, the TPM says %x", a.Name(), ak.name.Buffer)
	}
	return e, a
}

func TestQuote(t *testing.T) {
	c := startChip(t)
	k := c.ak()
	ak, err := ParseAK(k.public)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{7}, 32)
	c.extend(3, nonce)
	for _, a := range []Alg{SHA256, SHA384} {
		q, bank := c.quote(k, nonce, a)
		clock, err := VerifyQuote(ak, q, nonce, bank)
		if err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		if clock.Resets == 0 || clock.Restarts != 0 || clock.Milliseconds == 0 || clock.Firmware == 0 {
			t.Errorf("clock %+v", clock)
		}
	}
	q, bank := c.quote(k, nonce, SHA256)

	other := bytes.Clone(nonce)
	other[31] ^= 1
	_, err = VerifyQuote(ak, q, other, bank)
	wantReason(t, "another nonce", err, ReasonNonce)
	_, err = VerifyQuote(ak, q, nil, bank)
	wantReason(t, "no nonce", err, ReasonNonce)
	for pcr := range NumPCRs {
		changed := bank.Clone()
		changed.Values[pcr][0] ^= 1
		_, err = VerifyQuote(ak, q, nonce, changed)
		wantReason(t, "changed PCR", err, ReasonPCRDigest)
	}
	for what, selection := range map[string]tpm2.TPMLPCRSelection{
		"fewer PCRs":   {PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0x7f}}}},
		"another bank": everyPCR(SHA384),
		"SHA-1":        everyPCR(SHA1),
		"no PCRs":      {PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0, 0, 0}}}},
		"no bank":      {},
		"two banks": {PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0xff}}, {Hash: tpm2.TPMAlgSHA384, PCRSelect: []byte{1, 0, 0}},
		}},
		"yet another bank": {PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA512, PCRSelect: []byte{0xff, 0xff, 0xff}}}},
	} {
		_, err = VerifyQuote(ak, c.quoteSelection(k, nonce, selection), nonce, bank)
		wantReason(t, what, err, ReasonPCRSelection)
	}
	_, err = VerifyQuote(ak, c.quoteSelection(k, nonce, everyPCR(SHA1)), nonce, PowerOn(SHA1, 0))
	wantReason(t, "SHA-1 for SHA-1", err, ReasonPCRSelection)

	second := c.primary(tpm2.TPMRHOwner, AKTemplate())
	owner, err := ParseAK(second.public)
	if err != nil {
		t.Fatal(err)
	}
	q2, _ := c.quote(second, nonce, SHA256)
	_, err = VerifyQuote(owner, q2, nonce, bank)
	wantReason(t, "key of the owner hierarchy", err, ReasonAKHierarchy)
	_, err = VerifyQuote(ak, q2, nonce, bank)
	wantReason(t, "another key", err, ReasonSignature)

	// another kind of attestation with the right nonce
	r, err := tpm2.GetTime{
		PrivacyAdminHandle: tpm2.TPMRHEndorsement,
		SignHandle:         k.auth(), QualifyingData: tpm2.TPM2BData{Buffer: nonce}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = VerifyQuote(ak, Quote{Attest: r.TimeInfo.Bytes(), Signature: tpm2.Marshal(r.Signature)}, nonce, bank)
	wantReason(t, "GetTime", err, ReasonAttestMagic)

	// every single bit matters, and every cut
	for i := range q.Attest {
		bad := Quote{Attest: bytes.Clone(q.Attest), Signature: q.Signature}
		bad.Attest[i] ^= 0x10
		if _, err := VerifyQuote(ak, bad, nonce, bank); err == nil {
			t.Errorf("byte %d of the quote may be changed", i)
		}
	}
	for i := range q.Signature {
		if _, err := VerifyQuote(ak, Quote{Attest: q.Attest, Signature: q.Signature[:i]}, nonce, bank); err == nil {
			t.Errorf("signature cut to %d bytes", i)
		}
	}
}

// An attestation key that may sign anything signs a forged quote; a key like
// that is not let in.
func TestAK_onlyTheTemplate(t *testing.T) {
	c := startChip(t)
	good := c.ak()
	c.flush(good)
	if _, err := ParseAK(good.public); err != nil {
		t.Fatal(err)
	}
	for i := range len(akPrefix()) {
		for bit := range 8 {
			bad := bytes.Clone(good.public)
			bad[i] ^= 1 << bit
			if _, err := ParseAK(bad); ReasonOf(err) != ReasonAK {
				t.Errorf("byte %d, bit %d: %v", i, bit, err)
			}
		}
	}
	for what, bad := range map[string][]byte{
		"empty": nil, "cut": good.public[:len(good.public)-1], "longer": append(bytes.Clone(good.public), 0),
		"not on the curve": append(bytes.Clone(good.public[:len(good.public)-1]), good.public[len(good.public)-1]^1),
	} {
		_, err := ParseAK(bad)
		wantReason(t, what, err, ReasonAK)
	}
	// a real TPM's key without the restriction signs what it is given
	loose := AKTemplate()
	loose.ObjectAttributes.Restricted = false
	k := c.primary(tpm2.TPMRHEndorsement, loose)
	_, err := ParseAK(k.public)
	wantReason(t, "unrestricted key", err, ReasonAK)
	// and the restricted one does not: the TPM itself refuses
	ak := c.ak()
	forged, err := tpm2.Hash{
		Data: tpm2.TPM2BMaxBuffer{Buffer: []byte("\xffTCG\x80\x18")}, HashAlg: tpm2.TPMAlgSHA256, Hierarchy: tpm2.TPMRHEndorsement,
	}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.Sign{
		KeyHandle: ak.auth(), Digest: forged.OutHash, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, Validation: forged.Validation,
	}.Execute(c.tpm)
	if !errors.Is(err, tpm2.TPMRCTicket) {
		t.Errorf("the TPM signs a forged quote: %v", err)
	}
}

func TestActivate(t *testing.T) {
	c := startChip(t)
	for name, template := range map[string]tpm2.TPMTPublic{"rsa": tpm2.RSAEKTemplate, "ecc": tpm2.ECCEKTemplate} {
		t.Run(name, func(t *testing.T) {
			ekKey, akKey := c.primary(tpm2.TPMRHEndorsement, template), c.ak()
			defer c.flush(ekKey, akKey)
			ek, ak := parseKeys(t, ekKey, akKey)
			secret, cred, err := MakeCredential(ek, ak)
			if err != nil {
				t.Fatal(err)
			}
			got, err := c.activate(ekKey, akKey, cred)
			if err != nil || !bytes.Equal(got, secret) {
				t.Fatalf("the host opens %x, %v; it was %x", got, err, secret)
			}
			// the key of another TPM
			alien, err := ParseAK(append(akPrefix(), pointOf(t)...))
			if err != nil {
				t.Fatal(err)
			}
			_, cred, err = MakeCredential(ek, alien)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := c.activate(ekKey, akKey, cred); err == nil {
				t.Errorf("a credential for an attestation key that this TPM does not have opens: %x", got)
			}
			// damaged
			_, cred, err = MakeCredential(ek, ak)
			if err != nil {
				t.Fatal(err)
			}
			cred.Blob[len(cred.Blob)-1] ^= 1
			if _, err := c.activate(ekKey, akKey, cred); err == nil {
				t.Error("a damaged credential opens")
			}
		})
	}
}

// pointOf is the unique part of a key that no TPM has.
func pointOf(t *testing.T) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return encodePoint(k)
}

func encodePoint(k *ecdsa.PrivateKey) []byte {
	b := binary.BigEndian.AppendUint16(nil, 32)
	b = append(b, k.X.FillBytes(make([]byte, 32))...)
	b = binary.BigEndian.AppendUint16(b, 32)
	return append(b, k.Y.FillBytes(make([]byte, 32))...)
}

func TestCertify(t *testing.T) {
	c := startChip(t)
	akKey := c.ak()
	ak, err := ParseAK(akKey.public)
	if err != nil {
		t.Fatal(err)
	}
	nonce := []byte("certify this key, please: 0123456")
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(SigningTemplate())}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	tls := &key{handle: r.ObjectHandle, name: r.Name, public: r.OutPublic.Bytes()}
	cert, err := tpm2.Certify{
		ObjectHandle: tls.auth(), SignHandle: akKey.auth(), QualifyingData: tpm2.TPM2BData{Buffer: nonce},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	q := Quote{Attest: cert.CertifyInfo.Bytes(), Signature: tpm2.Marshal(cert.Signature)}
	if _, err := VerifyCertify(ak, q, nonce, tls.public); err != nil {
		t.Fatal(err)
	}
	_, err = VerifyCertify(ak, q, []byte("another"), tls.public)
	wantReason(t, "another nonce", err, ReasonNonce)
	_, err = VerifyCertify(ak, q, nonce, append(signingPrefix(), pointOf(t)...))
	wantReason(t, "another key", err, ReasonKey)
	_, err = VerifyCreation(ak, q, nonce, tls.public, r.CreationHash.Buffer)
	wantReason(t, "certification for creation", err, ReasonAttestMagic)

	made, err := tpm2.CertifyCreation{
		SignHandle: akKey.auth(), ObjectHandle: tpm2.NamedHandle{Handle: tls.handle, Name: tls.name},
		QualifyingData: tpm2.TPM2BData{Buffer: nonce}, CreationHash: r.CreationHash,
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, CreationTicket: r.CreationTicket,
	}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	q = Quote{Attest: made.CertifyInfo.Bytes(), Signature: tpm2.Marshal(made.Signature)}
	if _, err := VerifyCreation(ak, q, nonce, tls.public, r.CreationHash.Buffer); err != nil {
		t.Fatal(err)
	}
	_, err = VerifyCreation(ak, q, nonce, tls.public, SHA256.sum(nil))
	wantReason(t, "other creation data", err, ReasonKey)
	c.flush(tls)

	// a key that came from outside can be certified too, and says so
	loose := SigningTemplate()
	loose.ObjectAttributes.FixedTPM, loose.ObjectAttributes.FixedParent = false, false
	k := c.primary(tpm2.TPMRHOwner, loose)
	cert, err = tpm2.Certify{
		ObjectHandle: k.auth(), SignHandle: akKey.auth(), QualifyingData: tpm2.TPM2BData{Buffer: nonce},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(c.tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = VerifyCertify(ak, Quote{Attest: cert.CertifyInfo.Bytes(), Signature: tpm2.Marshal(cert.Signature)}, nonce, k.public)
	wantReason(t, "key that can leave", err, ReasonKey)
}

// forger signs like a TPM whose key it has: what a quote looks like is then up
// to it, so that every form can be tried.
type forger struct {
	key *ecdsa.PrivateKey
	ak  *AK
}

func newForger(t testing.TB) *forger {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := ParseAK(append(akPrefix(), encodePoint(k)...))
	if err != nil {
		t.Fatal(err)
	}
	return &forger{key: k, ak: ak}
}

func (f *forger) sign(attest []byte) Quote {
	d := sha256.Sum256(attest)
	sig, err := ecdsa.SignASN1(rand.Reader, f.key, d[:])
	if err != nil {
		panic(err)
	}
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(sig, &v); err != nil {
		panic(err)
	}
	be := binary.BigEndian
	b := be.AppendUint16(be.AppendUint16(nil, tpmECDSA), uint16(SHA256))
	b = append(be.AppendUint16(b, 32), v.R.FillBytes(make([]byte, 32))...)
	b = append(be.AppendUint16(b, 32), v.S.FillBytes(make([]byte, 32))...)
	return Quote{Attest: attest, Signature: b}
}

// quote is what an honest TPM says.
func (f *forger) quote(nonce []byte, bank *Bank, clock Clock) []byte {
	be := binary.BigEndian
	b := be.AppendUint32(nil, tpmGenerated)
	b = be.AppendUint16(b, tpmSTQuote)
	b = append(be.AppendUint16(b, 34), f.ak.qualifiedName()...)
	b = append(be.AppendUint16(b, uint16(len(nonce))), nonce...)
	b = be.AppendUint64(b, clock.Milliseconds)
	b = be.AppendUint32(be.AppendUint32(b, clock.Resets), clock.Restarts)
	b = append(b, map[bool]byte{true: 1}[clock.Safe])
	b = be.AppendUint64(b, clock.Firmware)
	b = be.AppendUint32(b, 1)
	b = append(be.AppendUint16(b, uint16(bank.Alg)), 3, 0xff, 0xff, 0xff)
	return append(be.AppendUint16(b, 32), SHA256.sum(bank.Values[:]...)...)
}

func TestQuote_forms(t *testing.T) {
	f := newForger(t)
	nonce, bank := []byte("nonce"), PowerOn(SHA256, 0)
	clock := Clock{Milliseconds: 5, Resets: 3, Restarts: 1, Safe: true, Firmware: 9}
	good := f.quote(nonce, bank, clock)
	got, err := VerifyQuote(f.ak, f.sign(good), nonce, bank)
	if err != nil || *got != clock {
		t.Fatalf("%+v, %v", got, err)
	}
	for what, bad := range map[string][]byte{
		"longer": append(bytes.Clone(good), 0), "cut": good[:len(good)-1], "empty": {},
		"long": append(bytes.Clone(good), make([]byte, maxAttest)...),
	} {
		if _, err := VerifyQuote(f.ak, f.sign(bad), nonce, bank); !errors.Is(err, errs.Invalid) && ReasonOf(err) != ReasonAttestMagic {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = VerifyQuote(f.ak, f.sign(f.quote(nil, bank, clock)), nil, bank)
	wantReason(t, "no challenge at all", err, ReasonNonce)
	bad := bytes.Clone(good)
	bad[0] = 0
	_, err = VerifyQuote(f.ak, f.sign(bad), nonce, bank)
	wantReason(t, "no magic", err, ReasonAttestMagic)
	bad = bytes.Clone(good)
	bad[4+2+2+34+2+len(nonce)+16] = 2
	_, err = VerifyQuote(f.ak, f.sign(bad), nonce, bank)
	wantReason(t, "flag of 2", err, ReasonMalformed)
	q := f.sign(good)
	q.Signature[3] = byte(SHA1)
	_, err = VerifyQuote(f.ak, q, nonce, bank)
	wantReason(t, "SHA-1 signature", err, ReasonSignature)
}

func FuzzQuote(f *testing.F) {
	forge := newForger(f)
	nonce, bank := []byte("nonce"), PowerOn(SHA256, 0)
	good := forge.quote(nonce, bank, Clock{Resets: 1})
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := VerifyQuote(forge.ak, forge.sign(b), nonce, bank); err == nil && len(b) != len(good) {
			t.Errorf("%x is a quote", b)
		}
		_, _ = ParseAK(b)
		_, _ = ParseEK(b)
		_ = forge.ak.verify(nonce, b)
	})
}
