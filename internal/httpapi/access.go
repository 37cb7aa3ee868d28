package httpapi

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Access is what AccessRoutes needs of control.Door.
type Access interface {
	Access(ctx context.Context, by control.Actor, q control.Question) (*control.Answer, error)
	CertifyService(ctx context.Context, by control.Actor, ca control.ClientAuthority, name string, csr []byte, life time.Duration, now time.Time) (*x509.Certificate, error)
}

// CertificateRequest is the body of POST /ringwall/certificates.
type CertificateRequest struct {
	Name  string `json:"name"`  // of the service
	CSR   string `json:"csr"`   // PEM
	Hours int    `json:"hours"` // at most 720; 0: a day
}

// CertificateAnswer is its answer.
type CertificateAnswer struct {
	Principal   string    `json:"principalId"`
	Certificate string    `json:"certificate"` // PEM
	NotAfter    time.Time `json:"notAfter"`
}

// Who is the answer of /ringwall/whoami.
type Who struct {
	Principal string   `json:"principalId"`
	Name      string   `json:"name"`
	Groups    []string `json:"groups"`
}

// AccessRoutes say who one is, what somebody may, and give services certificates.
func AccessRoutes(d Access, ca control.ClientAuthority, now func() time.Time) []Route {
	whoami := func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
		a, err := d.Access(r.Context(), by, control.Question{Action: "Ringwall.Identity/none/read"})
		if err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, Who{by.ID, by.Name, a.Groups})
	}
	can := func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
		v := r.URL.Query()
		scope, err := resource.ParseID(cmp.Or(v.Get("scope"), "/"))
		if err != nil {
			return err
		}
		a, err := d.Access(r.Context(), by, control.Question{
			Principal: v.Get("principal"), Groups: v["group"], Action: v.Get("action"), Data: v.Get("data") == "true", Scope: scope,
		})
		if err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, a)
	}
	certify := func(w http.ResponseWriter, r *http.Request, by control.Actor) error {
		var q CertificateRequest
		if err := readJSON(r, &q); err != nil {
			return err
		}
		if q.Hours < 0 || q.Hours > int(control.MaxServiceLife/time.Hour) {
			return fmt.Errorf("%d hours (1 to %d): %w", q.Hours, int(control.MaxServiceLife/time.Hour), errs.Invalid)
		}
		cert, err := d.CertifyService(r.Context(), by, ca, q.Name, []byte(q.CSR), time.Duration(cmp.Or(q.Hours, 24))*time.Hour, now())
		if err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, CertificateAnswer{
			control.PeerID(control.PeerService, q.Name), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})), cert.NotAfter,
		})
	}
	return []Route{
		{Method: http.MethodGet, Path: "/ringwall/whoami", Serve: whoami, Summary: "Who asks", Answer: Who{}},
		{
			Method: http.MethodGet, Path: "/ringwall/can", Serve: can, Summary: "Whether somebody may do something, and why", Answer: control.Answer{},
			Query: []Query{
				{"principal", "object id; default: who asks"},
				{"action", "such as Ringwall.Fleet/rollouts/write"},
				{"scope", "id of the resource; default: the root"},
				{"data", "true for a data action"},
				{"group", "object id of a group that comes with a sign-on elsewhere; repeat"},
			},
		},
		{
			Method: http.MethodPost, Path: "/ringwall/certificates", Serve: certify, MaxBody: 64 << 10, Summary: "Certify the key of a service",
			Body: CertificateRequest{}, Answer: CertificateAnswer{},
		},
	}
}

// readJSON reads a body that holds one value and nothing that is not known.
func readJSON(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		if tooLong, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return fmt.Errorf("the body is longer than %d bytes: %w", tooLong.Limit, errs.Invalid)
		}
		return fmt.Errorf("the body cannot be read: %w: %w", err, errs.Invalid)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the body goes on after the document: %w", errs.Invalid)
	}
	return nil
}
