package host

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// Floor is the epoch below which a host's policy never falls again. It fails
// closed: what cannot be read or does not verify is an error, never zero. The
// methods may be called from several goroutines and processes.
type Floor interface {
	// Get is the highest epoch that was raised to.
	Get() (uint64, error)
	// Raise makes n the floor, durably; errs.Denied if it is higher already.
	Raise(n uint64) error
	// Describe says in a sentence what holds the floor and what it does not
	// protect from.
	Describe() string
}

// Where a floor can be kept.
const (
	// DefaultTPM is the TPM behind the kernel's resource manager.
	DefaultTPM = "/dev/tpmrm0"
	// NoTPM as the path of a TPM means to use none.
	NoTPM = "none"
)

const (
	floorFile = "epoch"
	floorKey  = "key"

	maxFloorFile  = 4 << 10
	floorLockWait = 5 * time.Second
)

type floorKind string

const (
	floorLocal floorKind = "local"
	floorTPM   floorKind = "tpm"
)

// floorState is the content of the floor's file: one line of JSON, then the
// HMAC-SHA256 of it with the key beside it, in hex.
type floorState struct {
	Version int       `json:"version"`
	Kind    floorKind `json:"kind"`
	Epoch   uint64    `json:"epoch"`
	Counter uint64    `json:"counter,omitempty"` // of the TPM, when the epoch became the floor
}

// fileFloor is both kinds: a sealed file, and for one of them a counter in a TPM
// that says whether the file is the newest.
type fileFloor struct {
	dir  string
	tpm  string // path; "" for the local kind
	note string
}

// InitFloor makes a new floor of zero in dir, which must exist: with the TPM at
// a path, "" for DefaultTPM if that is there and no TPM otherwise. It is the
// first start of a host, and never done twice: a floor that is there, or half
// there, is errs.Conflict; only ResetFloor removes one. ownerAuth is the TPM's
// owner password, usually empty; it is not kept.
func InitFloor(dir, tpm string, ownerAuth []byte) (Floor, error) {
	var f *fileFloor
	err := lockedDir(dir, func() (err error) {
		f, err = initFloor(dir, tpm, ownerAuth)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make the epoch floor in %s: %w", dir, err)
	}
	return f, nil
}

func initFloor(dir, tpm string, ownerAuth []byte) (_ *fileFloor, err error) {
	for _, n := range []string{floorKey, floorFile} {
		if _, err := os.Lstat(filepath.Join(dir, n)); !os.IsNotExist(err) {
			return nil, fmt.Errorf("%s is there already, or a first start was interrupted: %w", n, errors.Join(err, errs.Conflict))
		}
	}
	key := make([]byte, sha256.Size)
	_, _ = rand.Read(key) // never fails, see crypto/rand
	f, st := &fileFloor{dir: dir}, floorState{Version: 1, Kind: floorLocal}
	if tpm == "" {
		tpm = NoTPM
		if _, err := os.Stat(DefaultTPM); !os.IsNotExist(err) {
			tpm = DefaultTPM
		}
	}
	if err := WriteFile(filepath.Join(dir, floorKey), key, 0o600); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = RemoveFile(filepath.Join(dir, floorKey))
		}
	}()
	if tpm != NoTPM {
		f.tpm, st.Kind = tpm, floorTPM
		if st.Counter, err = defineCounter(tpm, ownerAuth, key); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				_ = undefineCounter(tpm, ownerAuth)
			}
		}()
	}
	return f, f.write(key, st)
}

// OpenFloor opens the floor in dir. Its own file says whether a TPM belongs to
// it; one that does must be there. errs.NotFound if InitFloor was never called;
// errs.Untrusted if the file is not the one that was last written.
func OpenFloor(dir, tpm string) (Floor, error) {
	f := &fileFloor{dir: dir}
	if err := lockedDir(dir, func() error { return f.open(tpm) }); err != nil {
		return nil, fmt.Errorf("open the epoch floor in %s: %w", dir, err)
	}
	return f, nil
}

func (f *fileFloor) open(tpm string) error {
	key, st, err := f.read()
	if err != nil {
		return err
	}
	if tpm == "" {
		tpm = DefaultTPM
	}
	if st.Kind == floorTPM {
		if tpm == NoTPM {
			return fmt.Errorf("it was made with a TPM, and none is to be used: %w", errs.Untrusted)
		}
		f.tpm = tpm
	} else if _, err := os.Stat(tpm); tpm != NoTPM && err == nil {
		f.note = "; there is a TPM at " + tpm + " now: make the floor anew to use it"
	}
	_, err = f.settle(key, st)
	return err
}

// ResetFloor removes the floor in dir, with its counter in the TPM, so that
// InitFloor can make one anew: after this any policy that was ever signed is
// new enough. It is an operator's decision that ought to be seen elsewhere.
func ResetFloor(dir, tpm string, ownerAuth []byte) error {
	if tpm == "" {
		tpm = DefaultTPM
	}
	err := lockedDir(dir, func() error {
		if _, err := os.Stat(tpm); tpm != NoTPM && err == nil {
			if err := undefineCounter(tpm, ownerAuth); err != nil && !errors.Is(err, errs.NotFound) {
				return err
			}
		}
		// In this order a removal that is cut off is no floor that opens.
		return errors.Join(RemoveFile(filepath.Join(dir, floorFile)), RemoveFile(filepath.Join(dir, floorKey)))
	})
	if err != nil {
		return fmt.Errorf("reset the epoch floor in %s: %w", dir, err)
	}
	return nil
}

func (f *fileFloor) Describe() string {
	if f.tpm != "" {
		return fmt.Sprintf("a counter in the TPM at %s (index 0x%08x) tells an old copy of the sealed file from the newest, also after the disk was put back; "+
			"who has the TPM's owner password, often empty, and can write the state directory can remove both, which shows as a host without a floor", f.tpm, counterIndex)
	}
	return "a sealed file, without a TPM: it shows changes to the file, but not that the whole state directory was put back to an older copy, " +
		"nor what root does who can read its key" + f.note
}

func (f *fileFloor) Get() (uint64, error) {
	var n uint64
	err := lockedDir(f.dir, func() error {
		key, st, err := f.read()
		if err != nil {
			return err
		}
		st, err = f.settle(key, st)
		n = st.Epoch
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read the epoch floor in %s: %w", f.dir, err)
	}
	return n, nil
}

func (f *fileFloor) Raise(n uint64) error {
	err := lockedDir(f.dir, func() error {
		key, st, err := f.read()
		if err != nil {
			return err
		}
		if st, err = f.settle(key, st); err != nil {
			return err
		}
		switch {
		case n < st.Epoch:
			return fmt.Errorf("it is %d: %w", st.Epoch, errs.Denied)
		case n == st.Epoch:
			return nil
		}
		st.Epoch = n
		if st.Kind == floorTPM {
			st.Counter++
		}
		// The file comes first: settle completes this if we end here. The
		// other order would leave a counter ahead of every file.
		if err := f.write(key, st); err != nil {
			return err
		}
		_, err = f.settle(key, st)
		return err
	})
	if err != nil {
		return fmt.Errorf("raise the epoch floor in %s to %d: %w", f.dir, n, err)
	}
	return nil
}

// settle compares a file's state with the TPM, and completes a Raise that was
// cut off between the two.
func (f *fileFloor) settle(key []byte, st floorState) (floorState, error) {
	if st.Kind == floorLocal {
		if f.tpm != "" {
			return st, fmt.Errorf("it was made with a TPM, and the file is one without: %w", errs.Untrusted)
		}
		return st, nil
	}
	have, err := readCounter(f.tpm, key)
	if err != nil {
		return st, err
	}
	if have+1 == st.Counter {
		if err := incrementCounter(f.tpm, key); err != nil {
			return st, err
		}
		if have, err = readCounter(f.tpm, key); err != nil {
			return st, err
		}
	}
	switch {
	case have > st.Counter:
		return st, fmt.Errorf("the TPM has counted to %d and the file was written at %d: an older copy was put back: %w", have, st.Counter, errs.Untrusted)
	case have < st.Counter:
		return st, fmt.Errorf("the TPM has counted to %d and the file was written at %d: it is another TPM, or it was reset: %w", have, st.Counter, errs.Untrusted)
	}
	return st, nil
}

// read gives the key and the state, verified by it.
func (f *fileFloor) read() (key []byte, st floorState, err error) {
	key, kerr := readBounded(filepath.Join(f.dir, floorKey), maxFloorFile)
	b, ferr := readBounded(filepath.Join(f.dir, floorFile), maxFloorFile)
	switch {
	case errors.Is(kerr, errs.NotFound) && errors.Is(ferr, errs.NotFound):
		return nil, st, fmt.Errorf("there is none: %w", errs.NotFound)
	case errors.Is(kerr, errs.NotFound) || errors.Is(ferr, errs.NotFound):
		// Not errs.NotFound: that would look like a first start.
		return nil, st, fmt.Errorf("half of it is gone: %w", errs.Untrusted)
	case kerr != nil || ferr != nil:
		return nil, st, errors.Join(kerr, ferr)
	case len(key) != sha256.Size:
		return nil, st, fmt.Errorf("a key of %d bytes: %w", len(key), errs.Untrusted)
	}
	st, err = parseFloor(b, key)
	return key, st, err
}

func (f *fileFloor) write(key []byte, st floorState) error {
	body, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	b := append(body, '\n')
	b = append(hex.AppendEncode(b, floorMAC(key, body)), '\n')
	return WriteFile(filepath.Join(f.dir, floorFile), b, 0o600)
}

func floorMAC(key, body []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("ringwall epoch floor\n"))
	m.Write(body)
	return m.Sum(nil)
}

// parseFloor reads the floor's file. It looks at nothing before the seal holds.
func parseFloor(b, key []byte) (st floorState, err error) {
	body, rest, ok := bytes.Cut(b, []byte("\n"))
	mac := make([]byte, sha256.Size)
	if !ok || len(rest) != 2*sha256.Size+1 || rest[len(rest)-1] != '\n' {
		return st, fmt.Errorf("the file is cut or longer: %w", errs.Untrusted)
	}
	if _, err := hex.Decode(mac, rest[:len(rest)-1]); err != nil || !hmac.Equal(mac, floorMAC(key, body)) {
		return st, fmt.Errorf("the file's seal does not hold: %w", errs.Untrusted)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&st); err != nil {
		return st, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) || st.Version != 1 || st.Kind != floorLocal && st.Kind != floorTPM || (st.Kind == floorTPM) != (st.Counter != 0) {
		return st, fmt.Errorf("version %d, kind %q: %w", st.Version, st.Kind, errs.Invalid)
	}
	return st, nil
}

// lockedDir keeps goroutines and processes apart, also while they use the TPM.
// The lock ends with the process. One that is held for long is errs.Conflict.
func lockedDir(dir string, fn func() error) error {
	d, err := os.Open(dir)
	if err != nil {
		return kindOf(err)
	}
	defer d.Close()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for end := time.Now().Add(floorLockWait); ; <-again.C {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return fmt.Errorf("lock %s: %w: %w", dir, err, errs.Conflict)
		}
	}
}
