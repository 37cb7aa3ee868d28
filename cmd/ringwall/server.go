package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

const defaultServerDir = "/var/lib/ringwall-server"

func newServerCommand(e *env) *cobra.Command {
	var o serverOptions
	c := &cobra.Command{
		Use: "server", GroupID: groupFleet,
		Short: "Run the fleet's server: resources, who may change them, and the audit log",
		Long: `Serves the resource tree over HTTPS. Nothing else is needed: the first start makes
a directory with a database, a CA for TLS with the server's certificate, and the
local administrator, whose token is written to a file.

  DATA/control.db          the database, unless --database says another
  DATA/audit-log           the audit log's hashes, published: signed checkpoints in
                           the form of C2SP tlog-tiles; audit-log.pub is their key
  DATA/tls/ca.crt          who certifies the server: clients need it
  DATA/tls/clients.crt     who certifies services and hosts; the key is beside it
  DATA/issuer              keys of the built-in issuer that people sign on to
  DATA/break-glass.token   the local administrator's token: log in with it once,
                           make tokens for people, and put it into a safe

Every change goes one way: who asks may do it, it is valid, and it is stored in
one transaction with a record of the audit log. See ringwall audit --help.`,
		Example: `  ringwall server --data ./fleet
  ringwall login --server https://127.0.0.1:8443 --ca fleet/tls/ca.crt --token-file fleet/break-glass.token
  ringwall server --data /var/lib/ringwall-server --database postgres://ringwall@db/ringwall --listen :8443 --name ringwall.fleet.example`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return o.serve(c.Context(), e) },
	}
	f := c.Flags()
	f.StringVar(&o.data, "data", defaultServerDir, "the server's `DIRECTORY`")
	f.StringVar(&o.database, "database", "", "`URL` of the database: sqlite:DIRECTORY or postgres://… (default: SQLite in the data directory)")
	f.StringVar(&o.listen, "listen", "127.0.0.1:8443", "`ADDRESS` to listen on")
	f.StringVar(&o.base, "url", "", "`URL` of the server for people, for sign-on (default: https:// and the first --name, else the address)")
	f.StringArrayVar(&o.names, "name", nil, "`NAME` or address that clients use, for the TLS certificate; repeat (127.0.0.1, ::1 and localhost always are)")
	f.StringVar(&o.metrics, "metrics", "", "answer Prometheus on `ADDRESS` of this machine, such as 127.0.0.1:9477 (default: not at all)")
	f.StringVar(&o.notify, "notify", "", "`FILE` that says whom to tell of incidents (default: nobody, only the log)")
	f.StringArrayVar(&o.probes, "probe-url", nil, "`URL` that probes of rollouts may ask, with all below it; repeat (default: none)")
	o.audit.flags(c)
	o.attest.flags(c)
	c.AddCommand(newServerBackupCommand(e), newServerOpenAPICommand(e), newServerRestoreCommand(e))
	return c
}

type serverOptions struct {
	data, database, listen, base, metrics, notify string
	names, probes                                 []string
	audit                                         auditOptions
	attest                                        attestOptions
}

func (o *serverOptions) url() string {
	if o.database != "" {
		return o.database
	}
	return "sqlite:" + o.data
}

// assemble opens everything that a server is made of, in the data directory.
// The parts are closed by whoever calls, also after an error.
func (o *serverOptions) assemble(ctx context.Context, e *env, p *serverParts) error {
	certificates, err := openServerTLS(filepath.Join(o.data, "tls"), append([]string{"localhost", "127.0.0.1", "::1"}, o.names...), e.now)
	if err != nil {
		return err
	}
	token, err := p.door.Bootstrap(ctx)
	if err != nil {
		return err
	}
	if token != "" {
		file := filepath.Join(o.data, "break-glass.token")
		if err := host.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			return err
		}
		e.notef("first start: the local administrator's token is in %s", shown(file))
	}
	clients, err := openTLSAuthority(filepath.Join(o.data, "tls"), "clients", "Ringwall client CA", e.now)
	if err != nil {
		return err
	}
	p.tls = serverTLSConfig(certificates, clients)
	if err := p.addAudit(&o.audit, o.data, o.names); err != nil {
		return err
	}
	if err := p.addIncidents(o.notify, e.now); err != nil {
		return err
	}
	if err := p.addAttestation(&o.attest, e, clients); err != nil {
		return err
	}
	closeEvents, err := p.addHosts(ctx, o.url(), o.data, clients, e.now)
	if err != nil {
		return err
	}
	p.closers = append(p.closers, closeEvents)
	p.addRollouts(o.probes, e.now)
	return p.addSignOn(o.data, clients, e.now)
}

func (o *serverOptions) serve(ctx context.Context, e *env) (err error) {
	if err := os.MkdirAll(o.data, 0o700); err != nil {
		return err
	}
	only := o.database == "" // the one process with this database
	release, err := lockData(o.data, only)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	log := slog.New(slog.NewTextHandler(e.stderr, nil))
	parts, err := openServer(ctx, o.url(), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, parts.close()) }()
	if only {
		if err := parts.store.EndLeases(ctx); err != nil {
			return err
		}
	}
	if err := o.assemble(ctx, e, parts); err != nil {
		return err
	}
	if err := parts.addMetrics(ctx, o.metrics, e.notef); err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // the server closes it too
	base, err := o.baseURL(l.Addr())
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler: parts.metrics.handler(parts.api(base, e.now)), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 2 * time.Minute, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		TLSConfig:   parts.tls,
	}
	defer parts.start(ctx)() // before the database is closed
	e.notef("serving on https://%s", l.Addr())
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(l, "", "") }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// streams ended with ctx; what else is under way gets some time
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return srv.Shutdown(end)
}

// serverTLS is the server's certificate, of its own CA. It is made anew when it
// comes near its end or the names change.
type serverTLS struct {
	dir   string
	hosts []string
	now   func() time.Time
	by    *pki.TLSAuthority

	mu      sync.Mutex
	current *tls.Certificate
}

func openServerTLS(dir string, hosts []string, now func() time.Time) (*serverTLS, error) {
	s := &serverTLS{dir: dir, hosts: hosts, now: now}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if s.by, err = openTLSAuthority(dir, "ca", "Ringwall server CA", now); err != nil {
		return nil, err
	}
	_, err = s.get(nil)
	return s, err
}

// serverTLSConfig asks clients for a certificate of the client CA. Who has none
// brings a token; one of somebody else's ends the connection.
func serverTLSConfig(certificates *serverTLS, clients *pki.TLSAuthority) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(clients.Certificate())
	return &tls.Config{
		GetCertificate: certificates.get, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool,
	}
}

// openTLSAuthority reads an authority of a directory, or makes it at the first start.
func openTLSAuthority(dir, stem, name string, now func() time.Time) (*pki.TLSAuthority, error) {
	cert, errCert := os.ReadFile(filepath.Join(dir, stem+".crt"))
	key, errKey := os.ReadFile(filepath.Join(dir, stem+".key"))
	switch {
	case errCert == nil && errKey == nil:
		return pki.LoadTLSAuthority(cert, key)
	case !errors.Is(errCert, os.ErrNotExist) || !errors.Is(errKey, os.ErrNotExist):
		return nil, errors.Join(errCert, errKey)
	}
	a, err := pki.NewTLSAuthority(name, now())
	if err != nil {
		return nil, err
	}
	if cert, key, err = a.PEM(); err != nil {
		return nil, err
	}
	return a, errors.Join(
		host.WriteFile(filepath.Join(dir, stem+".key"), key, 0o600),
		host.WriteFile(filepath.Join(dir, stem+".crt"), cert, 0o644))
}

// renewBefore is how long before its end a certificate is made anew.
const renewBefore = 60 * 24 * time.Hour

// get implements tls.Config.GetCertificate.
func (s *serverTLS) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		if c, err := tls.LoadX509KeyPair(filepath.Join(s.dir, "server.crt"), filepath.Join(s.dir, "server.key")); err == nil && s.covers(c.Leaf) {
			s.current = &c
		}
	}
	if s.current != nil && s.now().Add(renewBefore).Before(s.current.Leaf.NotAfter) {
		return s.current, nil
	}
	cert, key, err := s.by.Server(s.hosts, s.now())
	if err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	err = errors.Join(host.WriteFile(filepath.Join(s.dir, "server.key"), key, 0o600), host.WriteFile(filepath.Join(s.dir, "server.crt"), cert, 0o644))
	if err != nil {
		return nil, err
	}
	s.current = &c
	return s.current, nil
}

func (s *serverTLS) covers(c *x509.Certificate) bool {
	return !slices.ContainsFunc(s.hosts, func(h string) bool { return c.VerifyHostname(h) != nil })
}

func newServerBackupCommand(e *env) *cobra.Command {
	var data string
	c := &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy the database while the server runs",
		Long: `Writes a consistent copy of the SQLite database to a file that does not exist.
ringwall server restore puts it back. Keep DATA/tls with it, and DATA/audit-log.

A server on PostgreSQL is backed up with PostgreSQL's own tools.

JSON: {"file", "bytes"}`,
		Example: "  ringwall server backup --data ./fleet /srv/backup/control-2031-05-01.db",
		Args:    exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			if !exists(filepath.Join(data, "control.db")) {
				return fmt.Errorf("%s holds no database: %w", data, errs.NotFound)
			}
			if err := backupDatabase(c.Context(), "sqlite:"+data, args[0]); err != nil {
				return err
			}
			st, err := os.Stat(args[0])
			if err != nil {
				return err
			}
			out := struct {
				File  string `json:"file"`
				Bytes int64  `json:"bytes"`
			}{args[0], st.Size()}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "%s: %d bytes\n", shown(out.File), out.Bytes) })
		},
	}
	c.Flags().StringVar(&data, "data", defaultServerDir, "the server's `DIRECTORY`")
	return c
}
