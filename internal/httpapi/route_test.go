package httpapi_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
	"ringwall/internal/store"
)

// A host with a certificate of the client CA is who its URI says, if its kind is
// handled and the handler knows it; nobody else is anybody.
func TestClientCertificates(t *testing.T) {
	now := time.Now()
	clients, err := pki.NewTLSAuthority("clients", now)
	if err != nil {
		t.Fatal(err)
	}
	other, err := pki.NewTLSAuthority("clients", now)
	if err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), "sqlite:"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	door, err := control.New(shelf{s})
	if err != nil {
		t.Fatal(err)
	}
	door.HandlePeers("hosts", func(_ context.Context, _ control.Tx, name string, _ *x509.Certificate) (*control.Actor, error) {
		if name != "h1" {
			return nil, fmt.Errorf("host %s: %w", name, errs.NotFound)
		}
		return &control.Actor{ID: control.PeerID("hosts", name), Name: "host " + name}, nil
	})
	whoami := func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
		if again, ok := httpapi.ActorOf(r.Context()); !ok || again.ID != by.ID {
			t.Errorf("the context says %+v", again)
		}
		_, err := io.WriteString(w, by.ID+" "+by.Name)
		return err
	}
	api := httpapi.New(door, slog.New(slog.DiscardHandler), time.Now, httpapi.Mount(
		httpapi.Route{Method: "GET", Path: "/ringwall/test/whoami", Serve: whoami},
		httpapi.Route{Method: "GET", Path: "/ringwall.test.v1.Enrolment/", Serve: whoami, Who: func(r *http.Request) (*control.Actor, error) {
			if r.Header.Get("Authorization") != "Bearer join" {
				return nil, fmt.Errorf("no join token: %w", errs.Untrusted)
			}
			return &control.Actor{ID: "join", Name: "join"}, nil
		}},
	))
	srv := httptest.NewUnstartedServer(api)
	pool := x509.NewCertPool()
	pool.AddCert(clients.Certificate())
	srv.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool, MinVersion: tls.VersionTLS13}
	srv.StartTLS()
	t.Cleanup(srv.Close)

	certify := func(by *pki.TLSAuthority, uri string) *tls.Certificate {
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := by.CertifyClient(csr, uri, time.Hour, now)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key}
	}
	for name, tc := range map[string]struct {
		cert         *tls.Certificate
		path, bearer string
		status       int // 0: TLS itself refuses
		body         string
	}{
		"a host":                          {cert: certify(clients, "ringwall://hosts/h1"), status: 200, body: "ringwall://hosts/h1 host h1"},
		"nobody":                          {status: 401},
		"a host that is not known":        {cert: certify(clients, "ringwall://hosts/h2"), status: 401},
		"a kind that nobody handles":      {cert: certify(clients, "ringwall://services/h1"), status: 401},
		"another scheme":                  {cert: certify(clients, "spiffe://hosts/h1"), status: 401},
		"a longer path":                   {cert: certify(clients, "ringwall://hosts/h1/x"), status: 401},
		"a query":                         {cert: certify(clients, "ringwall://hosts/h1?x"), status: 401},
		"another authority":               {cert: certify(other, "ringwall://hosts/h1")},
		"a wrong token beside it":         {cert: certify(clients, "ringwall://hosts/h1"), bearer: "Bearer x", status: 401},
		"an odd header beside it":         {cert: certify(clients, "ringwall://hosts/h1"), bearer: "Basic x", status: 401},
		"a join token, where it is taken": {path: "/ringwall.test.v1.Enrolment/Enrol", bearer: "Bearer join", status: 200, body: "join join"},
		"a join token, elsewhere":         {bearer: "Bearer join", status: 401},
		"a certificate for enrolment":     {path: "/ringwall.test.v1.Enrolment/Enrol", cert: certify(clients, "ringwall://hosts/h1"), status: 401},
	} {
		client := srv.Client()
		tr := client.Transport.(*http.Transport).Clone()
		if tc.cert != nil {
			tr.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return tc.cert, nil }
		}
		if tc.path == "" {
			tc.path = "/ringwall/test/whoami"
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if tc.bearer != "" {
			req.Header.Set("Authorization", tc.bearer)
		}
		resp, err := (&http.Client{Transport: tr}).Do(req)
		if err != nil {
			if tc.status != 0 {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		b, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		tr.CloseIdleConnections()
		if resp.StatusCode != tc.status || tc.body != "" && string(b) != tc.body {
			t.Errorf("%s: %d %s", name, resp.StatusCode, b)
		}
	}
}

func TestMount_refuses(t *testing.T) {
	for _, r := range []httpapi.Route{{Path: "/"}, {Path: "/healthz2"}, {Path: "/ringwall/x", Public: true}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%+v was mounted", r)
				}
			}()
			httpapi.New(nil, nil, time.Now, httpapi.Mount(r))
		}()
	}
}
