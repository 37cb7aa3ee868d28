package attest

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// guid is an EFI GUID in its bytes of memory.
type guid [16]byte

// String gives the usual form with hyphens.
func (g guid) String() string {
	le := littleEndian(g[:])
	return fmt.Sprintf("%08x-%04x-%04x-%s-%s", le.u32(), le.u16(), le.u16(), hex.EncodeToString(g[8:10]), hex.EncodeToString(g[10:]))
}

// GUIDs of the UEFI specification (3.3, 32.4.1, 32.6.1), and shim's own.
const (
	guidGlobal   = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	guidSecurity = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
	guidShim     = "605dab50-e046-4300-abb6-3dd810dd8b23"
	guidX509     = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"
	guidSHA256   = "c1c41626-504c-4092-aca9-41f936934328"
)

// Bounds of variables and signature databases: dbx is some 30 KiB today.
const (
	maxVariableName = 1024
	maxSignatures   = 1 << 16
)

// variable is a UEFI_VARIABLE_DATA (TCG PC Client Platform Firmware Profile,
// section 10.2.6).
type variable struct {
	GUID string
	Name string
	Data []byte
}

// is compares GUID and name.
func (v *variable) is(guid, name string) bool { return v.GUID == guid && v.Name == name }

func parseVariable(b []byte) (*variable, error) {
	c := littleEndian(b)
	var g guid
	copy(g[:], c.bytes(16))
	nameLen, dataLen := c.u64(), c.u64()
	if c.short || nameLen > maxVariableName {
		return nil, malformed("variable with a name of %d characters", nameLen)
	}
	raw := c.bytes(2 * nameLen)
	v := &variable{GUID: g.String(), Data: c.bytes(dataLen)}
	// shim before 15.3 counts the structure's size twice over: zeros follow
	const slack = 8
	if c.short || len(c.b) > slack || !allZero(c.b) {
		return nil, malformed("variable of %d bytes does not end where it says", len(b))
	}
	v.Name, _ = decodeUTF16(raw)
	if strings.ContainsRune(v.Name, 0) {
		return nil, malformed("variable whose name holds a NUL")
	}
	return v, nil
}

// signature is one entry of a signature database.
type signature struct {
	Type string // GUID of the kind
	Data []byte // a certificate in DER, a digest, …
}

// parseSignatures reads a sequence of EFI_SIGNATURE_LIST (UEFI specification,
// section 32.4.1).
func parseSignatures(b []byte) ([]signature, error) {
	var out []signature
	c := littleEndian(b)
	for len(c.b) > 0 {
		var kind guid
		copy(kind[:], c.bytes(16))
		listSize, headerSize, size := c.u32(), c.u32(), c.u32()
		const fixed = 28
		if c.short || listSize < fixed || size <= 16 {
			return nil, malformed("signature list of %d bytes with entries of %d", listSize, size)
		}
		body := littleEndian(c.bytes(uint64(listSize - fixed)))
		body.bytes(uint64(headerSize))
		if c.short || body.short || len(body.b)%int(size) != 0 {
			return nil, malformed("signature list of %d bytes does not hold whole entries of %d", listSize, size)
		}
		for len(body.b) > 0 {
			if len(out) == maxSignatures {
				return nil, tooLarge("signature database of more than %d entries", maxSignatures)
			}
			entry := body.bytes(uint64(size))
			out = append(out, signature{Type: kind.String(), Data: entry[16:]}) // behind the owner
		}
	}
	return out, nil
}

// id names an entry by SHA-256: of the certificate, or the digest that it is.
func (s *signature) id() string {
	if s.Type == guidSHA256 && len(s.Data) == SHA256.Size() {
		return FormatDigest(SHA256, s.Data)
	}
	return FormatDigest(SHA256, SHA256.sum(s.Data))
}
