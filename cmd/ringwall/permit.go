package main

import (
	"errors"
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

type permitOptions struct {
	keys, passphraseFile, identity, log, tsa, out string
	hours                                         float64
	permit                                        codesign.Permit
}

func newPermitCreateCommand(e *env) *cobra.Command {
	var o permitOptions
	c := &cobra.Command{
		Use: "create", Short: "Sign a permit for a host",
		Long: `Signs a permit. With --log it also stands in the transparency log, where its
monitor sees it, and with --tsa another clock than the authority's own says when.
Neither is needed for it to count, because break-glass must work while they are
down: what fails is said, and the permit is made without it.

JSON: {"file", "host", "not_after", "logged"}`,
		Example: `  ringwall permit create --keys keys --identity spiffe://fleet.example/oncall/kim \
    --host 2f1c… --hours 2 --reason "INC-4711: vendor hotfix" -o permit.json`,
		Args: exactly(),
		RunE: func(*cobra.Command, []string) error { return o.create(e) },
	}
	f := c.Flags()
	f.StringVar(&o.keys, "keys", "", "key directory")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.identity, "identity", "", "URI of who signs, such as spiffe://fleet.example/oncall/kim")
	f.StringVar(&o.permit.Host, "host", "", "host id, as `ringwall status` shows it")
	f.StringVar(&o.permit.Reason, "reason", "", "why; it stands in the alert")
	f.Float64Var(&o.hours, "hours", 1, "how long from now, at most 24")
	f.StringVar(&o.log, "log", "", "append it to the transparency log in `DIR`, if that can be done now")
	f.StringVar(&o.tsa, "tsa", "", "timestamp authority's `URL`, if it answers (default: the authority's own)")
	f.StringVarP(&o.out, "out", "o", "permit.json", "file to write")
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

func (o *permitOptions) create(e *env) error {
	p := o.permit
	p.NotBefore = e.now().UTC()
	p.NotAfter = p.NotBefore.Add(hoursOf(o.hours))
	if d := p.NotAfter.Sub(p.NotBefore); d <= 0 || d > codesign.MaxPermit {
		return usage(fmt.Errorf("--hours: want more than 0 and at most %v", codesign.MaxPermit.Hours()))
	}
	a, err := loadAuthority(e, o.keys, o.passphraseFile)
	if err != nil {
		return err
	}
	s, err := a.NewSigner(pki.LeafRequest{Purpose: pki.PurposePermit, Identity: o.identity, Now: e.now()})
	if err != nil {
		return err
	}
	b, logged, err := o.sign(e, a, s, p)
	if err != nil {
		return err
	}
	if err := host.WriteFile(o.out, b, 0o600); err != nil {
		return err
	}
	return e.emit(map[string]any{"file": o.out, "host": p.Host, "not_after": p.NotAfter, "logged": logged}, func(w io.Writer) {
		fmt.Fprintf(w, "%s: for host %s until %s\n", o.out, p.Host, p.NotAfter.Format(time.RFC3339))
	})
}

// sign signs a permit, without the log or the other clock if they are down.
func (o *permitOptions) sign(e *env, a *pki.Authority, s *pki.Signer, p codesign.Permit) (b []byte, logged bool, err error) {
	own := s.Stamper
	if o.tsa != "" {
		if s.Stamper, err = openStamper(a, o.tsa); err != nil {
			return nil, false, err // no URL
		}
		if _, err := codesign.SignPermit(s, p); err != nil {
			e.notef("warning: %v; the authority's own clock says when", err)
			s.Stamper = own
		}
	}
	if o.log != "" {
		log, closeLog, err := openLog(a, o.log)
		if err == nil {
			s.Log = log
			b, err = codesign.SignPermit(s, p)
			err = errors.Join(err, closeLog())
		}
		if err == nil {
			return b, true, nil
		}
		e.notef("warning: %v; the permit is NOT in the log", err)
		s.Log = nil
	}
	b, err = codesign.SignPermit(s, p)
	return b, false, err
}
