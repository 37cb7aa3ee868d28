// Command edged answers at the edge.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

func handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(healthy)
	})
	m.HandleFunc("GET /hello", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, greeting)
	})
	return m
}

func main() {
	s := &http.Server{Addr: "127.0.0.1:8080", Handler: handler(), ReadHeaderTimeout: time.Second}
	if err := s.ListenAndServe(); err != nil {
		fmt.Fprintln(os.Stderr, "edged:", err)
		os.Exit(1)
	}
}
