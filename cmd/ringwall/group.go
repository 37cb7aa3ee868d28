package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

// principalOf reads who is meant on the command line: user:NAME, group:NAME,
// service:NAME, host:ID, or an object id as it is.
func principalOf(s string) (string, error) {
	kind, name, _ := strings.Cut(s, ":")
	var id string
	switch kind {
	case "user":
		id = control.UserID(control.Local, strings.ToLower(name))
	case "group":
		id = control.GroupID(control.Local, strings.ToLower(name))
	case "service":
		id = control.PeerID(control.PeerService, name)
	case "host":
		id = control.PeerID(control.PeerHost, name)
	default:
		if s == "" {
			return "", usage(fmt.Errorf("nobody is named; want user:NAME, group:NAME, service:NAME, host:ID or an object id"))
		}
		return s, nil
	}
	if !control.ValidName(name) {
		return "", fmt.Errorf("%.80q is no name of a %s: %w", name, kind, errs.Invalid)
	}
	return id, nil
}

func principalsOf(list []string) ([]string, error) {
	out := make([]string, 0, len(list))
	for _, s := range list {
		id, err := principalOf(s)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func newGroupCommand(e *env) *cobra.Command {
	return newGroup("group", groupFleet, "Manage groups of people and services",
		`A role that is given to a group is everybody's in it, and in the groups in it.
Members are user:NAME, group:NAME, service:NAME, or object ids, such as
https://idp.example#admins for a group that an issuer elsewhere names.`,
		newGroupCreateCommand(e),
		newGroupMemberCommand(e, "add", "Add members to a group", func(have, more []string) []string {
			return append(have, slices.DeleteFunc(more, func(m string) bool { return hasFold(have, m) })...)
		}),
		newGroupMemberCommand(e, "remove", "Take members out of a group", func(have, gone []string) []string {
			return slices.DeleteFunc(have, func(m string) bool { return hasFold(gone, m) })
		}),
		newGroupListCommand(e), newGroupDeleteCommand(e))
}

func hasFold(list []string, s string) bool {
	return slices.ContainsFunc(list, func(x string) bool { return strings.EqualFold(x, s) })
}

func newGroupCreateCommand(e *env) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:   "create NAME [MEMBER...]",
		Short: "Make a group",
		Long:  "Makes a group, whose object id is local#NAME (group:NAME on the command line).\n\nJSON: {\"name\", \"principal\"}",
		Example: `  ringwall group create oncall user:ana user:ben
  ringwall role assign on-call-engineer --to group:oncall`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUserGroup, args[0])
			if err != nil {
				return err
			}
			members, err := principalsOf(args[1:])
			if err != nil {
				return err
			}
			if err := putProperties(c.Context(), e, id, control.Group{Name: name, Members: members}, api.Request{Absent: true}); err != nil {
				return err
			}
			out := struct {
				Name      string `json:"name"`
				Principal string `json:"principal"`
			}{args[0], control.GroupID(control.Local, args[0])}
			return e.emit(out, func(w io.Writer) { fmt.Fprintln(w, out.Principal) })
		},
	}
	c.Flags().StringVar(&name, "name", "", "`NAME` for people")
	return c
}

func newGroupMemberCommand(e *env, verb, short string, change func(have, named []string) []string) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME MEMBER...", Short: short, Long: short + ". It counts from the next request on.",
		Example: "  ringwall group " + verb + " oncall user:ana", Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUserGroup, args[0])
			if err != nil {
				return err
			}
			named, err := principalsOf(args[1:])
			if err != nil {
				return err
			}
			return changeProperties(c.Context(), e, id, func(g *control.Group) error {
				g.Members = append([]string{}, change(g.Members, named)...)
				return nil
			})
		},
	}
}

func newGroupListCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List groups and their members",
		Long:    "Lists groups and their direct members.\n\nJSON: {\"groups\": [{\"name\", \"principal\", \"displayName\", \"members\"}]}",
		Example: "  ringwall group list",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			type group struct {
				Name      string   `json:"name"`
				Principal string   `json:"principal"`
				Display   string   `json:"displayName,omitempty"`
				Members   []string `json:"members"`
			}
			out := struct {
				Groups []group `json:"groups"`
			}{Groups: []group{}}
			err := listDocuments(c.Context(), e, control.TypeUserGroup, func(id resource.ID, g control.Group) error {
				out.Groups = append(out.Groups, group{id.Name(), control.GroupID(control.Local, id.Name()), g.Name, g.Members})
				return nil
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				for _, g := range out.Groups {
					fmt.Fprintf(w, "%s\n", g.Name)
					for _, m := range g.Members {
						fmt.Fprintf(w, "  %s\n", shown(m))
					}
				}
			})
		},
	}
}

func newGroupDeleteCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "delete NAME",
		Short:   "Delete a group",
		Long:    "Deletes a group. Its role assignments stay, and would count for a new group of the same name.",
		Example: "  ringwall group delete oncall",
		Args:    exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUserGroup, args[0])
			if err != nil {
				return err
			}
			return askJSON(c.Context(), e, api.Request{Method: http.MethodDelete, Path: id}, nil)
		},
	}
}
