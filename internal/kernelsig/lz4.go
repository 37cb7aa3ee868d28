package kernelsig

import (
	"encoding/binary"
	"fmt"

	"ringwall/internal/errs"
)

// Debian's older kernels are in LZ4's legacy frames (lz4's
// doc/lz4_Frame_format.md): a magic, then blocks that each begin with their
// size and decompress, on their own, to at most 8 MiB.
const (
	lz4Legacy = "\x02\x21\x4c\x18"
	lz4Block  = 8 << 20
)

// unlz4 decompresses legacy frames into at most limit bytes.
func unlz4(b []byte, limit int) ([]byte, error) {
	bad := func(s string) error { return fmt.Errorf("lz4: %s: %w", s, errs.Invalid) }
	b = b[len(lz4Legacy):]
	out := make([]byte, 0, min(limit, 8*len(b)))
	for len(b) > 0 {
		if len(b) < 4 {
			return nil, bad("block is cut")
		}
		n := binary.LittleEndian.Uint32(b)
		b = b[4:]
		if n == 0 || uint64(n) > uint64(len(b)) {
			return nil, bad("block's size")
		}
		var ok bool
		if out, ok = lz4Decode(out, b[:n], min(limit-len(out), lz4Block)); !ok {
			return nil, bad("malformed, or more comes out than announced")
		}
		b = b[n:]
	}
	return out, nil
}

// lz4Decode appends what a block holds, at most room bytes.
func lz4Decode(out, b []byte, room int) ([]byte, bool) {
	start := len(out)
	// length reads the rest of a length that did not fit its four bits
	length := func(n int) (int, bool) {
		if n != 15 {
			return n, true
		}
		for len(b) > 0 && n <= lz4Block {
			c := b[0]
			b = b[1:]
			if n += int(c); c != 255 {
				return n, true
			}
		}
		return 0, false
	}
	for len(b) > 0 {
		token := int(b[0])
		b = b[1:]
		n, ok := length(token >> 4)
		if !ok || n > len(b) || len(out)-start+n > room {
			return nil, false
		}
		out, b = append(out, b[:n]...), b[n:]
		if len(b) == 0 {
			return out, true // the last sequence has no match
		}
		if len(b) < 2 {
			return nil, false
		}
		back := int(binary.LittleEndian.Uint16(b))
		b = b[2:]
		if n, ok = length(token & 15); !ok {
			return nil, false
		}
		n += 4
		if back == 0 || back > len(out)-start || len(out)-start+n > room {
			return nil, false
		}
		for from := len(out) - back; n > 0; { // what is copied may be what was just written
			part := min(n, len(out)-from)
			out = append(out, out[from:from+part]...)
			from, n = from+part, n-part
		}
	}
	return out, true
}
