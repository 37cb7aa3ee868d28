package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/incidents"
	"ringwall/internal/errs"
	"ringwall/internal/incident"
	"ringwall/internal/resource"
)

func newIncidentCommand(e *env) *cobra.Command {
	return newGroup("incident", groupFleet, "What was blocked in the fleet, and who works on it",
		`Every block reaches the server within seconds and becomes part of an incident:
the same content, for the same reason, is one incident however many hosts it
happens on. An incident is open until somebody acknowledges it; nobody doing so
makes it go up a level, and pages again.

At three in the morning:

  ringwall incident list
  ringwall incident show inc-20310501-k3f9ab
  ringwall incident ack inc-20310501-k3f9ab
  ringwall incident triage inc-20310501-k3f9ab --cause attack --impact none
  ringwall incident mitigate inc-20310501-k3f9ab "host isolated"
  ringwall incident resolve inc-20310501-k3f9ab
  ringwall incident close inc-20310501-k3f9ab`,
		newIncidentListCommand(e), newIncidentShowCommand(e), newIncidentWatchCommand(e), newIncidentAckCommand(e),
		newIncidentTriageCommand(e), newIncidentTextCommand(e, "mitigate", "Say that it does no more harm, and by what",
			"Stops the clock of time to mitigate. If it goes on after that, the incident opens again by itself."),
		newIncidentStepCommand(e, "resolve", "Say that the cause is gone", "If the same is blocked again, the incident opens again by itself."),
		newIncidentStepCommand(e, "close", "End an incident that is resolved and triaged", "What happens after that is another incident."),
		newIncidentTextCommand(e, "comment", "Add a comment", "Comments cannot be changed or taken back."),
		newIncidentSilenceCommand(e), newIncidentAuthoriseCommand(e), newIncidentDenyCommand(e))
}

// incidentDoc is an incident with its place in the tree.
type incidentDoc struct {
	ID         string           `json:"id"`
	Incident   incidents.Stored `json:"properties"`
	ETag       string           `json:"etag,omitempty"`
	Suggestion string           `json:"suggestion,omitempty"`
}

func listIncidents(ctx context.Context, client *api.Client, scope string, keep func(*incidentDoc) bool) ([]*incidentDoc, error) {
	out := []*incidentDoc{}
	err := listBelow(ctx, client, scope, incidents.TypeIncident, func(d *resourceDoc) error {
		x := &incidentDoc{ID: d.ID.String(), ETag: d.ETag}
		if err := d.read(&x.Incident); err != nil {
			return err
		}
		if keep(x) {
			out = append(out, x)
		}
		return nil
	})
	slices.SortFunc(out, func(a, b *incidentDoc) int { return b.Incident.OpenedAt.Compare(a.Incident.OpenedAt) })
	return out, err
}

// findIncident finds one by its name, the beginning of it, or its id.
func findIncident(ctx context.Context, client *api.Client, name string) (*incidentDoc, error) {
	scope := "/"
	if strings.HasPrefix(name, "/") {
		id, err := resource.ParseID(name)
		if err != nil {
			return nil, err
		}
		scope, name = id.Parent().String(), id.Name()
	}
	got, err := listIncidents(ctx, client, scope, func(d *incidentDoc) bool { return strings.HasPrefix(d.Incident.ID, strings.ToLower(name)) })
	switch {
	case err != nil:
		return nil, err
	case len(got) == 0:
		return nil, fmt.Errorf("there is no incident %s: see ringwall incident list --all: %w", shown(name), errs.NotFound)
	case len(got) > 1:
		return nil, fmt.Errorf("%d incidents begin with %s: %w", len(got), shown(name), errs.Conflict)
	}
	return got[0], nil
}

func newIncidentListCommand(e *env) *cobra.Command {
	var scope string
	var all bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List what is going on",
		Long: `Lists incidents that are not closed, the newest first.

JSON: {"incidents": [{"id", "properties": {"id", "title", "state", "severity", …}}]}`,
		Example: "  ringwall incident list\n  ringwall incident list --all --output json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			got, err := listIncidents(c.Context(), client, scope, func(d *incidentDoc) bool { return all || d.Incident.State != incident.Closed })
			if err != nil {
				return err
			}
			out := struct {
				Incidents []*incidentDoc `json:"incidents"`
			}{got}
			return e.emit(out, func(w io.Writer) { writeIncidents(w, e.now(), got, all) })
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "only below this `ID`")
	c.Flags().BoolVar(&all, "all", false, "closed ones too")
	return c
}

func writeIncidents(out io.Writer, now time.Time, list []*incidentDoc, all bool) {
	if len(list) == 0 {
		if all {
			fmt.Fprintln(out, "there was no incident yet")
		} else {
			fmt.Fprintln(out, "nothing is going on")
		}
		return
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "INCIDENT\tSTATE\tSEVERITY\tSINCE\tHOSTS\tBLOCKS\tOWNER\tTITLE")
	for _, d := range list {
		i := &d.Incident
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\n", i.ID, i.State, i.Severity, since(now, i.OpenedAt), i.HostCount(), blocks(i),
			line(cmp.Or(i.Owner, "-")), line(i.Title))
	}
	_ = w.Flush()
}

// since is how long ago something was, roughly.
func since(now, t time.Time) string {
	switch d := now.Sub(t); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

func blocks(i *incidents.Stored) uint64 {
	n := uint64(0)
	for k := range i.Alerts {
		n += i.Alerts[k].Count
	}
	return n
}

func newIncidentShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "show INCIDENT",
		Short: "Show everything about one",
		Long: `Shows what was blocked, where, why, what started it, what people did, how long
that took, and what triage would probably say. A name may be cut short.

JSON: {"id", "properties": the incident, "etag", "suggestion"}; it is the export
of an incident too: evidence in it is never changed.`,
		Example: "  ringwall incident show inc-20310501-k3f9ab\n  ringwall incident show inc-20310501-k3f9ab --output json > evidence.json",
		Args:    exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			d, err := findIncident(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			cause, why := d.Incident.Suggest()
			d.Suggestion = fmt.Sprintf("%s: %s", cause, why)
			return e.emit(d, func(w io.Writer) { writeIncident(w, d, cause) })
		},
	}
}

func writeIncident(w io.Writer, d *incidentDoc, cause incident.Cause) {
	i := &d.Incident
	fmt.Fprintf(w, "%s  %s, %s\n%s\n%s\n\n", i.ID, i.State, i.Severity, line(i.Title), shown(d.ID))
	for k := range i.Alerts {
		writeAlert(w, &i.Alerts[k])
	}
	writeTimes(w, i)
	fmt.Fprintln(w, "timeline")
	for _, t := range i.Timeline {
		fmt.Fprintf(w, "  %s  %-20s %s\n", t.At.UTC().Format(time.DateTime), line(t.By), line(t.What))
	}
	if i.Dropped > 0 {
		fmt.Fprintf(w, "  … and %d more\n", i.Dropped)
	}
	for _, c := range i.Comments {
		fmt.Fprintf(w, "  %s  %-20s “%s”\n", c.At.UTC().Format(time.DateTime), line(c.By), line(c.Text))
	}
	if i.Cause != "" {
		fmt.Fprintf(w, "\ntriage: %s, customer impact %s\n", i.Cause, i.Impact)
		return
	}
	fmt.Fprintf(w, "\nprobably %s\n  ringwall incident triage %s --cause %s --impact none\n", line(d.Suggestion), i.ID, cause)
}

func writeAlert(w io.Writer, a *incident.Alert) {
	s := &a.Sample
	if s.Kind == incident.KindNotice {
		fmt.Fprintf(w, "%s, %d times on %d hosts: %s\n\n", s.Reason, a.Count, len(a.Hosts), line(s.Rule))
		return
	}
	verb := "blocked"
	if s.Mode != "enforce" {
		verb = "would be blocked"
	}
	fmt.Fprintf(w, "%s %s %d times on %d hosts: %s\n", s.Kind, verb, a.Count, len(a.Hosts), shown(s.Path))
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %-8s %s\n", name, line(value))
		}
	}
	row("why", strings.TrimSuffix(s.Reason+", rule "+s.Rule, ", rule "))
	row("sha256", s.SHA256)
	row("signer", cmp.Or(s.Signer, incident.Unsigned))
	row("started", s.Parent)
	row("first", a.First.UTC().Format(time.DateTime)+" on "+cmp.Or(s.Name, s.Host))
	const few = 5
	row("hosts", strings.Join(a.Hosts[:min(few, len(a.Hosts))], ", ")+more(len(a.Hosts)-few))
	if a.Flip {
		row("flip", "the policy before allowed it: the change of policy is the cause")
	}
	fmt.Fprintln(w)
}

// line keeps a text on its line and in its column.
func line(s string) string { return strings.NewReplacer("\n", `\n`, "\t", `\t`).Replace(s) }

func more(n int) string {
	if n <= 0 {
		return ""
	}
	return fmt.Sprintf(" and %d more", n)
}

func writeTimes(w io.Writer, i *incidents.Stored) {
	took := func(name string, t time.Time) {
		if !t.IsZero() {
			fmt.Fprintf(w, "time to %s: %s\n", name, t.Sub(i.OpenedAt).Round(time.Second/10))
		}
	}
	took("page", i.PagedAt)
	took("acknowledge", i.AcknowledgedAt)
	took("mitigate", i.MitigatedAt)
	took("resolve", i.ResolvedAt)
	if i.State == incident.Acknowledged {
		fmt.Fprintf(w, "acknowledged by %s until %s\n", line(i.Owner), i.AckUntil.UTC().Format(time.DateTime))
	}
	for _, o := range i.Outbox {
		if o.Tries > 0 {
			fmt.Fprintf(w, "NOT DELIVERED YET after %d tries: %s\n", o.Tries, line(o.Text))
		}
	}
	fmt.Fprintln(w)
}

// invokeIncident does an action to an incident and shows what it is then.
func invokeIncident(c *cobra.Command, e *env, name, action string, request any) error {
	client, err := connect(e)
	if err != nil {
		return err
	}
	d, err := findIncident(c.Context(), client, name)
	if err != nil {
		return err
	}
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if err := ask(c.Context(), client, api.Request{Method: http.MethodPost, Path: (&url.URL{Path: d.ID + "/" + action}).EscapedPath(), Body: body}, &d.Incident); err != nil {
		return err
	}
	d.ETag = ""
	return e.emit(d, func(w io.Writer) {
		fmt.Fprintf(w, "%s is %s", d.Incident.ID, d.Incident.State)
		if d.Incident.State == incident.Acknowledged {
			fmt.Fprintf(w, " by %s until %s", shown(d.Incident.Owner), d.Incident.AckUntil.UTC().Format(time.DateTime))
		}
		fmt.Fprintln(w)
	})
}

func newIncidentAckCommand(e *env) *cobra.Command {
	var lasts time.Duration
	c := &cobra.Command{
		Use:     "ack INCIDENT",
		Aliases: []string{"acknowledge"},
		Short:   "Say that you work on it",
		Long: `Makes you the owner and stops the pages, for a while: if it is not mitigated by
then, it is open again and pages. Taking over from somebody is done the same way.`,
		Example: "  ringwall incident ack inc-20310501-k3f9ab --for 2h",
		Args:    exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error {
			if lasts < time.Minute || lasts > 24*time.Hour {
				return usage(fmt.Errorf("--for %v: from a minute to a day", lasts))
			}
			return invokeIncident(c, e, args[0], "acknowledge", map[string]int{"minutes": int(lasts.Minutes())})
		},
	}
	c.Flags().DurationVar(&lasts, "for", incident.AckLasts, "how `LONG`")
	return c
}

func newIncidentTriageCommand(e *env) *cobra.Command {
	var cause, impact string
	c := &cobra.Command{
		Use:   "triage INCIDENT --cause CAUSE --impact IMPACT",
		Short: "Say what it was, and what customers felt",
		Long: `The cause: attack, false-positive, unauthorised-change, test or benign. The impact
on customers, which is another question: none, suspected or confirmed. An incident
closes only when both are known; they can be said again until then.`,
		Example: "  ringwall incident triage inc-20310501-k3f9ab --cause false-positive --impact confirmed",
		Args:    exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error {
			return invokeIncident(c, e, args[0], "triage", map[string]string{"cause": cause, "impact": impact})
		},
	}
	f := c.Flags()
	f.StringVar(&cause, "cause", "", "`CAUSE`: attack, false-positive, unauthorised-change, test, benign")
	f.StringVar(&impact, "impact", "", "`IMPACT` on customers: none, suspected, confirmed")
	require(c, "cause", "impact")
	complete := func(flag string, words ...string) {
		_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	}
	complete("cause", string(incident.Attack), string(incident.FalsePositive), string(incident.UnauthorisedChange), string(incident.Test), string(incident.Benign))
	complete("impact", string(incident.NoImpact), string(incident.Suspected), string(incident.Confirmed))
	return c
}

func newIncidentStepCommand(e *env, name, short, long string) *cobra.Command {
	return &cobra.Command{
		Use: name + " INCIDENT", Short: short, Long: long, Example: "  ringwall incident " + name + " inc-20310501-k3f9ab", Args: exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error { return invokeIncident(c, e, args[0], name, struct{}{}) },
	}
}

func newIncidentTextCommand(e *env, name, short, long string) *cobra.Command {
	return &cobra.Command{
		Use: name + " INCIDENT TEXT", Short: short, Long: long, Example: "  ringwall incident " + name + ` inc-20310501-k3f9ab "isolated the host"`,
		Args: exactly("INCIDENT", "TEXT"),
		RunE: func(c *cobra.Command, args []string) error {
			return invokeIncident(c, e, args[0], name, map[string]string{"text": args[1]})
		},
	}
}

func newIncidentSilenceCommand(e *env) *cobra.Command {
	var s incidents.Silence
	var lasts time.Duration
	c := &cobra.Command{
		Use:   "silence SCOPE NAME",
		Short: "Keep something known from paging, for a while",
		Long: `What is silenced is blocked, counted and shown like everything else; nobody is
woken for it. A silence ends by itself, within two weeks. To end it before, delete
its document.

JSON: the document`,
		Example: `  ringwall incident silence /subscriptions/0b1f6471-1bf0-4dda-aec3-cb9272f09590/resourceGroups/web load-test \
    --path /srv/load/ --reason "load test of the first of May" --for 4h`,
		Args: exactly("SCOPE", "NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			s.Until = e.now().Add(lasts).UTC().Truncate(time.Second)
			body, err := json.Marshal(map[string]any{"properties": s})
			if err != nil {
				return err
			}
			client, path, err := connectFor(e, below(args[0], incidents.TypeSilence)+"/"+args[1])
			if err != nil {
				return err
			}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodPut, Path: path, Body: body})
			if err != nil {
				return err
			}
			return printJSON(e, b)
		},
	}
	f := c.Flags()
	f.StringVar(&s.SHA256, "sha256", "", "this `DIGEST`")
	f.StringVar(&s.Signer, "signer", "", "of this `SIGNER`")
	f.StringVar(&s.Path, "path", "", "at this `PATH`, or below it if it ends with a slash")
	f.StringVar(&s.Reason, "reason", "", "`WHY`")
	f.DurationVar(&lasts, "for", time.Hour, "how `LONG`")
	require(c, "reason")
	return c
}

func newIncidentWatchCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:     "watch",
		Short:   "Follow incidents as they open and change",
		Long:    "Prints a line for each change of an incident, from now on; JSON: a line with the document each.",
		Example: "  ringwall incident watch",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			after := uint64(0)
			_, err = listIncidents(c.Context(), client, scope, func(d *incidentDoc) bool {
				n, _ := resource.ParseETag(d.ETag) // 0 for what is none
				after = max(after, n)
				return false
			})
			if err != nil {
				return err
			}
			err = client.Watch(c.Context(), scope, after, func(ev api.Event) error {
				var change struct {
					Document struct {
						ID         string           `json:"id"`
						Type       string           `json:"type"`
						Properties incidents.Stored `json:"properties"`
					} `json:"document"`
				}
				if ev.Name != "change" {
					return nil
				}
				if err := json.Unmarshal(ev.Data, &change); err != nil || !strings.EqualFold(change.Document.Type, incidents.TypeIncident) {
					return nil //nolint:nilerr // something else of the tree
				}
				if e.json {
					_, err := fmt.Fprintf(e.stdout, "%s\n", ev.Data)
					return err
				}
				i := &change.Document.Properties
				last := ""
				if len(i.Timeline) > 0 {
					last = i.Timeline[len(i.Timeline)-1].What
				}
				_, err := fmt.Fprintf(e.stdout, "%s  %-12s %-8s %5d hosts %7d blocks  %s\n", i.ID, i.State, i.Severity, i.HostCount(), blocks(i), line(last))
				return err
			})
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "only below this `ID`")
	return c
}
