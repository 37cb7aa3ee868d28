package httpapi_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/crypto/argon2"

	"ringwall/internal/identity"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// signAny signs any claims, as an issuer elsewhere does.
func signAny(key *ecdsa.PrivateKey, claims any) (string, error) {
	id, err := identity.KeyID(&key.PublicKey)
	if err != nil {
		return "", err
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed, err := s.Sign(b)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

func newRingKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// cheapHash is the cheapest hash of the password that is taken: tests check it often.
func cheapHash() string {
	var salt [16]byte
	_, _ = rand.Read(salt[:])
	e := base64.RawStdEncoding
	return "$argon2id$v=19$m=19456,t=2,p=1$" + e.EncodeToString(salt[:]) + "$" + e.EncodeToString(argon2.IDKey([]byte(password), salt[:], 2, 19456, 1, 32))
}

func noCondition() resource.When { return resource.When{} }

func userDoc(t testing.TB, name string) resource.Document {
	t.Helper()
	hash := cheapHash()
	id, err := resource.ParseID("/providers/Ringwall.Identity/users/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return resource.Document{ID: id, Properties: json.RawMessage(`{"passwordHash":"` + hash + `"}`)}
}
