package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"debug/elf"
	"embed"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"ringwall/internal/codesign"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
	"ringwall/test/vm"
)

//go:embed testdata
var sources embed.FS

// packages of the guest. fapolicyd is in the pool: its service must not start
// with the system.
func packages() (installed, pool []string) {
	return []string{
		"systemd-sysv", "udev", "kmod", "procps", "iproute2", "python3", "gcc", "libc6-dev", "make", "golang-go",
		"libmagic1", "liblmdb0", "libcap-ng0", "adduser",
	}, []string{"fapolicyd"}
}

const (
	scopeCgroup   = "/sys/fs/cgroup/bench-in"
	outsideCgroup = "/sys/fs/cgroup/bench-out"
	coldFiles     = 4
	coldMiB       = 8
	fleet         = "Bench Fleet"
)

// preparer makes what a guest is given.
type preparer struct {
	ringwall string // the binary
	dir      string // becomes the payload
	out      io.Writer
}

func (p *preparer) path(name string) string { return filepath.Join(p.dir, name) }

func (p *preparer) command(ctx context.Context, dir string, argv ...string) error {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir = dir
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	c.Stderr = p.out
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return nil
}

// build makes the programs and scripts that a policy will authorise.
func (p *preparer) build(ctx context.Context) error {
	src, b := p.path("src"), p.path("build")
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := os.Stat(p.path("state-scope")); err == nil {
		// made and signed in an earlier run
		return p.command(ctx, "", "cp", self, b+"/bench")
	}
	if err := errors.Join(os.RemoveAll(src), os.CopyFS(src, sources)); err != nil {
		return err
	}
	if err := os.MkdirAll(b, 0o755); err != nil { //nolint:gosec // programs for everyone
		return err
	}
	s := src + "/testdata/"
	for _, argv := range [][]string{
		{"gcc", "-O2", "-Wall", "-static", "-o", b + "/micro", s + "micro.c"},
		{"gcc", "-O2", "-static", "-nostdlib", "-o", b + "/tiny", s + "tiny.c"},
		{"cp", self, b + "/bench"},
		{"cp", s + "opens.py", s + "opens.sh", s + "imports.py", b},
		{"cp", p.ringwall, p.path("ringwall")},
	} {
		if err := p.command(ctx, "", argv...); err != nil {
			return err
		}
	}
	// Programs of a size, whose first execution shows what hashing costs.
	t, err := os.ReadFile(b + "/tiny")
	if err != nil {
		return err
	}
	for i := range coldFiles {
		big := make([]byte, coldMiB<<20)
		_, _ = rand.Read(big)
		copy(big, t)
		if err := os.WriteFile(fmt.Sprintf("%s/cold-%d", b, i), big, 0o755); err != nil { //nolint:gosec // a program
			return err
		}
	}
	return nil
}

// states signs the build and the policies with the command line that operators
// use, and makes the state of two hosts: one that governs a cgroup, and one
// that governs itself.
func (p *preparer) states(ctx context.Context, image vm.Image) error {
	if _, err := os.Stat(p.path("state-scope")); err == nil {
		return nil
	}
	fmt.Fprintln(p.out, "signing the build; verifying every package against Debian's signature")
	run := func(args ...string) error {
		return p.command(ctx, p.dir, append([]string{p.path("ringwall"), "-q"}, args...)...)
	}
	if err := errors.Join(
		run("key", "init", "keys", "--name", fleet),
		run("sign", "build", "--keys", "keys", "--product", "bench", "--version", "1.0", "--epoch", "1", "--out", "releases"),
	); err != nil {
		return err
	}
	for _, x := range []struct {
		name, mode string
		epoch      int
	}{{"enforce", "enforce", 2}, {"end", "audit", 3}} {
		if err := p.policy(ctx, x.name, x.mode, x.epoch); err != nil {
			return err
		}
		if err := run("policy", "sign", x.name+".yaml", "--keys", "keys", "-o", x.name+".policy.json"); err != nil {
			return err
		}
	}
	// host init looks for apt's indices below a root directory.
	apt := p.path("root/var/lib/apt")
	if err := errors.Join(os.MkdirAll(apt, 0o755), os.Symlink(image.Lists, apt+"/lists")); err != nil { //nolint:gosec // public indices
		return err
	}
	if err := run("host", "init", "--trust", "keys", "--policy", "enforce.policy.json", "--release", "releases", "--root", "root", "--packages", image.Debs, "--state", "state-host"); err != nil {
		return err
	}
	if err := p.scoped(ctx); err != nil {
		return fmt.Errorf("state of a scoped agent: %w", err)
	}
	return errors.Join(os.RemoveAll(p.path("root")), os.RemoveAll(p.path("src")))
}

// scoped makes the second state of the first: to verify every package again
// takes minutes on a slow machine, and only a setting differs.
func (p *preparer) scoped(ctx context.Context) error {
	if err := p.command(ctx, p.dir, "cp", "-a", "state-host", "state-scope"); err != nil {
		return err
	}
	name := p.path("state-scope/anchor.json")
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var anchor map[string]json.RawMessage
	if err := json.Unmarshal(b, &anchor); err != nil {
		return err
	}
	if anchor["settings"], err = json.Marshal(map[string]string{"scope": scopeCgroup}); err != nil {
		return err
	}
	if b, err = json.Marshal(anchor); err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o600)
}

func (p *preparer) policy(ctx context.Context, name, mode string, epoch int) error {
	trust, err := exec.CommandContext(ctx, p.path("ringwall"), "key", "trust", p.path("keys")).Output()
	if err != nil {
		return fmt.Errorf("trust section of the policy: %w", err)
	}
	ring, err := os.ReadFile("/usr/share/keyrings/debian-archive-keyring.gpg")
	if err != nil {
		return err
	}
	text := fmt.Sprintf("version: 1\nname: bench\nepoch: %d\nbaseline: 1\nmode: %s\n%s", epoch, mode, trust) +
		"  archives:\n    - name: debian\n      origins: [Debian]\n      keyring: " + base64.StdEncoding.EncodeToString(ring) + "\n" +
		"allow:\n  - rule: builds\n    signer: {authority: " + fleet + " build CA}\n" +
		"  - rule: debian-packages\n    package: {archive: debian, names: [\"*\"]}\n"
	return os.WriteFile(p.path(name+".yaml"), []byte(text), 0o644) //nolint:gosec // public
}

// release signs a release of n digests that nothing has.
func (p *preparer) release(n int) error {
	name := largeName(n)
	a, err := pki.LoadAuthority(p.path("keys"), nil, time.Now)
	if err != nil {
		return err
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeBuild, Identity: "spiffe://bench.example/build/" + name, Now: time.Now()})
	if err != nil {
		return err
	}
	records := make([]codesign.Record, n)
	for i := range records {
		records[i] = codesign.Record{Digest: numbered(i), Kinds: integrity.SetOf(integrity.KindExec, integrity.KindLibrary)}
	}
	cat, err := codesign.EncodeCatalogue(records)
	if err != nil {
		return err
	}
	names, err := (&codesign.NameTable{Catalogue: sha256.Sum256(cat), Names: make([][]codesign.Name, n)}).Encode()
	if err != nil {
		return err
	}
	rec, err := codesign.SignRelease(s, codesign.ReleaseInfo{Product: name, Version: "1", Epoch: 1}, cat, names)
	if err != nil {
		return err
	}
	stem := p.path(name)
	return errors.Join(
		os.WriteFile(stem+".release.json", rec, 0o644), //nolint:gosec // public
		os.WriteFile(stem+".cat", cat, 0o644),          //nolint:gosec // public
		os.WriteFile(stem+".names", names, 0o644),      //nolint:gosec // public
	)
}

// numbered is a digest that no content has, spread like a real one.
func numbered(i int) integrity.Digest {
	var d integrity.Digest
	x := uint64(i) + 1
	for at := 0; at < len(d); at += 8 {
		// splitmix64
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(d[at:], z^z>>31)
	}
	return d
}

// isProgram says whether a file starts as ELF does.
func isProgram(head []byte) bool { return len(head) >= 4 && string(head[:4]) == elf.ELFMAG }
