package hosts

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"ringwall/internal/agentpb"
	"ringwall/internal/audit"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

const (
	// CertificateLife is how long a host's certificate lasts.
	CertificateLife = 7 * 24 * time.Hour
	// renewAfter is when a host asks for the next one.
	renewAfter = CertificateLife / 2

	joinPrefix   = "rwj_"
	maxJoinToken = 4096 // bytes
)

// NewJoinToken makes a token of 160 random bits for a scope. The scope stands in
// it, so that its document is found; whoever changes it has no token any more.
func NewJoinToken(scope resource.ID) string {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return joinPrefix + strings.ToLower(base32.StdEncoding.EncodeToString(b[:])) + "_" + base64.RawURLEncoding.EncodeToString([]byte(scope.String()))
}

// JoinTokenID is the document of a join token; the error is errs.Untrusted.
func JoinTokenID(token string) (resource.ID, error) {
	bad := fmt.Errorf("this is no join token: %w", errs.Untrusted)
	rest, ok := strings.CutPrefix(token, joinPrefix)
	_, encoded, ok2 := strings.Cut(rest, "_")
	if !ok || !ok2 || len(token) > maxJoinToken {
		return resource.ID{}, bad
	}
	text, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return resource.ID{}, bad
	}
	scope, err := resource.ParseID(string(text))
	if err != nil {
		return resource.ID{}, bad
	}
	sum := sha256.Sum256([]byte(token))
	id, err := below(scope, fleet.TypeJoinToken, hex.EncodeToString(sum[:]))
	if err != nil {
		return resource.ID{}, bad
	}
	return id, nil
}

// enrolment is one request to join, as far as it can be checked without the
// database.
type enrolment struct {
	token  resource.ID
	host   resource.ID
	key    integrity.Digest
	csr    []byte
	anchor string
	labels map[string]string
}

// readEnrolment fails closed: what is malformed is errs.Invalid, what is no token
// errs.Untrusted.
func readEnrolment(r *agentpb.EnrolRequest) (*enrolment, error) {
	e := &enrolment{csr: r.GetCsr(), anchor: r.GetAnchorHost(), labels: r.GetLabels()}
	var err error
	if e.token, err = JoinTokenID(r.GetJoinToken()); err != nil {
		return nil, err
	}
	if !control.ValidName(r.GetName()) {
		return nil, fmt.Errorf("name %.80q: want letters, digits, dots and dashes, at most 128: %w", r.GetName(), errs.Invalid)
	}
	if e.host, err = below(e.token.Parent(), fleet.TypeHost, r.GetName()); err != nil {
		return nil, err
	}
	if len(e.anchor) > maxAnchor || !plain(e.anchor) {
		return nil, fmt.Errorf("the anchor's id is too long or not text: %w", errs.Invalid)
	}
	if err := checkLabels(e.labels); err != nil {
		return nil, err
	}
	e.key, err = keyOf(e.csr)
	return e, err
}

// keyOf is the SHA-256 of the public key of a certificate request.
func keyOf(csr []byte) (integrity.Digest, error) {
	const most = 16 << 10
	if len(csr) > most {
		return integrity.Digest{}, fmt.Errorf("certificate request of %d bytes (at most %d): %w", len(csr), most, errs.Invalid)
	}
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return integrity.Digest{}, fmt.Errorf("certificate request: %w: %w", err, errs.Invalid)
	}
	return sha256.Sum256(r.RawSubjectPublicKeyInfo), nil
}

// certify makes a certificate of a host.
func (s *Service) certify(csr []byte, host string) (*x509.Certificate, error) {
	return s.Clients.CertifyClient(csr, control.PeerID(control.PeerHost, host), CertificateLife, s.Now())
}

// enrol makes a host known: the token is used up in the transaction in which the
// host appears. The same key with the same token gets the same answer again.
func (s *Service) enrol(ctx context.Context, r *agentpb.EnrolRequest) (*agentpb.EnrolResponse, error) {
	e, err := readEnrolment(r)
	if err != nil {
		return nil, err
	}
	// what nobody made a token for leaves no trace but a number
	token, err := s.openToken(ctx, e)
	if err != nil {
		return nil, err
	}
	if token.Used != nil {
		return s.again(ctx, e, token.Used)
	}
	grant := &fleet.Grant{Host: newID(), Resource: e.host, Key: e.key}
	cert, err := s.certify(e.csr, grant.Host)
	if err != nil {
		return nil, err
	}
	grant.Certificate = cert.Raw
	var made *resource.Document
	err = s.Door.Act(ctx, engine(), fleet.TypeHost, "join/action", e.host, func(tx control.Tx, rec *audit.Record) error {
		var err error
		made, err = s.join(ctx, tx, e, grant)
		rec.Detail = fmt.Sprintf(`{"host":%q,"token":%q,"key":%q}`, grant.Host, e.token.Name(), e.key)
		return err
	})
	if errors.Is(err, errUsed) { // meanwhile
		if token, err = s.openToken(ctx, e); err == nil && token.Used != nil {
			return s.again(ctx, e, token.Used)
		}
	}
	if err != nil {
		return nil, err
	}
	s.counters.enrolled.Add(1)
	if err := s.learn(made); err != nil {
		return nil, err
	}
	h := s.host(grant.Host)
	h.mu.Lock()
	h.own = e.labels
	h.relabel()
	h.given(grant)
	h.mu.Unlock()
	return s.welcome(grant), nil
}

var errUsed = fmt.Errorf("the join token was used already: %w", errs.Untrusted)

// openToken reads the document of a token that can be used, or was by this key.
// The error is errs.Untrusted and the same for all others.
func (s *Service) openToken(ctx context.Context, e *enrolment) (*TokenProperties, error) {
	var p TokenProperties
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		d, err := tx.Get(ctx, e.token)
		if err != nil {
			return err
		}
		p = TokenProperties{}
		return read(d, &p)
	})
	if err != nil && !errors.Is(err, errs.NotFound) {
		return nil, err
	}
	if err != nil || p.Used == nil && !s.Now().Before(p.Expires) || p.Used != nil && (p.Used.Key != e.key || !p.Used.Host.Equal(e.host)) {
		s.counters.badTokens.Add(1)
		return nil, fmt.Errorf("the join token is unknown, over or used: %w", errs.Untrusted)
	}
	if p.Name != "" && !strings.EqualFold(p.Name, e.host.Name()) {
		return nil, fmt.Errorf("the join token is for a host named %s: %w", p.Name, errs.Denied)
	}
	return &p, nil
}

// join is the transaction of enrolment.
func (s *Service) join(ctx context.Context, tx control.Tx, e *enrolment, grant *fleet.Grant) (*resource.Document, error) {
	grants, err := of[grantTx](tx)
	if err != nil {
		return nil, err
	}
	doc, err := tx.Get(ctx, e.token)
	if err != nil {
		return nil, err
	}
	var token TokenProperties
	if err := read(doc, &token); err != nil {
		return nil, err
	}
	now := s.Now().UTC().Truncate(time.Second)
	switch {
	case token.Used != nil:
		return nil, errUsed
	case !now.Before(token.Expires):
		return nil, fmt.Errorf("the join token is over: %w", errs.Untrusted)
	}
	token.Used = &TokenUse{At: now, Host: e.host, Key: e.key}
	if err := write(doc, &token); err != nil {
		return nil, err
	}
	by := engine().Name
	if _, err := tx.Put(ctx, *doc, by, resource.When{Revision: doc.Revision}); err != nil {
		return nil, err
	}
	host := resource.Document{ID: e.host, Type: fleet.TypeHost}
	err = write(&host, &HostProperties{ID: grant.Host, Joined: now, Anchor: e.anchor, Labels: token.Labels, Critical: token.Critical, JoinedWith: e.token.Name()})
	if err != nil {
		return nil, err
	}
	made, err := tx.Put(ctx, host, by, resource.When{Absent: true})
	if errors.Is(err, errs.Conflict) {
		return nil, fmt.Errorf("a host named %s has joined before; if it is gone, delete %s first: %w", e.host.Name(), e.host, errs.Conflict)
	}
	if err != nil {
		return nil, err
	}
	return made, grants.PutGrant(ctx, grant)
}

// again answers the key that used the token: the answer was lost.
func (s *Service) again(ctx context.Context, e *enrolment, used *TokenUse) (*agentpb.EnrolResponse, error) {
	var grant *fleet.Grant
	err := s.Store.Read(ctx, func(tx control.Tx) error {
		grants, err := of[grantTx](tx)
		if err != nil {
			return err
		}
		d, err := tx.Get(ctx, used.Host)
		if err != nil {
			return err
		}
		var p HostProperties
		if err := read(d, &p); err != nil {
			return err
		}
		if !p.Revoked.IsZero() || p.JoinedWith != e.token.Name() {
			return fmt.Errorf("the host was revoked: %w", errs.Untrusted)
		}
		grant, err = grants.Grant(ctx, p.ID)
		return err
	})
	if errors.Is(err, errs.NotFound) {
		err = fmt.Errorf("the host is gone: %w", errs.Untrusted)
	}
	if err != nil {
		return nil, err
	}
	if grant.Key != e.key {
		return nil, fmt.Errorf("the host has another key by now: %w", errs.Untrusted)
	}
	return s.welcome(grant), nil
}

func (s *Service) welcome(g *fleet.Grant) *agentpb.EnrolResponse {
	return &agentpb.EnrolResponse{
		HostId: g.Host, ResourceId: g.Resource.String(),
		Certificates: [][]byte{g.Certificate, s.Clients.Certificate().Raw},
		RenewUs:      s.renewAt(g.Certificate).UnixMicro(), NowUs: s.Now().UnixMicro(),
	}
}

func (s *Service) renewAt(cert []byte) time.Time {
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return s.Now() // our own; renewing at once is safe
	}
	return c.NotAfter.Add(renewAfter - CertificateLife)
}

// renew gives the next certificate, for a new key. The old one is good until the
// new one is used, so that a lost answer locks nobody out.
func (s *Service) renew(ctx context.Context, h *host, with integrity.Digest, csr []byte) (*agentpb.RenewResponse, error) {
	key, err := keyOf(csr)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	v := h.v
	h.mu.Unlock()
	if key == with {
		return nil, fmt.Errorf("a new certificate needs a new key: %w", errs.Invalid)
	}
	cert, err := s.certify(csr, v.ID)
	if err != nil {
		return nil, err
	}
	var grant *fleet.Grant
	err = s.Door.Act(ctx, engine(), fleet.TypeHost, "renew/action", v.Resource, func(tx control.Tx, rec *audit.Record) error {
		grants, err := of[grantTx](tx)
		if err != nil {
			return err
		}
		if grant, err = grants.Grant(ctx, v.ID); err != nil {
			return err
		}
		switch {
		case grant.Key == key: // it asks again
			return nil
		case grant.Key != with && grant.OldKey != with:
			return fmt.Errorf("the certificate was replaced: %w", errs.Untrusted)
		}
		grant.Certificate, grant.Key, grant.OldKey = bytes.Clone(cert.Raw), key, with
		rec.Detail = fmt.Sprintf(`{"host":%q,"key":%q}`, v.ID, key)
		return grants.PutGrant(ctx, grant)
	})
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.key, h.oldKey = grant.Key, grant.OldKey
	h.mu.Unlock()
	return &agentpb.RenewResponse{
		Certificates: [][]byte{grant.Certificate, s.Clients.Certificate().Raw}, RenewUs: s.renewAt(grant.Certificate).UnixMicro(),
	}, nil
}
