package kernelsig

import "io"

// Decompress reads what a kernel is compressed with: the bytes and then the
// size of what comes out.
func Decompress(b []byte) ([]byte, error) {
	r, err := decompress(b)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}
