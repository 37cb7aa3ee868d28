package transparency

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Entry is what a log says of one signature.
type Entry struct {
	Index       uint64    `json:"index"`
	Hash        Hash      `json:"hash"`        // of the entry, see EntryHash
	Identity    string    `json:"identity"`    // of the signing certificate; empty: it has none that is in our form
	Purpose     string    `json:"purpose"`     // what the certificate may sign; "unknown" if nothing of ours
	Issuer      string    `json:"issuer"`      // the certificate says; a log does not check it
	Certificate Hash      `json:"certificate"` // fingerprint, as policies use it to deny
	NotBefore   time.Time `json:"not_before"`  // of the certificate; the signature is not older
	NotAfter    time.Time `json:"not_after"`
	Signed      string    `json:"signed"` // SHA-256 of what was signed (DSSE's PAE), in base64
}

// EntryHash identifies the signature of a bundle in a log: the hash of its
// entry there. Who keeps a record of what was asked to be signed keeps this.
func EntryHash(bundle []byte) (Hash, error) {
	body, err := pki.LogBody(bundle)
	if err != nil {
		return Hash{}, fmt.Errorf("entry of a bundle: %w", err)
	}
	return pki.LeafHash(body), nil
}

// Entries returns what the log says from one index up to the end of a
// checkpoint, verified to be below it.
func (r *Reader) Entries(ctx context.Context, from uint64, c *pki.Checkpoint) ([]Entry, error) {
	var out []Entry
	err := r.follow(ctx, &pki.Frontier{}, c, func(index uint64, entry []byte, leaf [32]byte) error {
		if index >= from {
			out = append(out, describe(index, entry, leaf))
		}
		return nil
	})
	return out, err
}

// describe never fails: what is not understood is shown as that, and is for
// people to look at.
func describe(index uint64, entry []byte, leaf [32]byte) Entry {
	e := Entry{Index: index, Hash: leaf, Purpose: "unknown"}
	c, signed, err := parseEntry(entry)
	if err != nil {
		return e
	}
	e.Certificate, e.Issuer, e.NotBefore, e.NotAfter, e.Signed = pki.Fingerprint(c), c.Issuer.CommonName, c.NotBefore.UTC(), c.NotAfter.UTC(), signed
	if len(c.URIs) == 1 {
		e.Identity = c.URIs[0].String()
	}
	for _, p := range pki.Purposes() {
		if pki.CheckLeaf(c, p) == nil {
			e.Purpose = p.String()
		}
	}
	return e
}

// parseEntry reads the parts of a hashedrekord 0.0.2 that people look at.
func parseEntry(entry []byte) (*x509.Certificate, string, error) {
	var w struct {
		Kind string `json:"kind"`
		Spec struct {
			Record struct {
				Data struct {
					Digest string `json:"digest"`
				} `json:"data"`
				Signature struct {
					Verifier struct {
						Certificate struct {
							Raw []byte `json:"rawBytes"`
						} `json:"x509Certificate"`
					} `json:"verifier"`
				} `json:"signature"`
			} `json:"hashedRekordV002"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(entry, &w); err != nil {
		return nil, "", fmt.Errorf("log entry: %w: %w", err, errs.Invalid)
	}
	c, err := x509.ParseCertificate(w.Spec.Record.Signature.Verifier.Certificate.Raw)
	if err != nil {
		return nil, "", fmt.Errorf("log entry: %w: %w", err, errs.Invalid)
	}
	return c, w.Spec.Record.Data.Digest, nil
}
