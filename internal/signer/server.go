package signer

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"ringwall/internal/errs"
)

// Bounds of a request in time. A client that sends nothing for idle, or is not
// done after longest, is cut off.
const (
	idle    = time.Minute
	longest = 2 * time.Hour
	grace   = 5 * time.Minute // for requests that run when the server is told to stop
)

// Server signs for clients that have a certificate (mTLS, HTTP/2). Which
// products a client may ask for is its rule's to say.
type Server struct {
	Signer      *Signer
	Clients     []ClientRule
	Spool       string // directory for uploads
	SpoolMax    int64  // bytes in it
	ArtefactMax int64  // bytes of one artefact
	// Audit gets a line when a request is accepted and one when it is answered;
	// a request whose first line cannot be written is not served.
	Audit func(context.Context, Entry) error
	Log   *slog.Logger

	mu      sync.Mutex
	spooled int64
}

// TLSConfig returns the configuration of a server that serves only clients
// with a certificate of one of the CAs given, in PEM.
func TLSConfig(certificate, key, clientCAs []byte) (*tls.Config, error) {
	c, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate: %w: %w", err, errs.Invalid)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(clientCAs) {
		return nil, fmt.Errorf("CAs of clients: no certificate in it: %w", errs.Invalid)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{c}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1"},
	}, nil
}

// Serve serves until the context ends; requests that run then are given grace.
// What an earlier run left in the spool is removed first.
func (s *Server) Serve(ctx context.Context, l net.Listener, c *tls.Config) error {
	if err := s.sweep(); err != nil {
		return err
	}
	h := &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10,
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- h.Serve(tls.NewListener(l, c)) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if err := h.Shutdown(late); err != nil {
		return fmt.Errorf("stop: %w", errors.Join(err, h.Close()))
	}
	return nil
}

func (s *Server) sweep() error {
	if err := os.MkdirAll(s.Spool, 0o700); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	entries, err := os.ReadDir(s.Spool)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), spoolPrefix) {
			if err := os.Remove(filepath.Join(s.Spool, e.Name())); err != nil {
				return fmt.Errorf("spool: %w", err)
			}
		}
	}
	return nil
}

// Handler returns the service without TLS; it refuses requests that do not say
// who they are.
func (s *Server) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("POST "+pathSign, s.sign)
	m.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	return m
}

// client returns the rule of who asks. It fails closed.
func (s *Server) client(r *http.Request) (*ClientRule, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return nil, fmt.Errorf("no client certificate: %w", errs.Denied)
	}
	leaf := r.TLS.VerifiedChains[0][0]
	if len(leaf.URIs) != 1 {
		return nil, fmt.Errorf("the client certificate names %d URIs (want one): %w", len(leaf.URIs), errs.Denied)
	}
	id := leaf.URIs[0].String()
	i := slices.IndexFunc(s.Clients, func(c ClientRule) bool { return c.Identity == id })
	if i < 0 {
		return nil, fmt.Errorf("%s is no client of this signer: %w", id, errs.Denied)
	}
	return &s.Clients[i], nil
}

func (c *ClientRule) mayAsk(o *Order) error {
	switch {
	case o.Product == "":
		return fmt.Errorf("the order names no product: %w", errs.Invalid)
	case !slices.Contains(c.Products, o.Product) && !slices.Contains(c.Products, "*"):
		return fmt.Errorf("client %s may not ask for product %s: %w", c.Name, o.Product, errs.Denied)
	case o.Breakglass && !c.Breakglass:
		return fmt.Errorf("client %s may not break glass: %w", c.Name, errs.Denied)
	}
	return nil
}

// sign answers one request. Each leaves its lines in the audit, whatever comes
// of it.
func (s *Server) sign(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), longest)
	defer cancel()
	o := Order{ID: newID()}
	control := http.NewResponseController(w)
	signed, err := s.serve(ctx, control, r, &o)
	e := s.Signer.Entry("signed", &o, signed)
	var refused *Refused
	switch {
	case errors.As(err, &refused):
		e.Event, e.Error = "refused", err.Error()
	case err != nil:
		e.Event, e.Error = "failed", err.Error()
	}
	if auditErr := s.Audit(context.WithoutCancel(ctx), e); auditErr != nil && err == nil {
		err = fmt.Errorf("audit: %w", auditErr) // no audit, no signature that leaves
	}
	_ = control.SetWriteDeadline(time.Now().Add(idle + time.Duration(built(signed))*time.Microsecond))
	if err != nil {
		s.Log.LogAttrs(ctx, slog.LevelInfo, "not signed", slog.String("request", o.ID), slog.String("client", o.Client), slog.String("product", o.Product), slog.String("error", err.Error()))
		sendProblem(w, err, o.ID)
		return
	}
	s.Log.LogAttrs(ctx, slog.LevelInfo, "signed", slog.String("request", o.ID), slog.String("client", o.Client), slog.String("product", o.Product), slog.String("release", e.Release))
	if err := sendSigned(w, signed); err != nil {
		s.Log.LogAttrs(ctx, slog.LevelWarn, "answer not sent", slog.String("request", o.ID), slog.String("error", err.Error()))
	}
}

// built is how many bytes an answer has, about: a slow client gets time for it.
func built(s *Signed) int {
	if s == nil || s.Built == nil {
		return 0
	}
	return len(s.Built.Catalogue) + len(s.Built.Names) + len(s.KernelArchive())
}

func newID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func (s *Server) serve(ctx context.Context, control *http.ResponseController, r *http.Request, o *Order) (*Signed, error) {
	client, err := s.client(r)
	if err != nil {
		return nil, err
	}
	o.Client = client.Identity
	parts, err := r.MultipartReader()
	if err != nil {
		return nil, fmt.Errorf("request: %w: %w", err, errs.Invalid)
	}
	extend := func() error {
		// HTTP/2 and HTTP/1 servers have both; a recorder in a test has none
		err := control.SetReadDeadline(time.Now().Add(idle))
		if errors.Is(err, http.ErrNotSupported) {
			return nil
		}
		return err
	}
	if err := extend(); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	first, err := parts.NextPart()
	if err != nil {
		return nil, fmt.Errorf("request: %w: %w", err, errs.Invalid)
	}
	if err := readOrder(first, o); err != nil {
		return nil, err
	}
	if err := client.mayAsk(o); err != nil {
		return nil, err
	}
	if err := s.Audit(ctx, s.Signer.Entry("asked", o, nil)); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	artefact, err := readEvidence(parts, o)
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = filepath.Base(artefact.FileName())
	}
	path, drop, err := s.spool(artefact, extend)
	if err != nil {
		return nil, err
	}
	defer drop()
	if _, err := parts.NextPart(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("request: something follows the artefact: %w", errs.Invalid)
	}
	o.Path = path
	return s.Signer.Sign(ctx, *o)
}

func readOrder(p *multipart.Part, o *Order) error {
	b, err := readPart(p, partOrder, maxOrder)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(o); err != nil {
		return fmt.Errorf("order: %w: %w", err, errs.Invalid)
	}
	if strings.ContainsAny(o.Name, "/\\") || len(o.Name) > 255 {
		return fmt.Errorf("order: name %.60q: %w", o.Name, errs.Invalid)
	}
	return nil
}

// readEvidence reads up to the artefact, whose part it returns.
func readEvidence(parts *multipart.Reader, o *Order) (*multipart.Part, error) {
	total := 0
	for {
		p, err := parts.NextPart()
		if err != nil {
			return nil, fmt.Errorf("request: no artefact: %w: %w", err, errs.Invalid)
		}
		if p.FormName() == partArtefact {
			return p, nil
		}
		b, err := readPart(p, partEvidence, maxEvidenceBytes)
		if err != nil {
			return nil, err
		}
		if total += len(b); len(o.Evidence) == maxEvidence || total > 16*maxEvidenceBytes {
			return nil, fmt.Errorf("request: more than %d pieces of evidence, or too large: %w", maxEvidence, errs.Invalid)
		}
		o.Evidence = append(o.Evidence, Evidence{Label: filepath.Base(p.FileName()), Bundle: b})
	}
}

const spoolPrefix = "upload-"

// spool writes an artefact to disk, within the bounds of one and of all.
func (s *Server) spool(r io.Reader, extend func() error) (path string, drop func(), err error) {
	f, err := os.CreateTemp(s.Spool, spoolPrefix)
	if err != nil {
		return "", nil, fmt.Errorf("spool: %w", err)
	}
	var size int64
	drop = func() {
		_ = os.Remove(f.Name())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.spooled -= size
	}
	for {
		if err = extend(); err != nil {
			break
		}
		var n int64
		n, err = io.CopyN(f, r, 1<<20)
		size += n
		s.mu.Lock()
		s.spooled += n
		full := s.spooled > s.SpoolMax
		s.mu.Unlock()
		switch {
		case size > s.ArtefactMax:
			err = fmt.Errorf("artefact has more than %d bytes: %w", s.ArtefactMax, errs.Invalid)
		case full:
			err = fmt.Errorf("the spool is full; try again later: %w", errs.Conflict)
		}
		if err != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err := errors.Join(err, f.Close()); err != nil {
		drop()
		return "", nil, fmt.Errorf("upload: %w", err)
	}
	return f.Name(), drop, nil
}
