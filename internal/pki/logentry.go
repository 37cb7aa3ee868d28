package pki

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"

	"ringwall/internal/errs"
)

// What stands in a log for a signature: Sigstore's hashedrekord 0.0.2, which is
// what sigstore-go rebuilds from a bundle to check an inclusion proof.
const (
	logEntryKind    = "hashedrekord"
	logEntryVersion = "0.0.2"
)

// maxLogEntry bounds what an entry adds to a bundle.
const maxLogEntry = 48 << 10

// Sigstore's TransparencyLogEntry (protobuf JSON), as a Rekor v2 log fills it.
type wireLogEntry struct {
	Index string       `json:"logIndex"`
	Log   wireLogID    `json:"logId"`
	Kind  wireKind     `json:"kindVersion"`
	Proof wireLogProof `json:"inclusionProof"`
	Body  string       `json:"canonicalizedBody"`
}

type wireLogID struct {
	Key string `json:"keyId"`
}

type wireKind struct {
	Kind    string `json:"kind"`
	Version string `json:"version"`
}

type wireLogProof struct {
	Index      string         `json:"logIndex"`
	Root       string         `json:"rootHash"`
	Size       string         `json:"treeSize"`
	Hashes     []string       `json:"hashes"`
	Checkpoint wireCheckpoint `json:"checkpoint"`
}

type wireCheckpoint struct {
	Envelope string `json:"envelope"`
}

// LogProof shows that a signature is in a log.
type LogProof struct {
	LogID      [32]byte // see LogKey.ID
	Index      uint64
	Hashes     [][32]byte
	Checkpoint []byte // signed note
}

// Logged is where a verified signature stands.
type Logged struct {
	Log   string // the anchor's name
	Index uint64
	Size  uint64 // of the log when the proof was made
}

// LogBody returns the log's entry for the signature in a bundle. It follows
// from certificate, signature and what was signed, so a verifier makes it
// itself. Nothing in the bundle is verified.
func LogBody(bundle []byte) ([]byte, error) {
	o, _, err := decodeBundle(bundle, PurposePolicy.maxPayload())
	if err != nil {
		return nil, fmt.Errorf("log entry: %w", err)
	}
	return o.logBody()
}

func (o *opened) logBody() ([]byte, error) {
	type hash struct {
		Algorithm string `json:"algorithm"`
		Digest    []byte `json:"digest"`
	}
	type certificate struct {
		Raw []byte `json:"rawBytes"`
	}
	type verifier struct {
		Details     string      `json:"keyDetails"`
		Certificate certificate `json:"x509Certificate"`
	}
	type signature struct {
		Content  []byte   `json:"content"`
		Verifier verifier `json:"verifier"`
	}
	type record struct {
		Data      hash      `json:"data"`
		Signature signature `json:"signature"`
	}
	type spec struct {
		Record record `json:"hashedRekordV002"`
	}
	digest := sha256.Sum256(PAE(o.payloadType, o.payload))
	// The fields are in the order of their names and hold no character that JSON
	// may spell in two ways, so this is the canonical form (RFC 8785).
	b, err := json.Marshal(struct {
		Version string `json:"apiVersion"`
		Kind    string `json:"kind"`
		Spec    spec   `json:"spec"`
	}{logEntryVersion, logEntryKind, spec{record{
		Data:      hash{"SHA2_256", digest[:]},
		Signature: signature{Content: o.sig, Verifier: verifier{keyDetailsP256, certificate{o.leaf.Raw}}},
	}}})
	if err != nil {
		return nil, fmt.Errorf("log entry: %w", err)
	}
	return b, nil
}

// AttachProof returns the bundle with the proof that its signature is logged,
// in the place of one that it may have.
func AttachProof(bundle []byte, p LogProof) ([]byte, error) {
	o, w, err := decodeBundle(bundle, PurposePolicy.maxPayload())
	if err != nil {
		return nil, fmt.Errorf("attach log proof: %w", err)
	}
	body, err := o.logBody()
	if err != nil {
		return nil, fmt.Errorf("attach log proof: %w", err)
	}
	text, _, err := OpenNote(p.Checkpoint)
	if err != nil {
		return nil, fmt.Errorf("attach log proof: %w", err)
	}
	c, err := parseCheckpoint(text)
	if err != nil {
		return nil, fmt.Errorf("attach log proof: %w", err)
	}
	enc, index := base64.StdEncoding.EncodeToString, strconv.FormatUint(p.Index, 10)
	e := wireLogEntry{
		Index: index, Log: wireLogID{enc(p.LogID[:])}, Kind: wireKind{logEntryKind, logEntryVersion}, Body: enc(body),
		Proof: wireLogProof{
			Index: index, Root: enc(c.Root[:]), Size: strconv.FormatUint(c.Size, 10), Hashes: []string{},
			Checkpoint: wireCheckpoint{string(p.Checkpoint)},
		},
	}
	for _, h := range p.Hashes {
		e.Proof.Hashes = append(e.Proof.Hashes, enc(h[:]))
	}
	w.Verification.Log = []wireLogEntry{e}
	b, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("attach log proof: %w", err)
	}
	return b, nil
}

// ProofOf returns the proof in a bundle, unverified; nil when it has none.
func ProofOf(bundle []byte) (*LogProof, error) {
	o, _, err := decodeBundle(bundle, PurposePolicy.maxPayload())
	if err != nil {
		return nil, fmt.Errorf("log proof: %w", err)
	}
	return o.proof, nil
}

// open decodes a log entry, of which there may be one and in one spelling.
func (e *wireLogEntry) open(o *opened) (*LogProof, error) {
	bad := func(what string) (*LogProof, error) { return nil, fmt.Errorf("log entry: %s: %w", what, errs.Invalid) }
	index, err := strconv.ParseUint(e.Index, 10, 63)
	switch {
	case err != nil || strconv.FormatUint(index, 10) != e.Index || e.Proof.Index != e.Index:
		return bad("log index is not a number, or not the proof's")
	case e.Kind != wireKind{logEntryKind, logEntryVersion}:
		return bad("not " + logEntryKind + " " + logEntryVersion)
	case len(e.Proof.Hashes) > maxLogProof:
		return bad("too many hashes")
	}
	p := &LogProof{Index: index, Checkpoint: []byte(e.Proof.Checkpoint.Envelope)}
	if !decodeHash(e.Log.Key, &p.LogID) {
		return bad("log id is not base64 of 32 bytes")
	}
	for _, s := range e.Proof.Hashes {
		var h [32]byte
		if !decodeHash(s, &h) {
			return bad("hash is not base64 of 32 bytes")
		}
		p.Hashes = append(p.Hashes, h)
	}
	text, _, err := OpenNote(p.Checkpoint)
	if err != nil {
		return nil, err
	}
	c, err := parseCheckpoint(text)
	if err != nil {
		return nil, err
	}
	// What is said twice must be the same twice: other tools may read the other one.
	var root [32]byte
	if !decodeHash(e.Proof.Root, &root) || root != c.Root || e.Proof.Size != strconv.FormatUint(c.Size, 10) {
		return bad("root or size is not the checkpoint's")
	}
	body, err := base64.StdEncoding.Strict().DecodeString(e.Body)
	if err != nil {
		return bad("body is not base64")
	}
	want, err := o.logBody()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(body, want) {
		return nil, fmt.Errorf("log entry: it is about another signature: %w", errs.Untrusted)
	}
	return p, VerifyInclusion(LeafHash(want), index, c.Size, c.Root, p.Hashes)
}

func decodeHash(s string, into *[32]byte) bool {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	return err == nil && copy(into[:], b) == len(into) && len(b) == len(into)
}

// verifyLog decides whether the signature is in one of the logs. Without logs
// it says nothing; with them it fails closed: no proof, no trust.
func (o *opened) verifyLog(logs []LogAnchor) (*Logged, error) {
	if len(logs) == 0 {
		return nil, nil //nolint:nilnil // nobody asked
	}
	if o.proof == nil {
		return nil, fmt.Errorf("it has no proof that it is in a transparency log: %w", errs.Untrusted)
	}
	for i := range logs {
		a := &logs[i]
		if a.ID() != o.proof.LogID {
			continue
		}
		// That the entry is below the checkpoint's root was checked when it was opened.
		c, err := OpenCheckpoint(o.proof.Checkpoint, &a.LogKey)
		if err != nil {
			return nil, err
		}
		return &Logged{Log: a.Name, Index: o.proof.Index, Size: c.Size}, nil
	}
	return nil, fmt.Errorf("it is in a transparency log that is not trusted: %w", errs.Untrusted)
}
