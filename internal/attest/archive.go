package attest

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Archive is an appraisal with everything that it looked at, so that an auditor
// can do it again without the server, the host and the network. The catalogues
// are named in the result and come from where they are kept.
type Archive struct {
	Format    string    `json:"format"`
	Enrolled  Enrolled  `json:"enrolled"`
	Challenge Challenge `json:"challenge"`
	Evidence  Evidence  `json:"evidence"`
	State     *State    `json:"state,omitempty"`
	BootLog   []byte    `json:"boot_log,omitempty"`
	Announced bool      `json:"announced"`
	Policy    Policy    `json:"policy"`
	At        time.Time `json:"at"`
	Result    []byte    `json:"result"` // signed, see Result.Sign
}

const (
	archiveFormat = "ringwall-attestation-archive/1"
	// MaxArchive bounds an archive in bytes.
	MaxArchive = 512 << 20
)

// NewArchive keeps an appraisal and its signed result.
func NewArchive(in *Input, signed []byte) ([]byte, error) {
	b, err := json.Marshal(Archive{
		Format: archiveFormat, Enrolled: in.Enrolled, Challenge: in.Challenge, Evidence: in.Evidence, State: in.State, BootLog: in.BootLog,
		Announced: in.Announced, Policy: *in.Policy, At: in.Now, Result: signed,
	})
	if err != nil {
		return nil, fmt.Errorf("archive of %s: %w", in.Enrolled.Host, err)
	}
	return b, nil
}

// VerifyArchive appraises archived evidence again. open verifies the signature
// of the result and returns its payload. The error wraps errs.Untrusted when
// the evidence leads to any other result than the one that was signed.
func VerifyArchive(archive []byte, catalogues Catalogues, open func(bundle []byte) ([]byte, error)) (*Result, error) {
	var a Archive
	if err := pki.UnmarshalStrict(archive, &a, MaxArchive); err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	if a.Format != archiveFormat {
		return nil, fmt.Errorf("archive: format %.40q: %w", a.Format, errs.Invalid)
	}
	if err := a.Policy.validate(); err != nil {
		return nil, fmt.Errorf("archive: policy: %w: %w", err, errs.Invalid)
	}
	signed, err := open(a.Result)
	if err != nil {
		return nil, fmt.Errorf("archive: result: %w", err)
	}
	r, _, _ := Appraise(&Input{
		Enrolled: a.Enrolled, Challenge: a.Challenge, Evidence: a.Evidence, State: a.State, BootLog: a.BootLog,
		Announced: a.Announced, Policy: &a.Policy, Catalogues: catalogues, Now: a.At,
	})
	again, err := r.encode()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, signed) {
		return nil, fmt.Errorf("archive: the evidence does not lead to the signed result: %w", errs.Untrusted)
	}
	return r, nil
}

func (r *Result) encode() ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode result of %s: %w", r.Host, err)
	}
	return b, nil
}

func hexText(b []byte) string { return hex.EncodeToString(b) }
