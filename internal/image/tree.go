package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"ringwall/internal/errs"
)

// The only form that is made and read: version 1, SHA-256, blocks of 4 KiB
// (the kernel's admin-guide/device-mapper/verity; the superblock is
// cryptsetup's).
const (
	BlockSize  = 4096
	digestSize = sha256.Size
	perBlock   = BlockSize / digestSize
	maxSalt    = 256
	maxBlocks  = 1 << 28 // 1 TiB
	magic      = "verity\x00\x00"
	saltAt     = 88
)

// HashTree reads blocks of data and returns the hash tree over them, top level
// first, as it lies behind the superblock, and the root hash. Memory is that of
// the tree: 1/127 of the data.
func HashTree(data io.Reader, blocks uint64, salt []byte) (tree []byte, root [32]byte, err error) {
	if blocks == 0 || blocks > maxBlocks || len(salt) > maxSalt {
		return nil, root, fmt.Errorf("hash tree: %d blocks, salt of %d bytes: %w", blocks, len(salt), errs.Invalid)
	}
	level := make([]byte, 0, blocks*digestSize)
	buf := make([]byte, len(salt)+256*BlockSize)
	for left := blocks; left > 0; {
		n := int(min(left, 256))
		part := buf[len(salt) : len(salt)+n*BlockSize]
		if _, err := io.ReadFull(data, part); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("the data is shorter than %d blocks: %w", blocks, errs.Invalid)
			}
			return nil, root, fmt.Errorf("hash tree: %w", err)
		}
		level = appendDigests(level, part, salt)
		left -= uint64(n)
	}
	if blocks == 1 {
		return nil, [32]byte(level), nil
	}
	var levels [][]byte
	for {
		if n := len(level) % BlockSize; n != 0 {
			level = append(level, make([]byte, BlockSize-n)...)
		}
		levels = append(levels, level)
		if len(level) == BlockSize {
			break
		}
		level = appendDigests(make([]byte, 0, len(level)/perBlock), level, salt)
	}
	root = [32]byte(appendDigests(nil, level, salt))
	for _, l := range slices.Backward(levels) {
		tree = append(tree, l...)
	}
	return tree, root, nil
}

// appendDigests appends the digest of each block, salt first.
func appendDigests(out, blocks, salt []byte) []byte {
	h := sha256.New()
	for len(blocks) > 0 {
		h.Reset()
		_, _ = h.Write(salt) // never fails
		_, _ = h.Write(blocks[:BlockSize])
		out = h.Sum(out)
		blocks = blocks[BlockSize:]
	}
	return out
}

// treeBlocks is the size of the tree over so many blocks of data.
func treeBlocks(data uint64) uint64 {
	var sum uint64
	for n := data; n > 1; {
		n = (n + perBlock - 1) / perBlock
		sum += n
	}
	return sum
}

// superblock is one block with what describes the tree behind it.
type superblock struct {
	uuid   [16]byte
	blocks uint64
	salt   []byte
}

func (s superblock) encode() []byte {
	b := make([]byte, BlockSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], 1)  // version of the superblock
	le.PutUint32(b[12:], 1) // hash type: salt before data
	copy(b[16:32], s.uuid[:])
	copy(b[32:64], "sha256")
	le.PutUint32(b[64:], BlockSize)
	le.PutUint32(b[68:], BlockSize)
	le.PutUint64(b[72:], s.blocks)
	le.PutUint16(b[80:], uint16(len(s.salt))) //nolint:gosec // at most 256
	copy(b[saltAt:], s.salt)
	return b
}

// parseSuperblock reads what encode writes, and nothing that differs in a way
// that matters: the rest of the block must be zero, so that two images with the
// same root are the same file.
func parseSuperblock(b []byte) (superblock, error) {
	var s superblock
	if len(b) != BlockSize || !bytes.HasPrefix(b, []byte(magic)) {
		return s, fmt.Errorf("no verity superblock: %w", errs.Invalid)
	}
	n := binary.LittleEndian.Uint16(b[80:])
	if n > maxSalt {
		return s, fmt.Errorf("verity superblock: salt of %d bytes: %w", n, errs.Invalid)
	}
	s = superblock{uuid: [16]byte(b[16:32]), blocks: binary.LittleEndian.Uint64(b[72:]), salt: bytes.Clone(b[saltAt : saltAt+int(n)])}
	if !bytes.Equal(s.encode(), b) {
		return s, fmt.Errorf("verity superblock is not version 1, SHA-256, blocks of 4 KiB: %w", errs.Unsupported)
	}
	return s, nil
}
