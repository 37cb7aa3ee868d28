package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

func newCertCommand(e *env) *cobra.Command {
	return newGroup("cert", groupFleet, "Give services certificates",
		`A service, such as a CI job, shows the server a client certificate instead of a
token. It lasts for hours, and the service renews it before it ends:

  ringwall cert issue ci --out ci                       makes ci.key and ci.crt
  ringwall role assign release-manager --to service:ci
  ringwall login --server URL --ca ca.crt --cert ci.crt --key ci.key
  ringwall cert renew                                   in the service, every few hours`,
		newCertIssueCommand(e), newCertRenewCommand(e), newCertListCommand(e), newCertRevokeCommand(e))
}

func certify(ctx context.Context, e *env, name string, csr []byte, hours int) (*httpapi.CertificateAnswer, error) {
	b, err := json.Marshal(httpapi.CertificateRequest{Name: name, CSR: string(csr), Hours: hours})
	if err != nil {
		return nil, err
	}
	var out httpapi.CertificateAnswer
	return &out, askJSON(ctx, e, api.Request{Method: http.MethodPost, Path: "/ringwall/certificates", Body: b}, &out)
}

// newRequest makes a key, as PEM, and a request for it.
func newRequest() (key, csr []byte, err error) {
	k, err := pki.NewKey()
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	req, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: req}), nil
}

func newCertIssueCommand(e *env) *cobra.Command {
	var out, csrFile string
	var hours int
	c := &cobra.Command{
		Use:   "issue NAME --out STEM",
		Short: "Make a certificate for a service",
		Long: `Certifies a service, whose object id is ringwall://services/NAME (service:NAME on
the command line). The key is made here, in STEM.key, and never leaves; with --csr
it was made elsewhere, and only STEM.crt is written. It takes what assigning roles
takes.

JSON: {"principalId", "certificate", "notAfter"}`,
		Example: `  ringwall cert issue ci --out ci
  ringwall cert issue ci --csr ci.csr --out ci --hours 720`,
		Args: exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			var key, csr []byte
			var err error
			if csrFile != "" {
				csr, err = readBounded(csrFile, 64<<10)
			} else {
				key, csr, err = newRequest()
			}
			if err != nil {
				return err
			}
			if exists(out+".crt") || key != nil && exists(out+".key") {
				return fmt.Errorf("%s.crt or %[1]s.key: %w", out, errs.Conflict)
			}
			a, err := certify(c.Context(), e, args[0], csr, hours)
			if err != nil {
				return err
			}
			if key != nil {
				if err := host.WriteFile(out+".key", key, 0o600); err != nil {
					return err
				}
			}
			if err := host.WriteFile(out+".crt", []byte(a.Certificate), 0o644); err != nil {
				return err
			}
			return e.emit(a, func(w io.Writer) {
				fmt.Fprintf(w, "%s.crt: %s, until %s\n", shown(out), a.Principal, a.NotAfter.Format(time.RFC3339))
			})
		},
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "`STEM` of the files")
	f.StringVar(&csrFile, "csr", "", "`FILE` with a certificate request")
	f.IntVar(&hours, "hours", 24, "how `LONG` it lasts, at most 720")
	require(c, "out")
	return c
}

func newCertRenewCommand(e *env) *cobra.Command {
	var hours int
	c := &cobra.Command{
		Use:   "renew",
		Short: "Renew the certificate that this service logged in with",
		Long: `Makes a new key and gets a certificate for it, with the one of ringwall login
--cert, and writes both in their place. A service may do that for itself, as long
as its certificate lasts and was not revoked.

JSON: {"principalId", "certificate", "notAfter"}`,
		Example: "  ringwall cert renew",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			file, err := sessionFile(e)
			if err != nil {
				return err
			}
			s, err := readSession(file)
			if err != nil {
				return err
			}
			if s.Certificate == "" {
				return hint(fmt.Errorf("this session is no service's: %w", errs.Invalid), "ringwall login --cert FILE --key FILE")
			}
			pair, err := tls.LoadX509KeyPair(s.Certificate, s.Key)
			if err != nil {
				return fmt.Errorf("%s: %w: %w", s.Certificate, err, errs.Invalid)
			}
			name := ""
			if len(pair.Leaf.URIs) == 1 {
				name = strings.TrimPrefix(pair.Leaf.URIs[0].String(), control.PeerID(control.PeerService, ""))
			}
			key, csr, err := newRequest()
			if err != nil {
				return err
			}
			a, err := certify(c.Context(), e, name, csr, hours)
			if err != nil {
				return err
			}
			// two files: if only the first is written, login says that they do not fit
			if err := host.WriteFile(s.Key, key, 0o600); err != nil {
				return err
			}
			if err := host.WriteFile(s.Certificate, []byte(a.Certificate), 0o644); err != nil {
				return err
			}
			return e.emit(a, func(w io.Writer) {
				fmt.Fprintf(w, "%s: %s, until %s\n", shown(s.Certificate), a.Principal, a.NotAfter.Format(time.RFC3339))
			})
		},
	}
	c.Flags().IntVar(&hours, "hours", 24, "how `LONG` it lasts, at most 720")
	return c
}

func newCertListCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List certificates of services",
		Long:    "Lists the certificates that count, or did until yesterday.\n\nJSON: {\"certificates\": [{\"serial\", \"principalId\", \"sha256\", \"notAfter\"}]}",
		Example: "  ringwall cert list",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			type certificate struct {
				Serial string `json:"serial"`
				control.Certificate
			}
			out := struct {
				Certificates []certificate `json:"certificates"`
			}{Certificates: []certificate{}}
			err := listDocuments(c.Context(), e, control.TypeCertificate, func(id resource.ID, p control.Certificate) error {
				out.Certificates = append(out.Certificates, certificate{id.Name(), p})
				return nil
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				for _, x := range out.Certificates {
					fmt.Fprintf(w, "%s  %-32s until %s\n", shown(x.Serial), shown(x.Principal), x.NotAfter.Format(time.RFC3339))
				}
			})
		},
	}
}

func newCertRevokeCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke NAME|SERIAL",
		Short: "Revoke the certificates of a service, or one",
		Long: `Revokes every certificate of a service, or the one with a serial number. It counts
from the next request on: the server looks each certificate up. Revoke all of a
service whose key was stolen, since the thief may have renewed.

JSON: {"revoked": [serials]}`,
		Example: "  ringwall cert revoke ci",
		Args:    exactly("NAME|SERIAL"),
		RunE: func(c *cobra.Command, args []string) error {
			out := struct {
				Revoked []string `json:"revoked"`
			}{Revoked: []string{}}
			err := listDocuments(c.Context(), e, control.TypeCertificate, func(id resource.ID, p control.Certificate) error {
				if id.Name() == args[0] || p.Principal == control.PeerID(control.PeerService, args[0]) {
					out.Revoked = append(out.Revoked, id.Name())
				}
				return nil
			})
			if err != nil {
				return err
			}
			if len(out.Revoked) == 0 {
				return fmt.Errorf("no certificate of %.80q: %w", args[0], errs.NotFound)
			}
			for _, serial := range out.Revoked {
				if err := askJSON(c.Context(), e, api.Request{Method: http.MethodDelete, Path: "/providers/" + control.TypeCertificate + "/" + serial}, nil); err != nil {
					return err
				}
			}
			return e.emit(out, func(w io.Writer) {
				for _, s := range out.Revoked {
					fmt.Fprintf(w, "revoked %s\n", s)
				}
			})
		},
	}
}
