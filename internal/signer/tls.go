package signer

import (
	"fmt"
	"time"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// TLSFiles makes certificates for a server and its clients, for who has no CA
// of their own for that: file names and contents, keys among them. The CA's key
// is not kept, so that it can certify nobody else; a new client means a new set.
func TLSFiles(hosts []string, clients map[string]string, now time.Time) (map[string][]byte, error) {
	out := map[string][]byte{}
	if len(hosts) == 0 || len(clients) == 0 {
		return nil, fmt.Errorf("TLS certificates: no host or no client: %w", errs.Invalid)
	}
	a, err := pki.NewTLSAuthority("Ringwall signer TLS CA", now)
	if err != nil {
		return nil, err
	}
	if out["tls-ca.crt"], _, err = a.PEM(); err != nil {
		return nil, err
	}
	if out["server.crt"], out["server.key"], err = a.Server(hosts, now); err != nil {
		return nil, err
	}
	for name, identity := range clients {
		stem := "client-" + name
		if out[stem+".crt"], out[stem+".key"], err = a.Client(name, identity, now); err != nil {
			return nil, err
		}
	}
	return out, nil
}
