package host

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// Bounds of what is read and kept about processes.
const (
	maxPasswd      = 16 << 20
	maxUsers       = 100_000
	maxMountinfo   = 16 << 20
	maxCgroupCache = 4096
	maxCgroupPath  = 4096
)

// Container is the container that a cgroup belongs to. The zero value is none.
type Container struct {
	Runtime string `json:"runtime"` // docker, podman, containerd, cri-o, cri, runc, systemd-nspawn, machine, lxc
	ID      string `json:"id"`      // the runtime's id or name
}

// Lookup finds the names of what the kernel gives events as numbers. Its
// answers are hints for triage, never input of a verdict: what they come from
// changes with the system and can be gone when an event is read (fails open: the
// answer is then empty). It may be used from several goroutines. No call waits
// for another process.
type Lookup struct {
	root   string
	cgroup *os.File // the mounted cgroup2 hierarchy; nil: there is none
	prefix string   // its path

	mu     sync.Mutex
	users  map[uint32]string
	passwd fs.FileInfo // what users was read from
	paths  map[uint64]string
}

// NewLookup makes a Lookup of the system below root. Where there is no cgroup2
// hierarchy, or it cannot be opened, it knows no cgroups by id.
func NewLookup(root string) *Lookup {
	l := &Lookup{root: root, paths: make(map[uint64]string)}
	f, err := os.Open(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return l
	}
	defer f.Close()
	mounts, err := ParseMountinfo(f)
	if err != nil {
		return l
	}
	for _, m := range mounts {
		if m.Type != "cgroup2" || m.Root != "/" {
			continue // a mount of a part cannot name what lies outside it
		}
		if l.cgroup, err = os.Open(filepath.Join(root, m.Point)); err == nil {
			l.prefix = l.cgroup.Name()
			return l
		}
		l.cgroup = nil
	}
	return l
}

// Close lets go of the hierarchy.
func (l *Lookup) Close() error {
	if l.cgroup == nil {
		return nil
	}
	return l.cgroup.Close()
}

// User is the name of a user id in /etc/passwd, "" if it has none there. Users
// of a directory service are not looked up: that would wait for the network.
func (l *Lookup) User(uid uint32) string {
	name := filepath.Join(l.root, "etc/passwd")
	fi, err := os.Stat(name)
	if err != nil {
		return ""
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.passwd == nil || !os.SameFile(fi, l.passwd) || !fi.ModTime().Equal(l.passwd.ModTime()) || fi.Size() != l.passwd.Size() {
		l.passwd, l.users = fi, nil
		if b, err := readBounded(name, maxPasswd); err == nil {
			l.users = ParsePasswd(b)
		}
	}
	return l.users[uid]
}

// Cgroup is the path of a cgroup, from the root of the hierarchy, by the id
// that the kernel gives events (the inode number of its directory); "" if it is
// gone and was never asked for.
func (l *Lookup) Cgroup(id uint64) string {
	p, _ := l.cgroupPath(id)
	return p
}

func (l *Lookup) cgroupPath(id uint64) (string, error) {
	l.mu.Lock()
	p, ok := l.paths[id]
	l.mu.Unlock()
	if ok {
		return p, nil
	}
	p, err := l.lookupCgroup(id)
	if err != nil {
		return "", fmt.Errorf("path of cgroup %d: %w", id, err)
	}
	// Ids are not used again and cgroups are not renamed: an entry never
	// goes stale.
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.paths) >= maxCgroupCache {
		clear(l.paths)
	}
	l.paths[id] = p
	return p, nil
}

// lookupCgroup opens a directory of kernfs by its id; FILEID_KERNFS is in
// linux/exportfs.h.
func (l *Lookup) lookupCgroup(id uint64) (string, error) {
	if l.cgroup == nil {
		return "", fmt.Errorf("no cgroup2 hierarchy: %w", errs.Unsupported)
	}
	const kernfs = 0xfe
	h := unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(l.cgroup.Fd()), h, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.ESTALE):
		return "", fmt.Errorf("%w: %w", err, errs.NotFound)
	case err != nil:
		return "", kindOf(err)
	}
	defer unix.Close(fd)
	p, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", kindOf(err)
	}
	if p == l.prefix {
		return "/", nil
	}
	rest, ok := strings.CutPrefix(p, l.prefix)
	if !ok || !strings.HasPrefix(rest, "/") || strings.HasSuffix(rest, " (deleted)") || len(rest) > maxCgroupPath {
		return "", fmt.Errorf("%.200q: %w", p, errs.NotFound)
	}
	return rest, nil
}

// Program is the file that a process runs, as it is named now, with
// " (deleted)" after it if it has no name any more; "" if the process is gone.
func (l *Lookup) Program(pid int) string {
	p, err := os.Readlink(filepath.Join(l.root, "proc", strconv.Itoa(pid), "exe"))
	if err != nil {
		return ""
	}
	return p
}

// ProcessCgroup is the path of a process's cgroup in the cgroup2 hierarchy, ""
// if there is none.
func (l *Lookup) ProcessCgroup(pid int) string {
	b, err := readBounded(filepath.Join(l.root, "proc", strconv.Itoa(pid), "cgroup"), maxSmallFile)
	if err != nil {
		return ""
	}
	p, _ := ParseCgroup(b)
	return p
}

// ParsePasswd gives the names of user ids in the format of passwd(5). Of two
// names for an id the first counts, as for getpwuid(3). Lines that are not of
// the format are left out (fails open: a name less).
func ParsePasswd(b []byte) map[uint32]string {
	out := make(map[uint32]string)
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.Split(line, ":")
		if len(f) < 7 || f[0] == "" || len(f[0]) > 256 || strings.ContainsAny(f[0], "+#") || len(out) == maxUsers {
			continue
		}
		uid, err := strconv.ParseUint(f[2], 10, 32)
		if _, dup := out[uint32(uid)]; err != nil || dup {
			continue
		}
		out[uint32(uid)] = f[0]
	}
	return out
}

// ParseCgroup finds the cgroup2 path in the format of /proc/PID/cgroup
// (cgroups(7)): the line of hierarchy 0.
func ParseCgroup(b []byte) (string, error) {
	for line := range strings.SplitSeq(string(b), "\n") {
		if p, ok := strings.CutPrefix(line, "0::"); ok && strings.HasPrefix(p, "/") && len(p) <= maxCgroupPath {
			return p, nil
		}
	}
	return "", fmt.Errorf("no cgroup2 path: %w", errs.NotFound)
}

// Mount is one line of mountinfo.
type Mount struct {
	ID, Parent   int
	Major, Minor uint32
	Root         string // the directory of the file system that is mounted
	Point        string
	Options      string
	Type         string
	Source       string
	Super        string // options of the file system
}

// ParseMountinfo reads the format of /proc/PID/mountinfo (proc(5)). A malformed
// line is errs.Invalid (fails closed).
func ParseMountinfo(r io.Reader) ([]Mount, error) {
	in := bufio.NewScanner(io.LimitReader(r, maxMountinfo+1))
	in.Buffer(make([]byte, 4<<10), maxSmallFile)
	var out []Mount
	size := 0
	for in.Scan() {
		m, ok := parseMount(in.Text())
		if size += len(in.Bytes()) + 1; !ok || size > maxMountinfo {
			return nil, fmt.Errorf("mountinfo, line %d: %w", len(out)+1, errs.Invalid)
		}
		out = append(out, m)
	}
	if err := in.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("%w: %w", err, errs.Invalid)
		}
		return nil, fmt.Errorf("mountinfo, line %d: %w", len(out)+1, err)
	}
	return out, nil
}

func parseMount(line string) (m Mount, ok bool) {
	before, after, ok := strings.Cut(line, " - ")
	f, g := strings.Split(before, " "), strings.SplitN(after, " ", 3)
	if !ok || len(f) < 6 || len(g) != 3 {
		return m, false
	}
	major, minor, _ := strings.Cut(f[2], ":")
	a, e1 := strconv.Atoi(f[0])
	b, e2 := strconv.Atoi(f[1])
	c, e3 := strconv.ParseUint(major, 10, 32)
	d, e4 := strconv.ParseUint(minor, 10, 32)
	if e1 != nil || e2 != nil || e3 != nil || e4 != nil {
		return m, false
	}
	return Mount{
		ID: a, Parent: b, Major: uint32(c), Minor: uint32(d),
		Root: unescapeMount(f[3]), Point: unescapeMount(f[4]), Options: f[5],
		Type: g[0], Source: unescapeMount(g[1]), Super: g[2],
	}, true
}

// unescapeMount undoes the kernel's \ooo for space, tab, newline and backslash.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
