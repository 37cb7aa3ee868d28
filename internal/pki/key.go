package pki

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"

	"ringwall/internal/errs"
)

// NewKey returns a fresh P-256 key.
func NewKey() (*ecdsa.PrivateKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return k, nil
}

// Work factor of key encryption: OWASP's figure for PBKDF2-HMAC-SHA-256, and
// the most that DecodeKey spends on a file that it is given.
const (
	keyIterations    = 600_000
	maxKeyIterations = 10_000_000
	maxKeyFile       = 16 << 10
)

// EncodeKey returns the key as PEM: PKCS#8 in the clear when passphrase is
// empty (the file's mode must protect it), else PKCS#8 EncryptedPrivateKeyInfo
// with PBES2 (PBKDF2-HMAC-SHA-256, AES-256-CBC), which openssl reads and
// writes too.
func EncodeKey(k *ecdsa.PrivateKey, passphrase []byte) ([]byte, error) {
	return EncodeAnyKey(k, passphrase)
}

// EncodeAnyKey is EncodeKey for keys of other kinds, which sign nothing of
// Ringwall's own.
func EncodeAnyKey(k crypto.Signer, passphrase []byte) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	if len(passphrase) == 0 {
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	}
	enc, err := encryptKey(der, passphrase)
	if err != nil {
		return nil, fmt.Errorf("encrypt key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: enc}), nil
}

// DecodeKey reads what EncodeKey wrote. A key that is not P-256 is refused.
func DecodeKey(data, passphrase []byte) (*ecdsa.PrivateKey, error) {
	k, err := DecodeAnyKey(data, passphrase)
	if err != nil {
		return nil, err
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, fmt.Errorf("decode key: not a P-256 key: %w", errs.Invalid)
	}
	return ec, nil
}

// DecodeAnyKey reads what EncodeAnyKey wrote.
func DecodeAnyKey(data, passphrase []byte) (crypto.Signer, error) {
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("decode key: %d bytes: %w", len(data), errs.Invalid)
	}
	block, rest := pem.Decode(data)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("decode key: want exactly one PEM block: %w", errs.Invalid)
	}
	der := block.Bytes
	switch block.Type {
	case "PRIVATE KEY":
	case "ENCRYPTED PRIVATE KEY":
		if len(passphrase) == 0 {
			return nil, fmt.Errorf("decode key: it is encrypted and no passphrase was given: %w", errs.Denied)
		}
		var err error
		if der, err = decryptKey(der, passphrase); err != nil {
			return nil, fmt.Errorf("decrypt key: %w", err)
		}
	default:
		return nil, fmt.Errorf("decode key: PEM type %q: %w", block.Type, errs.Invalid)
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("decode key: wrong passphrase or not a key: %w", errs.Invalid)
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("decode key: a %T does not sign: %w", k, errs.Invalid)
	}
	return signer, nil
}

// RFC 8018, appendix A.
type encryptedKey struct {
	Algorithm struct {
		ID     asn1.ObjectIdentifier
		Params pbes2Params
	}
	Data []byte
}

type pbes2Params struct {
	KDF struct {
		ID     asn1.ObjectIdentifier
		Params pbkdf2Params
	}
	Cipher struct {
		ID asn1.ObjectIdentifier
		IV []byte
	}
}

type pbkdf2Params struct {
	Salt       []byte
	Iterations int
	KeyLength  int `asn1:"optional"`
	PRF        pkix.AlgorithmIdentifier
}

func oidPBES2() asn1.ObjectIdentifier  { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13} }
func oidPBKDF2() asn1.ObjectIdentifier { return asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12} }
func oidHMACSHA256() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}
}

func oidAES256CBC() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
}

func encryptKey(der, passphrase []byte) ([]byte, error) {
	var e encryptedKey
	salt, iv := make([]byte, 16), make([]byte, aes.BlockSize)
	for _, b := range [][]byte{salt, iv} {
		if _, err := rand.Read(b); err != nil {
			return nil, err
		}
	}
	e.Algorithm.ID = oidPBES2()
	e.Algorithm.Params.KDF.ID = oidPBKDF2()
	e.Algorithm.Params.KDF.Params = pbkdf2Params{
		Salt: salt, Iterations: keyIterations,
		PRF: pkix.AlgorithmIdentifier{Algorithm: oidHMACSHA256(), Parameters: asn1.NullRawValue},
	}
	e.Algorithm.Params.Cipher.ID, e.Algorithm.Params.Cipher.IV = oidAES256CBC(), iv
	block, err := keyCipher(passphrase, &e.Algorithm.Params)
	if err != nil {
		return nil, err
	}
	pad := aes.BlockSize - len(der)%aes.BlockSize
	plain := append(bytes.Clone(der), bytes.Repeat([]byte{byte(pad)}, pad)...)
	e.Data = make([]byte, len(plain))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(e.Data, plain) //nolint:gosec // the IV is random, above
	return asn1.Marshal(e)
}

func decryptKey(der, passphrase []byte) ([]byte, error) {
	var e encryptedKey
	if rest, err := asn1.Unmarshal(der, &e); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("not PBES2 with PBKDF2 and AES-256-CBC: %w", errs.Invalid)
	}
	p := &e.Algorithm.Params
	if !e.Algorithm.ID.Equal(oidPBES2()) || !p.KDF.ID.Equal(oidPBKDF2()) || !p.Cipher.ID.Equal(oidAES256CBC()) ||
		!p.KDF.Params.PRF.Algorithm.Equal(oidHMACSHA256()) {
		return nil, fmt.Errorf("not PBKDF2-HMAC-SHA-256 with AES-256-CBC: %w", errs.Invalid)
	}
	if n := p.KDF.Params.Iterations; n < 1 || n > maxKeyIterations || len(p.Cipher.IV) != aes.BlockSize {
		return nil, fmt.Errorf("parameters out of bounds: %w", errs.Invalid)
	}
	if len(e.Data) == 0 || len(e.Data)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("length %d: %w", len(e.Data), errs.Invalid)
	}
	block, err := keyCipher(passphrase, p)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(e.Data))
	cipher.NewCBCDecrypter(block, p.Cipher.IV).CryptBlocks(plain, e.Data)
	pad := int(plain[len(plain)-1])
	if pad < 1 || pad > aes.BlockSize || !bytes.HasSuffix(plain, bytes.Repeat([]byte{byte(pad)}, pad)) {
		return nil, fmt.Errorf("wrong passphrase: %w", errs.Denied)
	}
	return plain[:len(plain)-pad], nil
}

func keyCipher(passphrase []byte, p *pbes2Params) (cipher.Block, error) {
	k, err := pbkdf2.Key(sha256.New, string(passphrase), p.KDF.Params.Salt, p.KDF.Params.Iterations, 32)
	if err != nil {
		return nil, err
	}
	return aes.NewCipher(k)
}

// lowS makes a P-256 signer's signatures unique: of the two values of s that
// verify, it always gives the smaller. Without that, anyone can turn a
// certificate into another one that verifies too and has another fingerprint.
type lowS struct{ crypto.Signer }

func (l lowS) Sign(rnd io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	sig, err := l.Signer.Sign(rnd, digest, opts)
	if err != nil {
		return nil, err
	}
	return normalise(sig)
}

type ecdsaSignature struct{ R, S *big.Int }

// normalise returns the form of a P-256 signature with the smaller s.
func normalise(sig []byte) ([]byte, error) {
	var v ecdsaSignature
	if rest, err := asn1.Unmarshal(sig, &v); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("ECDSA signature: %w", errs.Invalid)
	}
	n := elliptic.P256().Params().N
	if v.S.Cmp(new(big.Int).Rsh(n, 1)) > 0 {
		v.S.Sub(n, v.S)
	}
	out, err := asn1.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("ECDSA signature: %w", err)
	}
	return out, nil
}

// publicP256 returns the signer's public key if it is on P-256.
func publicP256(s crypto.Signer) (*ecdsa.PublicKey, error) {
	pub, ok := s.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("key is not on P-256: %w", errs.Invalid)
	}
	return pub, nil
}
