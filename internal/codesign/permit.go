package codesign

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
	"unicode"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

const (
	permitPayloadType = "application/vnd.ringwall.permit+json"
	permitVersion     = 1
	// MaxPermit is the longest that a break-glass permit can last.
	MaxPermit = 24 * time.Hour
)

// Permit is a break-glass permit: it puts one host into audit mode for a
// limited time, without any network. Its use is an alert.
type Permit struct {
	Host      string // the host's id
	NotBefore time.Time
	NotAfter  time.Time
	Reason    string
	Nonce     string // 32 hex digits; filled in by SignPermit

	// Known once verified.
	Record   integrity.Digest // SHA-256 of the signed document
	Identity string           // who signed
	SignedAt time.Time
}

type wirePermit struct {
	Version   int    `json:"version"`
	Host      string `json:"host"`
	NotBefore string `json:"not_before"`
	NotAfter  string `json:"not_after"`
	Mode      string `json:"mode"`
	Reason    string `json:"reason"`
	Nonce     string `json:"nonce"`
}

// SignPermit signs a permit with a fresh nonce.
func SignPermit(s *pki.Signer, p Permit) ([]byte, error) {
	b, err := signPermit(s, p)
	if err != nil {
		return nil, fmt.Errorf("sign permit for %s: %w", p.Host, err)
	}
	return b, nil
}

func signPermit(s *pki.Signer, p Permit) ([]byte, error) {
	if s.Purpose != pki.PurposePermit {
		return nil, fmt.Errorf("with a %v certificate: %w", s.Purpose, errs.Invalid)
	}
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, err
	}
	payload, err := json.Marshal(wirePermit{
		Version: permitVersion, Host: p.Host, NotBefore: formatTime(p.NotBefore), NotAfter: formatTime(p.NotAfter),
		Mode: integrity.ModeAudit.String(), Reason: p.Reason, Nonce: hex.EncodeToString(nonce[:]),
	})
	if err != nil {
		return nil, err
	}
	if _, err := readPermit(payload); err != nil {
		return nil, err
	}
	return s.Sign(permitPayloadType, payload)
}

// VerifyPermit checks a permit for a host at a time. Using one twice is for
// the caller to refuse or to allow: Record names it.
func VerifyPermit(bundle []byte, roots pki.TrustRoots, host string, now time.Time) (*Permit, error) {
	v, err := pki.VerifyBundle(bundle, roots, pki.PurposePermit)
	if err != nil {
		return nil, fmt.Errorf("permit: %w", err)
	}
	if v.PayloadType != permitPayloadType {
		return nil, fmt.Errorf("permit: payload type %q: %w", v.PayloadType, errs.Untrusted)
	}
	p, err := readPermit(v.Payload)
	if err != nil {
		return nil, fmt.Errorf("permit: %w", err)
	}
	p.Record, p.Identity, p.SignedAt = sha256.Sum256(v.Payload), v.Identity, v.SignedAt
	switch {
	case p.Host != host:
		return nil, fmt.Errorf("permit: it is for host %q, this is %q: %w", p.Host, host, errs.Denied)
	case now.Before(p.NotBefore) || now.After(p.NotAfter):
		return nil, fmt.Errorf("permit: valid from %s to %s, now is %s: %w",
			formatTime(p.NotBefore), formatTime(p.NotAfter), formatTime(now), errs.Denied)
	}
	return p, nil
}

// readable is printable for text in any language.
func readable(s string, most int) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return s != "" && len(s) <= most
}

func readPermit(payload []byte) (*Permit, error) {
	var w wirePermit
	if err := pki.UnmarshalStrict(payload, &w, 4<<10); err != nil {
		return nil, err
	}
	bad := func(what string) (*Permit, error) { return nil, fmt.Errorf("%s: %w", what, errs.Invalid) }
	from, err := parseTime(w.NotBefore)
	if err != nil {
		return nil, err
	}
	to, err := parseTime(w.NotAfter)
	if err != nil {
		return nil, err
	}
	nonce, err := hex.DecodeString(w.Nonce)
	switch {
	case w.Version != permitVersion:
		return bad(fmt.Sprintf("version %d", w.Version))
	case !printable(w.Host, 1, 255):
		return bad("host id is empty, too long or not printable")
	case !to.After(from) || to.Sub(from) > MaxPermit:
		return bad(fmt.Sprintf("lasts %v (want up to %v)", to.Sub(from), MaxPermit))
	case w.Mode != integrity.ModeAudit.String():
		return bad(fmt.Sprintf("mode %.20q (only audit can be permitted)", w.Mode))
	case !readable(w.Reason, 1000):
		return bad("reason is empty, too long or not printable")
	case err != nil || len(nonce) != 16:
		return bad("nonce is not 32 hex digits")
	}
	return &Permit{Host: w.Host, NotBefore: from, NotAfter: to, Reason: w.Reason, Nonce: w.Nonce}, nil
}
