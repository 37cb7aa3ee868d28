package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// Kinds of those who come with a certificate, see PeerID.
const (
	PeerService = "services"
	PeerHost    = "hosts"
)

// PeerID is the one URI in a client certificate, and the object id that role
// assignments name: ringwall://KIND/NAME.
func PeerID(kind, name string) string { return "ringwall://" + kind + "/" + name }

// Peer tells who the holder of a certificate is. The certificate is verified
// against the server's client CA already, and name is from its URI. Whether it
// was revoked, or replaced, is for the Peer to see in the transaction; the error
// is then errs.Untrusted.
type Peer func(ctx context.Context, tx Tx, name string, cert *x509.Certificate) (*Actor, error)

// HandlePeers says who decides about the certificates of one kind, before the
// door is used. Without it nobody of that kind comes in.
func (d *Door) HandlePeers(kind string, p Peer) { d.peers[kind] = p }

// AuthenticatePeer tells who the holder of a client certificate is, which TLS
// has verified. It fails closed: a kind that nobody handles, a certificate that
// names two or none, or one that is over is errs.Untrusted.
func (d *Door) AuthenticatePeer(ctx context.Context, cert *x509.Certificate, now time.Time) (*Actor, error) {
	kind, name, err := peerName(cert)
	if err != nil {
		return nil, fmt.Errorf("authenticate by certificate: %w", err)
	}
	handle, ok := d.peers[kind]
	if !ok || now.Before(cert.NotBefore) || !now.Before(cert.NotAfter) {
		return nil, fmt.Errorf("authenticate %s: the certificate is over, or of no kind that is served here: %w", PeerID(kind, name), errs.Untrusted)
	}
	var out *Actor
	err = d.store.Read(ctx, func(tx Tx) (err error) {
		out, err = handle(ctx, tx, name, cert)
		return err
	})
	if errors.Is(err, errs.NotFound) {
		err = fmt.Errorf("nobody knows it: %w", errs.Untrusted)
	}
	if err != nil {
		return nil, fmt.Errorf("authenticate %s: %w", PeerID(kind, name), err)
	}
	return out, nil
}

// peerName reads the URI of a client certificate.
func peerName(cert *x509.Certificate) (kind, name string, err error) {
	if len(cert.URIs) != 1 {
		return "", "", fmt.Errorf("the certificate has %d URIs, want one: %w", len(cert.URIs), errs.Untrusted)
	}
	u := cert.URIs[0]
	name = strings.TrimPrefix(u.Path, "/")
	if !ValidName(name) || *u != (url.URL{Scheme: "ringwall", Host: u.Host, Path: "/" + name}) || u.Host == "" {
		return "", "", fmt.Errorf("the certificate is of %.200q, want ringwall://KIND/NAME: %w", u, errs.Untrusted)
	}
	return u.Host, name, nil
}

// ValidName reports whether a name can be that of a principal: letters, digits,
// dots, dashes and underlines, beginning with a letter or digit; at most 128.
func ValidName(s string) bool {
	if s == "" || len(s) > 128 || strings.ContainsRune("._-", rune(s[0])) {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	})
}
