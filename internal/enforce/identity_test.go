package enforce

import (
	"bytes"
	"compress/gzip"
	_ "embed"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"ringwall/internal/integrity"
)

// volumeImage is a small ext4 file system followed by its dm-verity hash tree:
//
//	mke2fs -t ext4 -O ^has_journal,^resize_inode -b 4096 -m 0 -N 16 -d DIR volume.img 256k
//	truncate -s 512k volume.img
//	veritysetup format --salt=- --hash-offset=262144 --data-blocks=64 volume.img volume.img
//
// DIR holds canaryProgram("amd64", canaryMark) as "listed" and
// canaryProgram("amd64", "volume") as "volume".
//
//go:embed testdata/volume.img.gz
var volumeImage []byte

const volumeRoot = "7fa54402dedd12b4012fbfcde94d61ad74f10c42b4654dbf74727c024dc03b19"

// loopDevice attaches the volume to a loop device.
func (l *lab) loopDevice() string {
	l.t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(volumeImage))
	if err != nil {
		l.t.Fatal(err)
	}
	image, err := io.ReadAll(z)
	if err != nil {
		l.t.Fatal(err)
	}
	backing, err := os.OpenFile(l.file("volume.img", image), os.O_RDWR, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		l.t.Skipf("SKIPPED, NOT TESTED: no loop devices: %v", err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		l.t.Fatal(err)
	}
	name := fmt.Sprintf("/dev/loop%d", n)
	dev, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		_ = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)
		_ = dev.Close()
	})
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_FD, int(backing.Fd())); err != nil {
		l.t.Fatal(err)
	}
	return name
}

func (l *lab) mount(source, name, kind string, flags uintptr, data string) string {
	l.t.Helper()
	dir := l.dir + "/" + name
	if err := os.Mkdir(dir, 0o755); err != nil {
		l.t.Fatal(err)
	}
	if err := unix.Mount(source, dir, kind, flags, data); err != nil {
		l.t.Fatalf("mount %s: %v", kind, err)
	}
	l.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func (l *lab) dirs(names ...string) {
	l.t.Helper()
	for _, n := range names {
		if err := os.MkdirAll(l.dir+"/"+n, 0o755); err != nil {
			l.t.Fatal(err)
		}
	}
}

// Where content can change from below, a listed digest does not help.
func TestIdentity_exposed(t *testing.T) {
	l := newLab(t)
	loop := l.mount(l.loopDevice(), "loop", "ext4", unix.MS_RDONLY, "")
	l.dirs("upper", "work", "lower", "upper2", "work2")
	onTmpfs := l.mount("o", "over-tmpfs", "overlay", 0, fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", l.dir, l.dir, l.dir))
	onLoop := l.mount("o", "over-loop", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper2,workdir=%s/work2", loop, l.dir, l.dir))
	listed := canaryProgram("amd64", canaryMark)
	below := l.file("lower/below", listed)
	if err := os.WriteFile(onTmpfs+"/above", listed, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, works := range map[string]bool{
		loop + "/listed": false, onLoop + "/listed": false, onTmpfs + "/below": true, onTmpfs + "/above": true, below: true,
	} {
		l.drain()
		if err := l.run(path); (err == nil) != works {
			t.Errorf("%s: %v, want works=%v", path, err, works)
			l.logEvents()
		}
		if !works {
			l.event(NoIdentity)
		}
	}
	// the layer's file changes under the overlay
	if err := os.WriteFile(below, append(listed, "changed"...), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.run(onTmpfs + "/below"); err == nil {
		t.Error("a changed layer ran through the overlay")
	}
}

// dm makes one device-mapper call, see linux/dm-ioctl.h.
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
	_, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0xc138fd00|call, uintptr(unsafe.Pointer(&b[0])))
	if e != 0 {
		return 0, fmt.Errorf("device mapper call %d: %w", call, e)
	}
	return le.Uint64(b[40:]), nil
}

// verityDevice activates the volume and returns its device number.
func verityDevice(loop string) (uint64, error) {
	const create, resume, load = 3, 6, 9
	if _, err := dm(create, "rwtest", 0, nil); err != nil {
		return 0, err
	}
	table := fmt.Sprintf("1 %s %s 4096 4096 64 65 sha256 %s -\x00", loop, loop, volumeRoot)
	target := make([]byte, 40, 40+len(table))
	binary.LittleEndian.PutUint64(target[8:], 512)
	copy(target[24:], "verity")
	if _, err := dm(load, "rwtest", 1, append(target, table...)); err != nil {
		return 0, err
	}
	return dm(resume, "rwtest", 0, nil)
}

func removeVerity() error {
	const remove = 4
	_, err := dm(remove, "rwtest", 0, nil)
	return err
}

func TestIdentity_dmVerity(t *testing.T) {
	l := newLab(t)
	root, err := integrity.ParseDigest(volumeRoot)
	if err != nil {
		t.Fatal(err)
	}
	loop := l.loopDevice()
	dev, err := verityDevice(loop)
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no dm-verity here: %v", err)
	}
	t.Cleanup(func() { _ = removeVerity() })
	volume := l.mount(fmt.Sprintf("/dev/dm-%d", unix.Minor(dev)), "verity", "ext4", unix.MS_RDONLY, "")
	_, kernelTells := l.e.links["rw_bdev_root"]
	if !kernelTells {
		if err := l.e.TrustVolume(dev, root); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.run(volume + "/volume"); err == nil {
		t.Error("ran although its root is not listed")
	}
	key := integrity.Key{Space: integrity.SpaceDMVerity, Digest: root}
	l.table.Entries[key] = integrity.Entry{Kinds: integrity.SetOf(integrity.KindExec, integrity.KindLibrary)}
	l.apply()
	if err := l.run(volume + "/volume"); err != nil {
		t.Errorf("does not run although its root is listed: %v", err)
		l.logEvents()
	}
	// what the policy knows of the content holds there, too: it is an interpreter
	known := l.allow(canaryProgram("amd64", "volume"), 0, 1)
	l.table.Interpreters = []integrity.Interpreter{pythonRule()}
	l.apply()
	if err := l.run(volume+"/volume", "-c", "code"); err == nil {
		t.Error("an interpreter on a trusted volume was given inline code")
	}
	delete(l.table.Entries, integrity.Key{Digest: known})
	l.table.Interpreters = nil
	l.apply()
	// deny beats allow: one file of the volume is banned
	banned := l.allow(canaryProgram("amd64", "volume"), 0, 0)
	l.table.Entries[integrity.Key{Digest: banned}] = integrity.Entry{}
	l.apply()
	if err := l.run(volume + "/volume"); err == nil {
		t.Error("banned content ran from a trusted volume")
	}
	delete(l.table.Entries, integrity.Key{Digest: banned})
	l.apply()
	if err := unix.Unmount(volume, 0); err != nil {
		t.Fatal(err)
	}
	if err := removeVerity(); err != nil {
		t.Fatal(err)
	}
	if !kernelTells {
		if err := l.e.ForgetVolume(dev); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 { // freed after the last user and a grace period
		var k engineKey
		if err = l.e.objs.VerityDevices.Lookup(kernelDev(dev), &k); err != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("the device is still trusted after it is gone")
}
