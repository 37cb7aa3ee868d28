package rbac

import (
	"fmt"
	"strings"

	"ringwall/internal/errs"
)

// Scope is where an assignment holds: a path in the resource tree, as a
// resource's id has it.
//
//	/
//	/providers/Microsoft.Management/managementGroups/NAME
//	/subscriptions/ID
//	/subscriptions/ID/resourceGroups/NAME
//	/subscriptions/ID/resourceGroups/NAME/providers/NAMESPACE/TYPE/NAME[/TYPE/NAME…]
//
// Scopes are compared segment by segment without regard to case. They are
// ASCII, so that there is one notion of case.
type Scope struct {
	path string // lower case, no slash at the end; "" is the root
	text string // as it was written
}

const (
	maxScope    = 2048 // bytes
	maxSegments = 64
)

// ParseScope reads a scope; the error is errs.Invalid.
func ParseScope(s string) (Scope, error) {
	bad := func(why string) (Scope, error) {
		return Scope{}, fmt.Errorf("scope %.80q: %s: %w", s, why, errs.Invalid)
	}
	switch {
	case len(s) > maxScope:
		return bad("too long")
	case s == "/":
		return Scope{text: s}, nil
	case !strings.HasPrefix(s, "/"):
		return bad("must begin with a slash")
	}
	path := strings.TrimSuffix(s, "/")
	segments := strings.Split(path[1:], "/")
	if len(segments) > maxSegments {
		return bad("too many parts")
	}
	for _, g := range segments {
		switch {
		case g == "":
			return bad("has an empty part")
		case g == "." || g == "..":
			return bad("has a relative part")
		case strings.ContainsFunc(g, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`*?#%<>\`, r) }):
			return bad("has a character that no name may have")
		}
	}
	return Scope{path: strings.ToLower(path), text: path}, nil
}

// String is the scope as it was written.
func (s Scope) String() string { return s.text }

// Equal compares without regard to case.
func (s Scope) Equal(o Scope) bool { return s.path == o.path }

// Contains reports whether o is s or below it. Management groups contain
// subscriptions by membership and not by path; see Request.Above.
func (s Scope) Contains(o Scope) bool {
	return strings.HasPrefix(o.path, s.path) && (len(o.path) == len(s.path) || o.path[len(s.path)] == '/')
}

// MarshalText implements encoding.TextMarshaler.
func (s Scope) MarshalText() ([]byte, error) { return []byte(s.text), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Scope) UnmarshalText(b []byte) (err error) {
	*s, err = ParseScope(string(b))
	return err
}
