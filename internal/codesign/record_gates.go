package codesign

import (
	"fmt"

	"ringwall/internal/errs"
	"ringwall/internal/pki"
)

type wireBreakglass struct {
	Reason string `json:"reason"`
}

// purposeOf is the only purpose that may sign a release with, or without, a
// reason to break glass.
func purposeOf(breakglass string) pki.Purpose {
	if breakglass != "" {
		return pki.PurposeBreakglass
	}
	return pki.PurposeBuild
}

func (p *wirePredicate) gating(info *ReleaseInfo) {
	p.Ring = info.Ring
	if !info.Policy.IsZero() {
		p.Policy = &wireDigest{SHA256: info.Policy.String()}
	}
	if info.Breakglass != "" {
		p.Breakglass = &wireBreakglass{Reason: info.Breakglass}
	}
}

// readGating holds the gating to what belongs together: gates come from a policy, and
// a release past its gates has a ring, an end and whom to ask.
func (p *wirePredicate) readGating(r *Release) error {
	bad := func(what string) error { return fmt.Errorf("statement: %s: %w", what, errs.Invalid) }
	if p.Policy != nil {
		d, err := parseDigest(*p.Policy)
		if err != nil || d.IsZero() {
			return bad("policy is no digest")
		}
		r.Policy = d
	}
	if !printable(p.Ring, 0, 63) {
		return bad("ring is too long or not printable")
	}
	r.Ring = p.Ring
	if p.Breakglass == nil {
		return nil
	}
	switch {
	case !readable(p.Breakglass.Reason, 4000):
		return bad("break-glass without a readable reason")
	case r.Policy.IsZero() || r.Ring == "" || r.NotAfter.IsZero():
		return bad("break-glass without policy, ring or end")
	case len(r.Gates) < 2:
		return bad("break-glass without two approvals")
	}
	r.Breakglass = p.Breakglass.Reason
	return nil
}
