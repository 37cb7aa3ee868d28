package identity_test

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/identity"
	"ringwall/internal/pki"
)

const password = "correct horse battery"

func TestPassword(t *testing.T) {
	h, err := identity.HashPassword(password)
	if err != nil {
		t.Fatal(err)
	}
	again, err := identity.HashPassword(password)
	if err != nil || h == again || !strings.HasPrefix(h, "$argon2id$v=19$m=65536,t=3,p=1$") || strings.Contains(h, "horse") {
		t.Errorf("%s, %s, %v", h, again, err)
	}
	if err := identity.CheckHash(h); err != nil {
		t.Error(err)
	}
	if !identity.VerifyPassword(h, password) || identity.VerifyPassword(h, password+"x") || identity.VerifyPassword(h, "") || identity.VerifyPassword("", "") || identity.VerifyPassword(h, strings.Repeat("x", 2000)) {
		t.Error("the wrong password is right, or the right one wrong")
	}
	// what argon2(1) of the reference implementation prints for "password" with the salt "somesalt"
	if !identity.VerifyPassword("$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc", "password") {
		t.Error("a hash that somebody else's argon2 made does not verify")
	}
	for _, p := range []string{"", "short", strings.Repeat("ä", 600), "elevenchars", "twelve chars\xff"} {
		if _, err := identity.HashPassword(p); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", p, err)
		}
	}
	for _, bad := range []string{
		"", "x", "$argon2i$v=19$m=65536,t=3,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		strings.Replace(h, "m=65536", "m=1024", 1), strings.Replace(h, "m=65536", "m=4194304", 1), strings.Replace(h, "t=3", "t=1", 1),
		strings.Replace(h, "t=3", "t=4000000000", 1), strings.Replace(h, "p=1", "p=200", 1), strings.Replace(h, "v=19", "v=16", 1),
		strings.Replace(h, "t=3", "t=03", 1), h + "=", h + "$", h[:40], strings.Replace(h, "m=65536", "m=99999999999", 1),
	} {
		if err := identity.CheckHash(bad); !errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func keysOf(t testing.TB, keys ...*ecdsa.PrivateKey) *identity.Keys {
	t.Helper()
	var pub []*ecdsa.PublicKey
	for _, k := range keys {
		pub = append(pub, &k.PublicKey)
	}
	b, err := identity.KeySet(pub)
	if err != nil {
		t.Fatal(err)
	}
	out, err := identity.ParseKeys(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTokens(t *testing.T) {
	key, other := newKey(t), newKey(t)
	token, err := identity.Sign(key, &identity.Claims{Issuer: "https://a.example", Subject: "ana", Audience: "ringwall"})
	if err != nil {
		t.Fatal(err)
	}
	keys := keysOf(t, other, key)
	payload, err := keys.Verify(token)
	if err != nil || !strings.Contains(string(payload), `"sub":"ana"`) {
		t.Errorf("%s, %v", payload, err)
	}
	if iss, err := identity.IssuerOf(token); err != nil || iss != "https://a.example" {
		t.Errorf("%q, %v", iss, err)
	}
	if _, err := keysOf(t, other).Verify(token); !errors.Is(err, errs.NotFound) {
		t.Errorf("a key that is not in the set: %v", err)
	}
	parts := strings.Split(token, ".")
	enc := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	var head map[string]string
	b, _ := base64.RawURLEncoding.DecodeString(parts[0])
	if err := json.Unmarshal(b, &head); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"nothing": "", "no token": "a.b.c", "another subject": parts[0] + "." + enc(`{"iss":"https://a.example","sub":"bob"}`) + "." + parts[2],
		"not signed":      enc(`{"alg":"none","kid":"`+head["kid"]+`"}`) + "." + parts[1] + ".",
		"symmetric":       enc(`{"alg":"HS256","kid":"`+head["kid"]+`"}`) + "." + parts[1] + "." + parts[2],
		"no signature":    parts[0] + "." + parts[1] + ".",
		"another's name":  enc(`{"alg":"ES256"}`) + "." + parts[1] + "." + parts[2],
		"another one":     token + ".x",
		"too long":        token + strings.Repeat("x", 20<<10),
		"its own key":     enc(`{"alg":"ES256","jwk":{"kty":"EC"}}`) + "." + parts[1] + "." + parts[2],
		"critical header": enc(`{"alg":"ES256","kid":"`+head["kid"]+`","crit":["x"],"x":1}`) + "." + parts[1] + "." + parts[2],
	} {
		if _, err := keys.Verify(bad); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []string{"", "x", `{"keys":[]}`, `{"keys":[{"kty":"oct","k":"AAAA"}]}`, `{"keys":[{"kty":"EC","use":"enc"}]}`} {
		if _, err := identity.ParseKeys([]byte(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestCodes(t *testing.T) {
	seen := map[string]bool{}
	for range 200 {
		c := identity.NewUserCode()
		if seen[c] || identity.PlainUserCode(c) != c || identity.PlainUserCode(" "+strings.ToLower(strings.ReplaceAll(c, "-", ""))) != c {
			t.Errorf("%s, %s", c, identity.PlainUserCode(strings.ToLower(c)))
		}
		seen[c] = true
	}
	for _, bad := range []string{"", "WDJB", "WDJB-MJHTX", "WDJB-MJHA", "WDJB-MJH\x00", strings.Repeat("W", 1000)} {
		if got := identity.PlainUserCode(bad); got != "" {
			t.Errorf("%q: %q", bad, got)
		}
	}
	// RFC 7636, appendix B
	const verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
	if got := identity.Challenge(verifier); got != "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM" || !identity.Answers(got, verifier) || identity.Answers(got, verifier+"x") || identity.Answers(identity.Challenge("short"), "short") {
		t.Error(got)
	}
	if one, two := identity.NewSecret(), identity.NewSecret(); one == two || identity.Generation(one) == identity.Generation(two) {
		t.Error("the same twice")
	}
}

func FuzzVerify(f *testing.F) {
	key := newKey(f)
	token, err := identity.Sign(key, &identity.Claims{Issuer: "https://a.example", Subject: "ana"})
	if err != nil {
		f.Fatal(err)
	}
	keys := keysOf(f, key)
	want, err := keys.Verify(token)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, s string) {
		_, _ = identity.IssuerOf(s)
		if got, err := keys.Verify(s); err == nil && string(got) != string(want) {
			t.Errorf("%q verifies as %s", s, got)
		} else if err != nil && !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.NotFound) {
			t.Error(err)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := identity.ParseKeys(b); err != nil && !errors.Is(err, errs.Invalid) {
			t.Error(err)
		}
	})
}

func FuzzCheckHash(f *testing.F) {
	f.Add("$argon2id$v=19$m=65536,t=3,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc")
	f.Fuzz(func(t *testing.T, s string) {
		if err := identity.CheckHash(s); err != nil && !errors.Is(err, errs.Invalid) {
			t.Error(err)
		}
	})
}
