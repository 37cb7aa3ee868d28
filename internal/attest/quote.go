package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/subtle"
	"math/big"
)

// TPM constants (TPM 2.0 Library, part 2).
const (
	tpmGenerated   = 0xff544347 // TPM_GENERATED_VALUE
	tpmSTCertify   = 0x8017
	tpmSTQuote     = 0x8018
	tpmSTCreation  = 0x801a
	tpmECDSA       = 0x0018
	tpmEndorsement = 0x4000000b

	maxAttest    = 4096
	maxSignature = 512
)

// Quote is a TPM's signed word about its PCRs.
type Quote struct {
	Attest    []byte `json:"attest"`    // TPMS_ATTEST
	Signature []byte `json:"signature"` // TPMT_SIGNATURE
}

// Clock is the TPM's own account of time and restarts. Only keys of the
// endorsement hierarchy see these values in clear; others get them scrambled.
type Clock struct {
	Milliseconds uint64 `json:"ms"`            // powered-on time since the last TPM2_Clear
	Resets       uint32 `json:"reset_count"`   // power-ons since then
	Restarts     uint32 `json:"restart_count"` // resumes since the last power-on
	Safe         bool   `json:"safe"`          // Milliseconds never ran backwards
	Firmware     uint64 `json:"firmware"`      // version of the TPM's firmware, as the vendor counts
}

// attested is a TPMS_ATTEST.
type attested struct {
	kind      uint16
	signer    []byte // qualified name
	extraData []byte
	clock     Clock
	body      cursor
}

// parseAttest reads the common part of a TPMS_ATTEST and demands the magic
// number that a TPM puts into nothing but what it made itself.
func parseAttest(b []byte) (*attested, error) {
	if len(b) > maxAttest {
		return nil, tooLarge("attestation of %d bytes (at most %d)", len(b), maxAttest)
	}
	c := bigEndian(b)
	magic := c.u32()
	a := &attested{kind: c.u16(), signer: c.sized16(), extraData: c.sized16()}
	a.clock = Clock{Milliseconds: c.u64(), Resets: c.u32(), Restarts: c.u32()}
	safe := c.u8()
	a.clock.Safe, a.clock.Firmware = safe == 1, c.u64()
	a.body = c
	if magic != tpmGenerated {
		return nil, refuse(ReasonAttestMagic, "signed bytes that no TPM generated (%#x)", magic)
	}
	if c.short || safe > 1 {
		return nil, malformed("attestation of %d bytes ends early, or with a flag of %d", len(b), safe)
	}
	return a, nil
}

// open verifies the key's signature and returns what it covers: an attestation
// of the kind, for this challenge, by a primary key of the endorsement
// hierarchy.
func (k *AK) open(attest, sig, qualifying []byte, kind uint16) (*attested, error) {
	if err := k.verify(attest, sig); err != nil {
		return nil, err
	}
	a, err := parseAttest(attest)
	if err != nil {
		return nil, err
	}
	if a.kind != kind {
		return nil, refuse(ReasonAttestMagic, "an attestation of kind %#x (want %#x)", a.kind, kind)
	}
	if len(qualifying) == 0 || subtle.ConstantTimeCompare(a.extraData, qualifying) != 1 {
		return nil, refuse(ReasonNonce, "it answers another challenge")
	}
	if !bytes.Equal(a.signer, k.qualifiedName()) {
		return nil, refuse(ReasonAKHierarchy, "the attestation key is no primary key of the endorsement hierarchy")
	}
	return a, nil
}

// verify checks an ECDSA P-256 signature with SHA-256 in a TPMT_SIGNATURE.
func (k *AK) verify(message, sig []byte) error {
	if len(sig) > maxSignature {
		return tooLarge("signature of %d bytes (at most %d)", len(sig), maxSignature)
	}
	c := bigEndian(sig)
	scheme, hash := c.u16(), c.u16()
	r, s := c.sized16(), c.sized16()
	if !c.done() {
		return malformed("signature of %d bytes", len(sig))
	}
	if scheme != tpmECDSA || Alg(hash) != SHA256 {
		return refuse(ReasonSignature, "scheme %#x with hash %#x (want ECDSA with SHA-256)", scheme, hash)
	}
	digest := sha256.Sum256(message)
	if !ecdsa.Verify(k.Key, digest[:], new(big.Int).SetBytes(r), new(big.Int).SetBytes(s)) {
		return refuse(ReasonSignature, "the attestation key did not sign this")
	}
	return nil
}

// VerifyQuote decides whether a quote is the attestation key's answer to the
// challenge: a quote over every PCR of the bank and nothing else, whose digest
// is that of the values that came along. A TPM quotes a bank that it does not
// have as an empty selection, with a digest of nothing; that is refused like
// every other selection.
func VerifyQuote(ak *AK, q Quote, qualifying []byte, bank *Bank) (*Clock, error) {
	if !bank.Alg.quotable() {
		return nil, refuse(ReasonPCRSelection, "bank %s is not strong enough", bank.Alg)
	}
	a, err := ak.open(q.Attest, q.Signature, qualifying, tpmSTQuote)
	if err != nil {
		return nil, err
	}
	c := &a.body
	banks, alg := c.u32(), Alg(c.u16())
	selected := c.bytes(uint64(c.u8()))
	digest := c.sized16()
	if banks != 1 || alg != bank.Alg || !bytes.Equal(selected, []byte{0xff, 0xff, 0xff}) {
		return nil, refuse(ReasonPCRSelection, "%d banks, %v, PCRs %x (want all of %v)", banks, alg, selected, bank.Alg)
	}
	if !c.done() {
		return nil, malformed("quote of %d bytes does not end where it says", len(q.Attest))
	}
	// The digest is made with the signing scheme's hash, whatever the bank.
	if !bytes.Equal(SHA256.sum(bank.Values[:]...), digest) {
		return nil, refuse(ReasonPCRDigest, "the values sent are not those that the TPM quoted")
	}
	return &a.clock, nil
}

// VerifyCertify decides whether a key is held by the TPM of the attestation
// key, from TPM2_Certify's answer to the challenge: public is the key's
// TPMT_PUBLIC, which must be a signing key that never leaves the TPM. It
// returns the key.
func VerifyCertify(ak *AK, q Quote, qualifying, public []byte) (*ecdsa.PublicKey, error) {
	a, err := ak.open(q.Attest, q.Signature, qualifying, tpmSTCertify)
	if err != nil {
		return nil, err
	}
	name := a.body.sized16()
	a.body.sized16() // the qualified name: where in the TPM the key hangs
	if !a.body.done() {
		return nil, malformed("certification of %d bytes does not end where it says", len(q.Attest))
	}
	return certifiedKey(name, public)
}

// VerifyCreation is VerifyCertify for TPM2_CertifyCreation, which also proves
// that the key was made by this TPM with the creation data whose hash is given.
func VerifyCreation(ak *AK, q Quote, qualifying, public, creationHash []byte) (*ecdsa.PublicKey, error) {
	a, err := ak.open(q.Attest, q.Signature, qualifying, tpmSTCreation)
	if err != nil {
		return nil, err
	}
	name, hash := a.body.sized16(), a.body.sized16()
	if !a.body.done() {
		return nil, malformed("certification of %d bytes does not end where it says", len(q.Attest))
	}
	if len(creationHash) == 0 || !bytes.Equal(hash, creationHash) {
		return nil, refuse(ReasonKey, "it was made with other creation data")
	}
	return certifiedKey(name, public)
}

func certifiedKey(name, public []byte) (*ecdsa.PublicKey, error) {
	if !bytes.Equal(name, objectName(public)) {
		return nil, refuse(ReasonKey, "another key was certified")
	}
	key, ok := parseP256(public, signingPrefix(), true)
	if !ok {
		return nil, refuse(ReasonKey, "not a signing key on P-256 that its TPM made and keeps")
	}
	return key, nil
}
