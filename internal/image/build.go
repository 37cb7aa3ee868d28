package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"ringwall/internal/errs"
)

// Format is the file system of an image.
type Format string

// The formats.
const (
	EROFS    Format = "erofs"
	Squashfs Format = "squashfs"
)

// Options say how an image is made. The zero value is EROFS, uncompressed, with
// the time 0 on all files and no salt.
type Options struct {
	Format   Format
	Compress bool   // EROFS: LZ4; squashfs: zstd
	Time     int64  // of every file, in seconds since 1970
	Salt     []byte // of the hash tree; without one, equal content gives equal roots
	TempDir  string // for a copy of the content; empty: beside the image
}

// Build makes an image of a directory or a tar archive (plain, gzip, xz, zstd,
// bzip2). The same content, with the same version of mkfs.erofs or mksquashfs,
// gives the same bytes: owners, times and order of the source do not count.
// Nothing may be at path; after an error nothing is.
func Build(ctx context.Context, source, path string, o Options) (*Checked, error) {
	b, err := build(ctx, source, path, o)
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", path, err)
	}
	return b, nil
}

func build(ctx context.Context, source, path string, o Options) (_ *Checked, err error) {
	if o.Format == "" {
		o.Format = EROFS
	}
	if o.Format != EROFS && o.Format != Squashfs || len(o.Salt) > maxSalt || o.Time < 0 || o.Time >= 1<<32 {
		return nil, fmt.Errorf("format %q, time %d, salt of %d bytes: %w", o.Format, o.Time, len(o.Salt), errs.Invalid)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("it is there already: %w", errs.Conflict)
	}
	if o.TempDir == "" {
		o.TempDir = filepath.Dir(path)
	}
	tmp, err := os.MkdirTemp(o.TempDir, ".ringwall-image-") // mode 0700
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, removeTree(tmp)) }()
	tree, file := filepath.Join(tmp, "root"), filepath.Join(tmp, "image")
	if err := os.Mkdir(tree, 0o755); err != nil { //nolint:gosec // the mode of the image's root; tmp is private
		return nil, err
	}
	identity, err := stage(ctx, source, tree)
	if err != nil {
		return nil, err
	}
	if err := makeFS(ctx, o, identity, tree, file); err != nil {
		return nil, err
	}
	if err := appendTree(ctx, file, o.Salt); err != nil {
		return nil, err
	}
	// what is reported is what is on disk
	out, err := Check(ctx, file)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(file, 0o644); err != nil { //nolint:gosec // what is published
		return nil, err
	}
	if o.TempDir == filepath.Dir(path) {
		return out, os.Link(file, path) // fails if there is one meanwhile
	}
	return out, copyFile(file, path)
}

// removeTree removes a tree with directories that nobody may write.
func removeTree(dir string) error {
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(p, 0o700) //nolint:gosec // a directory
		}
		return err
	})
	return errors.Join(err, os.RemoveAll(dir))
}

// makeFS runs the file system's own program.
func makeFS(ctx context.Context, o Options, identity [32]byte, tree, file string) error {
	var args []string
	switch o.Format {
	case Squashfs:
		args = []string{
			"mksquashfs", tree, file, "-noappend", "-no-progress", "-quiet", "-all-root", "-no-xattrs", "-no-exports", "-processors", "1",
			"-mkfs-time", strconv.FormatInt(o.Time, 10), "-all-time", strconv.FormatInt(o.Time, 10),
		}
		if o.Compress {
			args = append(args, "-comp", "zstd")
		} else {
			args = append(args, "-noI", "-noD", "-noF", "-noX")
		}
	default:
		args = []string{"mkfs.erofs", "--quiet", "-x-1", "--all-root", "-T" + strconv.FormatInt(o.Time, 10), "-U" + uuid(identity)}
		if o.Compress {
			args = append(args, "-zlz4hc")
		}
		args = append(args, file, tree)
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return fmt.Errorf("%s is missing (Debian: apt-get install erofs-utils squashfs-tools): %w", args[0], errs.Unsupported)
	}
	var said bytes.Buffer
	c := exec.CommandContext(ctx, program, args[1:]...)
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"} // SOURCE_DATE_EPOCH would contradict the time given
	c.Stdout, c.Stderr = &said, &said
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s: %w: %.400s", args[0], err, strings.TrimSpace(said.String()))
	}
	return nil
}

// uuid is one of version 8 (RFC 9562): made from a digest.
func uuid(d [32]byte) string {
	d[6], d[8] = d[6]&0x0f|0x80, d[8]&0x3f|0x80
	h := hex.EncodeToString(d[:16])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// appendTree pads the file system and writes superblock and tree behind it.
func appendTree(ctx context.Context, path string, salt []byte) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	blocks := (uint64(st.Size()) + BlockSize - 1) / BlockSize //nolint:gosec // not negative
	blocks = max(blocks, 2)                                   // one alone has no tree
	size := int64(blocks) * BlockSize                         //nolint:gosec // bounded by HashTree
	if err := f.Truncate(size); err != nil {
		return err
	}
	tree, root, err := HashTree(contextReader{ctx, f}, blocks, salt)
	if err != nil {
		return err
	}
	id := sha256.Sum256(append([]byte("ringwall image "), root[:]...))
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
	head := superblock{uuid: [16]byte(id[:16]), blocks: blocks, salt: salt}.encode()
	for _, b := range [][]byte{head, tree} {
		if _, err := f.WriteAt(b, size); err != nil {
			return err
		}
		size += int64(len(b))
	}
	return f.Sync()
}

// copyFile copies to a new file on another file system.
func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) //nolint:gosec // what is published
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return errors.Join(err, os.Remove(to))
	}
	return nil
}
