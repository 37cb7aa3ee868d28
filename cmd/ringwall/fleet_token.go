package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
)

func newFleetTokenCommand(e *env) *cobra.Command {
	return newGroup("join-token", "", "Tokens that hosts join with",
		`A join token works once: the host that shows it gets a certificate and a place in
the tree, and the token is used up. The server keeps its SHA-256 only. Send it to
the host as you would a password.`,
		newFleetTokenMakeCommand(e), newFleetTokenListCommand(e), newFleetTokenRevokeCommand(e))
}

func newFleetTokenMakeCommand(e *env) *cobra.Command {
	var name string
	var labels []string
	var life time.Duration
	var critical bool
	c := &cobra.Command{
		Use:   "make SCOPE",
		Short: "Make a join token, and print it once",
		Long: `Makes a token for one host below SCOPE, a resource group or a subscription. With
--name only a host of that name can use it. Labels given here are yours: they outdo
what the host says of itself.

JSON: {"token", "id", "scope", "expires"}`,
		Example: `  ringwall fleet join-token make /subscriptions/ID/resourceGroups/web > join.token
  ringwall fleet join-token make /subscriptions/ID/resourceGroups/db --name db-1 --label role=db --critical --life 1h`,
		Args: exactly("SCOPE"),
		RunE: func(c *cobra.Command, args []string) error {
			scope, err := resource.ParseID(args[0])
			if err != nil {
				return err
			}
			if life <= 0 {
				return usage(fmt.Errorf("--life %v: want a time to come", life))
			}
			p := hosts.TokenProperties{Expires: e.now().Add(life).UTC().Truncate(time.Second), Name: name, Critical: critical, Labels: map[string]string{}}
			for _, l := range labels {
				k, v, ok := strings.Cut(l, "=")
				if !ok {
					return usage(fmt.Errorf("--label %q: want NAME=VALUE", l))
				}
				p.Labels[k] = v
			}
			body, err := json.Marshal(map[string]any{"properties": p})
			if err != nil {
				return err
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			token := hosts.NewJoinToken(scope)
			id, err := hosts.JoinTokenID(token)
			if err != nil {
				return err
			}
			if _, _, err := client.Do(c.Context(), api.Request{Method: http.MethodPut, Path: (&url.URL{Path: id.String()}).EscapedPath(), Body: body, Absent: true}); err != nil {
				return err
			}
			out := struct {
				Token   string      `json:"token"`
				ID      resource.ID `json:"id"`
				Scope   resource.ID `json:"scope"`
				Expires time.Time   `json:"expires"`
			}{token, id, scope, p.Expires}
			e.notef("for one host below %s, until %s", scope, p.Expires.Format(time.RFC3339))
			return e.emit(out, func(w io.Writer) { fmt.Fprintln(w, token) })
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "only a host of this `NAME` can use it")
	f.StringArrayVar(&labels, "label", nil, "`NAME=VALUE` that the host gets; repeat")
	f.DurationVar(&life, "life", 24*time.Hour, "how `LONG` it can be used, at most 30 days")
	f.BoolVar(&critical, "critical", false, "the host is critical: one of these that a change breaks is enough to stop it")
	return c
}

// tokenView is a join token as people see it.
type tokenView struct {
	ID resource.ID `json:"id"`
	hosts.TokenProperties
}

func newFleetTokenListCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:     "list",
		Short:   "List join tokens, used ones too",
		Long:    "Lists join tokens with who used them.\n\nJSON: {\"tokens\": [{\"id\", \"expires\", \"name\", \"labels\", \"used\": {\"at\", \"host\", \"key\"}}]}",
		Example: "  ringwall fleet join-token list --scope /subscriptions/ID/resourceGroups/web",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			out := struct {
				Tokens []tokenView `json:"tokens"`
			}{[]tokenView{}}
			err = listBelow(c.Context(), client, scope, fleet.TypeJoinToken, func(d *resourceDoc) error {
				t := tokenView{ID: d.ID}
				out.Tokens = append(out.Tokens, t)
				return d.read(&out.Tokens[len(out.Tokens)-1].TokenProperties)
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
				fmt.Fprintln(t, "TOKEN\tSCOPE\tSTATE")
				for i := range out.Tokens {
					fmt.Fprintf(t, "%.16s\t%s\t%s\n", out.Tokens[i].ID.Name(), shown(out.Tokens[i].ID.Parent().String()), out.Tokens[i].state(e.now()))
				}
				_ = t.Flush() // to the writer that emit checks
			})
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "list tokens below this `ID`")
	return c
}

func (t *tokenView) state(now time.Time) string {
	switch {
	case t.Used != nil:
		return "used by " + shown(t.Used.Host.Name()) + " at " + t.Used.At.Format(time.RFC3339)
	case !now.Before(t.Expires):
		return "over"
	}
	return "good until " + t.Expires.Format(time.RFC3339)
}

func newFleetTokenRevokeCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:     "revoke TOKEN",
		Short:   "Delete a join token",
		Long:    "Deletes a token, named by the beginning of its SHA-256 as list shows it, or by its\nid. A host that joined with it stays: see ringwall fleet hosts revoke.\n\nJSON: {\"id\"}",
		Example: "  ringwall fleet join-token revoke 5bb9c2f4",
		Args:    exactly("TOKEN"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			var found []resource.ID
			err = listBelow(c.Context(), client, scope, fleet.TypeJoinToken, func(d *resourceDoc) error {
				if d.ID.String() == args[0] || len(args[0]) >= 8 && strings.HasPrefix(d.ID.Name(), args[0]) {
					found = append(found, d.ID)
				}
				return nil
			})
			switch {
			case err != nil:
				return err
			case len(found) == 0:
				return fmt.Errorf("join token %s: %w", args[0], errs.NotFound)
			case len(found) > 1:
				return fmt.Errorf("%d join tokens begin with %s: %w", len(found), args[0], errs.Conflict)
			}
			if _, _, err := client.Do(c.Context(), api.Request{Method: http.MethodDelete, Path: (&url.URL{Path: found[0].String()}).EscapedPath()}); err != nil {
				return err
			}
			out := struct {
				ID resource.ID `json:"id"`
			}{found[0]}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "revoked %.16s\n", found[0].Name()) })
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "look below this `ID`")
	return c
}
