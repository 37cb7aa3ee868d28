package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"

	"github.com/google/go-tpm/tpm2"
)

// AKTemplate is the public area from which a host makes its attestation key:
// a primary key of the endorsement hierarchy, so that it need not be stored
// and sees the TPM's counters in clear.
func AKTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
}

// SigningTemplate is the public area of an ordinary key that a host's TPM
// keeps, for TLS: on P-256, with no scheme of its own.
func SigningTemplate() tpm2.TPMTPublic {
	t := AKTemplate()
	t.ObjectAttributes.Restricted = false
	t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256})
	return t
}

// prefix is a template's TPMT_PUBLIC without its unique part, which is
// uniqueSize bytes long in a template.
func prefix(t *tpm2.TPMTPublic, uniqueSize int) []byte {
	b := tpm2.Marshal(t)
	return b[:len(b)-uniqueSize]
}

// emptyPoint is the size of two empty TPM2Bs.
const emptyPoint = 4

// The two templates' prefixes, written out because every round compares one:
// type, name algorithm, attributes, no policy, no symmetric algorithm, scheme
// (ECDSA with SHA-256, or none), P-256, no KDF. A test holds them equal.
func akPrefix() []byte {
	return []byte("\x00\x23\x00\x0b\x00\x05\x04\x72\x00\x00\x00\x10\x00\x18\x00\x0b\x00\x03\x00\x10")
}

func signingPrefix() []byte {
	return []byte("\x00\x23\x00\x0b\x00\x04\x04\x72\x00\x00\x00\x10\x00\x10\x00\x03\x00\x10")
}

// parsePoint reads the unique part of an ECC key, whose coordinates have full
// length.
func parsePoint(b []byte, curve elliptic.Curve) (*ecdsa.PublicKey, bool) {
	c := bigEndian(b)
	x, y := c.sized16(), c.sized16()
	size := (curve.Params().BitSize + 7) / 8
	if !c.done() || len(x) != size || len(y) != size {
		return nil, false
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, append(append([]byte{4}, x...), y...))
	return key, err == nil
}

// objectAttributes are at this offset of a TPMT_PUBLIC, behind type and nameAlg.
const attributesOffset = 4

// parseP256 reads a TPMT_PUBLIC that equals a template in everything but the
// key itself and, where freeAuth says so, noDA and userWithAuth, which decide
// who on the host may use the key and not where it is.
func parseP256(public, want []byte, freeAuth bool) (*ecdsa.PublicKey, bool) {
	if len(public) < len(want) {
		return nil, false
	}
	head := bytes.Clone(public[:len(want)])
	if freeAuth {
		const userWithAuth, noDA = 1 << 6, 1 << 10
		a := binary.BigEndian.Uint32(head[attributesOffset:]) | userWithAuth | noDA
		binary.BigEndian.PutUint32(head[attributesOffset:], a)
	}
	if !bytes.Equal(head, want) {
		return nil, false
	}
	return parsePoint(public[len(want):], elliptic.P256())
}

// objectName is the name of an object with SHA-256 as its name algorithm.
func objectName(public []byte) []byte {
	d := sha256.Sum256(public)
	return append([]byte{0x00, 0x0b}, d[:]...)
}

// AK is an attestation key: one that signs nothing but what its TPM made.
type AK struct {
	Public []byte // TPMT_PUBLIC
	Key    *ecdsa.PublicKey
}

// ParseAK reads a TPMT_PUBLIC and refuses every key that is not AKTemplate bit
// for bit: one that is not restricted could sign forged quotes, one that is
// not fixed could be carried to another TPM. Whether a TPM holds it is what
// credential activation shows.
func ParseAK(public []byte) (*AK, error) {
	key, ok := parseP256(public, akPrefix(), false)
	if !ok {
		return nil, refuse(ReasonAK, "not a restricted signing key as in the template")
	}
	return &AK{Public: bytes.Clone(public), Key: key}, nil
}

// Name is the TPM's name of the key.
func (k *AK) Name() []byte { return objectName(k.Public) }

// qualifiedName is the name with its place: a primary key of the endorsement
// hierarchy (TPM 2.0 Library, part 1, "Names").
func (k *AK) qualifiedName() []byte {
	d := sha256.Sum256(append(binary.BigEndian.AppendUint32(nil, tpmEndorsement), k.Name()...))
	return append([]byte{0x00, 0x0b}, d[:]...)
}

// HostID names a host: SHA-256 of its endorsement key's SubjectPublicKeyInfo,
// in hexadecimal. A host cannot choose it.
type HostID string

// EK is an endorsement key: the identity that a TPM was made with.
type EK struct {
	Public []byte           // TPMT_PUBLIC
	Key    crypto.PublicKey // *rsa.PublicKey or *ecdsa.PublicKey
	public tpm2.TPMTPublic
}

// ID is the host's name.
func (k *EK) ID() HostID {
	spki, err := x509.MarshalPKIXPublicKey(k.Key)
	if err != nil {
		return "" // not for the two types that ParseEK gives
	}
	d := sha256.Sum256(spki)
	return HostID(hex.EncodeToString(d[:]))
}
