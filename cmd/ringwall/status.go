package main

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/enforce"
	"ringwall/internal/errs"
)

func newStatusCommand(e *env) *cobra.Command {
	var d hostDirs
	c := &cobra.Command{
		Use: "status", GroupID: groupHost, Short: "What is enforced here, since when, by what, and what is not covered",
		Long: `Ask the agent how this host stands. Without an agent, look into the kernel: what
it put there stays in force when it is gone.

The exit code is 0 only if the policy is enforced, or audited as it says, and
the canary proved it of late.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := agent.NewClient(d.run).Status(c.Context())
			if noAgent(err) {
				s = withoutAgent(d.run)
			} else if err != nil {
				return err
			}
			if err := e.emit(s, func(w io.Writer) { printStatus(w, s) }); err != nil {
				return err
			}
			switch s.State {
			case agent.StateEnforcing, agent.StateAuditing:
				return nil
			case agent.StateOff:
				return fmt.Errorf("nothing is enforced on this host: %w", errs.Unsupported)
			}
			return fmt.Errorf("the policy is not proven to be in force: %s: %w", s.State, errs.Denied)
		},
	}
	d.flags(c)
	return c
}

// withoutAgent looks into the kernel by itself.
func withoutAgent(run string) *agent.Status {
	s := &agent.Status{State: agent.StateOff, Text: "no agent runs and nothing is enforced"}
	k, err := enforce.Inspect(filepath.Join(run, "bpf"))
	if err == nil {
		s.Kernel = &k
		s.State = agent.StateUnproven
		s.Text = "no agent runs; the kernel holds the policy of the last one and goes on with it, but nobody reads events or proves it: systemctl start ringwall-agent"
		return s
	}
	for _, p := range enforce.Support() {
		s.Problems = append(s.Problems, p.What+": "+p.Why+" (fix: "+p.Fix+")")
	}
	if len(s.Problems) == 0 {
		s.Text += "; this kernel could: `ringwall host init`, then `ringwall host install`"
	}
	return s
}

func printStatus(out io.Writer, s *agent.Status) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	defer func() { _ = w.Flush() }() // emit reports what cannot be written
	row := func(name, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("state", "%s: %s", strings.ToUpper(s.State), s.Text)
	if s.Host != "" {
		row("host", "%s", s.Host)
	}
	if p := s.Policy; p != nil {
		row("policy", "%s, epoch %d, signed by %s on %s", p.Name, p.Epoch, p.SignedBy, p.SignedAt.UTC().Format(time.RFC3339))
		row("in force", "since %s, %d digests of %d releases and packages", s.Since.UTC().Format(time.RFC3339), s.Entries, s.Sources)
		row("modes", "%s", modeText(s.Modes))
	}
	if s.Scope != "" {
		row("scope", "only %s", s.Scope)
	}
	if s.Mechanism != "" {
		row("by", "%s", s.Mechanism)
	}
	if c := s.Canary; c != nil {
		if c.OK {
			row("proof", "canary at %s: an unlisted program was refused, a listed one ran", c.At.UTC().Format(time.RFC3339))
		} else {
			row("proof", "NONE: %s", c.Error)
		}
	}
	if s.Events != nil {
		row("events", "%d read, %d lost", s.Events.Received, s.Events.Lost)
	}
	if b := s.Bytecode; b.State != "" {
		row("byte code", "%s", bytecodeText(b))
	}
	if s.Floor != "" {
		row("floor", "%s", s.Floor)
	}
	printLink(row, s.Link)
	if n := len(s.Unlisted); n > 0 {
		row("running", "%d processes whose program would not be allowed to start now:", n)
		for _, r := range s.Unlisted[:min(n, 10)] {
			row("", "%d %s", r.PID, r.Program)
		}
	}
	for _, x := range s.Skipped {
		row("not believed", "%s: %s", x.What, x.Why)
	}
	for _, x := range s.Knobs {
		row("setting", "%s is %q, the policy wants %q", x.Name, x.Have, x.Want)
	}
	for _, x := range s.NotCovered {
		row("not covered", "%s: %s (fix: %s)", x.What, x.Why, x.Fix)
	}
	for _, x := range s.Boot {
		row("next boot", "%s", x)
	}
	for _, x := range s.Problems {
		row("problem", "%s", x)
	}
}

// bytecodeText says how far Python's byte code is made.
func bytecodeText(b agent.BytecodeStatus) string {
	out := fmt.Sprintf("of Python: %d modules compiled and authorised", b.Made)
	if b.Pending > 0 {
		out += fmt.Sprintf(", %d to be compiled", b.Pending)
	}
	if b.Left > 0 {
		out += fmt.Sprintf(", %d left to Python", b.Left)
	}
	if b.Why != "" {
		out += "; " + b.State + ": " + b.Why
	}
	return out
}

// modeText groups kinds by their mode.
func modeText(modes map[string]string) string {
	by := map[string][]string{}
	for kind, mode := range modes {
		by[mode] = append(by[mode], kind)
	}
	var out []string
	for _, m := range []string{"enforce", "audit", "off"} {
		if ks := by[m]; len(ks) > 0 {
			slices.Sort(ks)
			out = append(out, m+": "+strings.Join(ks, " "))
		}
	}
	return strings.Join(out, "; ")
}
