// Package kernelsig boots guests whose kernels judge what internal/kernelsig
// and internal/image make.
package kernelsig

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/image"
	"ringwall/internal/kernelsig"
	"ringwall/test/vm"
)

func command(t *testing.T, argv ...string) {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no %s here", argv[0])
	}
	c := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
}

// bench is what the guests of all kernels share.
type bench struct {
	dir         string
	inside      string
	certificate *x509.Certificate // RSA, which every kernel knows
	files       []vm.File
	disks       []vm.Disk
}

// setUp makes keys, programs, images and a host's state. Everything is used
// read-only or in copies.
func setUp(t *testing.T) *bench {
	t.Helper()
	b := &bench{dir: t.TempDir()}
	b.inside = filepath.Join(b.dir, "inside")
	command(t, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.inside, "./inside")
	b.add("/test/inside", b.inside)
	b.add("/test/hello", b.inside)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"rsa": rsaKey, "p256": p256(t), "stranger": nil} {
		if key == nil { // of the kind that every kernel knows
			if key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
				t.Fatal(err)
			}
		}
		c, err := kernelsig.NewCertificate(key, "ringwall test "+name, time.Now(), time.Hour*24*365)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		b.add("/test/"+name+".key", b.write(t, name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
		b.add("/test/"+name+".crt", b.write(t, name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})))
		if name == "rsa" {
			b.certificate = c
		}
	}
	b.images(t)
	return b
}

func p256(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (b *bench) add(guest, host string) { b.files = append(b.files, vm.File{Host: host, Guest: guest}) }

func (b *bench) write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(b.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

// images makes three: the one that the policy names, one with flipped bits, and
// another one; and the state of a host that has the policy.
func (b *bench) images(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("SKIPPED, NOT TESTED: no mkfs.erofs here")
	}
	hello, err := os.ReadFile(b.inside)
	if err != nil {
		t.Fatal(err)
	}
	build := func(name string) *image.Checked {
		// another file for each, so that nothing else vouches for it
		program := b.write(t, name+".d/bin/hello", append(bytes.Clone(hello), name...))
		if err := os.Chmod(program, 0o755); err != nil {
			t.Fatal(err)
		}
		v, err := image.Build(t.Context(), filepath.Join(b.dir, name+".d"), filepath.Join(b.dir, name), image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	good := build("good.img")
	build("other.img")
	whole, err := os.ReadFile(filepath.Join(b.dir, "good.img"))
	if err != nil {
		t.Fatal(err)
	}
	// a bit in every block of the program's content, from behind its first
	// blocks so that the file system itself can be mounted
	at := bytes.Index(whole, hello[:4096])
	if at < 0 {
		t.Fatal("the program is not in the image as it is")
	}
	for i := at; i < at+len(hello); i += image.BlockSize {
		whole[i+100] ^= 1
	}
	b.write(t, "bad.img", whole)

	ringwall := filepath.Join(b.dir, "ringwall")
	command(t, "go", "build", "-trimpath", "-o", ringwall, "../../cmd/ringwall")
	keys, policy, signed, state := filepath.Join(b.dir, "keys"), filepath.Join(b.dir, "base.yaml"), filepath.Join(b.dir, "base.policy.json"), filepath.Join(b.dir, "state")
	command(t, ringwall, "-q", "key", "init", keys, "--name", "Test")
	trust, err := exec.CommandContext(t.Context(), ringwall, "key", "trust", keys).Output()
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "base.yaml", []byte("version: 1\nname: base\nepoch: 1\nbaseline: 1\nmode: enforce\n"+string(trust)+
		"allow:\n  - rule: volume\n    dmverity: ["+hex(good.Root)+"]\n"))
	command(t, ringwall, "-q", "policy", "sign", policy, "--keys", keys, "-o", signed)
	command(t, ringwall, "-q", "host", "init", "--state", state, "--trust", keys, "--policy", signed, "--scope", "/sys/fs/cgroup/trial")
	b.add("/test/ringwall", ringwall)
	b.add("/test/state", state)
	for _, d := range []string{"good.img", "bad.img", "other.img"} {
		b.disks = append(b.disks, vm.Disk{Path: filepath.Join(b.dir, d), ReadOnly: true})
	}
}

func hex(d [32]byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, c := range d {
		s.WriteByte(digits[c>>4])
		s.WriteByte(digits[c&15])
	}
	return s.String()
}

// fileSystems are fresh disks for files with fs-verity and extended attributes.
func (b *bench) fileSystems(t *testing.T) []vm.Disk {
	t.Helper()
	var out []vm.Disk
	for i, uuid := range []string{
		"00000000-0000-4000-8000-000000000000", "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222",
	} {
		path := filepath.Join(t.TempDir(), "disk")
		size := []string{"32m", "96m", "96m"}[i]
		command(t, "mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", "-U", uuid, path, size)
		out = append(out, vm.Disk{Path: path})
	}
	return out
}

// kernelFiles are those of the kernel under test: its image and a module that
// depends on none.
func kernelFiles(t *testing.T, k vm.Kernel) []vm.File {
	t.Helper()
	var module string
	if err := filepath.WalkDir(k.Modules, func(p string, _ fs.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(p), "crc-itu-t.ko") {
			module = p
		}
		return err
	}); err != nil || module == "" {
		t.Fatalf("no module crc-itu-t: %v", err)
	}
	plain := filepath.Join(t.TempDir(), "module.ko")
	b, err := os.ReadFile(module)
	if err == nil && strings.HasSuffix(module, ".xz") {
		b, err = exec.CommandContext(t.Context(), "xz", "-dc", module).Output()
	}
	if err == nil {
		err = os.WriteFile(plain, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return []vm.File{{Host: plain, Guest: "/test/module.ko"}, {Host: k.Image, Guest: "/test/vmlinuz"}}
}

// kernels are those of RINGWALL_KERNELS, as in ./check.
func kernels() []string {
	if k := strings.Fields(os.Getenv("RINGWALL_KERNELS")); len(k) > 0 {
		return k
	}
	return []string{"6.1", "6.12"}
}

func findKernel(t *testing.T, name string) vm.Kernel {
	t.Helper()
	k, err := vm.FindKernel(t.Context(), name)
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: the package sources have no kernel %s", name)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// run boots a guest and counts its results.
func run(t *testing.T, g vm.Guest, least int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	out := &lines{t: t}
	g.Output = out
	r, err := vm.Run(ctx, g)
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.Line())
	if r.Exit != 0 || out.ok < least {
		t.Errorf("exit %d after %d results, want %d\n%s", r.Exit, out.ok, least, r.Console)
	}
}

// TestKernels: what stock kernels accept and refuse.
func TestKernels(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots guests (-short)")
	}
	b := setUp(t)
	for _, name := range kernels() {
		t.Run(name, func(t *testing.T) {
			k := findKernel(t, name)
			run(t, vm.Guest{
				Kernel: k, Argv: []string{"/test/inside", "fsverity", "module", "roothash", "ipe", "image", "ima"},
				Cmdline: "module.sig_enforce=1", Files: append(kernelFiles(t, k), b.files...),
				Disks: append(b.fileSystems(t), b.disks...),
			}, 30)
		})
	}
}

// TestKernels_enrolled: the key is one of the firmware's db, so that the kernel
// has it on its keyring .platform, which Debian's kernels believe about root
// hashes and IPE policies from 6.12 on.
func TestKernels_enrolled(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots guests (-short)")
	}
	const firmware = "/usr/share/OVMF/"
	variables, err := os.ReadFile(firmware + "OVMF_VARS_4M.fd")
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no UEFI firmware for guests: %v", err)
	}
	b := setUp(t)
	b.add("/test/db.auth", b.write(t, "db.auth", authenticated(b.certificate)))
	for _, name := range kernels() {
		if name == "6.1" {
			continue // its dm-verity does not look at .platform, and it has no IPE
		}
		t.Run(name, func(t *testing.T) {
			k := findKernel(t, name)
			g := vm.Guest{
				Kernel: k, Files: b.files, Modules: []string{"efivarfs"}, Disks: append(b.fileSystems(t), b.disks...),
				Machine: vm.Machine{Firmware: firmware + "OVMF_CODE_4M.fd", Variables: filepath.Join(t.TempDir(), "vars")},
			}
			if err := os.WriteFile(g.Machine.Variables, variables, 0o600); err != nil {
				t.Fatal(err)
			}
			g.Argv = []string{"/test/inside", "enrol"}
			run(t, g, 1)
			g.Argv = []string{"/test/inside", "platform"}
			run(t, g, 12)
		})
	}
}

// authenticated is what firmware in setup mode takes as a new db: a time, an
// empty signature, and one signature list (UEFI specification 2.10, 8.2.2 and
// 32.4.1).
func authenticated(c *x509.Certificate) []byte {
	le := binary.LittleEndian
	b := make([]byte, 16, 2048)
	le.PutUint16(b, 2026)
	b[2], b[3] = 1, 1
	b = le.AppendUint32(b, 24)                                                           // WIN_CERTIFICATE_UEFI_GUID
	b = le.AppendUint16(b, 0x0200)                                                       // revision
	b = le.AppendUint16(b, 0x0ef1)                                                       // WIN_CERT_TYPE_EFI_GUID
	b = append(b, "\x9d\xd2\xaf\x4a\xdf\x68\xee\x49\x8a\xa9\x34\x7d\x37\x56\x65\xa7"...) // EFI_CERT_TYPE_PKCS7_GUID
	b = append(b, "\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72"...) // EFI_CERT_X509_GUID
	b = le.AppendUint32(b, uint32(28+16+len(c.Raw)))
	b = le.AppendUint32(b, 0)
	b = le.AppendUint32(b, uint32(16+len(c.Raw)))
	return append(append(b, make([]byte, 16)...), c.Raw...)
}

// lines logs a guest's output line by line and fails the test for FAIL.
type lines struct {
	t    *testing.T
	part string
	ok   int
}

func (l *lines) Write(b []byte) (int, error) {
	l.part += string(b)
	for {
		line, rest, ok := strings.Cut(l.part, "\n")
		if !ok {
			return len(b), nil
		}
		l.part = rest
		line = strings.TrimRight(line, "\r")
		switch {
		case strings.HasPrefix(line, "FAIL"):
			l.t.Error(line)
		case strings.HasPrefix(line, "ok "):
			l.ok++
			l.t.Log(line)
		default:
			l.t.Log(line)
		}
	}
}
