// Package errs names the kinds of failure that a caller can act on.
//
// Wrap a kind once per layer with the operation and its arguments:
//
//	return fmt.Errorf("open policy %s: %w", path, errs.Invalid)
//
// The edge (command line, HTTP) maps a kind to an exit code or a status once.
package errs

import "errors"

// The kinds.
var (
	// NotFound: the thing asked for does not exist.
	NotFound = errors.New("not found")
	// Invalid: the input is malformed or out of bounds; retrying will not help.
	Invalid = errors.New("invalid")
	// Denied: policy or permissions refuse it.
	Denied = errors.New("denied")
	// Conflict: the state changed or already holds something else.
	Conflict = errors.New("conflict")
	// Unsupported: this kernel, machine or build cannot do it.
	Unsupported = errors.New("not supported here")
	// Untrusted: a signature, certificate, timestamp or digest does not verify.
	Untrusted = errors.New("not trusted")
)
