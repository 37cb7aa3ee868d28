package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/image"
	"ringwall/internal/kernelsig"
)

// The images.
const (
	goodDevice  = "/dev/vdd" // the one that the policy names
	badDevice   = "/dev/vde" // with a flipped bit in each block of the program
	otherDevice = "/dev/vdf" // another one
)

// dm makes one device-mapper call (linux/dm-ioctl.h).
func dm(call uintptr, name string, flags uint32, payload []byte) (uint64, error) {
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 312+len(payload))
	le := binary.LittleEndian
	le.PutUint32(b[0:], 4)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], 312)
	if payload != nil {
		le.PutUint32(b[20:], 1)
	}
	le.PutUint32(b[28:], flags)
	copy(b[48:], name)
	copy(b[312:], payload)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0xc138fd00|call, uintptr(unsafe.Pointer(&b[0]))); e != 0 {
		return 0, e
	}
	return le.Uint64(b[40:]), nil
}

// open activates a volume; sig is the description of a key with a signature of
// the root, or empty.
func open(name, device string, v *image.Volume, root [32]byte, sig string) (string, error) {
	const create, resume, load = 3, 6, 9
	if _, err := dm(create, name, 0, nil); err != nil {
		return "", fmt.Errorf("create: %w", err)
	}
	salt := hex.EncodeToString(v.Salt)
	if salt == "" {
		salt = "-"
	}
	table := fmt.Sprintf("1 %s %s 4096 4096 %d %d sha256 %x %s", device, device, v.DataBlocks, v.DataBlocks+1, root, salt)
	if sig != "" {
		table += " 2 root_hash_sig_key_desc " + sig
	}
	target := make([]byte, 40, 40+len(table)+1)
	binary.LittleEndian.PutUint64(target[8:], v.DataBlocks*8)
	copy(target[24:], "verity")
	if _, err := dm(load, name, 1, append(append(target, table...), 0)); err != nil {
		shut(name)
		return "", fmt.Errorf("load table: %w", err)
	}
	dev, err := dm(resume, name, 0, nil)
	if err != nil {
		shut(name)
		return "", fmt.Errorf("resume: %w", err)
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(dev)), nil
}

func shut(name string) {
	const remove = 4
	if _, err := dm(remove, name, 0, nil); err != nil {
		fmt.Printf("note remove %s: %v\n", name, err)
	}
}

func volume(device string) (*image.Volume, error) {
	// Open wants a regular file
	b, err := os.ReadFile(device)
	if err != nil {
		return nil, err
	}
	f := "/tmp/" + strings.ReplaceAll(device, "/", "-")
	if err := os.WriteFile(f, b, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(f)
	return image.Open(f)
}

// volumes: an agent with a policy that allows the root of one image and nothing
// else, for a cgroup.
func volumes() error {
	cgroup := "/sys/fs/cgroup/trial"
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		return err
	}
	group, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer group.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var said bytes.Buffer
	agent := exec.CommandContext(ctx, "/test/ringwall", "agent", "--state", "/test/state", "--run", "/run/ringwall")
	agent.Stdout, agent.Stderr = &said, &said
	if err := agent.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	for up := false; !up; {
		select {
		case err := <-ended:
			return fmt.Errorf("the agent ended: %w\n%s", err, said.String())
		case <-time.After(time.Second):
			up = exec.Command("/test/ringwall", "status", "--run", "/run/ringwall", "--state", "/test/state").Run() == nil
		}
	}
	refused := []error{unix.EPERM, unix.EACCES}
	if err := program("/tmp/x/hello", "not listed"); err != nil {
		return err
	}
	expect("image: an unlisted program", start("/tmp/x/hello", group), refused...)

	good, err := volume(goodDevice)
	if err != nil {
		return err
	}
	other, err := volume(otherDevice)
	if err != nil {
		return err
	}
	if err := runFrom(goodDevice, "good", good, good.Root, group, nil); err != nil {
		return err
	}
	if err := runFrom(otherDevice, "other", other, other.Root, group, refused); err != nil {
		return err
	}
	// the right root, and data that is not under it
	if err := runFrom(badDevice, "bad", good, good.Root, group, []error{unix.EIO, unix.ENOEXEC, unix.EFAULT, errKilled}); err != nil {
		return err
	}
	d, err := open("mixed", otherDevice, other, good.Root, "")
	if err != nil {
		return err
	}
	defer shut("mixed")
	if err = mount(d, "/mnt/mixed", string(other.Format), unix.MS_RDONLY); err == nil {
		err = start("/mnt/mixed/bin/hello", group)
	}
	expect("image: another image under the good one's root", err, unix.EIO, unix.EINVAL)
	return nil
}

// errKilled: a signal ended the program, as one does that hits a block that
// cannot be read.
var errKilled = errors.New("killed")

// runFrom opens and mounts an image, runs the program from it, and closes it.
func runFrom(device, name string, v *image.Volume, root [32]byte, group *os.File, want []error) error {
	d, err := open(name, device, v, root, "")
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer shut(name)
	dir := "/mnt/" + name
	if err := mount(d, dir, string(v.Format), unix.MS_RDONLY); err != nil {
		return err
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	// Linux 6.1 does not say which root a volume has; the agent looks every 20
	// seconds, and until then a device number stands for what it was before.
	begun, patience := time.Now(), time.Duration(0)
	if os.Getenv("RINGWALL_GUEST") == "6.1" {
		patience = 45 * time.Second
	}
	for {
		err = start(dir+"/bin/hello", group)
		var exit *exec.ExitError
		if errors.As(err, &exit) && !exit.Exited() {
			err = fmt.Errorf("%w: %w", errKilled, err)
		}
		if (err == nil) == (want == nil) || time.Since(begun) > patience {
			break
		}
		time.Sleep(time.Second)
	}
	if d := time.Since(begun); d > 2*time.Second {
		fmt.Printf("note image: the agent noticed the %s volume after %v\n", name, d.Round(time.Second))
	}
	expect("image: run from the "+name+" one", err, want...)
	if want == nil {
		b, err := os.ReadFile(dir + "/bin/hello")
		if err == nil {
			err = errors.Join(os.MkdirAll("/tmp/copy", 0o755), os.WriteFile("/tmp/copy/hello", b, 0o755))
		}
		if err != nil {
			return err
		}
		expect("image: a copy of its program elsewhere", start("/tmp/copy/hello", group), unix.EPERM, unix.EACCES)
	}
	return nil
}

// signature puts a signature where dm-verity looks for it.
func signature(b []byte) (string, error) {
	const name = "ringwall-test"
	_, err := unix.AddKey("user", name, b, unix.KEY_SPEC_USER_KEYRING)
	return name, err
}

// rootHash: a signature by a key that is in no trusted keyring.
func rootHash() error {
	v, err := volume(goodDevice)
	if err != nil {
		return err
	}
	for _, name := range []string{"rsa", "p256"} {
		p, err := load(name)
		if err != nil {
			return err
		}
		b, err := kernelsig.RootHashSignature(p.key, p.cert, v.Root)
		if err != nil {
			return err
		}
		for what, c := range map[string]struct {
			sig  []byte
			want []error
		}{
			"key is not enrolled": {b, []error{unix.ENOKEY, unix.ENOPKG}},
			"cut":                 {b[:len(b)-1], []error{unix.EBADMSG}},
		} {
			key, err := signature(c.sig)
			if err != nil {
				return err
			}
			_, err = open("signed", goodDevice, v, v.Root, key)
			expect("root hash, "+name+", "+what, err, c.want...)
		}
	}
	return nil
}

const ipeDir = "/sys/kernel/security/ipe/"

// ipe: a policy by a key that is in no trusted keyring.
func ipe() error {
	if _, err := os.Stat(ipeDir); errors.Is(err, fs.ErrNotExist) {
		fmt.Println("note IPE: this kernel has none")
		return nil
	}
	p, err := load("p256")
	if err != nil {
		return err
	}
	text, err := kernelsig.IPERules{Name: "refused", BootVerified: true}.Text()
	if err != nil {
		return err
	}
	b, err := kernelsig.IPEPolicy(p.key, p.cert, text)
	if err != nil {
		return err
	}
	expect("IPE policy, key is not enrolled", os.WriteFile(ipeDir+"new_policy", b, 0), unix.ENOKEY)
	expect("IPE policy, cut", os.WriteFile(ipeDir+"new_policy", b[:len(b)-1], 0), unix.EBADMSG)
	return nil
}
