package attest

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"ringwall/internal/attest"
	"ringwall/internal/control/attestation"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

// direct hands the kernel over past the firmware's check, with everything else
// as it should be.
func (b *bench) direct(took func(string)) {
	b.t.Helper()
	b.reboots()
	g := b.boot("OVMF_VARS_4M.snakeoil.fd", "-kernel", b.kernel, "-initrd", b.in("initrd"), "-append", options)
	g.ready()
	g.refused("a kernel handed over", attest.ReasonUnused)
	g.off()
	took("kernel handed over")
}

// give gives an order about the machine, as a person does.
func (b *bench) give(order string) error {
	return b.service.Give(b.t.Context(), root(), order, name, attestation.OrderBody{Reason: "the next part of the test"})
}

// reboots orders one.
func (b *bench) reboots() {
	b.t.Helper()
	b.must(b.give(attestation.OrderAnnounce))
}

// again resets the machine's TPM and extends it by software with everything that
// the good machine logged. The quote verifies and every PCR is right.
func (b *bench) again(log, list []byte, good attest.Evidence) {
	b.t.Helper()
	path := b.in("socket")
	tpm := start(b.t, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+b.in("tpm"), "--server", "type=unixio,path="+path, "--flags", "not-need-init,startup-clear")
	defer func() { _ = tpm.Process.Kill(); _ = tpm.Wait() }()
	for range 200 {
		if c, err := net.Dial("unix", path); err == nil {
			_ = c.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c, err := linuxudstpm.Open(path)
	b.must(err)
	extend := func(pcr int, digest []byte) {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
		}.Execute(c)
		b.must(err)
	}
	parsed, err := attest.ParseLog(log)
	b.must(err)
	for i := range parsed.Events {
		if e := &parsed.Events[i]; e.Type != attest.EventNoAction {
			extend(e.PCR, e.Digest(attest.SHA256))
		}
	}
	for _, data := range entries(b.t, list) {
		sum := sha256.Sum256(data)
		extend(10, sum[:])
	}
	b.must(c.Close())
	prover := host.NewProver(path)
	prover.BootLog, prover.IMAList, prover.UserspaceLog = b.write("log", string(log)), b.write("ima", string(list)), ""
	key, err := pki.NewKey()
	b.must(err)
	id, err := prover.Identity()
	b.must(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	b.must(err)
	q, err := b.service.Challenge(b.t.Context(), name, &attest.Request{Identity: *id, Key: spki})
	b.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	b.must(err)
	a, err := prover.Answer(q, nil, csr)
	b.must(err)
	for i := range a.Evidence.PCRs {
		if i != 10 && !bytes.Equal(a.Evidence.PCRs[i], good.PCRs[i]) {
			b.t.Errorf("PCR %d is not that of the good machine: this is not the attack", i)
		}
	}
	r, err := b.service.Verify(b.t.Context(), name, a)
	b.must(err)
	if !slices.Equal(r.Reasons, []attest.Reason{attest.ReasonReset}) {
		b.t.Errorf("reset and extended again: %s, want %s\n%s", r.Reasons, attest.ReasonReset, explain(r))
	}
	b.t.Logf("reset and extended again: refused for %s", r.Reasons)
	b.must(b.give(attestation.OrderReadmit))
}

// entries are the template data of an IMA list's entries (ima-ng and the like).
func entries(t *testing.T, list []byte) [][]byte {
	t.Helper()
	var out [][]byte
	for le := binary.LittleEndian; len(list) > 0; {
		n := 24 + 4 + int(le.Uint32(list[24:]))
		size := int(le.Uint32(list[n:]))
		out = append(out, list[n+4:n+4+size])
		list = list[n+4+size:]
	}
	return out
}

// others are the rest of the bad twins.
func (b *bench) others(took func(string)) {
	b.t.Helper()
	changed := b.disk("changed.signed")
	b.reboots()
	g := b.boot("OVMF_VARS_4M.snakeoil.fd", "-drive", "file="+changed+",format=raw,if=virtio,readonly=on")
	g.ready()
	g.refused("another command line", attest.ReasonUKI, attest.ReasonBootApp)
	g.off()
	took("another command line")

	b.reboots()
	g = b.boot("OVMF_VARS_4M.fd", "-drive", "file="+b.in("good.signed.esp")+",format=raw,if=virtio,readonly=on")
	g.ready()
	g.refused("Secure Boot off", attest.ReasonSecureBootOff)
	g.off()
	took("Secure Boot off")

	unsigned := b.disk("good")
	g = b.boot("OVMF_VARS_4M.snakeoil.fd", "-drive", "file="+unsigned+",format=raw,if=virtio,readonly=on")
	if !saysInTime(b.t, g.console, "Access Denied") {
		b.t.Error("the firmware does not say that it refused the unsigned image")
	}
	g.stop(0)
	took("unsigned image")
}

// saysInTime waits for a text on a console.
func saysInTime(t *testing.T, console, text string) bool {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		b, err := os.ReadFile(console)
		if err == nil && strings.Contains(string(b), text) {
			return true
		}
	}
	return false
}
