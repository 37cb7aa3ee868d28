package kernelsig

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/ulikunitz/xz/lzma"

	"ringwall/internal/errs"
)

// Kernel images are compressed by xz with its x86 filter, which general Go
// readers do not have. This reads just that: one stream, one block, LZMA2 with
// or without the filter (the .xz format 1.1.0, sections 2 and 5.3). Checksums
// are not verified: whoever made the image could have made them too.
const (
	xzHeader    = 12
	xzX86       = 0x04
	xzLZMA2     = 0x21
	maxXZDict   = 64 << 20
	xzFlagSizes = 0xc0
)

// unxz decompresses into at most limit bytes.
func unxz(b []byte, limit int) ([]byte, error) {
	bad := func(s string) error { return fmt.Errorf("xz: %s: %w", s, errs.Invalid) }
	if len(b) < xzHeader+8 || !bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")) {
		return nil, bad("no stream header")
	}
	b = b[xzHeader:]
	size := (int(b[0]) + 1) * 4 // of the block's header, with its CRC
	if b[0] == 0 || size > len(b) {
		return nil, bad("block header")
	}
	head := b[1 : size-4]
	flags := head[0]
	head = head[1:]
	if flags&^(xzFlagSizes|1) != 0 {
		return nil, bad("block flags")
	}
	if flags&0x40 != 0 {
		if _, head = xzNumber(head); head == nil {
			return nil, bad("size")
		}
	}
	if flags&0x80 != 0 {
		if _, head = xzNumber(head); head == nil {
			return nil, bad("size")
		}
	}
	x86 := flags&1 != 0
	if x86 {
		if len(head) < 2 || head[0] != xzX86 || head[1] != 0 {
			return nil, fmt.Errorf("xz: filter %#x: %w", head, errs.Unsupported)
		}
		head = head[2:]
	}
	if len(head) < 3 || head[0] != xzLZMA2 || head[1] != 1 {
		return nil, fmt.Errorf("xz: last filter is not LZMA2: %w", errs.Unsupported)
	}
	dict := uint64(2|head[2]&1) << (min(head[2], 39)/2 + 11)
	// No distance is longer than what comes out.
	dict = max(min(dict, uint64(limit), maxXZDict), lzma.MinDictCap) //nolint:gosec // not negative
	r, err := lzma.Reader2Config{DictCap: int(dict)}.NewReader2(bytes.NewReader(b[size:]))
	if err != nil {
		return nil, fmt.Errorf("xz: %w: %w", err, errs.Invalid)
	}
	out, err := readLimited(r, limit)
	if err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	if x86 {
		x86Filter(out)
	}
	return out, nil
}

// xzNumber reads a multibyte integer; nil: there is none.
func xzNumber(b []byte) (n uint64, rest []byte) {
	n, size := binary.Uvarint(b)
	if size <= 0 {
		return 0, nil
	}
	return n, b[size:]
}

// readLimited reads to the end, which must come within limit bytes.
func readLimited(r io.Reader, limit int) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
	}
	if len(out) > limit {
		return nil, fmt.Errorf("more than %d bytes come out: %w", limit, errs.Invalid)
	}
	return out, nil
}

// x86Filter turns the absolute targets of calls and jumps back into relative
// ones, in place (the "BCJ x86" filter of xz).
func x86Filter(b []byte) {
	const maskOK, maskNumber = 0b10111, "\x00\x01\x02\x02\x03\x03\x03\x03"
	outer := func(c byte) bool { return c == 0 || c == 0xff }
	prevMask, prev := uint32(0), -1 // prev: the last opcode's place
	if len(b) <= 4 {
		return
	}
	for i := 0; i < len(b)-4; i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		if d := i - prev; prev >= 0 && d <= 3 {
			prevMask = prevMask << (d - 1) & 7
			if prevMask != 0 {
				c := b[i+4-int(maskNumber[prevMask])]
				if maskOK>>prevMask&1 == 0 || outer(c) {
					prev = i
					prevMask = prevMask<<1 | 1
					continue
				}
			}
		} else {
			prevMask = 0
		}
		prev = i
		if !outer(b[i+4]) {
			prevMask = prevMask<<1 | 1
			continue
		}
		src := binary.LittleEndian.Uint32(b[i+1:])
		var dest uint32
		for {
			dest = src - uint32(i+5)
			if prevMask == 0 {
				break
			}
			j := uint32(maskNumber[prevMask]) * 8
			if !outer(byte(dest >> (24 - j) & 0xff)) {
				break
			}
			src = dest ^ (1<<(32-j) - 1)
		}
		dest = dest&0x01ffffff | -(dest & 0x01000000)
		binary.LittleEndian.PutUint32(b[i+1:], dest)
		i += 4
	}
}
