package enforce

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// fuseServer answers for a file system with one program in it, "prog", as the
// kernel asks (linux/fuse.h), until the mount goes away.
func fuseServer(dev *os.File, content []byte) {
	le := binary.LittleEndian
	attr := func(node uint64) []byte {
		b := make([]byte, 88)
		le.PutUint64(b[0:], node)
		le.PutUint32(b[64:], 2)
		mode := uint32(unix.S_IFDIR | 0o755)
		if node == 2 {
			mode = unix.S_IFREG | 0o755
			le.PutUint64(b[8:], uint64(len(content)))
		}
		le.PutUint32(b[60:], mode)
		return b
	}
	in := make([]byte, 1<<17)
	for {
		n, err := dev.Read(in)
		if err != nil || n < 40 {
			return
		}
		op, unique, node, body := le.Uint32(in[4:]), le.Uint64(in[8:]), le.Uint64(in[16:]), in[40:n]
		var out []byte
		code := int32(0)
		switch op {
		case 26: // INIT
			out = make([]byte, 64)
			le.PutUint32(out[0:], 7)
			le.PutUint32(out[4:], 31)
			le.PutUint32(out[20:], 1<<16) // max_write
		case 1: // LOOKUP
			if string(body[:len(body)-1]) != "prog" {
				code = -int32(unix.ENOENT)
				break
			}
			out = slices.Concat(le.AppendUint64(nil, 2), make([]byte, 32), attr(2))
		case 3: // GETATTR
			out = append(make([]byte, 16), attr(node)...)
		case 14, 27: // OPEN, OPENDIR
			out = make([]byte, 16)
		case 15: // READ
			at, size := le.Uint64(body[8:]), uint64(le.Uint32(body[16:]))
			out = content[min(at, uint64(len(content))):min(at+size, uint64(len(content)))]
		case 17: // STATFS: overlayfs wants the length of names
			out = make([]byte, 80)
			le.PutUint32(out[40:], 4096)
			le.PutUint32(out[44:], 255)
		case 22, 23: // GETXATTR, LISTXATTR
			code = -int32(unix.EOPNOTSUPP)
		case 2, 42: // FORGET, BATCH_FORGET: no answer
			continue
		case 18, 25, 29: // RELEASE, FLUSH, RELEASEDIR
		default:
			code = -int32(unix.ENOSYS)
		}
		answer := le.AppendUint32(nil, uint32(16+len(out)))
		answer = le.AppendUint64(le.AppendUint32(answer, uint32(code)), unique)
		if _, err := dev.Write(append(answer, out...)); err != nil {
			return
		}
	}
}

// A server can answer each read differently: nothing on FUSE has an identity,
// nor has an overlay over it.
func TestIdentity_fuse(t *testing.T) {
	l := newLab(t)
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no FUSE here: %v", err)
	}
	// in a process of its own: starting a program blocks part of this one
	server := exec.Command("/proc/self/exe")
	server.Env = append(os.Environ(), "ENFORCE_TEST_ROLE=fuse")
	server.ExtraFiles = []*os.File{dev}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
		_ = dev.Close()
	})
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", dev.Fd())
	fuse := l.mount("fuse", "fuse", "fuse", 0, data)
	l.dirs("upper", "work")
	over := l.mount("o", "over", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", fuse, l.dir, l.dir))
	if b := l.read(over + "/prog"); string(b) != string(canaryProgram("amd64", canaryMark)) {
		t.Fatal("the overlay does not show the file")
	}
	for _, path := range []string{fuse + "/prog", over + "/prog"} {
		l.drain()
		if err := l.run(path); !refused(err) {
			t.Errorf("%s ran", path)
		}
		l.event(NoIdentity)
	}
}
