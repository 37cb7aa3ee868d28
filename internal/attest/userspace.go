package attest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
)

// UserspaceLog is what the running system measured into PCRs and wrote down:
// systemd's /run/log/systemd/tpm2-measure.log (TCG Canonical Event Log, JSON
// encoding, one record after the other as in RFC 7464).
type UserspaceLog struct {
	Events []UserspaceEvent
}

// UserspaceEvent is one record. Only the digest takes part in a replay; the
// text is believed where the digest is the text's.
type UserspaceEvent struct {
	Index   int
	PCR     int
	Digests map[Alg][]byte
	Text    string
}

const (
	maxUserspaceLog    = 1 << 20
	maxUserspaceEvents = 4096
)

type celRecord struct {
	PCR     *int    `json:"pcr"`
	NVIndex *uint64 `json:"nv_index"`
	Digests []struct {
		Alg    string `json:"hashAlg"`
		Digest string `json:"digest"`
	} `json:"digests"`
	Content struct {
		Text string `json:"string"`
	} `json:"content"`
}

// ParseUserspaceLog reads the log. Records about NV indices are skipped: they
// are no part of a quote. Unknown members are passed over, because a digest
// covers none of them.
func ParseUserspaceLog(b []byte) (*UserspaceLog, error) {
	if len(b) > maxUserspaceLog {
		return nil, tooLarge("userspace log of %d bytes (at most %d)", len(b), maxUserspaceLog)
	}
	l := &UserspaceLog{}
	const separator = 0x1e
	for i, record := range bytes.FieldsFunc(b, func(r rune) bool { return r == separator }) {
		if i == maxUserspaceEvents {
			return nil, tooLarge("userspace log of more than %d records", maxUserspaceEvents)
		}
		var r celRecord
		if err := json.Unmarshal(record, &r); err != nil {
			return nil, malformed("userspace log, record %d: %v", i, err)
		}
		if r.PCR == nil && r.NVIndex != nil {
			continue
		}
		if r.PCR == nil || *r.PCR < 0 || *r.PCR >= NumPCRs {
			return nil, malformed("userspace log, record %d: no PCR, or one that does not exist", i)
		}
		e := UserspaceEvent{Index: i, PCR: *r.PCR, Text: r.Content.Text, Digests: make(map[Alg][]byte, len(r.Digests))}
		for _, d := range r.Digests {
			a, err := ParseAlg(d.Alg)
			if err != nil {
				continue // a bank that nobody here asks for
			}
			sum, err := hex.DecodeString(d.Digest)
			if err != nil || len(sum) != a.Size() || e.Digests[a] != nil {
				return nil, malformed("userspace log, record %d: %s digest %.80q, or a second one", i, a, d.Digest)
			}
			e.Digests[a] = sum
		}
		l.Events = append(l.Events, e)
	}
	return l, nil
}
