// Command guest is the only program of a virtual machine: it does what a host
// does between power-on and its first attestation, and writes its evidence to
// the second serial port. See ../make.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"

	"ringwall/internal/attest"
)

func main() {
	if len(os.Args) > 1 { // a program that was run so that it is measured
		return
	}
	err := run()
	fmt.Println("guest:", err)
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

// measurePolicy is what a host's agent loads; the templates differ so that the
// list has several.
const measurePolicy = `dont_measure fsmagic=0x9fa0
dont_measure fsmagic=0x62656572
dont_measure fsmagic=0x73636673
measure func=FILE_CHECK mask=MAY_READ uid=0 template=ima-ng
measure func=BPRM_CHECK template=ima-sig
measure func=MMAP_CHECK mask=MAY_EXEC template=ima-ngv2
`

func run() error {
	for _, m := range [][3]string{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"securityfs", "/sys/kernel/security", "securityfs"},
	} {
		_ = os.MkdirAll(m[1], 0o755)
		if err := syscall.Mount(m[0], m[1], m[2], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	self, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	_ = os.MkdirAll("/etc/ringwall", 0o755)
	_ = os.MkdirAll("/bin", 0o755)
	if err := os.WriteFile("/etc/ringwall/policy.yaml", []byte("policy 5\n"), 0o600); err != nil {
		return err
	}
	programs := []string{"/bin/one", "/bin/two"}
	for i, p := range programs {
		// the same program, different content
		if err := os.WriteFile(p, append(bytes.Clone(self), byte(i)), 0o755); err != nil {
			return err
		}
	}
	policy := measurePolicy
	oldest := strings.Contains(string(cmdline), "ima_template=ima ")
	if oldest {
		for _, t := range []string{"ima-ngv2", "ima-ng", "ima-sig"} {
			policy = strings.ReplaceAll(policy, " template="+t, "")
		}
	}
	if err := os.WriteFile("/sys/kernel/security/ima/policy", []byte(policy), 0o600); err != nil {
		return fmt.Errorf("IMA policy: %w", err)
	}
	if _, err := os.ReadFile("/etc/ringwall/policy.yaml"); err != nil {
		return err
	}
	for _, p := range programs {
		if err := exec.Command(p, "measured").Run(); err != nil {
			return err
		}
	}
	if strings.Contains(string(cmdline), "ringwall.rogue") {
		if err := os.WriteFile("/bin/rogue", append(bytes.Clone(self), "rogue"...), 0o755); err != nil {
			return err
		}
		if err := exec.Command("/bin/rogue", "measured").Run(); err != nil {
			return err
		}
		// read while it is open for writing: a violation
		f, err := os.OpenFile("/etc/open", os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := os.ReadFile("/etc/open"); err != nil {
			return err
		}
	}
	list := "/sys/kernel/security/ima/binary_runtime_measurements"
	if oldest {
		list += "_sha256" // whose digests are the ones that the bank was extended with
	}
	return send(list)
}

// challenge is what the test asks: always the same, because this is a recording.
func challenge() *attest.Challenge {
	return &attest.Challenge{Nonce: bytes.Repeat([]byte{9}, attest.NonceSize), Key: bytes.Repeat([]byte{8}, 32)}
}

func send(list string) error {
	t, err := linuxtpm.Open("/dev/tpmrm0")
	if err != nil {
		return err
	}
	defer t.Close()
	ev := attest.Evidence{Bank: "sha256", Claims: []byte(`{"mode":"enforce"}`)}
	if err := quote(t, &ev); err != nil {
		return err
	}
	for path, to := range map[string]*[]byte{
		"/sys/kernel/security/tpm0/binary_bios_measurements": &ev.EventLog,
		list: &ev.IMA,
	} {
		if *to, err = os.ReadFile(path); err != nil {
			return err
		}
	}
	text, err := json.Marshal(ev)
	if err != nil {
		return err
	}
	out, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	fmt.Fprintf(out, "\nBEGIN\n")
	for s := base64.StdEncoding.EncodeToString(text); s != ""; {
		n := min(len(s), 76)
		fmt.Fprintf(out, "%s\n", s[:n])
		s = s[n:]
	}
	fmt.Fprintf(out, "END\n")
	return nil
}

func quote(t transport.TPM, ev *attest.Evidence) error {
	ak, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(attest.AKTemplate())}.Execute(t)
	if err != nil {
		return err
	}
	ev.AK = ak.OutPublic.Bytes()
	for i := range attest.NumPCRs {
		mask := make([]byte, 3)
		mask[i/8] = 1 << (i % 8)
		r, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: mask}}}}.Execute(t)
		if err != nil {
			return err
		}
		ev.PCRs = append(ev.PCRs, r.PCRValues.Digests[0].Buffer)
	}
	r, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: challenge().Qualifying(ev.Claims)},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0xff, 0xff}}}},
	}.Execute(t)
	if err != nil {
		return err
	}
	ev.Quote = attest.Quote{Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature)}
	return nil
}
