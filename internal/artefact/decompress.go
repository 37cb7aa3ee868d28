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

// decompress is codesign.Decompress and two formats more, which kernels take an
// initramfs in and rpm has its payload in: lz4 (frames and the old form) and lzma.
func decompress(r io.Reader) (io.ReadCloser, error) {
	in := codesign.NewInput(r)
	b := bufio.NewReaderSize(in, 4<<10)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read: %w", err)
	}
	has := func(magic string) bool { return len(head) >= len(magic) && string(head[:len(magic)]) == magic }
	switch {
	case has("\x04\x22\x4d\x18"), has("\x02\x21\x4c\x18"):
		return in.Bound(lz4.NewReader(b)), nil
	case has("\x5d\x00\x00"):
		// The window is the file's to choose; pages of it are only touched as far
		// as output comes.
		l, err := lzma.ReaderConfig{DictCap: 64 << 20}.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("decompress: %w: %w", err, errs.Invalid)
		}
		return in.Bound(l), nil
	}
	return codesign.Decompress(b)
}
