package pki_test

import (
	"bytes"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

func TestKey_roundTrip(t *testing.T) {
	k := newKey(t)
	for _, pass := range []string{"", "correct horse"} {
		data, err := pki.EncodeKey(k, []byte(pass))
		if err != nil {
			t.Fatal(err)
		}
		got, err := pki.DecodeKey(data, []byte(pass))
		if err != nil || !got.Equal(k) {
			t.Errorf("passphrase %q: %v", pass, err)
		}
		if pass == "" {
			continue
		}
		if _, err := pki.DecodeKey(data, []byte("wrong")); err == nil {
			t.Error("wrong passphrase accepted")
		}
		if _, err := pki.DecodeKey(data, nil); !errors.Is(err, errs.Denied) {
			t.Errorf("no passphrase: %v", err)
		}
		openssl(t, data, "pkey", "-passin", "pass:"+pass, "-noout")
		theirs := openssl(t, data, "pkcs8", "-topk8", "-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA256",
			"-passin", "pass:"+pass, "-passout", "pass:"+pass)
		if got, err := pki.DecodeKey(theirs, []byte(pass)); err != nil || !got.Equal(k) {
			t.Errorf("a key that openssl encrypted: %v", err)
		}
	}
}

// openssl runs openssl(1) on data, or skips the test where there is none.
func openssl(t *testing.T, data []byte, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("SKIPPED: openssl is not installed; interoperability is not tested")
	}
	c := exec.Command(path, args...)
	c.Stdin = bytes.NewReader(data)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("openssl %v: %v: %s", args, err, stderr.Bytes())
	}
	return out
}

func TestDecodeKey_refuses(t *testing.T) {
	p384 := openssl(t, nil, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
	good, err := pki.EncodeKey(newKey(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"P-384": p384, "empty": nil, "two keys": append(bytes.Clone(good), good...), "huge": make([]byte, 1<<20),
		"certificate": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}),
		"garbage":     pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}),
		"bad PBES2":   pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{0x30, 0}}),
	} {
		if _, err := pki.DecodeKey(data, []byte("x")); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAuthority_loadAndSign(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	c := &clock{epoch()}
	pass := []byte("secret")
	if _, err := pki.CreateAuthority(dir, pki.AuthorityOptions{Name: "F", Passphrase: pass, Now: c.now}); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.CreateAuthority(dir, pki.AuthorityOptions{Name: "F", Now: c.now}); !errors.Is(err, errs.Conflict) {
		t.Errorf("second create: %v", err)
	}
	if _, err := pki.LoadAuthority(dir, nil, c.now); !errors.Is(err, errs.Denied) {
		t.Errorf("no passphrase: %v", err)
	}
	// The root key and the policy CA's live elsewhere.
	for _, f := range []string{"root.key", "policy-ca.key"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	a, err := pki.LoadAuthority(dir, pass, c.now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePolicy, Identity: identity, Now: c.now()}); !errors.Is(err, errs.NotFound) {
		t.Errorf("signing with a key that is not here: %v", err)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: c.now(), Lifetime: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyBundle(b, a.Roots(pki.PurposeBuild), pki.PurposeBuild); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "tsa.key")
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadAuthority(dir, pass, c.now); !errors.Is(err, errs.Denied) {
		t.Errorf("group-readable key: %v", err)
	}
	if err := os.Rename(filepath.Join(dir, "build-ca.key"), key); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadAuthority(dir, pass, c.now); !errors.Is(err, errs.Invalid) {
		t.Errorf("key of another certificate: %v", err)
	}
	if err := os.Rename(filepath.Join(dir, "policy-ca.crt"), filepath.Join(dir, "build-ca.crt")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadAuthority(dir, pass, c.now); !errors.Is(err, errs.Untrusted) {
		t.Errorf("policy CA in the place of the build CA: %v", err)
	}
}

func TestNewSigner_refuses(t *testing.T) {
	w := newWorld(t)
	for name, r := range map[string]pki.LeafRequest{
		"no identity":   {Purpose: pki.PurposeBuild},
		"not a URI":     {Purpose: pki.PurposeBuild, Identity: "build server"},
		"no host":       {Purpose: pki.PurposeBuild, Identity: "urn:x"},
		"odd spelling":  {Purpose: pki.PurposeBuild, Identity: "SPIFFE://fleet.example/a b"},
		"user":          {Purpose: pki.PurposeBuild, Identity: "https://a@fleet.example/x"},
		"eight days":    {Purpose: pki.PurposeBuild, Identity: identity, Lifetime: 8 * 24 * time.Hour},
		"instantaneous": {Purpose: pki.PurposeBuild, Identity: identity, Lifetime: time.Second},
		"no purpose":    {Identity: identity},
	} {
		r.Now = epoch()
		if _, err := w.NewSigner(r); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSign_refusesBeforeSigning(t *testing.T) {
	w := newWorld(t)
	s := w.signer(t, pki.PurposeBuild)
	if _, err := s.Sign(payloadType, make([]byte, 65<<10)); !errors.Is(err, errs.Invalid) {
		t.Errorf("too large: %v", err)
	}
	s.Key = newKey(t)
	if _, err := s.Sign(payloadType, []byte("x")); !errors.Is(err, errs.Invalid) {
		t.Errorf("other key: %v", err)
	}
	s = w.signer(t, pki.PurposeBuild)
	s.Purpose = pki.PurposePolicy
	if _, err := s.Sign(payloadType, []byte("x")); !errors.Is(err, errs.Untrusted) {
		t.Errorf("other purpose: %v", err)
	}
}

// openssl verifies our certificates and tokens too.
func TestAuthority_openssl(t *testing.T) {
	dir := t.TempDir()
	a, err := pki.CreateAuthority(dir, pki.AuthorityOptions{Name: "F", Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	stamp, err := a.TSA.Stamp([]byte("message"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"m": []byte("message"), "n": []byte("other"), "m.tsr": stamp} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	in := func(f string) string { return filepath.Join(dir, f) }
	openssl(t, nil, "verify", "-x509_strict", "-CAfile", in("root.crt"), in("build-ca.crt"))
	openssl(t, nil, "verify", "-x509_strict", "-purpose", "timestampsign", "-CAfile", in("root.crt"), in("tsa.crt"))
	openssl(t, nil, "ts", "-verify", "-data", in("m"), "-in", in("m.tsr"), "-CAfile", in("root.crt"))
	if out, err := exec.Command("openssl", "ts", "-verify", "-data", in("n"), "-in", in("m.tsr"), "-CAfile", in("root.crt")).CombinedOutput(); err == nil {
		t.Errorf("openssl accepts the token for other data: %s", out)
	}
}

func TestLoadCertificates_withoutPassphrase(t *testing.T) {
	dir := t.TempDir()
	now := func() time.Time { return time.Date(2031, 5, 1, 12, 0, 0, 0, time.UTC) }
	made, err := pki.CreateAuthority(dir, pki.AuthorityOptions{Name: "Test", Passphrase: []byte("secret"), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	a, err := pki.LoadCertificates(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Issuers[pki.PurposeBuild].Cert.Equal(made.Issuers[pki.PurposeBuild].Cert) || a.TSA.Key != nil || a.Root.Key != nil {
		t.Errorf("certificates differ, or a key came along: %+v", a)
	}
	if _, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: "spiffe://x.test/a", Now: now()}); !errors.Is(err, errs.NotFound) {
		t.Errorf("NewSigner without keys: %v, want not found", err)
	}
	if err := os.Remove(filepath.Join(dir, "permit-ca.crt")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadCertificates(dir); !errors.Is(err, errs.NotFound) {
		t.Errorf("a certificate is missing: %v, want not found", err)
	}
}

// An authority of an earlier version stays usable, and gets what it lacks.
func TestExtendAuthority(t *testing.T) {
	dir := t.TempDir()
	c := &clock{epoch()}
	o := pki.AuthorityOptions{Name: "Test", Now: c.now}
	if _, err := pki.CreateAuthority(dir, o); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"attest-ca.crt", "attest-ca.key", "breakglass-ca.crt", "breakglass-ca.key", "appraisal-ca.crt", "appraisal-ca.key"} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	a, err := pki.LoadAuthority(dir, nil, c.now)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Roots(pki.PurposeAttest).CAs) != 0 {
		t.Error("a CA that is not there")
	}
	if _, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: identity, Now: c.now()}); !errors.Is(err, errs.NotFound) {
		t.Errorf("signer without a CA: %v", err)
	}
	// A run that was cut short left a key behind.
	o.Name = ""
	if _, err := o.SaveKey(dir, "attest-ca"); err != nil {
		t.Fatal(err)
	}
	added, err := pki.ExtendAuthority(dir, o)
	if err != nil || !slices.Equal(added, []string{"attest-ca", "breakglass-ca", "appraisal-ca"}) {
		t.Fatalf("%v, %v", added, err)
	}
	if added, err = pki.ExtendAuthority(dir, o); err != nil || len(added) > 0 {
		t.Errorf("a second time: %v, %v", added, err)
	}
	a, err = pki.LoadAuthority(dir, nil, c.now)
	if err != nil {
		t.Fatal(err)
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAttest, Identity: identity, Now: c.now()})
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Sign(payloadType, make([]byte, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyBundle(b, a.Roots(pki.PurposeAttest), pki.PurposeAttest); err != nil {
		t.Errorf("evidence of 1 MiB: %v", err)
	}
	if a.Root.Cert.Subject.CommonName != "Test Root" || a.Issuers[pki.PurposeAttest].Cert.Subject.CommonName != "Test attest CA" {
		t.Error("the new CA is not named after the fleet")
	}

	// Replacing: the old build CA and TSA are moved away; the old TSA stays trusted.
	old, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: identity, Now: c.now()})
	if err != nil {
		t.Fatal(err)
	}
	before, err := old.Sign(payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	oldRoots := a.Roots(pki.PurposeBuild)
	for from, to := range map[string]string{"build-ca.crt": "../b.crt", "build-ca.key": "../b.key", "tsa.key": "../t.key", "tsa.crt": "tsa-2031.crt"} {
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	if added, err = pki.ExtendAuthority(dir, o); err != nil || !slices.Equal(added, []string{"build-ca", "tsa"}) {
		t.Fatalf("%v, %v", added, err)
	}
	if a, err = pki.LoadAuthority(dir, nil, c.now); err != nil {
		t.Fatal(err)
	}
	roots := a.Roots(pki.PurposeBuild)
	if _, err := pki.VerifyBundle(before, roots, pki.PurposeBuild); !errors.Is(err, errs.Untrusted) {
		t.Errorf("by the old CA, which is not trusted any more: %v", err)
	}
	roots.CAs = append(roots.CAs, oldRoots.CAs...)
	if _, err := pki.VerifyBundle(before, roots, pki.PurposeBuild); err != nil {
		t.Errorf("both CAs are trusted, of one name: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "root.key")); err != nil {
		t.Fatal(err)
	}
	if added, err = pki.ExtendAuthority(dir, o); err != nil || len(added) > 0 {
		t.Errorf("nothing to do, and no root key: %v, %v", added, err)
	}
	if err := os.Remove(filepath.Join(dir, "permit-ca.crt")); err != nil {
		t.Fatal(err)
	}
	if _, err = pki.ExtendAuthority(dir, o); !errors.Is(err, errs.NotFound) {
		t.Errorf("without the root's key: %v", err)
	}
}

func TestBreakglass_lastsADay(t *testing.T) {
	w := newWorld(t)
	request := pki.LeafRequest{Purpose: pki.PurposeBreakglass, Identity: identity, Now: epoch(), Lifetime: 25 * time.Hour}
	if _, err := w.NewSigner(request); !errors.Is(err, errs.Invalid) {
		t.Errorf("25 hours: %v", err)
	}
	request.Lifetime = 0
	s, err := w.NewSigner(request)
	if err != nil {
		t.Fatal(err)
	}
	if life := s.Leaf.NotAfter.Sub(s.Leaf.NotBefore); life > 24*time.Hour {
		t.Errorf("a leaf lasts %v", life)
	}
	// The verifier too: whoever holds the CA's key cannot make one that lasts longer.
	c := leafTemplate()
	c.UnknownExtKeyUsage[0] = pki.PurposeBreakglass.OID()
	c.NotAfter = c.NotBefore.Add(25 * time.Hour)
	k := newKey(t)
	b, err := pki.SignUnchecked(issue(t, w.Issuers[pki.PurposeBreakglass], c, k.Public()), k, w.TSA, payloadType, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.VerifyBundle(b, w.Roots(pki.PurposeBreakglass), pki.PurposeBreakglass); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a break-glass leaf of 25 hours: %v", err)
	}
}
