package pki

import (
	"encoding/asn1"
	"fmt"
	"time"

	"ringwall/internal/errs"
)

// Ringwall's object identifiers.
//
// The arc is made from a random UUID, 725d0660-cb43-4fab-ba15-78d54812d1be, by
// the published scheme for arcs without a registration: the prefix
// 1.2.840.113556.1.8000.2554 followed by the UUID in five chunks of 16 bits
// and two of 24. The older scheme, 2.25.<the UUID as one number>, cannot be
// used: crypto/x509 (and with it cosign and sigstore-go) refuses a certificate
// whose extended key usage has a component above 31 bits.
//
//	arc.1.1  extended key usage: signs release records ("build")
//	arc.1.2  extended key usage: signs integrity policies
//	arc.1.3  extended key usage: signs break-glass permits
//	arc.1.4  extended key usage: signs evidence of gates ("attest")
//	arc.1.5  extended key usage: signs release records past the gates ("breakglass")
//	arc.1.6  extended key usage: signs results of host attestation ("appraisal")
//	arc.2.1  policy of timestamps made by the built-in TSA
func arc(tail ...int) asn1.ObjectIdentifier {
	base := asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 29277, 1632, 52035, 20395, 47637, 7918920, 1233342}
	return append(base, tail...)
}

// Purpose is what a certificate may sign. Each purpose has its own issuing CA
// and its own extended key usage, so that the key that signs builds all day
// can never sign a policy.
type Purpose uint8

// The purposes.
const (
	PurposeBuild      Purpose = 1 // release records
	PurposePolicy     Purpose = 2 // integrity policies
	PurposePermit     Purpose = 3 // break-glass permits
	PurposeAttest     Purpose = 4 // in-toto statements that are evidence of gates
	PurposeBreakglass Purpose = 5 // release records of builds that did not pass their gates
	PurposeAppraisal  Purpose = 6 // results of host attestation
)

// Purposes lists every purpose.
func Purposes() []Purpose {
	return []Purpose{PurposeBuild, PurposePolicy, PurposePermit, PurposeAttest, PurposeBreakglass, PurposeAppraisal}
}

// String returns the purpose's name, which is also the stem of its CA's file
// names.
func (p Purpose) String() string {
	switch p {
	case PurposeBuild:
		return "build"
	case PurposePolicy:
		return "policy"
	case PurposePermit:
		return "permit"
	case PurposeAttest:
		return "attest"
	case PurposeBreakglass:
		return "breakglass"
	case PurposeAppraisal:
		return "appraisal"
	}
	return fmt.Sprintf("purpose(%d)", uint8(p))
}

// OID returns the purpose's extended key usage.
func (p Purpose) OID() asn1.ObjectIdentifier { return arc(1, int(p)) }

// maxPayload bounds what one signature of this purpose may cover.
func (p Purpose) maxPayload() int {
	switch p {
	case PurposePolicy:
		return 4 << 20
	case PurposePermit:
		return 4 << 10
	case PurposeAttest, PurposeAppraisal:
		return 1 << 20
	}
	return 64 << 10
}

// MaxLifetime is how long a leaf of this purpose may be valid at most.
func (p Purpose) MaxLifetime() time.Duration {
	if p == PurposeBreakglass {
		return maxBreakglassLifetime
	}
	return MaxLeafLifetime
}

// logged says whether what is signed for this purpose must be in the log of an
// authority that has one: what makes hosts run something. A permit must work
// while the log does not, and evidence only counts towards something logged.
func (p Purpose) logged() bool {
	return p == PurposeBuild || p == PurposePolicy || p == PurposeBreakglass
}

func (p Purpose) check() error {
	if p < PurposeBuild || p > PurposeAppraisal {
		return fmt.Errorf("%v: %w", p, errs.Invalid)
	}
	return nil
}
