package transparency

import (
	"crypto/sha256"
	"fmt"
	"math/bits"

	"ringwall/internal/errs"
)

// frontier is a log's tree as far as it takes to go on: the roots of the
// complete subtrees from left to right, one for each bit of the size. Leaves
// that are added to it and lead to a checkpoint's root are what the checkpoint
// is about, and it continues what was there before.
type frontier struct {
	size  uint64
	nodes [][32]byte // largest first
}

func (f *frontier) add(leaf [32]byte) {
	for n := f.size; n&1 == 1; n >>= 1 {
		leaf = node(f.nodes[len(f.nodes)-1], leaf)
		f.nodes = f.nodes[:len(f.nodes)-1]
	}
	f.nodes = append(f.nodes, leaf)
	f.size++
}

// root is the tree's root as RFC 6962, 2.1 has it.
func (f *frontier) root() [32]byte {
	if f.size == 0 {
		return sha256.Sum256(nil)
	}
	h := f.nodes[len(f.nodes)-1]
	for i := len(f.nodes) - 2; i >= 0; i-- {
		h = node(f.nodes[i], h)
	}
	return h
}

func (f *frontier) check() error {
	if f.size >= 1<<63 || bits.OnesCount64(f.size) != len(f.nodes) {
		return fmt.Errorf("%d nodes for a tree of %d: %w", len(f.nodes), f.size, errs.Invalid)
	}
	return nil
}

func node(left, right [32]byte) [32]byte {
	var b [65]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[33:], right[:])
	return sha256.Sum256(b[:])
}
