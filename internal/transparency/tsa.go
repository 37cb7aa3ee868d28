package transparency

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// RFC 3161, 3.4.
const (
	typeTimestampQuery = "application/timestamp-query"
	typeTimestampReply = "application/timestamp-reply"
)

// Bounds of asking a timestamp authority.
const (
	maxTimestampReply = 16 << 10
	tsaTimeout        = 15 * time.Second // one try
	tsaTries          = 3
)

// TSAClient asks a timestamp authority elsewhere, by HTTP (RFC 3161, 3.4). It
// implements pki.Stamper.
type TSAClient struct {
	url   string
	roots []pki.Anchor
	http  *http.Client
	wait  time.Duration // before the second try; then twice as long
}

// NewTSAClient returns a client of the authority at a URL. A timestamp by
// anyone but roots is refused when it comes, not when a host sees it. HTTP
// without TLS will do: the token is signed and answers this request only.
func NewTSAClient(address string, roots []pki.Anchor) (*TSAClient, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Fragment != "" {
		return nil, fmt.Errorf("timestamp authority %.200q: want an http or https URL: %w", address, errs.Invalid)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("timestamp authority %s: no certificate to verify it by: %w", u.Redacted(), errs.Invalid)
	}
	return &TSAClient{url: address, roots: roots, http: &http.Client{Timeout: tsaTimeout}, wait: time.Second}, nil
}

// Stamp implements pki.Stamper. It tries again when the network or the server
// fails, not when the answer is wrong, and gives up after a minute.
func (c *TSAClient) Stamp(message []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	der, err := c.stamp(ctx, message)
	if err != nil {
		return nil, fmt.Errorf("timestamp from %s: %w", c.url, err)
	}
	return der, nil
}

func (c *TSAClient) stamp(ctx context.Context, message []byte) ([]byte, error) {
	request, err := pki.TimestampRequest(message)
	if err != nil {
		return nil, err
	}
	var der []byte
	for try, wait := 1, c.wait; ; try, wait = try+1, 2*wait {
		var again bool
		der, again, err = c.ask(ctx, request)
		if err == nil {
			break
		}
		if !again || try == tsaTries {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-time.After(wait):
		}
	}
	if err := pki.CheckTimestampReply(der, request); err != nil {
		return nil, err
	}
	if _, err := pki.VerifyTimestamp(der, message, c.roots); err != nil {
		return nil, err
	}
	return der, nil
}

// ask sends one request, and says whether another try makes sense.
func (c *TSAClient) ask(ctx context.Context, request []byte) (der []byte, again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(request))
	if err != nil {
		return nil, false, err
	}
	req.Header.Set("Content-Type", typeTimestampQuery)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, true, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		again := res.StatusCode >= http.StatusInternalServerError || res.StatusCode == http.StatusTooManyRequests
		return nil, again, fmt.Errorf("HTTP status %s", res.Status)
	}
	if t, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); t != typeTimestampReply {
		return nil, false, fmt.Errorf("content type %.80q, not %s: %w", t, typeTimestampReply, errs.Invalid)
	}
	der, err = io.ReadAll(io.LimitReader(res.Body, maxTimestampReply+1))
	if err != nil {
		return nil, true, err
	}
	if len(der) > maxTimestampReply {
		return nil, false, fmt.Errorf("answer of more than %d bytes: %w", maxTimestampReply, errs.Invalid)
	}
	return der, false, nil
}

// TSAHandler serves a timestamp authority by HTTP (RFC 3161, 3.4). Who may ask
// is for the server to decide; whoever can ask cannot back-date.
func TSAHandler(tsa *pki.TSA) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "want POST", http.StatusMethodNotAllowed)
			return
		}
		if t, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); t != typeTimestampQuery {
			http.Error(w, "want "+typeTimestampQuery, http.StatusUnsupportedMediaType)
			return
		}
		request, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxTimestampReply))
		if err != nil {
			http.Error(w, "request is too long or cut", http.StatusBadRequest)
			return
		}
		der, err := tsa.Respond(request)
		switch {
		case errors.Is(err, errs.Invalid):
			http.Error(w, "not a request that can be granted", http.StatusBadRequest)
			return
		case err != nil:
			http.Error(w, "no timestamp at the moment", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", typeTimestampReply)
		_, _ = w.Write(der) // the client is gone: nothing to tell it
	})
}
