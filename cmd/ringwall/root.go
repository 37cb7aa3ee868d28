package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ringwall/internal/strictyaml"
)

// The sections of `ringwall --help`.
const (
	groupSign   = "sign"
	groupPolicy = "policy"
	groupHost   = "host"
	groupFleet  = "fleet"
)

// commands lists every noun. A new one is added here and nowhere else.
func commands(e *env) []*cobra.Command {
	return []*cobra.Command{
		newKeyCommand(e),
		newSignCommand(e),
		newGateCommand(e),
		newSignerCommand(e),
		newVerifyCommand(e),
		newLogCommand(e),
		newCatalogueCommand(e),
		newImageCommand(e),
		newExportCommand(e),
		newCSVCommand(e),
		newPolicyCommand(e),
		newKnobsCommand(e),
		newAttestCommand(e),
		newHostCommand(e),
		newAgentCommand(e),
		newStatusCommand(e),
		newEventsCommand(e),
		newPackagesCommand(e),
		newPermitCommand(e),
		newServerCommand(e),
		newLoginCommand(e),
		newLogoutCommand(e),
		newWhoamiCommand(e),
		newUserCommand(e),
		newGroupCommand(e),
		newCertCommand(e),
		newRoleCommand(e),
		newCanCommand(e),
		newResourceCommand(e),
		newTokenCommand(e),
		newRolloutCommand(e),
		newAuditCommand(e),
		newFleetCommand(e),
		newIncidentCommand(e),
		newVersionCommand(e),
		newManCommand(e),
		newExitCodesTopic(),
	}
}

func newRootCommand(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "ringwall",
		Short: "Only authorised software runs",
		Long: `Ringwall decides what may run on your Linux hosts. Builds are signed, a signed
policy says whose builds run where, and the kernel refuses everything else.`,
		Example: `  ringwall key init keys --name "Example Fleet"
  ringwall sign ./edged_4.7.0_amd64.deb --keys keys --epoch 1
  ringwall policy init --keys keys --name base > base.yaml
  ringwall policy explain /usr/bin/ls --policy base.yaml`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs,
		RunE:          needSubcommand,

		DisableFlagsInUseLine:      true,
		SuggestionsMinimumDistance: 2,
	}
	var output string
	f := root.PersistentFlags()
	f.StringVar(&output, "output", "text", "how to print results: text, or json (stable, for programs)")
	f.BoolVarP(&e.quiet, "quiet", "q", false, "print results and errors only, no progress and no advice")
	complete(root, "output", "text", "json")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		switch output {
		case "text":
		case "json":
			e.json = true
		default:
			return usage(fmt.Errorf("--output %q: want text or json", output))
		}
		return nil
	}
	root.SetFlagErrorFunc(explainFlag)
	root.AddGroup(
		&cobra.Group{ID: groupSign, Title: "Sign and verify:"},
		&cobra.Group{ID: groupPolicy, Title: "Say what may run:"},
		&cobra.Group{ID: groupHost, Title: "On a host:"},
		&cobra.Group{ID: groupFleet, Title: "The fleet's server:"},
	)
	root.AddCommand(commands(e)...)
	return root
}

// newGroup makes a command that only holds others.
func newGroup(use, group, short, long string, subcommands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, GroupID: group, Short: short, Long: long,
		Args: cobra.ArbitraryArgs, RunE: needSubcommand, DisableFlagsInUseLine: true, SuggestionsMinimumDistance: 2,
	}
	c.AddCommand(subcommands...)
	return c
}

// needSubcommand answers a command that needs another word: with its help when
// nothing was typed, with a suggestion when it was misspelt.
func needSubcommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	msg := fmt.Sprintf("%s has no command %q", c.CommandPath(), args[0])
	if s := c.SuggestionsFor(args[0]); len(s) > 0 {
		msg += "; did you mean " + strings.Join(s, " or ") + "?"
	} else {
		msg += "; see " + c.CommandPath() + " --help"
	}
	return usage(fmt.Errorf("%s", msg))
}

// explainFlag says more about a flag that cannot be read than that it is unknown.
func explainFlag(c *cobra.Command, err error) error {
	if c.HasSubCommands() && c.Flags().NArg() > 0 {
		return needSubcommand(c, c.Flags().Args()) // the flag belongs to a command that is misspelt
	}
	typed, unknown := strings.CutPrefix(err.Error(), "unknown flag: --")
	if !unknown {
		return usage(fmt.Errorf("%s: %w", c.CommandPath(), err))
	}
	best, distance := "", 3
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if d := strictyaml.Distance(typed, f.Name, distance); d < distance || len(typed) > 2 && best == "" && strings.HasPrefix(f.Name, typed) {
			best, distance = f.Name, d
		}
	})
	if best != "" {
		return usage(fmt.Errorf("%s has no flag --%s; did you mean --%s?", c.CommandPath(), typed, best))
	}
	return usage(fmt.Errorf("%s has no flag --%s; see %[1]s --help", c.CommandPath(), typed))
}

// watchStart makes every command below c note that it began.
func watchStart(c *cobra.Command) *bool {
	running := new(bool)
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if begin := c.RunE; begin != nil {
			c.RunE = func(c *cobra.Command, args []string) error {
				*running = true
				return begin(c, args)
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(c)
	return running
}

// exactly wants as many arguments as there are names.
func exactly(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		if len(args) < len(names) {
			return fmt.Errorf("%s: %s is missing; see %[1]s --help", c.CommandPath(), names[len(args)])
		}
		return fmt.Errorf("%s: %q is one argument too many; see %[1]s --help", c.CommandPath(), args[len(names)])
	}
}

// require marks flags that must be given.
func require(c *cobra.Command, names ...string) {
	for _, n := range names {
		if err := c.MarkFlagRequired(n); err != nil {
			panic(err) // no such flag: found by any test that makes the command
		}
	}
}

// complete gives a flag's values to the shell's completion.
func complete(c *cobra.Command, flag string, values ...string) {
	if err := c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // no such flag
	}
}
