package kernelsig

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"strings"

	"ringwall/internal/errs"
)

// IPERules are what a policy for the kernel's Integrity Policy Enforcement
// (Linux 6.12 and newer; admin-guide/LSM/ipe) allows. Everything else is denied.
type IPERules struct {
	Name    string    // without spaces
	Version [3]uint16 // must grow with every update of a loaded policy
	// Operations that the rules below are for, such as EXECUTE; empty: all.
	Operations []string
	Volumes    [][32]byte // dm-verity root hashes
	Files      [][32]byte // fs-verity digests
	// BootVerified also allows what was in the initramfs.
	BootVerified bool
	// SignedVolumes and SignedFiles also allow every volume or file with a
	// signature that the kernel's keyrings accept.
	SignedVolumes, SignedFiles bool
}

// ipeOperations are the kernel's, KEXEC_* and so on included.
func ipeOperations() []string {
	return []string{"EXECUTE", "FIRMWARE", "KMODULE", "KEXEC_IMAGE", "KEXEC_INITRAMFS", "POLICY", "X509_CERT"}
}

const maxIPERules = 4096

// Text is the policy as the kernel reads it.
func (r IPERules) Text() (string, error) {
	operations := r.Operations
	if len(operations) == 0 {
		operations = ipeOperations()
	}
	if r.Name == "" || len(r.Name) > 64 || strings.Trim(r.Name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") != "" {
		return "", fmt.Errorf("IPE policy: name %.80q (want letters, digits, _ - .): %w", r.Name, errs.Invalid)
	}
	var what []string
	flag := func(on bool, property string) {
		if on {
			what = append(what, property+"=TRUE")
		}
	}
	flag(r.BootVerified, "boot_verified")
	flag(r.SignedVolumes, "dmverity_signature")
	flag(r.SignedFiles, "fsverity_signature")
	for _, d := range r.Volumes {
		what = append(what, fmt.Sprintf("dmverity_roothash=sha256:%x", d))
	}
	for _, d := range r.Files {
		what = append(what, fmt.Sprintf("fsverity_digest=sha256:%x", d))
	}
	switch {
	case len(what) == 0:
		return "", fmt.Errorf("IPE policy %s: it allows nothing, and the machine would stop: %w", r.Name, errs.Invalid)
	case len(what)*len(operations) > maxIPERules:
		return "", fmt.Errorf("IPE policy %s: %d rules (at most %d): %w", r.Name, len(what)*len(operations), maxIPERules, errs.Invalid)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "policy_name=%s policy_version=%d.%d.%d\nDEFAULT action=DENY\n", r.Name, r.Version[0], r.Version[1], r.Version[2])
	for _, op := range operations {
		for _, w := range what {
			fmt.Fprintf(&b, "op=%s %s action=ALLOW\n", op, w)
		}
	}
	return b.String(), nil
}

// IPEPolicy signs a policy's text for securityfs' ipe/new_policy and
// ipe/policies/NAME/update: a CMS with the text inside. The key must be on one
// of the kernel's trusted keyrings (builtin; secondary and platform where it
// was built so).
func IPEPolicy(key crypto.Signer, cert *x509.Certificate, text string) ([]byte, error) {
	b, err := SignAttached(key, cert, []byte(text))
	if err != nil {
		return nil, fmt.Errorf("IPE policy: %w", err)
	}
	return b, nil
}
