package attest

import "encoding/binary"

// cursor reads fixed-width fields from the front of b. After the first read
// past the end ok is false and every read gives zero: callers check once.
type cursor struct {
	b     []byte
	order binary.ByteOrder
	short bool
}

func littleEndian(b []byte) cursor { return cursor{b: b, order: binary.LittleEndian} }
func bigEndian(b []byte) cursor    { return cursor{b: b, order: binary.BigEndian} }

// bytes takes the next n bytes; they alias the input.
func (c *cursor) bytes(n uint64) []byte {
	if n > uint64(len(c.b)) {
		c.short, c.b = true, nil
		return nil
	}
	out := c.b[:n:n]
	c.b = c.b[n:]
	return out
}

func (c *cursor) u8() byte {
	b := c.bytes(1)
	if b == nil {
		return 0
	}
	return b[0]
}

func (c *cursor) u16() uint16 {
	b := c.bytes(2)
	if b == nil {
		return 0
	}
	return c.order.Uint16(b)
}

func (c *cursor) u32() uint32 {
	b := c.bytes(4)
	if b == nil {
		return 0
	}
	return c.order.Uint32(b)
}

func (c *cursor) u64() uint64 {
	b := c.bytes(8)
	if b == nil {
		return 0
	}
	return c.order.Uint64(b)
}

// sized16 takes a TPM2B: a 16-bit length and as many bytes.
func (c *cursor) sized16() []byte { return c.bytes(uint64(c.u16())) }

// sized32 takes a 32-bit length and as many bytes.
func (c *cursor) sized32() []byte { return c.bytes(uint64(c.u32())) }

// done: everything was there and nothing is left.
func (c *cursor) done() bool { return !c.short && len(c.b) == 0 }

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
