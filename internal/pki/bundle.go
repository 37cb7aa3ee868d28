package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"ringwall/internal/errs"
)

// MediaType is the only bundle format that Ringwall reads or writes.
const MediaType = "application/vnd.dev.sigstore.bundle.v0.3+json"

// Anchor is a certificate that is trusted by name: a CA that issues signing
// leaves directly, or a timestamp authority (its own certificate, or a CA that
// issued it directly).
type Anchor struct {
	Name string
	Cert *x509.Certificate
}

// TrustRoots is whom a verifier believes.
type TrustRoots struct {
	CAs     []Anchor
	TSAs    []Anchor
	Revoked []Revocation // what is no longer believed of it
	Logs    []LogAnchor  // if any: a signature must be in one of them
}

// Revocation distrusts a certificate from a time on: a leaf, a CA or a
// timestamp authority. The time is compared with the trusted timestamp.
type Revocation struct {
	Fingerprint [32]byte  // see Fingerprint
	From        time.Time // zero: everything that it ever signed
}

// Verified is what a verified bundle says.
type Verified struct {
	Payload     []byte
	PayloadType string
	SignedAt    time.Time // by the timestamp authority's clock
	CA          string    // name of the anchor that issued the leaf
	TSA         string    // name of the anchor that stamped the signature
	Identity    string    // the leaf's URI
	Leaf        *x509.Certificate
	Logged      *Logged // nil unless the verifier's roots name logs

	// Of the leaf, of its CA and of who signed the timestamp, see Fingerprint.
	Fingerprint, CAFingerprint, TSAFingerprint [32]byte
}

// The Sigstore bundle v0.3 (protobuf JSON), as far as Ringwall accepts it.
type wireBundle struct {
	MediaType    string        `json:"mediaType"`
	Verification wireMaterial  `json:"verificationMaterial"`
	Envelope     *wireEnvelope `json:"dsseEnvelope"`
}

type wireMaterial struct {
	Certificate *wireCert      `json:"certificate"`
	Log         []wireLogEntry `json:"tlogEntries,omitempty"`
	Timestamps  wireStamps     `json:"timestampVerificationData"`
}

type wireCert struct {
	Raw string `json:"rawBytes"`
}

type wireStamps struct {
	RFC3161 []wireStamp `json:"rfc3161Timestamps"`
}

type wireStamp struct {
	Signed string `json:"signedTimestamp"`
}

type wireEnvelope struct {
	Payload     string          `json:"payload"`
	PayloadType string          `json:"payloadType"`
	Signatures  []wireSignature `json:"signatures"`
}

type wireSignature struct {
	Sig   string `json:"sig"`
	KeyID string `json:"keyid,omitempty"`
}

// PAE is DSSE's pre-authentication encoding: what is signed.
func PAE(payloadType string, payload []byte) []byte {
	var b bytes.Buffer
	b.Grow(len(payload) + len(payloadType) + 40)
	b.WriteString("DSSEv1 ")
	b.WriteString(strconv.Itoa(len(payloadType)))
	b.WriteByte(' ')
	b.WriteString(payloadType)
	b.WriteByte(' ')
	b.WriteString(strconv.Itoa(len(payload)))
	b.WriteByte(' ')
	b.Write(payload)
	return b.Bytes()
}

// Stamper makes RFC 3161 timestamps: *TSA, or a client of another one.
type Stamper interface {
	// Stamp returns a DER-encoded response over message.
	Stamp(message []byte) ([]byte, error)
}

// Recorder is a transparency log that signatures go to.
type Recorder interface {
	// Append adds the bundle's signature to the log and returns the bundle with
	// the proof of it. It bounds the time that it takes by itself.
	Append(ctx context.Context, bundle []byte) ([]byte, error)
}

// Signer signs bundles of one purpose.
type Signer struct {
	Purpose Purpose
	Leaf    *x509.Certificate
	Key     crypto.Signer
	Stamper Stamper
	Log     Recorder // nil: not logged
}

// Sign returns a bundle over payload.
func (s *Signer) Sign(payloadType string, payload []byte) ([]byte, error) {
	b, err := s.sign(payloadType, payload)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", payloadType, err)
	}
	return b, nil
}

func (s *Signer) sign(payloadType string, payload []byte) ([]byte, error) {
	if err := CheckLeaf(s.Leaf, s.Purpose); err != nil {
		return nil, err
	}
	if len(payload) > s.Purpose.maxPayload() {
		return nil, fmt.Errorf("payload of %d bytes (at most %d): %w", len(payload), s.Purpose.maxPayload(), errs.Invalid)
	}
	pub, err := publicP256(s.Key)
	if err != nil {
		return nil, err
	}
	if !pub.Equal(s.Leaf.PublicKey) {
		return nil, fmt.Errorf("key does not belong to the certificate: %w", errs.Invalid)
	}
	digest := sha256.Sum256(PAE(payloadType, payload))
	sig, err := lowS{s.Key}.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	stamp, err := s.Stamper.Stamp(sig)
	if err != nil {
		return nil, err
	}
	enc := base64.StdEncoding.EncodeToString
	b, err := json.Marshal(wireBundle{
		MediaType: MediaType,
		Verification: wireMaterial{
			Certificate: &wireCert{Raw: enc(s.Leaf.Raw)},
			Timestamps:  wireStamps{RFC3161: []wireStamp{{Signed: enc(stamp)}}},
		},
		Envelope: &wireEnvelope{Payload: enc(payload), PayloadType: payloadType, Signatures: []wireSignature{{Sig: enc(sig)}}},
	})
	if err != nil || s.Log == nil {
		return b, err
	}
	// A signature that is not in the log leaves no trace, so it is not handed out.
	return s.Log.Append(context.Background(), b)
}

// VerifyBundle decides whether a bundle is a trusted signature for the
// purpose, and returns what it says. The answer does not depend on the current
// time. The error wraps errs.Invalid when the bundle is malformed and
// errs.Untrusted when it is well formed but not to be believed.
func VerifyBundle(bundle []byte, roots TrustRoots, want Purpose) (*Verified, error) {
	v, err := verifyBundle(bundle, roots, want)
	if err != nil { // and what v says is not to be believed
		return nil, fmt.Errorf("verify %v bundle: %w", want, err)
	}
	return v, nil
}

func verifyBundle(bundle []byte, roots TrustRoots, want Purpose) (*Verified, error) {
	if err := want.check(); err != nil {
		return nil, err
	}
	o, _, err := decodeBundle(bundle, want.maxPayload())
	if err != nil {
		return nil, err
	}
	if err := CheckLeaf(o.leaf, want); err != nil {
		return nil, err
	}
	if err := o.leaf.CheckSignature(x509.ECDSAWithSHA256, PAE(o.payloadType, o.payload), o.sig); err != nil {
		return nil, fmt.Errorf("signature: %w: %w", err, errs.Untrusted)
	}
	stamp, err := VerifyTimestamp(o.stamp, o.sig, roots.TSAs)
	if err != nil {
		return nil, err
	}
	if err := inValidity(o.leaf, stamp.Time); err != nil {
		return nil, err
	}
	ca, err := findCA(o.leaf, roots.CAs, want, stamp.Time)
	if err != nil {
		return nil, err
	}
	logged, err := o.verifyLog(roots.Logs)
	if err != nil {
		return nil, err
	}
	v := &Verified{
		Payload: o.payload, PayloadType: o.payloadType, SignedAt: stamp.Time, CA: ca.Name, TSA: stamp.TSA,
		Identity: o.leaf.URIs[0].String(), Leaf: o.leaf,
		Logged: logged, Fingerprint: Fingerprint(o.leaf), CAFingerprint: Fingerprint(ca.Cert), TSAFingerprint: Fingerprint(stamp.Signer),
	}
	return v, v.notRevoked(roots.Revoked)
}

// UnverifiedPayload returns what a bundle says, for couriers: nothing of it is
// believed, and no signature is looked at. limit is in bytes.
func UnverifiedPayload(bundle []byte, limit int) (payloadType string, payload []byte, err error) {
	o, _, err := decodeBundle(bundle, limit)
	if err != nil {
		return "", nil, fmt.Errorf("read bundle: %w", err)
	}
	return o.payloadType, o.payload, nil
}

func (v *Verified) notRevoked(revoked []Revocation) error {
	for _, c := range []struct {
		what        string
		fingerprint [32]byte
	}{
		{"certificate of " + v.Identity, v.Fingerprint},
		{"authority " + v.CA, v.CAFingerprint},
		{"timestamp authority " + v.TSA, v.TSAFingerprint},
	} {
		for _, r := range revoked {
			if c.fingerprint == r.Fingerprint && !v.SignedAt.Before(r.From) {
				return fmt.Errorf("%s is revoked for signatures from %s on, this one is from %s: %w", c.what,
					r.From.UTC().Format(time.RFC3339), v.SignedAt.UTC().Format(time.RFC3339), errs.Untrusted)
			}
		}
	}
	return nil
}

func findCA(leaf *x509.Certificate, cas []Anchor, want Purpose, at time.Time) (Anchor, error) {
	why := fmt.Errorf("certificate of %q: issuer %q is not trusted: %w", leaf.URIs[0], leaf.Issuer.CommonName, errs.Untrusted)
	for _, a := range cas {
		if !bytes.Equal(a.Cert.RawSubject, leaf.RawIssuer) {
			continue
		}
		err := checkCA(a.Cert, want)
		if err == nil {
			err = issuedBy(leaf, a.Cert, at)
		}
		if err == nil {
			return a, nil
		}
		why = err
	}
	return Anchor{}, why
}

type opened struct {
	leaf                *x509.Certificate
	payload, sig, stamp []byte
	payloadType         string
	proof               *LogProof // nil: not logged
}

// decodeBundle decodes a bundle and refuses every form but the one that Sign
// writes; nothing in it has been believed yet, but that a proof of inclusion
// is about this signature and leads to its checkpoint.
func decodeBundle(data []byte, maxPayload int) (*opened, *wireBundle, error) {
	var w wireBundle
	if err := UnmarshalStrict(data, &w, 2*maxPayload+4*maxTimestamp+maxLogEntry); err != nil {
		return nil, nil, err
	}
	o, err := w.open(maxPayload)
	if err != nil || len(w.Verification.Log) == 0 {
		return o, &w, err
	}
	o.proof, err = w.Verification.Log[0].open(o)
	return o, &w, err
}

func (w *wireBundle) open(maxPayload int) (*opened, error) {
	bad := func(format string, a ...any) error { return fmt.Errorf(format+": %w", append(a, errs.Invalid)...) }
	m := &w.Verification
	switch {
	case w.MediaType != MediaType:
		return nil, bad("media type %.80q (want %s)", w.MediaType, MediaType)
	case w.Envelope == nil:
		return nil, bad("no DSSE envelope")
	case m.Certificate == nil:
		return nil, bad("no certificate")
	case len(m.Log) > 1:
		return nil, bad("%d transparency-log entries (want at most 1)", len(m.Log))
	case len(m.Timestamps.RFC3161) != 1:
		return nil, bad("%d timestamps (want 1)", len(m.Timestamps.RFC3161))
	case len(w.Envelope.Signatures) != 1:
		return nil, bad("%d signatures (want 1)", len(w.Envelope.Signatures))
	case w.Envelope.Signatures[0].KeyID != "":
		return nil, bad("key id given; the certificate says which key")
	case w.Envelope.PayloadType == "" || len(w.Envelope.PayloadType) > 200:
		return nil, bad("payload type is missing or too long")
	}
	o := &opened{payloadType: w.Envelope.PayloadType}
	var der []byte
	for _, f := range []struct {
		name  string
		in    string
		out   *[]byte
		limit int
	}{
		{"payload", w.Envelope.Payload, &o.payload, maxPayload},
		{"signature", w.Envelope.Signatures[0].Sig, &o.sig, 80},
		{"timestamp", m.Timestamps.RFC3161[0].Signed, &o.stamp, maxTimestamp},
		{"certificate", m.Certificate.Raw, &der, maxCertificate},
	} {
		b, err := base64.StdEncoding.Strict().DecodeString(f.in)
		if err != nil || len(b) == 0 || len(b) > f.limit {
			return nil, bad("%s is not base64 of 1 to %d bytes", f.name, f.limit)
		}
		*f.out = b
	}
	var err error
	if o.leaf, err = x509.ParseCertificate(der); err != nil {
		return nil, bad("certificate: %v", err)
	}
	return o, nil
}
