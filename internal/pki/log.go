package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"ringwall/internal/errs"
)

// Bounds of what a log says.
const (
	maxCheckpoint  = 8 << 10
	maxNoteSigs    = 16
	maxLogProof    = 63 // nodes: a tree has less than 2^63 leaves
	maxOrigin      = 128
	algNoteECDSA   = 2 // C2SP signed-note: ECDSA, with the key as PKIX
	noteSigPrefix  = "\u2014 "
	keyDetailsP256 = "PKIX_ECDSA_P256_SHA_256" // Sigstore's name of our one algorithm
)

// LogKey is what a transparency log signs its checkpoints with. The origin is
// the log's name in them, a host name such as log.fleet.example: that is the
// form that sigstore-go and cosign look for.
type LogKey struct {
	Origin string
	Key    *ecdsa.PublicKey
}

// LogAnchor is a log that is trusted by name.
type LogAnchor struct {
	Name string
	LogKey
}

// ParseLogKey reads a verifier key of a signed note (C2SP signed-note):
// origin, key hash and key, joined by +.
func ParseLogKey(s string) (*LogKey, error) {
	bad := func(what string) (*LogKey, error) { return nil, fmt.Errorf("log key: %s: %w", what, errs.Invalid) }
	parts := strings.Split(s, "+")
	if len(s) > 512 || len(parts) < 3 {
		return bad("want ORIGIN+HASH+KEY")
	}
	// the base64 of the key may hold a + too
	origin, hash, encoded := parts[0], parts[1], strings.Join(parts[2:], "+")
	if err := checkOrigin(origin); err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	der, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || len(der) < 2 || der[0] != algNoteECDSA {
		return bad("not an ECDSA key in base64")
	}
	pub, err := x509.ParsePKIXPublicKey(der[1:])
	if err != nil {
		return bad("not a public key")
	}
	k := &LogKey{Origin: origin}
	var ok bool
	if k.Key, ok = pub.(*ecdsa.PublicKey); !ok || k.Key.Curve.Params().BitSize != 256 {
		return bad("not on P-256")
	}
	if k.String() != s {
		return bad("key hash " + strconv.Quote(hash) + " or the spelling is not the key's")
	}
	return k, nil
}

// FormatLogKey is the verifier key of a log's name and public key, as
// ParseLogKey reads it.
func FormatLogKey(origin string, key crypto.PublicKey) (string, error) {
	pub, ok := key.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return "", fmt.Errorf("log key of %.140q: not on P-256: %w", origin, errs.Invalid)
	}
	if err := checkOrigin(origin); err != nil {
		return "", fmt.Errorf("log key: %w", err)
	}
	return (&LogKey{Origin: origin, Key: pub}).String(), nil
}

// String returns the key as ParseLogKey reads it.
func (k *LogKey) String() string {
	id, der := k.id()
	return k.Origin + "+" + hex.EncodeToString(id[:4]) + "+" + base64.StdEncoding.EncodeToString(append([]byte{algNoteECDSA}, der...))
}

// ID identifies the log in a bundle: SHA-256 of its key.
func (k *LogKey) ID() [32]byte {
	id, _ := k.id()
	return id
}

func (k *LogKey) id() ([32]byte, []byte) {
	der, err := x509.MarshalPKIXPublicKey(k.Key)
	if err != nil { // never for a key that was parsed or made here
		return [32]byte{}, nil
	}
	return sha256.Sum256(der), der
}

// sigstore returns the log as trusted_root.json lists it.
func (k *LogKey) sigstore(validFor map[string]string) (map[string]any, error) {
	der, err := x509.MarshalPKIXPublicKey(k.Key)
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(der)
	return map[string]any{
		"baseUrl": "https://" + k.Origin, "hashAlgorithm": "SHA2_256",
		"publicKey": map[string]any{"rawBytes": der, "keyDetails": keyDetailsP256, "validFor": validFor},
		"logId":     map[string]any{"keyId": id[:]},
	}, nil
}

// checkOrigin accepts what is a host name in lower case.
func checkOrigin(s string) error {
	ok := s != "" && len(s) <= maxOrigin && s[0] != '.' && s[len(s)-1] != '.' && !strings.Contains(s, "..")
	for _, c := range []byte(s) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.')
	}
	if !ok {
		return fmt.Errorf("origin %.140q (want a host name in lower case, such as log.fleet.example): %w", s, errs.Invalid)
	}
	return nil
}

// Checkpoint is the state of a log: C2SP tlog-checkpoint, without extensions.
type Checkpoint struct {
	Origin string
	Size   uint64 // leaves
	Root   [32]byte
}

// text is what is signed.
func (c *Checkpoint) text() string {
	return c.Origin + "\n" + strconv.FormatUint(c.Size, 10) + "\n" + base64.StdEncoding.EncodeToString(c.Root[:]) + "\n"
}

// SignNote returns the signature line of a text, with a key on P-256.
func SignNote(text []byte, name string, key crypto.Signer) ([]byte, error) {
	pub, err := publicP256(key)
	if err != nil {
		return nil, fmt.Errorf("sign note of %s: %w", name, err)
	}
	digest := sha256.Sum256(text)
	sig, err := lowS{key}.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign note of %s: %w", name, err)
	}
	id := (&LogKey{Origin: name, Key: pub}).ID()
	return []byte(noteSigPrefix + name + " " + base64.StdEncoding.EncodeToString(append(id[:4:4], sig...)) + "\n"), nil
}

// SignCheckpoint returns a checkpoint as a signed note.
func SignCheckpoint(c Checkpoint, key crypto.Signer) ([]byte, error) {
	if err := checkOrigin(c.Origin); err != nil {
		return nil, fmt.Errorf("sign checkpoint: %w", err)
	}
	line, err := SignNote([]byte(c.text()), c.Origin, key)
	if err != nil {
		return nil, err
	}
	return append([]byte(c.text()+"\n"), line...), nil
}

// NoteSignature is a line under a signed note.
type NoteSignature struct {
	Name      string
	Hash      [4]byte // of the key
	Signature []byte
}

// OpenNote splits a signed note (C2SP signed-note) into text and signatures. It
// verifies nothing.
func OpenNote(data []byte) (string, []NoteSignature, error) {
	bad := func(what string) (string, []NoteSignature, error) {
		return "", nil, fmt.Errorf("signed note: %s: %w", what, errs.Invalid)
	}
	if len(data) > maxCheckpoint || !utf8.Valid(data) {
		return bad("too long, or not UTF-8")
	}
	if bytes.IndexFunc(data, func(r rune) bool { return r != '\n' && unicode.IsControl(r) }) >= 0 {
		return bad("control characters")
	}
	at := strings.LastIndex(string(data), "\n\n")
	if at < 0 || !bytes.HasSuffix(data, []byte("\n")) {
		return bad("no signatures")
	}
	text := string(data[:at+1])
	lines := strings.Split(strings.TrimSuffix(string(data[at+2:]), "\n"), "\n")
	if len(lines) > maxNoteSigs {
		return bad("too many signatures")
	}
	var sigs []NoteSignature
	for _, line := range lines {
		rest, ok := strings.CutPrefix(line, noteSigPrefix)
		name, encoded, ok2 := strings.Cut(rest, " ")
		raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
		if !ok || !ok2 || err != nil || name == "" || len(raw) < 5 {
			return bad("malformed signature line")
		}
		s := NoteSignature{Name: name, Signature: raw[4:]}
		copy(s.Hash[:], raw)
		sigs = append(sigs, s)
	}
	return text, sigs, nil
}

// parseCheckpoint reads a checkpoint's text, in the one spelling that text gives.
func parseCheckpoint(text string) (*Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" {
		return nil, fmt.Errorf("checkpoint: want three lines: %w", errs.Invalid)
	}
	c := &Checkpoint{Origin: lines[0]}
	if err := checkOrigin(c.Origin); err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	var err error
	if c.Size, err = strconv.ParseUint(lines[1], 10, 63); err != nil {
		return nil, fmt.Errorf("checkpoint: size %.30q: %w", lines[1], errs.Invalid)
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != len(c.Root) {
		return nil, fmt.Errorf("checkpoint: root %.60q: %w", lines[2], errs.Invalid)
	}
	copy(c.Root[:], root)
	if c.text() != text {
		return nil, fmt.Errorf("checkpoint: not in its one spelling: %w", errs.Invalid)
	}
	return c, nil
}

// OpenCheckpoint reads a signed checkpoint and verifies that the log of the key
// signed it. Signatures by others are left alone.
func OpenCheckpoint(note []byte, key *LogKey) (*Checkpoint, error) {
	text, sigs, err := OpenNote(note)
	if err != nil {
		return nil, err
	}
	c, err := parseCheckpoint(text)
	if err != nil {
		return nil, err
	}
	if c.Origin != key.Origin {
		return nil, fmt.Errorf("checkpoint is of log %q, not of %q: %w", c.Origin, key.Origin, errs.Untrusted)
	}
	return c, key.verifyNote(text, sigs)
}

// verifyNote wants exactly one signature by the key, and a good one.
func (k *LogKey) verifyNote(text string, sigs []NoteSignature) error {
	id := k.ID()
	digest := sha256.Sum256([]byte(text))
	found := 0
	for _, s := range sigs {
		if s.Name != k.Origin || !bytes.Equal(s.Hash[:], id[:4]) {
			continue
		}
		if found++; found > 1 || !ecdsa.VerifyASN1(k.Key, digest[:], s.Signature) {
			return fmt.Errorf("checkpoint of %s: the signature does not verify, or is repeated: %w", k.Origin, errs.Untrusted)
		}
	}
	if found == 0 {
		return fmt.Errorf("checkpoint of %s is not signed with the log's key: %w", k.Origin, errs.Untrusted)
	}
	return nil
}
