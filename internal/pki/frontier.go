package pki

import (
	"crypto/sha256"
	"fmt"
	"math/bits"

	"ringwall/internal/errs"
)

// Frontier is a log's tree as far as it takes to go on: the roots of the
// complete subtrees from left to right, one for each bit of the size. Leaves
// that are added to it and lead to a checkpoint's root are what the checkpoint
// is about, and it continues what was there before.
type Frontier struct {
	Size  uint64
	Nodes [][32]byte // largest first
}

// Add takes the next leaf's hash.
func (f *Frontier) Add(leaf [32]byte) {
	for n := f.Size; n&1 == 1; n >>= 1 {
		leaf = nodeHash(f.Nodes[len(f.Nodes)-1], leaf)
		f.Nodes = f.Nodes[:len(f.Nodes)-1]
	}
	f.Nodes = append(f.Nodes, leaf)
	f.Size++
}

// Root is the tree's root as RFC 6962, 2.1 has it.
func (f *Frontier) Root() [32]byte {
	if f.Size == 0 {
		return sha256.Sum256(nil)
	}
	h := f.Nodes[len(f.Nodes)-1]
	for i := len(f.Nodes) - 2; i >= 0; i-- {
		h = nodeHash(f.Nodes[i], h)
	}
	return h
}

// Check refuses one that Add could not have made; errs.Invalid.
func (f *Frontier) Check() error {
	if f.Size >= 1<<63 || bits.OnesCount64(f.Size) != len(f.Nodes) {
		return fmt.Errorf("%d nodes for a tree of %d: %w", len(f.Nodes), f.Size, errs.Invalid)
	}
	return nil
}
