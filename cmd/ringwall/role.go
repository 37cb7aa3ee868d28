package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/rbac"
	"ringwall/internal/resource"
)

func newRoleCommand(e *env) *cobra.Command {
	return newGroup("role", groupFleet, "Say who may do what",
		`A role is a set of actions, and is given to a person, a service or a group at a
place in the tree, where it holds for everything below. Whoever has no role may
nothing. Roles and their rules are Azure's: see docs/ops/sign-on.md.

  ringwall role list
  ringwall role assign release-manager --to group:releases --scope /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590
  ringwall can user:ana Ringwall.Fleet/rollouts/write /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590`,
		newRoleListCommand(e), newRoleShowCommand(e), newRoleAssignCommand(e), newRoleUnassignCommand(e), newRoleAssignmentsCommand(e))
}

// shortName is a role's name for the command line.
func shortName(r *rbac.Role) string { return strings.ReplaceAll(strings.ToLower(r.Name), " ", "-") }

// allRoles are the built-in roles and those that the server's people made.
func allRoles(ctx context.Context, e *env) ([]*rbac.Role, error) {
	roles := rbac.BuiltIn()
	client, err := connect(e)
	if err != nil {
		return nil, err
	}
	err = client.List(ctx, "/providers/"+control.TypeRoleDefinition, func(raw json.RawMessage) error {
		r, err := rbac.ParseRole(raw)
		if err != nil {
			return fmt.Errorf("the server's answer: %w", err)
		}
		roles = append(roles, r)
		return nil
	})
	return roles, err
}

func findRole(roles []*rbac.Role, name string) (*rbac.Role, error) {
	var found []*rbac.Role
	for _, r := range roles {
		if strings.EqualFold(r.ID, name) || strings.EqualFold(r.Name, name) || strings.EqualFold(shortName(r), name) {
			found = append(found, r)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, hint(fmt.Errorf("no role %.80q: %w", name, errs.NotFound), "ringwall role list")
	}
	return nil, fmt.Errorf("%d roles are called %.80q; use the id: %w", len(found), name, errs.Invalid)
}

type roleOut struct {
	ID          string            `json:"id"`
	Name        string            `json:"name"`
	Description string            `json:"description"`
	Custom      bool              `json:"custom"`
	Permissions []rbac.Permission `json:"permissions"`
}

func roleOutOf(r *rbac.Role) roleOut {
	return roleOut{r.ID, r.Name, r.Description, r.Custom, r.Permissions}
}

func newRoleListCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List roles",
		Long:    "Lists the built-in roles and those that were made here.\n\nJSON: {\"roles\": [{\"id\", \"name\", \"description\", \"custom\", \"permissions\"}]}",
		Example: "  ringwall role list",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			roles, err := allRoles(c.Context(), e)
			if err != nil {
				return err
			}
			out := struct {
				Roles []roleOut `json:"roles"`
			}{Roles: []roleOut{}}
			for _, r := range roles {
				out.Roles = append(out.Roles, roleOutOf(r))
			}
			return e.emit(out, func(w io.Writer) {
				for _, r := range roles {
					fmt.Fprintf(w, "%-28s %s\n", shown(shortName(r)), printable(r.Description))
				}
			})
		},
	}
}

func newRoleShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show ROLE",
		Short:   "Show what a role allows",
		Long:    "Shows a role's actions, by its name or id.\n\nJSON: {\"id\", \"name\", \"description\", \"custom\", \"permissions\"}",
		Example: "  ringwall role show on-call-engineer",
		Args:    exactly("ROLE"),
		RunE: func(c *cobra.Command, args []string) error {
			roles, err := allRoles(c.Context(), e)
			if err != nil {
				return err
			}
			r, err := findRole(roles, args[0])
			if err != nil {
				return err
			}
			return e.emit(roleOutOf(r), func(w io.Writer) {
				fmt.Fprintf(w, "%s (%s)\n%s\n", shown(r.Name), r.ID, printable(r.Description))
				for _, p := range r.Permissions {
					for _, list := range []struct {
						word    string
						actions []string
					}{{"may", p.Actions}, {"not", p.NotActions}, {"data", p.DataActions}, {"not data", p.NotDataActions}} {
						for _, a := range list.actions {
							fmt.Fprintf(w, "  %-8s %s\n", list.word, shown(a))
						}
					}
				}
			})
		},
	}
}

// assignmentID is where the assignment of a role to somebody at a scope is. It
// is the same each time, so that assigning twice assigns once; its name has the
// form of a GUID, as Azure's tools want.
func assignmentID(scope resource.ID, role *rbac.Role, principal string) (resource.ID, error) {
	sum := sha256.Sum256([]byte(scope.Key() + "\n" + strings.ToLower(role.ID) + "\n" + strings.ToLower(principal)))
	name := fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
	return resource.ParseID(below(scope.String(), control.TypeRoleAssignment) + "/" + name)
}

// assignmentArgs are what assign and unassign take.
type assignmentArgs struct{ to, scope string }

func (a *assignmentArgs) flags(c *cobra.Command, who string) {
	c.Flags().StringVar(&a.to, who, "", "`WHO`: user:NAME, group:NAME, service:NAME, host:ID or an object id")
	c.Flags().StringVar(&a.scope, "scope", "/", "`ID` of the place in the tree; / is everything")
	require(c, who)
}

func (a *assignmentArgs) resolve(ctx context.Context, e *env, name string) (id resource.ID, role *rbac.Role, principal string, err error) {
	if principal, err = principalOf(a.to); err != nil {
		return id, nil, "", err
	}
	scope, err := resource.ParseID(a.scope)
	if err != nil {
		return id, nil, "", err
	}
	roles, err := allRoles(ctx, e)
	if err != nil {
		return id, nil, "", err
	}
	if role, err = findRole(roles, name); err != nil {
		return id, nil, "", err
	}
	id, err = assignmentID(scope, role, principal)
	return id, role, principal, err
}

func newRoleAssignCommand(e *env) *cobra.Command {
	var a assignmentArgs
	c := &cobra.Command{
		Use:   "assign ROLE --to WHO",
		Short: "Give a role to somebody",
		Long: `Gives a role at a place in the tree, where it holds for everything below. Assigning
twice assigns once.

JSON: {"id", "role", "principal", "scope"}`,
		Example: `  ringwall role assign reader --to user:ana
  ringwall role assign release-manager --to group:releases --scope /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590`,
		Args: exactly("ROLE"),
		RunE: func(c *cobra.Command, args []string) error {
			id, role, principal, err := a.resolve(c.Context(), e, args[0])
			if err != nil {
				return err
			}
			properties := map[string]string{"roleDefinitionId": "/providers/" + control.TypeRoleDefinition + "/" + role.ID, "principalId": principal}
			if err := putProperties(c.Context(), e, id.String(), properties, api.Request{}); err != nil {
				return err
			}
			out := struct {
				ID        string `json:"id"`
				Role      string `json:"role"`
				Principal string `json:"principal"`
				Scope     string `json:"scope"`
			}{id.String(), role.Name, principal, id.Parent().String()}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s is %s at %s\n", shown(principal), role.Name, out.Scope)
			})
		},
	}
	a.flags(c, "to")
	return c
}

func newRoleUnassignCommand(e *env) *cobra.Command {
	var a assignmentArgs
	c := &cobra.Command{
		Use:     "unassign ROLE --from WHO",
		Short:   "Take a role away that assign gave",
		Long:    "Takes away what ringwall role assign gave, at the same scope. Other assignments are documents: ringwall resource delete ID.",
		Example: "  ringwall role unassign reader --from user:ana",
		Args:    exactly("ROLE"),
		RunE: func(c *cobra.Command, args []string) error {
			id, _, _, err := a.resolve(c.Context(), e, args[0])
			if err != nil {
				return err
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			// what is not there is gone already, and would be told so to a typing mistake
			if _, _, err := client.Do(c.Context(), api.Request{Method: http.MethodGet, Path: id.String()}); err != nil {
				return err
			}
			_, _, err = client.Do(c.Context(), api.Request{Method: http.MethodDelete, Path: id.String()})
			return err
		},
	}
	a.flags(c, "from")
	return c
}

func newRoleAssignmentsCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:   "assignments",
		Short: "List who has which role where",
		Long: `Lists the role assignments at and below a place in the tree, as far as you may
see them.

JSON: {"assignments": [{"id", "scope", "role", "principal"}]}`,
		Example: "  ringwall role assignments\n  ringwall role assignments --scope /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			at, err := resource.ParseID(scope)
			if err != nil {
				return err
			}
			roles, err := allRoles(c.Context(), e)
			if err != nil {
				return err
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			type assignment struct {
				ID        string `json:"id"`
				Scope     string `json:"scope"`
				Role      string `json:"role"`
				Principal string `json:"principal"`
			}
			out := struct {
				Assignments []assignment `json:"assignments"`
			}{Assignments: []assignment{}}
			path := below(at.String(), control.TypeRoleAssignment)
			err = client.List(c.Context(), path, func(raw json.RawMessage) error {
				var d struct {
					ID         resource.ID `json:"id"`
					Properties struct {
						Role      resource.ID `json:"roleDefinitionId"`
						Principal string      `json:"principalId"`
					} `json:"properties"`
				}
				if err := readAnswer(raw, &d); err != nil {
					return err
				}
				name := d.Properties.Role.Name()
				if i := slices.IndexFunc(roles, func(r *rbac.Role) bool { return strings.EqualFold(r.ID, name) }); i >= 0 {
					name = shortName(roles[i])
				}
				out.Assignments = append(out.Assignments, assignment{d.ID.String(), d.ID.Parent().String(), name, d.Properties.Principal})
				return nil
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				for _, a := range out.Assignments {
					fmt.Fprintf(w, "%-24s %-32s %s\n", shown(a.Role), shown(a.Principal), shown(a.Scope))
				}
			})
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "`ID` of the place in the tree")
	return c
}

func newCanCommand(e *env) *cobra.Command {
	var data bool
	var groups []string
	c := &cobra.Command{
		Use: "can WHO ACTION SCOPE", GroupID: groupFleet,
		Short: "Ask whether somebody may do something, and why",
		Long: `Asks the server, which decides as for a real request, and says which assignment or
denial it rests on. WHO is me, user:NAME, group:NAME, service:NAME, host:ID or an
object id. Exit code 0: allowed; 1: not.

The server does not know the groups of people who sign on elsewhere until they
do: name them with --group.

JSON: {"allowed", "reason", "role", "assignment", "through", "deny", "principal", "groups"}`,
		Example: `  ringwall can me Ringwall.Fleet/rollouts/write /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590
  ringwall can user:ana Microsoft.Authorization/roleAssignments/write /`,
		Args: exactly("WHO", "ACTION", "SCOPE"),
		RunE: func(c *cobra.Command, args []string) error {
			q := url.Values{"action": {args[1]}, "scope": {args[2]}}
			if args[0] != "me" {
				who, err := principalOf(args[0])
				if err != nil {
					return err
				}
				q.Set("principal", who)
			}
			named, err := principalsOf(groups)
			if err != nil {
				return err
			}
			q["group"] = named
			if data {
				q.Set("data", "true")
			}
			var a control.Answer
			if err := askJSON(c.Context(), e, api.Request{Method: http.MethodGet, Path: "/ringwall/can?" + q.Encode()}, &a); err != nil {
				return err
			}
			err = e.emit(a, func(w io.Writer) {
				word := "no"
				if a.Allowed {
					word = "yes"
				}
				fmt.Fprintf(w, "%s: %s\n", word, printable(a.Reason))
				if a.Through != "" && !strings.EqualFold(a.Through, a.Principal) {
					fmt.Fprintf(w, "  through %s\n", shown(a.Through))
				}
				if at := cmp.Or(a.Assignment, a.Deny); at != "" {
					fmt.Fprintf(w, "  by %s\n", shown(at))
				}
			})
			if err != nil || a.Allowed {
				return err
			}
			return fmt.Errorf("%s may not: %w", shown(a.Principal), errs.Denied)
		},
	}
	c.Flags().BoolVar(&data, "data", false, "ask about a data action")
	c.Flags().StringArrayVar(&groups, "group", nil, "object `ID` of a group that comes with the sign-on; repeat")
	return c
}
