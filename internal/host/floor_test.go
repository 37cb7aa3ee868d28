package host

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"ringwall/internal/errs"
	"ringwall/internal/testkit"
)

// emulator is a software TPM.
type emulator struct{ *testkit.TPM }

func startTPM(t *testing.T) emulator {
	t.Helper()
	return emulator{testkit.StartTPM(t)}
}

// do is what root does to the TPM with its own tools.
func (e emulator) do(fn func(transport.TPM) error) error { return withTPM(e.Path, fn) }

// floors runs a test with both kinds.
func floors(t *testing.T, test func(t *testing.T, dir, tpm string)) {
	t.Helper()
	t.Run("local", func(t *testing.T) { test(t, t.TempDir(), NoTPM) })
	t.Run("tpm", func(t *testing.T) { test(t, t.TempDir(), startTPM(t).Path) })
}

func wantFloor(t *testing.T, dir, tpm string, want uint64) {
	t.Helper()
	f, err := OpenFloor(dir, tpm)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.Get(); err != nil || n != want {
		t.Fatalf("floor %d, %v; want %d", n, err, want)
	}
}

// refused is what every damage must lead to: neither a floor of zero nor a host
// that looks new.
func refused(t *testing.T, dir, tpm, what string) {
	t.Helper()
	f, err := OpenFloor(dir, tpm)
	if err == nil {
		var n uint64
		if n, err = f.Get(); err == nil {
			t.Errorf("%s: floor %d", what, n)
		}
	}
	if !errors.Is(err, errs.Untrusted) || errors.Is(err, errs.NotFound) {
		t.Errorf("%s: %v", what, err)
	}
}

func TestFloor(t *testing.T) {
	floors(t, func(t *testing.T, dir, tpm string) {
		if _, err := OpenFloor(dir, tpm); !errors.Is(err, errs.NotFound) {
			t.Fatalf("before the first start: %v", err)
		}
		f, err := InitFloor(dir, tpm, nil)
		if err != nil {
			t.Fatal(err)
		}
		wantFloor(t, dir, tpm, 0)
		for _, n := range []uint64{1, 1, 5, 1 << 63} {
			if err := f.Raise(n); err != nil {
				t.Fatal(err)
			}
			wantFloor(t, dir, tpm, n)
		}
		if err := f.Raise(7); !errors.Is(err, errs.Denied) {
			t.Errorf("lowered: %v", err)
		}
		wantFloor(t, dir, tpm, 1<<63)
		if _, err := InitFloor(dir, tpm, nil); !errors.Is(err, errs.Conflict) {
			t.Errorf("second first start: %v", err)
		}
		if d := f.Describe(); strings.Contains(d, "(index 0x01805257)") != (tpm != NoTPM) {
			t.Error(d)
		}
		if err := ResetFloor(dir, tpm, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Get(); err == nil {
			t.Error("a floor that was reset can be read")
		}
		if _, err := InitFloor(dir, tpm, nil); err != nil {
			t.Fatal(err)
		}
		wantFloor(t, dir, tpm, 0)
	})
}

func TestFloor_damage(t *testing.T) {
	floors(t, func(t *testing.T, dir, tpm string) {
		f, err := InitFloor(dir, tpm, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Raise(41); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{floorFile, floorKey} {
			path := filepath.Join(dir, name)
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for what, bad := range map[string][]byte{
				"emptied": {}, "cut": good[:len(good)-1], "longer": append(bytes.Clone(good), '\n'),
				"edited": bytes.Replace(good, []byte("41"), []byte("40"), 1), "a bit": append([]byte{good[0] ^ 1}, good[1:]...),
			} {
				if bytes.Equal(good, bad) {
					continue
				}
				writeTree(t, dir, map[string]string{name: string(bad)})
				refused(t, dir, tpm, name+" "+what)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			refused(t, dir, tpm, name+" removed")
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenFloor(dir, tpm); err == nil {
				t.Errorf("%s is a directory, and all is well", name)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			writeTree(t, dir, map[string]string{name: string(good)})
			wantFloor(t, dir, tpm, 41)
		}
	})
}

func TestFloor_together(t *testing.T) {
	floors(t, func(t *testing.T, dir, tpm string) {
		if _, err := InitFloor(dir, tpm, nil); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range uint64(8) {
			wg.Go(func() {
				f, err := OpenFloor(dir, tpm)
				if err != nil {
					t.Error(err)
					return
				}
				if err := f.Raise(i + 1); err != nil && !errors.Is(err, errs.Denied) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		wantFloor(t, dir, tpm, 8)
	})
}

// TestFloor_local states what a floor without a TPM cannot see.
func TestFloor_local(t *testing.T) {
	dir, old := t.TempDir(), t.TempDir()
	f, err := InitFloor(dir, NoTPM, nil)
	if err != nil {
		t.Fatal(err)
	}
	copyFloor(t, dir, old)
	if err := f.Raise(9); err != nil {
		t.Fatal(err)
	}
	copyFloor(t, old, dir)
	wantFloor(t, dir, NoTPM, 0)
	if !strings.Contains(f.Describe(), "put back to an older copy") {
		t.Error("and it does not say so:", f.Describe())
	}
	// It does not become a floor with a TPM by being told of one.
	tpm := startTPM(t)
	if f, err = OpenFloor(dir, tpm.Path); err != nil || !strings.Contains(f.Describe(), "there is a TPM") {
		t.Errorf("%v", err)
	}
}

func copyFloor(t *testing.T, from, to string) {
	t.Helper()
	for _, n := range []string{floorFile, floorKey} {
		b, err := os.ReadFile(filepath.Join(from, n))
		if err != nil {
			t.Fatal(err)
		}
		writeTree(t, to, map[string]string{n: string(b)})
	}
}

func TestFloor_rollback(t *testing.T) {
	tpm := startTPM(t)
	dir, old, older := t.TempDir(), t.TempDir(), t.TempDir()
	f, err := InitFloor(dir, tpm.Path, nil)
	if err != nil {
		t.Fatal(err)
	}
	copyFloor(t, dir, older)
	if err := f.Raise(3); err != nil {
		t.Fatal(err)
	}
	copyFloor(t, dir, old)
	if err := f.Raise(4); err != nil {
		t.Fatal(err)
	}
	tpm.Stop()
	tpm.Start() // a reboot
	wantFloor(t, dir, tpm.Path, 4)
	for _, d := range []string{old, older} {
		refused(t, d, tpm.Path, "an older copy")
	}

	// Without the TPM, with none to be used, and with another.
	tpm.Stop()
	refused(t, dir, tpm.Path, "the TPM is gone")
	refused(t, dir, NoTPM, "told to use none")
	refused(t, dir, startTPM(t).Path, "another TPM")
	tpm.Start()
	wantFloor(t, dir, tpm.Path, 4)

	// A floor without a TPM, put in place of this one.
	local := t.TempDir()
	if _, err := InitFloor(local, NoTPM, nil); err != nil {
		t.Fatal(err)
	}
	keep := t.TempDir()
	copyFloor(t, dir, keep)
	copyFloor(t, local, dir)
	if _, err := f.Get(); !errors.Is(err, errs.Untrusted) {
		t.Errorf("a floor without a TPM under an open one: %v", err)
	}
	copyFloor(t, keep, dir)
	if n, err := f.Get(); err != nil || n != 4 {
		t.Errorf("%d, %v", n, err)
	}
}

// TestFloor_rootWithOwner is root with TPM tools and the empty owner password.
func TestFloor_rootWithOwner(t *testing.T) {
	tpm := startTPM(t)
	dir, old := t.TempDir(), t.TempDir()
	f, err := InitFloor(dir, tpm.Path, nil)
	if err != nil {
		t.Fatal(err)
	}
	copyFloor(t, dir, old)
	if err := f.Raise(9); err != nil {
		t.Fatal(err)
	}
	pub := counterPublic(true)
	name, err := tpm2.NVName(&pub)
	if err != nil {
		t.Fatal(err)
	}
	index := tpm2.NamedHandle{Handle: counterIndex, Name: *name}
	for what, auth := range map[string]tpm2.AuthHandle{
		"no password":       {Handle: counterIndex, Name: *name, Auth: tpm2.PasswordAuth(nil)},
		"a guess":           {Handle: counterIndex, Name: *name, Auth: tpm2.PasswordAuth([]byte("ringwall"))},
		"the owner's":       {Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		"the platform's":    {Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
		"another key's way": {Handle: counterIndex, Name: *name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(counterAuth(nil)))},
	} {
		err := tpm.do(func(t transport.TPM) error {
			_, err := tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}.Execute(t)
			return err
		})
		if err == nil {
			t.Errorf("incremented with %s", what)
		}
		err = tpm.do(func(t transport.TPM) error {
			_, err := tpm2.NVWrite{AuthHandle: auth, NVIndex: index, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 8)}}.Execute(t)
			return err
		})
		if err == nil {
			t.Errorf("written with %s", what)
		}
	}
	wantFloor(t, dir, tpm.Path, 9) // and no lockout either

	// Removal shows, and so does every counter that is put in its place.
	if err := undefineCounter(tpm.Path, nil); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, tpm.Path, "the counter was removed")
	if _, err := defineCounter(tpm.Path, nil, []byte("another key")); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, tpm.Path, "another counter was put there")
	if err := undefineCounter(tpm.Path, nil); err != nil {
		t.Fatal(err)
	}
	// Even one who knows the key cannot have the counter that an old file needs.
	key, err := os.ReadFile(filepath.Join(old, floorKey))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := defineCounter(tpm.Path, nil, key); err != nil || n < 2 {
		t.Fatalf("a new counter starts at %d, %v", n, err)
	}
	refused(t, old, tpm.Path, "an old file and a new counter")
	refused(t, dir, tpm.Path, "the file and a new counter")
	if _, err := InitFloor(t.TempDir(), tpm.Path, nil); !errors.Is(err, errs.Conflict) {
		t.Errorf("first start over a counter: %v", err)
	}
}

func TestFloor_ownerPassword(t *testing.T) {
	tpm := startTPM(t)
	secret := []byte("owner")
	err := tpm.do(func(t transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NewAuth: tpm2.TPM2BAuth{Buffer: secret}}.Execute(t)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := InitFloor(dir, tpm.Path, nil); !errors.Is(err, errs.Denied) {
		t.Errorf("without the password: %v", err)
	}
	if f, err := InitFloor(dir, tpm.Path, secret); err != nil { // the failure left nothing behind
		t.Fatal(err)
	} else if err := f.Raise(2); err != nil {
		t.Error(err)
	}
	wantFloor(t, dir, tpm.Path, 2)
	if err := undefineCounter(tpm.Path, nil); !errors.Is(err, errs.Denied) {
		t.Errorf("removed without the password: %v", err)
	}
	if err := ResetFloor(dir, tpm.Path, nil); !errors.Is(err, errs.Denied) {
		t.Errorf("reset without the password: %v", err)
	}
	wantFloor(t, dir, tpm.Path, 2)
}

// TestFloor_crash ends a Raise between the file and the TPM.
func TestFloor_crash(t *testing.T) {
	tpm := startTPM(t)
	dir := t.TempDir()
	if _, err := InitFloor(dir, tpm.Path, nil); err != nil {
		t.Fatal(err)
	}
	f := &fileFloor{dir: dir, tpm: tpm.Path}
	key, st, err := f.read()
	if err != nil {
		t.Fatal(err)
	}
	ahead := func(by uint64) {
		t.Helper()
		next := st
		next.Epoch, next.Counter = 6, st.Counter+by
		if err := f.write(key, next); err != nil {
			t.Fatal(err)
		}
	}
	ahead(2)
	refused(t, dir, tpm.Path, "a file from the future")
	ahead(1)
	wantFloor(t, dir, tpm.Path, 6)
	if n, err := readCounter(tpm.Path, key); err != nil || n != st.Counter+1 {
		t.Errorf("counter %d, %v", n, err)
	}
	if err := f.Raise(7); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, dir, tpm.Path, 7)

	// A first start that ended before its last step is not one that may be
	// repeated without a word.
	if err := os.Remove(filepath.Join(dir, floorFile)); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, tpm.Path, "half a first start")
	if _, err := InitFloor(dir, tpm.Path, nil); !errors.Is(err, errs.Conflict) {
		t.Errorf("%v", err)
	}
}

func TestFloor_fullDisk(t *testing.T) {
	if os.Getuid() == 0 {
		dir := t.TempDir()
		if err := exec.CommandContext(t.Context(), "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", dir).Run(); err != nil {
			t.Skip("SKIP: cannot mount a small tmpfs:", err)
		}
		defer func() { _ = exec.Command("umount", dir).Run() }()
		f, err := InitFloor(dir, NoTPM, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Raise(3); err != nil {
			t.Fatal(err)
		}
		_ = os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 64<<10), 0o600) // fails when full
		if err := f.Raise(4); err == nil {
			t.Error("raised on a full disk")
		}
		wantFloor(t, dir, NoTPM, 3)
		return
	}
	t.Skip("SKIP: needs root")
}

func FuzzParseFloor(f *testing.F) {
	key := []byte("0123456789abcdef0123456789abcdef")
	good := []byte(`{"version":1,"kind":"tpm","epoch":5,"counter":7}`)
	f.Add(good, false)
	f.Add(good, true)
	f.Add([]byte(`{"version":1,"kind":"local","epoch":5}`), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal { // what is behind the seal must be read as carefully
			body := bytes.ReplaceAll(b, []byte("\n"), nil)
			b = append(append(bytes.Clone(body), '\n'), []byte(hex.EncodeToString(floorMAC(key, body))+"\n")...)
		}
		st, err := parseFloor(b, key)
		if err != nil {
			if st, e := parseFloor(b, []byte("another key")); e == nil {
				t.Errorf("another key's: %+v", st)
			}
			return
		}
		if !seal {
			t.Fatalf("a seal that nobody made holds: %q", b)
		}
		if st.Version != 1 || (st.Kind == floorTPM) == (st.Counter == 0) {
			t.Errorf("%+v", st)
		}
	})
}
