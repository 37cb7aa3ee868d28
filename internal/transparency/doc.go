// Package transparency makes signatures visible to others than the signer: a
// log of all of them that anyone can copy and check, and timestamps by an
// authority elsewhere.
//
// A log is a directory of plain files in the format of C2SP tlog-tiles: a
// signed checkpoint, tiles of hashes, bundles of entries. Tessera writes it.
// What reads it believes only the log's key: every hash is computed again and
// must lead to a checkpoint, and every checkpoint must continue the last one
// that was seen.
package transparency
