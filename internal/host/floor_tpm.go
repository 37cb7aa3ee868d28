package host

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"ringwall/internal/errs"
)

// counterIndex is the NV index of the floor's counter, in the range that the
// owner may use (TCG Registry of Reserved TPM 2.0 Handles and Localities):
// 0x018 and "RW".
//
// It is a counter: the TPM itself knows no way to lower it, and one that is
// removed and defined again starts above every value that a counter of this TPM
// ever had (TPM 2.0 Library, part 3, TPM2_NV_Increment), so that no older file
// fits again. Reading and incrementing take a password that only the floor's key
// gives, by HMAC: a TPM that answers without knowing it is found out, and root
// without the key can neither read nor move the counter. Whoever has the owner
// password, which is empty on most machines, can remove the index: that shows
// as an error, not as a lower floor.
const counterIndex tpm2.TPMHandle = 0x01805257

func counterPublic(written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: counterIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
		Attributes: tpm2.TPMANV{AuthWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter, Written: written},
	}
}

// counterHandle names the index by the public area that it must have, not by
// the one that it says it has: another one's answers do not verify.
func counterHandle(key []byte, written bool) (tpm2.AuthHandle, tpm2.NamedHandle, error) {
	pub := counterPublic(written)
	name, err := tpm2.NVName(&pub)
	if err != nil {
		return tpm2.AuthHandle{}, tpm2.NamedHandle{}, fmt.Errorf("name of the NV index: %w", err)
	}
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(counterAuth(key)))
	return tpm2.AuthHandle{Handle: counterIndex, Name: *name, Auth: auth}, tpm2.NamedHandle{Handle: counterIndex, Name: *name}, nil
}

// counterAuth is the counter's password: 192 bits in 32 characters, as many as
// the index takes. Text, because go-tpm 0.9.8 cuts a password at a zero byte.
func counterAuth(key []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("ringwall TPM counter\n"))
	return base64.RawStdEncoding.AppendEncode(nil, m.Sum(nil)[:24])
}

func ownerHandle(auth []byte) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(auth))}
}

// openTPM opens a device, or the socket of an emulator.
func openTPM(path string) (transport.TPMCloser, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open TPM: %w", kindOf(err))
	}
	open := linuxtpm.Open
	if fi.Mode()&fs.ModeSocket != 0 {
		open = linuxudstpm.Open
	}
	t, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("open TPM %s: %w", path, kindOf(err))
	}
	return t, nil
}

func withTPM(path string, fn func(transport.TPM) error) error {
	t, err := openTPM(path)
	if err != nil {
		// A TPM that is gone must not look like a floor that never was.
		if errors.Is(err, errs.NotFound) {
			return fmt.Errorf("the TPM at %s is gone: %w", path, errs.Untrusted)
		}
		return err
	}
	defer t.Close()
	if err := fn(t); err != nil {
		return fmt.Errorf("TPM %s: %w", path, err)
	}
	return nil
}

// defineCounter makes the counter and gives its first value. errs.Conflict: the
// TPM has one already; errs.Denied: the owner password is another.
func defineCounter(path string, ownerAuth, key []byte) (n uint64, err error) {
	err = withTPM(path, func(t transport.TPM) error {
		def := tpm2.NVDefineSpace{
			AuthHandle: ownerHandle(ownerAuth), Auth: tpm2.TPM2BAuth{Buffer: counterAuth(key)},
			PublicInfo: tpm2.New2B(counterPublic(false)),
		}
		switch _, err := def.Execute(t); {
		case errors.Is(err, tpm2.TPMRCNVDefined):
			return fmt.Errorf("it holds a floor's counter already: %w", errs.Conflict)
		case authRefused(err):
			return fmt.Errorf("owner password: %w: %w", err, errs.Denied)
		case err != nil:
			return fmt.Errorf("define the counter: %w", err)
		}
		err := increment(t, key, false)
		if err == nil {
			n, err = counter(t, key)
		}
		if err != nil {
			return errors.Join(err, undefine(t, ownerAuth))
		}
		return nil
	})
	return n, err
}

func undefineCounter(path string, ownerAuth []byte) error {
	return withTPM(path, func(t transport.TPM) error { return undefine(t, ownerAuth) })
}

func undefine(t transport.TPM, ownerAuth []byte) error {
	pub, err := tpm2.NVReadPublic{NVIndex: counterIndex}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return fmt.Errorf("no counter: %w", errs.NotFound)
	}
	if err != nil {
		return fmt.Errorf("look at the counter: %w", err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: ownerHandle(ownerAuth), NVIndex: tpm2.NamedHandle{Handle: counterIndex, Name: pub.NVName},
	}.Execute(t)
	if authRefused(err) {
		return fmt.Errorf("owner password: %w: %w", err, errs.Denied)
	}
	if err != nil {
		return fmt.Errorf("remove the counter: %w", err)
	}
	return nil
}

func readCounter(path string, key []byte) (n uint64, err error) {
	err = withTPM(path, func(t transport.TPM) error {
		n, err = counter(t, key)
		return err
	})
	return n, err
}

func incrementCounter(path string, key []byte) error {
	return withTPM(path, func(t transport.TPM) error { return increment(t, key, true) })
}

func counter(t transport.TPM, key []byte) (uint64, error) {
	auth, index, err := counterHandle(key, true)
	if err != nil {
		return 0, err
	}
	r, err := tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: 8}.Execute(t)
	if err != nil {
		return 0, counterError("read", err)
	}
	if len(r.Data.Buffer) != 8 {
		return 0, fmt.Errorf("a counter of %d bytes: %w", len(r.Data.Buffer), errs.Untrusted)
	}
	return binary.BigEndian.Uint64(r.Data.Buffer), nil
}

func increment(t transport.TPM, key []byte, written bool) error {
	auth, index, err := counterHandle(key, written)
	if err != nil {
		return err
	}
	if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}).Execute(t); err != nil {
		return counterError("increment", err)
	}
	return nil
}

// counterError tells an index that is gone or another from a TPM that fails.
func counterError(what string, err error) error {
	switch {
	case errors.Is(err, tpm2.TPMRCHandle):
		return fmt.Errorf("%s the counter: it is gone: the TPM was cleared, or its owner removed it: %w", what, errs.Untrusted)
	case authRefused(err), errors.Is(err, tpm2.TPMRCNVUninitialized):
		return fmt.Errorf("%s the counter: it is not the one of this floor: %w: %w", what, err, errs.Untrusted)
	}
	return fmt.Errorf("%s the counter: %w", what, err)
}

func authRefused(err error) bool {
	return errors.Is(err, tpm2.TPMRCAuthFail) || errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCNVAuthorization)
}
