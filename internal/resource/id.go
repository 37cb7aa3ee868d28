package resource

import (
	"fmt"
	"strings"

	"ringwall/internal/errs"
)

// ID is a place in the tree: of a resource, of a group of them, or a scope.
//
//	/
//	/providers/Microsoft.Management/managementGroups/NAME
//	/subscriptions/ID
//	/subscriptions/ID/resourceGroups/NAME
//	SCOPE/providers/NAMESPACE/TYPE/NAME[/TYPE/NAME…]
//
// IDs are compared segment by segment without regard to case, as Azure does.
// They are ASCII, so that there is one notion of case. The zero value is the
// root.
type ID struct {
	path string // lower case, no slash at the end; "" is the root
	text string // as it was written
}

const (
	maxID       = 2048 // bytes
	maxSegments = 64
)

// ParseID reads an id; the error is errs.Invalid.
func ParseID(s string) (ID, error) {
	bad := func(why string) (ID, error) {
		return ID{}, fmt.Errorf("id %.80q: %s: %w", s, why, errs.Invalid)
	}
	switch {
	case len(s) > maxID:
		return bad("too long")
	case s == "/":
		return ID{}, nil
	case !strings.HasPrefix(s, "/"):
		return bad("must begin with a slash")
	}
	text := strings.TrimSuffix(s, "/")
	segments := strings.Split(text[1:], "/")
	if len(segments) > maxSegments {
		return bad("too many parts")
	}
	for _, g := range segments {
		switch {
		case g == "":
			return bad("has an empty part")
		case g == "." || g == "..":
			return bad("has a relative part")
		case strings.ContainsFunc(g, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`*?#%&<>"\`, r) }):
			return bad("has a character that no name may have")
		}
	}
	id := ID{path: strings.ToLower(text), text: text}
	if !id.wellFormed() {
		return bad("is neither a subscription, a resource group, nor a resource of a provider")
	}
	return id, nil
}

// wellFormed checks the order of the parts.
func (id ID) wellFormed() bool {
	s := id.segments()
	if len(s) >= 2 && s[0] == "subscriptions" {
		if s = s[2:]; len(s) >= 2 && s[0] == "resourcegroups" {
			s = s[2:]
		}
	}
	for len(s) > 0 {
		// providers NAMESPACE TYPE NAME TYPE NAME … and, of an extension, again
		if s[0] != "providers" || len(s) < 4 {
			return false
		}
		s = s[4:]
		for len(s) > 0 && s[0] != "providers" {
			if len(s) < 2 {
				return false
			}
			s = s[2:]
		}
	}
	return true
}

func (id ID) segments() []string {
	if id.path == "" {
		return nil
	}
	return strings.Split(id.path[1:], "/")
}

// String is the id as it was written; "/" for the root.
func (id ID) String() string {
	if id.path == "" {
		return "/"
	}
	return id.text
}

// Key is the id in the form that it is compared and stored by.
func (id ID) Key() string { return id.path }

// Equal compares without regard to case.
func (id ID) Equal(o ID) bool { return id.path == o.path }

// Contains reports whether o is id or below it. Management groups contain
// subscriptions by membership and not by path.
func (id ID) Contains(o ID) bool {
	return strings.HasPrefix(o.path, id.path) && (len(o.path) == len(id.path) || o.path[len(id.path)] == '/')
}

// Name is the last part, as it was written.
func (id ID) Name() string { return id.text[strings.LastIndexByte(id.text, '/')+1:] }

// Type is what the id is about, in lower case, such as
// "microsoft.keyvault/vaults/secrets"; groups of resources have Azure's names
// for them. "" for the root.
func (id ID) Type() string {
	s := id.segments()
	last := -1
	for i, g := range s {
		// a name may be "providers" too: it stands at an odd place
		if g == "providers" && i%2 == 0 {
			last = i
		}
	}
	switch {
	case last < 0 && len(s) == 2:
		return "microsoft.resources/subscriptions"
	case last < 0 && len(s) == 4:
		return "microsoft.resources/subscriptions/resourcegroups"
	case last < 0:
		return ""
	}
	t := []string{s[last+1]}
	for i := last + 2; i < len(s); i += 2 {
		t = append(t, s[i])
	}
	return strings.Join(t, "/")
}

// Parent is what the id stands below: the resource that holds it, its scope for
// a resource of a provider, the root for a subscription and for the root.
func (id ID) Parent() ID {
	s := id.segments()
	drop := 2
	if n := len(s); n >= 4 && s[n-4] == "providers" && (n-4)%2 == 0 {
		drop = 4
	}
	if len(s) <= drop {
		return ID{}
	}
	cut := 0
	for range len(s) - drop {
		cut += 1 + strings.IndexByte(id.path[cut+1:]+"/", '/')
	}
	return ID{path: id.path[:cut], text: id.text[:cut]}
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseID(string(b))
	return err
}
