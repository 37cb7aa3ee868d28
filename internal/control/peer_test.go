package control_test

import (
	"context"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
)

// A certificate names one peer, in one way to write it.
func TestAuthenticatePeer(t *testing.T) {
	door := newDoor(t)
	door.HandlePeers("hosts", func(_ context.Context, _ control.Tx, name string, _ *x509.Certificate) (*control.Actor, error) {
		return &control.Actor{ID: control.PeerID("hosts", name), Name: name}, nil
	})
	now := time.Now()
	cert := func(uris ...string) *x509.Certificate {
		c := &x509.Certificate{NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute)}
		for _, s := range uris {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, u)
		}
		return c
	}
	a, err := door.AuthenticatePeer(t.Context(), cert("ringwall://hosts/h1"), now)
	if err != nil || a.ID != "ringwall://hosts/h1" {
		t.Errorf("%+v, %v", a, err)
	}
	for name, c := range map[string]*x509.Certificate{
		"nobody": cert(), "two": cert("ringwall://hosts/h1", "ringwall://hosts/h2"), "another scheme": cert("spiffe://hosts/h1"),
		"another kind": cert("ringwall://users/h1"), "no name": cert("ringwall://hosts"), "a path": cert("ringwall://hosts/a/b"),
		"dots": cert("ringwall://hosts/.."), "a user": cert("ringwall://x@hosts/h1"), "a query": cert("ringwall://hosts/h1?x"),
		"a fragment": cert("ringwall://hosts/h1#x"), "escaped": cert("ringwall://hosts/h%31"), "slashes escaped": cert("ringwall://hosts/a%2fb"),
		"opaque": cert("ringwall:hosts/h1"), "a bar": cert("ringwall://hosts/a|b"), "a service that has no document": cert("ringwall://services/ci"),
	} {
		c.SerialNumber = big.NewInt(1)
		if a, err := door.AuthenticatePeer(t.Context(), c, now); !errors.Is(err, errs.Untrusted) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	for _, at := range []time.Time{now.Add(-time.Hour), now.Add(time.Minute)} {
		if _, err := door.AuthenticatePeer(t.Context(), cert("ringwall://hosts/h1"), at); !errors.Is(err, errs.Untrusted) {
			t.Errorf("at %v: %v", at, err)
		}
	}
}
