package kernelsig_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
)

func TestModule(t *testing.T) {
	module := append([]byte("\x7fELF"), bytes.Repeat([]byte("module"), 1000)...)
	for _, p := range pairs(t) {
		signed, err := kernelsig.SignModule(p.key, p.cert, module)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := kernelsig.VerifyModule(signed, certs(p)); err != nil || got != p.cert {
			t.Fatal(err)
		}
		if m, _, err := kernelsig.SplitModule(signed); err != nil || !bytes.Equal(m, module) {
			t.Errorf("split: %v", err)
		}
		if _, err := kernelsig.SignModule(p.key, p.cert, signed); !errors.Is(err, errs.Conflict) {
			t.Errorf("signed twice: %v", err)
		}
		_, err = kernelsig.VerifyModule(signed, certs(pairs(t)...))
		notTrusted(t, "other keys", err)
		if _, err = kernelsig.VerifyModule(module, certs(p)); !errors.Is(err, errs.Untrusted) {
			t.Errorf("unsigned: %v", err)
		}
		at := len(signed) - 40
		for name, change := range map[string]func(b []byte){
			"content":      func(b []byte) { b[100] ^= 1 },
			"magic":        func(b []byte) { b[len(b)-1] = ' ' },
			"type":         func(b []byte) { b[at+2] = 1 },
			"algorithm":    func(b []byte) { b[at] = 1 },
			"padding":      func(b []byte) { b[at+6] = 1 },
			"length":       func(b []byte) { b[at+11]++ },
			"zero length":  func(b []byte) { binary.BigEndian.PutUint32(b[at+8:], 0) },
			"4 GiB length": func(b []byte) { binary.BigEndian.PutUint32(b[at+8:], 1<<32-1) },
		} {
			bad := bytes.Clone(signed)
			change(bad)
			_, err := kernelsig.VerifyModule(bad, certs(p))
			if err == nil {
				t.Errorf("%s: taken", name)
			}
			notTrusted(t, name, err)
		}
	}
}

// kmod reads the signature's fields by its own code.
func TestModule_modinfo(t *testing.T) {
	dir := t.TempDir()
	k := kernel(t, "6.1")
	plain, _, err := kernelsig.SplitModule(plainModule(t, k.modules[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pairs(t) {
		signed, err := kernelsig.SignModule(p.key, p.cert, plain)
		if err != nil {
			t.Fatal(err)
		}
		file := write(t, filepath.Join(dir, "m.ko"), signed)
		if got := strings.TrimSpace(run(t, "modinfo", "-F", "signer", file)); got != p.name {
			t.Errorf("signer %q, want %q", got, p.name)
		}
		if got := strings.TrimSpace(run(t, "modinfo", "-F", "sig_hashalgo", file)); got != "sha256" {
			t.Errorf("hash %q", got)
		}
	}
}
