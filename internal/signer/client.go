package signer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"ringwall/internal/errs"
)

// Client asks a Server.
type Client struct {
	url  string
	http *http.Client
}

// NewClient returns a client of the server at a URL such as
// https://signer.fleet.example:8620, with a client certificate and the CAs of
// the server's, in PEM.
func NewClient(server string, certificate, key, cas []byte) (*Client, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" {
		return nil, fmt.Errorf("signer %.200q: want https://HOST:PORT: %w", server, errs.Invalid)
	}
	c, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("client certificate: %w: %w", err, errs.Invalid)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(cas) {
		return nil, fmt.Errorf("CAs of the signer: no certificate in it: %w", errs.Invalid)
	}
	return &Client{
		url: "https://" + u.Host + pathSign,
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{Certificates: []tls.Certificate{c}, RootCAs: pool, MinVersion: tls.VersionTLS13},
			ForceAttemptHTTP2: true, TLSHandshakeTimeout: 15 * time.Second,
		}},
	}, nil
}

// Answer is what a server answered. Nothing in it was verified by the client.
type Answer struct {
	Result    Result
	Bundle    []byte
	Catalogue []byte
	Names     []byte
	Kernel    []byte // an archive of kernel signatures; empty: none
}

// Submit sends the artefact at o.Path, a file, and waits for its release. sent
// is told how many bytes are on their way, of how many; nil: nobody asks. The
// error is as Signer.Sign's.
func (c *Client) Submit(ctx context.Context, o Order, sent func(n, of int64)) (*Answer, error) {
	f, err := os.Open(o.Path)
	if err != nil {
		return nil, fmt.Errorf("artefact: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("artefact: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("artefact %s is no file; pack a directory with tar: %w", o.Path, errs.Invalid)
	}
	if o.Name == "" {
		o.Name = filepath.Base(o.Path)
	}
	body, w := io.Pipe()
	m := multipart.NewWriter(w)
	go func() {
		w.CloseWithError(send(m, &o, &counter{r: f, of: st.Size(), tell: sent}))
	}()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, body)
	if err != nil {
		return nil, fmt.Errorf("signer: %w", err)
	}
	r.Header.Set("Content-Type", m.FormDataContentType())
	resp, err := c.http.Do(r)
	_ = body.CloseWithError(errors.New("answered")) // frees the sender, whatever came
	if err != nil {
		return nil, fmt.Errorf("signer: %w", err)
	}
	defer resp.Body.Close()
	return readAnswer(resp)
}

func send(m *multipart.Writer, o *Order, artefact io.Reader) error {
	order, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := addPart(m, partOrder, "", order); err != nil {
		return err
	}
	for _, e := range o.Evidence {
		if err := addPart(m, partEvidence, e.Label, e.Bundle); err != nil {
			return err
		}
	}
	w, err := newPart(m, partArtefact, o.Name)
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, artefact); err != nil {
		return err
	}
	return m.Close()
}

type counter struct {
	r     io.Reader
	n, of int64
	tell  func(n, of int64)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.n += int64(n); c.tell != nil {
		c.tell(c.n, c.of)
	}
	return n, err
}

func readAnswer(resp *http.Response) (*Answer, error) {
	kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil {
		return nil, fmt.Errorf("signer: status %s without content: %w", resp.Status, errs.Invalid)
	}
	if kind == typeJSON && resp.StatusCode != http.StatusOK {
		var p problem
		if err := json.NewDecoder(io.LimitReader(resp.Body, maxResult)).Decode(&p); err != nil {
			return nil, fmt.Errorf("signer: status %s: %w: %w", resp.Status, err, errs.Invalid)
		}
		return nil, p.asError()
	}
	if kind != "multipart/mixed" || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("signer: status %s, content %s; is it a signer? %w", resp.Status, kind, errs.Invalid)
	}
	var a Answer
	var result []byte
	parts := multipart.NewReader(resp.Body, params["boundary"])
	for _, x := range []struct {
		name  string
		to    *[]byte
		limit int64
	}{
		{partResult, &result, maxResult}, {partCatalogue, &a.Catalogue, maxCatalogue}, {partNames, &a.Names, maxCatalogue}, {partKernel, &a.Kernel, maxKernelWire}, {partRelease, &a.Bundle, maxBundle},
	} {
		p, err := parts.NextPart()
		if err != nil {
			return nil, fmt.Errorf("signer: the answer was cut off: %w", err)
		}
		if *x.to, err = readPart(p, x.name, x.limit); err != nil {
			return nil, fmt.Errorf("signer: %w", err)
		}
	}
	if err := json.Unmarshal(result, &a.Result); err != nil {
		return nil, fmt.Errorf("signer: result: %w: %w", err, errs.Invalid)
	}
	return &a, nil
}
