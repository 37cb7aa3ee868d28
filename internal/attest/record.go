package attest

import (
	"fmt"

	"ringwall/internal/errs"
)

// PolicyRecordPath is where a host's agent records the integrity policy in
// force; the kernel measures the file as it is read.
const PolicyRecordPath = "/run/ringwall/policy-record"

// PolicyRecordText is the content of the record: the SHA-256 of the signed
// policy in force, its mode, and how often the record was written since the
// host started.
//
// The kernel measures the same content at the same path once and no second
// time, so a host that goes to audit mode and back would show audit for ever;
// the count makes every record another one.
func PolicyRecordText(policy [32]byte, mode Mode, count int) []byte {
	return fmt.Appendf(nil, "ringwall policy record 1\npolicy sha256:%x\nmode %s\ncount %d\n", policy, mode, count)
}

// RecordDigests are the digests of the records that a host may show: of each of
// the policies in the mode, at most changes times written.
func RecordDigests(policies [][32]byte, mode Mode, changes int) ([]string, error) {
	const most = 4096
	if len(policies)*changes > most {
		return nil, fmt.Errorf("%d records (at most %d): %w", len(policies)*changes, most, errs.Invalid)
	}
	var out []string
	for _, p := range policies {
		for n := 1; n <= changes; n++ {
			out = append(out, FormatDigest(SHA256, SHA256.sum(PolicyRecordText(p, mode, n))))
		}
	}
	return out, nil
}
