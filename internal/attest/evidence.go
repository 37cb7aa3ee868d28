package attest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	"ringwall/internal/errs"
)

// Evidence is what a host sends to answer a challenge. Quote first, then the
// logs: they may run ahead of the quote, never lag behind it.
type Evidence struct {
	AK    []byte   `json:"ak"`   // TPMT_PUBLIC of the attestation key
	Bank  string   `json:"bank"` // "sha256", …
	PCRs  [][]byte `json:"pcrs"` // all of the bank, as they were quoted
	Quote Quote    `json:"quote"`
	// EventLog is the firmware's log. It may be left out while the boot is the
	// one of the last round.
	EventLog []byte `json:"event_log,omitempty"`
	// UserspaceLog is always sent where there is one: it grows while the system
	// runs.
	UserspaceLog []byte `json:"userspace_log,omitempty"`
	// IMA is the kernel's list from entry IMAFrom on, which must be where the
	// verifier's state ends, or 0.
	IMA     []byte `json:"ima,omitempty"`
	IMAFrom int    `json:"ima_from"`
	// Claims are the agent's own words. The quote covers them, so that they
	// cannot be exchanged on the way; that makes them no truer.
	Claims []byte `json:"claims,omitempty"`
}

// NonceSize and ChallengeLife bound a challenge.
const (
	NonceSize     = 32
	ChallengeLife = time.Minute
)

// Challenge is a question to one host, to be answered once by one attestation
// key and for one key that is to be certified.
type Challenge struct {
	Nonce  []byte    `json:"nonce"`
	Host   HostID    `json:"host"`
	AKName []byte    `json:"ak_name"`
	Key    []byte    `json:"key"` // SHA-256 of the SubjectPublicKeyInfo of the key that asks for a certificate
	Bank   string    `json:"bank"`
	Issued time.Time `json:"issued"`
}

// ChallengeStore keeps open challenges.
type ChallengeStore interface {
	// PutChallenge adds one. A nonce that is there already: errs.Conflict.
	PutChallenge(Challenge) error
	// TakeChallenge removes a challenge and returns it, in one step: of two
	// callers with one nonce, one gets errs.NotFound.
	TakeChallenge(nonce []byte) (Challenge, error)
}

// Ask makes a fresh challenge and stores it.
func Ask(store ChallengeStore, host HostID, ak *AK, key crypto.PublicKey, bank Alg, now time.Time) (*Challenge, error) {
	if !bank.quotable() {
		return nil, fmt.Errorf("challenge for bank %v: %w", bank, errs.Invalid)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("challenge: %w: %w", err, errs.Invalid)
	}
	c := Challenge{Nonce: make([]byte, NonceSize), Host: host, AKName: ak.Name(), Key: SHA256.sum(spki), Bank: bank.String(), Issued: now}
	if _, err := rand.Read(c.Nonce); err != nil {
		return nil, fmt.Errorf("challenge: %w", err)
	}
	if err := store.PutChallenge(c); err != nil {
		return nil, fmt.Errorf("challenge: %w", err)
	}
	return &c, nil
}

// Redeem takes the challenge that a host answers. Whatever comes of the answer,
// the challenge is used up. A nonce that was never given, was used, is too old
// or is another host's gives ReasonNonce.
func Redeem(store ChallengeStore, nonce []byte, host HostID, now time.Time) (*Challenge, error) {
	c, err := store.TakeChallenge(nonce)
	if err != nil {
		return nil, &Error{Reason: ReasonNonce, PCR: -1, Detail: "no such challenge is open", kind: err}
	}
	switch age := now.Sub(c.Issued); {
	case c.Host != host:
		return nil, refuse(ReasonNonce, "the challenge was for another host")
	case age < 0 || age > ChallengeLife:
		return nil, refuse(ReasonNonce, "the challenge is %s old (at most %s)", age, ChallengeLife)
	case len(c.Nonce) != NonceSize || allZero(c.Nonce):
		return nil, refuse(ReasonNonce, "the challenge has no nonce")
	}
	return &c, nil
}

// Qualifying is what the host puts into its quote: the nonce together with the
// key that the quote is to vouch for and the agent's claims, so that a quote
// that somebody relays is of no use with another key.
func (c *Challenge) Qualifying(claims []byte) []byte {
	h := sha256.New()
	h.Write([]byte("ringwall attestation 1\x00"))
	h.Write(c.Nonce)
	h.Write(c.Key)
	h.Write(SHA256.sum(claims))
	return h.Sum(nil)
}

// Enrolled is what was settled when a host joined.
type Enrolled struct {
	Host   HostID `json:"host"`
	AKName []byte `json:"ak_name"` // shown by activation to be in the endorsement key's TPM
	Basis  Basis  `json:"basis"`   // why the endorsement key is believed
}

// State is what is known of a host from earlier rounds. Keep the state that a
// round returns only when its result was not Contraindicated: a host that was
// refused has to explain the same entries again.
type State struct {
	Clock    Clock    `json:"clock"`
	EventLog []byte   `json:"event_log"` // SHA-256 of this boot's log
	IMA      IMAState `json:"ima"`
	Facts    IMAFacts `json:"facts"`
}

// IMAFacts are what the verified part of a list says.
type IMAFacts struct {
	Entries    int       `json:"entries"`
	Unknown    []Finding `json:"unknown,omitempty"` // in no catalogue; the first maxFindings
	Violations []Finding `json:"violations,omitempty"`
	// Findings for which there was no room.
	MoreUnknown    int `json:"more_unknown,omitempty"`
	MoreViolations int `json:"more_violations,omitempty"`
	// PolicyRecord is the digest of the integrity policy that was loaded last.
	PolicyRecord string `json:"policy_record,omitempty"`
	// Catalogues are those that the entries were looked up in.
	Catalogues []string `json:"catalogues,omitempty"`
}

// Finding is one entry of an IMA list.
type Finding struct {
	Entry  int    `json:"entry"`
	Path   string `json:"path"` // of a violation: a claim
	Digest string `json:"digest,omitempty"`
}

const maxFindings = 64

// Catalogues knows what content is authorised: the reference for IMA lists.
type Catalogues interface {
	// Knows reports whether the digest is that of authorised content. alg is
	// the kernel's name of the algorithm; verity: an fs-verity digest.
	Knows(alg string, digest []byte, verity bool) bool
	// Names are the catalogues' own digests.
	Names() []string
}

// checkBinding compares the evidence with what the host enrolled and was asked.
func (ev *Evidence) checkBinding(c *Challenge, e *Enrolled) (*AK, *Bank, error) {
	ak, err := ParseAK(ev.AK)
	if err != nil {
		return nil, nil, err
	}
	if c.Host != e.Host || !bytes.Equal(ak.Name(), e.AKName) || !bytes.Equal(ak.Name(), c.AKName) {
		return nil, nil, refuse(ReasonAK, "another attestation key than the host enrolled with")
	}
	if ev.Bank != c.Bank {
		return nil, nil, refuse(ReasonPCRSelection, "bank %.20q (asked for %s)", ev.Bank, c.Bank)
	}
	a, err := ParseAlg(ev.Bank)
	if err != nil {
		return nil, nil, malformed("%v", err)
	}
	bank, err := NewBank(a, ev.PCRs)
	return ak, bank, err
}
