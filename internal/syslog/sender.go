package syslog

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

const (
	sendTimeout    = 20 * time.Second // for one Send
	dialTimeout    = 10 * time.Second
	ackPoll        = 10 * time.Millisecond
	maxDatagram    = 60 << 10 // bytes; UDP has 65507
	recentMessages = 256      // sent again after a broken connection
)

// Sender sends to one receiver. It connects when there is something to send, and
// again when the connection broke. It may be used by several goroutines.
type Sender struct {
	network, address string
	tls              *tls.Config

	mu     sync.Mutex
	conn   net.Conn
	recent [][]byte
}

// Open returns a sender to a URL. Nothing is connected yet.
//
//	udp://HOST:514          RFC 5426; nobody learns what is lost
//	tcp://HOST:601          RFC 6587, octet counting
//	tls://HOST:6514         RFC 5425; ca is who certifies the receiver, as PEM
//	unix:///dev/log         a local socket, datagrams or a stream
func Open(to string, ca []byte) (*Sender, error) {
	bad := fmt.Errorf("syslog receiver %.200q (want udp://, tcp:// or tls://HOST:PORT, or unix:///PATH): %w", to, errs.Invalid)
	u, err := url.Parse(to)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, bad
	}
	s := &Sender{network: u.Scheme, address: u.Host}
	switch u.Scheme {
	case "unix":
		s.address = u.Path
		if u.Host != "" || u.Path == "" {
			return nil, bad
		}
		return s, nil
	case "udp", "tcp":
	case "tls":
		s.network = "tcp"
		s.tls = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()} // 1.2: what Debian's rsyslog offers everywhere
		if len(ca) > 0 {
			s.tls.RootCAs = x509.NewCertPool()
			if !s.tls.RootCAs.AppendCertsFromPEM(ca) {
				return nil, fmt.Errorf("syslog receiver %s: its CA holds no certificate: %w", to, errs.Invalid)
			}
		}
	default:
		return nil, bad
	}
	if u.Hostname() == "" || u.Port() == "" || u.Path != "" {
		return nil, bad
	}
	return s, nil
}

// Send sends messages in order and returns when the receiver's kernel has them.
// After an error none or some may have come.
func (s *Sender) Send(ctx context.Context, messages ...Message) error {
	frames := make([][]byte, 0, len(messages))
	for i := range messages {
		frames = append(frames, messages[i].Encode())
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.send(ctx, frames); err != nil {
		return errors.Join(fmt.Errorf("send to %s %s: %w", s.network, s.address, err), s.close())
	}
	s.recent = append(s.recent, frames...)
	s.recent = append([][]byte{}, s.recent[max(0, len(s.recent)-recentMessages):]...)
	return nil
}

// Close ends the connection.
func (s *Sender) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.close()
}

func (s *Sender) close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}

func (s *Sender) send(ctx context.Context, frames [][]byte) error {
	if s.conn != nil && s.gone() {
		_ = s.close() // known to be broken
	}
	if s.conn == nil {
		if err := s.connect(ctx); err != nil {
			return err
		}
		if s.stream() { // what the old receiver's kernel had, the receiver may have lost
			frames = append(append([][]byte{}, s.recent...), frames...)
		}
	}
	end, _ := ctx.Deadline()
	if err := s.conn.SetWriteDeadline(end); err != nil {
		return err
	}
	for _, f := range frames {
		switch {
		case s.stream():
			f = append(strconv.AppendInt(nil, int64(len(f)), 10), append([]byte{' '}, f...)...)
		case len(f) > maxDatagram:
			f = f[:maxDatagram]
		}
		if _, err := s.conn.Write(f); err != nil {
			return err
		}
	}
	return s.acknowledged(ctx)
}

// stream reports whether messages need a length, and are known to have come.
func (s *Sender) stream() bool {
	n := s.conn.RemoteAddr().Network()
	return n == "tcp" || n == "unix"
}

func (s *Sender) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	networks := []string{s.network}
	if s.network == "unix" {
		networks = []string{"unixgram", "unix"}
	}
	var failed error
	for _, n := range networks {
		c, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(ctx, n, s.address)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		if s.tls != nil {
			t := tls.Client(c, s.tls)
			if err := t.HandshakeContext(ctx); err != nil {
				return errors.Join(err, c.Close())
			}
			c = t
		}
		s.conn = c
		return nil
	}
	return failed
}

// gone reports whether the receiver ended a stream: it never says anything, so
// that there is nothing to read but the end.
func (s *Sender) gone() bool {
	if !s.stream() {
		return false
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		return true
	}
	_, err := s.conn.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// acknowledged waits until the receiver's kernel has all of a stream: what TCP
// has written and not seen acknowledged would be lost with the connection.
func (s *Sender) acknowledged(ctx context.Context) error {
	c := s.conn
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	for {
		left := 0
		var failed error
		if err := raw.Control(func(fd uintptr) { left, failed = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil || failed != nil {
			return errors.Join(err, failed)
		}
		if s.gone() {
			return fmt.Errorf("the receiver ended the connection: %w", net.ErrClosed)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(ackPoll):
		}
	}
}
