package host

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

const (
	maxPythonSource   = 16 << 20
	maxPythonBytecode = maxPythonCode + pycHeader
	pycHeader         = 16
	cacheDir          = "__pycache__"
)

// Stamp tells whether a file is still the one that it was, with the content
// that it had: who writes to it changes one of these.
type Stamp struct {
	Dev, Ino     uint64
	Size         int64
	Mtime, Ctime int64 // nanoseconds
}

func stampOf(st *unix.Stat_t) Stamp {
	return Stamp{st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}
}

// StampOf looks at a name, without following a link at its end; errs.NotFound
// if there is no regular file.
func StampOf(name string) (Stamp, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return Stamp{}, fmt.Errorf("look at %s: %w", name, kindOf(err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return Stamp{}, fmt.Errorf("look at %s: no regular file: %w", name, errs.NotFound)
	}
	return stampOf(&st), nil
}

// openPlain opens an absolute path that no symbolic link is part of. It goes step
// by step: the service manager's RestrictSUIDSGID= takes openat2(2) away.
func openPlain(name string, flags int) (*os.File, error) {
	fail := func(err error) (*os.File, error) { return nil, &os.PathError{Op: "open", Path: name, Err: err} }
	if !filepath.IsAbs(name) || filepath.Clean(name) != name || name == "/" {
		return fail(errs.Invalid)
	}
	at, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	steps := strings.Split(name[1:], "/")
	for i, step := range steps {
		how := unix.O_PATH | unix.O_DIRECTORY
		if i == len(steps)-1 {
			how = flags | unix.O_NONBLOCK
		}
		next, err := unix.Openat(at, step, how|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		_ = unix.Close(at)
		if err != nil {
			return fail(err)
		}
		at = next
	}
	return os.NewFile(uintptr(at), name), nil
}

// ReadPlain reads a regular file of at most limit bytes whose path has no
// symbolic link in it, and says which file that was.
func ReadPlain(name string, limit int64) ([]byte, Stamp, error) {
	f, err := openPlain(name, unix.O_RDONLY)
	if err != nil {
		return nil, Stamp{}, kindOf(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, Stamp{}, fmt.Errorf("read %s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, Stamp{}, fmt.Errorf("read %s: no regular file: %w", name, errs.Invalid)
	}
	b, err := readAllBounded(f, name, limit)
	return b, stampOf(&st), err
}

// PythonSource is a source as it was read: only these bytes are ever compiled.
type PythonSource struct {
	Path   string
	Text   []byte
	Digest [sha256.Size]byte
	Stamp  Stamp
}

// ReadPython reads a source.
func ReadPython(path string) (*PythonSource, error) {
	b, st, err := ReadPlain(path, maxPythonSource)
	if err != nil {
		return nil, err
	}
	return &PythonSource{path, b, sha256.Sum256(b), st}, nil
}

// Changed reports whether the source is another one now.
func (s *PythonSource) Changed() bool {
	now, err := StampOf(s.Path)
	return err != nil || now != s.Stamp
}

// BytecodePath is where Python looks for the byte code of a source first, see
// PEP 3147; "" for a name that is no module's.
func BytecodePath(source, tag string) string {
	stem, ok := strings.CutSuffix(filepath.Base(source), ".py")
	if !ok || stem == "" {
		return ""
	}
	return filepath.Join(filepath.Dir(source), cacheDir, stem+"."+tag+".pyc")
}

// Bytecode makes the file for a source and its marshalled code: the magic
// number, flags of zero, and the time and size of the source, by which Python
// knows that the source is still the same (PEP 552, as py_compile makes it).
func Bytecode(magic [4]byte, s *PythonSource, code []byte) []byte {
	out := make([]byte, 0, pycHeader+len(code))
	out = append(out, magic[:]...)
	out = binary.LittleEndian.AppendUint32(out, 0)
	out = binary.LittleEndian.AppendUint32(out, uint32(s.Stamp.Mtime/1e9)) //nolint:gosec // Python cuts both to 32 bits
	out = binary.LittleEndian.AppendUint32(out, uint32(len(s.Text)))       //nolint:gosec // as above
	return append(out, code...)
}

// WriteBytecode has a file hold data, readable by everyone and owned by root,
// and says which file that is: one that holds it already is kept, another one is
// replaced in one step. It writes only into a directory that root alone can
// change, named without a symbolic link, and gives nobody else a moment to open
// the new file for writing. It does not wait for the disk: what a crash leaves
// behind has another content, and is then made again.
func WriteBytecode(name string, data []byte) (Stamp, error) {
	st, err := writeBytecode(name, data)
	if err != nil {
		return st, fmt.Errorf("write %s: %w", name, err)
	}
	return st, nil
}

func writeBytecode(name string, data []byte) (Stamp, error) {
	dir, err := openPlain(filepath.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return Stamp{}, kindOf(err)
	}
	defer dir.Close()
	at, base := int(dir.Fd()), filepath.Base(name)
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return Stamp{}, err
	}
	if st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0 { //nolint:gosec // a user id
		return Stamp{}, fmt.Errorf("others than root can write to its directory: %w", errs.Denied)
	}
	if have, kept, err := ReadPlain(name, maxPythonBytecode); err == nil && bytes.Equal(have, data) {
		return kept, nil
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	tmp := "." + base + ".tmp-" + hex.EncodeToString(id[:])
	fd, err := unix.Openat(at, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return Stamp{}, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := fillBytecode(f, data); err != nil {
		_ = unix.Unlinkat(at, tmp, 0)
		return Stamp{}, err
	}
	if err := unix.Renameat(at, tmp, at, base); err != nil {
		_ = unix.Unlinkat(at, tmp, 0)
		return Stamp{}, err
	}
	// after the rename, which changes ctime on some file systems
	if err := unix.Fstat(fd, &st); err != nil {
		return Stamp{}, err
	}
	return stampOf(&st), nil
}

func fillBytecode(f *os.File, data []byte) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Chmod(0o644)
}
