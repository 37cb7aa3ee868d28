package kernelsig_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"os/exec"
	"strings"
	"testing"

	"ringwall/internal/kernelsig"
)

// What is fuzzed must not only not crash: what it accepts must be what was
// signed.

func FuzzCMS(f *testing.F) {
	p := newPair(f, "p256", ecKey(f, elliptic.P256()), nil)
	content := []byte("content")
	f.Add(must(kernelsig.SignDetached(p.key, p.cert, content)))
	f.Add(must(kernelsig.SignAttached(p.key, p.cert, content)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := kernelsig.VerifyDetached(b, content, certs(p)); err == nil && c != p.cert {
			t.Error("another signer")
		}
		if _, err := kernelsig.VerifyDetached(b, []byte("something else"), certs(p)); err == nil {
			t.Error("a signature over what was never signed")
		}
		if got, _, err := kernelsig.VerifyAttached(b, certs(p)); err == nil && !bytes.Equal(got, content) {
			t.Errorf("%q was never signed", got)
		}
	})
}

func FuzzModule(f *testing.F) {
	p := newPair(f, "p256", ecKey(f, elliptic.P256()), nil)
	module := []byte("\x7fELF and more")
	f.Add(must(kernelsig.SignModule(p.key, p.cert, module)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := kernelsig.VerifyModule(b, certs(p)); err == nil {
			if m, _, err := kernelsig.SplitModule(b); err != nil || !bytes.Equal(m, module) {
				t.Errorf("%q was never signed (%v)", m, err)
			}
		}
	})
}

func FuzzIMA(f *testing.F) {
	p := newPair(f, "p256", ecKey(f, elliptic.P256()), nil)
	digest := sha256.Sum256([]byte("content"))
	f.Add(must(kernelsig.IMASignature(p.key, p.cert, digest)))
	f.Add(must(kernelsig.IMAVeritySignature(p.key, p.cert, digest)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := kernelsig.VerifyIMA(b, sha256.Sum256(nil), certs(p)); err == nil {
			t.Error("a signature over what was never signed")
		}
	})
}

// tinyPE is the smallest image with a section that is taken.
func tinyPE() []byte {
	const head, size = 0x200, 0x400
	b := make([]byte, size)
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	le.PutUint16(b[0x44:], 0x8664)
	le.PutUint16(b[0x46:], 1)   // sections
	le.PutUint16(b[0x54:], 240) // optional header
	opt := b[0x58:]
	le.PutUint16(opt, 0x20b)
	le.PutUint32(opt[60:], head)
	le.PutUint32(opt[108:], 16)
	s := b[0x58+240:]
	copy(s, ".sbat")
	le.PutUint32(s[8:], 20)
	le.PutUint32(s[16:], size-head)
	le.PutUint32(s[20:], head)
	copy(b[head:], "sbat,1,x\nshim,4,y,\n")
	return b
}

func FuzzPE(f *testing.F) {
	p := newPair(f, "rsa", rsaKey(f, 2048), nil)
	plain := tinyPE()
	f.Add(plain)
	if _, err := exec.LookPath("sbsign"); err == nil {
		dir := f.TempDir()
		key, cert := p.save(f, dir)
		run(f, "sbsign", "--key", key, "--cert", cert, "--output", dir+"/out", write(f, dir+"/in", plain))
		f.Add(read(f, dir+"/out"))
	}
	db := listed(f, p.cert)
	want := must(kernelsig.ParseImage(plain)).Hash()
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := kernelsig.ParseImage(b)
		if err != nil {
			return
		}
		_, _ = m.SBAT()
		for _, s := range m.Sections {
			if _, ok := m.Section(s.Name); !ok && s.Name != "" {
				t.Errorf("section %q is lost", s.Name)
			}
		}
		if v, err := m.Verify(db, nil); err == nil && v.Hash != want {
			t.Error("a signature over what was never signed")
		}
	})
}

func FuzzSignatureLists(f *testing.F) {
	p := newPair(f, "p256", ecKey(f, elliptic.P256()), nil)
	f.Add(append(esl(f, typeX509, p.cert.Raw), esl(f, typeSHA256, make([]byte, 32))...))
	f.Add(esl(f, typeX509SHA256, make([]byte, 48)))
	f.Fuzz(func(t *testing.T, b []byte) {
		db, err := kernelsig.ParseSignatureLists(b)
		if err == nil && len(b) > 0 && len(db.Certificates)+len(db.Hashes) > len(b)/28 {
			t.Error("more entries than there is room for")
		}
	})
}

// kernelOf makes an image that holds certificates as the kernel's build lays
// them out.
func kernelOf(module bool, c ...*x509.Certificate) []byte {
	b := append([]byte("\x7fELF"), make([]byte, 4096-4)...)
	start := len(b)
	for _, x := range c {
		b = append(b, x.Raw...)
	}
	total, first := uint64(len(b)-start), uint64(0)
	if module {
		first = uint64(len(c[0].Raw))
	}
	b = append(b, make([]byte, (8-total%8)%8)...)
	b = binary.LittleEndian.AppendUint64(b, total)
	b = binary.LittleEndian.AppendUint64(b, first)
	return append(b, make([]byte, 100)...)
}

func TestKernelCertificates_layout(t *testing.T) {
	p := pairs(t)
	k, err := kernelsig.KernelCertificates(kernelOf(true, certs(p...)...))
	if err != nil || len(k.Builtin) != 3 || !k.Module.Equal(p[0].cert) {
		t.Errorf("%+v %v", k, err)
	}
	k, err = kernelsig.KernelCertificates(kernelOf(false, p[1].cert))
	if err != nil || len(k.Builtin) != 1 || k.Module != nil {
		t.Errorf("no key for modules: %+v %v", k, err)
	}
	b := kernelOf(true, p[0].cert)
	if _, err := kernelsig.KernelCertificates(append(b, kernelOf(true, p[1].cert)...)); err == nil {
		t.Error("two lists: taken")
	}
	stray := append(append([]byte{}, b[:4096]...), p[2].cert.Raw...) // such as a revoked one
	k, err = kernelsig.KernelCertificates(append(append(stray, make([]byte, 8-len(stray)%8)...), b[4096:]...))
	if err != nil || len(k.Builtin) != 1 || !k.Module.Equal(p[0].cert) {
		t.Errorf("a certificate elsewhere: %+v %v", k, err)
	}
}

// packed are x86 boot images with kernelOf in every compression there is a tool for.
func packed(c *x509.Certificate) map[string][]byte {
	boot := make([]byte, 0x400)
	copy(boot[0x202:], "HdrS")
	boot[0x1f1], boot[0x206], boot[0x207] = 1, 0xf, 2
	out := map[string][]byte{}
	kernel := kernelOf(true, c)
	for _, pack := range []string{
		"xz -c --x86 --lzma2=dict=4KiB", "lz4 -lc", "gzip -c", "bzip2 -c", "zstd -c", "xz -c --format=lzma",
	} {
		args := strings.Fields(pack)
		c := exec.Command(args[0], args[1:]...)
		c.Stdin = bytes.NewReader(kernel)
		payload, err := c.Output()
		if err != nil {
			continue
		}
		if args[0] != "gzip" {
			payload = binary.LittleEndian.AppendUint32(payload, uint32(len(kernel)))
		}
		b := append(bytes.Clone(boot), payload...)
		binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
		out[pack] = b
	}
	return out
}

func TestKernelCertificates_compressions(t *testing.T) {
	p := newPair(t, "p256", ecKey(t, elliptic.P256()), nil)
	for name, b := range packed(p.cert) {
		if k, err := kernelsig.KernelCertificates(b); err != nil || !k.Module.Equal(p.cert) {
			t.Errorf("%s: %v", name, err)
		}
		for n := range len(b) {
			if _, err := kernelsig.KernelCertificates(b[:n]); err == nil {
				t.Errorf("%s, cut at %d of %d: taken", name, n, len(b))
			}
		}
	}
}

func FuzzKernelCertificates(f *testing.F) {
	p := newPair(f, "p256", ecKey(f, elliptic.P256()), nil)
	f.Add(kernelOf(true, p.cert))
	for _, b := range packed(p.cert) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := kernelsig.KernelCertificates(b)
		if err == nil && len(k.Builtin) == 0 {
			t.Error("a list without certificates")
		}
	})
}
