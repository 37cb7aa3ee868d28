package host

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

//go:embed python/compile.py
var pythonScript string

// PythonScript is the program that a PythonCompiler has the interpreter read.
// Whoever enforces what interpreters read has to authorise it.
func PythonScript() string { return pythonScript }

// Bounds of compiling.
const (
	maxPythonName = 4096
	maxPythonCode = 64 << 20
	// pythonWait is how long one source may take; the slowest of Python's own
	// library takes a second on hardware.
	pythonWait   = 3 * time.Minute
	pythonMemory = 1 << 30 // address space, in bytes
	pythonCPU    = 600     // seconds, of a process
	nobody       = 65534   // uid and gid
)

// PythonCompiler is a running interpreter that turns sources into code. It has
// no privileges, no environment and no files of its own beyond Home. It is used
// by one goroutine.
type PythonCompiler struct {
	// Magic is the number that byte code of this interpreter begins with, and
	// Tag what its files are named by, as cpython-311.
	Magic [4]byte
	Tag   string

	cmd  *exec.Cmd
	conn net.Conn
}

// PythonHome says how an interpreter is started.
type PythonHome struct {
	// Program is the interpreter, as /usr/bin/python3.11, and Digest the SHA-256
	// that the process must have: what runs is compared with it.
	Program string
	Digest  [sha256.Size]byte
	// Home is a directory that only the caller can change, with compile.py and
	// the part of the library that Python needs to start, see HomeFiles. Python
	// takes it for its installation.
	Home string
	// Cgroup, if not nil, is the cgroup v2 directory to start it in.
	Cgroup *os.File
}

// Version is the interpreter's name without its directory, as python3.11.
func (h PythonHome) Version() string { return filepath.Base(h.Program) }

// HomeFiles names the files of the interpreter's library, below a directory
// such as /usr/lib/python3.11, that it may need to start or to decode a source:
// to have them at the same places below Home/lib/python3.11 is what keeps it
// from reading any other. Older interpreters need those that newer ones have
// built in; one that does not exist is not needed.
func HomeFiles() []string {
	out := []string{"os.py", "abc.py", "codecs.py", "io.py", "stat.py", "genericpath.py", "posixpath.py", "_collections_abc.py"}
	for _, e := range []string{"__init__", "aliases", "ascii", "cp1252", "iso8859_1", "iso8859_15", "latin_1", "utf_8", "utf_8_sig"} {
		out = append(out, "encodings/"+e+".py")
	}
	return out
}

// StartPython starts an interpreter. What it then makes is what that very
// program makes: it is compared with the digest before it is told anything.
// Errors: errs.Untrusted if another program runs there.
//
// It talks by a socket and not by pipes, which other processes of root could
// open through /proc.
func StartPython(ctx context.Context, h PythonHome) (_ *PythonCompiler, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", h.Program, err)
	}
	mine, its := os.NewFile(uintptr(fds[0]), "compiler"), os.NewFile(uintptr(fds[1]), "agent")
	conn, err := net.FileConn(mine)
	_ = mine.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", h.Program, err), its.Close())
	}
	c := &PythonCompiler{conn: conn, cmd: &exec.Cmd{
		Path: h.Program, Dir: "/", Env: []string{}, Stdin: its, Stdout: its,
		// Python looks for its library from where it believes to lie. -I -S -B:
		// no environment, no user's or site's packages, no byte code written.
		Args: []string{filepath.Join(h.Home, "bin", h.Version()), "-I", "-S", "-B", filepath.Join(h.Home, "compile.py")},
		SysProcAttr: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
			Setsid:     true, // it ends when the socket does
		},
	}}
	if h.Cgroup != nil {
		c.cmd.SysProcAttr.UseCgroupFD, c.cmd.SysProcAttr.CgroupFD = true, int(h.Cgroup.Fd())
	}
	err = c.cmd.Start()
	_ = its.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", h.Program, err), conn.Close())
	}
	if err := c.greet(ctx, h); err != nil {
		c.Close()
		return nil, fmt.Errorf("start %s: %w", h.Program, err)
	}
	return c, nil
}

func (c *PythonCompiler) greet(ctx context.Context, h PythonHome) error {
	pid := c.cmd.Process.Pid
	got, err := hashOf(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return err
	}
	if got != h.Digest {
		return fmt.Errorf("it is another program (sha256 %x): %w", got, errs.Untrusted)
	}
	// It is to get in nobody's way, whatever it is given. In a container root may
	// lack the right to set limits: they are no part of what is believed.
	for what, n := range map[int]uint64{unix.RLIMIT_AS: pythonMemory, unix.RLIMIT_CPU: pythonCPU, unix.RLIMIT_FSIZE: 0, unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: 16} {
		if err := unix.Prlimit(pid, what, &unix.Rlimit{Cur: n, Max: n}, nil); err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("limit %d: %w", what, err)
		}
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, pid, 19)
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("500"), 0)
	hello, err := c.answer(ctx)
	if err != nil {
		return err
	}
	if len(hello) < 5 || len(hello) > 64 || strings.ContainsAny(string(hello[4:]), "/.\x00") {
		return fmt.Errorf("it says %q: %w", hello, errs.Invalid)
	}
	c.Magic, c.Tag = [4]byte(hello), string(hello[4:])
	return nil
}

func hashOf(name string) (d [sha256.Size]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return d, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return d, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// Compile turns the text of the source with that name into marshalled code;
// tracebacks will name it so. errs.Invalid: the text is none that this
// interpreter compiles. Any other error is of the interpreter: close it.
func (c *PythonCompiler) Compile(ctx context.Context, name string, text []byte) ([]byte, error) {
	if len(name) > maxPythonName || len(text) > maxPythonSource {
		return nil, fmt.Errorf("compile %.100s: too long: %w", name, errs.Invalid)
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name))) //nolint:gosec // bounded above
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(text))) //nolint:gosec // bounded above
	b = append(b, text...)
	if err := c.conn.SetDeadline(time.Now().Add(pythonWait)); err != nil {
		return nil, fmt.Errorf("compile %s: %w", name, err)
	}
	defer context.AfterFunc(ctx, c.cut)()
	if _, err := c.conn.Write(b); err != nil {
		return nil, fmt.Errorf("compile %s: %w", name, err)
	}
	code, err := c.answer(ctx)
	if err != nil {
		return nil, fmt.Errorf("compile %s: %w", name, err)
	}
	return code, nil
}

// cut ends what waits for the interpreter.
func (c *PythonCompiler) cut() { _ = c.conn.SetDeadline(time.Unix(1, 0)) }

func (c *PythonCompiler) answer(ctx context.Context) ([]byte, error) {
	if err := c.conn.SetDeadline(time.Now().Add(pythonWait)); err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, c.cut)()
	return readAnswer(c.conn)
}

// readAnswer reads one answer of compile.py. It allocates no more than comes.
func readAnswer(r io.Reader) ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxPythonCode || head[0] > 1 {
		return nil, fmt.Errorf("an answer of status %d and %d bytes", head[0], n)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	switch {
	case err != nil:
		return nil, err
	case len(b) < int(n):
		return nil, io.ErrUnexpectedEOF
	case head[0] != 0:
		return nil, fmt.Errorf("%.100q: %w", b, errs.Invalid)
	}
	return b, nil
}

// Close ends the interpreter and what it started.
func (c *PythonCompiler) Close() {
	_ = c.conn.Close()
	_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL) // its session: Setsid
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait() // killed
}
