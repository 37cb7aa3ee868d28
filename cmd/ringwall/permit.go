package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/codesign"
	"ringwall/internal/host"
	"ringwall/internal/pki"
)

func newPermitCommand(e *env) *cobra.Command {
	return newGroup("permit", groupHost, "Break glass: let everything run on one host for a while",
		`A permit is signed for one host and for at most 24 hours. While it is used
nothing is refused, everything is reported, and the guards of Ringwall itself
stay up. Its use is an alert. It needs no network.`,
		newPermitCreateCommand(e), newPermitUseCommand(e), newPermitEndCommand(e))
}

func newPermitCreateCommand(e *env) *cobra.Command {
	var keys, passFile, identity, hostID, reason, out string
	var hours float64
	c := &cobra.Command{
		Use: "create", Short: "Sign a permit for a host",
		Example: `  ringwall permit create --keys keys --identity spiffe://fleet.example/oncall/kim \
    --host 2f1c… --hours 2 --reason "INC-4711: vendor hotfix" -o permit.json`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error {
			return createPermit(e, keys, passFile, identity, codesign.Permit{
				Host: hostID, Reason: reason, NotBefore: e.now().UTC(), NotAfter: e.now().UTC().Add(hoursOf(hours)),
			}, out)
		},
	}
	f := c.Flags()
	f.StringVar(&keys, "keys", "", "key directory")
	passphraseFlag(c, &passFile)
	f.StringVar(&identity, "identity", "", "URI of who signs, such as spiffe://fleet.example/oncall/kim")
	f.StringVar(&hostID, "host", "", "host id, as `ringwall status` shows it")
	f.StringVar(&reason, "reason", "", "why; it stands in the alert")
	f.Float64Var(&hours, "hours", 1, "how long from now, at most 24")
	f.StringVarP(&out, "out", "o", "permit.json", "file to write")
	require(c, "keys", "identity", "host", "reason")
	return c
}

func newPermitUseCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "use FILE", Short: "Use a permit on this host",
		Args: exactly("FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			b, err := readBounded(args[0], maxBundleFile)
			if err != nil {
				return err
			}
			var a agent.PermitAnswer
			if err := agent.NewClient(d.run).Call(c.Context(), "permit", agent.DocumentRequest{Document: b}, &a); err != nil {
				return startHint(err)
			}
			return e.emit(&a, func(w io.Writer) {
				fmt.Fprintf(w, "nothing is refused until %s; `ringwall permit end` ends it before\n", a.Until.Format("2006-01-02 15:04:05 MST"))
			})
		},
	}
	d.flags(c)
	return c
}

func newPermitEndCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "end", Short: "Enforce again before the permit runs out",
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			var none struct{}
			if err := agent.NewClient(d.run).Call(c.Context(), "permit/end", none, &none); err != nil {
				return startHint(err)
			}
			return e.emit(none, func(w io.Writer) { fmt.Fprintln(w, "the policy is enforced again") })
		},
	}
	d.flags(c)
	return c
}

func hoursOf(h float64) time.Duration {
	return time.Duration(h * float64(time.Hour)).Truncate(time.Second)
}

func createPermit(e *env, keys, passFile, identity string, p codesign.Permit, out string) error {
	if d := p.NotAfter.Sub(p.NotBefore); d <= 0 || d > codesign.MaxPermit {
		return usage(fmt.Errorf("--hours: want more than 0 and at most %v", codesign.MaxPermit.Hours()))
	}
	a, err := loadAuthority(e, keys, passFile)
	if err != nil {
		return err
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePermit, Identity: identity, Now: e.now()})
	if err != nil {
		return err
	}
	b, err := codesign.SignPermit(s, p)
	if err != nil {
		return err
	}
	if err := host.WriteFile(out, b, 0o600); err != nil {
		return err
	}
	return e.emit(map[string]any{"file": out, "host": p.Host, "not_after": p.NotAfter}, func(w io.Writer) {
		fmt.Fprintf(w, "%s: for host %s until %s\n", out, p.Host, p.NotAfter.Format(time.RFC3339))
	})
}
