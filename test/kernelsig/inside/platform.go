package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/kernelsig"
)

// efivarfs and the variable db.
const (
	efivars = "/sys/firmware/efi/efivars"
	db      = efivars + "/db-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
)

// enrol writes a certificate into the firmware's db, which in setup mode it
// lets anyone do: EFI_VARIABLE_AUTHENTICATION_2 without a signature that
// counts, then the list (made outside).
func enrol() error {
	if err := mount("efivarfs", efivars, "efivarfs", 0); err != nil {
		return err
	}
	b, err := os.ReadFile("/test/db.auth")
	if err != nil {
		return err
	}
	// non-volatile, for boot and run time, time-based authenticated
	if err := os.WriteFile(db, append([]byte{0x27, 0, 0, 0}, b...), 0o644); err != nil {
		return fmt.Errorf("write db: %w", err)
	}
	fmt.Println("ok the firmware took db")
	return nil
}

// platform: the key is on the keyring .platform, where the kernel puts the
// firmware's db.
func platform() error {
	b, err := os.ReadFile("/proc/keys")
	if err != nil {
		return err
	}
	p, err := load("rsa")
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), p.cert.Subject.CommonName) {
		return fmt.Errorf("the kernel did not take the key from db:\n%s", b)
	}
	v, err := volume(goodDevice)
	if err != nil {
		return err
	}
	good, err := kernelsig.RootHashSignature(p.key, p.cert, v.Root)
	if err != nil {
		return err
	}
	wrong := v.Root
	wrong[0] ^= 1
	other, err := kernelsig.RootHashSignature(p.key, p.cert, wrong)
	if err != nil {
		return err
	}
	key, err := signature(other)
	if err != nil {
		return err
	}
	_, err = open("signed", goodDevice, v, v.Root, key)
	expect("root hash, enrolled key, another root", err, unix.EKEYREJECTED, unix.EBADMSG, unix.EINVAL)
	if key, err = signature(good); err != nil {
		return err
	}
	device, err := open("signed", goodDevice, v, v.Root, key)
	expect("root hash, enrolled key", err)
	if err != nil {
		return nil
	}
	if err := mount(device, "/mnt/signed", string(v.Format), unix.MS_RDONLY); err != nil {
		return err
	}
	expect("run from the signed volume", start("/mnt/signed/bin/hello", nil))
	if err := mount("tmpfs", "/mnt/tmpfs", "tmpfs", 0); err != nil {
		return err
	}
	if err := program("/mnt/tmpfs/hello", "x"); err != nil {
		return err
	}
	for _, c := range []struct {
		name  string
		rules kernelsig.IPERules
		runs  bool
	}{
		{"by root hash", kernelsig.IPERules{Volumes: [][32]byte{v.Root}}, true},
		{"by signature", kernelsig.IPERules{SignedVolumes: true}, true},
		{"another root", kernelsig.IPERules{Volumes: [][32]byte{wrong}}, false},
	} {
		c.rules.Name, c.rules.BootVerified = "p"+strings.ReplaceAll(c.name, " ", "-"), true
		c.rules.Version = [3]uint16{1, 2, 3}
		if err := tryIPE(p, c.name, c.rules, c.runs); err != nil {
			return err
		}
	}
	return nil
}

// tryIPE loads and activates a policy and runs the program on the signed
// volume, one elsewhere and one of the initramfs.
func tryIPE(p pair, name string, rules kernelsig.IPERules, runs bool) error {
	text, err := rules.Text()
	if err != nil {
		return err
	}
	b, err := kernelsig.IPEPolicy(p.key, p.cert, text)
	if err != nil {
		return err
	}
	err = os.WriteFile(ipeDir+"new_policy", b, 0)
	expect("IPE policy "+name+", enrolled key", err)
	if err != nil {
		return nil
	}
	if err := os.WriteFile(ipeDir+"policies/"+rules.Name+"/active", []byte("1"), 0); err != nil {
		return fmt.Errorf("activate: %w", err)
	}
	if err := os.WriteFile(ipeDir+"enforce", []byte("1"), 0); err != nil {
		return err
	}
	time.Sleep(100 * time.Millisecond)
	var want []error
	if !runs {
		want = []error{unix.EACCES}
	}
	expect("IPE "+name+": run from the volume", start("/mnt/signed/bin/hello", nil), want...)
	expect("IPE "+name+": run from elsewhere", start("/mnt/tmpfs/hello", nil), unix.EACCES)
	expect("IPE "+name+": run from the initramfs", start("/test/hello", nil))
	return os.WriteFile(ipeDir+"enforce", []byte("0"), 0)
}
