package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ringwall/internal/agent"
)

// Without a policy the agent is asked, once for each kind that the file is.
func TestExplain_agent(t *testing.T) {
	dir, err := os.MkdirTemp("", "run") // t.TempDir is too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, agent.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(dir, "tool.py")
	if err := os.WriteFile(script, []byte("#!/usr/bin/python3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var asked []agent.ExplainRequest
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/explain", func(w http.ResponseWriter, r *http.Request) {
		var q agent.ExplainRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			t.Error(err)
		}
		asked = append(asked, q)
		a := agent.ExplainAnswer{Mode: "enforce", Reason: "no rule authorises it"}
		if q.Kind == "script" {
			a = agent.ExplainAnswer{Allow: true, Mode: "enforce", Rule: "own", Indicator: "signer Fleet CA, spiffe://x.test/a", Reason: "authorised", Vouched: []string{"release tool 1"}}
		}
		_ = json.NewEncoder(w).Encode(a)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })

	explain := func(args ...string) (int, string) {
		var out, said bytes.Buffer
		code := run(t.Context(), append([]string{"policy", "explain", script, "--run", dir}, args...), &env{stdout: &out, stderr: &said, now: time.Now})
		return code, out.String() + said.String()
	}
	code, text := explain()
	if code != exitOK || len(asked) != 1 || asked[0].Kind != "script" || len(asked[0].Digest) != 64 {
		t.Fatalf("exit code %d, asked %+v\n%s", code, asked, text)
	}
	for _, want := range []string{"ALLOW as script (mode enforce: runs): authorised", "rule own, by signer Fleet CA, spiffe://x.test/a", "vouched for by release tool 1"} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
	if code, text = explain("--kind", "exec"); code != exitDenied || !strings.Contains(text, "DENY  as exec (mode enforce: blocked)") {
		t.Errorf("exit code %d:\n%s", code, text)
	}
}
