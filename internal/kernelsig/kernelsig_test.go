package kernelsig_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
)

// pair is a key with its certificate.
type pair struct {
	name string
	key  crypto.Signer
	cert *x509.Certificate
}

func newPair(t testing.TB, name string, key crypto.Signer, change func(*x509.Certificate)) pair {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &spki); err != nil {
		t.Fatal(err)
	}
	id := sha1.Sum(spki.Key.Bytes) // RFC 5280, and what evmctl takes for granted
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, SubjectKeyId: id[:],
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	if change != nil {
		change(c)
	}
	der, err = x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return pair{name, key, c}
}

func rsaKey(t testing.TB, bits int) crypto.Signer {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ecKey(t testing.TB, c elliptic.Curve) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func pairs(t testing.TB) []pair {
	return []pair{
		newPair(t, "rsa", rsaKey(t, 2048), nil),
		newPair(t, "p256", ecKey(t, elliptic.P256()), nil),
		newPair(t, "p384", ecKey(t, elliptic.P384()), nil),
	}
}

func certs(p ...pair) (out []*x509.Certificate) {
	for _, x := range p {
		out = append(out, x.cert)
	}
	return out
}

// tool skips loudly where a program is missing.
func tool(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no %s here", name)
	}
	return p
}

func run(t testing.TB, name string, arg ...string) string {
	t.Helper()
	out, err := exec.Command(tool(t, name), arg...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(arg, " "), err, out)
	}
	return string(out)
}

func refused(t testing.TB, name string, arg ...string) {
	t.Helper()
	if out, err := exec.Command(tool(t, name), arg...).CombinedOutput(); err == nil {
		t.Errorf("%s %s took it:\n%s", name, strings.Join(arg, " "), out)
	}
}

func write(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// save writes key and certificate as PEM and returns their paths.
func (p pair) save(t testing.TB, dir string) (key, cert string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		t.Fatal(err)
	}
	key = write(t, filepath.Join(dir, p.name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	cert = write(t, filepath.Join(dir, p.name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}))
	return key, cert
}

// mutations are what a signature must not survive.
func mutations(b []byte) map[string][]byte {
	flip := func(i int) []byte {
		c := bytes.Clone(b)
		c[i] ^= 1
		return c
	}
	return map[string][]byte{
		"empty": nil, "cut": b[:len(b)-1], "half": b[:len(b)/2], "longer": append(bytes.Clone(b), 0),
		"last byte": flip(len(b) - 1), "middle": flip(len(b) / 2), "first byte": flip(0),
	}
}

func notTrusted(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, errs.Untrusted) && !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) {
		t.Errorf("%s: %v", what, err)
	}
}

func TestDetached(t *testing.T) {
	content := []byte("what is signed")
	for _, p := range pairs(t) {
		t.Run(p.name, func(t *testing.T) {
			cms, err := kernelsig.SignDetached(p.key, p.cert, content)
			if err != nil {
				t.Fatal(err)
			}
			all := certs(pairs(t)...)
			if got, err := kernelsig.VerifyDetached(cms, content, append(all, p.cert)); err != nil || got != p.cert {
				t.Fatal(got, err)
			}
			for name, bad := range mutations(cms) {
				if _, err := kernelsig.VerifyDetached(bad, content, certs(p)); err == nil && name != "middle" {
					t.Errorf("%s: taken", name)
				}
			}
			_, err = kernelsig.VerifyDetached(cms, []byte("something else"), certs(p))
			notTrusted(t, "other content", err)
			_, err = kernelsig.VerifyDetached(cms, content, all)
			notTrusted(t, "other keys", err)
			_, err = kernelsig.VerifyDetached(cms, content, nil)
			notTrusted(t, "no keys", err)
			_, _, err = kernelsig.VerifyAttached(cms, certs(p))
			notTrusted(t, "as attached", err)

			// another certificate with the same names and another key
			twin := newPair(t, p.name, ecKey(t, elliptic.P256()), func(c *x509.Certificate) { c.SerialNumber = p.cert.SerialNumber })
			_, err = kernelsig.VerifyDetached(cms, content, certs(twin))
			notTrusted(t, "same names, other key", err)
			if got, err := kernelsig.VerifyDetached(cms, content, certs(twin, p)); err != nil || got != p.cert {
				t.Errorf("beside a twin: %v %v", got, err)
			}
		})
	}
}

// Every byte of a CMS that a flip leaves valid must be one that nothing is
// decided by.
func TestDetached_everyBit(t *testing.T) {
	p := newPair(t, "p256", ecKey(t, elliptic.P256()), nil)
	content := []byte("what is signed")
	cms, err := kernelsig.SignDetached(p.key, p.cert, content)
	if err != nil {
		t.Fatal(err)
	}
	var survived []int
	for i := range cms {
		for bit := range 8 {
			bad := bytes.Clone(cms)
			bad[i] ^= 1 << bit
			if c, err := kernelsig.VerifyDetached(bad, content, certs(p)); err == nil {
				survived = append(survived, i)
				if c != p.cert {
					t.Fatalf("byte %d: another signer", i)
				}
			}
		}
	}
	// versions and the list of digest algorithms beside the signer's own
	if len(survived) > 8*24 {
		t.Errorf("%d flipped bits change nothing: %v", len(survived), survived)
	}
}

func TestSign_refuses(t *testing.T) {
	good := newPair(t, "good", ecKey(t, elliptic.P256()), nil)
	other := ecKey(t, elliptic.P256())
	for name, p := range map[string]pair{
		"another key's certificate": {"", other, good.cert},
		"TLS certificate": newPair(t, "tls", other, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
		"any extended key usage": newPair(t, "any", other, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}),
		"CA's key usage": newPair(t, "ca", other, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }),
		"short RSA key":  newPair(t, "short", rsaKey(t, 1024), nil),
	} {
		if _, err := kernelsig.SignDetached(p.key, p.cert, []byte("x")); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
	bare := newPair(t, "no usages", other, func(c *x509.Certificate) { c.KeyUsage, c.ExtKeyUsage = 0, nil })
	if _, err := kernelsig.SignDetached(bare.key, bare.cert, []byte("x")); err != nil {
		t.Errorf("no usages at all, as Debian's module keys: %v", err)
	}
}

func TestDetached_wrongUsageRefused(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	ok := newPair(t, "signer", key, nil)
	cms, err := kernelsig.SignDetached(ok.key, ok.cert, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	tls := newPair(t, "signer", key, func(c *x509.Certificate) {
		c.SerialNumber, c.ExtKeyUsage = ok.cert.SerialNumber, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	if _, err := kernelsig.VerifyDetached(cms, []byte("x"), certs(tls)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("TLS certificate for the same key: %v", err)
	}
}

func TestDetached_openssl(t *testing.T) {
	dir := t.TempDir()
	content := []byte("what is signed\n\x00\xff")
	file := write(t, filepath.Join(dir, "content"), content)
	for _, p := range pairs(t) {
		t.Run(p.name, func(t *testing.T) {
			key, cert := p.save(t, dir)
			cms, err := kernelsig.SignDetached(p.key, p.cert, content)
			if err != nil {
				t.Fatal(err)
			}
			sig := write(t, filepath.Join(dir, p.name+".p7s"), cms)
			for _, tool := range []string{"cms", "smime"} {
				args := []string{
					tool, "-verify", "-binary", "-inform", "DER", "-in", sig, "-content", file, "-certfile", cert,
					"-CAfile", cert, "-purpose", "any", "-out", os.DevNull,
				}
				run(t, "openssl", args...)
				args[7] = write(t, filepath.Join(dir, "other"), []byte("something else"))
				refused(t, "openssl", args...)
			}
			// what openssl makes, with attributes and without, by issuer and by key
			for _, extra := range [][]string{{"-noattr"}, {}, {"-keyid"}, {"-noattr", "-keyid"}, {"-md", "sha512"}, {"-nocerts", "-md", "sha384", "-noattr"}} {
				out := filepath.Join(dir, "theirs")
				run(t, "openssl", append([]string{
					"cms", "-sign", "-binary", "-in", file, "-signer", cert, "-inkey", key, "-outform", "DER", "-out", out,
				}, extra...)...)
				if got, err := kernelsig.VerifyDetached(read(t, out), content, certs(p)); err != nil || got != p.cert {
					t.Errorf("openssl cms %v: %v", extra, err)
				}
				_, err := kernelsig.VerifyDetached(read(t, out), []byte("something else"), certs(p))
				notTrusted(t, "other content", err)
			}
			out := filepath.Join(dir, "sha1")
			run(t, "openssl", "cms", "-sign", "-binary", "-in", file, "-signer", cert, "-inkey", key, "-outform", "DER", "-out", out, "-md", "sha1")
			_, err = kernelsig.VerifyDetached(read(t, out), content, certs(p))
			if !errors.Is(err, errs.Unsupported) {
				t.Errorf("SHA-1: %v", err)
			}
		})
	}
}

func TestAttached_openssl(t *testing.T) {
	dir := t.TempDir()
	content := []byte("policy_name=test policy_version=0.0.1\nDEFAULT action=ALLOW\n")
	file := write(t, filepath.Join(dir, "policy"), content)
	for _, p := range pairs(t) {
		key, cert := p.save(t, dir)
		cms, err := kernelsig.SignAttached(p.key, p.cert, content)
		if err != nil {
			t.Fatal(err)
		}
		sig := write(t, filepath.Join(dir, "p7b"), cms)
		out := filepath.Join(dir, "out")
		run(t, "openssl", "smime", "-verify", "-binary", "-inform", "DER", "-in", sig, "-certfile", cert, "-CAfile", cert, "-purpose", "any", "-out", out)
		if !bytes.Equal(read(t, out), content) {
			t.Errorf("%s: openssl reads %q", p.name, read(t, out))
		}
		// the command of the kernel's admin-guide/LSM/ipe
		run(t, "openssl", "smime", "-sign", "-in", file, "-signer", cert, "-inkey", key, "-noattr", "-nodetach", "-nosmimecap",
			"-binary", "-outform", "der", "-out", out)
		got, by, err := kernelsig.VerifyAttached(read(t, out), certs(p))
		if err != nil || by != p.cert || !bytes.Equal(got, content) {
			t.Errorf("%s: theirs: %q %v", p.name, got, err)
		}
		if _, err := kernelsig.VerifyDetached(cms, content, certs(p)); err == nil {
			t.Errorf("%s: attached taken as detached", p.name)
		}
	}
}

func TestFSVerity_fsverityUtils(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, 4096, 4097, 1 << 20} {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		file := write(t, filepath.Join(dir, "file"), b)
		d, err := hex.DecodeString(strings.TrimSpace(run(t, "fsverity", "digest", "--compact", file)))
		if err != nil || len(d) != 32 {
			t.Fatal(d, err)
		}
		for _, p := range pairs(t) {
			key, cert := p.save(t, dir)
			theirs := filepath.Join(dir, "sig")
			run(t, "fsverity", "sign", file, theirs, "--key="+key, "--cert="+cert)
			ours, err := kernelsig.FSVeritySignature(p.key, p.cert, [32]byte(d))
			if err != nil {
				t.Fatal(err)
			}
			if p.name == "rsa" && !bytes.Equal(ours, read(t, theirs)) {
				t.Errorf("%d bytes: ours is not fsverity-utils'", size)
			}
			for _, sig := range [][]byte{ours, read(t, theirs)} {
				if got, err := kernelsig.VerifyFSVerity(sig, [32]byte(d), certs(p)); err != nil || got != p.cert {
					t.Errorf("%s, %d bytes: %v", p.name, size, err)
				}
				_, err := kernelsig.VerifyFSVerity(sig, sha256.Sum256(d), certs(p))
				notTrusted(t, "another digest", err)
				_, err = kernelsig.VerifyRootHash(sig, [32]byte(d), certs(p))
				notTrusted(t, "as a root hash", err)
			}
		}
	}
}

func TestRootHash_openssl(t *testing.T) {
	dir := t.TempDir()
	root := sha256.Sum256([]byte("root"))
	file := write(t, filepath.Join(dir, "roothash"), []byte(hex.EncodeToString(root[:])))
	for _, p := range pairs(t) {
		key, cert := p.save(t, dir)
		ours, err := kernelsig.RootHashSignature(p.key, p.cert, root)
		if err != nil {
			t.Fatal(err)
		}
		theirs := filepath.Join(dir, "p7s")
		// as systemd-repart and the cryptsetup FAQ do
		run(t, "openssl", "smime", "-sign", "-nocerts", "-noattr", "-binary", "-in", file, "-inkey", key, "-signer", cert, "-outform", "der", "-out", theirs)
		if p.name == "rsa" && !bytes.Equal(ours, read(t, theirs)) {
			t.Error("ours is not openssl's")
		}
		for _, sig := range [][]byte{ours, read(t, theirs)} {
			if got, err := kernelsig.VerifyRootHash(sig, root, certs(p)); err != nil || got != p.cert {
				t.Errorf("%s: %v", p.name, err)
			}
		}
		for name, bad := range mutations(ours) {
			if _, err := kernelsig.VerifyRootHash(bad, root, certs(p)); err == nil && name != "middle" {
				t.Errorf("%s: taken", name)
			}
		}
	}
}
