package kernelsig_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/kernelsig"
)

func TestIMA_evmctl(t *testing.T) {
	dir := t.TempDir()
	content := make([]byte, 5000)
	_, _ = rand.Read(content)
	file := write(t, filepath.Join(dir, "file"), content)
	digest := sha256.Sum256(content)
	odd := newPair(t, "odd id", ecKey(t, elliptic.P256()), func(c *x509.Certificate) { c.SubjectKeyId = []byte("not a digest") })
	for _, p := range append(pairs(t), odd) {
		t.Run(p.name, func(t *testing.T) {
			key, _ := p.save(t, dir)
			cert := write(t, filepath.Join(dir, "der"), p.cert.Raw)
			ours, err := kernelsig.IMASignature(p.key, p.cert, digest)
			if err != nil {
				t.Fatal(err)
			}
			id := hex.EncodeToString(p.cert.SubjectKeyId[len(p.cert.SubjectKeyId)-4:])
			out := run(t, "evmctl", "ima_sign", "--hashalgo", "sha256", "--key", key, "--keyid", id, "--sigfile", file)
			theirs := read(t, file+".sig")
			if p.name == "rsa" && !bytes.Equal(ours, theirs) {
				t.Errorf("ours is not evmctl's:\n%x\n%x\n%s", ours, theirs, out)
			}
			for _, x := range [][]byte{ours, theirs} {
				if got, err := kernelsig.VerifyIMA(x, digest, certs(p)); err != nil || got != p.cert {
					t.Errorf("%v", err)
				}
				_, err := kernelsig.VerifyIMA(x, sha256.Sum256(nil), certs(p))
				notTrusted(t, "other content", err)
				_, err = kernelsig.VerifyIMA(x, digest, certs(newPair(t, p.name, ecKey(t, elliptic.P256()), nil)))
				notTrusted(t, "other key", err)
			}
			for name, bad := range mutations(ours) {
				_, err := kernelsig.VerifyIMA(bad, digest, certs(p))
				notTrusted(t, name, err)
			}
			if p.cert == odd.cert {
				return // evmctl computes the key's name and does not look into the certificate
			}
			write(t, file+".sig", ours)
			run(t, "evmctl", "ima_verify", "--key", cert, "--sigfile", file)
			bad := bytes.Clone(ours)
			bad[len(bad)-1] ^= 1
			write(t, file+".sig", bad)
			// evmctl's exit code says nothing in some versions
			text, err := exec.Command("evmctl", "ima_verify", "--key", cert, "--sigfile", file).CombinedOutput()
			if err == nil && strings.Contains(string(text), "verification is OK") {
				t.Errorf("evmctl took a bad signature: %s", text)
			}
		})
	}
}

func TestIMAVerity(t *testing.T) {
	for _, p := range pairs(t) {
		digest := sha256.Sum256([]byte(p.name))
		x, err := kernelsig.IMAVeritySignature(p.key, p.cert, digest)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := kernelsig.VerifyIMA(x, digest, certs(p)); err != nil || got != p.cert {
			t.Error(err)
		}
		if h, err := kernelsig.ParseIMA(x); err != nil || !h.Verity {
			t.Errorf("%+v %v", h, err)
		}
		x[0], x[1] = 3, 2 // an fs-verity digest must not pass for a hash of content
		_, err = kernelsig.VerifyIMA(x, digest, certs(p))
		notTrusted(t, "as a hash of content", err)
	}
}

func TestIMA_needsKeyID(t *testing.T) {
	p := newPair(t, "no id", ecKey(t, elliptic.P256()), func(c *x509.Certificate) { c.SubjectKeyId = nil })
	if len(p.cert.SubjectKeyId) != 0 {
		t.Skip("the standard library made one")
	}
	if _, err := kernelsig.IMASignature(p.key, p.cert, [32]byte{}); err == nil {
		t.Error("signed")
	}
}
