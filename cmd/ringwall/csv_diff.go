package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ringwall/internal/codesign"
	"ringwall/internal/csv"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

func newCSVDiffCommand(e *env) *cobra.Command {
	var q whatIf
	var events, trees []string
	var limit int
	c := &cobra.Command{
		Use:   "diff OLD NEW --events PATH | --tree DIR",
		Short: "Say which recorded executions a policy change would block",
		Long: `The other way round: the build stays and the policy changes. Judges recorded
executions under both policies and reports what OLD allows and NEW refuses, and
what NEW allows besides.

Executions come from event logs (--events: a file of JSON lines as ringwall
events --output json prints them, a directory of such files, or -), or from the
code below a directory (--tree), such as a host's root. An agent's log holds
what was refused or would have been; a tree also holds what runs every day.

What both policies' hosts have is given by --host-release and --host-package.

Exit code 1 means that NEW would block something that OLD allows; with an audit
policy, that it would log it. ringwall policy diff compares the rules instead.

JSON: {"old", "new", "asked", "blocked": [{"kind", "digest", "paths", "count",
"hosts", "old_rule", "new_rule", "reason", "effect": "blocked|logged|runs"}],
"allowed": [...], "refused_by_both", "skipped": {REASON: COUNT}}`,
		Example: `  ringwall csv diff base-90.yaml base-91.yaml --events events/ --host-release releases
  ringwall csv diff base-90.yaml base-91.yaml --tree / --host-package /var/cache/apt/archives`,
		Args: exactly("OLD", "NEW"),
		RunE: func(c *cobra.Command, args []string) error {
			if len(events)+len(trees) == 0 {
				return usage(errors.New("ringwall csv diff: give --events or --tree"))
			}
			return runCSVDiff(c.Context(), e, q, args, events, trees, limit)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&events, "events", nil, "an event log `PATH`: a file, a directory of .jsonl files, or - ; repeat")
	f.StringArrayVar(&trees, "tree", nil, "the code below `DIR`; repeat")
	f.StringArrayVar(&q.releases, "host-release", nil, "a release record `FILE` that hosts have, or a directory of them; repeat")
	f.StringArrayVar(&q.packages, "host-package", nil, "a Debian package `FILE` that hosts have, or a directory of them; repeat")
	f.StringVar(&q.archive, "host-archive", "", "the `NAME` of the archive that the packages come from (default: the policy's only one)")
	f.IntVar(&limit, "limit", 50, "print at most `N` of each sort as text; 0 prints all")
	return c
}

func runCSVDiff(ctx context.Context, e *env, q whatIf, policies, events, trees []string, limit int) error {
	uses := csv.NewUses()
	for _, p := range events {
		if err := readEventPath(e, uses, p); err != nil {
			return err
		}
	}
	for _, dir := range trees {
		t := &tree{root: dir, ctx: ctx, e: e}
		contents, err := measure(t, codesign.Options{})
		if err != nil {
			return err
		}
		if len(t.unread) > 0 {
			return codedError{csv.ExitHold, fmt.Errorf("%d files of %s could not be read, the first: %s", len(t.unread), dir, t.unread[0])}
		}
		for _, m := range contents {
			for _, k := range integrity.Kinds() {
				if !m.Kinds.Has(k) {
					continue
				}
				for _, p := range m.paths {
					if err := uses.Add(integrity.Key{Digest: m.Digest}, k, p, "", 1); err != nil {
						return err
					}
				}
			}
		}
	}
	cache := packageCache{}
	var compiled []*integrity.Compiled
	for _, p := range policies {
		one := q
		one.policy = p
		live, err := one.live(ctx, e, cache)
		if err != nil {
			return err
		}
		c, err := integrity.Compile(live.Policy, live.Sources, integrity.CompileOptions{Now: e.now()})
		if err != nil {
			return err
		}
		compiled = append(compiled, c)
	}
	out := uses.Compare(compiled[0], compiled[1], e.now())
	if err := e.emit(out, func(w io.Writer) { writeChange(w, out, limit) }); err != nil {
		return codedError{csv.ExitInternal, err}
	}
	if n := len(out.Blocked); n > 0 {
		return codedError{csv.ExitBlock, fmt.Errorf("%s refuses %d uses that %s allows", policies[1], n, policies[0])}
	}
	return nil
}

func readEventPath(e *env, uses *csv.Uses, path string) error {
	if path == "-" {
		return uses.ReadEvents(e.stdin)
	}
	files, err := filesOf(path, ".jsonl")
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	if len(files) == 0 {
		return fmt.Errorf("events of %s: no file ends in .jsonl: %w", path, errs.NotFound)
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("events: %w", err)
		}
		err = uses.ReadEvents(f)
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func writeChange(w io.Writer, c *csv.Change, limit int) {
	list := func(flips []csv.Flip) {
		for i, f := range flips {
			if limit > 0 && i == limit {
				fmt.Fprintf(w, "… and %d more (--limit 0 prints all)\n", len(flips)-i)
				return
			}
			name := f.Digest
			if len(f.Paths) > 0 {
				name = shown(f.Paths[0])
			}
			fmt.Fprintf(w, "%-8s %-8s %s", f.Effect, f.Kind, name)
			if n := len(f.Paths) - 1; n > 0 {
				fmt.Fprintf(w, " and %d other names", n)
			}
			fmt.Fprintf(w, ", %d times", f.Count)
			if f.Hosts > 0 {
				fmt.Fprintf(w, " on %d hosts", f.Hosts)
			}
			fmt.Fprintf(w, ": %s", f.Reason)
			if f.OldRule != "" && f.Effect != "runs" {
				fmt.Fprintf(w, "; so far allowed by rule %s", shown(f.OldRule))
			}
			fmt.Fprintln(w)
		}
	}
	list(c.Blocked)
	list(c.Allowed)
	fmt.Fprintf(w, "%s to %s: %d uses asked, %d newly refused, %d newly allowed, %d refused by both\n",
		c.Old, c.New, c.Asked, len(c.Blocked), len(c.Allowed), c.Both)
	var skipped []string
	for _, reason := range sortedKeys(c.Skipped) {
		skipped = append(skipped, fmt.Sprintf("%s %d", reason, c.Skipped[reason]))
	}
	if len(skipped) > 0 {
		fmt.Fprintf(w, "not about content: %s\n", strings.Join(skipped, ", "))
	}
}
