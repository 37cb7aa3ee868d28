package agent

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"ringwall/internal/agentpb"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
)

// JoinRequest makes this host a member of a fleet.
type JoinRequest struct {
	Server string            `json:"server"` // https://HOST[:PORT]
	CA     string            `json:"ca"`     // PEM
	Token  string            `json:"token"`  // used once; not kept
	Name   string            `json:"name,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
}

// Bounds of what a host says of itself.
const (
	maxLabels   = 32
	maxLabel    = 128
	maxToken    = 4 << 10
	maxChain    = 8
	maxCertSize = 16 << 10
)

func (q *JoinRequest) check() error {
	if _, err := checkServer(q.Server); err != nil {
		return err
	}
	if q.Token == "" || len(q.Token) > maxToken {
		return fmt.Errorf("join token of %d bytes: %w", len(q.Token), errs.Invalid)
	}
	if q.Name == "" {
		q.Name, _ = os.Hostname()
	}
	if q.Name == "" || len(q.Name) > maxLabel || strings.ContainsFunc(q.Name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("name %.80q of this host: want up to %d characters of ASCII without blanks: %w", q.Name, maxLabel, errs.Invalid)
	}
	if len(q.Labels) > maxLabels {
		return fmt.Errorf("%d labels, at most %d: %w", len(q.Labels), maxLabels, errs.Invalid)
	}
	for k, v := range q.Labels {
		if k == "" || len(k) > maxLabel || len(v) > maxLabel || strings.Contains(k, "=") || strings.ContainsFunc(k+v, func(r rune) bool { return r < ' ' || r > '~' }) {
			return fmt.Errorf("label %.80q: want up to %d characters of ASCII: %w", k+"="+v, maxLabel, errs.Invalid)
		}
	}
	j := joined{CA: q.CA}
	_, _, err := j.pool()
	return err
}

// ownLabels are what this machine says of itself; those that were given come first.
func ownLabels(given []string) map[string]string {
	out := map[string]string{"arch": runtime.GOARCH}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		out["kernel"] = clip(unix.ByteSliceToString(u.Release[:]), maxLabel)
	}
	if b, err := readFile("/etc/os-release", 64<<10); err == nil {
		f := map[string]string{}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
			f[k] = strings.Trim(v, `"'`)
		}
		if f["ID"] != "" {
			out["image"] = clip(strings.TrimSuffix(f["ID"]+"-"+f["VERSION_ID"], "-"), maxLabel)
		}
	}
	for _, x := range given {
		k, v, _ := strings.Cut(x, "=")
		out[k] = v
	}
	return out
}

// Join makes this host a member of a fleet. Its key is made here and never leaves
// it. Doing it again with the same server changes nothing; a first try whose answer
// was lost goes on with the same key. Another server is errs.Conflict.
func (a *Agent) Join(ctx context.Context, q JoinRequest) (LinkStatus, error) {
	l := a.link
	l.joining.Lock()
	defer l.joining.Unlock()
	j, err := a.state.enrol(ctx, l, q, a.opts.Now(), a.opts.Version)
	if err != nil {
		return LinkStatus{}, fmt.Errorf("join: %w", err)
	}
	l.mu.Lock()
	if l.joined == nil || l.joined.Host == "" || l.joined.Key != j.Key {
		l.joined = j
		l.begin()
	}
	l.mu.Unlock()
	a.pipe.notice(noticeLink, "this host is "+j.Name+" ("+j.Host+") of the fleet at "+j.Server)
	return *a.linkStatus(), nil
}

// JoinStopped is Join for a host whose agent does not run; the next start begins to
// talk to the server.
func JoinStopped(ctx context.Context, dir string, q JoinRequest, now time.Time, version string) (LinkStatus, error) {
	s, err := OpenState(dir)
	if err != nil {
		return LinkStatus{}, fmt.Errorf("join: %w", err)
	}
	if err := s.repair(); err != nil {
		return LinkStatus{}, fmt.Errorf("join: %w", err)
	}
	j, err := s.enrol(ctx, &link{}, q, now, version)
	if err != nil {
		return LinkStatus{}, fmt.Errorf("join: %w", err)
	}
	return LinkStatus{Server: j.Server, Host: j.Host, Name: j.Name, Resource: j.Resource, State: linkConnecting, Phase: "none"}, nil
}

// enrol returns the membership, which is stored.
func (s *State) enrol(ctx context.Context, l *link, q JoinRequest, now time.Time, version string) (*joined, error) {
	if err := q.check(); err != nil {
		return nil, err
	}
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(q.Labels)) {
		labels = append(labels, k+"="+q.Labels[k])
	}
	j, err := s.readLink()
	switch {
	case err == nil && j.Server != q.Server:
		return nil, fmt.Errorf("this host is in the fleet at %s; `ringwall host leave` first: %w", j.Server, errs.Conflict)
	case err == nil && j.Host != "" && !j.expired(now):
		return j, nil
	case err == nil && j.Host == "":
		j.CA, j.Name, j.Labels = q.CA, q.Name, labels // the same key asks again
	default: // never joined, expired, or damaged
		j = &joined{Server: q.Server, CA: q.CA, Name: q.Name, Labels: labels}
		if j.Key, _, err = newCSR(q.Name); err != nil {
			return nil, err
		}
	}
	if err := s.writeLink(j); err != nil {
		return nil, err
	}
	resp, err := l.ask(ctx, j, q.Token, s.Host(), version)
	if err != nil {
		return nil, err
	}
	if len(resp.GetAttestation()) > 0 && len(resp.GetCertificates()) == 0 {
		return nil, fmt.Errorf("the server wants this host to prove itself by its TPM, which this version cannot do when it joins: %w", errs.Unsupported)
	}
	n := *j
	if n.Certificates, err = checkChain(resp.GetCertificates(), j.Key, now); err != nil {
		return nil, err
	}
	where, err := resource.ParseID(resp.GetResourceId())
	if err != nil {
		return nil, fmt.Errorf("the server's answer: %w", err)
	}
	if n.Host, n.Resource, n.Renew = resp.GetHostId(), where.String(), resp.GetRenewUs(); n.Host == "" || len(n.Host) > maxLabel {
		return nil, fmt.Errorf("the server's answer has no host id: %w", errs.Invalid)
	}
	return &n, s.writeLink(&n)
}

func (j *joined) expired(now time.Time) bool {
	pair, err := j.keyPair()
	return err != nil || now.After(pair.Leaf.NotAfter)
}

// ask sends the one call that needs no certificate.
func (l *link) ask(ctx context.Context, j *joined, token, anchor, version string) (*agentpb.EnrolResponse, error) {
	ctx, stop := context.WithTimeout(ctx, callWait)
	defer stop()
	t, err := l.transport(j, nil)
	if err != nil {
		return nil, err
	}
	defer t.CloseIdleConnections()
	key, err := j.key()
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: clip(j.Name, 64)}}, key)
	if err != nil {
		return nil, err
	}
	resp, err := agentpb.NewEnrolmentClient(&http.Client{Transport: t}, j.Server, clientOptions()...).Enrol(ctx, connect.NewRequest(&agentpb.EnrolRequest{
		JoinToken: token, Name: j.Name, Csr: csr, Labels: ownLabels(j.Labels), AgentVersion: version, AnchorHost: anchor,
	}))
	if err != nil {
		return nil, fmt.Errorf("server %s: %w", j.Server, kindOfCall(err))
	}
	return resp.Msg, nil
}

// kindOfCall gives the server's refusals our kinds.
func kindOfCall(err error) error {
	switch connect.CodeOf(err) {
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return fmt.Errorf("%w: %w", err, errs.Denied)
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return fmt.Errorf("%w: %w", err, errs.Invalid)
	case connect.CodeAlreadyExists, connect.CodeAborted, connect.CodeFailedPrecondition:
		return fmt.Errorf("%w: %w", err, errs.Conflict)
	case connect.CodeUnimplemented:
		return fmt.Errorf("%w: %w", err, errs.Unsupported)
	}
	if _, bad := errors.AsType[*tls.CertificateVerificationError](err); bad {
		return fmt.Errorf("%w: %w", err, errs.Untrusted)
	}
	return err
}

// newCSR makes a key, as PEM, and a certificate request for it.
func newCSR(name string) (keyPEM string, csr []byte, err error) {
	key, err := pki.NewKey()
	if err != nil {
		return "", nil, err
	}
	b, err := pki.EncodeKey(key, nil)
	if err != nil {
		return "", nil, err
	}
	csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: clip(name, 64)}}, key)
	return string(b), csr, err
}

// checkChain makes PEM of the certificates that the server gave for a key.
func checkChain(ders [][]byte, keyPEM string, now time.Time) (string, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return "", fmt.Errorf("the server gave %d certificates: %w", len(ders), errs.Invalid)
	}
	var out []byte
	for _, d := range ders {
		if len(d) > maxCertSize {
			return "", fmt.Errorf("the server gave a certificate of %d bytes: %w", len(d), errs.Invalid)
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
	}
	j := joined{Certificates: string(out), Key: keyPEM}
	if _, err := j.keyPair(); err != nil {
		return "", err // of another key
	}
	if j.expired(now) {
		return "", fmt.Errorf("the server gave a certificate that has ended; compare the clocks: %w", errs.Invalid)
	}
	return string(out), nil
}

// Leave takes this host out of its fleet: it goes on enforcing what it has, and
// nobody gives it anything else. errs.Denied while the server isolates it: nobody
// gets out of that by leaving.
func (a *Agent) Leave(context.Context) error {
	l := a.link
	l.joining.Lock()
	defer l.joining.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := a.state.leave(); err != nil {
		return fmt.Errorf("leave: %w", err)
	}
	l.joined = nil
	for _, s := range []*spool{l.blocks, l.inv} {
		if s != nil {
			_ = s.remove() // the next join begins another stream
		}
	}
	l.blocks, l.inv = nil, nil
	l.dial()
	a.pipe.notice(noticeLink, "this host left its fleet; what is enforced stays")
	return nil
}

// LeaveStopped is Leave for a host whose agent does not run.
func LeaveStopped(dir string) error {
	s, err := OpenState(dir)
	if err == nil {
		err = s.leave()
	}
	for _, d := range []string{"blocks", "inventory"} {
		if err == nil {
			err = (&spool{dir: s.path(dirSpool, d)}).remove()
		}
	}
	if err != nil {
		return fmt.Errorf("leave: %w", err)
	}
	return nil
}

func (s *State) leave() error {
	j, err := s.readLink()
	if errors.Is(err, errs.NotFound) {
		return nil
	}
	if err == nil && j.Isolated {
		return fmt.Errorf("the server isolates this host: it must release it first: %w", errs.Denied)
	}
	return host.RemoveFile(s.path(fileLink))
}
