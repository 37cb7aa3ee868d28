//go:build !amd64

package codesign

func absorb(_, _ *[8]uint32, _ []byte) {}

func hasExtensions() bool { return false }
