package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
	"ringwall/internal/rollout"
)

func newRolloutCommand(e *env) *cobra.Command {
	return newGroup("rollout", groupFleet, "Bring a policy and its releases to hosts, ring by ring",
		`A rollout gives the hosts of a scope a manifest, some of them first. What those
show decides whether the next get it: the server waits, goes on, or takes it
back, and says why. A manifest and the way back from it are made and signed
elsewhere, see ringwall fleet bundle.

  start      says what, where and in which rings; the server checks it
  plan       shows what it would change and whom it would hit
  approve    by somebody else than who started it; then it begins
  watch      shows it live, with the reason why it waits
  halt       stops every rollout of a scope at once`,
		newRolloutStartCommand(e), newRolloutPlanCommand(e), newRolloutListCommand(e), newRolloutShowCommand(e), newRolloutWatchCommand(e),
		newRolloutActionCommand(e, "approve", "Consent to what was checked, and beforehand to going back",
			`Approves a rollout that was checked. Who started it does not count. An emergency
needs two people. With it the way back is approved too: when the change does
harm, nobody is asked.`, false),
		newRolloutActionCommand(e, "pause", "Give the change to nobody else for now",
			"Hosts that have the change keep it. resume goes on. Harm is still seen, and the change taken back.", false),
		newRolloutActionCommand(e, "resume", "Go on after a pause", "Goes on after a pause.", false),
		newRolloutActionCommand(e, "promote", "Let the ring go on without the rest of its bake",
			`Ends the bake of the ring that is under way. Harm, halts and freezes stay in the
way. Who started the rollout cannot shorten its bake.`, true),
		newRolloutActionCommand(e, "rollback", "Send the hosts back to what they had",
			`Sends every host that got the change back, also after the rollout is done, and
ends one that has not begun. Nobody has to approve it.`, false),
		newRolloutHaltCommand(e), newRolloutUnhaltCommand(e))
}

// rolloutCollection is where the rollouts of a scope are.
func rolloutCollection(scope string) string {
	return below(scope, fleet.TypeRollout)
}

type rolloutStart struct {
	scope, manifest, rollback, spec, reason, emergency string
	until                                              time.Duration
	noRollback                                         bool
	selector                                           []string
	maxUnavailable                                     int
}

func newRolloutStartCommand(e *env) *cobra.Command {
	var o rolloutStart
	c := &cobra.Command{
		Use:   "start NAME --scope SCOPE --manifest SHA256",
		Short: "Propose a rollout and have it checked",
		Long: `Stores a rollout below a scope, starts it and waits until the server has checked
it: that hosts can take the manifest and the way back, what it changes, whom it
hits. Nothing moves before somebody else has approved it. Whatever is in the way
is exit code 1.

Without rings, hosts get it in the usual ones (1, 5, 25, 100 percent), as far as
there are hosts for them. A file with --spec says more:

{"rings": [{"name": "canary", "percent": 5, "bake": {"time": "30m", "coverage": 0.5}},
           {"name": "all", "percent": 100}],
 "limits": {"flip_hosts": 1}, "waive": [{"sha256": "…", "reason": "…"}],
 "probes": [{"name": "errors", "url": "http://prometheus:9090", "query": "…", "max": 0.01, "no_data": "hold"}]}

JSON: as ringwall rollout plan`,
		Example: `  ringwall rollout start tuesday --scope /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web --manifest 5e…  --rollback 9a…
  ringwall rollout start urgent --scope /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590 --manifest 5e… --rollback 9a… --emergency "CVE-2031-1" --within 4h`,
		Args: exactly("NAME"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), e, args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.scope, "scope", "", "`ID` of the place in the tree whose hosts it is for")
	f.StringVar(&o.manifest, "manifest", "", "`SHA256` of the signed manifest")
	f.StringVar(&o.rollback, "rollback", "", "`SHA256` of the signed manifest that undoes it")
	f.BoolVar(&o.noRollback, "no-rollback", false, "there is no way back: harm stops the rollout, and hosts keep the change")
	f.StringVar(&o.spec, "spec", "", "`FILE` that says more, as JSON; - for standard input")
	f.StringVar(&o.reason, "reason", "", "`TEXT` for people")
	f.StringArrayVar(&o.selector, "label", nil, "only hosts with the label `KEY=VALUE`; repeat")
	f.IntVar(&o.maxUnavailable, "max-unavailable", 0, "at most `N` hosts at a time (default: no bound)")
	f.StringVar(&o.emergency, "emergency", "", "`REASON` why rings and bake are left out; two people must approve")
	f.DurationVar(&o.until, "within", 4*time.Hour, "with --emergency: it ends after this `TIME`")
	require(c, "scope")
	return c
}

func (o *rolloutStart) read(e *env) (*rollouts.Spec, error) {
	var s rollouts.Spec
	if o.spec != "" {
		b, err := readInputFile(e, o.spec, resource.MaxProperties)
		if err != nil {
			return nil, err
		}
		dec := json.NewDecoder(strings.NewReader(string(b)))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&s); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", o.spec, err, errs.Invalid)
		}
	}
	if o.manifest != "" {
		d, err := integrity.ParseDigest(o.manifest)
		if err != nil {
			return nil, fmt.Errorf("--manifest: %w", err)
		}
		s.Manifest = d
	}
	if o.rollback != "" {
		d, err := integrity.ParseDigest(o.rollback)
		if err != nil {
			return nil, fmt.Errorf("--rollback: %w", err)
		}
		s.Rollback = &d
	}
	if s.Manifest.IsZero() {
		return nil, usage(errors.New("ringwall rollout start: --manifest is missing"))
	}
	if s.NoRollback = s.NoRollback || o.noRollback; s.Rollback == nil && !s.NoRollback {
		return nil, usage(errors.New("ringwall rollout start: --rollback is missing; if there is no way back, say --no-rollback"))
	}
	for _, l := range o.selector {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return nil, usage(fmt.Errorf("--label %q: want KEY=VALUE", l))
		}
		if s.Selector == nil {
			s.Selector = map[string]string{}
		}
		s.Selector[k] = v
	}
	if o.reason != "" {
		s.Reason = o.reason
	}
	if o.maxUnavailable != 0 {
		s.MaxUnavailable = o.maxUnavailable
	}
	if o.emergency != "" {
		s.Emergency = &rollouts.Emergency{Reason: o.emergency, Until: e.now().Add(o.until).UTC().Truncate(time.Second)}
	}
	return &s, nil
}

func (o *rolloutStart) run(ctx context.Context, e *env, name string) error {
	spec, err := o.read(e)
	if err != nil {
		return err
	}
	return startRollout(ctx, e, o.scope, name, spec)
}

// startRollout stores a rollout, starts it and shows what the server found.
func startRollout(ctx context.Context, e *env, scope, name string, spec *rollouts.Spec) error {
	client, path, err := connectFor(e, rolloutCollection(scope)+"/"+name)
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]any{"properties": spec})
	if err != nil {
		return err
	}
	if _, _, err := client.Do(ctx, api.Request{Method: http.MethodPut, Path: path, Body: body}); err != nil {
		return err
	}
	if _, _, err := client.Do(ctx, api.Request{Method: http.MethodPost, Path: path + "/start", Body: []byte("{}")}); err != nil {
		return err
	}
	return waitForCheck(ctx, e, client, path)
}

// waitForCheck shows what the server found, as soon as it has.
func waitForCheck(ctx context.Context, e *env, client *api.Client, path string) error {
	const most = 5 * time.Minute
	limit, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		x, err := readRollout(limit, client, path)
		if err != nil {
			return err
		}
		if x.r.Status != nil && x.r.Status.Check != nil {
			return showPlan(e, x)
		}
		select {
		case <-limit.Done():
			return fmt.Errorf("%s: not checked within %s; see ringwall rollout plan later: %w", shown(x.ID), most, limit.Err())
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// stored is a rollout as the server has it.
type storedRollout struct {
	ID         string          `json:"id"`
	Properties json.RawMessage `json:"properties"`
	r          rollouts.Rollout
}

func parseRollout(b []byte) (*storedRollout, error) {
	var x storedRollout
	err := json.Unmarshal(b, &x)
	if err == nil {
		err = json.Unmarshal(x.Properties, &x.r)
	}
	if err != nil {
		return nil, fmt.Errorf("the server's answer: %w: %w", err, errs.Invalid)
	}
	if x.r.Status == nil {
		x.r.Status = &rollouts.Status{State: rollout.State{Phase: rollout.Draft}}
	}
	return &x, nil
}

func readRollout(ctx context.Context, client *api.Client, path string) (*storedRollout, error) {
	b, _, err := client.Do(ctx, api.Request{Method: http.MethodGet, Path: path})
	if err != nil {
		return nil, err
	}
	return parseRollout(b)
}

func newRolloutActionCommand(e *env, action, short, long string, needsReason bool) *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: action + " ID", Short: short, Long: long + "\n\nJSON: {\"id\", \"phase\"}",
		Example: "  ringwall rollout " + action + " /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web/providers/Ringwall.Fleet/rollouts/tuesday",
		Args:    exactly("ID"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, args[0])
			if err != nil {
				return err
			}
			body, err := json.Marshal(map[string]string{"reason": reason})
			if err != nil {
				return err
			}
			var s rollouts.Status
			if err := ask(c.Context(), client, api.Request{Method: http.MethodPost, Path: path + "/" + action, Body: body}, &s); err != nil {
				return err
			}
			out := struct {
				ID    string        `json:"id"`
				Phase rollout.Phase `json:"phase"`
			}{args[0], s.Phase}
			return e.emit(out, func(w io.Writer) {
				fmt.Fprintf(w, "%s: %s\n", shown(out.ID), out.Phase)
				if action == "approve" && s.Approval != nil && s.Approval.Emergency && len(s.Approval.Approvers) < 2 {
					fmt.Fprintln(w, "an emergency needs a second approval")
				}
			})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "`TEXT` for people and the audit log")
	if needsReason {
		require(c, "reason")
		c.Example += ` --reason "seen enough"`
	}
	return c
}

func newRolloutHaltCommand(e *env) *cobra.Command {
	var name, reason, zone string
	var within time.Duration
	var weekly []string
	c := &cobra.Command{
		Use:   "halt SCOPE --reason TEXT",
		Short: "Stop the line: no rollout that touches a scope goes on",
		Long: `Stops every rollout whose hosts can be among a scope's: nobody is admitted once
the server has said yes. Hosts that have a change keep it, harm is still seen,
and going back is never stopped. / stops all of them. unhalt ends it.

With --weekly it is a freeze instead: it holds at these times of each week, and
an emergency passes it.

JSON: {"id"}`,
		Example: `  ringwall rollout halt / --reason "the data centre is on fire"
  ringwall rollout halt /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590 --name weekend --reason "nobody is there" --weekly "fri 16:00-24:00" --weekly "sat,sun 00:00-24:00" --time-zone Europe/Berlin`,
		Args: exactly("SCOPE"),
		RunE: func(c *cobra.Command, args []string) error {
			h := rollouts.Halt{Reason: reason, TimeZone: zone}
			if within != 0 {
				h.Until = e.now().Add(within).UTC().Truncate(time.Second)
			}
			for _, s := range weekly {
				w, err := parseWindow(s)
				if err != nil {
					return err
				}
				h.Weekly = append(h.Weekly, w)
			}
			body, err := json.Marshal(map[string]any{"properties": h})
			if err != nil {
				return err
			}
			id := haltID(args[0], name)
			client, path, err := connectFor(e, id)
			if err != nil {
				return err
			}
			if _, _, err := client.Do(c.Context(), api.Request{Method: http.MethodPut, Path: path, Body: body}); err != nil {
				return err
			}
			out := struct {
				ID string `json:"id"`
			}{id}
			return e.emit(out, func(w io.Writer) { fmt.Fprintf(w, "%s holds\n", shown(id)) })
		},
	}
	f := c.Flags()
	f.StringVar(&name, "name", "stop", "`NAME` of the halt, for unhalt")
	f.StringVar(&reason, "reason", "", "`TEXT` for people and the audit log")
	f.DurationVar(&within, "within", 0, "it ends by itself after this `TIME` (default: when unhalt ends it)")
	f.StringArrayVar(&weekly, "weekly", nil, "a `WINDOW` of each week, such as \"fri 16:00-24:00\"; repeat")
	f.StringVar(&zone, "time-zone", "", "`ZONE` of --weekly, such as Europe/Berlin (default: UTC)")
	require(c, "reason")
	return c
}

// parseWindow reads "sat,sun 00:00-24:00"; the server looks at what it says.
func parseWindow(s string) (rollouts.Window, error) {
	days, times, ok := strings.Cut(s, " ")
	from, to, ok2 := strings.Cut(strings.TrimSpace(times), "-")
	if !ok || !ok2 {
		return rollouts.Window{}, usage(fmt.Errorf("--weekly %q: want such as \"fri 16:00-24:00\"", s))
	}
	return rollouts.Window{Days: strings.Split(days, ","), From: from, To: to}, nil
}

func haltID(scope, name string) string {
	return below(scope, fleet.TypeHalt) + "/" + name
}

func newRolloutUnhaltCommand(e *env) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use: "unhalt SCOPE", Short: "Let rollouts of a scope go on",
		Long:    "Removes a halt or a freeze. What is halted elsewhere, above or below, stays halted.",
		Example: "  ringwall rollout unhalt /",
		Args:    exactly("SCOPE"),
		RunE: func(c *cobra.Command, args []string) error {
			client, path, err := connectFor(e, haltID(args[0], name))
			if err != nil {
				return err
			}
			_, _, err = client.Do(c.Context(), api.Request{Method: http.MethodDelete, Path: path})
			return err
		},
	}
	c.Flags().StringVar(&name, "name", "stop", "`NAME` of the halt")
	return c
}

// progressOf asks how a rollout stands at this moment.
func progressOf(ctx context.Context, client *api.Client, id string) (*rollouts.Progress, error) {
	var p rollouts.Progress
	if err := ask(ctx, client, api.Request{Method: http.MethodGet, Path: progressPath + "?" + url.Values{"id": {id}}.Encode()}, &p); err != nil {
		return nil, err
	}
	return &p, nil
}
