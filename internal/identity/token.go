package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"ringwall/internal/errs"
)

// Claims are what the built-in issuer says of somebody in an ID token (OpenID
// Connect Core 1.0, section 2). Times are seconds since 1970.
type Claims struct {
	Issuer   string `json:"iss"`
	Subject  string `json:"sub"`
	Audience string `json:"aud"`
	Expires  int64  `json:"exp"`
	Issued   int64  `json:"iat"`
	AuthTime int64  `json:"auth_time"`
	Nonce    string `json:"nonce,omitempty"`
	Name     string `json:"name,omitempty"`
	Username string `json:"preferred_username"`
	// Generation changes with the password, so that a new one ends every session.
	Generation string   `json:"ringwall_gen"`
	Methods    []string `json:"amr,omitempty"`
}

// Generation names a password's hash without telling it.
func Generation(passwordHash string) string {
	sum := sha256.Sum256([]byte("ringwall generation " + passwordHash))
	return base64.RawURLEncoding.EncodeToString(sum[:9])
}

// KeyID names a signing key: the thumbprint of RFC 7638.
func KeyID(pub *ecdsa.PublicKey) (string, error) {
	sum, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("key id: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(sum), nil
}

// Sign makes an ID token with ES256.
func Sign(key *ecdsa.PrivateKey, c *Claims) (string, error) {
	id, err := KeyID(&key.PublicKey)
	if err != nil {
		return "", err
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	signed, err := s.Sign(b)
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	return signed.CompactSerialize()
}

// KeySet writes public keys as a JWK set (RFC 7517).
func KeySet(keys []*ecdsa.PublicKey) ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range keys {
		id, err := KeyID(k)
		if err != nil {
			return nil, err
		}
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k, KeyID: id, Use: "sig", Algorithm: string(jose.ES256)})
	}
	return json.Marshal(set)
}

// Bounds of other people's tokens and keys.
const (
	maxToken = 16 << 10 // bytes
	maxKeys  = 64       // of a set that are looked at
)

// Keys are the public keys of an issuer.
type Keys struct{ set []jose.JSONWebKey }

// ParseKeys reads a JWK set. Keys of a kind that is not for signing, or not
// understood, are left out; more than 64 are not looked at. The error is
// errs.Invalid.
func ParseKeys(data []byte) (*Keys, error) {
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, fmt.Errorf("key set: %w: %w", err, errs.Invalid)
	}
	out := &Keys{}
	for i, r := range raw.Keys {
		var k jose.JSONWebKey
		if i == maxKeys || k.UnmarshalJSON(r) != nil || !k.Valid() || !k.IsPublic() || k.Use != "" && k.Use != "sig" {
			continue
		}
		out.set = append(out.set, k)
	}
	if len(out.set) == 0 {
		return nil, fmt.Errorf("the key set holds no key to check signatures with: %w", errs.Invalid)
	}
	return out, nil
}

// algorithms are those that are believed: none that is symmetric, and not "none".
func algorithms() []jose.SignatureAlgorithm {
	return []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.EdDSA}
}

// Algorithms are the names of the signature algorithms that Verify believes.
func Algorithms() (out []string) {
	for _, a := range algorithms() {
		out = append(out, string(a))
	}
	return out
}

// Verify checks a token's signature and returns what it says; whoever calls
// checks that. errs.NotFound: signed with a key that is not in the set, or was
// not when the set was read; errs.Untrusted: anything else.
func (k *Keys) Verify(token string) ([]byte, error) {
	bad := func(err error) ([]byte, error) { return nil, fmt.Errorf("token: %w: %w", err, errs.Untrusted) }
	if len(token) > maxToken {
		return bad(fmt.Errorf("%d bytes", len(token)))
	}
	sig, err := jose.ParseSignedCompact(token, algorithms())
	if err != nil {
		return bad(err)
	}
	id, known := sig.Signatures[0].Header.KeyID, false
	for i := range k.set {
		if id != "" && k.set[i].KeyID != id {
			continue
		}
		known = true
		if a := k.set[i].Algorithm; a != "" && a != sig.Signatures[0].Header.Algorithm {
			continue
		}
		if payload, err := sig.Verify(&k.set[i]); err == nil {
			return payload, nil
		}
	}
	if !known {
		return nil, fmt.Errorf("token: no key %.80q: %w", id, errs.NotFound)
	}
	return nil, fmt.Errorf("token: the signature is of no key that counts: %w", errs.Untrusted)
}

// IssuerOf reads whose token it claims to be, before anything is checked.
func IssuerOf(token string) (string, error) {
	parts := strings.Split(token, ".")
	bad := fmt.Errorf("that is no token: %w", errs.Untrusted)
	if len(token) > maxToken || len(parts) != 3 {
		return "", bad
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	var c struct {
		Issuer string `json:"iss"`
	}
	if err != nil || json.Unmarshal(b, &c) != nil || c.Issuer == "" {
		return "", bad
	}
	return c.Issuer, nil
}

// NewSecret makes a code or token of 256 random bits.
func NewSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// userCodeLetters are those of RFC 8628, section 6.1: no vowels, so no words.
const userCodeLetters = "BCDFGHJKLMNPQRSTVWXZ"

// NewUserCode makes a code that people read from one device and type on
// another, such as WDJB-MJHT: 34 bits, for minutes, and worth nothing without a
// password.
func NewUserCode() string {
	var out []byte
	for i := range 8 {
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(userCodeLetters))))
		if err != nil {
			panic(err) // crypto/rand never fails
		}
		if i == 4 {
			out = append(out, '-')
		}
		out = append(out, userCodeLetters[n.Int64()])
	}
	return string(out)
}

// PlainUserCode is a user code as people type it, as NewUserCode made it; ""
// if it cannot be one.
func PlainUserCode(typed string) string {
	var out []byte
	for _, r := range strings.ToUpper(typed) {
		switch {
		case r == '-' || r == ' ':
		case len(out) == 9 || !strings.ContainsRune(userCodeLetters, r):
			return ""
		default:
			if len(out) == 4 {
				out = append(out, '-')
			}
			out = append(out, byte(r)) //nolint:gosec // a letter
		}
	}
	if len(out) != 9 {
		return ""
	}
	return string(out)
}

// Challenge is the S256 challenge of a PKCE verifier (RFC 7636, section 4.2).
func Challenge(verifier string) string {
	sum := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

// Answers reports whether a verifier belongs to a challenge.
func Answers(challenge, verifier string) bool {
	return len(verifier) >= 43 && len(verifier) <= 128 && subtle.ConstantTimeCompare([]byte(Challenge(verifier)), []byte(challenge)) == 1
}

// TokenLife is how long a token of the built-in issuer lasts.
const TokenLife = 15 * time.Minute
