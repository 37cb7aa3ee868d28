//go:build !race

package testkit

// Race says whether the race detector is in the binary. Tests that put much
// content through one goroutine take a sample then: the whole runs without it,
// see ./check.
const Race = false
