package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func newPolicyDiffCommand(e *env) *cobra.Command {
	var forbid bool
	c := &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say what a change of a policy allows, and what it refuses",
		Long: `Compares what two policies decide, not their text: what is looser in NEW, what is
stricter, and what needs a look. Comments and the order of rules make no
difference. It does not judge whether a looser and a stricter rule make up for
each other; policy simulate does.

With --forbid-looser anything looser is exit code 1, for pipelines where such a
change needs somebody's approval.

JSON: {"changes": [{"effect": "looser|stricter|changed", "where", "text"}]}`,
		Example: `  ringwall policy diff base.yaml base-2.yaml
  ringwall policy diff base.yaml base-2.yaml --forbid-looser`,
		Args: exactly("OLD", "NEW"),
		RunE: func(_ *cobra.Command, args []string) error {
			before, err := loadPolicy(args[0])
			if err != nil {
				return err
			}
			after, err := loadPolicy(args[1])
			if err != nil {
				return err
			}
			out := struct {
				Changes []integrity.Change `json:"changes"`
			}{Changes: append([]integrity.Change{}, integrity.Diff(before, after)...)}
			if err := e.emit(out, func(w io.Writer) {
				for _, x := range out.Changes {
					fmt.Fprintf(w, "%-8s  %s: %s\n", x.Effect, x.Where, x.Text)
				}
				if len(out.Changes) == 0 {
					fmt.Fprintln(w, "they decide alike")
				}
			}); err != nil {
				return err
			}
			looser := 0
			for _, x := range out.Changes {
				if x.Effect == integrity.Looser {
					looser++
				}
			}
			if forbid && looser > 0 {
				return fmt.Errorf("%s is looser in %d places: %w", args[1], looser, errs.Denied)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&forbid, "forbid-looser", false, "exit with 1 if anything is looser")
	return c
}
