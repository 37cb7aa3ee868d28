package gate

import "time"

// State is what came of a check.
type State string

// The states. Where a person reads one: pass, sign it; hold, something is
// missing; fail, something is wrong.
const (
	Pass State = "pass"
	Hold State = "hold"
	Fail State = "fail"
)

func (s State) rank() int {
	switch s {
	case Pass:
		return 0
	case Hold:
		return 1
	}
	return 2
}

// Code says why, in a word that stays the same.
type Code string

// The codes.
const (
	CodePassed            Code = "passed"
	CodeNoEvidence        Code = "no-evidence"        // hold
	CodeStale             Code = "stale"              // hold
	CodeNoRevision        Code = "no-revision"        // hold
	CodeTestsFailed       Code = "tests-failed"       // fail
	CodeTooManyWarnings   Code = "too-many-warnings"  // fail
	CodeTooFewTests       Code = "too-few-tests"      // fail
	CodeReviewRejected    Code = "review-rejected"    // fail
	CodeNoAuthor          Code = "no-author"          // hold
	CodeSelfReview        Code = "self-review"        // fail
	CodeTooFewReviewers   Code = "too-few-reviewers"  // hold
	CodeTooManyFindings   Code = "too-many-findings"  // fail
	CodeVulnerable        Code = "vulnerable"         // fail
	CodeDatabaseStale     Code = "database-stale"     // hold
	CodeWrongBuilder      Code = "wrong-builder"      // fail
	CodeWrongSource       Code = "wrong-source"       // fail
	CodeNotVerified       Code = "not-verified"       // hold
	CodeVerdictAgainst    Code = "verdict-against"    // fail
	CodeSurfaceUnreviewed Code = "surface-unreviewed" // hold
	CodeFieldMissing      Code = "field-missing"      // hold
	CodeFieldDiffers      Code = "field-differs"      // fail
	CodeWrongProduct      Code = "wrong-product"      // fail
	CodeRevisionUnknown   Code = "revision-unknown"   // hold
	CodeRevisionConflict  Code = "revision-conflict"  // fail
	CodeEpochBackwards    Code = "epoch-backwards"    // fail
	CodeWrongRing         Code = "wrong-ring"         // fail
	CodeNoBreakglass      Code = "no-breakglass"      // fail
	CodeTooFewApprovals   Code = "too-few-approvals"  // hold
)

// Request is what shall be signed.
type Request struct {
	Product  string
	Version  string
	Epoch    uint32
	Revision string // as the builder says; evidence must agree. Empty: as the evidence says
	Artefact Digest // SHA-256
	Ring     string // the furthest that it may go; empty: the policy's last
	// Signed is the highest epoch of the product that was ever signed; 0: none.
	Signed uint32
}

// Used is a piece of evidence that a check passed by.
type Used struct {
	Evidence Digest    `json:"-"`
	Attester string    `json:"attester"` // the policy's name
	Identity string    `json:"identity"`
	At       time.Time `json:"at"`
}

// Result is one check's outcome.
type Result struct {
	Gate  string `json:"gate"`
	Kind  Kind   `json:"kind,omitempty"` // empty: the release itself
	State State  `json:"state"`
	Code  Code   `json:"code"`
	Text  string `json:"text"`
	Fix   string `json:"fix,omitempty"`
	Used  []Used `json:"used,omitempty"`
}

// Ignored is evidence that no gate asked for, with the reason: nothing is
// dropped without a word.
type Ignored struct {
	Evidence Digest `json:"-"`
	Label    string `json:"evidence"`
	Reason   string `json:"reason"`
}

// Decision is what Evaluate decided. Only State Pass allows signing.
type Decision struct {
	State    State     `json:"state"`
	Results  []Result  `json:"gates"`
	Ignored  []Ignored `json:"ignored"`
	Revision string    `json:"revision"` // that all evidence agrees on
	Ring     string    `json:"ring"`
	// Breakglass: signed past the gates, until NotAfter, for Reason.
	Breakglass bool      `json:"breakglass"`
	NotAfter   time.Time `json:"not_after,omitzero"`
	Reason     string    `json:"reason,omitempty"`
}

func (d *Decision) add(r Result) {
	d.Results = append(d.Results, r)
	if r.State.rank() > d.State.rank() {
		d.State = r.State
	}
}
