package main

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
)

// addSignOn adds the built-in issuer, the issuers elsewhere, certificates of
// services, and questions about who may what.
func (p *serverParts) addSignOn(data string, clients *pki.TLSAuthority, now func() time.Time) error {
	p.keys = &issuerKeys{dir: filepath.Join(data, "issuer"), now: now}
	if _, err := p.keys.Signing(); err != nil {
		return fmt.Errorf("key of the built-in issuer: %w", err)
	}
	p.routes = append(p.routes, httpapi.AccessRoutes(p.door, clients, now)...)
	p.lead("certificates", func(ctx context.Context, f control.Fence) error {
		for {
			if err := p.door.Under(f).ForgetCertificates(ctx, now()); err != nil {
				p.log.WarnContext(ctx, "certificates_not_forgotten", slog.Any("error", err))
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Hour):
			}
		}
	})
	return nil
}

// api is the HTTP of every part; base is the server's own URL.
func (p *serverParts) api(base string, now func() time.Time) *httpapi.API {
	return httpapi.New(p.door, p.log, now,
		httpapi.WithSignOn(httpapi.SignOn{Memory: control.NewSignOn(p.door), Keys: p.keys, Base: base}),
		httpapi.Remember(control.NewAnswers(p.door)),
		httpapi.Mount(p.routes...),
		httpapi.Describe(p.door.Kinds()))
}

func newServerOpenAPICommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "openapi",
		Short: "Print the OpenAPI document of the management API",
		Long: `Prints what the server answers to GET /ringwall/openapi.json: OpenAPI 3.1, made of
the routes and the types of documents of this version. No server runs for that.`,
		Example: "  ringwall server openapi > ringwall-openapi.json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			dir, err := os.MkdirTemp("", "ringwall-openapi-")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
			// with the flags as they are when nobody says anything
			var o serverOptions
			o.audit.flags(&cobra.Command{})
			o.data = dir
			p, err := openServer(c.Context(), o.url(), slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, p.close()) }()
			quiet := *e
			quiet.quiet = true
			if err := o.assemble(c.Context(), &quiet, p); err != nil {
				return err
			}
			b, err := httpapi.OpenAPI(p.api("https://localhost", e.now).Routes(), p.door.Kinds())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.stdout, "%s\n", b)
			return err
		},
	}
}

// baseURL is the server's URL for people: as --url says, else of the first
// --name, else of the address that it listens on.
func (o *serverOptions) baseURL(at net.Addr) (string, error) {
	if o.base != "" {
		u, err := url.Parse(o.base)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery+u.Fragment != "" {
			return "", usage(fmt.Errorf("--url %q: want https://HOST[:PORT]", o.base))
		}
		return "https://" + u.Host, nil
	}
	name, port, err := net.SplitHostPort(at.String())
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(name); ip != nil && ip.IsUnspecified() {
		name = "localhost"
	}
	if len(o.names) > 0 {
		name = o.names[0]
	}
	return "https://" + net.JoinHostPort(name, port), nil
}

// How long keys of the built-in issuer are used: they sign for a month, and
// what they signed counts for some time more.
const (
	signsFor  = 30 * 24 * time.Hour
	countsFor = signsFor + 7*24*time.Hour
	keyPrefix = "sign-"
)

// issuerKeys are the signing keys of the built-in issuer, in files that are
// named by the time of their making. Replicas share the directory. Who removes
// all of them ends every token.
type issuerKeys struct {
	dir string
	now func() time.Time

	mu   sync.Mutex
	read time.Time
	keys []issuerKey // the newest last
}

type issuerKey struct {
	made time.Time
	key  *ecdsa.PrivateKey
}

// Signing implements httpapi.SigningKeys. It makes a key when there is none or
// the newest has signed for a month.
func (k *issuerKeys) Signing() (*ecdsa.PrivateKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.load(); err != nil {
		return nil, err
	}
	now := k.now()
	if n := len(k.keys); n > 0 && now.Sub(k.keys[n-1].made) < signsFor {
		return k.keys[n-1].key, nil
	}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	b, err := pki.EncodeKey(key, nil)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return nil, err
	}
	made := now.Truncate(time.Second)
	if err := host.WriteFile(filepath.Join(k.dir, keyPrefix+strconv.FormatInt(made.Unix(), 10)+".key"), b, 0o600); err != nil {
		return nil, err
	}
	k.keys = append(k.keys, issuerKey{made, key})
	return key, nil
}

// Public implements httpapi.SigningKeys.
func (k *issuerKeys) Public() ([]*ecdsa.PublicKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.load(); err != nil {
		return nil, err
	}
	var out []*ecdsa.PublicKey
	for _, x := range k.keys {
		out = append(out, &x.key.PublicKey)
	}
	return out, nil
}

// load reads the directory, at most every two seconds, and removes keys whose
// tokens are long over.
func (k *issuerKeys) load() error {
	now := k.now()
	if age := now.Sub(k.read); len(k.keys) > 0 && age >= 0 && age < 2*time.Second {
		return nil
	}
	files, err := filepath.Glob(filepath.Join(k.dir, keyPrefix+"*.key"))
	if err != nil {
		return err
	}
	var keys []issuerKey
	for _, f := range files {
		seconds, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), keyPrefix), ".key"), 10, 64)
		if err != nil {
			return fmt.Errorf("%s: not a key of the built-in issuer: %w", f, errs.Invalid)
		}
		made := time.Unix(seconds, 0)
		if now.Sub(made) > countsFor {
			_ = os.Remove(f) // another replica may have done it
			continue
		}
		b, err := readBounded(f, 64<<10)
		if err != nil {
			return err
		}
		key, err := pki.DecodeKey(b, nil)
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		keys = append(keys, issuerKey{made, key})
	}
	slices.SortFunc(keys, func(a, b issuerKey) int { return a.made.Compare(b.made) })
	k.keys, k.read = keys, now
	return nil
}
