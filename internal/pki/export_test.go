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

// AddUnsigned returns a timestamp response with an unsigned attribute.
func AddUnsigned(response []byte) ([]byte, error) {
	var r tsResponse
	if _, err := asn1.Unmarshal(response, &r); err != nil {
		return nil, err
	}
	var ci contentInfo
	if _, err := asn1.Unmarshal(r.Token.FullBytes, &ci); err != nil {
		return nil, err
	}
	si, err := asn1.Marshal(ci.Content.Signers[0])
	if err != nil {
		return nil, err
	}
	var seq asn1.RawValue
	if _, err := asn1.Unmarshal(si, &seq); err != nil {
		return nil, err
	}
	seq.Bytes = append(seq.Bytes, 0xa1, 0x09, 0x30, 0x07, 0x06, 0x03, 0x2a, 0x03, 0x04, 0x31, 0x00)
	var out struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version          int
			DigestAlgorithms asn1.RawValue
			Content          asn1.RawValue
			Certificates     asn1.RawValue
			Signers          []asn1.RawValue `asn1:"set"`
		} `asn1:"explicit,tag:0"`
	}
	if _, err := asn1.Unmarshal(r.Token.FullBytes, &out); err != nil {
		return nil, err
	}
	out.Content.Signers = []asn1.RawValue{{Class: seq.Class, Tag: seq.Tag, IsCompound: true, Bytes: seq.Bytes}}
	token, err := asn1.Marshal(out)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(tsResponse{Token: asn1.RawValue{FullBytes: token}})
}
