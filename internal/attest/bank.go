package attest

import (
	"crypto/sha1" //nolint:gosec // a PCR bank that old logs have; no trust is put into it
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"slices"
	"strings"

	"ringwall/internal/errs"
)

// Alg is a hash algorithm by its TCG identifier (TCG Algorithm Registry).
type Alg uint16

// The algorithms that can be computed here.
const (
	SHA1   Alg = 0x0004
	SHA256 Alg = 0x000b
	SHA384 Alg = 0x000c
	SHA512 Alg = 0x000d
)

// String gives the name that the kernel and systemd use.
func (a Alg) String() string {
	switch a {
	case SHA1:
		return "sha1"
	case SHA256:
		return "sha256"
	case SHA384:
		return "sha384"
	case SHA512:
		return "sha512"
	}
	return fmt.Sprintf("alg(%#04x)", uint16(a))
}

// ParseAlg is the inverse of String.
func ParseAlg(name string) (Alg, error) {
	for _, a := range []Alg{SHA1, SHA256, SHA384, SHA512} {
		if a.String() == name {
			return a, nil
		}
	}
	return 0, fmt.Errorf("hash algorithm %.20q: %w", name, errs.Invalid)
}

// Size is the digest's length in bytes; 0 for an algorithm that is not known.
func (a Alg) Size() int {
	switch a {
	case SHA1:
		return sha1.Size
	case SHA256:
		return sha256.Size
	case SHA384:
		return sha512.Size384
	case SHA512:
		return sha512.Size
	}
	return 0
}

// quotable: strong enough to attest with. SHA-1 is read in logs, never relied on.
func (a Alg) quotable() bool { return a == SHA256 || a == SHA384 || a == SHA512 }

func (a Alg) new() hash.Hash {
	switch a {
	case SHA256:
		return sha256.New()
	case SHA384:
		return sha512.New384()
	case SHA512:
		return sha512.New()
	}
	return sha1.New() //nolint:gosec // see above; callers have checked Size
}

// sum hashes the parts one after the other.
func (a Alg) sum(parts ...[]byte) []byte {
	h := a.new()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// parseDigest reads "sha256:hex".
func parseDigest(s string) (Alg, []byte, error) {
	name, text, _ := strings.Cut(s, ":")
	a, err := ParseAlg(name)
	if err != nil {
		return 0, nil, err
	}
	d, err := hex.DecodeString(text)
	if err != nil || len(d) != a.Size() || strings.ToLower(text) != text {
		return 0, nil, fmt.Errorf("digest %.150q: not %s in lower-case hexadecimal: %w", s, a, errs.Invalid)
	}
	return a, d, nil
}

// FormatDigest gives "sha256:hex", the form of digests in policies and results.
func FormatDigest(a Alg, d []byte) string { return a.String() + ":" + hex.EncodeToString(d) }

// PCRs of a PC client (TCG PC Client Platform TPM Profile): 24, of which 17 to
// 22 belong to a dynamic launch and start with every bit set.
const (
	NumPCRs  = 24
	firstDRT = 17
	lastDRT  = 22
	pcrIMA   = 10
	pcrUKI   = 11
)

// Bank is the values of all PCRs of one algorithm. The zero Bank is not valid.
type Bank struct {
	Alg    Alg
	Values [NumPCRs][]byte
}

// PowerOn returns the values after a power-on: zeros, ones for a dynamic
// launch's PCRs, and in PCR 0 the locality that the TPM was started from.
func PowerOn(a Alg, locality byte) *Bank {
	b := &Bank{Alg: a}
	for i := range b.Values {
		b.Values[i] = make([]byte, a.Size())
		if i >= firstDRT && i <= lastDRT {
			for j := range b.Values[i] {
				b.Values[i][j] = 0xff
			}
		}
	}
	b.Values[0][a.Size()-1] = locality
	return b
}

// Extend is what TPM2_PCR_Extend does.
func (b *Bank) Extend(pcr int, digest []byte) {
	b.Values[pcr] = b.Alg.sum(b.Values[pcr], digest)
}

// Clone copies the bank.
func (b *Bank) Clone() *Bank {
	c := *b
	for i := range c.Values {
		c.Values[i] = slices.Clone(c.Values[i])
	}
	return &c
}

// NewBank makes a bank of values that somebody sent: as many as there are
// PCRs, each of the algorithm's length.
func NewBank(a Alg, values [][]byte) (*Bank, error) {
	if a.Size() == 0 {
		return nil, malformed("bank %v", a)
	}
	if len(values) != NumPCRs {
		return nil, malformed("%d PCR values (want %d)", len(values), NumPCRs)
	}
	b := &Bank{Alg: a}
	for i, v := range values {
		if len(v) != a.Size() {
			return nil, malformed("PCR %d has %d bytes (%s has %d)", i, len(v), a, a.Size())
		}
		b.Values[i] = v
	}
	return b, nil
}
