package codesign

import (
	"crypto/sha256"
	"fmt"
	"time"
	"unicode/utf8"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const policyPayloadType = "application/vnd.ringwall.policy+yaml"

// SignedPolicy is a verified policy document. What it says is for package
// integrity to parse.
type SignedPolicy struct {
	YAML            []byte
	Digest          integrity.Digest // SHA-256 of YAML
	CA              string
	CertFingerprint integrity.Digest
	Identity        string
	SignedAt        time.Time
}

// SignPolicy signs a policy document as it is, byte by byte.
func SignPolicy(s *pki.Signer, yaml []byte) ([]byte, error) {
	if len(yaml) == 0 || !utf8.Valid(yaml) {
		return nil, fmt.Errorf("sign policy: empty or not UTF-8: %w", errs.Invalid)
	}
	if s.Purpose != pki.PurposePolicy {
		return nil, fmt.Errorf("sign policy: with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	b, err := s.Sign(policyPayloadType, yaml)
	if err != nil {
		return nil, fmt.Errorf("sign policy: %w", err)
	}
	return b, nil
}

// VerifyPolicy checks a signed policy. It does not know the policy's epoch:
// refusing an older policy than the last one is the caller's.
func VerifyPolicy(bundle []byte, roots pki.TrustRoots) (*SignedPolicy, error) {
	v, err := pki.VerifyBundle(bundle, roots, pki.PurposePolicy)
	if err != nil {
		return nil, fmt.Errorf("signed policy: %w", err)
	}
	if v.PayloadType != policyPayloadType || !utf8.Valid(v.Payload) {
		return nil, fmt.Errorf("signed policy: payload type %q: %w", v.PayloadType, errs.Untrusted)
	}
	return &SignedPolicy{
		YAML: v.Payload, Digest: sha256.Sum256(v.Payload), CA: v.CA, CertFingerprint: v.Fingerprint,
		Identity: v.Identity, SignedAt: v.SignedAt,
	}, nil
}
