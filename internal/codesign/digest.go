package codesign

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"

	"ringwall/internal/integrity"
)

// verityBlock is fs-verity's block size; 128 digests fill one.
const verityBlock = 4096

// Hasher computes, in one pass, the two identities that the kernel may know a
// file by: SHA-256 of its content and its fs-verity file digest (SHA-256, 4 KiB
// blocks, no salt), as FS_IOC_MEASURE_VERITY gives it. The zero value is not
// usable; see NewHasher.
type Hasher struct {
	flat   hash.Hash
	size   uint64
	levels []verityLevel
}

type verityLevel struct {
	fill  int
	count int // digests given to the level above
	block [verityBlock]byte
}

// NewHasher returns an empty Hasher.
func NewHasher() *Hasher {
	return &Hasher{flat: sha256.New(), levels: make([]verityLevel, 1, 4)}
}

// Reset makes the Hasher empty again.
func (h *Hasher) Reset() {
	h.flat.Reset()
	h.size, h.levels = 0, h.levels[:1]
	h.levels[0].fill, h.levels[0].count = 0, 0
}

// Write adds content; it never fails.
func (h *Hasher) Write(p []byte) (int, error) {
	n := len(p)
	h.flat.Write(p)
	h.size += uint64(n)
	for len(p) > 0 {
		l := &h.levels[0]
		if l.fill == 0 && len(p) >= verityBlock { // straight from the caller's buffer
			h.up(0, sha256.Sum256(p[:verityBlock]))
			p = p[verityBlock:]
			continue
		}
		k := copy(l.block[l.fill:], p)
		l.fill += k
		p = p[k:]
		if l.fill == verityBlock {
			l.fill = 0
			h.up(0, sha256.Sum256(l.block[:]))
		}
	}
	return n, nil
}

// up hands a block's digest from a level to the one above.
func (h *Hasher) up(level int, d [32]byte) {
	for {
		h.levels[level].count++
		level++
		if level == len(h.levels) {
			h.levels = append(h.levels, verityLevel{})
			h.levels[level].fill, h.levels[level].count = 0, 0
		}
		l := &h.levels[level]
		l.fill += copy(l.block[l.fill:], d[:])
		if l.fill < verityBlock {
			return
		}
		l.fill = 0
		d = sha256.Sum256(l.block[:])
	}
}

// Sums returns both digests. The Hasher must be Reset before it is used again.
func (h *Hasher) Sums() (content, verity integrity.Digest) {
	h.flat.Sum(content[:0])
	var root [32]byte
	for i := 0; h.size > 0; i++ {
		l := &h.levels[i]
		if l.fill > 0 {
			clear(l.block[l.fill:])
			l.fill = 0
			root = sha256.Sum256(l.block[:])
			h.up(i, root)
		}
		if h.levels[i].count == 1 {
			copy(root[:], h.levels[i+1].block[:32])
			break
		}
	}
	// struct fsverity_descriptor, version 1
	var desc [256]byte
	desc[0], desc[1], desc[2] = 1, 1, 12
	binary.LittleEndian.PutUint64(desc[8:], h.size)
	copy(desc[16:], root[:])
	return content, sha256.Sum256(desc[:])
}
