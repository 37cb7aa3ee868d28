package artefact

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"

	"ringwall/internal/codesign"
	"ringwall/internal/errs"
)

// Bounds of what comes out of compressed bytes. They are those of
// codesign.Decompress, for the formats that only this package reads.
const (
	maxRatio  = 250
	ratioFree = 64 << 20 // bytes that may come out before the ratio counts
	maxTotal  = 256 << 30
)

// decompress is codesign.Decompress and two formats more, which kernels take an
// initramfs in and rpm has its payload in: lz4 (frames and the old form) and lzma.
func decompress(r io.Reader) (io.ReadCloser, error) {
	in := &countReader{r: r}
	b := bufio.NewReaderSize(in, 4<<10)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read: %w", err)
	}
	has := func(magic string) bool { return len(head) >= len(magic) && string(head[:len(magic)]) == magic }
	switch {
	case has("\x04\x22\x4d\x18"), has("\x02\x21\x4c\x18"):
		return &bounded{r: lz4.NewReader(b), in: in}, nil
	case has("\x5d\x00\x00"):
		// The window is the file's to choose; pages of it are only touched as far
		// as output comes.
		l, err := lzma.ReaderConfig{DictCap: 64 << 20}.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
		}
		return &bounded{r: l, in: in}, nil
	}
	return codesign.Decompress(b)
}

type countReader struct {
	r   io.Reader
	n   int64
	err error // other than io.EOF
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

// bounded fails when too much comes out for what went in.
type bounded struct {
	r   io.Reader
	in  *countReader
	out int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.out += int64(n)
	switch {
	case b.out > maxTotal || b.out > ratioFree+maxRatio*b.in.n:
		return 0, fmt.Errorf("decompresses to more than %d times its size: %w", maxRatio, errs.Invalid)
	case err == nil || errors.Is(err, io.EOF):
		return n, err
	case b.in.err != nil:
		return n, b.in.err
	}
	return n, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
}

func (b *bounded) Close() error { return nil }
