package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// hostDirs are the directories that the commands of a host share.
type hostDirs struct {
	state, run string
}

func (d *hostDirs) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&d.state, "state", agent.DefaultStateDir, "state directory of this host")
	f.StringVar(&d.run, "run", agent.DefaultRunDir, "directory of the control socket and the kernel pins")
}

// newAgentCommand runs the agent. It must stay `ringwall agent`: the kernel
// gives the agent's role to this binary only when its first argument is that
// word, so that no other command can touch what is guarded.
func newAgentCommand(e *env) *cobra.Command {
	var d hostDirs
	var early, noBytecode bool
	c := &cobra.Command{
		Use: "agent", GroupID: groupHost, Short: "Enforce this host's policy (run by systemd)",
		Long: `Put this host's confirmed policy into the kernel, prove with a canary that it
acts, report events, and answer the other commands, until it is told to stop.

What is in the kernel stays in force when the agent stops or is killed; a new
one takes over without a gap. ` + "`ringwall host install`" + ` makes a systemd unit of it.

While the policy enforces, it also compiles in the background the Python sources
that packages brought: no package lists Python's byte code, so nothing else
vouches for it. ` + "`ringwall status`" + ` says how far that is.`,
		Example: `  ringwall host init --trust keys --policy base.policy.json
  ringwall agent`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			program, err := os.Executable()
			if err != nil {
				return err
			}
			a, err := agent.New(agentHooks(agent.Options{
				Program: program, StateDir: d.state, RunDir: d.run, Now: e.now, Open: openEngine, NoBytecode: noBytecode,
				Log: slog.New(slog.NewTextHandler(e.stderr, nil)),
			}))
			if err != nil {
				return err
			}
			if early {
				if err := agent.MeasureEarly(d.state); err != nil { // what is enforced does not depend on it
					e.notef("the kernel does not measure what runs: %v", err)
				}
				return a.Early(c.Context())
			}
			a.Prove(c.Context(), &agent.Attester{Prover: host.NewProver("")})
			if err := a.Run(c.Context()); err != nil || !a.Upgraded() {
				return err
			}
			// the new agent in the same process, for the service manager and the kernel's guards
			return fmt.Errorf("execute the new agent: %w", syscall.Exec(program, os.Args, os.Environ())) //nolint:gosec // installed and judged by the agent
		},
	}
	d.flags(c)
	c.Flags().BoolVar(&noBytecode, "no-bytecode", false, "leave Python's byte code alone: python3 then compiles each source at each start")
	c.Flags().BoolVar(&early, "early", false, "put the policy into the kernel and end (for the initramfs)")
	return c
}

// needRoot says early and plainly what would fail later in a strange place.
func needRoot(what string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return hint(fmt.Errorf("%s: only root can: %w", what, errs.Denied), "run it with sudo")
}

// noAgent tells an agent that does not answer from one that refuses.
func noAgent(err error) bool {
	return errors.Is(err, errs.NotFound) && err != nil
}
