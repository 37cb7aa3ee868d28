package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// A client and a server that the authority certified talk; nobody else does.
func TestTLSAuthority(t *testing.T) {
	now := time.Now()
	a, err := pki.NewTLSAuthority("Example TLS CA", now)
	if err != nil {
		t.Fatal(err)
	}
	ca, key, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = pki.LoadTLSAuthority(ca, key); err != nil { // as after a restart
		t.Fatal(err)
	}
	pair := func(cert, key []byte, err error) tls.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		c, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	other, err := pki.NewTLSAuthority("Example TLS CA", now)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	server := &tls.Config{
		Certificates: []tls.Certificate{pair(a.Server([]string{"server.example", "127.0.0.1"}, now))},
		ClientCAs:    pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}
	good := pair(a.Client("ci", "spiffe://fleet.example/ci", now))
	for name, tc := range map[string]struct {
		client tls.Certificate
		host   string
		works  bool
	}{
		"good":                    {good, "server.example", true},
		"by address":              {good, "127.0.0.1", true},
		"another name":            {good, "other.example", false},
		"of another authority":    {pair(other.Client("ci", "spiffe://fleet.example/ci", now)), "server.example", false},
		"a server is no client":   {pair(a.Server([]string{"x"}, now)), "server.example", false},
		"a client of another day": {pair(a.Client("ci", "spiffe://fleet.example/ci", now.Add(-2*365*24*time.Hour))), "server.example", false},
	} {
		t.Run(name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			done := make(chan error, 1)
			go func() {
				l, err := listener.Accept()
				if err == nil {
					_, err = tls.Server(l, server).Read(make([]byte, 1))
					err = errors.Join(err, l.Close())
				}
				done <- err
			}()
			r, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := tls.Client(r, &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{tc.client}, ServerName: tc.host, MinVersion: tls.VersionTLS13})
			_ = r.SetDeadline(time.Now().Add(10 * time.Second))
			_, err = c.Write([]byte("x"))
			_ = r.Close()
			if serverErr := <-done; (err == nil && serverErr == nil) != tc.works {
				t.Errorf("client: %v, server: %v", err, serverErr)
			}
		})
	}
	if _, err := pki.LoadTLSAuthority(ca, []byte("x")); err == nil {
		t.Error("a key that is none")
	}
	_, otherKey, _ := other.PEM()
	if _, err := pki.LoadTLSAuthority(ca, otherKey); !errors.Is(err, errs.Invalid) {
		t.Errorf("another's key: %v", err)
	}
	if _, _, err := a.Client("ci", "no uri", now); !errors.Is(err, errs.Invalid) {
		t.Errorf("a client without a URI: %v", err)
	}
	if _, _, err := a.Server(nil, now); !errors.Is(err, errs.Invalid) {
		t.Errorf("a server without a name: %v", err)
	}
}
