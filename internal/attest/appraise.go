package attest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Status sums a result up, in the words of EAR (draft-ietf-rats-ear).
type Status string

// The statuses.
const (
	Affirming       Status = "affirming"       // every check that is not off passed
	Warning         Status = "warning"         // checks failed that are only audited
	Contraindicated Status = "contraindicated" // an enforced check failed
)

// Outcome is how one check ended.
type Outcome string

// The outcomes.
const (
	Pass Outcome = "pass"
	Fail Outcome = "fail"
	Off  Outcome = "off"
)

// Checked is one check's outcome.
type Checked struct {
	Check   Check   `json:"check"`
	Mode    Mode    `json:"mode"`
	Outcome Outcome `json:"outcome"`
	Reason  Reason  `json:"reason,omitempty"`
	Detail  string  `json:"detail,omitempty"`
}

// Result is what a host's evidence proved. It depends on nothing but the
// input: whoever has that can compute it again.
type Result struct {
	Format        string    `json:"format"`
	Host          HostID    `json:"host"`
	At            time.Time `json:"at"`
	Status        Status    `json:"status"`
	Checks        []Checked `json:"checks"`
	PolicyName    string    `json:"policy_name"`
	PolicyVersion uint64    `json:"policy_version"`
	PolicyDigest  string    `json:"policy_digest"`
	Nonce         []byte    `json:"nonce"`
	Key           []byte    `json:"key"`   // what the challenge was for
	Quote         []byte    `json:"quote"` // SHA-256 of the attestation
	Clock         Clock     `json:"clock"`
	IMA           IMAFacts  `json:"ima"`
}

// ResultFormat is the format of results.
const ResultFormat = "ringwall-attestation-result/1"

// Passed reports whether a check was made and passed: the question of gates.
func (r *Result) Passed(c Check) bool {
	return slices.ContainsFunc(r.Checks, func(k Checked) bool { return k.Check == c && k.Outcome == Pass })
}

// Reasons lists why the host was refused.
func (r *Result) Reasons() []Reason {
	var out []Reason
	for _, c := range r.Checks {
		if c.Outcome == Fail && c.Mode == ModeEnforce {
			out = append(out, c.Reason)
		}
	}
	return out
}

// Input is all that an appraisal looks at.
type Input struct {
	Enrolled  Enrolled
	Challenge Challenge // redeemed
	Evidence  Evidence
	State     *State // of the last round that was accepted; nil: none
	// BootLog is the log of this boot from an earlier round, for evidence that
	// leaves it out; its digest is in State.
	BootLog []byte
	// Boot is what Appraise returned for an earlier round of this boot, if it is
	// still at hand: a log that explained the same values is not read again.
	Boot *Boot
	// Announced: a reboot of this host was ordered since the last round.
	Announced  bool
	Policy     *Policy
	Catalogues Catalogues // nil: none
	Now        time.Time
}

// Appraise checks a host's evidence against a policy. It always gives a
// result; a check that could not be made has failed. next is the state after
// this round, nil when the evidence did not hold together, and boot is what
// Input.Boot takes.
func Appraise(in *Input) (r *Result, next *State, boot *Boot) {
	a := &appraisal{Input: in, failed: map[Check]error{}}
	r = &Result{
		Format: ResultFormat, Host: in.Enrolled.Host, At: in.Now.UTC(), Status: Affirming,
		PolicyName: in.Policy.Name, PolicyVersion: in.Policy.Version, PolicyDigest: in.Policy.Digest(),
		Nonce: in.Challenge.Nonce, Key: in.Challenge.Key, Quote: SHA256.sum(in.Evidence.Quote.Attest),
	}
	if a.evidence() {
		next, boot = a.next, a.boot
		r.Clock, r.IMA = next.Clock, next.Facts
		a.boots()
		a.system()
	}
	for _, c := range Checks() {
		k := Checked{Check: c, Mode: in.Policy.mode(c), Outcome: Pass}
		err := a.failed[c]
		if err == nil && next == nil && !c.mandatory() {
			err = refuse(ReasonNoEvidence, "the evidence does not hold together")
		}
		switch {
		case k.Mode == ModeOff:
			k.Outcome = Off
		case err != nil:
			k.Outcome, k.Reason, k.Detail = Fail, ReasonOf(err), detail(err)
			if k.Mode == ModeEnforce {
				r.Status = Contraindicated
			} else if r.Status == Affirming {
				r.Status = Warning
			}
		}
		r.Checks = append(r.Checks, k)
	}
	return r, next, boot
}

func detail(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		if e.PCR >= 0 {
			return fmt.Sprintf("PCR %d: %s", e.PCR, e.Detail)
		}
		return e.Detail
	}
	return err.Error()
}

type appraisal struct {
	*Input
	failed  map[Check]error
	clock   Clock
	boot    *Boot
	sameRun bool // the boot of the last round
	next    *State
}

// evidence verifies quote and logs; what fails here fails everything.
func (a *appraisal) evidence() bool {
	bank, err := a.quote()
	if err != nil {
		a.failed[CheckQuote] = err
		// nobody knows what the others would have said
		a.failed[CheckReplay] = refuse(ReasonNoEvidence, "there is no quote to compare with")
		a.failed[CheckIMAReplay] = a.failed[CheckReplay]
		return false
	}
	logDigest, err := a.replay(bank)
	if err != nil {
		a.failed[CheckReplay] = err
		a.failed[CheckIMAReplay] = refuse(ReasonNoEvidence, "the boot is not known")
		return false
	}
	a.next = &State{Clock: a.clock, EventLog: logDigest}
	if err := a.ima(bank); err != nil {
		a.failed[CheckIMAReplay] = err
		return false
	}
	return true
}

func (a *appraisal) quote() (*Bank, error) {
	ak, bank, err := a.Evidence.checkBinding(&a.Challenge, &a.Enrolled)
	if err != nil {
		return nil, err
	}
	if a.Policy.Bank != a.Evidence.Bank {
		return nil, refuse(ReasonPCRSelection, "bank %s (the policy's is %s)", a.Evidence.Bank, a.Policy.Bank)
	}
	clock, err := VerifyQuote(ak, a.Evidence.Quote, a.Challenge.Qualifying(a.Evidence.Claims), bank)
	if err != nil {
		return nil, err
	}
	a.clock = *clock
	a.sameRun = a.State != nil && a.State.Clock.Resets == clock.Resets
	return bank, nil
}

func (a *appraisal) replay(bank *Bank) (logDigest []byte, err error) {
	raw := a.Evidence.EventLog
	if len(raw) == 0 {
		if !a.sameRun || !bytes.Equal(SHA256.sum(a.BootLog), a.State.EventLog) {
			return nil, refuse(ReasonNoEvidence, "no event log, and none of this boot from before")
		}
		raw = a.BootLog
		if a.Boot.explains(bank) && bytes.Equal(a.Boot.user, SHA256.sum(a.Evidence.UserspaceLog)) {
			boot := *a.Boot
			boot.Quoted = bank
			a.boot = &boot
			return a.State.EventLog, nil
		}
	}
	log, err := ParseLog(raw)
	if err != nil {
		return nil, err
	}
	var user *UserspaceLog
	if len(a.Evidence.UserspaceLog) > 0 {
		if user, err = ParseUserspaceLog(a.Evidence.UserspaceLog); err != nil {
			return nil, err
		}
	}
	if a.boot, err = Replay(log, user, bank, a.Policy.Unlogged); err != nil {
		return nil, err
	}
	a.boot.user = SHA256.sum(a.Evidence.UserspaceLog)
	return SHA256.sum(raw), nil
}

// explains: the same values but for PCR 10, so the same events.
func (b *Boot) explains(bank *Bank) bool {
	if b == nil || b.Alg != bank.Alg {
		return false
	}
	for i := range bank.Values {
		if i != pcrIMA && !bytes.Equal(b.Quoted.Values[i], bank.Values[i]) {
			return false
		}
	}
	return true
}

// ima replays the list and looks its entries up.
func (a *appraisal) ima(bank *Bank) error {
	from := IMAState{PCR: a.boot.Firmware.Values[pcrIMA]}
	w := imaReader{policy: a.Policy, catalogues: a.Catalogues, firmware: a.boot.Firmware}
	if a.Evidence.IMAFrom != 0 {
		if !a.sameRun || a.Evidence.IMAFrom != a.State.IMA.Entries {
			return refusePCR(ReasonIMAPosition, pcrIMA, "the list begins with entry %d", a.Evidence.IMAFrom)
		}
		from = a.State.IMA
		w.facts = a.State.Facts.clone()
		if !w.stillKnown() {
			return refusePCR(ReasonIMAPosition, pcrIMA, "a catalogue was withdrawn: the whole list must be looked up again")
		}
	}
	if a.Catalogues != nil {
		w.facts.Catalogues = slices.Sorted(slices.Values(a.Catalogues.Names()))
	}
	size := IMADigestSize(a.Evidence.IMA, bank.Alg)
	if size == 0 && len(a.Evidence.IMA) > 0 {
		return malformed("IMA list: its first entry has no known form")
	}
	to, _, err := ReplayIMA(a.Evidence.IMA, size, from, bank.Alg, bank.Values[pcrIMA], w.entry)
	if err != nil {
		return err
	}
	if a.sameRun && to.Entries < a.State.IMA.Entries {
		return refusePCR(ReasonIMAPosition, pcrIMA, "%d entries; there were %d", to.Entries, a.State.IMA.Entries)
	}
	w.facts.Entries = to.Entries
	a.next.IMA, a.next.Facts = to, w.facts
	return nil
}

// Covered: every catalogue that entries were looked up in is still there. Where
// one is not, a host must send its whole list again.
func (f *IMAFacts) Covered(by Catalogues) bool {
	if by == nil {
		return len(f.Catalogues) == 0
	}
	names := by.Names()
	return !slices.ContainsFunc(f.Catalogues, func(n string) bool { return !slices.Contains(names, n) })
}

// imaReader sorts the entries of a list.
type imaReader struct {
	policy     *Policy
	catalogues Catalogues
	firmware   *Bank
	facts      IMAFacts
}

func (f *IMAFacts) clone() IMAFacts {
	c := *f
	c.Unknown, c.Violations = slices.Clone(f.Unknown), slices.Clone(f.Violations)
	return c
}

// stillKnown: what was looked up before would be found again. Findings of
// before are looked up anew, because a catalogue may have come since.
func (w *imaReader) stillKnown() bool {
	if !w.facts.Covered(w.catalogues) {
		return false
	}
	if w.catalogues == nil {
		return true
	}
	w.facts.Unknown = slices.DeleteFunc(w.facts.Unknown, func(f Finding) bool {
		text, verity := strings.CutPrefix(f.Digest, "verity:")
		a, d, err := parseDigest(text)
		return err == nil && w.catalogues.Knows(a.String(), d, verity)
	})
	return true
}

func (w *imaReader) entry(e *IMAEntry) error {
	if e.Index == 0 {
		return checkBootAggregate(e, w.firmware)
	}
	if e.Violation {
		w.facts.MoreViolations += add(&w.facts.Violations, Finding{Entry: e.Index, Path: shortPath(e.Path)})
		return nil
	}
	if record := w.policy.PolicyRecord; record.Path != "" && e.Path == record.Path {
		w.facts.PolicyRecord = e.digestText()
		if slices.Contains(record.Digests, w.facts.PolicyRecord) {
			return nil
		}
		// whatever else was there, it is not excused by its name
	}
	if w.catalogues != nil && w.catalogues.Knows(e.Alg, e.Digest, e.Verity) {
		return nil
	}
	w.facts.MoreUnknown += add(&w.facts.Unknown, Finding{Entry: e.Index, Path: shortPath(e.Path), Digest: e.digestText()})
	return nil
}

// maxFindingPath keeps a result small enough to be signed, whatever names a host
// gives its files: a refusal that could not be signed would be none.
const maxFindingPath = 512

func shortPath(path string) string {
	if len(path) > maxFindingPath {
		return strings.ToValidUTF8(path[:maxFindingPath], "") + "…"
	}
	return path
}

// digestText is the form of findings: "sha256:…", or "verity:sha256:…".
func (e *IMAEntry) digestText() string {
	text := e.Alg + ":" + hexText(e.Digest)
	if e.Verity {
		return "verity:" + text
	}
	return text
}

// add appends where there is room, and counts where there is none.
func add(to *[]Finding, f Finding) int {
	if len(*to) < maxFindings {
		*to = append(*to, f)
		return 0
	}
	return 1
}

// boots runs the checks about firmware and boot loaders.
func (a *appraisal) boots() {
	p, b := a.Policy, a.boot
	a.failed[CheckFirmware] = p.firmware(b)
	_, a.failed[CheckBootApps] = bootApplications(p, b)
	a.failed[CheckLoader] = p.loader(b)
	a.failed[CheckUKI] = p.uki(b)
	a.failed[CheckCmdline] = p.commandLines(b)
	s := b.secure
	if s == nil {
		for _, c := range []Check{CheckSecureBoot, CheckUsed, CheckPK, CheckKEK, CheckDB, CheckDBX, CheckDebug} {
			a.failed[c] = b.unsure
		}
		return
	}
	a.failed[CheckSecureBoot] = s.on()
	a.failed[CheckUsed] = s.used(p, b)
	a.failed[CheckPK] = s.entries("PK", p.PK, ReasonPK)
	a.failed[CheckKEK] = s.entries("KEK", p.KEK, ReasonKEK)
	a.failed[CheckDB] = s.entries("db", p.DB, ReasonDB)
	a.failed[CheckDBX] = s.revoked(p.DBX)
	a.failed[CheckDebug] = s.debugOff()
}

// system runs the checks about the TPM and the running system.
func (a *appraisal) system() {
	if !slices.Contains(a.Policy.EKBases, a.Enrolled.Basis) {
		a.failed[CheckEKTrust] = refuse(ReasonEKTrust, "enrolled by %q, which the policy does not accept", a.Enrolled.Basis)
	}
	a.failed[CheckReset] = a.resets()
	f := &a.next.Facts
	if f.Entries == 0 {
		none := refusePCR(ReasonNoEvidence, pcrIMA, "the kernel measured nothing")
		a.failed[CheckIMA], a.failed[CheckViolations], a.failed[CheckPolicy] = none, none, none
		return
	}
	switch {
	case len(f.Unknown)+f.MoreUnknown > 0:
		first := append(slices.Clone(f.Unknown), Finding{Path: "?"})[0]
		a.failed[CheckIMA] = refusePCR(ReasonIMAUnknown, pcrIMA, "%d files are in no catalogue, the first one %.400q (entry %d, %s)",
			len(f.Unknown)+f.MoreUnknown, first.Path, first.Entry, first.Digest)
	case a.Catalogues == nil:
		a.failed[CheckIMA] = refusePCR(ReasonNoEvidence, pcrIMA, "no catalogues were given")
	}
	if len(f.Violations) > 0 {
		a.failed[CheckViolations] = refusePCR(ReasonIMAViolation, pcrIMA, "%d files changed while they were measured; the first one (as the host says): %.200q", len(f.Violations)+f.MoreViolations, f.Violations[0].Path)
	}
	switch r := a.Policy.PolicyRecord; {
	case f.PolicyRecord == "":
		a.failed[CheckPolicy] = refusePCR(ReasonNoEvidence, pcrIMA, "no integrity policy was measured")
	case !slices.Contains(r.Digests, f.PolicyRecord):
		a.failed[CheckPolicy] = refusePCR(ReasonPolicyRecord, pcrIMA, "the policy in force is %s", f.PolicyRecord)
	}
}

// resets compares the TPM's counters with the last round's. Software can
// extend a TPM that was reset into any state that a log describes; what it
// cannot do is to undo the reset.
func (a *appraisal) resets() error {
	if a.State == nil {
		return nil // the first round after enrolment
	}
	was, is := a.State.Clock, a.clock
	switch {
	case is.Firmware != was.Firmware:
		return refuse(ReasonReset, "the TPM's firmware was %#x and is %#x", was.Firmware, is.Firmware)
	case is.Resets < was.Resets:
		return refuse(ReasonReset, "%d TPM resets; there were %d: it was cleared", is.Resets, was.Resets)
	case is.Resets == was.Resets && (is.Milliseconds < was.Milliseconds || is.Restarts < was.Restarts):
		return refuse(ReasonReset, "the TPM's clock ran backwards")
	case is.Resets-was.Resets > 1:
		return refuse(ReasonReset, "%d TPM resets since the last round: a boot was not attested", is.Resets-was.Resets)
	case is.Resets-was.Resets == 1 && !a.Announced:
		return refuse(ReasonReset, "a TPM reset that no reboot was ordered for")
	}
	return nil
}

// Signer signs results: pki's signers do.
type Signer interface {
	Sign(payloadType string, payload []byte) ([]byte, error)
}

// ResultType is the payload type of signed results.
const ResultType = "application/vnd.ringwall.attestation-result+json"

// Sign encloses a result in a signed envelope.
func (r *Result) Sign(s Signer) ([]byte, error) {
	payload, err := r.encode()
	if err != nil {
		return nil, err
	}
	b, err := s.Sign(ResultType, payload)
	if err != nil {
		return nil, fmt.Errorf("sign result of %s: %w", r.Host, err)
	}
	return b, nil
}
