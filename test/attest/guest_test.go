// Package attest boots virtual machines that prove by TPM what they booted, to
// the server's code in the test's own process: firmware with Secure Boot, a
// signed unified image, Debian's kernel, all of it other people's.
package attest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ringwall/internal/attest"
	"ringwall/internal/control"
	"ringwall/internal/control/attestation"
	"ringwall/internal/errs"
	"ringwall/internal/kernelsig"
	"ringwall/internal/pki"
	"ringwall/internal/resource"
	"ringwall/internal/store"
	"ringwall/test/vm"
)

const (
	firmware = "/usr/share/OVMF/"
	stub     = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	options  = "console=ttyS0 quiet ima_hash=sha256 lockdown=integrity no_timer_check"
)

func command(t *testing.T, argv ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no %s here", argv[0])
	}
	c := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return out
}

// bench is what all machines share: one TPM, the images, the server.
type bench struct {
	t      *testing.T
	dir    string
	kernel string
	self   []byte // the guest's program
	signer *x509.Certificate

	store     *store.Store
	service   *attestation.Service
	door      *control.Door
	incidents []attestation.Incident
	replies   []*attest.Reply
	evidence  *attest.Evidence // of the last round
}

type shelf struct{ *store.Store }

func (s shelf) Write(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Write(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func (s shelf) Read(ctx context.Context, fn func(control.Tx) error) error {
	return s.Store.Read(ctx, func(tx *store.Tx) error { return fn(tx) })
}

func setUp(t *testing.T) *bench {
	t.Helper()
	for _, f := range []string{firmware + "OVMF_CODE_4M.secboot.fd", firmware + "OVMF_VARS_4M.snakeoil.fd", stub, "/usr/share/ovmf/PkKek-1-snakeoil.key"} {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("SKIPPED, NOT TESTED: %v; fix: apt-get install ovmf systemd-boot-efi", err)
		}
	}
	k, err := vm.FindKernel(t.Context(), "6.12")
	if errors.Is(err, errs.Unsupported) {
		t.Skipf("SKIPPED, NOT TESTED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "rwattest") // paths of sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b := &bench{t: t, dir: dir, kernel: k.Image}
	command(t, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", b.in("init"), "./inside")
	if b.self, err = os.ReadFile(b.in("init")); err != nil {
		t.Fatal(err)
	}
	command(t, "sh", "-c", "cd "+dir+" && echo init | cpio --quiet -o -H newc >initrd")
	command(t, "openssl", "rsa", "-in", "/usr/share/ovmf/PkKek-1-snakeoil.key", "-passin", "pass:snakeoil", "-out", b.in("key"))
	text, err := os.ReadFile("/usr/share/ovmf/PkKek-1-snakeoil.pem")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if b.signer, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	b.server()
	return b
}

func (b *bench) in(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) write(name, content string) string {
	b.t.Helper()
	if err := os.WriteFile(b.in(name), []byte(content), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return b.in(name)
}

// uki makes a unified image, and its signed twin NAME.signed.
func (b *bench) uki(name, cmdline string) {
	b.t.Helper()
	command(b.t, "objcopy",
		"--add-section", ".osrel="+b.write("osrel", "ID=test\n"), "--change-section-vma", ".osrel=0x20000",
		"--add-section", ".cmdline="+b.write("cmdline", cmdline), "--change-section-vma", ".cmdline=0x30000",
		"--add-section", ".linux="+b.kernel, "--change-section-vma", ".linux=0x2000000",
		"--add-section", ".initrd="+b.in("initrd"), "--change-section-vma", ".initrd=0x5000000", stub, b.in(name))
	command(b.t, "sbsign", "--key", b.in("key"), "--cert", "/usr/share/ovmf/PkKek-1-snakeoil.pem", "--output", b.in(name+".signed"), b.in(name))
}

// predict gives the reference values of an image: nothing of it was booted yet.
func (b *bench) predict(name string) *attest.References {
	b.t.Helper()
	file, err := os.ReadFile(b.in(name))
	if err != nil {
		b.t.Fatal(err)
	}
	m, err := kernelsig.ParseImage(file)
	if err != nil {
		b.t.Fatal(err)
	}
	var parts []attest.ImagePart
	for _, s := range m.Sections {
		parts = append(parts, attest.ImagePart{Name: s.Name, Data: s.Data})
	}
	linux, _ := m.Section(".linux")
	inner, err := kernelsig.ParseImage(linux)
	if err != nil {
		b.t.Fatal(err)
	}
	hash := inner.Hash()
	return &attest.References{Format: attest.ReferencesFormat, Components: []attest.Component{attest.Predict(name, file, m.Hash(), parts, &hash)}}
}

// disk makes an EFI system partition that boots the image.
func (b *bench) disk(name string) string {
	b.t.Helper()
	path := b.in(name + ".esp")
	command(b.t, "truncate", "-s", "96M", path)
	command(b.t, "mkfs.vfat", "-F", "32", path)
	command(b.t, "mmd", "-i", path, "::EFI", "::EFI/BOOT")
	command(b.t, "mcopy", "-i", path, b.in(name), "::EFI/BOOT/BOOTX64.EFI")
	return path
}

// server is the whole server side, on a database of its own.
func (b *bench) server() {
	b.t.Helper()
	s, err := store.Open(b.t.Context(), "sqlite:"+b.in("data"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = s.Close() })
	b.store = s
	if b.door, err = control.New(shelf{s}, attestation.Kinds()...); err != nil {
		b.t.Fatal(err)
	}
	a, err := pki.CreateAuthority(b.in("keys"), pki.AuthorityOptions{Name: "Test", Now: time.Now})
	if err != nil {
		b.t.Fatal(err)
	}
	signer, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposeAppraisal, Identity: "spiffe://fleet.example/attestation", Now: time.Now()})
	if err != nil {
		b.t.Fatal(err)
	}
	ca, err := pki.NewTLSAuthority("hosts", time.Now())
	if err != nil {
		b.t.Fatal(err)
	}
	b.service, err = attestation.New(attestation.Config{
		Store: shelf{s}, Door: b.door, Results: signer, Hosts: ca, Fleet: "fleet.example", Now: time.Now,
		Policies: &attestation.Tree{Store: shelf{s}, Catalogues: func(context.Context, string) (attest.Catalogues, error) { return b, nil }},
		Hooks:    attestation.Hooks{Quarantined: func(i attestation.Incident) { b.incidents = append(b.incidents, i) }},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// Knows implements attest.Catalogues: the guest's own good program.
func (b *bench) Knows(alg string, digest []byte, verity bool) bool {
	good := sha256.Sum256(append(bytes.Clone(b.self), "good"...))
	return alg == "sha256" && !verity && bytes.Equal(good[:], digest)
}

// Names implements attest.Catalogues.
func (b *bench) Names() []string { return []string{"guest"} }

// policy is put into the tree.
func (b *bench) policy(p *attest.Policy, tpmCA string) {
	b.t.Helper()
	appraisal, err := json.Marshal(p)
	if err != nil {
		b.t.Fatal(err)
	}
	properties, err := json.Marshal(attestation.PolicyProperties{Enrolment: attestation.Enrolment{VTPMCAs: []string{tpmCA}}, Appraisal: appraisal})
	if err != nil {
		b.t.Fatal(err)
	}
	id, err := resource.ParseID("/providers/" + attestation.TypePolicy + "/guests")
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.door.Put(b.t.Context(), root(), resource.Document{ID: id, Properties: properties}, resource.When{}, false); err != nil {
		b.t.Fatal(err)
	}
}

func root() control.Actor { return control.Actor{ID: control.BreakGlass, Name: "admin"} }

const name = "guest-1"

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// makeTPM makes the machine's TPM as a hypervisor does: with a certificate of
// our own CA for virtual TPMs. It returns the CA as PEM.
func (b *bench) makeTPM() string {
	b.t.Helper()
	b.must(os.MkdirAll(b.in("ca"), 0o700))
	b.must(os.MkdirAll(b.in("tpm"), 0o700))
	b.write("localca.conf", "statedir = "+b.in("ca")+"\nsigningkey = "+b.in("ca/key.pem")+"\nissuercert = "+b.in("ca/cert.pem")+"\ncertserial = "+b.in("ca/serial")+"\n")
	b.write("setup.conf", "create_certs_tool = "+lookup(b.t, "swtpm_localca")+"\ncreate_certs_tool_config = "+b.in("localca.conf")+"\ncreate_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n")
	command(b.t, "swtpm_setup", "--tpm2", "--tpmstate", b.in("tpm"), "--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256", "--config", b.in("setup.conf"))
	text, err := os.ReadFile(b.in("ca/cert.pem"))
	b.must(err)
	return string(text)
}

func lookup(t *testing.T, program string) string {
	t.Helper()
	for _, dir := range []string{"/usr/bin/", "/usr/share/swtpm/", "/usr/lib/swtpm/"} {
		for _, n := range []string{program, strings.ReplaceAll(program, "_", "-")} {
			if _, err := os.Stat(dir + n); err == nil {
				return dir + n
			}
		}
	}
	t.Skipf("SKIPPED, NOT TESTED: no %s here; fix: apt-get install swtpm-tools", program)
	return ""
}

// start starts a program that must not outlive the test.
func start(t *testing.T, argv ...string) *exec.Cmd {
	t.Helper()
	c := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()  // the kernel ties the signal to the thread that forked
	if argv[0] != "swtpm" { // which tells of every client that goes
		c.Stderr = os.Stderr
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// guest is a running machine.
type guest struct {
	*bench
	qemu, tpm *exec.Cmd
	port      net.Conn
	in        *bufio.Reader
	console   string
}

// boot starts a machine; vars are the firmware's variables, which are copied.
func (b *bench) boot(vars string, args ...string) *guest {
	b.t.Helper()
	raw, err := os.ReadFile(firmware + vars)
	b.must(err)
	b.write("vars.fd", string(raw))
	g := &guest{bench: b, console: b.in("console")}
	for _, f := range []string{"swtpm", "port", "console"} {
		_ = os.Remove(b.in(f))
	}
	l, err := net.Listen("unix", b.in("port"))
	b.must(err)
	defer l.Close()
	g.tpm = start(b.t, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+b.in("tpm"), "--ctrl", "type=unixio,path="+b.in("swtpm"), "--terminate")
	for range 200 {
		if _, err := os.Stat(b.in("swtpm")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	g.qemu = start(b.t, append([]string{
		"qemu-system-x86_64", "-machine", "q35,smm=on", "-m", "768", "-smp", "2", "-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none", "-nodefaults", "-no-reboot",
		"-global", "driver=cfi.pflash01,property=secure,value=on",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + firmware + "OVMF_CODE_4M.secboot.fd",
		"-drive", "if=pflash,unit=1,format=raw,file=" + b.in("vars.fd"),
		"-chardev", "socket,id=tpm,path=" + b.in("swtpm"), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0",
		"-serial", "file:" + g.console, "-chardev", "socket,id=port,path=" + b.in("port"), "-serial", "chardev:port",
	}, args...)...)
	b.must(l.(*net.UnixListener).SetDeadline(time.Now().Add(time.Minute)))
	g.port, err = l.Accept()
	b.must(err)
	g.in = bufio.NewReaderSize(g.port, 1<<20)
	return g
}

const bootTime = 5 * time.Minute

// read waits for a message of the guest.
func (g *guest) read() (verb string, body []byte) {
	g.t.Helper()
	_ = g.port.SetReadDeadline(time.Now().Add(bootTime))
	for {
		line, err := g.in.ReadString('\n')
		if err != nil {
			text, _ := os.ReadFile(g.console)
			g.t.Fatalf("the guest says nothing more: %v\n%s", err, text[max(0, len(text)-3000):])
		}
		verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !slices.Contains([]string{"ready", "request", "answer", "certificate", "done", "error"}, verb) {
			continue // of the firmware
		}
		b, err := base64.StdEncoding.DecodeString(arg)
		if err != nil {
			continue
		}
		return verb, b
	}
}

func (g *guest) ready() {
	g.t.Helper()
	if verb, body := g.read(); verb != "ready" {
		g.t.Fatalf("%s: %s", verb, body)
	}
}

// do has the guest do something, and serves it meanwhile. It returns what the
// guest says of an error, and the certificate that it opened.
func (g *guest) do(order string) (certificate []byte, failed string) {
	g.t.Helper()
	fmt.Fprintf(g.port, "%s\n", order)
	for {
		verb, body := g.read()
		switch verb {
		case "done":
			return certificate, ""
		case "error":
			return nil, string(body)
		case "certificate":
			certificate = body
		case "request":
			req, err := attest.ParseRequest(body)
			g.must(err)
			q, err := g.service.Challenge(g.t.Context(), name, req)
			g.must(err)
			g.reply(q)
		case "answer":
			a, err := attest.ParseAnswer(body)
			g.must(err)
			g.evidence = &a.Evidence
			r, err := g.service.Verify(g.t.Context(), name, a)
			g.must(err)
			g.replies = append(g.replies, r)
			g.reply(r)
		}
	}
}

func (g *guest) reply(v any) {
	b, err := json.Marshal(v)
	g.must(err)
	fmt.Fprintf(g.port, "%s\n", base64.StdEncoding.EncodeToString(b))
}

// round is a round, whose reply it returns.
func (g *guest) round() *attest.Reply {
	g.t.Helper()
	if _, failed := g.do("round"); failed != "" {
		g.t.Fatal(failed)
	}
	return g.replies[len(g.replies)-1]
}

// refused is a round that must be refused, for these reasons among others that
// follow from them, and then released for the next one.
func (g *guest) refused(what string, want ...attest.Reason) {
	g.t.Helper()
	before := len(g.incidents)
	r := g.round()
	for _, w := range want {
		if !slices.Contains(r.Reasons, w) {
			g.t.Errorf("%s: %s, want %s", what, r.Reasons, w)
		}
	}
	if r.Status != attest.Contraindicated || r.Certificate != nil || len(g.incidents) != before+1 {
		g.t.Errorf("%s: %s, certificate %v, %d incidents", what, r.Status, r.Certificate != nil, len(g.incidents)-before)
	}
	g.t.Logf("%s: refused for %s", what, r.Reasons)
	if err := g.service.Attested(g.t.Context(), name, nil, time.Hour); !errors.Is(err, errs.Denied) {
		g.t.Errorf("%s: still attested: %v", what, err)
	}
	g.must(g.give(attestation.OrderReadmit))
}

func (g *guest) off() {
	g.t.Helper()
	fmt.Fprintf(g.port, "off\n")
	g.stop(20 * time.Second)
}

// stop ends the machine, by force after a while.
func (g *guest) stop(wait time.Duration) {
	_ = g.port.Close()
	done := make(chan struct{})
	go func() { _ = g.qemu.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(wait):
		_ = g.qemu.Process.Kill()
		<-done
	}
	_ = g.tpm.Process.Kill() // it goes with the machine, or now
	_ = g.tpm.Wait()
}

// TestMachines: from a TPM that nobody knows to an opened certificate, and the
// machines that get none.
func TestMachines(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED, NOT TESTED: boots guests (-short)")
	}
	b := setUp(t)
	tpmCA := b.makeTPM()
	b.uki("good", options)
	b.uki("changed", options+" ima_policy=")
	disk := b.disk("good.signed")
	lap := time.Now()
	took := func(what string) { t.Logf("%s: %.0f s", what, time.Since(lap).Seconds()); lap = time.Now() }

	p := b.predicted()
	// ring 0: the firmware is not known yet and only watched
	p.Checks = []attest.CheckMode{{Check: attest.CheckFirmware, Mode: attest.ModeAudit}, {Check: attest.CheckDBX, Mode: attest.ModeAudit}}
	b.policy(p, tpmCA)
	g := b.boot("OVMF_VARS_4M.snakeoil.fd", "-drive", "file="+disk+",format=raw,if=virtio,readonly=on")
	g.ready()
	if r := g.round(); r.Status != attest.Warning || r.Certificate == nil {
		t.Fatalf("%s for %s\n%s", r.Status, r.Reasons, explain(r))
	}
	log, list := g.evidence.EventLog, g.evidence.IMA
	g.approveFirmware(p)
	p.Checks, p.Version = nil, 2
	b.policy(p, tpmCA)
	r := g.round()
	if r.Status != attest.Affirming || r.Certificate == nil {
		t.Fatalf("%s for %s\n%s", r.Status, r.Reasons, explain(r))
	}
	der, failed := g.do("open")
	if failed != "" {
		t.Fatal(failed)
	}
	if c, err := x509.ParseCertificate(der); err != nil || len(c.URIs) != 1 || !strings.HasPrefix(c.URIs[0].String(), "spiffe://fleet.example/host/") {
		t.Errorf("%+v, %v", c, err)
	}
	b.must(b.service.Attested(t.Context(), name, []attest.Check{attest.CheckSecureBoot, attest.CheckUsed, attest.CheckUKI, attest.CheckPolicy, attest.CheckEKTrust}, time.Minute))
	took("the good machine")
	kept := *b.evidence
	g.order("program rogue")
	g.refused("a rogue program", attest.ReasonIMAUnknown)
	g.order("record audit")
	g.refused("policy in audit", attest.ReasonPolicyRecord)
	g.off()
	took("what it did then")
	b.again(log, list, kept)
	took("TPM reset and extended again")
	b.direct(took)
	b.others(took)
}

func (g *guest) order(what string) {
	g.t.Helper()
	if _, failed := g.do(what); failed != "" {
		g.t.Fatalf("%s: %s", what, failed)
	}
}

// predicted is a policy made of files only.
func (b *bench) predicted() *attest.Policy {
	b.t.Helper()
	sum := sha256.Sum256(b.signer.Raw)
	key := []string{attest.FormatDigest(attest.SHA256, sum[:])}
	records, err := attest.RecordDigests([][32]byte{{5}}, attest.ModeEnforce, 16)
	b.must(err)
	p := &attest.Policy{
		Format: attest.PolicyFormat, Name: "guests", Version: 1, Bank: "sha256", EKBases: []attest.Basis{attest.BasisVTPMCA},
		PK: key, KEK: key, DB: key, Authorities: key,
		CommandLine:  attest.Cmdline{Require: []string{"lockdown=integrity"}},
		PolicyRecord: attest.Record{Path: attest.PolicyRecordPath, Digests: records},
	}
	b.must(b.predict("good.signed").AddTo(p))
	return p
}

// approveFirmware takes what ring 0 learned of the firmware into the policy.
func (g *guest) approveFirmware(p *attest.Policy) {
	g.t.Helper()
	log, err := attest.ParseLog(g.evidence.EventLog)
	g.must(err)
	bank, err := attest.NewBank(attest.SHA256, g.evidence.PCRs)
	g.must(err)
	boot, err := attest.Replay(log, nil, bank, nil)
	g.must(err)
	learned := attest.Propose(boot, "OVMF")
	p.Firmware, p.DBX = learned.Firmware, learned.DBX
}

func explain(r *attest.Reply) string {
	var e struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	_ = json.Unmarshal(r.Result, &e)
	return string(e.Envelope.Payload)
}
