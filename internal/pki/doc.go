// Package pki holds Ringwall's keys, certificates and signed envelopes.
//
// One envelope is used for everything that is signed (release records,
// policies, break-glass permits): a Sigstore bundle v0.3 with a DSSE envelope,
// an X.509 leaf and an RFC 3161 timestamp. VerifyBundle is the one function
// that decides whether such an envelope is to be believed. It needs no network
// and no clock: the time of signing is the one that a trusted timestamp
// authority (TSA) vouches for, so that code does not stop running when the
// certificate that signed it expires.
//
// Everything here is the standard library. The parser of timestamp tokens is
// our own, strict DER only, because hosts run it on bytes from the network.
package pki
