package artefact

import (
	"bytes"
	"compress/zlib"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"ringwall/internal/errs"
)

// squashDecoder decompresses blocks. What does not fit the capacity of the
// buffer is malformed.
type squashDecoder struct {
	into  func(src, dst []byte) ([]byte, error)
	close func()
}

func (d squashDecoder) block(src, dst []byte) ([]byte, error) {
	b, err := d.into(src, dst)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
	}
	return b, nil
}

func newSquashDecoder(compressor uint16) (squashDecoder, error) {
	switch compressor {
	case 1:
		return squashDecoder{into: streamDecoder(func(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) })}, nil
	case 2:
		return squashDecoder{into: streamDecoder(func(r io.Reader) (io.Reader, error) {
			return lzma.ReaderConfig{DictCap: 2 * squashMaxBlock}.NewReader(r)
		})}, nil
	case 4:
		return squashDecoder{into: streamDecoder(func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) })}, nil
	case 5:
		return squashDecoder{into: func(src, dst []byte) ([]byte, error) {
			n, err := lz4.UncompressBlock(src, dst[:cap(dst)])
			return dst[:max(n, 0)], err
		}}, nil
	case 6:
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*squashMaxBlock), zstd.WithDecoderMaxWindow(8<<20))
		if err != nil {
			return squashDecoder{}, err
		}
		return squashDecoder{close: z.Close, into: func(src, dst []byte) ([]byte, error) {
			b, err := z.DecodeAll(src, dst[:0])
			if err == nil && len(b) > cap(dst) {
				err = fmt.Errorf("more than %d bytes", cap(dst))
			}
			return b, err
		}}, nil
	}
	return squashDecoder{}, fmt.Errorf("compressor %d (lzo is 3); unpack it with unsquashfs and give the directory: %w", compressor, errs.Unsupported)
}

func streamDecoder(open func(io.Reader) (io.Reader, error)) func(src, dst []byte) ([]byte, error) {
	return func(src, dst []byte) ([]byte, error) {
		r, err := open(bytes.NewReader(src))
		if err != nil {
			return nil, err
		}
		dst = dst[:cap(dst)]
		n, err := io.ReadFull(r, dst)
		switch err { //nolint:errorlint // ReadFull returns these as they are
		case io.EOF, io.ErrUnexpectedEOF:
			return dst[:n], nil
		case nil:
			var more [1]byte
			if k, _ := r.Read(more[:]); k > 0 {
				return nil, fmt.Errorf("more than %d bytes", len(dst))
			}
			return dst, nil
		}
		return nil, err
	}
}
