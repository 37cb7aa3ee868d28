package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"ringwall/internal/errs"
)

// TSA is the built-in timestamp authority. Whoever holds its key can say when
// something was signed, so a fleet that does not trust its signers keeps it on
// another machine.
type TSA struct {
	Cert *x509.Certificate
	Key  crypto.Signer
	Now  func() time.Time
}

// Stamp returns an RFC 3161 response over message.
func (t *TSA) Stamp(message []byte) ([]byte, error) {
	der, err := t.issue(sha256.Sum256(message), nil)
	if err != nil {
		return nil, fmt.Errorf("make timestamp: %w", err)
	}
	return der, nil
}

// issue makes the response over a digest. It always carries the certificate:
// a verifier may know the CA only.
func (t *TSA) issue(sum [sha256.Size]byte, nonce *big.Int) ([]byte, error) {
	if t.Key == nil {
		return nil, fmt.Errorf("the key of the TSA is not here: %w", errs.NotFound)
	}
	now := t.Now().UTC().Truncate(time.Second)
	if err := inValidity(t.Cert, now); err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	sha := pkix.AlgorithmIdentifier{Algorithm: oidSHA256()}
	info, err := asn1.Marshal(tstInfo{
		Version: 1, Policy: arc(2, 1), Serial: serial.SetBit(serial, 126, 1), Time: now,
		Imprint: imprint{Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidSHA256(), Parameters: asn1.NullRawValue}, Hash: sum[:]},
		// The time is cut to the second, so it is early by up to one.
		Accuracy: accuracy{Seconds: 1}, Nonce: nonce,
	})
	if err != nil {
		return nil, err
	}
	attrs, err := t.attributes(info, now)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(attrs)
	sig, err := t.Key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	sent := append([]byte(nil), attrs...)
	sent[0] = 0xa0
	ci := contentInfo{Type: oidSignedData()}
	ci.Content.Version = 3
	ci.Content.DigestAlgorithms = []pkix.AlgorithmIdentifier{sha}
	ci.Content.Content.Type, ci.Content.Content.Data = oidTSTInfo(), info
	ci.Content.Certificates = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: t.Cert.Raw}
	ci.Content.Signers = []signerInfo{{
		Version: 1, Issuer: issuerSerial{Issuer: asn1.RawValue{FullBytes: t.Cert.RawIssuer}, Serial: t.Cert.SerialNumber},
		Digest: sha, Attributes: asn1.RawValue{FullBytes: sent},
		Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidECDSASHA256()}, Signature: sig,
	}}
	token, err := asn1.Marshal(ci)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(tsResponse{Token: asn1.RawValue{FullBytes: token}})
}

// attributes returns the signed attributes as the SET OF that is signed.
func (t *TSA) attributes(info []byte, now time.Time) ([]byte, error) {
	sum, cert := sha256.Sum256(info), sha256.Sum256(t.Cert.Raw)
	var list []attribute
	for _, a := range []struct {
		id    asn1.ObjectIdentifier
		value any
	}{
		{oidContentType(), oidTSTInfo()},
		{oidSigningTime(), now},
		{oidMessageDigest(), sum[:]},
		{oidSigningCertV2(), struct{ Certs []struct{ Hash []byte } }{[]struct{ Hash []byte }{{cert[:]}}}},
	} {
		der, err := asn1.Marshal(a.value)
		if err != nil {
			return nil, err
		}
		list = append(list, attribute{Type: a.id, Values: []asn1.RawValue{{FullBytes: der}}})
	}
	return asn1.MarshalWithParams(list, "set")
}
