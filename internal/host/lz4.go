package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"ringwall/internal/errs"
)

const (
	lz4Magic  = 0x184D2204
	lz4Window = 64 << 10
)

// lz4Reader decodes LZ4 frames (the LZ4 frame and block format descriptions),
// which is how apt keeps its indices when Acquire::GzipIndexes is set. It skips
// the frame's own checksums: whoever reads an index compares its SHA-256.
type lz4Reader struct {
	in     io.Reader
	err    error
	open   bool // within a frame
	flags  byte
	max    int // bytes that a block may decode to
	src    []byte
	buf    []byte // window and the current block
	unread []byte // of buf
}

func newLZ4Reader(r io.Reader) io.Reader { return &lz4Reader{in: r} }

func (l *lz4Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(l.unread) == 0 {
		if l.err == nil {
			l.err = l.next()
		}
		if l.err != nil {
			return 0, l.err
		}
	}
	n := copy(p, l.unread)
	l.unread = l.unread[n:]
	return n, nil
}

// next decodes a block, or reads the head or the end of a frame.
func (l *lz4Reader) next() error {
	if !l.open {
		return l.head()
	}
	size, err := l.word()
	if err != nil {
		return err
	}
	if size == 0 {
		l.open, l.buf = false, l.buf[:0]
		if l.flags&0x04 != 0 {
			_, err = l.word() // checksum of the content
		}
		return err
	}
	plain := size>>31 != 0
	n := int(size &^ (1 << 31))
	if n > l.max {
		return fmt.Errorf("lz4: block of %d bytes: %w", n, errs.Invalid)
	}
	if _, err := io.ReadFull(l.in, l.src[:n]); err != nil {
		return lz4Cut(err)
	}
	if l.flags&0x10 != 0 {
		if _, err := l.word(); err != nil { // checksum of the block
			return err
		}
	}
	keep := 0
	if l.flags&0x20 == 0 { // blocks refer to earlier ones
		keep = min(len(l.buf), lz4Window)
	}
	copy(l.buf, l.buf[len(l.buf)-keep:])
	l.buf = l.buf[:keep]
	if plain {
		l.buf = append(l.buf, l.src[:n]...)
	} else if l.buf, err = lz4Block(l.buf, l.src[:n], keep+l.max); err != nil {
		return err
	}
	l.unread = l.buf[keep:]
	return nil
}

func (l *lz4Reader) head() error {
	var h [7]byte
	if _, err := io.ReadFull(l.in, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		return lz4Cut(err)
	}
	flags, block := h[4], int(h[5]>>4&7)
	if binary.LittleEndian.Uint32(h[:]) != lz4Magic || flags>>6 != 1 || flags&0x03 != 0 || block < 4 {
		return fmt.Errorf("lz4: frame head %x: %w", h, errs.Invalid)
	}
	if flags&0x08 != 0 { // size of the content; h[6] was its first byte
		var rest [8]byte
		if _, err := io.ReadFull(l.in, rest[:]); err != nil {
			return lz4Cut(err)
		}
	}
	l.open, l.flags, l.max = true, flags, 1<<(8+2*block)
	if len(l.src) < l.max {
		l.src = make([]byte, l.max)
		l.buf = make([]byte, 0, l.max+lz4Window)
	}
	return nil
}

func (l *lz4Reader) word() (uint32, error) {
	var b [4]byte
	if _, err := io.ReadFull(l.in, b[:]); err != nil {
		return 0, lz4Cut(err)
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

func lz4Cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("lz4: cut short: %w", errs.Invalid)
	}
	return err
}

// lz4Block appends what src decodes to; dst may hold earlier output that src
// refers to. The result is never longer than limit.
func lz4Block(dst, src []byte, limit int) ([]byte, error) {
	bad := func() ([]byte, error) { return dst, fmt.Errorf("lz4: malformed block: %w", errs.Invalid) }
	// length reads the bytes that follow a length of 15.
	length := func(n int) (int, bool) {
		if n != 15 {
			return n, true
		}
		for len(src) > 0 && n <= limit {
			c := src[0]
			src = src[1:]
			n += int(c)
			if c != 255 {
				return n, true
			}
		}
		return 0, false
	}
	for len(src) > 0 {
		token := src[0]
		src = src[1:]
		n, ok := length(int(token >> 4))
		if !ok || n > len(src) || len(dst)+n > limit {
			return bad()
		}
		dst = append(dst, src[:n]...)
		if src = src[n:]; len(src) == 0 {
			return dst, nil // the last sequence has no match
		}
		if len(src) < 2 {
			return bad()
		}
		back := int(binary.LittleEndian.Uint16(src))
		src = src[2:]
		n, ok = length(int(token & 15))
		if n += 4; !ok || back == 0 || back > len(dst) || len(dst)+n > limit {
			return bad()
		}
		for n > 0 { // a match may overlap what it makes
			c := min(n, back)
			from := len(dst) - back
			dst = append(dst, dst[from:from+c]...)
			n -= c
		}
	}
	return bad()
}
