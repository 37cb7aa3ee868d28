package kernelsig

import (
	"bytes"
	"encoding/binary"
	"errors"
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

// unxz decompresses, to at most limit bytes.
func unxz(b []byte, limit int) (io.Reader, error) {
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
	if x86 {
		return &x86Reader{r: limited(r, limit)}, nil
	}
	return limited(r, limit), nil
}

// xzNumber reads a multibyte integer; nil: there is none.
func xzNumber(b []byte) (n uint64, rest []byte) {
	n, size := binary.Uvarint(b)
	if size <= 0 {
		return 0, nil
	}
	return n, b[size:]
}

// limited reads to the end of r, which must come within limit bytes. Its errors
// are errs.Invalid.
func limited(r io.Reader, limit int) io.Reader {
	return &limitedReader{r: io.LimitReader(r, int64(limit)+1), limit: limit}
}

type limitedReader struct {
	r        io.Reader
	n, limit int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.n += n; l.n > l.limit {
		return 0, fmt.Errorf("decompress: more than %d bytes come out: %w", l.limit, errs.Invalid)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
	}
	return n, err
}

// x86Reader turns the absolute targets of calls and jumps back into relative
// ones (the "BCJ x86" filter of xz).
type x86Reader struct {
	r        io.Reader
	err      error // of r
	buf      []byte
	from, to int    // of buf: filtered, and not yet read
	base     uint32 // place of buf in the whole
	prevMask uint32
	prev     int // the last opcode's place, in buf
}

// Read implements io.Reader.
func (x *x86Reader) Read(p []byte) (int, error) {
	for x.from == x.to {
		if x.err != nil {
			return 0, x.err
		}
		if x.buf == nil {
			x.buf, x.prev = make([]byte, 0, 64<<10), -x86Far
		}
		rest := copy(x.buf, x.buf[x.to:])
		x.prev, x.base = max(x.prev-x.to, -x86Far), x.base+uint32(x.to) //nolint:gosec // a buffer's length
		var n int
		n, x.err = x.r.Read(x.buf[rest:cap(x.buf)])
		x.buf = x.buf[:rest+n]
		x.from, x.to = 0, x.filter()
		if x.err != nil {
			x.to = len(x.buf) // too short for an instruction
		}
	}
	n := copy(p, x.buf[x.from:x.to])
	x.from += n
	return n, nil
}

const x86Far = 8 // from here on an opcode before does not matter

// filter works on buf, in place, and returns up to where.
func (x *x86Reader) filter() int {
	const maskOK, maskNumber = 0b10111, "\x00\x01\x02\x02\x03\x03\x03\x03"
	outer := func(c byte) bool { return c == 0 || c == 0xff }
	b, i := x.buf, 0
	for ; i < len(b)-4; i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		if d := i - x.prev; d <= 3 {
			x.prevMask = x.prevMask << (d - 1) & 7
			if x.prevMask != 0 {
				c := b[i+4-int(maskNumber[x.prevMask])]
				if maskOK>>x.prevMask&1 == 0 || outer(c) {
					x.prev = i
					x.prevMask = x.prevMask<<1 | 1
					continue
				}
			}
		} else {
			x.prevMask = 0
		}
		x.prev = i
		if !outer(b[i+4]) {
			x.prevMask = x.prevMask<<1 | 1
			continue
		}
		src := binary.LittleEndian.Uint32(b[i+1:])
		var dest uint32
		for {
			dest = src - (x.base + uint32(i+5))
			if x.prevMask == 0 {
				break
			}
			j := uint32(maskNumber[x.prevMask]) * 8
			if !outer(byte(dest >> (24 - j) & 0xff)) {
				break
			}
			src = dest ^ (1<<(32-j) - 1)
		}
		dest = dest&0x01ffffff | -(dest & 0x01000000)
		binary.LittleEndian.PutUint32(b[i+1:], dest)
		i += 4
	}
	return i
}
