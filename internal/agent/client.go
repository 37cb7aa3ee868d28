package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"

	"ringwall/internal/errs"
)

// Client talks to the agent on this host.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the agent with this run directory.
func NewClient(runDir string) *Client {
	c := &Client{socket: filepath.Join(runDir, SocketName)}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", c.socket)
	}
	c.http = &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	return c
}

// Status asks the agent how it stands.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s := &Status{}
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, s)
}

// Call posts a request to one of the control socket's routes, such as
// "policy", and decodes the answer. errs.NotFound means that no agent listens;
// other kinds are the agent's own.
func (c *Client) Call(ctx context.Context, route string, request, answer any) error {
	b, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	return c.do(ctx, http.MethodPost, "/v1/"+route, b, answer)
}

func (c *Client) do(ctx context.Context, method, route string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+route, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("no agent listens on %s: %w", c.socket, errs.NotFound)
		}
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("the agent answers root only (%s): %w", c.socket, errs.Denied)
		}
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxRequest))
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return remote(b, resp.Status)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("the agent's answer: %w: %w", err, errs.Invalid)
	}
	return nil
}

// remoteError is an error of the agent, with its kind.
type remoteError struct {
	text string
	kind error
}

func (e remoteError) Error() string { return e.text }
func (e remoteError) Unwrap() error { return e.kind }

func remote(body []byte, status string) error {
	var f failure
	if err := json.Unmarshal(body, &f); err != nil || f.Error == "" {
		return fmt.Errorf("the agent answers %s: %w", status, errs.Invalid)
	}
	for _, k := range kinds() {
		if k.name == f.Kind {
			return remoteError{f.Error, k.err}
		}
	}
	return errors.New(f.Error)
}
