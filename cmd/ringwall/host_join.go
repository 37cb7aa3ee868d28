package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// joinTokenVariable holds a join token for `ringwall host join`.
const joinTokenVariable = "RINGWALL_JOIN_TOKEN"

func newHostJoinCommand(e *env) *cobra.Command {
	var d hostDirs
	var q agent.JoinRequest
	var ca, tokenFile string
	var labels []string
	c := &cobra.Command{
		Use: "join --server URL --ca FILE", Short: "Make this host a member of a fleet",
		Long: `Join the fleet of a server: from then on the agent takes the manifests that the
server means for this host, and reports how it stands and what it refused.

The server cannot make policies: what it sends is put in force only if it is
signed by whom this host's confirmed policy trusts, and for a trial that ends by
itself. When the server is away the host goes on enforcing what it has.

The join token is used once. It is read from --token-file (- is standard input)
or from the environment variable ` + joinTokenVariable + `, never from the command line.
The host's key is made here and never leaves this machine. Joining the same
server again changes nothing; after a lost answer it goes on with the same key.

--ca is the certificate of the authority that vouches for the server; no other is
believed, nor those of the system.

Labels are what a rollout spreads its rings over: role, image, kernel and arch.
All but role are found out by themselves.

JSON: as "fleet" in ringwall status`,
		Example: `  ringwall host join --server https://ringwall.example.com:7443 --ca server-ca.pem --token-file join.token
  ssh root@edge-17 ringwall host join --server https://ringwall.example.com:7443 --ca /etc/ringwall/ca.pem --token-file - --label role=edge < join.token`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("host join"); err != nil {
				return err
			}
			pem, err := readBounded(ca, 1<<20)
			if err != nil {
				return fmt.Errorf("--ca: %w", err)
			}
			q.CA = string(pem)
			if q.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			if q.Token, err = joinToken(e, tokenFile); err != nil {
				return err
			}
			var s agent.LinkStatus
			err = agent.NewClient(d.run).Call(c.Context(), "join", q, &s)
			stopped := noAgent(err)
			if stopped {
				s, err = joinStopped(c.Context(), e, d.state, q)
			}
			if err != nil {
				return err
			}
			return e.emit(&s, func(w io.Writer) {
				fmt.Fprintf(w, "joined    %s as %s\nhost      %s\nplace     %s\n", s.Server, s.Name, s.Host, s.Resource)
				if stopped {
					fmt.Fprintln(w, "next      start the agent: systemctl start ringwall-agent")
				}
			})
		},
	}
	d.flags(c)
	f := c.Flags()
	f.StringVar(&q.Server, "server", "", "address of the server, `https://HOST[:PORT]`")
	f.StringVar(&ca, "ca", "", "PEM file: who vouches for the server")
	f.StringVar(&tokenFile, "token-file", "", "file with the join token; - is standard input (default: $"+joinTokenVariable+")")
	f.StringVar(&q.Name, "name", "", "name of this host in the fleet (default: its host name)")
	f.StringArrayVar(&labels, "label", nil, "`KEY=VALUE` that this host says of itself; repeat")
	require(c, "server", "ca")
	return c
}

func joinStopped(ctx context.Context, e *env, state string, q agent.JoinRequest) (agent.LinkStatus, error) {
	return agent.JoinStopped(ctx, state, q, e.now(), readBuildVersion().Version)
}

// joinToken reads the token from wherever it may come from.
func joinToken(e *env, file string) (string, error) {
	var raw []byte
	var err error
	switch file {
	case "":
		raw = []byte(e.getenv(joinTokenVariable))
		if len(raw) == 0 {
			return "", usage(fmt.Errorf("no join token: want --token-file or $%s", joinTokenVariable))
		}
	case "-":
		if raw, err = io.ReadAll(io.LimitReader(e.stdin, 8<<10)); err != nil {
			return "", fmt.Errorf("join token: %w", err)
		}
	default:
		if raw, err = readBounded(file, 8<<10); err != nil {
			return "", fmt.Errorf("join token: %w", err)
		}
	}
	token := strings.TrimSpace(string(raw))
	if token == "" {
		return "", fmt.Errorf("join token: it is empty: %w", errs.Invalid)
	}
	return token, nil
}

func parseLabels(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, x := range list {
		k, v, ok := strings.Cut(x, "=")
		if !ok || k == "" {
			return nil, usage(fmt.Errorf("--label %q: want KEY=VALUE", x))
		}
		out[k] = v
	}
	return out, nil
}

func newHostLeaveCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "leave", Short: "Take this host out of its fleet; it goes on enforcing what it has",
		Long: `Forget the server, and this host's key and certificate. What is in force stays in
force; nobody but you gives this host anything else. What the server has not
received yet is only in this host's own event log from then on.

Refused while the server isolates this host. The server still lists the host,
as one that is silent, until somebody deletes it there.`,
		Example: `  ringwall host leave`,
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("host leave"); err != nil {
				return err
			}
			var none struct{}
			err := agent.NewClient(d.run).Call(c.Context(), "leave", none, &none)
			if noAgent(err) {
				err = agent.LeaveStopped(d.state)
			}
			if err != nil {
				return err
			}
			return e.emit(struct{}{}, func(w io.Writer) { fmt.Fprintln(w, "this host is in no fleet") })
		},
	}
	d.flags(c)
	return c
}

// printLink shows how this host stands with its fleet.
func printLink(row func(name, format string, args ...any), l *agent.LinkStatus) {
	if l == nil {
		return
	}
	state := l.State
	if l.Answered != nil {
		state += ", answered " + l.Answered.UTC().Format(time.RFC3339)
	}
	row("fleet", "%s (CA %s): %s", l.Server, strings.Join(l.CA, ", "), state)
	if l.Error != "" {
		row("", "%s", l.Error)
	}
	if l.Host != "" {
		row("", "as %s, %s", l.Name, l.Resource)
	}
	manifest := l.Phase
	if l.Manifest != "" {
		manifest += " " + l.Manifest
	}
	row("manifest", "%s", manifest)
	if l.Failed != "" {
		row("", "%s was not taken: %s", l.Failed, l.Reason)
	}
	if l.LocalItems > 0 {
		row("", "and %d releases that were handed in on this host", l.LocalItems)
	}
	if l.Spooled > 0 || l.Dropped > 0 {
		row("", "%d bytes wait for the server, %d records lost", l.Spooled, l.Dropped)
	}
	if l.Isolated {
		row("isolated", "by the server: this host talks to the server and to itself only")
	}
	if l.Expires != nil {
		row("certificate", "until %s", l.Expires.UTC().Format(time.RFC3339))
	}
}

// agentHooks are what the agent does on this machine for its fleet.
func agentHooks(o agent.Options) agent.Options {
	o.Units, o.Isolate, o.Version = agent.DefaultUnits(), host.Isolate, readBuildVersion().Version
	return o
}
