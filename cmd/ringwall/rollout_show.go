package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/rollout"
)

func newRolloutPlanCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "plan ID",
		Short: "Show what a rollout would change, and whom it would hit",
		Long: `Shows what the server found when it checked a rollout: its rings and what each
can see at all, what the policy does otherwise, releases that come and go, and
which executables that ran would be refused. Whatever keeps it from being
approved is exit code 1.

JSON: {"id", "phase", "check"}; check is null before it was made`,
		Example: "  ringwall rollout plan /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web/providers/Ringwall.Fleet/rollouts/tuesday",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			x, err := readRollout(c.Context(), client, path)
			if err != nil {
				return err
			}
			return showPlan(e, x)
		},
	}
}

func showPlan(e *env, x *storedRollout) error {
	out := struct {
		ID    string          `json:"id"`
		Phase rollout.Phase   `json:"phase"`
		Check *rollouts.Check `json:"check"`
	}{x.ID, x.r.Status.Phase, x.r.Status.Check}
	if err := e.emit(out, func(w io.Writer) { writePlan(w, x) }); err != nil {
		return err
	}
	if k := out.Check; k != nil && len(k.Problems) > 0 {
		return fmt.Errorf("%d problems are in the way: %w", len(k.Problems), errs.Denied)
	}
	return nil
}

func writePlan(w io.Writer, x *storedRollout) {
	s := x.r.Status
	fmt.Fprintf(w, "%s: %s\n", shown(x.ID), s.Phase)
	k := s.Check
	if k == nil {
		fmt.Fprintln(w, "not checked yet")
		return
	}
	for _, p := range k.Problems {
		fmt.Fprintf(w, "PROBLEM  %s: %s\n", p.Code, p.Text)
	}
	fmt.Fprintf(w, "%d hosts, epoch %d\n", k.Hosts, s.Epoch)
	for i, r := range k.Rings {
		fmt.Fprintf(w, "  ring %d  %-10s %6d hosts, bakes %s; with those before it sees what breaks %s of hosts or more\n",
			i+1, shown(r.Name), r.Count, bakeText(&r.Bake), percent(r.Detectable))
	}
	if k.Base == "" {
		fmt.Fprintln(w, "no manifest that hosts have is known here: nothing to compare with")
	}
	for _, c := range k.Changes {
		fmt.Fprintf(w, "  %-8s %s: %s\n", c.Effect, c.Where, c.Text)
	}
	fmt.Fprintf(w, "releases: %d come, %d go\n", k.Releases.Added, k.Releases.Removed)
	for _, n := range k.Releases.Names {
		fmt.Fprintf(w, "  %s\n", n)
	}
	what := &k.WhatIf
	fmt.Fprintf(w, "of %d executables that ran: %d allowed, %d not known here, %d would be refused from now on\n", what.Asked, what.Allowed, what.Unknown, len(what.Flips)+what.More)
	for _, f := range what.Flips {
		fmt.Fprintf(w, "  %-8s %s on %d hosts: %s", f.Kind, shown(cmp.Or(f.Path, f.SHA256.String())), f.Hosts, f.Reason)
		if f.Waived != "" {
			fmt.Fprintf(w, " (waived: %s)", f.Waived)
		}
		fmt.Fprintln(w)
	}
	if what.More > 0 {
		fmt.Fprintf(w, "  … and %d more\n", what.More)
	}
}

func bakeText(b *rollouts.Bake) string {
	out := []string{time.Duration(b.Time).String()}
	if b.HostHours > 0 {
		out = append(out, fmt.Sprintf("%g host hours", b.HostHours))
	}
	if b.Coverage > 0 {
		out = append(out, percent(b.Coverage)+" of what the next ring runs")
	}
	return strings.Join(out, ", ")
}

func percent(share float64) string { return fmt.Sprintf("%.3g %%", 100*share) }

func newRolloutListCommand(e *env) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "list [SCOPE]",
		Short: "List rollouts that are under way",
		Long: `Lists the rollouts below a scope that are not over, the newest last; with --all
those that are, too.

JSON: {"rollouts": [{"id", "phase", "ring", "rings", "manifest", "epoch", "over"}]}`,
		Example: "  ringwall rollout list\n  ringwall rollout list /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590 --all",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			scope := "/"
			if len(args) > 0 {
				scope = args[0]
			}
			client, path, err := connectFor(e, rolloutCollection(scope)+"/x")
			if err != nil {
				return err
			}
			type line struct {
				ID       string        `json:"id"`
				Phase    rollout.Phase `json:"phase"`
				Ring     int           `json:"ring"`
				Rings    int           `json:"rings"`
				Manifest string        `json:"manifest"`
				Epoch    uint64        `json:"epoch,omitempty"`
				Over     bool          `json:"over,omitempty"`

				since time.Time
			}
			out := struct {
				Rollouts []line `json:"rollouts"`
			}{Rollouts: []line{}}
			err = client.List(c.Context(), strings.TrimSuffix(path, "/x"), func(d json.RawMessage) error {
				x, err := parseRollout(d)
				if err != nil {
					return err
				}
				s := x.r.Status
				if s.Over && !all {
					return nil
				}
				l := line{ID: x.ID, Phase: s.Phase, Ring: s.Ring, Manifest: x.r.Manifest.String(), Epoch: s.Epoch, Over: s.Over, since: s.Since}
				if s.Check != nil {
					l.Rings = len(s.Check.Rings)
				}
				out.Rollouts = append(out.Rollouts, l)
				return nil
			})
			if err != nil {
				return err
			}
			slices.SortStableFunc(out.Rollouts, func(a, b line) int { return a.since.Compare(b.since) })
			return e.emit(out, func(w io.Writer) {
				for _, l := range out.Rollouts {
					fmt.Fprintf(w, "%-13s ring %d of %d  epoch %-6d %s\n", l.Phase, min(l.Ring+1, l.Rings), l.Rings, l.Epoch, shown(l.ID))
				}
			})
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also those that are over")
	return c
}

func newRolloutShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show ID",
		Short:   "Show how a rollout stands, and why it waits",
		Long:    progressHelp("Shows where a rollout stands at this moment: how many hosts of each ring have the\nchange, and what it waits for."),
		Example: "  ringwall rollout show /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web/providers/Ringwall.Fleet/rollouts/tuesday",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, _, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			p, err := progressOf(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			return e.emit(p, func(w io.Writer) { writeProgress(w, p) })
		},
	}
}

func progressHelp(s string) string {
	return s + `

JSON: {"id", "phase", "ring", "manifest", "epoch", "verdict",
"rings": [{"name", "hosts", "online", "admitted", "applied", "refused", "silent", "flipped", "back"}],
"why": [{"verdict", "code", "text", "hosts"}]}`
}

func writeProgress(w io.Writer, p *rollouts.Progress) {
	fmt.Fprintf(w, "%s: %s\n", shown(p.ID.String()), p.Phase)
	for i := range p.Rings {
		r := &p.Rings[i]
		mark := " "
		if i == p.Ring && p.Phase == rollout.Running {
			mark = ">"
		}
		fmt.Fprintf(w, "%s ring %d  %-10s %6d of %d have it, %d online", mark, i+1, shown(r.Name), r.Applied, r.Hosts, r.Online)
		for _, c := range []struct {
			n    int
			what string
		}{{r.Refused, "refused it"}, {r.Flipped, "denied what was allowed"}, {r.Silent, "silent"}, {r.Back, "went back"}} {
			if c.n > 0 {
				fmt.Fprintf(w, ", %d %s", c.n, c.what)
			}
		}
		fmt.Fprintln(w)
	}
	for _, y := range p.Why {
		fmt.Fprintf(w, "  %-4s %s\n", y.Verdict, y.Text)
		if len(y.Hosts) > 0 {
			fmt.Fprintf(w, "       %s\n", strings.Join(y.Hosts, ", "))
		}
	}
}

func newRolloutWatchCommand(e *env) *cobra.Command {
	var interval time.Duration
	c := &cobra.Command{
		Use:   "watch ID",
		Short: "Follow a rollout to its end",
		Long: progressHelp(`Prints how a rollout stands whenever that changes, until it is done or taken back.
Exit code 1 if it was taken back or stopped.`) + "\none line each",
		Example: "  ringwall rollout watch /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web/providers/Ringwall.Fleet/rollouts/tuesday",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, _, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			return watchRollout(c.Context(), e, client, args[0], interval)
		},
	}
	c.Flags().DurationVar(&interval, "interval", time.Second, "look this often")
	return c
}

// watchRollout prints a rollout whenever it changed, to its end. A server that is
// away is waited for.
func watchRollout(ctx context.Context, e *env, client *api.Client, id string, interval time.Duration) error {
	last, away := "", false
	for {
		p, err := progressOf(ctx, client, id)
		switch {
		case err != nil && exitCode(err) != exitOther:
			return err
		case err != nil && ctx.Err() == nil:
			if !away {
				e.notef("%v; goes on when the server is back", err)
			}
			away = true
		case err == nil:
			away = false
			if now := progressKey(p); now != last {
				last = now
				if err := e.line(p, func(w io.Writer) { writeProgress(w, p) }); err != nil {
					return err
				}
			}
			if ended, err := endOf(p); ended {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(interval):
		}
	}
}

// endOf says whether a rollout has come to its end, and whether to a bad one.
func endOf(p *rollouts.Progress) (bool, error) {
	switch p.Phase {
	case rollout.Done:
		return true, nil
	case rollout.RolledBack, rollout.Stopped:
		why := "no reason is on record"
		if len(p.Why) > 0 {
			why = p.Why[0].Text
		}
		return true, fmt.Errorf("%s: %s: %w", p.Phase, why, errs.Denied)
	}
	return false, nil
}

// progressKey is what must change for a line: times that pass are no news.
func progressKey(p *rollouts.Progress) string {
	q := *p
	q.Why = slices.Clone(p.Why)
	for i := range q.Why {
		if q.Why[i].Code == "baking" || q.Why[i].Code == "host-hours" {
			q.Why[i].Text = ""
		}
	}
	b, _ := json.Marshal(q) // of plain fields
	return string(b)
}

// line prints a result in one line of JSON, or as text.
func (e *env) line(v any, text func(io.Writer)) error {
	if !e.json {
		return e.emit(v, text)
	}
	enc := json.NewEncoder(e.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
