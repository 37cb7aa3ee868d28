package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rpc "connectrpc.com/connect"

	"ringwall/internal/agentpb"
	"ringwall/internal/control/hosts"
)

// fleetHost is a host as the server sees one, at a real server.
type fleetHost struct {
	agentpb.AgentClient
	http *http.Client
	id   string
}

func (s *fleetServer) httpClient(certs ...tls.Certificate) *http.Client {
	s.t.Helper()
	ca, err := os.ReadFile(filepath.Join(s.dir, "fleet/tls/ca.crt"))
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13, Certificates: certs}, ForceAttemptHTTP2: true}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (s *fleetServer) joinHost(token, name string) *fleetHost {
	s.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := agentpb.NewEnrolmentClient(s.httpClient(), s.url).Enrol(s.t.Context(), rpc.NewRequest(&agentpb.EnrolRequest{JoinToken: strings.TrimSpace(token), Name: name, Csr: csr}))
	if err != nil {
		s.t.Fatal(err)
	}
	cert := tls.Certificate{Certificate: out.Msg.GetCertificates(), PrivateKey: key}
	client := s.httpClient(cert)
	return &fleetHost{AgentClient: agentpb.NewAgentClient(client, s.url), http: client, id: out.Msg.GetHostId()}
}

func TestFleet(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", strings.TrimSuffix(testGroup, "/resourceGroups/web"), "--file", "-")
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")

	token := s.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--label", "role=web", "--quiet")
	unused := s.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--quiet")
	if token == unused {
		t.Error("two tokens are the same")
	}
	h := s.joinHost(token, "web-1")
	got := s.must(0, "admin", "", "fleet", "join-token", "list")
	if !strings.Contains(got, "used by web-1") || !strings.Contains(got, "good until") {
		t.Errorf("tokens: %s", got)
	}
	id, err := hosts.JoinTokenID(strings.TrimSpace(unused))
	if err != nil {
		t.Fatal(err)
	}
	s.must(0, "admin", "", "fleet", "join-token", "revoke", id.Name()[:12])
	s.must(4, "admin", "", "fleet", "join-token", "revoke", id.Name()[:12])

	wait := func(r *agentpb.WaitRequest) (*agentpb.WaitResponse, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		out, err := h.Wait(ctx, rpc.NewRequest(r))
		if err != nil {
			return nil, err
		}
		return out.Msg, nil
	}
	first, err := wait(&agentpb.WaitRequest{State: &agentpb.State{AgentVersion: "1.2", Mode: "enforce"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.must(0, "admin", "", "fleet", "hosts", "list"); !strings.Contains(got, "web-1") || !strings.Contains(got, "online") || !strings.Contains(got, "1.2") {
		t.Errorf("hosts: %s", got)
	}
	s.must(0, "admin", "", "fleet", "hosts", "isolate", "web-1")
	second, err := wait(&agentpb.WaitRequest{State: &agentpb.State{AgentVersion: "1.2"}, HaveDirectives: first.GetDirectives().GetRevision()})
	if err != nil || !second.GetDirectives().GetIsolated() {
		t.Errorf("isolated: %v, %v", second, err)
	}
	s.must(0, "admin", "", "fleet", "hosts", "release", h.id)

	// With its certificate a host sees what a role lets it see, and nothing else.
	itself := testGroup + "/providers/Ringwall.Fleet/hosts/web-1"
	reads := func(want int) {
		t.Helper()
		resp, err := h.http.Get(s.url + itself)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != want {
			b, _ := io.ReadAll(resp.Body)
			t.Errorf("a host reads its document: %s, want %d: %s", resp.Status, want, b)
		}
	}
	reads(http.StatusForbidden)
	s.must(0, "admin", `{"properties":{"roleDefinitionId":"/providers/Microsoft.Authorization/roleDefinitions/acdd72a7-3385-48ef-bd42-f606fba81ae7","principalId":"ringwall://hosts/`+h.id+`"}}`,
		"resource", "put", itself+"/providers/Microsoft.Authorization/roleAssignments/self", "--file", "-")
	reads(http.StatusOK)

	// What it says comes into the inventory and to people.
	sum := make([]byte, 32)
	sum[0] = 7
	ingest := func(lane agentpb.Lane, r *agentpb.Record) {
		t.Helper()
		out, err := h.Ingest(t.Context(), rpc.NewRequest(&agentpb.IngestRequest{Stream: make([]byte, 16), Lane: lane, First: 1, Records: []*agentpb.Record{r}}))
		if err != nil || out.Msg.GetDurable() != 1 {
			t.Errorf("%v, %v", out, err)
		}
	}
	ingest(agentpb.Lane_LANE_INVENTORY, &agentpb.Record{What: &agentpb.Record_Execution{Execution: &agentpb.Execution{Kind: "exec", Path: "/usr/bin/edge", Sha256: sum, Count: 1}}})
	ingest(agentpb.Lane_LANE_BLOCKS, &agentpb.Record{What: &agentpb.Record_Block{Block: &agentpb.Block{Kind: "exec", Path: "/tmp/x", Sha256: sum, Reason: "not-listed", Mode: "enforce", Count: 2}}})
	if got := s.must(0, "admin", "", "fleet", "inventory"); !strings.Contains(got, "/usr/bin/edge") {
		t.Errorf("inventory: %s", got)
	}
	if got := s.must(0, "admin", "", "fleet", "hosts", "show", "web-1"); !strings.Contains(got, "block not-listed /tmp/x") {
		t.Errorf("host: %s", got)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if strings.Contains(s.must(0, "admin", "", "incident", "list"), "inc-") {
			break
		}
		if time.Now().After(end) {
			t.Error("the block is no incident")
			break
		}
	}

	s.must(0, "admin", "", "fleet", "hosts", "revoke", "web-1")
	reads(http.StatusUnauthorized)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // the feed brings it
		_, err := wait(&agentpb.WaitRequest{})
		if rpc.CodeOf(err) == rpc.CodeUnauthenticated {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("revoked: %v", err)
		}
	}
	s.must(4, "admin", "", "fleet", "hosts", "show", "web-9")
}

func TestFleetBundle(t *testing.T) {
	s := startServer(t)
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	path := func(name string) string { return filepath.Join(s.dir, name) }
	s.must(0, "admin", "", "key", "init", path("keys"), "--name", "Test Fleet")
	if err := os.MkdirAll(path("build/usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("build/usr/bin/edge"), []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.must(0, "admin", "", "sign", path("build"), "--keys", path("keys"), "--product", "edge", "--version", "1", "--out", path("releases"))
	policy := s.must(0, "admin", "", "policy", "init", "--keys", path("keys"), "--name", "base", "--quiet")
	write := func(epoch string) {
		t.Helper()
		out := epochLine.ReplaceAllString(policy, "epoch: "+epoch)
		if out == policy && epoch != "1" {
			t.Fatalf("the policy has no epoch: %s", policy)
		}
		if err := os.WriteFile(path("base.yaml"), []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mk := []string{"fleet", "bundle", "make", path("base.yaml"), "--keys", path("keys"), "--release", path("releases")}
	write("10")
	s.must(0, "admin", "", append(mk, "--out", path("b10"))...)
	s.must(6, "admin", "", append(mk, "--out", path("b10"))...)
	write("11")
	s.must(6, "admin", "", append(mk, "--out", path("b11"), "--previous", path("b10"))...)
	write("12")
	var made madeBundle
	if err := json.Unmarshal([]byte(s.must(0, "admin", "", append(mk, "--out", path("b12"), "--previous", path("b10"), "--output", "json", "--quiet")...)), &made); err != nil {
		t.Fatal(err)
	}
	if made.Epoch != 12 || made.Rollback == nil || made.Rollback.Epoch != 13 || made.Releases != 1 {
		t.Errorf("%+v", made)
	}
	for _, b := range []string{"b10", "b12"} {
		s.must(0, "admin", "", "fleet", "bundle", "push", path(b))
	}
	if got := s.must(0, "admin", "", "fleet", "bundle", "push", path("b12"), "--quiet"); !strings.HasPrefix(got, "0 chunks") {
		t.Errorf("a second push: %s", got)
	}
	got := s.must(0, "admin", "", "fleet", "bundle", "list", "--quiet")
	if strings.Count(got, "\n") != 4 || !strings.Contains(got, made.Rollback.Manifest.String()[:16]) {
		t.Errorf("bundles: %s", got)
	}
	if got := s.must(0, "admin", "", "fleet", "bundle", "show", made.Rollback.Manifest.String()[:10]); !strings.Contains(got, "undoes     "+made.Manifest.String()) {
		t.Errorf("rollback: %s", got)
	}
	// A manifest whose content was not pushed is refused, and so is a chunk that is
	// not what it says.
	write("20")
	s.must(0, "admin", "", append(mk, "--out", path("b20"))...)
	chunks, err := os.ReadDir(path("b20/chunks"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		if _, err := os.Stat(path("b10/chunks/" + c.Name())); err == nil {
			continue
		}
		if err := os.WriteFile(path("b20/chunks/"+c.Name()), []byte("something else"), 0o644); err != nil {
			t.Fatal(err)
		}
		s.must(5, "admin", "", "fleet", "bundle", "push", path("b20"))
		if err := os.Remove(path("b20/chunks/" + c.Name())); err != nil {
			t.Fatal(err)
		}
	}
	s.must(4, "admin", "", "fleet", "bundle", "push", path("b20"))
}
