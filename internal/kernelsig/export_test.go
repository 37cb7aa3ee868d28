package kernelsig

// Readers of kernels' compression.
var (
	Unxz  = unxz
	Unlz4 = unlz4
)
