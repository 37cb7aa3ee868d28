// Command inside is the only program of a virtual machine: a host's agent from
// power-on to its certificate. It does what the test says on the second serial
// port, line by line.
package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"ringwall/internal/attest"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

func main() {
	if len(os.Args) > 1 { // a program that was run so that it is measured
		return
	}
	if err := run(); err != nil {
		fmt.Println("inside:", err)
	}
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

type agent struct {
	prover *host.Prover
	key    *ecdsa.PrivateKey
	port   *bufio.ReadWriter
	sealed *attest.SealedCertificate
	self   []byte
	count  int
}

func run() error {
	for _, m := range [][3]string{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"devtmpfs", "/dev", "devtmpfs"},
		{"securityfs", "/sys/kernel/security", "securityfs"},
		{"tmpfs", "/run", "tmpfs"},
	} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := syscall.Mount(m[0], m[1], m[2], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := host.LoadMeasurePolicy(host.MeasurePolicy()); err != nil {
		return err
	}
	a := &agent{prover: host.NewProver("")}
	var err error
	if a.self, err = os.ReadFile("/init"); err != nil {
		return err
	}
	if a.key, err = pki.NewKey(); err != nil {
		return err
	}
	for _, dir := range []string{"/run/ringwall", "/bin"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := errorsOf(a.record("enforce"), a.program("good")); err != nil {
		return err
	}
	tty, err := rawPort("/dev/ttyS1")
	if err != nil {
		return err
	}
	defer tty.Close()
	a.port = bufio.NewReadWriter(bufio.NewReaderSize(tty, 1<<20), bufio.NewWriterSize(tty, 1<<16))
	for a.say("ready", nil); ; {
		line, err := a.port.ReadString('\n')
		if err != nil {
			return err
		}
		verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch verb {
		case "round":
			err = a.round()
		case "record":
			err = a.record(attest.Mode(arg))
		case "program":
			err = a.program(arg)
		case "open":
			err = a.open()
		case "off":
			return nil
		default:
			continue // the firmware's noise
		}
		if err != nil {
			a.say("error", []byte(err.Error()))
		} else {
			a.say("done", nil)
		}
	}
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// rawPort opens a serial port that neither echoes nor cuts lines.
func rawPort(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return f, unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

func (a *agent) say(verb string, body []byte) {
	fmt.Fprintf(a.port, "\n%s %s\n", verb, base64.StdEncoding.EncodeToString(body))
	_ = a.port.Flush()
}

// call sends a message and waits for the answer to it.
func (a *agent) call(verb string, message, answer any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	a.say(verb, b)
	line, err := a.port.ReadString('\n')
	if err != nil {
		return err
	}
	if b, err = base64.StdEncoding.DecodeString(strings.TrimSpace(line)); err != nil {
		return fmt.Errorf("answer %.80q: %w", line, err)
	}
	return json.Unmarshal(b, answer)
}

func (a *agent) round() error {
	id, err := a.prover.Identity()
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(a.key.Public())
	if err != nil {
		return err
	}
	var q attest.Question
	if err := a.call("request", attest.Request{Identity: *id, Key: spki}, &q); err != nil {
		return err
	}
	if len(q.Nonce) == 0 {
		return fmt.Errorf("no question")
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, a.key)
	if err != nil {
		return err
	}
	answer, err := a.prover.Answer(&q, []byte(`{"agent":"inside"}`), csr)
	if err != nil {
		return err
	}
	var r attest.Reply
	if err := a.call("answer", answer, &r); err != nil {
		return err
	}
	a.sealed = r.Certificate
	return nil
}

// open opens the certificate, and shows that it is for our key.
func (a *agent) open() error {
	if a.sealed == nil {
		return fmt.Errorf("there is no certificate")
	}
	der, err := a.prover.Open(a.sealed)
	if err != nil {
		return err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if !a.key.PublicKey.Equal(c.PublicKey) {
		return fmt.Errorf("a certificate for another key")
	}
	a.say("certificate", der)
	return nil
}

func (a *agent) record(mode attest.Mode) error {
	a.count++
	return host.WriteRecord(attest.PolicyRecordPath, attest.PolicyRecordText([32]byte{5}, mode, a.count))
}

// program runs this program under another name and with other content.
func (a *agent) program(name string) error {
	path := "/bin/" + name
	if err := os.WriteFile(path, append(bytes.Clone(a.self), name...), 0o755); err != nil {
		return err
	}
	return exec.Command(path, "measured").Run()
}
