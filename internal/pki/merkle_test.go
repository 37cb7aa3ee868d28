package pki_test

import (
	"crypto/sha256"
	"errors"
	"slices"
	"strconv"
	"testing"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// The definitions of RFC 6962, 2.1, word for word: slow, and not the code under test.

func split(n int) int {
	k := 1
	for 2*k < n {
		k *= 2
	}
	return k
}

func treeHash(leaves [][32]byte) [32]byte {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	}
	k := split(len(leaves))
	l, r := treeHash(leaves[:k]), treeHash(leaves[k:])
	return sha256.Sum256(append(append([]byte{1}, l[:]...), r[:]...))
}

func path(m int, leaves [][32]byte) [][32]byte {
	if len(leaves) == 1 {
		return nil
	}
	k := split(len(leaves))
	if m < k {
		return append(path(m, leaves[:k]), treeHash(leaves[k:]))
	}
	return append(path(m-k, leaves[k:]), treeHash(leaves[:k]))
}

func subProof(m int, leaves [][32]byte, whole bool) [][32]byte {
	if m == len(leaves) {
		if whole {
			return nil
		}
		return [][32]byte{treeHash(leaves)}
	}
	k := split(len(leaves))
	if m <= k {
		return append(subProof(m, leaves[:k], whole), treeHash(leaves[k:]))
	}
	return append(subProof(m-k, leaves[k:], false), treeHash(leaves[:k]))
}

func someLeaves(n int) [][32]byte {
	out := make([][32]byte, n)
	for i := range out {
		out[i] = pki.LeafHash([]byte(strconv.Itoa(i)))
	}
	return out
}

func TestMerkle_againstTheDefinition(t *testing.T) {
	leaves := someLeaves(70)
	for n := 1; n <= len(leaves); n++ {
		root := treeHash(leaves[:n])
		for m := range n {
			p := path(m, leaves[:n])
			if err := pki.VerifyInclusion(leaves[m], uint64(m), uint64(n), root, p); err != nil {
				t.Fatalf("%d of %d: %v", m, n, err)
			}
			for name, err := range map[string]error{
				"other leaf":  pki.VerifyInclusion(pki.LeafHash(nil), uint64(m), uint64(n), root, p),
				"other root":  pki.VerifyInclusion(leaves[m], uint64(m), uint64(n), pki.LeafHash(nil), p),
				"longer":      pki.VerifyInclusion(leaves[m], uint64(m), uint64(n), root, append(slices.Clip(p), root)),
				"other index": pki.VerifyInclusion(leaves[m], uint64(m+1), uint64(n), root, p),
				"outside":     pki.VerifyInclusion(leaves[m], uint64(n), uint64(n), root, p),
			} {
				if !errors.Is(err, errs.Untrusted) {
					t.Errorf("%d of %d, %s: %v", m, n, name, err)
				}
			}
			if len(p) > 0 && pki.VerifyInclusion(leaves[m], uint64(m), uint64(n), root, p[1:]) == nil {
				t.Errorf("%d of %d: a shorter proof passes", m, n)
			}
		}
		for m := range n + 1 {
			var p [][32]byte
			old := treeHash(leaves[:m])
			if m > 0 {
				p = subProof(m, leaves[:n], true)
			}
			if err := pki.VerifyConsistency(uint64(m), uint64(n), old, root, p); err != nil {
				t.Fatalf("%d to %d: %v", m, n, err)
			}
			other := pki.LeafHash([]byte("x"))
			if m > 0 && pki.VerifyConsistency(uint64(m), uint64(n), other, root, p) == nil ||
				pki.VerifyConsistency(uint64(m), uint64(n), old, other, p) == nil && m > 0 ||
				pki.VerifyConsistency(uint64(m), uint64(n), old, root, append(slices.Clip(p), other)) == nil ||
				len(p) > 0 && pki.VerifyConsistency(uint64(m), uint64(n), old, root, p[:len(p)-1]) == nil ||
				m < n && pki.VerifyConsistency(uint64(n), uint64(m), root, old, p) == nil {
				t.Errorf("%d to %d: a spoilt proof passes", m, n)
			}
		}
	}
}

// A proof that verifies is the only one: no other bytes pass for the same leaf.
func FuzzVerifyInclusion(f *testing.F) {
	leaves := someLeaves(11)
	root := treeHash(leaves)
	flat := func(p [][32]byte) (out []byte) {
		for _, h := range p {
			out = append(out, h[:]...)
		}
		return out
	}
	for m := range leaves {
		f.Add(uint64(m), uint64(len(leaves)), flat(path(m, leaves)))
	}
	f.Fuzz(func(t *testing.T, index, size uint64, data []byte) {
		var p [][32]byte
		for len(data) >= 32 && len(p) < 64 {
			p = append(p, [32]byte(data[:32]))
			data = data[32:]
		}
		for m, leaf := range leaves {
			if err := pki.VerifyInclusion(leaf, index, size, root, p); err == nil && size == 11 &&
				(index != uint64(m) || string(flat(p)) != string(flat(path(m, leaves)))) {
				t.Errorf("leaf %d passes as %d of %d with %x", m, index, size, flat(p))
			}
		}
	})
}

func FuzzVerifyConsistency(f *testing.F) {
	f.Add(uint64(3), uint64(7), []byte("proof"))
	f.Fuzz(func(t *testing.T, one, two uint64, data []byte) {
		var p [][32]byte
		for len(data) >= 32 && len(p) < 130 {
			p = append(p, [32]byte(data[:32]))
			data = data[32:]
		}
		a, b := pki.LeafHash([]byte("a")), pki.LeafHash([]byte("b"))
		if err := pki.VerifyConsistency(one, two, a, b, p); err == nil && one != 0 {
			t.Errorf("two roots out of thin air: %d to %d, %x", one, two, p)
		}
	})
}
