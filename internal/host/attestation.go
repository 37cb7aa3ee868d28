package host

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"ringwall/internal/attest"
	"ringwall/internal/errs"
)

// Where the kernel and systemd keep what was measured.
const (
	bootLogFile      = "/sys/kernel/security/tpm0/binary_bios_measurements"
	imaListFile      = "/sys/kernel/security/ima/binary_runtime_measurements"
	userspaceLogFile = "/run/log/systemd/tpm2-measure.log"
	imaPolicyFile    = "/sys/kernel/security/ima/policy"
)

// Prover is a host's side of attestation: what its TPM says, with the logs that
// explain it. It needs root, reads only, and keeps nothing on the disk: the
// attestation key is made again each time, from the TPM's own seed. It is safe
// for use by several goroutines; commands go to the TPM one round after another.
type Prover struct {
	TPM          string // device, or the socket of an emulator
	BootLog      string // file; one that is not there is evidence that is missing
	IMAList      string
	UserspaceLog string

	mu       sync.Mutex
	identity *attest.Identity
	template int
}

// NewProver returns the prover of this machine. tpm: "" is DefaultTPM.
func NewProver(tpm string) *Prover {
	if tpm == "" {
		tpm = DefaultTPM
	}
	return &Prover{TPM: tpm, BootLog: bootLogFile, IMAList: imaListFile, UserspaceLog: userspaceLogFile}
}

// provable is a key in the TPM.
type provable struct {
	handle tpm2.AuthHandle
	public []byte
}

func (p *Prover) session(fn func(transport.TPM) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	t, err := openTPM(p.TPM)
	if err != nil {
		return err
	}
	defer t.Close()
	if err := fn(t); err != nil {
		return fmt.Errorf("TPM %s: %w", p.TPM, err)
	}
	return nil
}

// primary makes a key of the endorsement hierarchy, which is the same each time.
func primary(t transport.TPM, template tpm2.TPMTPublic, policy bool) (*provable, error) {
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	auth := tpm2.PasswordAuth(nil)
	if policy {
		auth = tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsementPolicy)
	}
	return &provable{tpm2.AuthHandle{Handle: r.ObjectHandle, Name: r.Name, Auth: auth}, r.OutPublic.Bytes()}, nil
}

func endorsementPolicy(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session, NonceTPM: nonce,
	}.Execute(t)
	return err
}

func flush(t transport.TPM, handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(t) // a transient object, gone with the session at the latest
}

// Identity is the TPM's endorsement key, with its certificate if the TPM has
// one, and the attestation key.
func (p *Prover) Identity() (*attest.Identity, error) {
	var id *attest.Identity
	err := p.session(func(t transport.TPM) (err error) { id, err = p.identify(t); return err })
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return id, nil
}

func (p *Prover) identify(t transport.TPM) (*attest.Identity, error) {
	if p.identity != nil {
		return p.identity, nil
	}
	id := &attest.Identity{}
	p.template = 0
	for i, e := range attest.EKTemplates() {
		cert, err := readNV(t, tpm2.TPMHandle(e.Certificate))
		if errors.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificate of the endorsement key: %w", err)
		}
		id.Certificate, p.template = cert, i
		break
	}
	ek, err := p.ek(t)
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	flush(t, ek.handle.Handle)
	ak, err := primary(t, attest.AKTemplate(), false)
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	flush(t, ak.handle.Handle)
	id.EK, id.AK = ek.public, ak.public
	p.identity = id
	return id, nil
}

func (p *Prover) ek(t transport.TPM) (*provable, error) {
	e := attest.EKTemplates()[p.template]
	return primary(t, e.Public, e.Policy)
}

// maxNV bounds a certificate in the TPM.
const maxNV = 8 << 10

// readNV reads an index that anybody may read.
func readNV(t transport.TPM, index tpm2.TPMHandle) ([]byte, error) {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), errs.NotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), err)
	}
	info, err := pub.NVPublic.Contents()
	if err != nil || info.DataSize > maxNV {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), errors.Join(err, errs.Invalid))
	}
	const chunk = 512
	var out []byte
	for len(out) < int(info.DataSize) {
		r, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Size:       min(chunk, info.DataSize-uint16(len(out))), Offset: uint16(len(out)), //nolint:gosec // at most maxNV
		}.Execute(t)
		if err != nil || len(r.Data.Buffer) == 0 {
			return nil, fmt.Errorf("NV index %#x: %w", uint32(index), errors.Join(err, errs.Invalid))
		}
		out = append(out, r.Data.Buffer...)
	}
	return out, nil
}

// Answer answers a question: it opens the credential, quotes, and then reads
// the logs, which may run ahead of the quote and never lag behind it. claims are
// the agent's own words; csr is for the key that the question names.
func (p *Prover) Answer(q *attest.Question, claims, csr []byte) (*attest.Answer, error) {
	a := &attest.Answer{Nonce: q.Nonce, CSR: csr}
	err := p.session(func(t transport.TPM) (err error) {
		id, err := p.identify(t)
		if err != nil {
			return err
		}
		if q.Credential != nil {
			if a.Secret, err = p.activate(t, q.Credential); err != nil {
				return fmt.Errorf("open the credential: %w", err)
			}
		}
		a.Evidence = attest.Evidence{AK: id.AK, Bank: q.Bank, Claims: claims}
		clock, err := quote(t, &a.Evidence, q.Qualifying(claims))
		if err != nil {
			return fmt.Errorf("quote: %w", err)
		}
		return p.logs(&a.Evidence, q, clock)
	})
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	return a, nil
}

func (p *Prover) activate(t transport.TPM, c *attest.Credential) ([]byte, error) {
	ek, err := p.ek(t)
	if err != nil {
		return nil, err
	}
	defer flush(t, ek.handle.Handle)
	ak, err := primary(t, attest.AKTemplate(), false)
	if err != nil {
		return nil, err
	}
	defer flush(t, ak.handle.Handle)
	r, err := tpm2.ActivateCredential{
		ActivateHandle: ak.handle, KeyHandle: ek.handle,
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Blob}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Untrusted)
	}
	return r.CertInfo.Buffer, nil
}

// quoteTries is how often PCRs may change between reading and quoting: the
// kernel measures while we ask.
const quoteTries = 16

// quote fills in PCRs and the quote over them.
func quote(t transport.TPM, ev *attest.Evidence, qualifying []byte) (*attest.Clock, error) {
	alg, err := attest.ParseAlg(ev.Bank)
	if err != nil {
		return nil, err
	}
	ak, err := primary(t, attest.AKTemplate(), false)
	if err != nil {
		return nil, err
	}
	defer flush(t, ak.handle.Handle)
	parsed, err := attest.ParseAK(ak.public)
	if err != nil {
		return nil, err
	}
	var all []int
	for i := range attest.NumPCRs {
		all = append(all, i)
	}
	for range quoteTries {
		if ev.PCRs, err = readPCRs(t, alg); err != nil {
			return nil, err
		}
		r, err := tpm2.Quote{
			SignHandle: ak.handle, QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: attest.PCRSelection(alg, all),
		}.Execute(t)
		if err != nil {
			return nil, err
		}
		ev.Quote = attest.Quote{Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}
		bank, err := attest.NewBank(alg, ev.PCRs)
		if err != nil {
			return nil, err
		}
		clock, err := attest.VerifyQuote(parsed, ev.Quote, qualifying, bank)
		if err == nil {
			return clock, nil
		}
		if attest.ReasonOf(err) != attest.ReasonPCRDigest {
			return nil, err
		}
	}
	return nil, fmt.Errorf("the PCRs changed %d times while they were quoted: %w", quoteTries, errs.Conflict)
}

// readPCRs reads one at a time: a TPM may give fewer than were asked for.
func readPCRs(t transport.TPM, alg attest.Alg) ([][]byte, error) {
	var out [][]byte
	for i := range attest.NumPCRs {
		r, err := tpm2.PCRRead{PCRSelectionIn: attest.PCRSelection(alg, []int{i})}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("read PCR %d: %w", i, err)
		}
		if len(r.PCRValues.Digests) != 1 {
			return nil, fmt.Errorf("read PCR %d: the TPM has no bank %v: %w", i, alg, errs.Unsupported)
		}
		out = append(out, r.PCRValues.Digests[0].Buffer)
	}
	return out, nil
}

// logs adds what explains the quote, without what the verifier has already.
func (p *Prover) logs(ev *attest.Evidence, q *attest.Question, clock *attest.Clock) error {
	var err error
	for _, f := range []struct {
		path  string
		limit int
		to    *[]byte
	}{{p.BootLog, attest.MaxLog, &ev.EventLog}, {p.UserspaceLog, attest.MaxLog, &ev.UserspaceLog}, {p.IMAList, attest.MaxIMA, &ev.IMA}} {
		if *f.to, err = readLog(f.path, f.limit); err != nil {
			return err
		}
	}
	sum := sha256.Sum256(ev.EventLog)
	if len(ev.EventLog) == 0 || clock.Resets != q.Resets || !bytes.Equal(sum[:], q.Boot) {
		return nil // another boot than the verifier knows
	}
	ev.EventLog = nil
	alg, err := attest.ParseAlg(ev.Bank)
	if err != nil {
		return err
	}
	// a list that is shorter than what was verified is sent whole: the verifier decides
	if rest, err := attest.SkipIMA(ev.IMA, attest.IMADigestSize(ev.IMA, alg), q.IMAFrom); err == nil {
		ev.IMA, ev.IMAFrom = rest, q.IMAFrom
	}
	return nil
}

// readLog reads a file of the kernel's, whose size it does not tell; nil for one
// that is not there.
func readLog(path string, limit int) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, kindOf(err)
	case len(b) > limit:
		return nil, fmt.Errorf("%s: %d bytes (at most %d): %w", path, len(b), limit, errs.Invalid)
	}
	return b, nil
}

// Open opens a certificate that was sealed to this TPM and its present PCRs.
// errs.Denied: the PCRs are others by now; errs.Untrusted: it was sealed to
// another TPM, or changed.
func (p *Prover) Open(c *attest.SealedCertificate) ([]byte, error) {
	var key []byte
	err := p.session(func(t transport.TPM) (err error) {
		if _, err = p.identify(t); err != nil {
			return err
		}
		key, err = p.unseal(t, c)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the sealed certificate: %w", err)
	}
	return c.Open(key)
}

func (p *Prover) unseal(t transport.TPM, c *attest.SealedCertificate) ([]byte, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](c.Key.Public)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errs.Invalid)
	}
	ek, err := p.ek(t)
	if err != nil {
		return nil, err
	}
	defer flush(t, ek.handle.Handle)
	imported, err := tpm2.Import{
		ParentHandle: ek.handle, ObjectPublic: tpm2.New2B(*public), Duplicate: tpm2.TPM2BPrivate{Buffer: c.Key.Duplicate},
		InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: c.Key.Seed}, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("import: %w: %w", err, errs.Untrusted)
	}
	loaded, err := tpm2.Load{ParentHandle: ek.handle, InPrivate: imported.OutPrivate, InPublic: tpm2.New2B(*public)}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer flush(t, loaded.ObjectHandle)
	selection := attest.PCRSelection(attest.SHA256, c.PCRs)
	r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: loaded.ObjectHandle, Name: loaded.Name,
		Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection}.Execute(t)
			return err
		}),
	}}.Execute(t)
	if errors.Is(err, tpm2.TPMRCPolicyFail) {
		return nil, fmt.Errorf("the PCRs %v are not those that were attested: %w", c.PCRs, errs.Denied)
	}
	if err != nil {
		return nil, fmt.Errorf("unseal: %w", err)
	}
	return r.OutData.Buffer, nil
}

// RecordOwner owns the record of the integrity policy (attest.PolicyRecordText):
// by it the kernel tells that file's readings from all others, which it need not
// measure. 61183 is below systemd's dynamic users and above everybody else's.
const RecordOwner = 61183

// MeasurePolicy is the IMA policy that makes the kernel's list say what a
// verifier asks for: every program, library, module, firmware and kernel image
// that is used, and each reading of the record of the integrity policy. File
// systems of the kernel's own are left out; the initramfs and tmpfs are not.
func MeasurePolicy() string {
	var b bytes.Buffer
	// proc, sysfs, debugfs, devpts, binfmt_misc, securityfs, cgroup 1 and 2, nsfs, efivarfs
	for _, magic := range []string{
		"0x9fa0", "0x62656572", "0x64626720", "0x1cd1", "0x42494e4d", "0x73636673", "0x27e0eb", "0x63677270", "0x6e736673", "0xde5e81e4",
	} {
		fmt.Fprintf(&b, "dont_measure fsmagic=%s\n", magic)
	}
	b.WriteString("measure func=BPRM_CHECK\nmeasure func=MMAP_CHECK mask=MAY_EXEC\nmeasure func=MODULE_CHECK\n" +
		"measure func=FIRMWARE_CHECK\nmeasure func=KEXEC_KERNEL_CHECK\nmeasure func=KEXEC_INITRAMFS_CHECK\nmeasure func=POLICY_CHECK\n")
	fmt.Fprintf(&b, "measure func=FILE_CHECK mask=MAY_READ fowner=%d\n", RecordOwner)
	return b.String()
}

// WriteRecord writes the record of the integrity policy to a new file in the
// place of path and reads it once, so that the kernel measures it.
func WriteRecord(path string, text []byte) error {
	tmp := path + ".new"
	err := os.WriteFile(tmp, text, 0o600)
	if err == nil {
		err = os.Chown(tmp, RecordOwner, 0)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		_, err = os.ReadFile(path)
	}
	if err != nil {
		return fmt.Errorf("record the integrity policy: %w", kindOf(err))
	}
	return nil
}

// LoadMeasurePolicy hands a policy to the kernel, which takes one and no second
// until it is started again (without CONFIG_IMA_WRITE_POLICY): errs.Conflict
// when it has one. A kernel without IMA is errs.Unsupported.
func LoadMeasurePolicy(policy string) error {
	f, err := os.OpenFile(imaPolicyFile, os.O_WRONLY, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("load the IMA policy: the kernel has no IMA, or its policy is loaded already: %w", errs.Unsupported)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("load the IMA policy: one is loaded already: %w", errs.Conflict)
	case err != nil:
		return fmt.Errorf("load the IMA policy: %w", err)
	}
	// in one write: the kernel reads rules up to the end of it
	_, err = f.WriteString(policy)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("load the IMA policy: %w: %w", err, errs.Invalid)
	}
	return nil
}
