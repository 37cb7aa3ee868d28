package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

// Types of the documents that say who may do what; Azure's.
const (
	TypeSubscription   = "Microsoft.Resources/subscriptions"
	TypeGroup          = "Microsoft.Resources/subscriptions/resourceGroups"
	TypeRoleDefinition = "Microsoft.Authorization/roleDefinitions"
	TypeRoleAssignment = "Microsoft.Authorization/roleAssignments"
	TypeDenyAssignment = "Microsoft.Authorization/denyAssignments"

	kindRoleDefinition = "microsoft.authorization/roledefinitions"
	kindRoleAssignment = "microsoft.authorization/roleassignments"
	kindDenyAssignment = "microsoft.authorization/denyassignments"
)

// Properties of Azure's documents, as far as they count here.
const (
	schemaPermission = `{"type":"object","properties":{"actions":{"type":"array","items":{"type":"string"}},"notActions":{"type":"array","items":{"type":"string"}},` +
		`"dataActions":{"type":"array","items":{"type":"string"}},"notDataActions":{"type":"array","items":{"type":"string"}},"condition":{"type":"string"}}}`
	schemaRole = `{"type":"object","required":["roleName","permissions","assignableScopes"],"properties":{"roleName":{"type":"string"},"type":{"const":"CustomRole"},` +
		`"description":{"type":"string"},"assignableScopes":{"type":"array","items":{"type":"string"}},"permissions":{"type":"array","items":` + schemaPermission + `}}}`
	schemaAssignment = `{"type":"object","required":["roleDefinitionId","principalId"],"properties":{"roleDefinitionId":{"type":"string"},"principalId":{"type":"string"},"condition":{"type":"string"}}}`
	schemaPrincipals = `{"type":"array","items":{"type":"object","required":["id"],"properties":{"id":{"type":"string"}}}}`
	schemaDeny       = `{"type":"object","required":["permissions","principals"],"properties":{"denyAssignmentName":{"type":"string"},"permissions":{"type":"array","items":` + schemaPermission + `},` +
		`"principals":` + schemaPrincipals + `,"excludePrincipals":` + schemaPrincipals + `,"doNotApplyToChildScopes":{"type":"boolean"}}}`
)

func ownKinds() []Kind {
	return append(identityKinds(), []Kind{
		{Type: TypeSubscription, About: "What holds resource groups."},
		{Type: TypeGroup, About: "What holds resources."},
		{Type: TypeRoleDefinition, Check: checkRole, About: "A role: a set of actions.", Schema: json.RawMessage(schemaRole)},
		{Type: TypeRoleAssignment, Check: checkAssignment, About: "Gives a role to a principal at a scope and below it.", Schema: json.RawMessage(schemaAssignment)},
		{Type: TypeDenyAssignment, Check: checkDeny, About: "Takes actions away at a scope, whatever roles grant.", Schema: json.RawMessage(schemaDeny)},
		groupKind(),
		tokenKind(),
	}...)
}

// decision is rbac's, with the error that a refusal is.
type decision struct {
	rbac.Decision
	err error
}

// can answers with the roles that the transaction sees.
func (d *Door) can(ctx context.Context, tx Tx, by Actor, action string, on resource.ID) (decision, error) {
	if by.engine != nil {
		if by.engineMay(action) {
			return decision{Decision: rbac.Decision{Allowed: true, Reason: "the server itself"}}, nil
		}
		return decision{err: fmt.Errorf("%s may not %s: it is not in what this part of the server does: %w", by.Name, action, errs.Denied)}, nil
	}
	access, err := d.roles.at(ctx, tx)
	if err != nil {
		return decision{}, fmt.Errorf("read who may do what: %w", err)
	}
	out := decision{Decision: access.Can(&rbac.Request{Principal: by.ID, Groups: access.groups.of(by), Action: action, Scope: on})}
	if !out.Allowed {
		out.err = fmt.Errorf("%s may not %s on %s: %s: %w", by.Name, action, on, out.Reason, errs.Denied)
	}
	return out, nil
}

// roleCache keeps the roles as of a revision, and reads them again when one of
// the changes since then was about roles.
type roleCache struct {
	mu       sync.Mutex
	access   *access
	revision uint64
}

// access is who may do what, and who is in which group.
type access struct {
	*rbac.Access
	groups membership
}

func (c *roleCache) at(ctx context.Context, tx Tx) (*access, error) {
	now, err := tx.Revision(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.access != nil && now == c.revision {
		return c.access, nil
	}
	if c.access != nil && now > c.revision {
		same, err := c.untouched(ctx, tx)
		if err != nil {
			return nil, err
		}
		if same {
			c.revision = now
			return c.access, nil
		}
	}
	access, err := readRoles(ctx, tx)
	if err != nil {
		return nil, err
	}
	if c.access == nil || now > c.revision { // a transaction that sees an older state keeps its own
		c.access, c.revision = access, now
	}
	return access, nil
}

// untouched reports whether no change since the cached revision was about roles.
func (c *roleCache) untouched(ctx context.Context, tx Tx) (bool, error) {
	const many = 200
	changes, err := tx.Changes(ctx, c.revision, many)
	if errors.Is(err, errs.NotFound) || len(changes) == many {
		return false, nil
	}
	for i := range changes {
		switch changes[i].Document.ID.Type() {
		case kindRoleDefinition, kindRoleAssignment, kindDenyAssignment, kindGroup:
			return false, err
		}
	}
	return err == nil, err
}

func readRoles(ctx context.Context, tx Tx) (*access, error) {
	roles, err := definedRoles(ctx, tx)
	groups, errGroups := readGroups(ctx, tx)
	var assignments []rbac.Assignment
	var denies []rbac.Deny
	err = errors.Join(err, errGroups,
		each(ctx, tx, kindRoleAssignment, func(d *resource.Document) error {
			a, err := assignmentOf(d)
			assignments = append(assignments, a)
			return err
		}),
		each(ctx, tx, kindDenyAssignment, func(d *resource.Document) error {
			x, err := denyOf(d)
			x.Except = append(x.Except, BreakGlass)
			denies = append(denies, x)
			return err
		}),
	)
	if err != nil {
		return nil, err
	}
	assignments = append(usable(roles, assignments), rbac.Assignment{ID: "break-glass", Role: rbac.Owner, Principal: BreakGlass})
	all, err := rbac.New(roles, assignments, denies, nil)
	return &access{all, groups}, err
}

// definedRoles are the built-in roles and those that people made.
func definedRoles(ctx context.Context, tx Tx) ([]*rbac.Role, error) {
	roles := rbac.BuiltIn()
	err := each(ctx, tx, kindRoleDefinition, func(d *resource.Document) error {
		r, err := roleOf(d)
		roles = append(roles, r)
		return err
	})
	return roles, err
}

// BreakGlass is the object id of the local administrator, who is made at the
// first start and owns everything, whatever is denied: no change of roles can
// lock everybody out.
const BreakGlass = "ringwall-break-glass"

// reserved reports whether an object id is one of the server's own, which no
// document gives to anybody.
func reserved(id string) bool {
	const prefix = "ringwall-"
	return len(id) >= len(prefix) && strings.EqualFold(id[:len(prefix)], prefix)
}

// usable leaves out assignments of roles that are gone or were narrowed since:
// they grant nothing.
func usable(roles []*rbac.Role, as []rbac.Assignment) []rbac.Assignment {
	byID := map[string]*rbac.Role{}
	for _, r := range roles {
		byID[strings.ToLower(r.ID)] = r
	}
	return slices.DeleteFunc(as, func(a rbac.Assignment) bool {
		r := byID[strings.ToLower(a.Role)]
		return r == nil || !r.AssignableAt(a.Scope, nil)
	})
}

// each visits every document of a type.
func each(ctx context.Context, tx Tx, kind string, visit func(*resource.Document) error) error {
	q := resource.Query{Type: kind, Limit: resource.MaxPage}
	for {
		page, err := tx.List(ctx, q)
		if err != nil {
			return err
		}
		for i := range page {
			if err := visit(&page[i]); err != nil {
				return fmt.Errorf("%s: %w", page[i].ID, err)
			}
		}
		if len(page) < q.Limit {
			return nil
		}
		q.After = page[len(page)-1].ID.Key()
	}
}

// properties reads a document's properties into v.
func properties(d *resource.Document, v any) error {
	err := json.Unmarshal(d.Properties, v)
	if err == nil || errors.Is(err, errs.Invalid) {
		return err
	}
	return fmt.Errorf("properties: %w: %w", err, errs.Invalid)
}

func roleOf(d *resource.Document) (*rbac.Role, error) {
	envelope, err := json.Marshal(map[string]any{"id": d.ID, "name": d.ID.Name(), "properties": d.Properties})
	if err != nil {
		return nil, fmt.Errorf("properties: %w: %w", err, errs.Invalid)
	}
	r, err := rbac.ParseRole(envelope)
	if err == nil && !r.Custom {
		err = fmt.Errorf("only Ringwall itself has built-in roles; type must be CustomRole: %w", errs.Invalid)
	}
	return r, err
}

func assignmentOf(d *resource.Document) (rbac.Assignment, error) {
	var p struct {
		Role      resource.ID `json:"roleDefinitionId"`
		Principal string      `json:"principalId"`
		Condition string      `json:"condition"`
	}
	if err := properties(d, &p); err != nil {
		return rbac.Assignment{}, err
	}
	return rbac.Assignment{ID: d.ID.String(), Scope: d.ID.Parent(), Role: p.Role.Name(), Principal: p.Principal, Condition: p.Condition}, nil
}

func denyOf(d *resource.Document) (rbac.Deny, error) {
	type principal struct {
		ID string `json:"id"`
	}
	var p struct {
		Name        string            `json:"denyAssignmentName"`
		Permissions []rbac.Permission `json:"permissions"`
		Principals  []principal       `json:"principals"`
		Except      []principal       `json:"excludePrincipals"`
		ThisScope   bool              `json:"doNotApplyToChildScopes"`
	}
	if err := properties(d, &p); err != nil {
		return rbac.Deny{}, err
	}
	ids := func(ps []principal) (out []string) {
		for _, x := range ps {
			out = append(out, x.ID)
		}
		return out
	}
	return rbac.Deny{
		ID: d.ID.String(), Name: p.Name, Scope: d.ID.Parent(), Permissions: p.Permissions,
		Principals: ids(p.Principals), Except: ids(p.Except), ThisScope: p.ThisScope,
	}, nil
}

func checkRole(_ context.Context, _ Tx, _, d *resource.Document) error {
	r, err := roleOf(d)
	if err != nil {
		return err
	}
	for _, b := range rbac.BuiltIn() {
		if b.ID == r.ID {
			return fmt.Errorf("%s is the id of the built-in role %s: %w", r.ID, b.Name, errs.Conflict)
		}
	}
	return nil
}

// checkAssignment makes sure that the role exists and may be assigned there: a
// stored assignment that could not be read would lock everybody out.
func checkAssignment(ctx context.Context, tx Tx, _, d *resource.Document) error {
	a, err := assignmentOf(d)
	if err != nil {
		return err
	}
	roles, err := definedRoles(ctx, tx)
	if err != nil {
		return err
	}
	_, err = rbac.New(roles, []rbac.Assignment{a}, nil, nil)
	return err
}

func checkDeny(_ context.Context, _ Tx, _, d *resource.Document) error {
	x, err := denyOf(d)
	if err != nil {
		return err
	}
	_, err = rbac.New(nil, nil, []rbac.Deny{x}, nil)
	return err
}
