package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/codesign"
	"ringwall/internal/kernelsig"
)

// The file systems: outside they were made with these UUIDs.
const (
	verityDevice = "/dev/vda"
	imaDevice    = "/dev/vdb"
	sigv3Device  = "/dev/vdc"
	imaUUID      = "11111111-1111-4111-8111-111111111111"
	sigv3UUID    = "22222222-2222-4222-8222-222222222222"
)

// enableVerity is FS_IOC_ENABLE_VERITY: SHA-256, 4 KiB, no salt.
func enableVerity(path string, sig []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	arg := struct {
		version, algorithm, blockSize, saltSize uint32
		salt                                    uint64
		sigSize, reserved1                      uint32
		sig                                     *byte
		reserved2                               [11]uint64
	}{version: 1, algorithm: 1, blockSize: 4096, sigSize: uint32(len(sig))}
	if len(sig) > 0 {
		arg.sig = &sig[0]
	}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x40806685, uintptr(unsafe.Pointer(&arg))); e != 0 {
		return e
	}
	return nil
}

// enrolKey adds a certificate to a keyring; false: the kernel has no ECDSA.
func enrolKey(p pair, ring int) (bool, error) {
	_, err := unix.AddKey("asymmetric", "", p.cert.Raw, ring)
	if _, ec := p.key.(*ecdsa.PrivateKey); ec && (errors.Is(err, unix.ENOPKG) || errors.Is(err, unix.ENOENT)) {
		fmt.Printf("note this kernel has no ECDSA: %s is not tested\n", p.name)
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("add %s to a keyring: %w", p.name, err)
	}
	return true, nil
}

func verityDigest(b []byte) [32]byte {
	h := codesign.NewHasher()
	_, _ = h.Write(b)
	_, verity := h.Sums()
	return verity
}

// fsverity: builtin signatures with fs.verity.require_signatures=1.
func fsverity() error {
	if err := mount(verityDevice, "/mnt/verity", "ext4", 0); err != nil {
		return err
	}
	ring, err := keyring(".fs-verity")
	if err != nil {
		return err
	}
	stranger, err := load("stranger")
	if err != nil {
		return err
	}
	var known []pair
	for _, name := range []string{"rsa", "p256"} {
		p, err := load(name)
		if err != nil {
			return err
		}
		if ok, err := enrolKey(p, ring); err != nil {
			return err
		} else if !ok {
			continue
		}
		known = append(known, p)
	}
	if err := os.WriteFile("/proc/sys/fs/verity/require_signatures", []byte("1"), 0); err != nil {
		return err
	}
	n := 0
	try := func(what string, content, sig []byte, want ...error) {
		n++
		path := fmt.Sprintf("/mnt/verity/f%d", n)
		err := os.WriteFile(path, content, 0o600)
		if err == nil {
			err = enableVerity(path, sig)
		}
		if err == nil {
			var got []byte
			if got, err = os.ReadFile(path); err == nil && !bytes.Equal(got, content) {
				err = fmt.Errorf("other content")
			}
		}
		expect("fs-verity: "+what, err, want...)
	}
	content := bytes.Repeat([]byte("content "), 5000)
	for _, p := range known {
		sig, err := kernelsig.FSVeritySignature(p.key, p.cert, verityDigest(content))
		if err != nil {
			return err
		}
		try(p.name, content, sig)
		try(p.name+", other content", append(bytes.Clone(content), 1), sig, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
		bad := bytes.Clone(sig)
		bad[len(bad)-5] ^= 1
		try(p.name+", tampered", content, bad, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
		try(p.name+", cut", content, sig[:len(sig)-1], unix.EBADMSG)
		attached, err := kernelsig.SignAttached(p.key, p.cert, []byte("x"))
		if err != nil {
			return err
		}
		try(p.name+", content inside", content, attached, unix.EBADMSG, unix.EKEYREJECTED)
		wrong, err := kernelsig.RootHashSignature(p.key, p.cert, verityDigest(content))
		if err != nil {
			return err
		}
		try(p.name+", a root hash's signature", content, wrong, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
	}
	sig, err := kernelsig.FSVeritySignature(stranger.key, stranger.cert, verityDigest(content))
	if err != nil {
		return err
	}
	try("a stranger's key", content, sig, unix.ENOKEY)
	try("no signature", content, nil, unix.EPERM)
	return os.WriteFile("/proc/sys/fs/verity/require_signatures", []byte("0"), 0)
}

// appraise: IMA signatures, by content (format 2) and by fs-verity digest (format 3).
func appraise() error {
	for _, m := range [][2]string{{imaDevice, "/mnt/ima"}, {sigv3Device, "/mnt/sigv3"}} {
		if err := mount(m[0], m[1], "ext4", 0); err != nil {
			return err
		}
	}
	// Debian's kernels have no trusted keyring for IMA: any that root makes will do
	ring, err := unix.AddKey("keyring", "_ima", nil, unix.KEY_SPEC_USER_KEYRING)
	if err != nil {
		return fmt.Errorf("make _ima: %w", err)
	}
	stranger, err := load("stranger")
	if err != nil {
		return err
	}
	var known []pair
	for _, name := range []string{"rsa", "p256"} {
		p, err := load(name)
		if err != nil {
			return err
		}
		if ok, err := enrolKey(p, ring); err != nil {
			return err
		} else if !ok {
			continue
		}
		known = append(known, p)
	}
	rules := "appraise func=BPRM_CHECK fsuuid=" + imaUUID + " appraise_type=imasig\n" +
		"appraise func=BPRM_CHECK fsuuid=" + sigv3UUID + " digest_type=verity appraise_type=sigv3\n"
	if err := os.WriteFile("/sys/kernel/security/ima/policy", []byte(rules), 0); err != nil {
		return fmt.Errorf("IMA policy: %w", err)
	}
	n := 0
	try := func(what, dir string, verity bool, sign func(content []byte) ([]byte, error), want ...error) {
		n++
		path := fmt.Sprintf("%s/%d/hello", dir, n)
		err := func() error {
			if err := program(path, fmt.Sprint(n)); err != nil {
				return err
			}
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			xattr, err := sign(content)
			if err != nil {
				return err
			}
			if verity {
				if err := enableVerity(path, nil); err != nil {
					return fmt.Errorf("enable fs-verity: %w", err)
				}
			}
			if xattr != nil {
				if err := unix.Setxattr(path, "security.ima", xattr, 0); err != nil {
					return fmt.Errorf("set security.ima: %w", err)
				}
			}
			return start(path, nil)
		}()
		expect("IMA: "+what, err, want...)
	}
	for _, p := range append(known, stranger) {
		var want []error
		if p.name == "stranger" {
			want = []error{unix.EACCES}
		}
		try(p.name, "/mnt/ima", false, func(b []byte) ([]byte, error) { return kernelsig.IMASignature(p.key, p.cert, sha256.Sum256(b)) }, want...)
		try(p.name+", other content", "/mnt/ima", false, func(b []byte) ([]byte, error) {
			return kernelsig.IMASignature(p.key, p.cert, sha256.Sum256(b[1:]))
		}, unix.EACCES)
		try(p.name+", tampered", "/mnt/ima", false, func(b []byte) ([]byte, error) {
			x, err := kernelsig.IMASignature(p.key, p.cert, sha256.Sum256(b))
			x[len(x)-1] ^= 1
			return x, err
		}, unix.EACCES)
		try(p.name+", fs-verity", "/mnt/sigv3", true, func(b []byte) ([]byte, error) {
			return kernelsig.IMAVeritySignature(p.key, p.cert, verityDigest(b))
		}, want...)
		try(p.name+", fs-verity, other content", "/mnt/sigv3", true, func(b []byte) ([]byte, error) {
			return kernelsig.IMAVeritySignature(p.key, p.cert, verityDigest(b[1:]))
		}, unix.EACCES)
		try(p.name+", fs-verity, content's signature", "/mnt/sigv3", true, func(b []byte) ([]byte, error) {
			return kernelsig.IMASignature(p.key, p.cert, sha256.Sum256(b))
		}, unix.EACCES)
	}
	try("unsigned", "/mnt/ima", false, func([]byte) ([]byte, error) { return nil, nil }, unix.EACCES)
	try("a hash instead of a signature", "/mnt/ima", false, func(b []byte) ([]byte, error) {
		h := sha256.Sum256(b)
		return append([]byte{4, 4}, h[:]...), nil // IMA_XATTR_DIGEST_NG
	}, unix.EACCES)
	return nil
}

// modules: with module.sig_enforce=1 on the command line.
func modules() error {
	signed, err := os.ReadFile("/test/module.ko")
	if err != nil {
		return err
	}
	plain, _, err := kernelsig.SplitModule(signed)
	if err != nil {
		return err
	}
	image, err := os.ReadFile("/test/vmlinuz")
	if err != nil {
		return err
	}
	keys, err := kernelsig.KernelCertificates(image)
	if err != nil {
		return err
	}
	// the verifier must say of each what the kernel says
	try := func(what string, b []byte, want ...error) {
		_, verdict := kernelsig.VerifyModule(b, keys.Builtin)
		err := unix.InitModule(b, "")
		expect("module: "+what, err, want...)
		if (verdict == nil) != (err == nil) {
			fmt.Printf("FAIL module: %s: the kernel says %v, VerifyModule %v\n", what, err, verdict)
		}
		if err == nil {
			err = unix.DeleteModule("crc_itu_t", 0)
			if err != nil {
				fmt.Printf("FAIL remove module: %v\n", err)
			}
		}
	}
	try("of the distribution", signed)
	try("unsigned", plain, unix.EKEYREJECTED)
	for _, name := range []string{"rsa", "p256"} {
		p, err := load(name)
		if err != nil {
			return err
		}
		own, err := kernelsig.SignModule(p.key, p.cert, plain)
		if err != nil {
			return err
		}
		try("by a key that nobody enrolled, "+name, own, unix.ENOKEY, unix.EKEYREJECTED, unix.ENOPKG)
	}
	bad := bytes.Clone(signed)
	bad[len(bad)-200] ^= 1
	try("signature tampered with", bad, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
	bad = bytes.Clone(signed)
	bad[len(plain)/2] ^= 1
	try("content tampered with", bad, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
	return nil
}
