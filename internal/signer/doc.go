// Package signer is the only process that holds a build key.
//
// It is given an artefact, never a digest: it reads the artefact itself, makes
// the catalogue, asks the product's release policy, and only when every gate is
// passed has a certificate issued and signs. There is no call that signs what
// the caller computed. Signer.Sign is that one way; `ringwall sign` calls it
// directly and Server calls it for whoever has a client certificate.
//
// It fails closed: no policy, no evidence, no audit line, no log entry or no
// place to keep the epoch means no signature.
package signer
