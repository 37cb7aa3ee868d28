// Package csv is code-signing verification: would this build run on every host
// that it will reach, before it ships?
//
// It reads a build once, takes facts from every member, and asks the evaluator
// that agents use about each of them under every policy that is live somewhere.
// It does no I/O of its own and fails closed: what it could not find out holds
// a build, and what it cannot parse blocks one.
package csv
