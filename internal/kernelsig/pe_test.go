package kernelsig_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
	"ringwall/test/vm"
)

// esl is an EFI_SIGNATURE_LIST per entry.
func esl(t testing.TB, guid string, entries ...[]byte) []byte {
	t.Helper()
	g, err := hex.DecodeString(strings.ReplaceAll(guid, "-", ""))
	if err != nil {
		t.Fatal(err)
	}
	for _, swap := range [][2]int{{0, 3}, {1, 2}, {4, 5}, {6, 7}} { // as in memory
		g[swap[0]], g[swap[1]] = g[swap[1]], g[swap[0]]
	}
	var out []byte
	for _, e := range entries {
		out = append(out, g...)
		out = binary.LittleEndian.AppendUint32(out, uint32(28+16+len(e)))
		out = binary.LittleEndian.AppendUint32(out, 0)
		out = binary.LittleEndian.AppendUint32(out, uint32(16+len(e)))
		out = append(append(out, make([]byte, 16)...), e...)
	}
	return out
}

const (
	typeX509       = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"
	typeSHA256     = "c1c41626-504c-4092-aca9-41f936934328"
	typeX509SHA256 = "3bd2a492-96c0-4079-b420-fcf98ef103ed"
)

func database(t testing.TB, lists ...[]byte) *kernelsig.SignatureDB {
	t.Helper()
	db, err := kernelsig.ParseSignatureLists(bytes.Join(lists, nil))
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func listed(t testing.TB, c ...*x509.Certificate) *kernelsig.SignatureDB {
	t.Helper()
	var lists [][]byte
	for _, x := range c {
		lists = append(lists, esl(t, typeX509, x.Raw))
	}
	return database(t, lists...)
}

// efi returns files of Debian packages that hold EFI images.
func efi(t testing.TB) map[string][]byte {
	t.Helper()
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: packages to fetch")
	}
	cache, err := vm.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(filepath.Dir(cache), "efi")
	root := filepath.Join(dir, "root")
	if _, err := os.Stat(root); err != nil {
		tmp, err := os.MkdirTemp(filepath.Dir(cache), "efi-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(tmp)
		c := exec.Command("apt-get", "-q", "download", "shim-signed", "grub-efi-amd64-signed", "systemd-boot-efi", "fwupd-amd64-signed")
		c.Dir = tmp
		if out, err := c.CombinedOutput(); err != nil {
			t.Skipf("SKIPPED, NOT TESTED: no packages from an archive: %v\n%s", err, out)
		}
		debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
		for _, d := range debs {
			run(t, "dpkg-deb", "-x", d, filepath.Join(tmp, "root"))
		}
		if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, os.ErrExist) {
			if _, there := os.Stat(root); there != nil {
				t.Fatal(err)
			}
		}
	}
	out := map[string][]byte{}
	for _, f := range []string{
		"lib/shim/shimx64.efi.signed", "lib/grub/x86_64-efi-signed/grubx64.efi.signed", "lib/systemd/boot/efi/systemd-bootx64.efi",
		"lib/systemd/boot/efi/linuxx64.efi.stub", "libexec/fwupd/efi/fwupdx64.efi.signed",
	} {
		out[filepath.Base(f)] = read(t, filepath.Join(root, "usr", f))
	}
	return out
}

// vendor is the certificate of Debian's CA, which shim carries.
func vendor(t testing.TB, shim []byte) *x509.Certificate {
	t.Helper()
	m, err := kernelsig.ParseImage(shim)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range m.Sections { // its name, .vendor_cert, is in the symbol table
		if len(x.Data) < 16 {
			continue
		}
		size, at := binary.LittleEndian.Uint32(x.Data), binary.LittleEndian.Uint32(x.Data[8:])
		if uint64(at)+uint64(size) > uint64(len(x.Data)) {
			continue
		}
		if c, err := x509.ParseCertificate(x.Data[at : at+size]); err == nil {
			return c
		}
	}
	t.Fatal("no vendor certificate")
	return nil
}

// osslsigncode computes the digest by its own code.
func theirHash(t testing.TB, file string) string {
	t.Helper()
	out, _ := exec.Command(tool(t, "osslsigncode"), "verify", "-in", file).CombinedOutput()
	m := regexp.MustCompile(`(?i)calculated message digest *: *([0-9a-f]{64})`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("osslsigncode: %s", out)
	}
	return strings.ToLower(string(m[1]))
}

func TestVerifyImage_debian(t *testing.T) {
	dir := t.TempDir()
	images := efi(t)
	for _, series := range []string{"6.1", "6.12", vm.Newest} {
		images["vmlinuz-"+series] = kernel(t, series).image
	}
	shim := images["shimx64.efi.signed"]
	m, err := kernelsig.ParseImage(shim)
	if err != nil || len(m.Signatures) == 0 {
		t.Fatal(err)
	}
	s, err := kernelsig.ParseCMS(m.Signatures[0])
	if err != nil {
		t.Fatal(err)
	}
	var microsoft *x509.Certificate
	for _, c := range s.Certificates {
		if strings.HasPrefix(c.Subject.CommonName, "Microsoft") && c.IsCA {
			microsoft = c
		}
	}
	if microsoft == nil {
		t.Fatal("shim does not carry its CA")
	}
	debian := vendor(t, shim)
	other := newPair(t, "other", ecKey(t, elliptic.P256()), nil).cert
	for name, image := range images {
		t.Run(name, func(t *testing.T) {
			anchor := debian
			m, err := kernelsig.ParseImage(image)
			if err != nil {
				t.Fatal(err)
			}
			if len(m.Signatures) == 0 {
				if _, err := kernelsig.VerifyImage(image, listed(t, debian), nil); !errors.Is(err, errs.Untrusted) {
					t.Errorf("unsigned: %v", err)
				}
				h := m.Hash()
				if v, err := kernelsig.VerifyImage(image, database(t, esl(t, typeSHA256, h[:])), nil); err != nil || v.Signer != nil {
					t.Errorf("by hash: %v", err)
				}
				return
			}
			if name == "shimx64.efi.signed" {
				anchor = microsoft
			}
			v, err := kernelsig.VerifyImage(image, listed(t, other, anchor), listed(t))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%x by %s, %s", v.Hash[:8], v.Signer.Subject.CommonName, v.Anchor.Subject.CommonName)
			file := write(t, filepath.Join(dir, name), image)
			ca := pair{"anchor", ecKey(t, elliptic.P256()), anchor}
			_, pem := ca.save(t, dir)
			run(t, "sbverify", "--cert", pem, file)
			// osslsigncode does not read two signatures, which shim has
			if len(m.Signatures) > 1 {
				t.Log("osslsigncode cannot read it")
			} else if got := theirHash(t, file); got != hex.EncodeToString(v.Hash[:]) {
				t.Errorf("osslsigncode computes %s, we %x", got, v.Hash)
			}
			if _, err := kernelsig.VerifyImage(image, listed(t, other), nil); !errors.Is(err, errs.Untrusted) {
				t.Errorf("another CA: %v", err)
			}
			tbs := sha256.Sum256(v.Signer.RawTBSCertificate)
			for what, dbx := range map[string]*kernelsig.SignatureDB{
				"CA": listed(t, anchor), "signer": listed(t, v.Signer), "hash": database(t, esl(t, typeSHA256, v.Hash[:])),
				"signer by digest": database(t, esl(t, typeX509SHA256, append(tbs[:], make([]byte, 16)...))),
			} {
				if _, err := kernelsig.VerifyImage(image, database(t, esl(t, typeX509, anchor.Raw), esl(t, typeSHA256, v.Hash[:])), dbx); !errors.Is(err, errs.Untrusted) {
					t.Errorf("dbx with %s: %v", what, err)
				}
			}
			bad := bytes.Clone(image)
			bad[len(bad)/2] ^= 1
			_, err = kernelsig.VerifyImage(bad, listed(t, anchor), nil)
			notTrusted(t, "changed", err)
		})
	}
	if e := must(kernelsig.ParseImage(images["grubx64.efi.signed"])); true {
		sbat, err := e.SBAT()
		if err != nil || len(sbat) < 2 || sbat[0].Component != "sbat" {
			t.Fatalf("SBAT of grub: %v %v", sbat, err)
		}
		level := func(s string) []kernelsig.SBATEntry { return must(kernelsig.ParseSBAT([]byte(s))) }
		if err := e.CheckSBAT(level("sbat,1,2021030218\ngrub,1\n")); err != nil {
			t.Error(err)
		}
		if err := e.CheckSBAT(level("sbat,1,2021030218\ngrub,4294967295\n")); !errors.Is(err, errs.Untrusted) {
			t.Errorf("revoked generation: %v", err)
		}
		if err := must(kernelsig.ParseImage(images["vmlinuz-6.12"])).CheckSBAT(level("sbat,1\n")); err != nil {
			t.Errorf("a kernel without SBAT: %v", err)
		}
		if err := tiny(t, "x").CheckSBAT(level("sbat,1\n")); !errors.Is(err, errs.Untrusted) {
			t.Errorf("no SBAT: %v", err)
		}
	}
}

// tiny is an image whose only section has that name.
func tiny(t testing.TB, section string) *kernelsig.Image {
	t.Helper()
	b := tinyPE()
	copy(b[0x58+240:], section+"\x00\x00\x00\x00\x00\x00\x00\x00"[:8-len(section)])
	return must(kernelsig.ParseImage(b))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// chain makes a CA, an intermediate and a signer.
func chain(t testing.TB) (root, middle, signer pair) {
	t.Helper()
	issue := func(name string, by pair, ca bool) pair {
		key := rsaKey(t, 2048)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(len(name)) + 1000), Subject: newPair(t, name, key, nil).cert.Subject, NotBefore: by.cert.NotBefore,
			NotAfter: by.cert.NotAfter, BasicConstraintsValid: true, IsCA: ca, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, SubjectKeyId: []byte(name),
		}
		if ca {
			c.KeyUsage, c.ExtKeyUsage = x509.KeyUsageCertSign, nil
		}
		der, err := x509.CreateCertificate(rand.Reader, c, by.cert, key.Public(), by.key)
		if err != nil {
			t.Fatal(err)
		}
		return pair{name, key, must(x509.ParseCertificate(der))}
	}
	root = newPair(t, "root", rsaKey(t, 2048), func(c *x509.Certificate) {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
	})
	middle = issue("middle", root, true)
	return root, middle, issue("signer", middle, false)
}

func TestVerifyImage_theirSigners(t *testing.T) {
	dir := t.TempDir()
	plain := efi(t)["linuxx64.efi.stub"]
	file := write(t, filepath.Join(dir, "plain.efi"), plain)
	root, middle, signer := chain(t)
	key, cert := signer.save(t, dir)
	_, middleCert := middle.save(t, dir)
	all := write(t, filepath.Join(dir, "all.crt"), append(read(t, cert), read(t, middleCert)...))
	sign := func(name string, arg ...string) []byte {
		out := filepath.Join(dir, name)
		run(t, arg[0], append(arg[1:], out, file)...)
		return read(t, out)
	}
	// sbsign puts only the signer in, osslsigncode what it is given
	bySbsign := sign("sbsign", "sbsign", "--key", key, "--cert", cert, "--output")
	out := filepath.Join(dir, "ossl")
	run(t, "osslsigncode", "sign", "-h", "sha256", "-certs", all, "-key", key, "-in", file, "-out", out)
	byOssl := read(t, out)
	for name, image := range map[string][]byte{"sbsign": bySbsign, "osslsigncode": byOssl} {
		for _, db := range []*x509.Certificate{signer.cert, middle.cert, root.cert} {
			_, err := kernelsig.VerifyImage(image, listed(t, db), nil)
			want := db != root.cert || name == "osslsigncode" // the way to the root must be in it
			if (err == nil) != want {
				t.Errorf("%s, db with %s: %v", name, db.Subject, err)
			}
		}
		if _, err := kernelsig.VerifyImage(image, listed(t, middle.cert), listed(t, signer.cert)); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s, signer in dbx: %v", name, err)
		}
		if _, err := kernelsig.VerifyImage(image, listed(t, signer.cert), listed(t, middle.cert)); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s, the CA in dbx and only the signer in db: %v", name, err)
		}
		signed := write(t, filepath.Join(dir, "signed"), image)
		if got, h := theirHash(t, signed), must(kernelsig.ParseImage(image)).Hash(); got != hex.EncodeToString(h[:]) {
			t.Errorf("%s: hash %x, osslsigncode computes %s", name, h, got)
		}
		run(t, "sbverify", "--cert", cert, signed)
	}
	// every part that counts, and what sbverify thinks of it
	m := must(kernelsig.ParseImage(bySbsign))
	end := len(bySbsign) - len(m.Signatures[0])
	for name, at := range map[string]int{"DOS stub": 0x50, "section": end / 2, "signature": len(bySbsign) - 30, "header": 0x100} {
		bad := bytes.Clone(bySbsign)
		bad[at] ^= 4
		if _, err := kernelsig.VerifyImage(bad, listed(t, middle.cert), nil); err == nil {
			t.Errorf("%s changed: taken", name)
		}
	}
	for n := range 60 {
		_, err := kernelsig.VerifyImage(bySbsign[:len(bySbsign)*n/60], listed(t, middle.cert), nil)
		notTrusted(t, "cut", err)
	}
	_, err := kernelsig.VerifyImage(append(bytes.Clone(bySbsign), make([]byte, 8)...), listed(t, middle.cert), nil)
	notTrusted(t, "data after the signature", err)

	// a second signature; and a bad one beside a good one
	two := sign("two", "sbsign", "--key", key, "--cert", cert, "--output")
	write(t, file, two)
	second := newPair(t, "second", rsaKey(t, 2048), nil)
	key2, cert2 := second.save(t, dir)
	two = sign("two2", "sbsign", "--key", key2, "--cert", cert2, "--output")
	if n := len(must(kernelsig.ParseImage(two)).Signatures); n != 2 {
		t.Fatalf("%d signatures", n)
	}
	for _, db := range []*x509.Certificate{signer.cert, second.cert} {
		if v, err := kernelsig.VerifyImage(two, listed(t, db), nil); err != nil || !v.Signer.Equal(db) {
			t.Errorf("two signatures: %v", err)
		}
	}
	if _, err := kernelsig.VerifyImage(two, listed(t, second.cert), listed(t, signer.cert)); !errors.Is(err, errs.Untrusted) {
		t.Errorf("one of two revoked: %v", err)
	}

	tls := newPair(t, "tls", rsaKey(t, 2048), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	key3, cert3 := tls.save(t, dir)
	write(t, file, plain)
	if _, err := kernelsig.VerifyImage(sign("tls", "sbsign", "--key", key3, "--cert", cert3, "--output"), listed(t, tls.cert), nil); !errors.Is(err, errs.Untrusted) {
		t.Errorf("TLS certificate: %v", err)
	}
}

func TestImage_uki(t *testing.T) {
	dir := t.TempDir()
	stub := write(t, filepath.Join(dir, "stub"), efi(t)["linuxx64.efi.stub"])
	parts := map[string][]byte{".linux": read(t, stub), ".cmdline": []byte("root=/dev/vda ro"), ".osrel": []byte("ID=test\n")}
	out := filepath.Join(dir, "uki")
	args := []string{}
	at := 0x2000000
	for _, name := range []string{".osrel", ".cmdline", ".linux"} {
		f := write(t, filepath.Join(dir, name[1:]), parts[name])
		args = append(args, "--add-section", name+"="+f, "--change-section-vma", name+"=0x"+big.NewInt(int64(at)).Text(16))
		at += 0x1000000
	}
	run(t, "objcopy", append(args, stub, out)...)
	m, err := kernelsig.ParseImage(read(t, out))
	if err != nil {
		t.Fatal(err)
	}
	if !m.UKI() {
		t.Error("no UKI")
	}
	for name, want := range parts {
		if got, ok := m.Section(name); !ok || !bytes.Equal(bytes.TrimRight(got, "\x00"), bytes.TrimRight(want, "\x00")) {
			t.Errorf("%s: %d bytes of %d", name, len(got), len(want))
		}
	}
	if must(kernelsig.ParseImage(read(t, stub))).UKI() {
		t.Error("the bare stub is a UKI")
	}
}

func TestParseSignatureLists_refuses(t *testing.T) {
	good := esl(t, typeSHA256, make([]byte, 32))
	for name, b := range map[string][]byte{
		"cut":          good[:len(good)-1],
		"more":         append(bytes.Clone(good), 1),
		"short hash":   esl(t, typeSHA256, make([]byte, 31)),
		"other type":   esl(t, "11111111-94e4-4aa7-87b5-ab155c2bf072", make([]byte, 32)),
		"no cert":      esl(t, typeX509, make([]byte, 32)),
		"revoked cert": esl(t, typeX509SHA256, make([]byte, 32)),
	} {
		if _, err := kernelsig.ParseSignatureLists(b); !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
