package csv_test

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
)

// moduleKey is a key that kernels take module signatures from.
func moduleKey(t *testing.T) (crypto.Signer, *x509.Certificate) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	id := sha1.Sum(x509.MarshalPKCS1PublicKey(&key.PublicKey))
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kernel key"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		SubjectKeyId: id[:], KeyUsage: x509.KeyUsageDigitalSignature, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 3}},
	}, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kernel key"}}, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, c
}

// object is an ELF object file, which a module is.
func object(text string) []byte {
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(b[16:], 1)
	binary.LittleEndian.PutUint16(b[18:], 62)
	return slices.Concat(b, []byte(text))
}

func gz(b []byte) string {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	_ = w.Close()
	return out.String()
}

func TestVerify_modules(t *testing.T) {
	l := newLab(t)
	key, cert := moduleKey(t)
	_, other := moduleKey(t)
	good, err := kernelsig.SignModule(key, cert, object("good"))
	if err != nil {
		t.Fatal(err)
	}
	packed, err := kernelsig.SignModule(key, cert, object("packed"))
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(good)
	changed[66] ^= 1
	const dir = "lib/modules/6.12/"
	src := codesign.DirSource(tree(map[string]string{
		dir + "good.ko": string(good), dir + "packed.ko.gz": gz(packed), dir + "changed.ko": string(changed), dir + "plain.ko": string(object("plain")),
	}))
	rel := l.sign(src, codesign.ReleaseInfo{})
	p := l.policy("base", 1, "enforce", allowFleet)
	with := func(ring string, keys ...*x509.Certificate) csv.Cell {
		c := cell(ring, 1, p)
		c.ModuleKeys = keys
		return c
	}
	r := l.verify(src, rel, csv.Options{}, with("right", cert), with("wrong", other), with("unknown"))
	wantFindings(t, r, map[csv.ID][]string{csv.BadModule: {
		"block [0 1] " + dir + "changed.ko",
		"block [0 1] " + dir + "plain.ko", // not signed
		"block [1] " + dir + "good.ko " + dir + "packed.ko.gz",
		"warn [2] " + dir + "plain.ko",
	}})
	if !strings.Contains(strings.Join(r.Unchecked, "\n"), `nobody said which keys the kernels of ring "unknown" take`) {
		t.Errorf("unchecked: %q", r.Unchecked)
	}
	for _, c := range r.Cells { // the release authorises them all
		if c.Blocked != 0 {
			t.Errorf("%+v", c)
		}
	}
}

// bootImage is a PE file that firmware would start, if it were signed.
func bootImage() []byte {
	const head, size = 0x200, 0x400
	b := make([]byte, size)
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	le.PutUint16(b[0x44:], 0x8664)
	le.PutUint16(b[0x46:], 1)
	le.PutUint16(b[0x54:], 240)
	opt := b[0x58:]
	le.PutUint16(opt, 0x20b)
	le.PutUint32(opt[60:], head)
	le.PutUint16(opt[68:], 10) // an EFI application
	le.PutUint32(opt[108:], 16)
	s := b[0x58+240:]
	copy(s, ".text")
	le.PutUint32(s[8:], size-head)
	le.PutUint32(s[12:], 0x1000)
	le.PutUint32(s[16:], size-head)
	le.PutUint32(s[20:], head)
	return b
}

func TestVerify_bootImages(t *testing.T) {
	l := newLab(t)
	image := bootImage()
	m, err := kernelsig.ParseImage(image)
	if err != nil {
		t.Fatal(err)
	}
	src := codesign.DirSource(fstest.MapFS{"boot/efi/app.efi": {Data: image, Mode: 0o644}})
	rel := l.sign(src, codesign.ReleaseInfo{})
	p := l.policy("base", 1, "enforce", allowFleet)
	listed := &kernelsig.SignatureDB{Hashes: map[[32]byte]bool{m.Hash(): true}}
	with := func(ring string, db, dbx *kernelsig.SignatureDB, sbat ...kernelsig.SBATEntry) csv.Cell {
		c := cell(ring, 1, p)
		c.DB, c.DBX, c.SBAT = db, dbx, sbat
		return c
	}
	r := l.verify(src, rel, csv.Options{},
		with("listed", listed, nil), with("strange", &kernelsig.SignatureDB{}, nil), with("forbidden", listed, listed), with("unknown", nil, nil),
		with("sbat", listed, nil, kernelsig.SBATEntry{Component: "sbat", Generation: 1}))
	wantFindings(t, r, map[csv.ID][]string{csv.BadEFI: {
		"block [1] boot/efi/app.efi", "block [2] boot/efi/app.efi", "block [4] boot/efi/app.efi",
	}})
	if !strings.Contains(strings.Join(r.Unchecked, "\n"), `firmware of ring "unknown"`) {
		t.Errorf("unchecked: %q", r.Unchecked)
	}
}

// A package's scripts and archives, and what they leave on a host.
func TestVerify_madeAtInstall(t *testing.T) {
	l := newLab(t)
	script := "#!/bin/sh\npy3compile -p x\ndkms add x\nupdate-initramfs -u\ncurl -O https://x\nsetcap cap_net_raw+ep /bin/x\n"
	src := installed{codesign.DirSource(tree(map[string]string{"DEBIAN/postinst*": script, "usr/share/x.zip": "PK\x03\x04", "usr/share/man/x.1.gz": gz([]byte("text"))}))}
	rel := l.sign(src, codesign.ReleaseInfo{})
	quiet := l.policy("base", 1, "enforce", "baseline: 1\n"+allowFleet)
	loud := l.policy("base", 2, "audit", allowFleet)
	r := l.verify(src, rel, csv.Options{}, cell("quiet", 1, quiet, userland(t, l)), cell("loud", 1, loud, userland(t, l)))
	const name = " DEBIAN/postinst"
	wantFindings(t, r, map[csv.ID][]string{
		csv.MadeAtInstall: {"block [0]" + name, "note [1]" + name, "warn [0]" + name, "warn [1]" + name, "warn [1]" + name, "warn []" + name},
		csv.Privileged:    {"warn []" + name},
		csv.Payload:       {"warn [] usr/share/x.zip"},
	})
}

// installed is a source whose maintainer scripts are known as such.
type installed struct{ codesign.Source }

func (s installed) Walk(visit func(codesign.Member, io.Reader) error) error {
	return s.Source.Walk(func(m codesign.Member, r io.Reader) error {
		m.Install = strings.HasPrefix(m.Path, "DEBIAN/")
		return visit(m, r)
	})
}

func FuzzELF(f *testing.F) {
	for _, x := range []elfImage{
		{kind: 2, interp: loader, needed: []string{"libc.so.6"}}, {kind: 3, soname: "lib.so.1", rwx: true, stackX: true}, {kind: 3, noRelro: true, now: true},
	} {
		f.Add([]byte(x.bytes()), 16)
	}
	f.Add(object("text"), 3)
	f.Fuzz(func(t *testing.T, b []byte, piece int) {
		whole, is, err := csv.ELF(b, max(1, len(b)))
		if err != nil && !errors.Is(err, errs.Invalid) {
			t.Fatal(err)
		}
		pieces, is2, err2 := csv.ELF(b, min(max(piece, 1), 1<<16))
		if (err == nil) != (err2 == nil) || is != is2 || !slices.Equal(whole, pieces) {
			t.Fatalf("in pieces: %q, %v, %v; at once: %q, %v, %v", pieces, is2, err2, whole, is, err)
		}
	})
}
