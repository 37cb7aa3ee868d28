package gate

import (
	"slices"

	"go.yaml.in/yaml/v3"
)

// KernelSignature is a kind of signature that kernels check themselves, and
// that a release policy can ask the signer for.
type KernelSignature string

// The kinds. Each is made of what it fits and of nothing else: a root hash of
// images, modules of kernel modules.
const (
	SignFSVerity  KernelSignature = "fsverity"   // of each file, for fs-verity
	SignIMA       KernelSignature = "ima"        // of each file, security.ima over its content
	SignIMAVerity KernelSignature = "ima-verity" // of each file, security.ima over its fs-verity digest
	SignModule    KernelSignature = "module"     // inside each kernel module
	SignRootHash  KernelSignature = "roothash"   // of a dm-verity image
	SignIPE       KernelSignature = "ipe"        // a policy for IPE that allows what was built
)

// KernelSignatures returns all kinds.
func KernelSignatures() []KernelSignature {
	return []KernelSignature{SignFSVerity, SignIMA, SignIMAVerity, SignModule, SignRootHash, SignIPE}
}

func (d *document) kernelSignatures(n *yaml.Node, where string) {
	var words []string
	for _, k := range KernelSignatures() {
		words = append(words, string(k))
	}
	d.list(n, where, func(n *yaml.Node, where string) {
		k := KernelSignature(d.Word(n, where, words))
		if slices.Contains(d.p.KernelSignatures, k) {
			d.Problem(n, where, "`"+string(k)+"` is there already", "remove one")
		}
		d.p.KernelSignatures = append(d.p.KernelSignatures, k)
	})
}
