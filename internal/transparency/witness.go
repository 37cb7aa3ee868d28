package transparency

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

const (
	algCosignature = 4 // C2SP signed-note: cosignature/v1, Ed25519
	maxWitnessName = 128
	maxWitnessKey  = 4 << 10
	cosignature    = 8 + ed25519.SignatureSize
)

// WitnessKey is what a witness cosigns checkpoints with (C2SP tlog-cosignature).
// A cosignature says: at this time, this was the newest checkpoint that I had
// seen, and it continued all those that I had cosigned before.
type WitnessKey struct {
	Name string
	Key  ed25519.PublicKey
}

// ParseWitnessKey reads a witness's verifier key: name, key hash and key,
// joined by +.
func ParseWitnessKey(s string) (*WitnessKey, error) {
	name, rest, ok := strings.Cut(s, "+")
	_, encoded, ok2 := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if !ok || !ok2 || err != nil || len(raw) != 1+ed25519.PublicKeySize || raw[0] != algCosignature {
		return nil, fmt.Errorf("witness key: want NAME+HASH+KEY of a cosignature/v1 key: %w", errs.Invalid)
	}
	if err := checkWitnessName(name); err != nil {
		return nil, err
	}
	k := &WitnessKey{Name: name, Key: raw[1:]}
	if k.String() != s {
		return nil, fmt.Errorf("witness key: the key hash or the spelling is not the key's: %w", errs.Invalid)
	}
	return k, nil
}

// String returns the key as ParseWitnessKey reads it.
func (k *WitnessKey) String() string {
	h := k.hash()
	return k.Name + "+" + hex.EncodeToString(h[:]) + "+" + base64.StdEncoding.EncodeToString(append([]byte{algCosignature}, k.Key...))
}

func (k *WitnessKey) hash() [4]byte {
	sum := sha256.Sum256(append([]byte(k.Name+"\n"+string(rune(algCosignature))), k.Key...))
	return [4]byte(sum[:4])
}

func checkWitnessName(s string) error {
	ok := s != "" && len(s) <= maxWitnessName
	for _, c := range []byte(s) {
		ok = ok && c > 0x20 && c < 0x7f && c != '+'
	}
	if !ok {
		return fmt.Errorf("witness name %.140q (want printable ASCII without spaces and +, such as witness.example): %w", s, errs.Invalid)
	}
	return nil
}

// NewWitness makes a witness's key. The private half is PKCS#8 PEM in the
// clear: its file's mode must protect it.
func NewWitness(name string) (private []byte, public *WitnessKey, err error) {
	if err := checkWitnessName(name); err != nil {
		return nil, nil, err
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make witness key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("make witness key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), &WitnessKey{Name: name, Key: pub}, nil
}

// cosigned is what a cosignature is over.
func cosigned(at uint64, text string) []byte {
	return []byte("cosignature/v1\ntime " + strconv.FormatUint(at, 10) + "\n" + text)
}

// Cosign adds a witness's cosignature to a checkpoint. That the checkpoint
// continues what the witness saw before is for the caller to have checked.
func Cosign(note, private []byte, key *WitnessKey, at time.Time) ([]byte, error) {
	block, _ := pem.Decode(private)
	if block == nil || len(private) > maxWitnessKey {
		return nil, fmt.Errorf("cosign: no PEM key: %w", errs.Invalid)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("cosign: %w: %w", err, errs.Invalid)
	}
	k, ok := parsed.(ed25519.PrivateKey)
	if !ok || !key.Key.Equal(k.Public()) {
		return nil, fmt.Errorf("cosign: the key is not the witness's: %w", errs.Invalid)
	}
	text, _, err := pki.OpenNote(note)
	if err != nil {
		return nil, fmt.Errorf("cosign: %w", err)
	}
	if at.Unix() < 0 {
		return nil, fmt.Errorf("cosign: time %v: %w", at, errs.Invalid)
	}
	seconds := uint64(at.Unix()) //nolint:gosec // not negative, above
	h := key.hash()
	raw := binary.BigEndian.AppendUint64(h[:], seconds)
	raw = append(raw, ed25519.Sign(k, cosigned(seconds, text))...)
	return append(slices.Clip(note), "\u2014 "+key.Name+" "+base64.StdEncoding.EncodeToString(raw)+"\n"...), nil
}

// VerifyCosignature returns when the witness cosigned a checkpoint. That the
// log signed it too is for pki.OpenCheckpoint to say.
func VerifyCosignature(note []byte, key *WitnessKey) (time.Time, error) {
	text, sigs, err := pki.OpenNote(note)
	if err != nil {
		return time.Time{}, fmt.Errorf("cosignature: %w", err)
	}
	found := 0
	var at uint64
	for _, s := range sigs {
		if s.Name != key.Name || s.Hash != key.hash() {
			continue
		}
		if found++; found > 1 || len(s.Signature) != cosignature {
			return time.Time{}, fmt.Errorf("cosignature of %s is malformed or repeated: %w", key.Name, errs.Untrusted)
		}
		at = binary.BigEndian.Uint64(s.Signature)
		if at > math.MaxInt64 || !ed25519.Verify(key.Key, cosigned(at, text), s.Signature[8:]) {
			return time.Time{}, fmt.Errorf("cosignature of %s does not verify: %w", key.Name, errs.Untrusted)
		}
	}
	if found == 0 {
		return time.Time{}, fmt.Errorf("not cosigned by %s: %w", key.Name, errs.Untrusted)
	}
	return time.Unix(int64(at), 0).UTC(), nil
}
