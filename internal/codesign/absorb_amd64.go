package codesign

// absorb takes the blocks of 64 bytes in p into two SHA-256 states that differ
// in what came before. The processor must have its extensions.
//
//go:noescape
func absorb(a, b *[8]uint32, p []byte)

// hasExtensions says whether the processor has SHA-256 instructions, and the
// others that absorb uses.
func hasExtensions() bool
