package kernelsig_test

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ulikunitz/xz"

	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
	"ringwall/test/vm"
)

// debian is one of Debian's kernel packages, unpacked.
type debian struct {
	vm.Kernel
	image   []byte
	modules []string
}

// kernel fetches a kernel package through apt into the cache that the guests
// share.
func kernel(t testing.TB, series string) debian {
	t.Helper()
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: a kernel package is much to read")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	k, err := vm.FindKernel(ctx, series)
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no kernel %s from an archive: %v", series, err)
	}
	d := debian{Kernel: k, image: read(t, k.Image)}
	if err := filepath.WalkDir(k.Modules, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && strings.Contains(filepath.Base(p), ".ko") {
			d.modules = append(d.modules, p)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(d.modules) < 100 {
		t.Fatalf("kernel %s: %d modules", series, len(d.modules))
	}
	return d
}

// plainModule reads a module and decompresses it.
func plainModule(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil && strings.HasSuffix(path, ".xz") {
		if _, missing := exec.LookPath("xz"); missing == nil {
			b, err = exec.Command("xz", "-dc", path).Output()
		} else {
			var r io.Reader
			if r, err = xz.NewReader(bytes.NewReader(b)); err == nil {
				b, err = io.ReadAll(r)
			}
		}
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return b
}

// Every module of a Debian kernel package verifies under the key that is inside
// the boot image of the same package, and under no other package's.
func TestKernelCertificates_debian(t *testing.T) {
	var last *kernelsig.KernelKeys
	for _, series := range []string{"6.1", "6.12", vm.Newest} {
		t.Run(series, func(t *testing.T) {
			k := kernel(t, series)
			keys, err := kernelsig.KernelCertificates(k.image)
			if err != nil {
				t.Fatal(err)
			}
			if keys.Module == nil {
				t.Fatal("no module key")
			}
			for _, c := range keys.Builtin {
				t.Logf("%s: %s, %v, EKU %v", k.Release, c.Subject, c.PublicKeyAlgorithm, c.ExtKeyUsage)
			}
			var (
				group sync.WaitGroup
				mu    sync.Mutex
				bad   []string
				paths = make(chan string)
			)
			for range runtime.GOMAXPROCS(0) {
				group.Go(func() {
					for p := range paths {
						c, err := kernelsig.VerifyModule(plainModule(t, p), keys.Builtin)
						if err == nil && c != keys.Module {
							err = fmt.Errorf("signed by %s", c.Subject)
						}
						if err != nil {
							mu.Lock()
							bad = append(bad, fmt.Sprintf("%s: %v", p, err))
							mu.Unlock()
						}
					}
				})
			}
			for _, p := range k.modules {
				paths <- p
			}
			close(paths)
			group.Wait()
			if len(bad) > 0 {
				t.Errorf("%d of %d modules do not verify, such as %s", len(bad), len(k.modules), bad[0])
			}
			t.Logf("%s: %d modules verify under %s", k.Release, len(k.modules)-len(bad), keys.Module.Subject)

			m := plainModule(t, k.modules[0])
			if last != nil {
				_, err := kernelsig.VerifyModule(m, last.Builtin)
				notTrusted(t, "another kernel's keys", err)
			}
			own := newPair(t, "nobody", ecKey(t, elliptic.P256()), nil)
			plain, _, err := kernelsig.SplitModule(m)
			if err != nil {
				t.Fatal(err)
			}
			foreign, err := kernelsig.SignModule(own.key, own.cert, plain)
			if err != nil {
				t.Fatal(err)
			}
			_, err = kernelsig.VerifyModule(foreign, keys.Builtin)
			notTrusted(t, "a key of our own", err)
			m[len(m)/4] ^= 1
			_, err = kernelsig.VerifyModule(m, keys.Builtin)
			notTrusted(t, "changed", err)
			last = keys
		})
	}
}

func TestKernelCertificates_refuses(t *testing.T) {
	k := kernel(t, "6.1")
	for name, b := range map[string][]byte{
		"empty": nil, "text": []byte("#!/bin/sh\n"), "cut header": k.image[:0x240], "cut payload": k.image[:len(k.image)/2],
		"kernel with nothing in it": append([]byte("\x7fELF"), make([]byte, 1000)...),
	} {
		_, err := kernelsig.KernelCertificates(b)
		if !errors.Is(err, errs.Invalid) && !errors.Is(err, errs.Unsupported) && !errors.Is(err, errs.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// sized decompresses as a boot image would have it, with the size behind.
func sized(packed []byte, size int) ([]byte, error) {
	return kernelsig.Decompress(binary.LittleEndian.AppendUint32(slices.Clone(packed), uint32(size)))
}

func TestUnlz4(t *testing.T) {
	tool(t, "lz4")
	code := read(t, tool(t, "openssl"))
	code = append(append(code, make([]byte, 9<<20)...), code...)
	c := exec.Command("lz4", "-l", "-c", "-z", "-9")
	c.Stdin = bytes.NewReader(code)
	packed, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := sized(packed, len(code)); err != nil || !bytes.Equal(got, code) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(code), err)
	}
	if _, err := sized(packed, len(code)-1); !errors.Is(err, errs.Invalid) {
		t.Errorf("beyond the limit: %v", err)
	}
	for n := 5; n < len(packed); n += 1 + len(packed)/40 {
		if got, err := sized(packed[:n], len(code)); err == nil && bytes.Equal(got, code) {
			t.Errorf("cut at %d: all came out", n)
		}
	}
}

// The x86 filter against xz itself, on machine code.
func TestUnxz(t *testing.T) {
	tool(t, "xz")
	code := read(t, tool(t, "openssl"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	code = append(code, read(t, self)[1<<20:2<<20]...)
	for _, args := range [][]string{{"--x86", "--lzma2"}, {"--lzma2=dict=1MiB"}, {"--x86", "--lzma2", "--check=crc32"}} {
		c := exec.Command("xz", append([]string{"-c", "-z"}, args...)...)
		c.Stdin = bytes.NewReader(code)
		packed, err := c.Output()
		if err != nil {
			t.Fatal(err)
		}
		got, err := sized(packed, len(code))
		if err != nil || !bytes.Equal(got, code) {
			t.Errorf("%v: %d bytes of %d, %v", args, len(got), len(code), err)
		}
		if _, err := sized(packed, len(code)-1); !errors.Is(err, errs.Invalid) {
			t.Errorf("%v: beyond the limit: %v", args, err)
		}
		for n := 0; n < len(packed); n += 1 + len(packed)/5 {
			if _, err := sized(packed[:n], len(code)); err == nil {
				t.Errorf("%v: cut at %d: taken", args, n)
			}
		}
	}
}
