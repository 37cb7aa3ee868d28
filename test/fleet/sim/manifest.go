package sim

import (
	"encoding/base64"
	"encoding/json"

	"ringwall/internal/integrity"
)

// contents is what a simulated host reads of a manifest: it believes the
// signature, which the real agent checks.
type contents struct {
	Epoch  uint64             `json:"epoch"`
	Policy integrity.Digest   `json:"policy"`
	Index  []integrity.Digest `json:"index"`
}

func readManifest(bundle []byte) (*contents, error) {
	var b struct {
		Envelope struct {
			Payload string `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(bundle, &b); err != nil {
		return nil, err
	}
	payload, err := base64.StdEncoding.DecodeString(b.Envelope.Payload)
	if err != nil {
		return nil, err
	}
	var m contents
	return &m, json.Unmarshal(payload, &m)
}

func (m *contents) content() []integrity.Digest {
	return append([]integrity.Digest{m.Policy}, m.Index...)
}
