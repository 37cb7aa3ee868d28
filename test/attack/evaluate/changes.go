package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// changes are techniques that change a program after it was judged: group 9.
func changes() []technique {
	change := func(id, title string, how func(a *attempt, victim string) error) technique {
		return technique{ID: id, Group: 9, As: asBoth, Title: title, Stop: byVersion, Run: changed(how)}
	}
	return []technique{
		change("change-in-place", "overwritten in place, same size", func(a *attempt, v string) error { return a.overwrite(v) }),
		change("change-times", "overwritten in place, times put back", overwriteTimes),
		change("change-rename", "another file renamed over it", func(a *attempt, v string) error {
			p, err := a.program("evil")
			return errors.Join(err, os.Rename(p, v))
		}),
		change("change-recreate", "removed and made anew", func(a *attempt, v string) error {
			return errors.Join(os.Remove(v), a.payload("payload", v))
		}),
		change("change-hardlink", "written through a hard link", func(a *attempt, v string) error {
			return errors.Join(os.Link(v, a.path("link")), a.overwrite(a.path("link")))
		}),
		change("change-truncated", "emptied and filled again", func(a *attempt, v string) error {
			return errors.Join(os.Truncate(v, 0), a.payload("payload", v))
		}),
		change("change-copy-range", "written by copy_file_range", overwriteCopyRange),
		change("change-direct", "written past the page cache (O_DIRECT)", overwriteDirect),
		change("change-mapped", "written through a shared mapping", overwriteMapped),
		change("change-splice", "written by splice from a pipe", overwriteSplice),
		change("change-exchange", "exchanged with another file", func(a *attempt, v string) error {
			p, err := a.program("evil")
			return errors.Join(err, unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, v, unix.RENAME_EXCHANGE))
		}),
	}
}

// changed runs an authorised program once, so that its verdict is known, changes it and runs it again.
func changed(how func(a *attempt, victim string) error) func(*attempt) error {
	return func(a *attempt) error {
		victim := a.path("victim")
		if err := copyFile("/bin/true", victim); err != nil {
			return err
		}
		if err := a.run(victim); err != nil {
			return fmt.Errorf("a copy of an authorised program must run: %w", err)
		}
		if err := how(a, victim); err != nil {
			return err
		}
		return a.run(victim)
	}
}

// evilBytes is a payload of the victim's size.
func (a *attempt) evilBytes(victim string) ([]byte, error) {
	p, err := a.program("evil")
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(victim)
	if err != nil {
		return nil, err
	}
	out := make([]byte, st.Size())
	copy(out, raw)
	return out, nil
}

// overwrite changes a file in place and keeps its size.
func (a *attempt) overwrite(victim string) error {
	raw, err := a.evilBytes(victim)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(victim, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(raw, 0)
	return errors.Join(err, f.Close())
}

func overwriteTimes(a *attempt, victim string) error {
	st, err := os.Stat(victim)
	if err != nil {
		return err
	}
	return errors.Join(a.overwrite(victim), os.Chtimes(victim, time.Now(), st.ModTime()))
}

func overwriteCopyRange(a *attempt, victim string) error {
	raw, err := a.evilBytes(victim)
	if err != nil {
		return err
	}
	from, err := os.OpenFile(a.path("from"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(victim, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	if _, err := from.Write(raw); err != nil {
		return err
	}
	in, out := int64(0), int64(0)
	for left := len(raw); left > 0; {
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, left, 0)
		if err != nil || n == 0 {
			return fmt.Errorf("copy_file_range: %d left: %w", left, err)
		}
		left -= n
	}
	return nil
}

func overwriteDirect(a *attempt, victim string) error {
	raw, err := a.evilBytes(victim)
	if err != nil {
		return err
	}
	// O_DIRECT wants memory, offset and length on block boundaries
	const block = 4096
	whole := len(raw) / block * block
	memory, err := unix.Mmap(-1, 0, whole, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	copy(memory, raw)
	fd, err := unix.Open(victim, unix.O_WRONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) { // a file system without it
		return unavailable("O_DIRECT: %v", err)
	}
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, memory, 0)
	return errors.Join(err, unix.Close(fd))
}

func overwriteMapped(a *attempt, victim string) error {
	raw, err := a.evilBytes(victim)
	if err != nil {
		return err
	}
	fd, err := unix.Open(victim, unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(fd, 0, len(raw), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(memory, raw)
	return errors.Join(unix.Munmap(memory), unix.Close(fd))
}

func overwriteSplice(a *attempt, victim string) error {
	raw, err := a.evilBytes(victim)
	if err != nil {
		return err
	}
	fd, err := unix.Open(victim, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], 0); err != nil {
		return err
	}
	for len(raw) > 0 {
		n := min(len(raw), 4096)
		if _, err := unix.Write(pipe[1], raw[:n]); err != nil {
			return err
		}
		if _, err := unix.Splice(pipe[0], nil, fd, nil, n, 0); err != nil {
			return fmt.Errorf("splice: %w", err)
		}
		raw = raw[n:]
	}
	return nil
}
