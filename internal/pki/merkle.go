package pki

import (
	"crypto/sha256"
	"fmt"
	"math/bits"

	"ringwall/internal/errs"
)

// LeafHash is the hash of an entry of a log (RFC 6962, 2.1).
func LeafHash(entry []byte) [32]byte {
	return sha256.Sum256(append([]byte{0}, entry...))
}

func nodeHash(left, right [32]byte) [32]byte {
	var b [65]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[33:], right[:])
	return sha256.Sum256(b[:])
}

// VerifyInclusion checks that the leaf with the index is in the tree of that
// size and root (RFC 9162, 2.1.3.2). The error wraps errs.Untrusted.
func VerifyInclusion(leaf [32]byte, index, size uint64, root [32]byte, proof [][32]byte) error {
	if index >= size {
		return fmt.Errorf("inclusion proof: index %d in a tree of %d: %w", index, size, errs.Untrusted)
	}
	// The path goes up beside the last leaf for inner levels, then along the border.
	inner := bits.Len64(index ^ (size - 1))
	border := bits.OnesCount64(index >> inner)
	if len(proof) != inner+border {
		return fmt.Errorf("inclusion proof: %d nodes (want %d): %w", len(proof), inner+border, errs.Untrusted)
	}
	h := leaf
	for i, p := range proof {
		if i < inner && index>>i&1 == 0 {
			h = nodeHash(h, p)
		} else {
			h = nodeHash(p, h)
		}
	}
	if h != root {
		return fmt.Errorf("inclusion proof: it leads to another root: %w", errs.Untrusted)
	}
	return nil
}

// VerifyConsistency checks that the tree of the first size and root is the
// beginning of the second (RFC 9162, 2.1.4.2). The error wraps errs.Untrusted.
func VerifyConsistency(size1, size2 uint64, root1, root2 [32]byte, proof [][32]byte) error {
	bad := func(what string) error {
		return fmt.Errorf("consistency proof from %d to %d: %s: %w", size1, size2, what, errs.Untrusted)
	}
	switch {
	case size1 > size2:
		return bad("the log has become smaller")
	case size1 == size2:
		if root1 != root2 || len(proof) > 0 {
			return bad("two roots for one size")
		}
		return nil
	case size1 == 0:
		if len(proof) > 0 {
			return bad("an empty log needs none")
		}
		return nil
	case len(proof) == 0:
		return bad("it is empty")
	}
	fn, sn := size1-1, size2-1
	for fn&1 == 1 {
		fn, sn = fn>>1, sn>>1
	}
	// A complete first tree is a node of the second itself.
	fr := root1
	if fn != 0 {
		fr, proof = proof[0], proof[1:]
	}
	sr := fr
	for _, c := range proof {
		switch {
		case sn == 0:
			return bad("it is too long")
		case fn&1 == 1 || fn == sn:
			fr, sr = nodeHash(c, fr), nodeHash(c, sr)
			for fn&1 == 0 && fn != 0 {
				fn, sn = fn>>1, sn>>1
			}
		default:
			sr = nodeHash(sr, c)
		}
		fn, sn = fn>>1, sn>>1
	}
	if sn != 0 || fr != root1 || sr != root2 {
		return bad("it does not lead to the two roots")
	}
	return nil
}
