package codesign

import (
	"crypto/sha256"
	"encoding"
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
	flat   hash.Hash // of whole blocks, unless paired
	paired bool      // both hashes by absorb
	state  [8]uint32 // of whole blocks, if paired
	size   uint64
	levels []verityLevel
}

// verityLevel is a level of the Merkle tree; the lowest buffers content.
type verityLevel struct {
	fill  int
	count int // digests given to the level above
	block [verityBlock]byte
}

// NewHasher returns an empty Hasher.
func NewHasher() *Hasher {
	h := &Hasher{flat: sha256.New(), paired: hasExtensions(), levels: make([]verityLevel, 1, 4)}
	h.Reset()
	return h
}

// Reset makes the Hasher empty again.
func (h *Hasher) Reset() {
	h.flat.Reset()
	h.state = initialState()
	h.size, h.levels = 0, h.levels[:1]
	h.levels[0].fill, h.levels[0].count = 0, 0
}

// initialState is SHA-256's (FIPS 180-4, 5.3.3).
func initialState() [8]uint32 {
	return [8]uint32{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}
}

// Write adds content; it never fails.
func (h *Hasher) Write(p []byte) (int, error) {
	n := len(p)
	h.size += uint64(n)
	for len(p) > 0 {
		l := &h.levels[0]
		if l.fill == 0 && len(p) >= verityBlock { // straight from the caller's buffer
			h.whole(p[:verityBlock])
			p = p[verityBlock:]
			continue
		}
		k := copy(l.block[l.fill:], p)
		l.fill += k
		p = p[k:]
		if l.fill == verityBlock {
			l.fill = 0
			h.whole(l.block[:])
		}
	}
	return n, nil
}

// whole takes in a block of verityBlock bytes.
func (h *Hasher) whole(p []byte) {
	if !h.paired {
		h.flat.Write(p)
		h.up(0, sha256.Sum256(p))
		return
	}
	alone := initialState()
	absorb(&h.state, &alone, p)
	// the end of a message of one block: a bit, zeros, the length in bits
	end, none := [64]byte{0: 0x80, 62: verityBlock * 8 >> 8}, [8]uint32{}
	absorb(&alone, &none, end[:])
	var d [32]byte
	for i, w := range alone {
		binary.BigEndian.PutUint32(d[4*i:], w)
	}
	h.up(0, d)
}

// content returns the SHA-256 of all that was written.
func (h *Hasher) content() (d integrity.Digest) {
	if h.paired {
		// the standard library's own form of a state: it does the end
		b := append(make([]byte, 0, 108), "sha\x03"...)
		for _, w := range h.state {
			b = binary.BigEndian.AppendUint32(b, w)
		}
		b = append(b, make([]byte, 64)...)
		b = binary.BigEndian.AppendUint64(b, h.size-uint64(h.levels[0].fill)) //nolint:gosec // less than a block
		if err := h.flat.(encoding.BinaryUnmarshaler).UnmarshalBinary(b); err != nil {
			panic(err) // the form is part of crypto/sha256's promise
		}
	}
	h.flat.Write(h.levels[0].block[:h.levels[0].fill])
	h.flat.Sum(d[:0])
	return d
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
	content = h.content()
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
