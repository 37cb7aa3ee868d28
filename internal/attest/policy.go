package attest

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

// Check names one thing that a policy can ask for.
type Check string

// The checks. The first three are always enforced: without them the others
// would look at nothing but claims.
const (
	CheckQuote      Check = "quote"       // signature, challenge, selection, values
	CheckReplay     Check = "pcr-replay"  // the logs lead to every quoted PCR
	CheckIMAReplay  Check = "ima-replay"  // the list leads to PCR 10 and belongs to this boot
	CheckEKTrust    Check = "ek-trust"    // why the TPM is believed to be one
	CheckReset      Check = "reset-count" // no boot since the last round that was not attested or announced
	CheckFirmware   Check = "firmware"    // PCR 0 to 3 are a known profile
	CheckSecureBoot Check = "secure-boot" // it is on
	CheckUsed       Check = "secure-boot-used"
	CheckPK         Check = "platform-key"
	CheckKEK        Check = "key-exchange-keys"
	CheckDB         Check = "db"
	CheckDBX        Check = "dbx" // holds at least what must be revoked
	CheckBootApps   Check = "boot-applications"
	CheckLoader     Check = "boot-loader" // PCR 8, 9, 12, 13 and 14: commands, files, initrds
	CheckUKI        Check = "uki"         // PCR 11: sections of the unified kernel image
	CheckCmdline    Check = "command-line"
	CheckDebug      Check = "debug-off"
	CheckIMA        Check = "ima-catalogue"
	CheckViolations Check = "ima-violations"
	CheckPolicy     Check = "policy-record" // the integrity policy that the kernel measured
)

// Checks lists all of them in the order in which they are reported.
func Checks() []Check {
	return []Check{
		CheckQuote, CheckReplay, CheckIMAReplay, CheckEKTrust, CheckReset, CheckFirmware, CheckSecureBoot, CheckUsed, CheckPK,
		CheckKEK, CheckDB, CheckDBX, CheckBootApps, CheckLoader, CheckUKI, CheckCmdline, CheckDebug, CheckIMA, CheckViolations, CheckPolicy,
	}
}

func (c Check) mandatory() bool { return c == CheckQuote || c == CheckReplay || c == CheckIMAReplay }

// Mode is what a failed check means.
type Mode string

// The modes.
const (
	ModeEnforce Mode = "enforce" // the host is refused
	ModeAudit   Mode = "audit"   // the result warns
	ModeOff     Mode = "off"     // not looked at
)

// PolicyFormat is the only format that ParsePolicy reads.
const PolicyFormat = "ringwall-attestation/1"

// Policy is what hosts are held against. A check that is not mentioned is
// enforced, and reference values that are not given are none: a new policy
// refuses everything until it says what is right.
//
// Digests are "sha256:" and hexadecimal. Those of measurements belong to the
// policy's bank; certificates are named by SHA-256 of their DER.
//
// A parsed policy is not to be changed; any number of appraisals may use it at
// once.
type Policy struct {
	Format  string      `json:"format"`
	Name    string      `json:"name"`
	Version uint64      `json:"version"`
	Bank    string      `json:"bank"`
	Checks  []CheckMode `json:"checks,omitempty"`
	// Unlogged are PCRs that nobody has to explain: of 16 and 23 only.
	Unlogged []int `json:"unlogged,omitempty"`

	EKBases          []Basis   `json:"ek_bases,omitempty"`
	Firmware         []Profile `json:"firmware,omitempty"`
	PK               []string  `json:"platform_keys,omitempty"`
	KEK              []string  `json:"key_exchange_keys,omitempty"`
	DB               []string  `json:"db,omitempty"`
	DBX              []string  `json:"dbx,omitempty"` // must be in it; more may be
	Authorities      []string  `json:"authorities,omitempty"`
	BootApplications []string  `json:"boot_applications,omitempty"`
	BootLoader       []string  `json:"boot_loader,omitempty"`
	UKI              []Section `json:"uki,omitempty"`
	CommandLine      Cmdline   `json:"command_line"`
	PolicyRecord     Record    `json:"policy_record"`

	// Made once, by ParsePolicy: the long lists as sets, and the name.
	applications, loaderFiles map[string]bool
	digest                    string
}

// CheckMode sets the mode of one check.
type CheckMode struct {
	Check Check `json:"check"`
	Mode  Mode  `json:"mode"`
}

// Profile is a firmware's PCRs, learned from hosts of one kind.
type Profile struct {
	Name string     `json:"name"`
	PCRs []PCRValue `json:"pcrs"`
}

// PCRValue is the value of one PCR.
type PCRValue struct {
	PCR    int    `json:"pcr"`
	Digest string `json:"digest"`
}

// Section is the contents that a section of a unified kernel image may have.
type Section struct {
	Name    string   `json:"name"`
	Digests []string `json:"digests"`
}

// Cmdline is what the kernel's command line may hold: words, of which one that
// ends with "*" stands for every word that begins so.
type Cmdline struct {
	Allow   []string `json:"allow,omitempty"`
	Require []string `json:"require,omitempty"`
}

// Record is the file by which the kernel measures the host's integrity policy.
type Record struct {
	Path    string   `json:"path,omitempty"`
	Digests []string `json:"digests,omitempty"` // live and previous
}

const (
	maxPolicy  = 8 << 20
	maxDigests = 1 << 16
	maxSigners = 1024
)

// ParsePolicy reads a policy: strict JSON, at most 8 MiB, no unknown or
// repeated key, no digest that is none.
func ParsePolicy(b []byte) (*Policy, error) {
	var p Policy
	if err := pki.UnmarshalStrict(b, &p, maxPolicy); err != nil {
		return nil, fmt.Errorf("attestation policy: %w", err)
	}
	if err := p.validate(); err != nil {
		return nil, fmt.Errorf("attestation policy: %w: %w", err, errs.Invalid)
	}
	p.applications, p.loaderFiles = setOf(p.BootApplications), setOf(p.BootLoader)
	p.digest = p.Digest()
	return &p, nil
}

func setOf(list []string) map[string]bool {
	m := make(map[string]bool, len(list))
	for _, s := range list {
		m[s] = true
	}
	return m
}

func listed(set map[string]bool, list []string, s string) bool {
	if set == nil {
		return slices.Contains(list, s)
	}
	return set[s]
}

func (p *Policy) validate() error {
	a, err := ParseAlg(p.Bank)
	switch {
	case p.Format != PolicyFormat:
		return fmt.Errorf("format %.40q (want %s)", p.Format, PolicyFormat)
	case slices.ContainsFunc(p.Firmware, func(f Profile) bool { return f.Name == "" }):
		return fmt.Errorf("a firmware profile without a name")
	case p.Name == "" || p.Version == 0:
		return fmt.Errorf("name or version is missing")
	case err != nil || !a.quotable():
		return fmt.Errorf("bank %.20q", p.Bank)
	}
	seen := map[Check]bool{}
	for _, m := range p.Checks {
		switch {
		case !slices.Contains(Checks(), m.Check):
			return fmt.Errorf("no check is called %.40q", m.Check)
		case seen[m.Check]:
			return fmt.Errorf("check %s is set twice", m.Check)
		case m.Mode != ModeEnforce && m.Mode != ModeAudit && m.Mode != ModeOff:
			return fmt.Errorf("check %s: mode %.20q (enforce, audit or off)", m.Check, m.Mode)
		case m.Check.mandatory() && m.Mode != ModeEnforce:
			return fmt.Errorf("check %s cannot be %s: nothing else would mean anything", m.Check, m.Mode)
		}
		seen[m.Check] = true
	}
	for _, n := range p.Unlogged {
		if n != 16 && n != 23 {
			return fmt.Errorf("PCR %d must be explained: only 16 and 23 may be unlogged", n)
		}
	}
	for _, b := range p.EKBases {
		if b != BasisVTPMCA && b != BasisVendorCA && b != BasisAllowList && b != BasisFirstUse && b != BasisJoinToken {
			return fmt.Errorf("no basis is called %.40q", b)
		}
	}
	return p.validateDigests(a)
}

func (p *Policy) validateDigests(bank Alg) error {
	for _, list := range [][]string{p.PK, p.KEK, p.DB, p.Authorities} {
		if len(list) > maxSigners {
			return fmt.Errorf("%d signers in one list (at most %d)", len(list), maxSigners)
		}
	}
	for _, list := range [][]string{p.PK, p.KEK, p.DB, p.DBX, p.Authorities} {
		if err := digestsOf(SHA256, list); err != nil {
			return err
		}
	}
	for _, list := range [][]string{p.BootApplications, p.BootLoader} {
		if err := digestsOf(bank, list); err != nil {
			return err
		}
	}
	for _, s := range p.UKI {
		if !strings.HasPrefix(s.Name, ".") || len(s.Name) > 8 {
			return fmt.Errorf("section %.20q", s.Name)
		}
		if err := digestsOf(bank, s.Digests); err != nil {
			return err
		}
	}
	for _, f := range p.Firmware {
		if len(f.PCRs) == 0 {
			return fmt.Errorf("firmware %.40q has no PCRs: it would fit every host", f.Name)
		}
		for _, v := range f.PCRs {
			if v.PCR < 0 || v.PCR > 3 {
				return fmt.Errorf("firmware %.40q: PCR %d is not the firmware's", f.Name, v.PCR)
			}
			if err := digestsOf(bank, []string{v.Digest}); err != nil {
				return err
			}
		}
	}
	for _, d := range p.PolicyRecord.Digests {
		if _, _, err := parseDigest(d); err != nil {
			return err
		}
	}
	return nil
}

func digestsOf(a Alg, list []string) error {
	if len(list) > maxDigests {
		return fmt.Errorf("%d digests in one list (at most %d)", len(list), maxDigests)
	}
	for _, s := range list {
		got, _, err := parseDigest(s)
		if err != nil {
			return err
		}
		if got != a {
			return fmt.Errorf("%.80s: want %s", s, a)
		}
	}
	return nil
}

// mode is what a failure of the check means.
func (p *Policy) mode(c Check) Mode {
	for _, m := range p.Checks {
		if m.Check == c {
			return m.Mode
		}
	}
	return ModeEnforce
}

// Digest names the policy: SHA-256 of its JSON as this package writes it.
func (p *Policy) Digest() string {
	if p.digest != "" {
		return p.digest
	}
	b, err := json.Marshal(p)
	if err != nil {
		return "" // not for this type
	}
	return FormatDigest(SHA256, SHA256.sum(b))
}
