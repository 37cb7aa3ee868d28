package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ringwall/internal/api"
	"ringwall/internal/control"
	"ringwall/internal/errs"
	"ringwall/internal/identity"
	"ringwall/internal/resource"
)

func newUserCommand(e *env) *cobra.Command {
	return newGroup("user", groupFleet, "Manage the users of the server's own sign-on",
		`A server that stands alone keeps its users itself: documents of the type
Ringwall.Identity/users, with the hash of a password that nobody can read. Where
an organisation has an issuer of OpenID Connect, name that instead: a document
Ringwall.Identity/issuers/NAME, see docs/ops/sign-on.md.

A user is somebody, and may nothing until a role says so:

  ringwall user add ana --name "Ana Example"
  ringwall role assign reader --to user:ana`,
		newUserAddCommand(e), newUserListCommand(e), newUserPasswdCommand(e),
		newUserSwitchCommand(e, "disable", "Keep a user out", "Ends every session of the user at once. The user and its roles stay.", true),
		newUserSwitchCommand(e, "enable", "Let a user in again", "Undoes disable.", false),
		newUserRemoveCommand(e))
}

func identityDocument(kind, name string) (string, error) {
	if !control.ValidName(name) {
		return "", fmt.Errorf("%.80q is no name (lower-case letters, digits, dots, dashes and underlines): %w", name, errs.Invalid)
	}
	id, err := resource.ParseID("/providers/" + kind + "/" + name)
	return id.String(), err
}

// putProperties writes a document.
func putProperties(ctx context.Context, e *env, id string, properties any, q api.Request) error {
	b, err := json.Marshal(map[string]any{"properties": properties})
	if err != nil {
		return err
	}
	q.Method, q.Path, q.Body = http.MethodPut, id, b
	return askJSON(ctx, e, q, nil)
}

// changeProperties reads a document's properties, changes them and writes them
// back, unless somebody else did meanwhile.
func changeProperties[T any](ctx context.Context, e *env, id string, change func(*T) error) error {
	client, err := connect(e)
	if err != nil {
		return err
	}
	b, etag, err := client.Do(ctx, api.Request{Method: http.MethodGet, Path: id})
	if err != nil {
		return err
	}
	var d struct {
		Properties T `json:"properties"`
	}
	if err := readAnswer(b, &d); err != nil {
		return err
	}
	if err := change(&d.Properties); err != nil {
		return err
	}
	return putProperties(ctx, e, id, d.Properties, api.Request{IfMatch: etag})
}

// listDocuments reads all documents of a type below the root.
func listDocuments[T any](ctx context.Context, e *env, kind string, visit func(id resource.ID, properties T) error) error {
	client, err := connect(e)
	if err != nil {
		return err
	}
	return client.List(ctx, "/providers/"+kind, func(raw json.RawMessage) error {
		var d struct {
			ID         resource.ID `json:"id"`
			Properties T           `json:"properties"`
		}
		if err := readAnswer(raw, &d); err != nil {
			return err
		}
		return visit(d.ID, d.Properties)
	})
}

func newUserAddCommand(e *env) *cobra.Command {
	var name, file string
	c := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a user",
		Long: `Makes a user, whose object id for roles and groups is local|NAME (user:NAME on the
command line). The password is asked for on a terminal, and otherwise read from
--password-file or standard input; it has twelve characters or more. Its hash
(argon2id) is made here: the server never sees the password until the user signs
on. It takes what assigning roles takes.

JSON: {"name", "principal"}`,
		Example: `  ringwall user add ana --name "Ana Example"
  pwgen -s 24 1 | tee ana.txt | ringwall user add ana`,
		Args: exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUser, args[0])
			if err != nil {
				return err
			}
			hash, err := readPassword(e, file)
			if err != nil {
				return err
			}
			if err := putProperties(c.Context(), e, id, control.User{Name: name, Hash: hash}, api.Request{Absent: true}); err != nil {
				return err
			}
			out := struct {
				Name      string `json:"name"`
				Principal string `json:"principal"`
			}{args[0], control.UserID(control.Local, args[0])}
			e.notef("give a role with\n  ringwall role assign ROLE --to user:%s", args[0])
			return e.emit(out, func(w io.Writer) { fmt.Fprintln(w, out.Principal) })
		},
	}
	c.Flags().StringVar(&name, "name", "", "`NAME` for people")
	c.Flags().StringVar(&file, "password-file", "", "`FILE` with the password; - for standard input")
	return c
}

// readPassword reads a new password and returns its hash.
func readPassword(e *env, file string) (string, error) {
	if file == "" && isTerminal(e.stdin) {
		first, err := askPassword(e, "password: ")
		if err != nil {
			return "", err
		}
		again, err := askPassword(e, "again: ")
		if err != nil {
			return "", err
		}
		if first != again {
			return "", fmt.Errorf("the two differ: %w", errs.Invalid)
		}
		return identity.HashPassword(first)
	}
	if file == "" {
		file = "-"
	}
	b, err := readInputFile(e, file, identity.MaxPassword+2)
	if err != nil {
		return "", err
	}
	line, more, _ := strings.Cut(string(b), "\n")
	if more != "" {
		return "", fmt.Errorf("the password is one line: %w", errs.Invalid)
	}
	return identity.HashPassword(strings.TrimSuffix(line, "\r"))
}

// askPassword asks on the terminal, which shows nothing meanwhile.
func askPassword(e *env, prompt string) (line string, err error) {
	f, ok := e.stdin.(*os.File)
	if !ok {
		return "", errors.New("no terminal")
	}
	fd := int(f.Fd())
	shown, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return "", err
	}
	hidden := *shown
	hidden.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETS, shown))
		fmt.Fprintln(e.stderr)
	}()
	fmt.Fprint(e.stderr, prompt)
	var b [1]byte
	var out []byte
	for len(out) <= identity.MaxPassword {
		if _, err := f.Read(b[:]); err != nil || b[0] == '\n' {
			return string(out), err
		}
		out = append(out, b[0])
	}
	return "", fmt.Errorf("a password of more than %d bytes: %w", identity.MaxPassword, errs.Invalid)
}

func newUserListCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List users",
		Long:    "Lists the users of the server's own sign-on.\n\nJSON: {\"users\": [{\"name\", \"principal\", \"displayName\", \"disabled\"}]}",
		Example: "  ringwall user list",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			type user struct {
				Name      string `json:"name"`
				Principal string `json:"principal"`
				Display   string `json:"displayName,omitempty"`
				Disabled  bool   `json:"disabled"`
			}
			out := struct {
				Users []user `json:"users"`
			}{Users: []user{}}
			err := listDocuments(c.Context(), e, control.TypeUser, func(id resource.ID, u control.User) error {
				out.Users = append(out.Users, user{id.Name(), control.UserID(control.Local, id.Name()), u.Name, u.Disabled})
				return nil
			})
			if err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				for _, u := range out.Users {
					state := ""
					if u.Disabled {
						state = "disabled"
					}
					fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-24s %-9s %s", u.Name, state, u.Display), " "))
				}
			})
		},
	}
}

func newUserPasswdCommand(e *env) *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:     "passwd NAME",
		Short:   "Give a user a new password",
		Long:    "Sets a new password, and ends every session of the user at once.",
		Example: "  ringwall user passwd ana",
		Args:    exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUser, args[0])
			if err != nil {
				return err
			}
			hash, err := readPassword(e, file)
			if err != nil {
				return err
			}
			return changeProperties(c.Context(), e, id, func(u *control.User) error { u.Hash = hash; return nil })
		},
	}
	c.Flags().StringVar(&file, "password-file", "", "`FILE` with the password; - for standard input")
	return c
}

func newUserSwitchCommand(e *env, verb, short, long string, disabled bool) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME", Short: short, Long: long, Example: "  ringwall user " + verb + " ana", Args: exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUser, args[0])
			if err != nil {
				return err
			}
			return changeProperties(c.Context(), e, id, func(u *control.User) error { u.Disabled = disabled; return nil })
		},
	}
}

func newUserRemoveCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a user",
		Long: `Removes a user and ends every session. Role assignments and memberships stay, and
would count for a new user of the same name: take them away first, or disable the
user instead.`,
		Example: "  ringwall user remove ana",
		Args:    exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := identityDocument(control.TypeUser, args[0])
			if err != nil {
				return err
			}
			return askJSON(c.Context(), e, api.Request{Method: http.MethodDelete, Path: id}, nil)
		},
	}
}
