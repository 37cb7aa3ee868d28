package integrity

import (
	"fmt"

	"ringwall/internal/errs"
)

// Join returns the base policy with the allow rules of its supplements. What
// supplements cannot do: deny, change modes, trust or knobs, give roles, or
// allow what a deny rule of the base refuses. errs.Invalid if a supplement is
// for another policy, holds more than allow rules, or names a rule, authority
// or archive that clashes with or is missing from the base.
func Join(base *Policy, supplements ...*Policy) (*Policy, error) {
	if base.Supplements != "" {
		return nil, fmt.Errorf("join: %s is itself a supplement: %w", base.Name, errs.Invalid)
	}
	out := *base
	out.Allow = append([]AllowRule(nil), base.Allow...)
	names := map[string]bool{}
	for i := range base.Allow {
		names[base.Allow[i].Rule] = true
	}
	for i := range base.Deny {
		names[base.Deny[i].Rule] = true
	}
	for _, s := range supplements {
		if err := joinable(base, s); err != nil {
			return nil, fmt.Errorf("join supplement %s to policy %s: %w", s.Name, base.Name, err)
		}
		for i := range s.Allow {
			r := s.Allow[i]
			if names[r.Rule] {
				return nil, fmt.Errorf("join supplement %s to policy %s: rule %s exists already: %w", s.Name, base.Name, r.Rule, errs.Invalid)
			}
			names[r.Rule] = true
			if err := out.Trust.knows(&r); err != nil {
				return nil, fmt.Errorf("join supplement %s to policy %s: rule %s: %w", s.Name, base.Name, r.Rule, err)
			}
			r.Supplement = s.Name
			out.Allow = append(out.Allow, r)
		}
	}
	out.Prepare()
	return &out, nil
}

func joinable(base, s *Policy) error {
	if s.Supplements != base.Name || s.Name == "" {
		return fmt.Errorf("it supplements %q: %w", s.Supplements, errs.Invalid)
	}
	if len(s.Deny)+len(s.Programs)+len(s.Interpreters)+len(s.Knobs) > 0 || s.Modes != [8]Mode{} || s.Process != (ProcessRules{}) ||
		len(s.Trust.Authorities)+len(s.Trust.Timestamps)+len(s.Trust.Archives) > 0 {
		return fmt.Errorf("it holds more than allow rules and exceptions: %w", errs.Invalid)
	}
	return nil
}

// knows checks that the authority or archive of a rule is one of t.
func (t *Trust) knows(r *AllowRule) error {
	if r.Signer != nil {
		for i := range t.Authorities {
			if t.Authorities[i].Name == r.Signer.Authority {
				return nil
			}
		}
		return fmt.Errorf("authority %q is not one that the policy trusts: %w", r.Signer.Authority, errs.Invalid)
	}
	if r.Package != nil {
		for i := range t.Archives {
			if t.Archives[i].Name == r.Package.Archive {
				return nil
			}
		}
		return fmt.Errorf("archive %q is not one that the policy trusts: %w", r.Package.Archive, errs.Invalid)
	}
	return nil
}
