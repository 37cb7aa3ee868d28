package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ringwall/internal/api"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/httpapi"
	"ringwall/internal/pki"
)

// session is what `ringwall login` keeps.
type session struct {
	Server string `json:"server"`
	CA     string `json:"ca,omitempty"` // PEM
	Token  string `json:"token,omitempty"`

	// Of a person who signed on: where, and what gets the next token.
	Issuer  *api.Issuer `json:"issuer,omitempty"`
	Refresh string      `json:"refresh,omitempty"`
	Expires time.Time   `json:"expires,omitzero"` // of the token

	// Of a service: files, since they are renewed.
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`
}

const maxSession = 64 << 10 // bytes

// sessionFile is where the session is: RINGWALL_SESSION, or in the user's
// configuration directory.
func sessionFile(e *env) (string, error) {
	if f := e.getenv("RINGWALL_SESSION"); f != "" {
		return f, nil
	}
	dir := e.getenv("XDG_CONFIG_HOME")
	if dir == "" {
		home := e.getenv("HOME")
		if home == "" {
			return "", fmt.Errorf("no place for the session: neither RINGWALL_SESSION nor HOME is set: %w", errs.NotFound)
		}
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "ringwall", "session.json"), nil
}

// connect is the client of the server that the user logged in to. A token that
// is nearly over is replaced before a request.
func connect(e *env) (*api.Client, error) {
	file, err := sessionFile(e)
	if err != nil {
		return nil, err
	}
	s, err := readSession(file)
	if err != nil {
		return nil, err
	}
	if s.Refresh == "" {
		return s.client()
	}
	var mu sync.Mutex
	return api.NewTokenClient(s.Server, []byte(s.CA), func(ctx context.Context) (string, error) {
		mu.Lock()
		defer mu.Unlock()
		if e.now().After(s.Expires.Add(-time.Minute)) {
			next, err := refreshSession(ctx, e, file)
			if err != nil {
				return "", err
			}
			s = next
		}
		return s.Token, nil
	})
}

func readSession(file string) (*session, error) {
	b, err := readBounded(file, maxSession)
	if errors.Is(err, os.ErrNotExist) {
		return nil, hint(fmt.Errorf("not logged in: %w", errs.NotFound), "ringwall login --server https://… --ca FILE")
	}
	if err != nil {
		return nil, err
	}
	var s session
	if err := pki.UnmarshalStrict(b, &s, maxSession); err != nil {
		return nil, hint(fmt.Errorf("session %s: %w", file, err), "log in again")
	}
	return &s, nil
}

func (s *session) client() (*api.Client, error) {
	if s.Certificate == "" {
		return api.NewClient(s.Server, []byte(s.CA), s.Token)
	}
	cert, err := readBounded(s.Certificate, maxSession)
	if err != nil {
		return nil, err
	}
	key, err := readBounded(s.Key, maxSession)
	if err != nil {
		return nil, err
	}
	return api.NewCertificateClient(s.Server, []byte(s.CA), cert, key)
}

// refreshSession gets the next token. Commands that run at once follow one
// another: an issuer takes a refresh token that comes twice for a stolen one.
func refreshSession(ctx context.Context, e *env, file string) (*session, error) {
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }() // which unlocks it
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	s, err := readSession(file)
	if err != nil || s.Refresh == "" || e.now().Before(s.Expires.Add(-time.Minute)) {
		return s, err // another command has done it
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	on, err := api.OpenIssuer(ctx, *s.Issuer, []byte(s.CA))
	if err != nil {
		return nil, err
	}
	t, err := on.Refresh(ctx, s.Refresh)
	if errors.Is(err, errs.Untrusted) {
		return nil, hint(fmt.Errorf("the session is over: %w", err), "ringwall login --server %s", s.Server)
	}
	if err != nil {
		return nil, err
	}
	s.Token, s.Refresh, s.Expires = t.ID, t.Refresh, t.Expires.UTC()
	return s, s.write(file)
}

func (s *session) write(file string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return host.WriteFile(file, append(b, '\n'), 0o600)
}

// loginOptions is the command line of login.
type loginOptions struct {
	server, ca, tokenFile, issuer, certificate, key string
	browser                                         bool
}

func newLoginCommand(e *env) *cobra.Command {
	var o loginOptions
	c := &cobra.Command{
		Use: "login --server URL", GroupID: groupFleet,
		Short: "Log in to a server, for the commands that talk to one",
		Long: `Signs you on, checks that the server takes it, and keeps it for later commands: in
RINGWALL_SESSION, or ringwall/session.json in the configuration directory,
readable by you alone.

On a terminal it prints an address and a code: open the address on any device,
enter the code, your name and your password. With --browser it opens the browser
of this machine instead. Where you sign on is the server's to say: an issuer of
your organisation, or its own, see ringwall user --help. With several, pick one
with --issuer. A session lasts up to twelve hours at the server's own issuer.

A token is taken from --token-file, or from standard input when that is no
terminal; never from the command line, where others could see it. A service shows
a certificate instead: see ringwall cert --help.

JSON: {"server", "session", "principal"}`,
		Example: `  ringwall login --server https://ringwall.fleet.example:8443 --ca ca.crt
  ringwall login --server https://ringwall.fleet.example:8443 --issuer corp --browser
  pass ringwall | ringwall login --server https://ringwall.fleet.example:8443
  ringwall login --server https://ringwall.fleet.example:8443 --cert ci.crt --key ci.key`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context(), e) },
	}
	f := c.Flags()
	f.StringVar(&o.server, "server", "", "the server's `URL`")
	f.StringVar(&o.ca, "ca", "", "`FILE` with the certificate of who certifies the server (default: the system's authorities)")
	f.StringVar(&o.tokenFile, "token-file", "", "`FILE` with a token")
	f.StringVar(&o.issuer, "issuer", "", "`NAME` of the issuer to sign on at; local is the server's own")
	f.BoolVar(&o.browser, "browser", false, "sign on with the browser of this machine")
	f.StringVar(&o.certificate, "cert", "", "`FILE` with a service's certificate")
	f.StringVar(&o.key, "key", "", "`FILE` with its key")
	require(c, "server")
	c.MarkFlagsRequiredTogether("cert", "key")
	c.MarkFlagsMutuallyExclusive("token-file", "issuer", "cert")
	c.MarkFlagsMutuallyExclusive("token-file", "browser", "cert")
	return c
}

func (o *loginOptions) run(ctx context.Context, e *env) error {
	s := session{Server: o.server}
	if o.ca != "" {
		b, err := readBounded(o.ca, maxSession/2)
		if err != nil {
			return err
		}
		s.CA = string(b)
	}
	var err error
	switch {
	case o.certificate != "":
		if s.Certificate, err = filepath.Abs(o.certificate); err == nil {
			s.Key, err = filepath.Abs(o.key)
		}
	case o.tokenFile != "" || o.issuer == "" && !o.browser && !isTerminal(e.stdin):
		s.Token, err = readToken(e, o.tokenFile)
	default:
		err = o.signOn(ctx, e, &s)
	}
	if err != nil {
		return err
	}
	return login(ctx, e, s)
}

// isTerminal reports whether a person types there.
func isTerminal(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (o *loginOptions) signOn(ctx context.Context, e *env, s *session) error {
	all, err := api.Issuers(ctx, o.server, []byte(s.CA))
	if err != nil {
		return err
	}
	i, err := api.FindIssuer(all, o.issuer)
	if err != nil {
		return err
	}
	on, err := api.OpenIssuer(ctx, i, []byte(s.CA))
	if err != nil {
		return err
	}
	var t *api.Tokens
	if o.browser {
		t, err = on.Browser(ctx, func(url string) {
			e.notef("sign on at\n  %s", url)
			openBrowser(ctx, url)
		})
	} else {
		t, err = on.Device(ctx, func(c api.Code) {
			fmt.Fprintf(e.stderr, "%s\n", printable(fmt.Sprintf("open %s\nand enter %s", c.URL, c.Code)))
		})
	}
	if err != nil {
		return fmt.Errorf("sign on at %s: %w", i.URL, err)
	}
	s.Issuer, s.Token, s.Refresh, s.Expires = &i, t.ID, t.Refresh, t.Expires.UTC()
	return nil
}

// openBrowser shows a page, if the desktop can; the address was printed too.
func openBrowser(ctx context.Context, url string) {
	c := exec.CommandContext(ctx, "xdg-open", url)
	if err := c.Start(); err != nil {
		return
	}
	go func() { _ = c.Wait() }()
}

func readToken(e *env, file string) (string, error) {
	var b []byte
	var err error
	if file != "" {
		b, err = readBounded(file, 4096)
	} else {
		b, err = io.ReadAll(io.LimitReader(e.stdin, 4096))
	}
	token := strings.TrimSpace(string(b))
	if err == nil && (token == "" || strings.ContainsAny(token, " \n\r\t")) {
		err = fmt.Errorf("that is no token: %w", errs.Invalid)
	}
	return token, err
}

// login checks a session and keeps it.
func login(ctx context.Context, e *env, s session) error {
	c, err := s.client()
	if err != nil {
		return err
	}
	var who httpapi.Who
	if err := ask(ctx, c, api.Request{Method: "GET", Path: "/ringwall/whoami"}, &who); err != nil {
		return err
	}
	file, err := sessionFile(e)
	if err != nil {
		return err
	}
	if err := s.write(file); err != nil {
		return err
	}
	out := struct {
		Server    string `json:"server"`
		Session   string `json:"session"`
		Principal string `json:"principal"`
	}{s.Server, file, who.Principal}
	return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "logged in to %s as %s\n", s.Server, shown(who.Principal)) })
}

func newLogoutCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use: "logout", GroupID: groupFleet,
		Short:   "End the session, and forget it",
		Long:    "Ends the session at the issuer, and removes the file of ringwall login.",
		Example: "  ringwall logout",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			file, err := sessionFile(e)
			if err != nil {
				return err
			}
			s, err := readSession(file)
			if err != nil {
				return err
			}
			if s.Refresh != "" {
				on, err := api.OpenIssuer(c.Context(), *s.Issuer, []byte(s.CA))
				if err == nil {
					err = on.End(c.Context(), s.Refresh)
				}
				if err != nil { // it is forgotten here all the same
					return errors.Join(fmt.Errorf("the issuer does not know yet: %w", err), os.Remove(file))
				}
			}
			return os.Remove(file)
		},
	}
}

func newWhoamiCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use: "whoami", GroupID: groupFleet,
		Short:   "Show who the server takes you for",
		Long:    "Shows your object id, which role assignments name, and the groups that count.\n\nJSON: {\"principalId\", \"name\", \"groups\"}",
		Example: "  ringwall whoami",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			var who httpapi.Who
			if err := askJSON(c.Context(), e, api.Request{Method: "GET", Path: "/ringwall/whoami"}, &who); err != nil {
				return err
			}
			return e.emit(who, func(w io.Writer) {
				fmt.Fprintln(w, shown(who.Principal))
				for _, g := range who.Groups {
					fmt.Fprintf(w, "  in %s\n", shown(g))
				}
			})
		},
	}
}

// askJSON sends a request to the server and reads the answer into out.
func askJSON(ctx context.Context, e *env, q api.Request, out any) error {
	client, err := connect(e)
	if err != nil {
		return err
	}
	return ask(ctx, client, q, out)
}

// ask sends a request and reads the answer into out; nil: it says nothing that
// matters.
func ask(ctx context.Context, client *api.Client, q api.Request, out any) error {
	b, _, err := client.Do(ctx, q)
	if err != nil || out == nil {
		return err
	}
	return readAnswer(b, out)
}

// readAnswer reads what a server sent.
func readAnswer(b []byte, out any) error {
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("the server's answer: %w: %w", err, errs.Invalid)
	}
	return nil
}
