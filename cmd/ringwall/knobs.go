package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/host"
)

// knobJSON is a kernel setting as it was found or made.
type knobJSON struct {
	host.KnobResult
	Error string `json:"error,omitempty"`
}

func newKnobsCommand(e *env) *cobra.Command {
	return newGroup("knobs", groupHost, "Check and set the kernel's own protections",
		`Sysctls and boot parameters that stop attacks by themselves. A policy chooses
them in its knobs section; without a policy it is the built-in baseline, parts
of which break things (containers without root, debuggers).`,
		newKnobsRunCommand(e, "check", "Say which settings differ",
			`Changes nothing. Exit code 1 means that a setting differs or is missing.`, false),
		newKnobsRunCommand(e, "apply", "Set what differs, until the next boot",
			`Writes each sysctl that differs and that the policy says to apply (without a
policy: all of them), and reads it back. Values that are to be at least something
are never lowered. Boot parameters are only reported. Exit code 1 means that
something still differs.`, true))
}

func newKnobsRunCommand(e *env, verb, short, long string, apply bool) *cobra.Command {
	var policy string
	c := &cobra.Command{
		Use:   verb,
		Short: short,
		Long: long + `

JSON: {"knobs": [{"name", "boot", "want", "have", "state":
"ok|differs|missing|not-applicable", "applied", "error"}]}`,
		Example: "  ringwall knobs " + verb + "\n  ringwall knobs " + verb + " --policy base.yaml",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			want, leave, err := wantedKnobs(policy)
			if err != nil {
				return err
			}
			k := host.Knobs{Facts: host.Probe()}
			var results []host.KnobResult
			if apply {
				results = append(k.Apply(want), k.Check(leave)...)
			} else {
				results = k.Check(append(want, leave...))
			}
			return reportKnobs(e, results)
		},
	}
	c.Flags().StringVar(&policy, "policy", "", "take the settings from this policy's YAML `FILE`")
	return c
}

// wantedKnobs are those to apply, and those to look at only.
func wantedKnobs(policy string) (apply, leave []host.Knob, err error) {
	if policy == "" {
		return host.DefaultKnobs(), nil, nil
	}
	p, err := loadPolicy(policy)
	if err != nil {
		return nil, nil, err
	}
	for _, k := range p.Knobs {
		h := host.Knob{Name: k.Name, Want: k.Want, Rule: host.KnobRule(k.Rule), Boot: k.Boot, Since: k.Since}
		if k.Apply {
			apply = append(apply, h)
		} else {
			leave = append(leave, h)
		}
	}
	return apply, leave, nil
}

func reportKnobs(e *env, results []host.KnobResult) error {
	out := struct {
		Knobs []knobJSON `json:"knobs"`
	}{Knobs: []knobJSON{}}
	bad, unknown := 0, error(nil)
	for _, r := range results {
		j := knobJSON{KnobResult: r}
		if r.Err != nil {
			j.Error = r.Err.Error()
			unknown = errors.Join(unknown, r.Err)
		}
		if r.State == host.KnobDiffers || r.State == host.KnobMissing {
			bad++
		}
		out.Knobs = append(out.Knobs, j)
	}
	if err := e.emit(out, func(w io.Writer) {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "STATE\tSETTING\tWANT\tHAVE")
		for _, k := range out.Knobs {
			state, name := string(k.State), k.Name
			if k.Applied {
				state = "set"
			}
			if k.Boot {
				name += " (boot)"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", state, name, k.Want, k.Have)
		}
		_ = t.Flush()
	}); err != nil {
		return err
	}
	if bad > 0 {
		return errors.Join(fmt.Errorf("%d of %d settings are not as wanted: %w", bad, len(results), errs.Denied), unknown)
	}
	return unknown
}
