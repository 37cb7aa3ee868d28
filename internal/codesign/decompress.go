package codesign

import (
	"bufio"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"ringwall/internal/errs"
)

// Compression names a compression by its magic: "gz", "xz", "zst", "bz2",
// or nothing. Six bytes are enough.
func Compression(head []byte) string {
	has := func(m string) bool { return len(head) >= len(m) && string(head[:len(m)]) == m }
	switch {
	case has("\x1f\x8b"):
		return "gz"
	case has("\xfd7zXZ\x00"):
		return "xz"
	case has("\x28\xb5\x2f\xfd"):
		return "zst"
	case has("BZh"):
		return "bz2"
	}
	return ""
}

// Decompress returns the content of r, whatever of the formats that Compression
// knows it is in; anything else comes out as it is. What is malformed, or grows
// beyond the bounds of ratio and size, reads as errs.Invalid.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	d, err := decompress(r)
	if err != nil {
		return nil, err
	}
	return d, nil
}

// decompress returns the content of r, whatever of the known formats it is in,
// bounded in ratio and size.
func decompress(r io.Reader) (*ratioReader, error) {
	in := NewInput(r)
	b := bufio.NewReaderSize(in, 64<<10)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read: %w", err)
	}
	l := &ratioReader{in: in}
	switch Compression(head) {
	case "gz":
		l.r, err = gzip.NewReader(b)
	case "xz":
		// The library takes the dictionary size from the file; pages of it
		// are only touched as far as output is produced, which is bounded.
		l.r, err = xz.NewReader(b)
	case "zst":
		var d *zstd.Decoder
		d, err = zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err == nil {
			l.r, l.close = d, d.Close
		}
	case "bz2":
		l.r = bzip2.NewReader(b)
	default:
		l.r, l.plain = b, true
	}
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
	}
	return l, nil
}

// Input counts what a decompressor takes, and keeps the error of reading it.
type Input struct {
	r   io.Reader
	n   int64
	err error // other than io.EOF
}

// NewInput returns an Input that reads from r.
func NewInput(r io.Reader) *Input { return &Input{r: r} }

// Count is the number of bytes taken so far.
func (c *Input) Count() int64 { return c.n }

// Bound returns what a decompressor makes of the input, and fails when too much
// comes out for what went in. An error of the decompressor is errs.Invalid, one
// of reading its input is itself.
func (c *Input) Bound(decompressed io.Reader) io.ReadCloser {
	return &ratioReader{r: decompressed, in: c}
}

// Read implements io.Reader.
func (c *Input) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}

// ratioReader fails when too much comes out for what went in.
type ratioReader struct {
	r     io.Reader
	in    *Input
	out   int64
	plain bool
	close func()
}

func (l *ratioReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.out += int64(n)
	if l.out > MaxTotal || (!l.plain && l.out > RatioFree+MaxRatio*l.in.n) {
		return 0, fmt.Errorf("decompresses to more than %d times its size: %w", MaxRatio, errs.Invalid)
	}
	return n, l.blame(err)
}

// blame tells a failure to read from input that is malformed.
func (l *ratioReader) blame(err error) error {
	switch {
	case err == nil || errors.Is(err, io.EOF) || errors.Is(err, errs.Invalid):
		return err
	case l.in.err != nil:
		return l.in.err
	}
	return fmt.Errorf("%w: %w", err, errs.Invalid)
}

// memberReader reads one member of a tar archive.
type memberReader struct {
	r     io.Reader
	blame func(error) error
}

func (m memberReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	return n, m.blame(err)
}

func (l *ratioReader) Close() error {
	if l.close != nil {
		l.close()
	}
	return nil
}
