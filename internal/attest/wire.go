package attest

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// The messages of a round, as JSON:
//
//	host                              verifier
//	Request: TPM, key         ───▶
//	                          ◀───    Question: nonce, what to send, at first a credential
//	Answer: quote, logs, CSR  ───▶
//	                          ◀───    Reply: signed result, sealed certificate

// Bounds of messages in bytes. An answer holds some 100,000 new entries of an IMA
// list: a host that measures more has to attest while it boots.
const (
	MaxRequest = 128 << 10
	MaxAnswer  = 16 << 20
	maxCSR     = 8 << 10
)

// Identity is what a host says of its TPM. None of it is believed before a
// credential was activated and somebody vouches for the endorsement key.
type Identity struct {
	EK []byte `json:"ek"` // TPMT_PUBLIC
	// Certificate of the endorsement key, as the TPM's NV holds it; empty: none.
	Certificate []byte `json:"certificate,omitempty"`
	// Intermediates lead from the certificate to its CA, each in DER.
	Intermediates [][]byte `json:"intermediates,omitempty"`
	AK            []byte   `json:"ak"` // TPMT_PUBLIC
}

// Request asks for a challenge.
type Request struct {
	Identity Identity `json:"identity"`
	Key      []byte   `json:"key"` // SubjectPublicKeyInfo of the key that is to be certified
}

// Question is a challenge with what the answer must hold.
type Question struct {
	Nonce []byte `json:"nonce"`
	Key   []byte `json:"key"`  // SHA-256 of the key that was named
	Bank  string `json:"bank"` // which PCRs
	// Credential is there when the TPM must first show that it holds both keys.
	Credential *Credential `json:"credential,omitempty"`
	// Boot is SHA-256 of the firmware's log that the verifier has, with the TPM's
	// resets at that time; a host whose log and counter are these leaves it out
	// and sends the IMA list from entry IMAFrom on.
	Boot    []byte `json:"boot,omitempty"`
	Resets  uint32 `json:"resets"`
	IMAFrom int    `json:"ima_from"`
}

// Qualifying is what the quote must hold, see Challenge.Qualifying.
func (q *Question) Qualifying(claims []byte) []byte {
	return (&Challenge{Nonce: q.Nonce, Key: q.Key}).Qualifying(claims)
}

// Answer is a host's evidence for one question.
type Answer struct {
	Nonce    []byte   `json:"nonce"`
	Secret   []byte   `json:"secret,omitempty"` // out of the credential
	CSR      []byte   `json:"csr"`              // PKCS #10 in DER, by the key that was named
	Evidence Evidence `json:"evidence"`
}

// Reply ends a round.
type Reply struct {
	Status  Status   `json:"status"`
	Reasons []Reason `json:"reasons,omitempty"` // why it was refused
	Result  []byte   `json:"result"`            // signed, see Result.Sign
	// Certificate of the key, for a host that was accepted.
	Certificate *SealedCertificate `json:"certificate,omitempty"`
}

// ParseRequest reads a Request: strict JSON, at most MaxRequest.
func ParseRequest(b []byte) (*Request, error) {
	var r Request
	if err := pki.UnmarshalStrict(b, &r, MaxRequest); err != nil {
		return nil, malformed("request: %v", err)
	}
	if len(r.Identity.Intermediates) > maxIntermediates {
		return nil, tooLarge("%d intermediate certificates (at most %d)", len(r.Identity.Intermediates), maxIntermediates)
	}
	return &r, nil
}

// PublicKey reads the key that is to be certified.
func (r *Request) PublicKey() (crypto.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(r.Key)
	if err != nil {
		return nil, malformed("key: %v", err)
	}
	return key, nil
}

// ParseAnswer reads an Answer: strict JSON, at most MaxAnswer.
func ParseAnswer(b []byte) (*Answer, error) {
	var a Answer
	if err := pki.UnmarshalStrict(b, &a, MaxAnswer); err != nil {
		return nil, malformed("answer: %v", err)
	}
	if len(a.CSR) > maxCSR {
		return nil, tooLarge("certificate request of %d bytes (at most %d)", len(a.CSR), maxCSR)
	}
	return &a, nil
}

// CheckCSR reads a certificate request for the key of the challenge, and
// demands that the key signed it.
func (c *Challenge) CheckCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxCSR {
		return nil, tooLarge("certificate request of %d bytes (at most %d)", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, malformed("certificate request: %v", err)
	}
	if string(SHA256.sum(csr.RawSubjectPublicKeyInfo)) != string(c.Key) {
		return nil, refuse(ReasonNonce, "the certificate request is for another key than the challenge")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, refuse(ReasonSignature, "certificate request: %v", err)
	}
	return csr, nil
}

// SealedCertificate is a certificate that only one TPM can open, and only while
// its PCRs are those that were attested.
type SealedCertificate struct {
	PCRs   []int  `json:"pcrs"`
	Key    Sealed `json:"key"`    // of AES-256-GCM
	Nonce  []byte `json:"nonce"`  // 12 bytes
	Cipher []byte `json:"cipher"` // the certificate in DER
}

// sealLabel is the additional data of a sealed certificate.
const sealLabel = "ringwall host certificate 1"

// SealCertificate seals a certificate to an endorsement key and the values that
// a bank has in some PCRs.
func SealCertificate(ek *EK, bank *Bank, pcrs []int, der []byte) (*SealedCertificate, error) {
	key := make([]byte, 32)
	s := &SealedCertificate{PCRs: pcrs, Nonce: make([]byte, 12)}
	_, _ = rand.Read(key) // never fails, see crypto/rand
	_, _ = rand.Read(s.Nonce)
	sealed, err := Seal(ek, bank, pcrs, key)
	if err != nil {
		return nil, err
	}
	aead, err := gcm(key)
	if err != nil {
		return nil, err
	}
	s.Key, s.Cipher = *sealed, aead.Seal(nil, s.Nonce, der, []byte(sealLabel))
	return s, nil
}

// Open decrypts the certificate with the key that the TPM gave out.
func (s *SealedCertificate) Open(key []byte) ([]byte, error) {
	aead, err := gcm(key)
	if err != nil {
		return nil, err
	}
	if len(s.Nonce) != aead.NonceSize() {
		return nil, fmt.Errorf("sealed certificate: nonce of %d bytes: %w", len(s.Nonce), errs.Invalid)
	}
	der, err := aead.Open(nil, s.Nonce, s.Cipher, []byte(sealLabel))
	if err != nil {
		return nil, fmt.Errorf("sealed certificate: %w: %w", err, errs.Untrusted)
	}
	return der, nil
}

func gcm(key []byte) (cipher.AEAD, error) {
	if len(key) != 32 {
		return nil, fmt.Errorf("sealed certificate: key of %d bytes: %w", len(key), errs.Invalid)
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("sealed certificate: %w", err)
	}
	return cipher.NewGCM(b)
}

// Collected is evidence in a file: for looking at a host without a server. What
// it proves is as fresh as the nonce that whoever asked has chosen.
type Collected struct {
	Format   string    `json:"format"`
	Identity Identity  `json:"identity"`
	Nonce    []byte    `json:"nonce"`
	Evidence Evidence  `json:"evidence"`
	At       time.Time `json:"at"` // by the host's clock
}

const collectedFormat = "ringwall-attestation-evidence/1"

// Question is what a host answers to make such a file: about no key.
func (c *Collected) Question() *Question {
	return &Question{Nonce: c.Nonce, Key: SHA256.sum(), Bank: c.Evidence.Bank}
}

// Input is the file as an appraisal takes it. basis says why the endorsement key
// is believed; that the attestation key is in its TPM was not shown, because
// that takes a conversation.
func (c *Collected) Input(basis Basis, p *Policy, known Catalogues, now time.Time) (*Input, error) {
	ek, err := ParseEK(c.Identity.EK)
	if err != nil {
		return nil, err
	}
	ak, err := ParseAK(c.Identity.AK)
	if err != nil {
		return nil, err
	}
	return &Input{
		Enrolled:  Enrolled{Host: ek.ID(), AKName: ak.Name(), Basis: basis},
		Challenge: Challenge{Nonce: c.Nonce, Key: SHA256.sum(), Host: ek.ID(), AKName: ak.Name(), Bank: p.Bank, Issued: c.At},
		Evidence:  c.Evidence, Policy: p, Catalogues: known, Now: now,
	}, nil
}

// Propose is the policy that accepts what the machine booted, see Propose. The
// quote must be the attestation key's.
func (c *Collected) Propose(name string) (*Policy, error) {
	return propose(&c.Evidence, c.Evidence.EventLog, c.Question().Qualifying(c.Evidence.Claims), name)
}

// ProposeArchived is the policy that accepts what the machine of an archive
// booted, whatever became of the round: a server's archives are where new
// firmware is learned from. Who signed the archive is not asked.
func ProposeArchived(archive []byte, name string) (*Policy, error) {
	var a Archive
	if err := pki.UnmarshalStrict(archive, &a, MaxArchive); err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	if a.Format != archiveFormat {
		return nil, fmt.Errorf("archive: format %.40q: %w", a.Format, errs.Invalid)
	}
	log := a.Evidence.EventLog
	if len(log) == 0 {
		log = a.BootLog
	}
	return propose(&a.Evidence, log, a.Challenge.Qualifying(a.Evidence.Claims), name)
}

func propose(ev *Evidence, rawLog, qualifying []byte, name string) (*Policy, error) {
	ak, err := ParseAK(ev.AK)
	if err != nil {
		return nil, err
	}
	a, err := ParseAlg(ev.Bank)
	if err != nil {
		return nil, err
	}
	bank, err := NewBank(a, ev.PCRs)
	if err != nil {
		return nil, err
	}
	if _, err := VerifyQuote(ak, ev.Quote, qualifying, bank); err != nil {
		return nil, err
	}
	log, err := ParseLog(rawLog)
	if err != nil {
		return nil, err
	}
	var user *UserspaceLog
	if len(ev.UserspaceLog) > 0 {
		if user, err = ParseUserspaceLog(ev.UserspaceLog); err != nil {
			return nil, err
		}
	}
	boot, err := Replay(log, user, bank, nil)
	if err != nil {
		return nil, err
	}
	return Propose(boot, name), nil
}

// MaxCollected bounds such a file in bytes.
const MaxCollected = 512 << 20

// Encode writes the file.
func (c *Collected) Encode() ([]byte, error) {
	c.Format = collectedFormat
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode evidence: %w", err)
	}
	return b, nil
}

// ParseCollected reads the file.
func ParseCollected(b []byte) (*Collected, error) {
	var c Collected
	if err := pki.UnmarshalStrict(b, &c, MaxCollected); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if c.Format != collectedFormat {
		return nil, fmt.Errorf("evidence: format %.40q: %w", c.Format, errs.Invalid)
	}
	return &c, nil
}

// Standing is what the fleet makes of a host.
type Standing string

// The standings.
const (
	StandingPending     Standing = "pending"     // a person must approve its endorsement key
	StandingTrusted     Standing = "trusted"     // the last round was accepted
	StandingQuarantined Standing = "quarantined" // refused, until a person releases it
)

// HostRecord is what the fleet knows of a host's TPM.
type HostRecord struct {
	Host     string   `json:"host"` // the fleet's name of it
	TPM      HostID   `json:"tpm"`
	Identity Identity `json:"identity"`
	Basis    Basis    `json:"basis,omitempty"` // empty: not enrolled yet
	Approved bool     `json:"approved"`        // by a person, for first use
	Standing Standing `json:"standing"`
	Why      string   `json:"why,omitempty"` // of a quarantine
	// Announced: a reboot was ordered and has not been seen yet.
	Announced bool      `json:"announced"`
	Enrolled  time.Time `json:"enrolled"`
	LastGood  time.Time `json:"last_good"` // of the last round that was accepted
	LastSeen  time.Time `json:"last_seen"` // of the last round
	Archived  time.Time `json:"archived"`  // of the last round whose evidence was kept
	State     *State    `json:"state,omitempty"`
	// Clock of the last quote that held together, also of a round that was refused.
	Clock   *Clock  `json:"clock,omitempty"`
	Passed  []Check `json:"passed,omitempty"`   // by the last accepted round
	BootLog []byte  `json:"boot_log,omitempty"` // that State.EventLog is the digest of
	// Version of the record; a write must name the one that it read.
	Version uint64 `json:"-"`
}

// OpenChallenge is a challenge with what the host said when it asked.
type OpenChallenge struct {
	Challenge Challenge `json:"challenge"`
	Name      string    `json:"name"` // the fleet's name of the host
	Identity  Identity  `json:"identity"`
	Basis     Basis     `json:"basis"`            // why the endorsement key is believed
	Opened    []byte    `json:"opened,omitempty"` // SHA-256 of the credential's secret; empty: none was asked for
	Version   uint64    `json:"version"`          // of the record that the question was made of
}

// SkipIMA is the rest of a binary list behind its first n entries; digestSize
// as in ReplayIMA. A host uses it to send only what is new.
func SkipIMA(list []byte, digestSize, n int) ([]byte, error) {
	w := imaWalk{cursor: littleEndian(list), digestSize: digestSize}
	for i := range n {
		if len(w.b) == 0 {
			return nil, malformed("the list has %d entries, not %d", i, n)
		}
		if _, err := w.read(i); err != nil {
			return nil, err
		}
	}
	return w.b, nil
}
