package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/errs"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

// session is what `ringwall login` keeps.
type session struct {
	Server string `json:"server"`
	CA     string `json:"ca,omitempty"` // PEM
	Token  string `json:"token"`
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

// connect is the client of the server that the user logged in to.
func connect(e *env) (*api.Client, error) {
	file, err := sessionFile(e)
	if err != nil {
		return nil, err
	}
	b, err := readBounded(file, maxSession)
	if errors.Is(err, os.ErrNotExist) {
		return nil, hint(fmt.Errorf("not logged in: %w", errs.NotFound), "ringwall login --server https://… --ca FILE --token-file FILE")
	}
	if err != nil {
		return nil, err
	}
	var s session
	if err := pki.UnmarshalStrict(b, &s, maxSession); err != nil {
		return nil, hint(fmt.Errorf("session %s: %w", file, err), "log in again")
	}
	return api.NewClient(s.Server, []byte(s.CA), s.Token)
}

func newLoginCommand(e *env) *cobra.Command {
	var server, ca, tokenFile string
	c := &cobra.Command{
		Use: "login --server URL", GroupID: groupFleet,
		Short: "Log in to a server, for the commands that talk to one",
		Long: `Checks that the server answers and takes the token, and keeps both for later
commands: in RINGWALL_SESSION, or ringwall/session.json in the configuration
directory, readable by you alone. A token is never taken from the command line,
where others could see it: from a file, or from standard input.

JSON: {"server", "session"}`,
		Example: `  ringwall login --server https://ringwall.fleet.example:8443 --ca ca.crt --token-file token
  pass ringwall | ringwall login --server https://ringwall.fleet.example:8443`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			s := session{Server: server}
			token, err := readToken(e, tokenFile)
			if err != nil {
				return err
			}
			s.Token = token
			if ca != "" {
				b, err := readBounded(ca, maxSession/2)
				if err != nil {
					return err
				}
				s.CA = string(b)
			}
			return login(c.Context(), e, s)
		},
	}
	f := c.Flags()
	f.StringVar(&server, "server", "", "the server's `URL`")
	f.StringVar(&ca, "ca", "", "`FILE` with the certificate of who certifies the server (default: the system's authorities)")
	f.StringVar(&tokenFile, "token-file", "", "`FILE` with the token (default: standard input)")
	require(c, "server")
	return c
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

func login(ctx context.Context, e *env, s session) error {
	c, err := api.NewClient(s.Server, []byte(s.CA), s.Token)
	if err != nil {
		return err
	}
	if _, _, err := c.Do(ctx, api.Request{Method: "GET", Path: "/subscriptions?$top=1"}); err != nil {
		return err
	}
	file, err := sessionFile(e)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := host.WriteFile(file, append(b, '\n'), 0o600); err != nil {
		return err
	}
	out := struct {
		Server  string `json:"server"`
		Session string `json:"session"`
	}{s.Server, file}
	return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "logged in to %s\n", s.Server) })
}
