package attest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"ringwall/internal/errs"
)

// Reference values as systemd-pcrlock(8) keeps them: one component in a file
// NAME.pcrlock, its measurements in their order, in the JSON encoding of the
// TCG's canonical event log.
type pcrlockFile struct {
	Records []pcrlockRecord `json:"records"`
}

type pcrlockRecord struct {
	PCR     int             `json:"pcr"`
	Digests []pcrlockDigest `json:"digests"`
}

type pcrlockDigest struct {
	Alg    string `json:"hashAlg"`
	Digest string `json:"digest"`
}

const (
	maxPCRLock        = 1 << 20
	maxPCRLockRecords = 4096
)

// PCRLock writes a component for systemd-pcrlock: the image in PCR 4, its
// sections in PCR 11, what the kernel measures of it in PCR 9.
func (c *Component) PCRLock() ([]byte, error) {
	var f pcrlockFile
	add := func(pcr int, digest string) {
		if digest != "" {
			f.Records = append(f.Records, pcrlockRecord{pcr, []pcrlockDigest{{SHA256.String(), digest[len("sha256:"):]}}})
		}
	}
	add(4, c.Image)
	for _, s := range c.Sections {
		add(pcrUKI, FormatDigest(SHA256, SHA256.sum([]byte(s.Name+"\x00"))))
		for _, d := range s.Digests {
			add(pcrUKI, d)
		}
	}
	add(9, c.Options)
	add(9, c.Loaded)
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write %s.pcrlock: %w", c.Name, err)
	}
	return append(b, '\n'), nil
}

// ParsePCRLock reads a .pcrlock file as a component. Unknown members are passed
// over, as in every encoding of event logs. What it holds of other PCRs than 4,
// 8, 9 and 11 to 14 is errs.Unsupported: a policy judges those by what was
// measured and not by digests. errs.Invalid for everything else that is wrong.
func ParsePCRLock(name string, b []byte) (*Component, error) {
	if len(b) > maxPCRLock {
		return nil, fmt.Errorf("%s: %d bytes (at most %d): %w", name, len(b), maxPCRLock, errs.Invalid)
	}
	var f pcrlockFile
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&f); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errs.Invalid)
	}
	if len(f.Records) == 0 || len(f.Records) > maxPCRLockRecords {
		return nil, fmt.Errorf("%s: %d records (1 to %d): %w", name, len(f.Records), maxPCRLockRecords, errs.Invalid)
	}
	c := &Component{Name: name}
	section := ""
	for i, r := range f.Records {
		d, err := r.sha256()
		if err != nil {
			return nil, fmt.Errorf("%s: record %d: %w", name, i, err)
		}
		text := FormatDigest(SHA256, d)
		switch {
		case r.PCR == 4 && c.Image == "":
			c.Image = text
		case r.PCR == pcrUKI && section != "":
			c.Sections = append(c.Sections, Section{section, []string{text}})
			section = ""
		case r.PCR == pcrUKI:
			if section = sectionNamed(d); section == "" {
				return nil, fmt.Errorf("%s: record %d: no section that is known: %w", name, i, errs.Unsupported)
			}
		case r.PCR == 9 && c.Options == "" && len(c.Sections) > 0:
			c.Options = text
		case (r.PCR == 8 || r.PCR == 9 || r.PCR >= 12 && r.PCR <= 14) && c.Loaded == "":
			c.Loaded = text
		default:
			return nil, fmt.Errorf("%s: record %d: PCR %d, or a second one of it: %w", name, i, r.PCR, errs.Unsupported)
		}
	}
	if section != "" {
		return nil, fmt.Errorf("%s: it ends behind the name of section %s: %w", name, section, errs.Invalid)
	}
	return c, nil
}

func (r *pcrlockRecord) sha256() ([]byte, error) {
	for _, d := range r.Digests {
		if d.Alg != SHA256.String() {
			continue
		}
		b, err := hex.DecodeString(d.Digest)
		if err != nil || len(b) != SHA256.Size() {
			return nil, fmt.Errorf("digest %.80q: %w", d.Digest, errs.Invalid)
		}
		return b, nil
	}
	return nil, fmt.Errorf("no sha256 digest: %w", errs.Unsupported)
}

// sectionNamed finds the section whose name has the digest.
func sectionNamed(d []byte) string {
	for _, n := range StubSections() {
		if bytes.Equal(SHA256.sum([]byte(n+"\x00")), d) {
			return n
		}
	}
	return ""
}
