package attest

import (
	"bytes"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"ringwall/internal/errs"
)

// ekForm is one of the TCG's templates for endorsement keys (TCG EK Credential
// Profile for TPM Family 2.0, annex B).
type ekForm struct {
	public tpm2.TPMTPublic
	unique int            // bytes of the unique part in the template
	curve  elliptic.Curve // nil: RSA
	bits   int            // of an RSA key
}

// ekForms are the low-range templates L-1 and L-2, and H-1 to H-3 and H-6 of
// the high range.
func ekForms() []ekForm {
	p256, p384 := elliptic.P256(), elliptic.P384()
	rsaLow, eccLow := tpm2.RSAEKTemplate, tpm2.ECCEKTemplate
	return []ekForm{
		{public: rsaLow, unique: 2 + 256, bits: 2048},
		{public: eccLow, unique: 2 * (2 + 32), curve: p256},
		{public: highEK(tpm2.TPMAlgSHA256, rsaParms(2048, 128)), unique: 2, bits: 2048},
		{public: highEK(tpm2.TPMAlgSHA256, eccParms(tpm2.TPMECCNistP256, 128)), unique: emptyPoint, curve: p256},
		{public: highEK(tpm2.TPMAlgSHA384, eccParms(tpm2.TPMECCNistP384, 256)), unique: emptyPoint, curve: p384},
		{public: highEK(tpm2.TPMAlgSHA384, rsaParms(3072, 256)), unique: 2, bits: 3072},
	}
}

// EKTemplate is a template for endorsement keys, as a host makes one from it.
type EKTemplate struct {
	Public tpm2.TPMTPublic
	// Certificate is the NV index where the maker of the TPM left the key's
	// certificate, if there is one (profile, section 2.2.1.4 and 2.2.1.5).
	Certificate uint32
	// Policy: the key is used through the endorsement hierarchy's authorisation
	// and not by its own password.
	Policy bool
}

// EKTemplates are the templates in the order in which a host takes the first
// that it has a certificate for: small keys first.
func EKTemplates() []EKTemplate {
	f := ekForms()
	return []EKTemplate{
		{f[1].public, 0x01c0000a, true},
		{f[3].public, 0x01c00014, false},
		{f[4].public, 0x01c00016, false},
		{f[0].public, 0x01c00002, true},
		{f[2].public, 0x01c00012, false},
		{f[5].public, 0x01c0001c, false},
	}
}

// PCRSelection is a TPM's selection of some PCRs of a bank.
func PCRSelection(a Alg, pcrs []int) tpm2.TPMLPCRSelection {
	s, _ := selectPCRs(PowerOn(a, 0), pcrs)
	return s
}

// highPolicy is the profile's PolicyB, the policy of the high range's keys:
// the endorsement authorisation, or a policy in NV that the owner may set.
func highPolicy(nameAlg tpm2.TPMAlgID) []byte {
	text := "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"
	if nameAlg == tpm2.TPMAlgSHA384 {
		text = "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
	}
	d, _ := hex.DecodeString(text)
	return d
}

type ekParms struct {
	kind  tpm2.TPMAlgID
	parms tpm2.TPMUPublicParms
}

func highEK(nameAlg tpm2.TPMAlgID, p ekParms) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: p.kind, NameAlg: nameAlg, Parameters: p.parms,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			AdminWithPolicy: true, Restricted: true, Decrypt: true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: highPolicy(nameAlg)},
	}
}

func aesCFB(bits tpm2.TPMKeyBits) tpm2.TPMTSymDefObject {
	return tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
}

func rsaParms(bits, aes tpm2.TPMKeyBits) ekParms {
	return ekParms{tpm2.TPMAlgRSA, tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Symmetric: aesCFB(aes), KeyBits: bits})}
}

func eccParms(curve tpm2.TPMECCCurve, aes tpm2.TPMKeyBits) ekParms {
	return ekParms{tpm2.TPMAlgECC, tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Symmetric: aesCFB(aes), CurveID: curve})}
}

// ParseEK reads a TPMT_PUBLIC that equals one of the TCG's templates for
// endorsement keys in everything but the key: storage keys that never leave
// their TPM and can be used through the endorsement authorisation only.
func ParseEK(public []byte) (*EK, error) {
	for _, f := range ekForms() {
		head := prefix(&f.public, f.unique)
		unique, ok := bytes.CutPrefix(public, head)
		if !ok {
			continue
		}
		ek := &EK{Public: bytes.Clone(public), public: f.public}
		if f.curve != nil {
			key, ok := parsePoint(unique, f.curve)
			if !ok {
				break
			}
			ek.Key = key
			c := bigEndian(bytes.Clone(unique))
			ek.public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
				X: tpm2.TPM2BECCParameter{Buffer: c.sized16()}, Y: tpm2.TPM2BECCParameter{Buffer: c.sized16()},
			})
			return ek, nil
		}
		c := bigEndian(bytes.Clone(unique))
		n := c.sized16()
		if !c.done() || len(n)*8 != f.bits || n[0]&0x80 == 0 || n[len(n)-1]&1 == 0 {
			break
		}
		const exponent = 65537 // the templates' zero
		ek.Key = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: exponent}
		ek.public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: n})
		return ek, nil
	}
	return nil, refuse(ReasonEKTemplate, "a public area of %d bytes that is none of the TCG's endorsement keys", len(public))
}

// Credential is a secret that only the TPM of an endorsement key can open, and
// only if it also holds the attestation key that was named.
type Credential struct {
	Blob   []byte `json:"blob"`   // TPMS_ID_OBJECT
	Secret []byte `json:"secret"` // TPM2B_ENCRYPTED_SECRET's content
}

const secretSize = 32

// MakeCredential is TPM2_MakeCredential without a TPM: it returns a fresh
// secret of 32 bytes and the challenge that carries it. The host that gives
// the secret back has shown that ek and ak are in one TPM.
func MakeCredential(ek *EK, ak *AK) (secret []byte, c Credential, err error) {
	secret = make([]byte, secretSize)
	if _, err := rand.Read(secret); err != nil {
		return nil, c, fmt.Errorf("make credential: %w", err)
	}
	key, err := tpm2.ImportEncapsulationKey(&ek.public)
	if err != nil {
		return nil, c, fmt.Errorf("make credential: %w: %w", err, errs.Invalid)
	}
	c.Blob, c.Secret, err = tpm2.CreateCredential(rand.Reader, key, ak.Name(), secret)
	if err != nil {
		return nil, c, fmt.Errorf("make credential: %w: %w", err, errs.Invalid)
	}
	return secret, c, nil
}

// Sealed is a secret that only one TPM can open, and only while its PCRs have
// certain values.
type Sealed struct {
	Public    []byte `json:"public"`    // TPMT_PUBLIC of the sealed object
	Duplicate []byte `json:"duplicate"` // for TPM2_Import under the endorsement key
	Seed      []byte `json:"seed"`
}

// maxSealed is what a sealed object holds (MAX_SYM_DATA).
const maxSealed = 128

// Seal encloses at most 128 bytes for the TPM of the endorsement key, to be
// opened only while the given PCRs of a SHA-256 bank have the values of bank.
// It needs no TPM. The host imports the object under its endorsement key,
// loads it and unseals with a PolicyPCR session.
func Seal(ek *EK, bank *Bank, pcrs []int, secret []byte) (*Sealed, error) {
	if bank.Alg != SHA256 || len(pcrs) == 0 || len(secret) == 0 || len(secret) > maxSealed {
		return nil, fmt.Errorf("seal %d bytes to %d PCRs of %v: %w", len(secret), len(pcrs), bank.Alg, errs.Invalid)
	}
	policy, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	selection, values := selectPCRs(bank, pcrs)
	command := tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: SHA256.sum(values...)}, Pcrs: selection}
	if err := command.Update(policy); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	blind := make([]byte, sha256.Size)
	if _, err := rand.Read(blind); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	public := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{NoDA: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy.Hash().Digest},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: SHA256.sum(blind, secret)}),
	}
	sensitive := tpm2.Marshal(tpm2.TPMTSensitive{
		SensitiveType: tpm2.TPMAlgKeyedHash, SeedValue: tpm2.TPM2BDigest{Buffer: blind},
		Sensitive: tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BSensitiveData{Buffer: secret}),
	})
	key, err := tpm2.ImportEncapsulationKey(&ek.public)
	if err != nil {
		return nil, fmt.Errorf("seal: %w: %w", err, errs.Invalid)
	}
	s := &Sealed{Public: tpm2.Marshal(public)}
	s.Duplicate, s.Seed, err = tpm2.CreateDuplicate(rand.Reader, key, objectName(s.Public), sensitive)
	if err != nil {
		return nil, fmt.Errorf("seal: %w: %w", err, errs.Invalid)
	}
	return s, nil
}

// selectPCRs gives a TPM's selection and the values in ascending order.
func selectPCRs(bank *Bank, pcrs []int) (tpm2.TPMLPCRSelection, [][]byte) {
	var values [][]byte
	mask := make([]byte, NumPCRs/8)
	for i := range NumPCRs {
		for _, p := range pcrs {
			if p == i && mask[i/8]&(1<<(i%8)) == 0 {
				mask[i/8] |= 1 << (i % 8)
				values = append(values, bank.Values[i])
			}
		}
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgID(bank.Alg), PCRSelect: mask}}}, values
}
