package main

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	rpc "connectrpc.com/connect"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"ringwall/internal/agent"
	"ringwall/internal/attest"
	"ringwall/internal/codesign"
	"ringwall/internal/control/attestation"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/host"
	"ringwall/internal/integrity"
	"ringwall/internal/store"
	"ringwall/internal/testkit"
)

// measuredHost is a software TPM that a recorded machine's boot went into, with
// the logs beside it.
type measuredHost struct {
	t      *testing.T
	tpm    *testkit.TPM
	prover *host.Prover
	list   []byte
}

func newMeasuredHost(t *testing.T, log []byte) *measuredHost {
	t.Helper()
	m := &measuredHost{t: t, tpm: testkit.StartTPM(t)}
	dir := t.TempDir()
	m.prover = host.NewProver(m.tpm.Path)
	m.prover.BootLog, m.prover.IMAList, m.prover.UserspaceLog = filepath.Join(dir, "log"), filepath.Join(dir, "ima"), ""
	l, err := attest.ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	for i := range l.Events {
		if e := &l.Events[i]; e.Type != attest.EventNoAction {
			m.extend(e.PCR, e.Digest(attest.SHA256))
		}
	}
	bank, err := l.LeadsTo(attest.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	m.measure("boot_aggregate", bytes.Join(bank.Values[:10], nil))
	if err := os.WriteFile(m.prover.BootLog, log, 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *measuredHost) extend(pcr int, digest []byte) {
	m.t.Helper()
	c, err := linuxudstpm.Open(m.tpm.Path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}.Execute(c)
	if err != nil {
		m.t.Fatal(err)
	}
}

// measure adds a file to the IMA list and to PCR 10, as the kernel does.
func (m *measuredHost) measure(path string, content []byte) {
	m.t.Helper()
	le := binary.LittleEndian
	field := func(b []byte) []byte { return append(le.AppendUint32(nil, uint32(len(b))), b...) }
	sum := sha256.Sum256(content)
	data := slices.Concat(field(append([]byte("sha256:\x00"), sum[:]...)), field(append([]byte(path), 0)))
	m.list = slices.Concat(m.list, le.AppendUint32(nil, 10), bytes.Repeat([]byte{1}, 20), field([]byte("ima-ng")), field(data))
	whole := sha256.Sum256(data)
	m.extend(10, whole[:])
	if err := os.WriteFile(m.prover.IMAList, m.list, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// recordedMachine is the evidence of a virtual machine, and a policy that
// accepts it.
func recordedMachine(t *testing.T) (attest.Evidence, *attest.Policy) {
	t.Helper()
	b, err := os.ReadFile("testdata/attest/evidence.json.gz")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if b, err = io.ReadAll(z); err != nil {
		t.Fatal(err)
	}
	c, err := attest.ParseCollected(b)
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Propose("servers")
	if err != nil {
		t.Fatal(err)
	}
	return c.Evidence, p
}

// A host joins a real server, proves itself over the agents' protocol, is refused
// for what it ran, and is let in again by a person.
func TestServer_attestation(t *testing.T) {
	keys, cats := filepath.Join(t.TempDir(), "keys"), t.TempDir()
	blob, err := codesign.EncodeCatalogue([]codesign.Record{{Digest: sha256.Sum256([]byte("one")), Kinds: integrity.SetOf(integrity.KindExec)}})
	if err == nil {
		err = os.WriteFile(filepath.Join(cats, "one.cat"), blob, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	offline := &fleetServer{t: t, dir: t.TempDir()}
	offline.must(0, "", "", "-q", "key", "init", keys, "--name", "Test")
	s := startServer(t, "--attest-keys", keys, "--attest-catalogues", cats, "--attest-domain", "fleet.example")
	if err := os.Rename(filepath.Join(s.dir, "fleet/break-glass.token"), filepath.Join(s.dir, "admin.token")); err != nil {
		t.Fatal(err)
	}
	s.login("admin")
	s.must(0, "admin", "{}", "resource", "put", strings.TrimSuffix(testGroup, "/resourceGroups/web"), "--file", "-")
	s.must(0, "admin", "{}", "resource", "put", testGroup, "--file", "-")
	h := s.joinHost(s.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--quiet"), "web-1")

	evidence, policy := recordedMachine(t)
	m := newMeasuredHost(t, evidence.EventLog)
	a := &agent.Attester{Prover: m.prover}
	if err := a.Attest(t.Context(), h); err == nil {
		t.Fatal("attested without a policy")
	}
	const record = "/run/ringwall/policy-record"
	policy.EKBases, policy.PolicyRecord = []attest.Basis{attest.BasisJoinToken}, attest.Record{Path: record, Digests: []string{digestText("policy")}}
	appraisal, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	properties, err := json.Marshal(map[string]any{"properties": attestation.PolicyProperties{Enrolment: attestation.Enrolment{JoinToken: true}, Appraisal: appraisal}})
	if err != nil {
		t.Fatal(err)
	}
	s.must(0, "admin", string(properties), "resource", "put", "/providers/"+attestation.TypePolicy+"/all", "--file", "-")
	m.measure(record, []byte("policy"))
	m.measure("/bin/one", []byte("one"))
	if err := a.Attest(t.Context(), h); err != nil {
		t.Fatal(err, s.said())
	}
	c, err := a.Certificate(time.Now())
	if err != nil || !strings.HasPrefix(c.Leaf.URIs[0].String(), "spiffe://fleet.example/host/") {
		t.Fatalf("%v, %v", c, err)
	}
	if got := s.must(0, "admin", "", "attest", "hosts"); !strings.Contains(got, h.id) || !strings.Contains(got, "trusted") || !strings.Contains(got, "join-token") {
		t.Errorf("%s", got)
	}
	// what the host's bundles brought is known, if its record is believed
	program := []byte("#!/bin/sh\nexit 0\n")
	stranger := filepath.Join(t.TempDir(), "keys")
	offline.must(0, "", "", "-q", "key", "init", stranger, "--name", "Stranger")
	pushed := func(product, by string, content []byte) (catalogue string) {
		t.Helper()
		dir := t.TempDir()
		in := func(name string) string { return filepath.Join(dir, name) }
		if err := errors.Join(os.MkdirAll(in("build"), 0o755), os.WriteFile(in("build/edge"), content, 0o755)); err != nil {
			t.Fatal(err)
		}
		s.must(0, "admin", "", "sign", in("build"), "--keys", by, "--product", product, "--version", "1", "--out", in("releases"))
		base := s.must(0, "admin", "", "policy", "init", "--keys", by, "--name", "base", "--quiet")
		if err := os.WriteFile(in("base.yaml"), []byte(base), 0o600); err != nil {
			t.Fatal(err)
		}
		s.must(0, "admin", "", "fleet", "bundle", "make", in("base.yaml"), "--keys", by, "--release", in("releases"), "--out", in("bundle"))
		s.must(0, "admin", "", "fleet", "bundle", "push", in("bundle"))
		return in("releases/" + product + "_1.cat")
	}
	edge := pushed("edge", keys, program)
	m.measure("/usr/bin/edge", program)
	if err := a.Attest(t.Context(), h); err != nil {
		t.Fatal(err, s.said())
	}
	pushed("rogue", stranger, []byte("#!/bin/sh\nrogue\n"))
	m.measure("/tmp/rogue", []byte("#!/bin/sh\nrogue\n"))
	if err := a.Attest(t.Context(), h); !errors.Is(err, errs.Denied) || !strings.Contains(err.Error(), "ima-unknown") {
		t.Errorf("a rogue program: %v", err)
	}
	if got := s.must(0, "admin", "", "attest", "hosts", "--standing", "quarantined"); !strings.Contains(got, "/tmp/rogue") {
		t.Errorf("%s", got)
	}
	for end := time.Now().Add(10 * time.Second); !strings.Contains(s.must(0, "admin", "", "incident", "list"), "attestation"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the quarantine is no incident")
		}
	}
	events, err := store.OpenEvents(t.Context(), "sqlite:"+filepath.Join(s.dir, "fleet"))
	if err != nil {
		t.Fatal(err)
	}
	signals, err := events.SignalsSince(t.Context(), time.Now().Add(-time.Hour))
	if err = errors.Join(err, events.Close()); err != nil || !slices.ContainsFunc(signals, func(x fleet.Signal) bool { return x.Name == "attestation" }) {
		t.Errorf("signals for rollouts: %v, %v", signals, err)
	}
	file := filepath.Join(t.TempDir(), "archive")
	s.must(0, "admin", "", "attest", "archive", "web-1", "-o", file)
	if got := offline.must(0, "", "", "attest", "verify-archive", file, "--trust", keys, "--catalogue", filepath.Join(cats, "one.cat"), "--catalogue", edge); !strings.Contains(got, "contraindicated") {
		t.Errorf("%s", got)
	}
	s.must(4, "admin", "", "attest", "archive", "web-1", "--until", "2001-01-01T00:00:00Z", "-o", file)
	s.must(2, "admin", "", "attest", "readmit", "web-1")
	s.must(4, "admin", "", "attest", "readmit", "web-9", "--reason", "x")
	s.must(0, "admin", "", "attest", "readmit", "web-1", "--reason", "an installer, taken away again")
	s.must(6, "admin", "", "attest", "readmit", "web-1", "--reason", "again")
	if got := s.must(0, "admin", "", "audit", "export"); !strings.Contains(got, "readmit") || !strings.Contains(got, "installer") {
		t.Errorf("%s", got)
	}
	s.must(0, "admin", "", "attest", "announce", "web-1", "--reason", "kernel update")

	// The machine joins anew under another id, which takes that the old host is
	// gone: its TPM is another host's until then.
	again := s.joinHost(s.must(0, "admin", "", "fleet", "join-token", "make", testGroup, "--quiet"), "web-2")
	if err := a.Attest(t.Context(), again); rpc.CodeOf(err) != rpc.CodeAlreadyExists {
		t.Errorf("one TPM, two hosts: %v", err)
	}
	s.must(0, "admin", "", "fleet", "hosts", "revoke", "web-1")
	if err := a.Attest(t.Context(), again); !errors.Is(err, errs.Denied) || !strings.Contains(err.Error(), "ima-unknown") {
		t.Errorf("in the place of a host that is gone: %v", err)
	}
	if got := s.must(0, "admin", "", "attest", "hosts"); !strings.Contains(got, "its TPM "+m.id()+" is that of host "+again.id) {
		t.Errorf("%s", got)
	}
}

// id is the TPM's.
func (m *measuredHost) id() string {
	m.t.Helper()
	id, err := m.prover.Identity()
	if err != nil {
		m.t.Fatal(err)
	}
	ek, err := attest.ParseEK(id.EK)
	if err != nil {
		m.t.Fatal(err)
	}
	return string(ek.ID())
}

func digestText(content string) string {
	sum := sha256.Sum256([]byte(content))
	return attest.FormatDigest(attest.SHA256, sum[:])
}
