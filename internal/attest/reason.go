package attest

import (
	"errors"
	"fmt"

	"ringwall/internal/errs"
)

// Reason says in one word why evidence was not accepted. The texts are stable:
// alerts and policies name them.
type Reason string

// The reasons of evidence that does not hold together.
const (
	ReasonMalformed        Reason = "malformed"          // bytes that are not what they claim to be
	ReasonTooLarge         Reason = "too-large"          // more than a verifier is willing to look at
	ReasonNonce            Reason = "nonce"              // not the answer to this challenge
	ReasonAttestMagic      Reason = "attest-magic"       // signed, but no quote (or no certification) of a TPM
	ReasonSignature        Reason = "signature"          // not signed by the attestation key
	ReasonAK               Reason = "ak-attributes"      // the attestation key could sign anything
	ReasonAKHierarchy      Reason = "ak-hierarchy"       // it is no primary key of the endorsement hierarchy
	ReasonKey              Reason = "key-attributes"     // a certified key that could leave the TPM
	ReasonEKTemplate       Reason = "ek-template"        // no endorsement key that the TCG knows
	ReasonEKTrust          Reason = "ek-trust"           // nobody vouches for the endorsement key
	ReasonEKPending        Reason = "ek-pending"         // a person must approve this endorsement key
	ReasonEKCertificate    Reason = "ek-certificate"     // the certificate is not one for this key
	ReasonActivation       Reason = "activation"         // the credential was not opened: the keys are not in one TPM
	ReasonPCRSelection     Reason = "pcr-selection"      // other PCRs, or another bank, than asked for
	ReasonPCRDigest        Reason = "pcr-digest"         // the values sent are not those that were quoted
	ReasonPCRReplay        Reason = "pcr-replay"         // the log does not lead to the quoted value
	ReasonIMAReplay        Reason = "ima-replay"         // the IMA list does not lead to the quoted PCR 10
	ReasonIMAPosition      Reason = "ima-position"       // entries are missing between the last round and this one
	ReasonIMABootAggregate Reason = "ima-boot-aggregate" // the IMA list belongs to another boot
	ReasonSilent           Reason = "silent"             // nothing was heard of the host
	ReasonReset            Reason = "reset-count"        // more, or other, TPM resets than boots that we know of
)

// Error is evidence that was refused. It wraps errs.Invalid when the bytes are
// malformed or out of bounds and errs.Untrusted when they are well formed and
// prove nothing.
type Error struct {
	Reason Reason
	PCR    int    // which PCR, or -1
	Detail string // for a person
	kind   error
}

// Error gives the reason, the PCR and the detail.
func (e *Error) Error() string {
	if e.PCR >= 0 {
		return fmt.Sprintf("%s: PCR %d: %s: %v", e.Reason, e.PCR, e.Detail, e.kind)
	}
	return fmt.Sprintf("%s: %s: %v", e.Reason, e.Detail, e.kind)
}

// Unwrap gives the kind.
func (e *Error) Unwrap() error { return e.kind }

// ReasonOf returns the reason of an error of this package, ReasonMalformed for
// any other.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ReasonMalformed
}

func malformed(format string, a ...any) error {
	return &Error{Reason: ReasonMalformed, PCR: -1, Detail: fmt.Sprintf(format, a...), kind: errs.Invalid}
}

func tooLarge(format string, a ...any) error {
	return &Error{Reason: ReasonTooLarge, PCR: -1, Detail: fmt.Sprintf(format, a...), kind: errs.Invalid}
}

func refuse(r Reason, format string, a ...any) error {
	return &Error{Reason: r, PCR: -1, Detail: fmt.Sprintf(format, a...), kind: errs.Untrusted}
}

func refusePCR(r Reason, pcr int, format string, a ...any) error {
	return &Error{Reason: r, PCR: pcr, Detail: fmt.Sprintf(format, a...), kind: errs.Untrusted}
}

// Refuse is a refusal by whoever uses this package, for a reason of its list.
func Refuse(r Reason, detail string) error { return refuse(r, "%s", detail) }
