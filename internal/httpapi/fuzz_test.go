package httpapi_test

import (
	"net"
	"net/url"
	"testing"

	"ringwall/internal/httpapi"
)

// Whatever is taken for a redirect to this machine is one.
func FuzzLoopback(f *testing.F) {
	for _, s := range []string{"http://127.0.0.1:1/callback", "http://[::1]:1/", "http://127.0.0.1@evil.example/", "http://127.0.0.1:1\\@evil.example/", "http:///x", "http://[::1%25x]/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := httpapi.Loopback(s)
		if err != nil {
			return
		}
		again, err := url.Parse(u.String())
		if err != nil || again.Scheme != "http" || again.User != nil || !net.ParseIP(again.Hostname()).IsLoopback() {
			t.Errorf("%q leads to %v, %v", s, again, err)
		}
	})
}
