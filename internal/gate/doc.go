// Package gate decides whether a build may be signed.
//
// A gate is a required check: tests, review, static analysis, a vulnerability
// scan, provenance, a CSV verdict. That it was passed is never taken from the
// builder's word. It is read from evidence: an in-toto Statement v1 about the
// artefact (or about its source revision), in our own envelope, signed by an
// attester whom the product's release policy names for that gate.
//
// Evaluate is the one place that decides. It is pure: the policy, the artefact,
// the evidence and the time go in, a Decision comes out, and the order of the
// evidence plays no part. It fails closed: a gate without evidence is held,
// never passed, and evidence that a check failed beats any that it passed.
//
// Nothing here does I/O; evidence is read and written by the caller.
package gate
