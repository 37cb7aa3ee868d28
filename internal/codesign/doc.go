// Package codesign turns a build into something that hosts can decide by: it
// finds the executable content of an artefact (Source, Classify), lists its
// digests in a catalogue, and signs one small release record over that
// catalogue. The verifying half runs on hosts. It also signs and verifies
// policies and break-glass permits, and verifies Debian's archive signatures.
//
// Nothing is skipped: what cannot be read or understood is an error, because a
// file that the catalogue misses is a file that the fleet will refuse to run.
//
// The formats are described byte by byte in docs/design/release-record.md.
package codesign
