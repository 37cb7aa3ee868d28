package enforce

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// What a guard covers: enum guard of bpf/ringwall.h.
const (
	guardAll   = 1
	guardPlace = 2
)

// Protect turns the guards on: from now on only the agent may touch its maps,
// pins and guarded files, or signal, trace, limit or move itself. The calling
// process is the agent: it has the role by AdoptSelf or by its content. A
// restarted agent calls it again, so that the guards follow its process and
// cgroup.
func (e *Engine) Protect() error {
	for name, m := range e.maps() {
		if err := e.own(m); err != nil {
			return fmt.Errorf("guard map %s: %w", name, err)
		}
	}
	if e.table != nil {
		if err := e.own(e.table); err != nil {
			return fmt.Errorf("guard the table: %w", err)
		}
	}
	var pins uint32
	if e.opts.PinDir != "" {
		var err error
		if pins, err = superDevice(e.opts.PinDir); err != nil {
			return fmt.Errorf("guard the pins: %w", err)
		}
	}
	groups, err := cgroupInodes("/proc/self/cgroup")
	if err != nil {
		return err
	}
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/mnt", &ns); err != nil {
		return fmt.Errorf("look at the mount namespace: %w", err)
	}
	return e.change(func(st *engineSteering) {
		st.PinDevice, st.AgentCgroups = pins, groups
		st.Agent, st.MountNs = uint32(os.Getpid()), uint32(ns.Ino)
		st.Protect = 1
	})
}

// Guard keeps everyone but the agent from changing files and the entries of
// directories. A directory is guarded alone: guard each one below it too. The
// directories above cannot be renamed, mounted over or unmounted where the
// agent would see it. What is guarded goes by inode number: call Unguard before
// you remove something guarded.
//
// A guarded file must not be replaced by rename, unless its directory is
// guarded: the new file would be another one.
func (e *Engine) Guard(paths ...string) error {
	for _, path := range paths {
		key, err := guardKey(path)
		if err != nil {
			return err
		}
		if err := e.objs.GuardedInodes.Put(key, uint8(guardAll)); err != nil {
			return fmt.Errorf("guard %s: %w", path, err)
		}
		abs, err := filepath.Abs(path)
		if err != nil {
			return fmt.Errorf("guard %s: %w", path, err)
		}
		for dir := filepath.Dir(abs); dir != "/"; dir = filepath.Dir(dir) {
			key, err := guardKey(dir)
			if err != nil {
				return err
			}
			// one that is guarded altogether stays so
			err = e.objs.GuardedInodes.Update(key, uint8(guardPlace), ebpf.UpdateNoExist)
			if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return fmt.Errorf("guard %s: %w", dir, err)
			}
		}
	}
	return nil
}

// Unguard undoes Guard for these files and directories. The directories above
// them stay where they are.
func (e *Engine) Unguard(paths ...string) error {
	for _, path := range paths {
		key, err := guardKey(path)
		if err != nil {
			return err
		}
		if err := e.objs.GuardedInodes.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("unguard %s: %w", path, err)
		}
	}
	return nil
}

// IsGuarded reports whether everyone but the agent is kept from changing a file
// or the entries of a directory. Only an agent can have asked for that, so a
// restarted one can tell its own state from one that somebody else made.
func (e *Engine) IsGuarded(path string) (bool, error) {
	key, err := guardKey(path)
	if err != nil {
		return false, err
	}
	var v uint8
	err = e.objs.GuardedInodes.Lookup(key, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look whether %s is guarded: %w", path, err)
	}
	return v == guardAll, nil
}

func guardKey(path string) (engineGuarded, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return engineGuarded{}, fmt.Errorf("guard %s: %w", path, err)
	}
	dev, err := superDevice(path)
	if err != nil {
		return engineGuarded{}, fmt.Errorf("guard %s: %w", path, err)
	}
	return engineGuarded{Inode: st.Ino, Device: dev}, nil
}

// superDevice is the kernel's device number of the file system that path lies
// on. stat(2) gives another one on btrfs, so it is looked up by mount.
func superDevice(path string) (uint32, error) {
	var stx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &stx); err != nil {
		return 0, fmt.Errorf("look at %s: %w", path, err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0, fmt.Errorf("list the mounts: %w", err)
	}
	return mountDevice(b, stx.Mnt_id)
}

// mountDevice finds the device of a mount in a mountinfo table, see proc(5).
func mountDevice(mountinfo []byte, id uint64) (uint32, error) {
	want := strconv.FormatUint(id, 10)
	for line := range bytes.Lines(mountinfo) {
		f := strings.Fields(string(line))
		if len(f) < 3 || f[0] != want {
			continue
		}
		major, minor, ok := strings.Cut(f[2], ":")
		a, errA := strconv.ParseUint(major, 10, 12)
		b, errB := strconv.ParseUint(minor, 10, 20)
		if !ok || errA != nil || errB != nil {
			return 0, fmt.Errorf("mount %d has device %q: %w", id, f[2], errs.Invalid)
		}
		return uint32(a)<<20 | uint32(b), nil
	}
	return 0, fmt.Errorf("mount %d: %w", id, errs.NotFound)
}

// cgroupInodes lists the inodes of the cgroup v2 directory that the table (as
// /proc/PID/cgroup) names, and of those above it, without the root. Only as
// many as the kernel programs compare are returned, the lowest first.
func cgroupInodes(table string) ([4]uint64, error) {
	var out [4]uint64
	f, err := os.Open(table)
	if err != nil {
		return out, fmt.Errorf("find the agent's cgroup: %w", err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		group, ok := strings.CutPrefix(sc.Text(), "0::")
		if !ok {
			continue
		}
		for i := 0; i < len(out) && group != "/"; i++ {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(cgroupRoot, group), &st); err != nil {
				return out, fmt.Errorf("find the agent's cgroup %s: %w", group, err)
			}
			out[i] = st.Ino
			group = filepath.Dir(group)
		}
		return out, nil
	}
	return out, nil // no cgroup v2: nothing to guard
}

// cgroupRoot is where Linux distributions mount cgroup v2.
const cgroupRoot = "/sys/fs/cgroup"

func (e *Engine) own(m *ebpf.Map) error {
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("map info: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return fmt.Errorf("map id: %w", errs.Unsupported)
	}
	return e.objs.OwnMaps.Put(uint32(id), uint8(1))
}
