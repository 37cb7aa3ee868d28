package rbac

import (
	"fmt"
	"slices"
	"strings"

	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// Everyone is the principal of a deny assignment that means all of them.
const Everyone = "00000000-0000-0000-0000-000000000000"

// Assignment gives a role to a principal at a scope and below it.
type Assignment struct {
	ID        string
	Scope     resource.ID
	Role      string // id of the role
	Principal string // object id of a user, a group or a service
	Condition string // conditions are not evaluated yet: with one it grants nothing
}

// Deny takes actions away at a scope, whatever roles grant. It is how a host is
// put into quarantine.
type Deny struct {
	ID          string
	Name        string
	Scope       resource.ID
	Permissions []Permission
	Principals  []string // object ids; Everyone for all
	Except      []string // object ids that it does not apply to
	ThisScope   bool     // not below it (doNotApplyToChildScopes)
}

// Request is a question.
type Request struct {
	Principal string   // object id
	Groups    []string // object ids of all its groups, nested ones included
	Action    string
	Data      bool // a data action
	Scope     resource.ID
	// Above are the management groups that hold the scope's subscription, all
	// the way up: paths do not tell.
	Above []resource.ID
}

// Decision is the answer and what it rests on.
type Decision struct {
	Allowed    bool   `json:"allowed"`
	Reason     string `json:"reason"`
	Role       string `json:"role,omitempty"`       // id of the role that allows
	Assignment string `json:"assignment,omitempty"` // id of the assignment that allows
	Deny       string `json:"deny,omitempty"`       // id of the deny assignment
	// Through is the object id that the assignment names: the asker's own, or of a group.
	Through string `json:"through,omitempty"`
}

// Access answers questions about one set of roles and assignments. It is not
// changed after New, and may be used by several goroutines.
type Access struct {
	byPrincipal map[string][]granted
	denies      []denied
}

type granted struct {
	*Assignment
	role        *Role
	permissions []compiled
}

type denied struct {
	*Deny
	permissions        []compiled
	principals, except map[string]bool
}

type compiled struct {
	actions, notActions, dataActions, notDataActions patterns
}

// New prepares roles and assignments for questions. An assignment of a role
// that is not there or not assignable at its scope is an error (errs.Invalid):
// whoever stores them checks that first. above tells the management groups
// above a scope; nil if there are none.
func New(roles []*Role, assignments []Assignment, denies []Deny, above func(resource.ID) []resource.ID) (*Access, error) {
	type prepared struct {
		role        *Role
		permissions []compiled
	}
	byID := make(map[string]prepared, len(roles))
	for _, r := range roles {
		if err := r.Check(); err != nil {
			return nil, err
		}
		id := strings.ToLower(r.ID)
		if _, twice := byID[id]; twice || id == "" {
			return nil, fmt.Errorf("role %q: id %q is missing or there twice: %w", r.Name, r.ID, errs.Invalid)
		}
		byID[id] = prepared{r, compilePermissions(r.Permissions, false)}
	}
	a := &Access{byPrincipal: make(map[string][]granted, len(assignments))}
	for i := range assignments {
		x := &assignments[i]
		p, ok := byID[strings.ToLower(x.Role)]
		if !ok {
			return nil, fmt.Errorf("assignment %s: role %q does not exist: %w", x.ID, x.Role, errs.Invalid)
		}
		var up []resource.ID
		if above != nil {
			up = above(x.Scope)
		}
		if !p.role.AssignableAt(x.Scope, up) {
			return nil, fmt.Errorf("assignment %s: role %q is not assignable at %s: %w", x.ID, p.role.Name, x.Scope, errs.Invalid)
		}
		if x.Principal == "" || x.Principal == Everyone {
			return nil, fmt.Errorf("assignment %s: a role is given to somebody, not to everyone: %w", x.ID, errs.Invalid)
		}
		who := strings.ToLower(x.Principal)
		a.byPrincipal[who] = append(a.byPrincipal[who], granted{x, p.role, p.permissions})
	}
	for i := range denies {
		d := &denies[i]
		if len(d.Principals) == 0 {
			return nil, fmt.Errorf("deny assignment %s denies nobody: %w", d.ID, errs.Invalid)
		}
		a.denies = append(a.denies, denied{d, compilePermissions(d.Permissions, true), set(d.Principals), set(d.Except)})
	}
	return a, nil
}

func set(ids []string) map[string]bool {
	m := make(map[string]bool, len(ids))
	for _, id := range ids {
		m[strings.ToLower(id)] = true
	}
	return m
}

// compilePermissions leaves out what has a condition: it grants nothing. What
// denies does so whatever its condition is.
func compilePermissions(ps []Permission, deny bool) []compiled {
	out := make([]compiled, 0, len(ps))
	for i := range ps {
		p := &ps[i]
		if p.Condition != "" && !deny {
			continue
		}
		out = append(out, compiled{compile(p.Actions), compile(p.NotActions), compile(p.DataActions), compile(p.NotDataActions)})
	}
	return out
}

func matches(ps []compiled, action string, data bool) bool {
	for i := range ps {
		p := &ps[i]
		yes, no := p.actions, p.notActions
		if data {
			yes, no = p.dataActions, p.notDataActions
		}
		if yes.match(action) && !no.match(action) {
			return true
		}
	}
	return false
}

// holds reports whether something at a scope holds for the request's.
func holds(at resource.ID, r *Request) bool {
	return at.Contains(r.Scope) || slices.ContainsFunc(r.Above, at.Equal)
}

// Can answers a request. An action that is none, such as one with a star, is
// not allowed.
func (a *Access) Can(r *Request) Decision {
	action := strings.ToLower(r.Action)
	if !validPattern(action) || strings.Contains(action, "*") {
		return Decision{Reason: "this is no action"}
	}
	if r.Principal == "" {
		return Decision{Reason: "nobody asks"}
	}
	who := make([]string, 0, 1+len(r.Groups))
	for _, id := range append([]string{r.Principal}, r.Groups...) {
		who = append(who, strings.ToLower(id))
	}
	for i := range a.denies {
		if d := &a.denies[i]; d.applies(r, who) && matches(d.permissions, action, r.Data) {
			return Decision{Reason: "denied by " + d.Name, Deny: d.ID}
		}
	}
	conditional := false
	for _, id := range who {
		for i := range a.byPrincipal[id] {
			g := &a.byPrincipal[id][i]
			if !holds(g.Scope, r) || !matches(g.permissions, action, r.Data) {
				continue
			}
			if g.Condition != "" {
				conditional = true
				continue
			}
			return Decision{Allowed: true, Reason: "role " + g.role.Name + " at " + g.Scope.String(), Role: g.role.ID, Assignment: g.Assignment.ID, Through: g.Principal}
		}
	}
	if conditional {
		return Decision{Reason: "only an assignment with a condition allows it, and conditions are not evaluated"}
	}
	return Decision{Reason: "no role allows it"}
}

func (d *denied) applies(r *Request, who []string) bool {
	if d.ThisScope && !d.Scope.Equal(r.Scope) || !d.ThisScope && !holds(d.Scope, r) {
		return false
	}
	if slices.ContainsFunc(who, func(id string) bool { return d.except[id] }) {
		return false
	}
	return d.principals[Everyone] || slices.ContainsFunc(who, func(id string) bool { return d.principals[id] })
}
