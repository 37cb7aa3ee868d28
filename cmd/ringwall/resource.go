package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/errs"
	"ringwall/internal/resource"
)

func newResourceCommand(e *env) *cobra.Command {
	return newGroup("resource", groupFleet, "Read and change what the server manages",
		`Everything that a server manages is a document in one tree, in the envelope of
Azure Resource Manager:

  /subscriptions/ID
  /subscriptions/ID/resourceGroups/NAME
  SCOPE/providers/NAMESPACE/TYPE/NAME

so az rest, Azure's roles and its policies apply. Log in first: ringwall login.`,
		newResourceGetCommand(e), newResourceListCommand(e), newResourcePutCommand(e), newResourceDeleteCommand(e), newResourceWatchCommand(e))
}

// connectFor is the client and the path of a document. An id that is none is
// refused before it travels, with what is wrong with it.
func connectFor(e *env, s string) (*api.Client, string, error) {
	id, err := resource.ParseID(s)
	if err != nil {
		return nil, "", err
	}
	client, err := connect(e)
	return client, (&url.URL{Path: id.String()}).EscapedPath(), err
}

func newResourceGetCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "get ID",
		Short:   "Show a document",
		Long:    "Shows a document as JSON. Its etag goes into put --if-match.",
		Example: "  ringwall resource get /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodGet, Path: path})
			if err != nil {
				return err
			}
			return printJSON(e, b)
		},
	}
}

func printJSON(e *env, b []byte) error {
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return fmt.Errorf("the server's answer: %w: %w", err, errs.Invalid)
	}
	_, err := fmt.Fprintln(e.stdout, strings.TrimSpace(out.String()))
	return err
}

func newResourceListCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "list PATH",
		Short: "List documents",
		Long: `Lists what is at a path, over all pages:

  /subscriptions                       SUBSCRIPTION/resourceGroups
  SCOPE/providers/NAMESPACE/TYPE       SCOPE/resources (everything below)

JSON: {"resources": [documents]}`,
		Example: "  ringwall resource list /subscriptions\n  ringwall resource list /providers/Microsoft.Authorization/roleAssignments",
		Args:    exactly("PATH"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			out := struct {
				Resources []json.RawMessage `json:"resources"`
			}{Resources: []json.RawMessage{}}
			err = client.List(c.Context(), (&url.URL{Path: args[0]}).EscapedPath(), func(d json.RawMessage) error {
				out.Resources = append(out.Resources, d)
				return nil
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				for _, r := range out.Resources {
					var d struct{ ID, Type string }
					_ = json.Unmarshal(r, &d) // what cannot be read is shown as nothing
					fmt.Fprintf(w, "%-55s %s\n", shown(d.Type), shown(d.ID))
				}
			})
		},
	}
}

func newResourcePutCommand(e *env) *cobra.Command {
	var file, ifMatch string
	var create, dryRun bool
	c := &cobra.Command{
		Use:   "put ID --file FILE",
		Short: "Create or change a document",
		Long: `Stores a document: {"location", "tags", "properties"}. What get printed may be
sent back as it is. With --if-match nothing is overwritten that somebody else
changed meanwhile; with --dry-run all is checked and nothing is stored.`,
		Example: `  echo '{"tags": {"team": "web"}}' | ringwall resource put /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web --file -
  ringwall resource put ID --file doc.json --if-match '"1f"'`,
		Args: exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			body, err := readInputFile(e, file, resource.MaxProperties)
			if err != nil {
				return err
			}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodPut, Path: path + dryRunQuery(dryRun), Body: body, IfMatch: ifMatch, Absent: create})
			if err != nil {
				return err
			}
			return printJSON(e, b)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "file", "", "`FILE` with the document; - for standard input")
	f.StringVar(&ifMatch, "if-match", "", "only if the document still has this `ETAG`")
	f.BoolVar(&create, "create", false, "only if there is no such document yet")
	f.BoolVar(&dryRun, "dry-run", false, "check, and store nothing")
	require(c, "file")
	return c
}

func dryRunQuery(dry bool) string {
	if dry {
		return "?dryRun=true"
	}
	return ""
}

// readInputFile reads a file, or standard input for "-".
func readInputFile(e *env, file string, limit int64) ([]byte, error) {
	if file != "-" {
		return readBounded(file, limit)
	}
	b, err := io.ReadAll(io.LimitReader(e.stdin, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("standard input is longer than %d bytes: %w", limit, errs.Invalid)
	}
	return b, err
}

func newResourceDeleteCommand(e *env) *cobra.Command {
	var ifMatch string
	var dryRun bool
	c := &cobra.Command{
		Use:     "delete ID",
		Short:   "Delete a document",
		Long:    "Deletes a document that nothing is below. One that is not there is gone, as was wanted.",
		Example: "  ringwall resource delete /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			_, _, err = client.Do(c.Context(), api.Request{Method: http.MethodDelete, Path: path + dryRunQuery(dryRun), IfMatch: ifMatch})
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&ifMatch, "if-match", "", "only if the document still has this `ETAG`")
	f.BoolVar(&dryRun, "dry-run", false, "check, and delete nothing")
	return c
}

func newResourceWatchCommand(e *env) *cobra.Command {
	var after uint64
	var count int
	c := &cobra.Command{
		Use:   "watch [ID]",
		Short: "Follow changes as they happen",
		Long: `Prints a JSON line for each change below a place in the tree, from a revision on,
without gaps, and resumes by itself when the connection breaks:

{"revision", "deleted", "document"}`,
		Example: "  ringwall resource watch\n  ringwall resource watch /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590 --after 1200",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			below := "/"
			if len(args) == 1 {
				below = args[0]
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			err = client.Watch(c.Context(), below, after, func(ev api.Event) error {
				if ev.Name != "change" {
					return nil
				}
				if _, err := fmt.Fprintf(e.stdout, "%s\n", ev.Data); err != nil {
					return err
				}
				if count--; count == 0 {
					return errEnough
				}
				return nil
			})
			if errors.Is(err, errEnough) || c.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	f := c.Flags()
	f.Uint64Var(&after, "after", 0, "begin after this `REVISION`")
	f.IntVar(&count, "count", 0, "end after `N` changes (default: never)")
	return c
}

var errEnough = errors.New("enough")
