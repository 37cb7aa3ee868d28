package notify

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/quotedprintable"
	"net"
	"net/http"
	"net/mail"
	"net/smtp"
	"net/url"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ringwall/internal/errs"
)

// How long one delivery may take, and how often it is tried.
const (
	sendTimeout = 10 * time.Second
	sendTries   = 3
	maxOutput   = 4 << 10
)

// poster posts documents to one address.
type poster struct {
	url, token string
	name       string
	client     *http.Client // nil: one of its own
	pause      time.Duration
}

// Name implements Target.
func (p *poster) Name() string { return p.name }

// send posts a document. What the receiver or the network fails at is tried
// again; a refusal is not.
func (p *poster) send(ctx context.Context, path, contentType string, body []byte) error {
	pause := cmp.Or(p.pause, time.Second)
	for try := 1; ; try++ {
		again, err := p.post(ctx, path, contentType, body)
		if err == nil {
			return nil
		}
		if !again || try == sendTries {
			return err
		}
		select {
		case <-time.After(pause << try):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (p *poster) post(ctx context.Context, path, contentType string, body []byte) (again bool, err error) {
	ctx, stop := context.WithTimeout(ctx, sendTimeout)
	defer stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+path, bytes.NewReader(body))
	if err != nil {
		return false, errors.New("its address is no URL")
	}
	req.Header.Set("Content-Type", contentType)
	if p.token != "" {
		req.Header.Set("Authorization", "Bearer "+p.token)
	}
	client := p.client
	if client == nil {
		// A redirect would take the token elsewhere.
		client = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	resp, err := client.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // without the address
		}
		return true, err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxOutput))
	_ = resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests, fmt.Errorf("it answers %s", resp.Status)
	}
	return false, nil
}

// webhook posts events.
type webhook struct{ poster }

// Send implements Target.
func (w *webhook) Send(ctx context.Context, m *Message) error {
	body, err := m.event()
	if err != nil {
		return err
	}
	return w.send(ctx, "", cloudEventType, body)
}

// How a connection to a mail server is protected.
const (
	tlsStart    = "starttls"
	tlsImplicit = "implicit"
	tlsNone     = "none"
)

// mailer sends mail through one server.
type mailer struct {
	server, host, name string
	from               string
	to                 []string
	tls                string
	username, password string
	roots              *tls.Config // nil: the system's roots
}

// Name implements Target.
func (m *mailer) Name() string { return m.name }

// recipients are the configured ones and the owners that are addresses.
func (m *mailer) recipients(owners []string) []string {
	out := slices.Clone(m.to)
	for _, o := range owners {
		if bad, _ := checkAddress(o); bad == "" && !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}

// Send implements Target. It fails closed: where TLS is asked for and the server
// has none, nothing is sent.
func (m *mailer) Send(ctx context.Context, msg *Message) error {
	to := m.recipients(msg.Owners)
	if len(to) == 0 {
		return fmt.Errorf("nobody to send it to: no owner is a mail address, and to is empty: %w", errs.NotFound)
	}
	body, err := m.compose(msg, to)
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, 3*sendTimeout)
	defer stop()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", m.server)
	if err != nil {
		return err
	}
	defer conn.Close()
	if at, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(at); err != nil {
			return err
		}
	}
	return m.deliver(conn, to, body)
}

func (m *mailer) deliver(conn net.Conn, to []string, body []byte) error {
	protect := &tls.Config{MinVersion: tls.VersionTLS12}
	if m.roots != nil {
		protect = m.roots.Clone()
	}
	protect.ServerName = m.host
	if m.tls == tlsImplicit {
		conn = tls.Client(conn, protect)
	}
	c, err := smtp.NewClient(conn, m.host)
	if err != nil {
		return err
	}
	defer c.Close()
	if m.tls == tlsStart {
		if err := c.StartTLS(protect); err != nil {
			return fmt.Errorf("STARTTLS: %w", err)
		}
	}
	if m.password != "" {
		if err := c.Auth(smtp.PlainAuth("", m.username, m.password, m.host)); err != nil {
			return fmt.Errorf("authenticate as %s: %w", m.username, err)
		}
	}
	if err := c.Mail(m.from); err != nil {
		return err
	}
	for _, a := range to {
		if err := c.Rcpt(a); err != nil {
			return fmt.Errorf("recipient %s: %w", a, err)
		}
	}
	w, err := c.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write(body); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return c.Quit()
}

// compose writes the mail. Nothing of the message reaches a header unencoded.
func (m *mailer) compose(msg *Message, to []string) ([]byte, error) {
	var b bytes.Buffer
	header := func(k, v string) { fmt.Fprintf(&b, "%s: %s\r\n", k, v) }
	address := func(s string) string { return (&mail.Address{Address: s}).String() }
	var list []string
	for _, a := range to {
		list = append(list, address(a))
	}
	header("From", address(m.from))
	header("To", strings.Join(list, ", "))
	header("Subject", mime.QEncoding.Encode("utf-8", oneLine(msg.Title)))
	header("Date", msg.At.UTC().Format(time.RFC1123Z))
	header("Auto-Submitted", "auto-generated") // RFC 3834: no answer is wanted
	header("MIME-Version", "1.0")
	header("Content-Type", "text/plain; charset=utf-8")
	header("Content-Transfer-Encoding", "quoted-printable")
	b.WriteString("\r\n")
	q := quotedprintable.NewWriter(&b)
	text := msg.Text
	if len(msg.Owners) > 0 {
		text += "\n\nOwners: " + strings.Join(msg.Owners, ", ")
	}
	if _, err := io.WriteString(q, text+"\n"); err != nil {
		return nil, err
	}
	if err := q.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// oneLine drops what would end or steer a line.
func oneLine(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, s)
}

// command runs a program with the event on its standard input.
type command struct{ argv []string }

// Name implements Target.
func (c *command) Name() string { return "command " + filepath.Base(c.argv[0]) }

// Send implements Target.
func (c *command) Send(ctx context.Context, m *Message) error {
	body, err := m.event()
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, 3*sendTimeout)
	defer stop()
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.Stdin = bytes.NewReader(append(body, '\n'))
	cmd.WaitDelay = time.Second
	var out limited
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if text := oneLine(strings.TrimSpace(out.String())); text != "" {
			return fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	return nil
}

// limited keeps the beginning of what is written.
type limited struct{ bytes.Buffer }

// Write never fails.
func (l *limited) Write(p []byte) (int, error) {
	l.Buffer.Write(p[:min(len(p), max(0, maxOutput-l.Len()))])
	return len(p), nil
}
