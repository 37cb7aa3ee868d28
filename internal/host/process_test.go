package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

func TestContainerOf(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for path, want := range map[string]Container{
		"/": {}, "": {}, "/init.scope": {}, "/system.slice/docker.service": {}, "/user.slice/user-1000.slice/session-3.scope": {},
		"/system.slice/docker-" + id + ".scope":                {"docker", id},
		"/docker/" + id:                                        {"docker", id},
		"/docker/" + id + "/docker/" + strings.Repeat("f", 64): {"docker", id},
		"/docker/buildx":                                       {},
		"/machine.slice/libpod-" + id + ".scope/container":     {"podman", id},
		"/machine.slice/libpod-conmon-" + id + ".scope":        {},
		"/libpod_parent/libpod-" + id:                          {"podman", id},
		"/libpod_parent/libpod-conmon-" + id:                   {},
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope":             {"podman", id},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope": {"containerd", id},
		"/kubepods.slice/kubepods-pod1.slice/crio-" + id + ".scope":                                    {"cri-o", id},
		"/kubepods.slice/kubepods-pod1.slice/crio-conmon-" + id + ".scope":                             {},
		"/kubepods/besteffort/pod6f0c/" + id:                                                           {"cri", id},
		"/system.slice/nerdctl-" + id + ".scope":                                                       {"containerd", id},
		"/user.slice/runc-my\\x2dbox.scope":                                                            {"runc", "my-box"},
		"/machine.slice/systemd-nspawn@deb\\x2dian.service/payload":                                    {"systemd-nspawn", "deb-ian"},
		"/machine.slice/machine-guest.scope":                                                           {"machine", "guest"},
		"/machine.slice/machine-lxc\\x2dweb.scope":                                                     {"lxc", "web"},
		"/lxc.payload.web/system.slice/docker-" + id + ".scope":                                        {"lxc", "web"},
		"/lxc/web": {"lxc", "web"}, "/lxc.monitor.web": {},
		"/system.slice/docker-abc.scope":           {},
		"/a" + strings.Repeat("/a", maxCgroupPath): {},
	} {
		if got := ContainerOf(path); got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
}

func TestParsePasswd(t *testing.T) {
	got := ParsePasswd([]byte("root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n+nis::::::\n#x:x:5:5::/:/\nshort:x:7\nbig:x:4294967296:0:::\nneg:x:-1:0:::\nlast:x:4294967295:0:::"))
	if len(got) != 2 || got[0] != "root" || got[4294967295] != "last" {
		t.Errorf("%v", got)
	}
}

func TestParseMountinfo(t *testing.T) {
	got, err := ParseMountinfo(strings.NewReader(`36 35 98:0 /mnt1 /mnt\0402\134 rw,noatime master:1 - ext3 /dev/root rw,errors=continue` + "\n"))
	if err != nil || len(got) != 1 || got[0] != (Mount{36, 35, 98, 0, "/mnt1", `/mnt 2\`, "rw,noatime", "ext3", "/dev/root", "rw,errors=continue"}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{
		"x\n", "\n", "36 35 98:0 / / rw\n", "36 35 98 / / rw - ext3 a rw\n", "36 35 98:0 / - ext3 a rw\n",
		"36 35 98:0 / / rw - ext3 " + strings.Repeat("a", maxSmallFile),
	} {
		if _, err := ParseMountinfo(strings.NewReader(bad)); !errors.Is(err, errs.Invalid) {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
}

func TestLookupUser(t *testing.T) {
	root := t.TempDir()
	writeTree(t, root, map[string]string{"proc/self/mountinfo": "", "etc/passwd": "a:x:1:1:::\n"})
	e := NewLookup(root)
	if got := e.User(1) + "/" + e.User(2); got != "a/" {
		t.Error(got)
	}
	writeTree(t, root, map[string]string{"etc/passwd": "a:x:1:1:::\nb:x:2:2:::\n"})
	if got := e.User(2); got != "b" {
		t.Errorf("a changed file was not read: %q", got)
	}
	if err := os.Remove(filepath.Join(root, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if got := e.User(2); got != "" {
		t.Error(got)
	}
	if _, err := e.cgroupPath(1); !errors.Is(err, errs.Unsupported) {
		t.Errorf("no hierarchy: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if e := NewLookup(t.TempDir()); e.Cgroup(1) != "" || e.User(0) != "" || e.Program(1) != "" || e.Close() != nil {
		t.Error("an empty root knows something")
	}
}

// TestLookupCgroup makes a cgroup as a container runtime would, runs a
// process in it and finds it by id.
func TestLookupCgroup(t *testing.T) {
	e := NewLookup("/")
	defer e.Close()
	if e.cgroup == nil {
		t.Skip("SKIP: no cgroup2 hierarchy here")
	}
	id := strings.Repeat("ab", 32)
	outer := filepath.Join(e.prefix, fmt.Sprintf("ringwall-test-%d", os.Getpid()))
	dir := filepath.Join(outer, "docker-"+id+".scope")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skip("SKIP: cannot make a cgroup:", err)
	}
	defer os.Remove(outer)
	defer os.Remove(dir)
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	sleep := exec.CommandContext(t.Context(), "sleep", "60")
	sleep.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	if err := sleep.Start(); err != nil {
		t.Skip("SKIP: cannot start in a cgroup:", err)
	}
	pid := sleep.Process.Pid
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimPrefix(dir, e.prefix)
	got, err := e.cgroupPath(st.Ino)
	if errors.Is(err, errs.Denied) {
		t.Skip("SKIP: needs CAP_DAC_READ_SEARCH:", err)
	}
	if err != nil || got != want {
		t.Errorf("path %q, %v; want %q", got, err, want)
	}
	if c := ContainerOf(e.Cgroup(st.Ino)); c != (Container{"docker", id}) {
		t.Errorf("%+v", c)
	}
	if p := e.ProcessCgroup(pid); p != want {
		t.Errorf("cgroup of the process %q", p)
	}
	program, err := filepath.EvalSymlinks(sleep.Path)
	if got := e.Program(pid); err != nil || got != program {
		t.Errorf("program %q, want %q, %v", got, program, err)
	}
	var root unix.Stat_t
	if err := unix.Stat(e.prefix, &root); err != nil {
		t.Fatal(err)
	}
	if p, err := e.cgroupPath(root.Ino); err != nil || p != "/" {
		t.Errorf("root cgroup: %q, %v", p, err)
	}
	_ = sleep.Process.Kill()
	_ = sleep.Wait()
	if e.Program(pid) != "" || e.ProcessCgroup(pid) != "" {
		t.Error("a process that is gone has a program or a cgroup")
	}
	for range 100 { // the kernel takes a moment to let go of the process
		if err = os.Remove(dir); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.cgroupPath(st.Ino); err != nil || got != want {
		t.Errorf("a cgroup that was asked for before is gone: %q, %v", got, err)
	}
	e.mu.Lock()
	clear(e.paths)
	e.mu.Unlock()
	if got, err := e.cgroupPath(st.Ino); err == nil {
		t.Errorf("a cgroup that is gone: %q", got)
	}
	for i := range uint64(maxCgroupCache) {
		e.paths[1<<40+i] = "/x"
	}
	if _, err := e.cgroupPath(root.Ino); err != nil || len(e.paths) != 1 {
		t.Errorf("a full cache: %d entries, %v", len(e.paths), err)
	}
}

func FuzzProcessFiles(f *testing.F) {
	f.Add([]byte("root:x:0:0::/root:/bin/sh\n"))
	f.Add([]byte("0::/system.slice/docker-" + strings.Repeat("a", 64) + ".scope\n"))
	f.Add([]byte(`36 35 98:0 /mnt1 /mnt\0402 rw - ext3 /dev/root rw`))
	f.Add([]byte(`0::/machine.slice/machine-a\x2d.scope`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, n := range ParsePasswd(b) {
			if n == "" || strings.Contains(n, ":") {
				t.Errorf("user %q", n)
			}
		}
		if p, err := ParseCgroup(b); err == nil {
			if c := ContainerOf(p); (c.ID == "") != (c.Runtime == "") {
				t.Errorf("%q: %+v", p, c)
			}
		}
		if m, err := ParseMountinfo(strings.NewReader(string(b))); err == nil && len(m) > strings.Count(string(b), " - ") {
			t.Errorf("%d mounts", len(m))
		}
	})
}
