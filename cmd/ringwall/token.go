package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control"
)

func newTokenCommand(e *env) *cobra.Command {
	return newGroup("token", groupFleet, "Make tokens for what can neither sign on nor show a certificate",
		`A token stands for a principal, whose role assignments say what it may do. The
server keeps its SHA-256 only. A token is revoked by deleting its document:
ringwall resource list /providers/Ringwall.Identity/tokens`,
		newTokenCreateCommand(e))
}

func newTokenCreateCommand(e *env) *cobra.Command {
	var name string
	var groups []string
	var life time.Duration
	c := &cobra.Command{
		Use:   "create PRINCIPAL",
		Short: "Make a token, and print it once",
		Long: `Makes a token for a principal: user:NAME, service:NAME, or an object id that role
assignments name. People sign on, and services have certificates; a token is for
what can do neither. It takes what assigning roles takes, since a token is as good
as all of its principal's roles.

JSON: {"token", "id", "principal", "expires"}`,
		Example: `  ringwall token create exporter --life 720h > exporter.token
  ringwall role assign reader --to exporter`,
		Args: exactly("PRINCIPAL"),
		RunE: func(c *cobra.Command, args []string) error {
			if life <= 0 {
				return usage(fmt.Errorf("--life %v: want a time to come", life))
			}
			principal, err := principalOf(args[0])
			if err != nil {
				return err
			}
			if groups, err = principalsOf(groups); err != nil {
				return err
			}
			t := control.Token{Principal: principal, Name: name, Groups: groups, Expires: e.now().Add(life).UTC().Truncate(time.Second)}
			if t.Name == "" {
				t.Name = t.Principal
			}
			body, err := json.Marshal(map[string]any{"properties": t})
			if err != nil {
				return err
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			token := control.NewToken()
			id := control.TokenID(token).String()
			if _, _, err := client.Do(c.Context(), api.Request{Method: http.MethodPut, Path: id, Body: body, Absent: true}); err != nil {
				return err
			}
			out := struct {
				Token     string    `json:"token"`
				ID        string    `json:"id"`
				Principal string    `json:"principal"`
				Expires   time.Time `json:"expires"`
			}{token, id, t.Principal, t.Expires}
			e.notef("for %s, until %s; revoke it with\n  ringwall resource delete %s", shown(t.Principal), t.Expires.Format(time.RFC3339), id)
			return e.emit(out, func(w io.Writer) { fmt.Fprintln(w, token) })
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "", "`NAME` for people and the audit log (default: the principal)")
	f.StringArrayVar(&groups, "group", nil, "`GROUP` that it belongs to: group:NAME or an object id; repeat")
	f.DurationVar(&life, "life", 30*24*time.Hour, "how `LONG` it lasts, at most a year")
	return c
}
