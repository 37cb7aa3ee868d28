package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"ringwall/internal/errs"
)

// imageTool makes disk images.
const imageTool = "qemu-img"

// FormatOf tells a qcow2 disk image by its magic number; anything else is raw.
// The emulator is never left to guess: a guest that writes a header of its own
// to a raw disk could then name any file of this machine.
func FormatOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("disk image: %w", err)
	}
	defer f.Close()
	var head [4]byte
	if _, err := io.ReadFull(f, head[:]); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("disk image %s: %w", path, err)
	}
	if bytes.Equal(head[:], []byte("QFI\xfb")) {
		return "qcow2", nil
	}
	return "raw", nil
}

// Overlay makes a qcow2 image at path that takes all writes in the place of
// the image base, which stays as it is.
func Overlay(ctx context.Context, path, base string) error {
	format, err := FormatOf(base)
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(base)
	if err != nil {
		return fmt.Errorf("overlay over %s: %w", base, err)
	}
	if err := command(ctx, imageTool, "create", "-q", "-f", "qcow2", "-F", format, "-b", abs, path); err != nil {
		return fmt.Errorf("overlay over %s: %w", base, err)
	}
	return nil
}

// MakeDisk makes a sparse ext4 file system at path from a directory, with room
// for free more MiB. Owners are kept, so what root owns needs root to be read.
func MakeDisk(ctx context.Context, path, dir string, free int64) error {
	var size, files int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		files++
		if st.Mode().IsRegular() {
			size += st.Size() + 4096
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("disk of %s: %w", dir, err)
	}
	inodes := files + free*64 + 1024
	mib := (size+files*4096+inodes*256)>>20*5/4 + free + 64
	// fs-verity wants blocks of 4 KiB
	if err := command(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "verity,^has_journal", "-N", fmt.Sprint(inodes), "-m", "0", "-d", dir, path, fmt.Sprintf("%dM", mib)); err != nil {
		return fmt.Errorf("disk of %s: %w", dir, err)
	}
	return nil
}

// command runs a program. One that is not installed is errs.Unsupported.
func command(ctx context.Context, name string, args ...string) error {
	if _, err := exec.LookPath(name); err != nil {
		return fmt.Errorf("%s is not installed: %w", name, errs.Unsupported)
	}
	c := exec.CommandContext(ctx, name, args...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	said := &tail{max: 4 << 10}
	c.Stdout, c.Stderr = said, said
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(said.String()))
	}
	return nil
}
