package attestation

import (
	"context"
	"encoding/json"
	"fmt"

	"ringwall/internal/attest"
)

// Wire is the service as whoever carries messages wants it: bytes in, bytes
// out, each a message of package attest. host was authenticated by the caller.
type Wire struct{ *Service }

// Challenge answers an attest.Request with an attest.Question.
func (w Wire) Challenge(ctx context.Context, host string, body []byte) ([]byte, error) {
	req, err := attest.ParseRequest(body)
	if err != nil {
		return nil, fmt.Errorf("challenge host %s: %w", host, err)
	}
	q, err := w.Service.Challenge(ctx, host, req)
	if err != nil {
		return nil, err
	}
	return json.Marshal(q)
}

// Attest answers an attest.Answer with an attest.Reply.
func (w Wire) Attest(ctx context.Context, host string, body []byte) ([]byte, error) {
	a, err := attest.ParseAnswer(body)
	if err != nil {
		return nil, fmt.Errorf("verify host %s: %w", host, err)
	}
	r, err := w.Verify(ctx, host, a)
	if err != nil {
		return nil, err
	}
	return json.Marshal(r)
}
