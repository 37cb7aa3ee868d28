package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"

	"ringwall/internal/errs"
)

// maxTimestampRequest bounds what a timestamp authority reads.
const maxTimestampRequest = 4 << 10

// RFC 3161, 2.4.1.
type tsRequest struct {
	Version    int
	Imprint    imprint
	Policy     asn1.ObjectIdentifier `asn1:"optional"`
	Nonce      *big.Int              `asn1:"optional"`
	CertReq    bool                  `asn1:"optional"`
	Extensions []pkix.Extension      `asn1:"optional,tag:0"`
}

// TimestampRequest asks for a timestamp over message, DER, with a fresh nonce,
// and for the authority's certificate in the answer.
func TimestampRequest(message []byte) ([]byte, error) {
	nonce, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 63))
	if err != nil {
		return nil, fmt.Errorf("timestamp request: %w", err)
	}
	sum := sha256.Sum256(message)
	der, err := asn1.Marshal(tsRequest{
		Version: 1, Nonce: nonce.SetBit(nonce, 63, 1), CertReq: true,
		Imprint: imprint{Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidSHA256(), Parameters: asn1.NullRawValue}, Hash: sum[:]},
	})
	if err != nil {
		return nil, fmt.Errorf("timestamp request: %w", err)
	}
	return der, nil
}

// CheckTimestampReply says whether a response answers a request: granted, over
// the same digest, with the same nonce. Who signed it, and whether well, is for
// VerifyTimestamp to say.
func CheckTimestampReply(response, request []byte) error {
	var q tsRequest
	if err := parseDER(request, &q, "timestamp request"); err != nil {
		return err
	}
	sd, err := parseResponse(response)
	if err != nil {
		return fmt.Errorf("timestamp: %w", err)
	}
	info, err := parseInfo(sd.Content.Data)
	if err != nil {
		return fmt.Errorf("timestamp: %w", err)
	}
	switch {
	case !isSHA256(info.Imprint.Algorithm) || !bytes.Equal(info.Imprint.Hash, q.Imprint.Hash):
		return fmt.Errorf("timestamp: it is for other data: %w", errs.Untrusted)
	case q.Nonce != nil && (info.Nonce == nil || info.Nonce.Cmp(q.Nonce) != 0):
		return fmt.Errorf("timestamp: it answers another request: %w", errs.Untrusted)
	}
	return nil
}

// Respond answers a DER-encoded request (RFC 3161) by whoever may ask for a
// timestamp. A request that it cannot grant, such as one with another hash or
// a policy that is not ours, is an error (errs.Invalid) and has no answer.
func (t *TSA) Respond(request []byte) ([]byte, error) {
	der, err := t.respond(request)
	if err != nil {
		return nil, fmt.Errorf("answer timestamp request: %w", err)
	}
	return der, nil
}

func (t *TSA) respond(request []byte) ([]byte, error) {
	if len(request) > maxTimestampRequest {
		return nil, fmt.Errorf("%d bytes (at most %d): %w", len(request), maxTimestampRequest, errs.Invalid)
	}
	var q tsRequest
	if err := parseDER(request, &q, "request"); err != nil {
		return nil, err
	}
	switch {
	case q.Version != 1:
		return nil, fmt.Errorf("version %d: %w", q.Version, errs.Invalid)
	case !isSHA256(q.Imprint.Algorithm) || len(q.Imprint.Hash) != sha256.Size:
		return nil, fmt.Errorf("the digest is not SHA-256: %w", errs.Invalid)
	case len(q.Policy) > 0 && !q.Policy.Equal(arc(2, 1)):
		return nil, fmt.Errorf("policy %v: %w", q.Policy, errs.Invalid)
	case len(q.Extensions) > 0:
		return nil, fmt.Errorf("extensions: %w", errs.Invalid)
	case q.Nonce != nil && q.Nonce.BitLen() > 256:
		return nil, fmt.Errorf("nonce of %d bits: %w", q.Nonce.BitLen(), errs.Invalid)
	}
	return t.issue([sha256.Size]byte(q.Imprint.Hash), q.Nonce)
}
