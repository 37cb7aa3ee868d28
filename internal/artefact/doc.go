// Package artefact reads what a build may be shipped as: a directory, an
// archive, a package, an image. Every format becomes one codesign.Source, so
// that signer, CSV and the command line see the same members.
//
// It reads other people's formats, so it stays out of what a host runs. It
// fails closed: what cannot be read is an error, never left out.
package artefact
