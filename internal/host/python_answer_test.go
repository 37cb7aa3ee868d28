package host

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"ringwall/internal/errs"
)

func TestReadAnswer(t *testing.T) {
	for in, want := range map[string]error{
		"\x00\x00\x00\x00\x02ok": nil, "\x01\x00\x00\x00\x03why": errs.Invalid, "\x00\x00\x00\x00\x03ok": io.ErrUnexpectedEOF, "\x00\x00": io.ErrUnexpectedEOF,
	} {
		if b, err := readAnswer(bytes.NewReader([]byte(in))); !errors.Is(err, want) || err == nil && string(b) != "ok" {
			t.Errorf("%q: %q, %v", in, b, err)
		}
	}
	for _, in := range []string{"\x02\x00\x00\x00\x00", "\x00\xff\xff\xff\xff"} {
		if _, err := readAnswer(bytes.NewReader([]byte(in))); err == nil || errors.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzReadAnswer(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x02ok"))
	f.Add([]byte("\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if b, err := readAnswer(bytes.NewReader(in)); err == nil && len(b) > len(in)-5 {
			t.Errorf("%d bytes of %d", len(b), len(in))
		}
	})
}
