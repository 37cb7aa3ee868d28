package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sort"

	"ringwall/internal/errs"
)

// Volume describes an image.
type Volume struct {
	Format     Format
	DataBlocks uint64 // of 4 KiB: the file system
	Size       int64  // of the file, in bytes
	Salt       []byte
	UUID       [16]byte // of the superblock; nothing vouches for it
	// Root is the hash over the top block of the tree. That the rest of the tree
	// and the data agree with it, the kernel checks block by block, and Check as
	// a whole.
	Root [32]byte
}

// HashOffset is where the superblock is, in bytes: what veritysetup's
// --hash-offset wants.
func (v *Volume) HashOffset() int64 { return int64(v.DataBlocks) * BlockSize } //nolint:gosec // at most 1 TiB

// Open reads what an image says of itself. Nothing of that is verified: see
// Check. A file that is no image as Build makes it is errs.Invalid.
func Open(path string) (*Volume, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v, err := open(f)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return v, nil
}

func open(f *os.File) (*Volume, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file: %w", errs.Invalid)
	}
	return describe(f, st.Size())
}

// describe finds the superblock: the sizes of file system and tree add up to
// that of the file in one way only.
func describe(r io.ReaderAt, size int64) (*Volume, error) {
	if size < 3*BlockSize || size%BlockSize != 0 || size/BlockSize > 2*maxBlocks {
		return nil, fmt.Errorf("%d bytes are no file system with a hash tree: %w", size, errs.Invalid)
	}
	total := uint64(size / BlockSize)
	whole := func(data int) uint64 { return uint64(data) + 1 + treeBlocks(uint64(data)) } //nolint:gosec // not negative
	n := sort.Search(maxBlocks, func(data int) bool { return whole(data) >= total })
	if whole(n) != total {
		return nil, fmt.Errorf("%d blocks are no file system with a hash tree: %w", total, errs.Invalid)
	}
	head, block := make([]byte, BlockSize), make([]byte, BlockSize)
	if _, err := r.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if _, err := r.ReadAt(block, int64(n)*BlockSize); err != nil {
		return nil, err
	}
	s, err := parseSuperblock(block)
	if err != nil {
		return nil, err
	}
	if s.blocks != uint64(n) { //nolint:gosec // not negative
		return nil, fmt.Errorf("verity superblock is about %d blocks, %d are there: %w", s.blocks, n, errs.Invalid)
	}
	v := &Volume{Format: formatOf(head), DataBlocks: s.blocks, Size: size, Salt: s.salt, UUID: s.uuid}
	if _, err := r.ReadAt(block, int64(n+1)*BlockSize); err != nil {
		return nil, err
	}
	v.Root = [32]byte(appendDigests(nil, block, s.salt))
	return v, nil
}

// formatOf knows a file system by its magic; empty: it is none of ours.
func formatOf(head []byte) Format {
	switch {
	case binary.LittleEndian.Uint32(head[1024:]) == 0xe0f5e1e2:
		return EROFS
	case string(head[:4]) == "hsqs":
		return Squashfs
	}
	return ""
}

// Checked is what an image was found to be.
type Checked struct {
	Volume
	SHA256 [32]byte // of the whole file
}

// Check reads the whole image, computes the hash tree and compares it with the
// one that is there. What differs anywhere is errs.Untrusted: the kernel would
// fail the read of that block. It does not say whether the root is the right
// one; the caller compares.
func Check(ctx context.Context, path string) (*Checked, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := check(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return c, nil
}

func check(ctx context.Context, f *os.File) (*Checked, error) {
	v, err := open(f)
	if err != nil {
		return nil, err
	}
	c := &Checked{Volume: *v}
	whole := sha256.New()
	r := contextReader{ctx, io.TeeReader(f, whole)}
	tree, root, err := HashTree(r, v.DataBlocks, v.Salt)
	if err != nil {
		return nil, err
	}
	rest := make([]byte, BlockSize+len(tree))
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, fmt.Errorf("it became shorter: %w", err)
	}
	if !bytes.Equal(rest[BlockSize:], tree) {
		return nil, fmt.Errorf("data and hash tree do not agree: %w", errs.Untrusted)
	}
	c.Root, c.SHA256 = root, [32]byte(whole.Sum(nil))
	return c, nil
}

// contextReader stops when the context ends.
type contextReader struct {
	ctx context.Context //nolint:containedctx // one reader is one call
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
