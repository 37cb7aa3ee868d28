package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
	"ringwall/internal/transparency"
)

func newSignerTSACommand(e *env) *cobra.Command {
	var keys, passphraseFile, listen string
	c := &cobra.Command{
		Use:   "tsa --keys DIR",
		Short: "Serve the authority's timestamps to others",
		Long: `Serves the timestamp authority over HTTP (RFC 3161), for machines that sign
evidence or policies and must not have tsa.key: who has that can back-date. HTTP
without TLS will do, since a token is signed and answers one request only. It
stamps whatever it is sent; keep it inside your network.`,
		Example: `  ringwall signer tsa --keys keys --listen 127.0.0.1:8621
  ringwall gate attest test edged.deb --from go-test.json --keys certificates --certificate ci/attester.crt --key ci/attester.key --tsa http://127.0.0.1:8621`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := loadAuthority(e, keys, passphraseFile)
			if err != nil {
				return err
			}
			if a.TSA.Key == nil {
				return fmt.Errorf("the key of the TSA is not in %s: %w", keys, errs.NotFound)
			}
			l, err := (&net.ListenConfig{}).Listen(c.Context(), "tcp", listen)
			if err != nil {
				return err
			}
			e.notef("stamping as %s, on %s", a.TSA.Cert.Subject.CommonName, l.Addr())
			return serveTSA(c.Context(), l, a.TSA)
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "the authority's `DIR`, with the key tsa")
	passphraseFlag(c, &passphraseFile)
	f.StringVar(&listen, "listen", "127.0.0.1:8621", "`ADDRESS` to serve on")
	require(c, "keys")
	return c
}

// serveTSA serves until the context ends.
func serveTSA(ctx context.Context, l net.Listener, tsa *pki.TSA) error {
	h := &http.Server{
		Handler:           transparency.TSAHandler(tsa),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	done := make(chan error, 1)
	go func() { done <- h.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve timestamps: %w", err)
	case <-ctx.Done():
	}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := h.Shutdown(late); err != nil {
		return fmt.Errorf("stop: %w", errors.Join(err, h.Close()))
	}
	return nil
}
