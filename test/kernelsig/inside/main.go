// Command inside runs in a guest and asks the kernel what it thinks of the
// signatures that ringwall/internal/kernelsig makes. Each line that it writes
// begins with ok, FAIL or note.
package main

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	if filepath.Base(os.Args[0]) == "hello" { // what is tried to be run
		fmt.Println("hello")
		return
	}
	parts := map[string]func() error{
		"fsverity": fsverity, "ima": appraise, "module": modules, "roothash": rootHash, "ipe": ipe, "image": volumes, "enrol": enrol,
		"platform": platform,
	}
	fmt.Println() // firmware may have left something on the line
	code := 0
	for _, name := range os.Args[1:] {
		if err := parts[name](); err != nil {
			fmt.Printf("FAIL %s: %v\n", name, err)
			code = 1
		}
	}
	os.Exit(code)
}

// expect says whether something ended as it should: without an error, or with
// one of the errors.
func expect(what string, err error, want ...error) {
	switch {
	case len(want) == 0 && err == nil:
		fmt.Printf("ok %s: accepted\n", what)
		return
	case len(want) > 0 && err != nil:
		for _, w := range want {
			if errors.Is(err, w) {
				fmt.Printf("ok %s: refused: %v\n", what, err)
				return
			}
		}
	}
	fmt.Printf("FAIL %s: %v, want %v\n", what, err, want)
}

// pair is a key with its certificate.
type pair struct {
	name string
	key  crypto.Signer
	cert *x509.Certificate
}

// load reads a key that was made outside, where that is quick.
func load(name string) (p pair, err error) {
	p.name = name
	for _, ext := range []string{".key", ".crt"} {
		b, err := os.ReadFile("/test/" + name + ext)
		if err != nil {
			return p, err
		}
		block, _ := pem.Decode(b)
		if block == nil {
			return p, fmt.Errorf("%s%s is not PEM", name, ext)
		}
		if ext == ".crt" {
			p.cert, err = x509.ParseCertificate(block.Bytes)
		} else {
			var k any
			if k, err = x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				p.key = k.(crypto.Signer) //nolint:forcetypeassert // of the test's own making
			}
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// keyring finds one of the kernel's own keyrings.
func keyring(name string) (int, error) {
	b, err := os.ReadFile("/proc/keys")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 8 && f[7] == "keyring" && f[8] == name+":" {
			var id uint32
			if _, err := fmt.Sscanf(f[0], "%x", &id); err != nil {
				return 0, err
			}
			return int(int32(id)), nil
		}
	}
	return 0, fmt.Errorf("the kernel has no keyring %s", name)
}

func mount(device, dir, kind string, flags uintptr) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, dir, kind, flags, ""); err != nil {
		return fmt.Errorf("mount %s: %w", device, err)
	}
	return nil
}

// program writes a copy of this program that says hello, and something after
// it, so that each is another file.
func program(path, more string) error {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, more...), 0o755)
}

// start runs a program to its end, in a cgroup if one is given.
func start(path string, cgroup *os.File) error {
	c := exec.Command(path)
	if cgroup != nil {
		c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	}
	out, err := c.CombinedOutput()
	if err == nil && string(out) != "hello\n" {
		err = fmt.Errorf("it said %q", out)
	}
	return err
}
