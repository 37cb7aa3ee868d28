package pki

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"math/big"
)

// SignUnchecked makes a bundle as Sign does, with none of its checks and any
// kind of key, for tests of the verifier.
func SignUnchecked(leaf *x509.Certificate, key crypto.Signer, s Stamper, payloadType string, payload []byte) ([]byte, error) {
	digest := sha256.Sum256(PAE(payloadType, payload))
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	stamp, err := s.Stamp(sig)
	if err != nil {
		return nil, err
	}
	enc := base64.StdEncoding.EncodeToString
	return json.Marshal(wireBundle{
		MediaType: MediaType,
		Verification: wireMaterial{
			Certificate: &wireCert{Raw: enc(leaf.Raw)},
			Timestamps:  wireStamps{RFC3161: []wireStamp{{Signed: enc(stamp)}}},
		},
		Envelope: &wireEnvelope{Payload: enc(payload), PayloadType: payloadType, Signatures: []wireSignature{{Sig: enc(sig)}}},
	})
}

// FlipCertificate returns the certificate with the other valid form of its
// issuer's signature.
func FlipCertificate(c *x509.Certificate) (*x509.Certificate, error) {
	var v ecdsaSignature
	if _, err := asn1.Unmarshal(c.Signature, &v); err != nil {
		return nil, err
	}
	v.S = new(big.Int).Sub(elliptic.P256().Params().N, v.S)
	sig, err := asn1.Marshal(v)
	if err != nil {
		return nil, err
	}
	var outer struct {
		TBS, Algorithm asn1.RawValue
		Signature      asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.Raw, &outer); err != nil {
		return nil, err
	}
	outer.Signature = asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}
	der, err := asn1.Marshal(outer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
