package rbac

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Role is a role definition.
type Role struct {
	ID          string // the GUID at the end of its resource id
	Name        string
	Description string
	Custom      bool
	Permissions []Permission
	// Assignable are the scopes at or below which the role may be assigned.
	Assignable []resource.ID
}

// Permission grants (Actions less NotActions) to manage resources, and
// (DataActions less NotDataActions) to use the data in them. The two never mix:
// an owner of a vault cannot read its secrets. NotActions takes away from this
// permission only; it denies nothing that another grants.
//
// An action is NAMESPACE/TYPE/…/read, write, delete or VERB/action; a star
// stands for any run of characters, slashes included. Case does not matter.
type Permission struct {
	Actions        []string `json:"actions"`
	NotActions     []string `json:"notActions"`
	DataActions    []string `json:"dataActions"`
	NotDataActions []string `json:"notDataActions"`
	// Condition limits the permission. Conditions are not evaluated yet: a
	// permission that has one grants nothing.
	Condition        string `json:"condition,omitempty"`
	ConditionVersion string `json:"conditionVersion,omitempty"`
}

const (
	maxRole     = 1 << 20 // bytes of JSON
	maxPatterns = 8192    // in one permission
	maxAction   = 256     // bytes
)

// ParseRole reads a role definition in one of the two forms that Azure writes:
// that of the REST API, with "properties", and the flat one that its command
// line takes and exports. Keys that do not matter here are ignored, as Azure
// adds some from time to time. The error is errs.Invalid.
func ParseRole(data []byte) (*Role, error) {
	bad := func(format string, a ...any) (*Role, error) {
		return nil, fmt.Errorf("role definition: "+format+": %w", append(a, errs.Invalid)...)
	}
	if len(data) > maxRole {
		return bad("%d bytes (at most %d)", len(data), maxRole)
	}
	var w struct {
		ID         string `json:"id"`
		Name       string `json:"name"` // the GUID in one form, the display name in the other
		Properties *struct {
			RoleName         string        `json:"roleName"`
			Type             string        `json:"type"`
			Description      string        `json:"description"`
			AssignableScopes []resource.ID `json:"assignableScopes"`
			Permissions      []Permission  `json:"permissions"`
		} `json:"properties"`

		RoleName         string        `json:"roleName"`
		RoleType         string        `json:"roleType"`
		IsCustom         *bool         `json:"isCustom"`
		Description      string        `json:"description"`
		AssignableScopes []resource.ID `json:"assignableScopes"`
		Permissions      []Permission  `json:"permissions"`
		Permission
	}
	if err := json.Unmarshal(data, &w); err != nil {
		return bad("%v", err)
	}
	r := &Role{ID: last(w.ID), Description: w.Description, Permissions: w.Permissions, Assignable: w.AssignableScopes, Name: w.Name}
	switch {
	case w.Properties != nil:
		p := w.Properties
		r.Name, r.Description, r.Permissions, r.Assignable = p.RoleName, p.Description, p.Permissions, p.AssignableScopes
		r.Custom = !strings.EqualFold(p.Type, "BuiltInRole")
		if r.ID == "" {
			r.ID = w.Name
		}
	case w.RoleName != "": // as `az role definition list` prints it
		r.Name, r.Custom = w.RoleName, !strings.EqualFold(w.RoleType, "BuiltInRole")
		if r.ID == "" {
			r.ID = w.Name
		}
	default:
		r.Custom = w.IsCustom == nil || *w.IsCustom
		if len(r.Permissions) == 0 {
			r.Permissions = []Permission{w.Permission}
		}
	}
	return r, r.Check()
}

// last is what follows the last slash.
func last(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// Check refuses a role that could not mean what it says; the error is errs.Invalid.
func (r *Role) Check() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("role %.80q: "+format+": %w", append(append([]any{r.Name}, a...), errs.Invalid)...)
	}
	switch {
	case strings.TrimSpace(r.Name) == "":
		return bad("has no name")
	case len(r.Permissions) == 0:
		return bad("has no permissions")
	case r.Custom && len(r.Assignable) == 0:
		return bad("has no assignable scope")
	}
	for i := range r.Permissions {
		p := &r.Permissions[i]
		if n := len(p.Actions) + len(p.NotActions) + len(p.DataActions) + len(p.NotDataActions); n > maxPatterns {
			return bad("%d actions in one permission (at most %d)", n, maxPatterns)
		}
		for _, list := range [][]string{p.Actions, p.NotActions, p.DataActions, p.NotDataActions} {
			for _, a := range list {
				if !validPattern(a) {
					return bad("%.80q is no action", a)
				}
			}
		}
	}
	return nil
}

// AssignableAt reports whether the role may be assigned at a scope. Azure's
// built-in roles say "/", which is everywhere.
func (r *Role) AssignableAt(at resource.ID, above []resource.ID) bool {
	for _, s := range r.Assignable {
		if s.Contains(at) || slices.ContainsFunc(above, s.Equal) {
			return true
		}
	}
	return false
}

func validPattern(a string) bool {
	if a == "" || len(a) > maxAction {
		return false
	}
	return !strings.ContainsFunc(a, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("./*-_$", r)
	})
}

// patterns are compiled actions.
type patterns []pattern

// pattern is an action in lower case, cut at its stars.
type pattern []string

func compile(actions []string) patterns {
	out := make(patterns, len(actions))
	for i, a := range actions {
		out[i] = strings.Split(strings.ToLower(a), "*")
	}
	return out
}

func (ps patterns) match(action string) bool {
	for _, p := range ps {
		if p.match(action) {
			return true
		}
	}
	return false
}

// match takes an action in lower case. Each piece is taken at its first place,
// which finds a match if there is one.
func (p pattern) match(action string) bool {
	if len(p) == 1 {
		return action == p[0]
	}
	first, rest, end := p[0], p[1:len(p)-1], p[len(p)-1]
	if !strings.HasPrefix(action, first) {
		return false
	}
	action = action[len(first):]
	for _, piece := range rest {
		i := strings.Index(action, piece)
		if i < 0 {
			return false
		}
		action = action[i+len(piece):]
	}
	return strings.HasSuffix(action, end)
}
