package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/api"
	"ringwall/internal/control/hosts"
	"ringwall/internal/errs"
	"ringwall/internal/fleet"
	"ringwall/internal/resource"
)

func newFleetCommand(e *env) *cobra.Command {
	return newGroup("fleet", groupFleet, "Hosts of a server: how they join, and what they get",
		`A host joins with a token that works once, and stands in the tree below the scope
that the token was made for. What hosts run by comes as a bundle: a manifest that
you sign away from the server, with a policy and releases. The server decides who
gets which bundle when, and can make none.

  ringwall fleet join-token make /subscriptions/ID/resourceGroups/web > join.token
  ringwall host join …                          on the host, with that token
  ringwall fleet bundle make base.yaml --keys keys --release releases --out b12
  ringwall fleet bundle push b12
  ringwall rollout …                            brings it to hosts, in rings`,
		newFleetTokenCommand(e), newFleetHostsCommand(e), newFleetBundleCommand(e), newFleetInventoryCommand(e), newFleetCellsCommand(e))
}

// below is the path of the resources of a type in a scope.
func below(scope, kind string) string {
	return strings.TrimSuffix(scope, "/") + "/providers/" + kind
}

// listBelow visits the documents of a type in a scope, and in those below it when
// the scope is the root.
func listBelow(ctx context.Context, client *api.Client, scope, kind string, visit func(*resourceDoc) error) error {
	return client.List(ctx, (&url.URL{Path: below(scope, kind)}).EscapedPath(), func(raw json.RawMessage) error {
		var d resourceDoc
		if err := readAnswer(raw, &d); err != nil {
			return err
		}
		return visit(&d)
	})
}

// resourceDoc is a document as the server sends it.
type resourceDoc struct {
	ID         resource.ID     `json:"id"`
	ETag       string          `json:"etag"`
	Properties json.RawMessage `json:"properties"`
}

// read reads the document's properties.
func (d *resourceDoc) read(v any) error {
	if err := json.Unmarshal(d.Properties, v); err != nil {
		return fmt.Errorf("%s: %w: %w", d.ID, err, errs.Invalid)
	}
	return nil
}

func newFleetHostsCommand(e *env) *cobra.Command {
	return newGroup("hosts", "", "Show hosts, and cut them off",
		`A host is named by the id of its document, by its host id, or by its name where
that is the only one.`,
		newFleetHostsListCommand(e), newFleetHostsShowCommand(e),
		newFleetHostActionCommand(e, "isolate", "Let a host talk to the server only",
			"The host's agent closes its network but for the server, until release. A host that\nis off hears of it when it comes back."),
		newFleetHostActionCommand(e, "release", "Give an isolated host its network back", "Undoes isolate."),
		newFleetHostActionCommand(e, "revoke", "Refuse a host's certificate, for good",
			"The host keeps enforcing what it has, and is served nothing any more. To let the\nmachine in again, delete the document and join anew with another token."))
}

// fetchHosts asks for hosts below a scope.
func fetchHosts(ctx context.Context, client *api.Client, scope, host string) (*hosts.Listing, error) {
	q := url.Values{"below": {scope}}
	if host != "" {
		q.Set("host", host)
	}
	var l hosts.Listing
	if err := ask(ctx, client, api.Request{Method: http.MethodGet, Path: "/ringwall/fleet/hosts?" + q.Encode()}, &l); err != nil {
		return nil, err
	}
	return &l, nil
}

// oneHost finds a host by its document's id, its host id or its name.
func oneHost(ctx context.Context, client *api.Client, name string) (*hosts.View, error) {
	scope := "/"
	if id, err := resource.ParseID(name); err == nil && id.Key() != "" {
		scope = id.String()
	}
	l, err := fetchHosts(ctx, client, scope, name)
	if err != nil {
		return nil, err
	}
	switch len(l.Hosts) {
	case 0:
		return nil, fmt.Errorf("host %s: %w", name, errs.NotFound)
	case 1:
		return &l.Hosts[0], nil
	}
	var all []string
	for i := range l.Hosts {
		all = append(all, l.Hosts[i].Resource.String())
	}
	return nil, hint(fmt.Errorf("%d hosts are named %s: %w", len(all), name, errs.Conflict), "say which: %s", strings.Join(all, ", "))
}

func newFleetHostsListCommand(e *env) *cobra.Command {
	var scope string
	c := &cobra.Command{
		Use:   "list",
		Short: "List hosts and how they stand",
		Long: `Lists hosts with what they say of themselves: the phase and epoch of the manifest
in force, whether they have the one that is meant for them, and what is wrong.

JSON: {"hosts": [{"hostId", "id", "name", "labels", "online", "seen", "assigned",
"report", …}], "counters"}; counters are of what the server refused.`,
		Example: "  ringwall fleet hosts list\n  ringwall fleet hosts list --scope /subscriptions/ID/resourceGroups/web --output json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			l, err := fetchHosts(c.Context(), client, scope, "")
			if err != nil {
				return err
			}
			return e.emit(l, func(w io.Writer) { printHosts(w, l.Hosts) })
		},
	}
	c.Flags().StringVar(&scope, "scope", "/", "list hosts below this `ID`")
	return c
}

func printHosts(w io.Writer, all []hosts.View) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tSTATE\tPHASE\tEPOCH\tMODE\tAGENT\tPROBLEM")
	for i := range all {
		h := &all[i]
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", shown(h.Name), hostState(h), phase(h), h.Report.Epoch, dash(h.Report.Mode), dash(h.Report.Agent), printableLine(problem(h)))
	}
	_ = t.Flush() // to the writer that emit checks
	fmt.Fprintf(w, "%d hosts\n", len(all))
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return shown(s)
}

// printableLine keeps a text of a host within its line.
func printableLine(s string) string {
	if s == "" {
		return "-"
	}
	return strings.Join(strings.Fields(s), " ")
}

func hostState(h *hosts.View) string {
	switch {
	case h.Revoked:
		return "revoked"
	case !h.Online && h.Seen.IsZero():
		return "never seen"
	case !h.Online:
		return "offline"
	case h.Isolated && h.Report.Isolated:
		return "isolated"
	case h.Isolated:
		return "isolating"
	}
	return "online"
}

// phase is where the host stands with the manifest meant for it.
func phase(h *hosts.View) string {
	p := string(h.Report.Phase)
	if p == "" {
		p = "none"
	}
	if h.Assigned != "" && h.Assigned != h.Report.Manifest.String() && h.Report.Phase != fleet.Reverted && h.Report.Phase != fleet.Refused {
		p += ", another is meant for it"
	}
	return p
}

func problem(h *hosts.View) string {
	switch {
	case h.Report.Problem != "":
		return h.Report.Problem
	case h.Report.Reason != "":
		return h.Report.Reason
	case len(h.Report.FailedUnits) > 0:
		return "failed: " + strings.Join(h.Report.FailedUnits, ", ")
	}
	return ""
}

func newFleetHostsShowCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "show HOST",
		Short:   "Show a host, and what it reported last",
		Long:    "Shows one host. With --output json: the host as in hosts list, and \"events\", its\nlast 20 records.",
		Example: "  ringwall fleet hosts show web-1",
		Args:    exactly("HOST"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			h, err := oneHost(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			q := url.Values{"host": {h.Resource.String()}, "limit": {"20"}}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodGet, Path: "/ringwall/fleet/events?" + q.Encode()})
			if err != nil {
				return err
			}
			out := struct {
				hosts.View
				Events []hosts.EventView `json:"events"`
			}{View: *h}
			if err := readAnswer(b, &out); err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) { printHost(w, h, out.Events) })
		},
	}
}

func printHost(w io.Writer, h *hosts.View, events []hosts.EventView) {
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-12s %s\n", name, printableLine(value))
		}
	}
	line("host", h.Name)
	line("document", h.Resource.String())
	line("host id", h.ID)
	line("state", hostState(h))
	line("joined", h.Joined.Format(time.RFC3339))
	if !h.Seen.IsZero() {
		line("heard of", h.Seen.Format(time.RFC3339))
	}
	for _, k := range slices.Sorted(maps.Keys(h.Labels)) {
		line("label", k+"="+h.Labels[k])
	}
	r := &h.Report
	line("phase", phase(h))
	if !r.Manifest.IsZero() {
		line("manifest", fmt.Sprintf("%v, epoch %d, %s", r.Manifest, r.Epoch, r.Mode))
	}
	line("meant for it", h.Assigned)
	if !r.KernelTable.IsZero() {
		line("kernel", "enforces table "+r.KernelTable.String())
	}
	line("agent", r.Agent)
	line("problem", problem(h))
	if r.Dropped > 0 {
		line("dropped", fmt.Sprintf("%d records", r.Dropped))
	}
	if h.Limited+h.Malformed > 0 {
		line("bounds", fmt.Sprintf("%d calls were put off, %d records were not understood", h.Limited, h.Malformed))
	}
	for i := range events {
		v := &events[i]
		line(v.Received.Format("01-02 15:04:05"), strings.TrimSpace(v.What+" "+v.Name+" "+v.Path))
	}
}

func newFleetHostActionCommand(e *env, verb, short, long string) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " HOST",
		Short:   short,
		Long:    long + "\n\nJSON: the properties of the host's document",
		Example: "  ringwall fleet hosts " + verb + " web-1",
		Args:    exactly("HOST"),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := connect(e)
			if err != nil {
				return err
			}
			h, err := oneHost(c.Context(), client, args[0])
			if err != nil {
				return err
			}
			path := (&url.URL{Path: h.Resource.String() + "/" + verb}).EscapedPath()
			var p hosts.HostProperties
			if err := ask(c.Context(), client, api.Request{Method: http.MethodPost, Path: path, Body: []byte("{}")}, &p); err != nil {
				return err
			}
			return e.emit(p, func(w io.Writer) { fmt.Fprintf(w, "%s: %s\n", shown(h.Name), verb) })
		},
	}
}

func newFleetInventoryCommand(e *env) *cobra.Command {
	var scope string
	var within time.Duration
	var limit int
	c := &cobra.Command{
		Use:   "inventory",
		Short: "List what really runs on hosts",
		Long: `Lists every executable that ran on hosts below a scope: content, path, signer, on how
many hosts, since when and until when (to the hour). On most hosts first.

JSON: {"items": [{"sha256", "kind", "path", "signer", "first_seen", "last_seen",
"hosts"}]}`,
		Example: "  ringwall fleet inventory --within 720h\n  ringwall fleet inventory --scope /subscriptions/ID/resourceGroups/web --limit 50",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			q := url.Values{"below": {scope}, "limit": {fmt.Sprint(limit)}}
			if within > 0 {
				q.Set("since", e.now().Add(-within).UTC().Format(time.RFC3339))
			}
			client, err := connect(e)
			if err != nil {
				return err
			}
			b, _, err := client.Do(c.Context(), api.Request{Method: http.MethodGet, Path: "/ringwall/fleet/inventory?" + q.Encode()})
			if err != nil {
				return err
			}
			out := struct {
				Items []fleet.Item `json:"items"`
			}{Items: []fleet.Item{}}
			if err := readAnswer(b, &out); err != nil {
				return err
			}
			return e.emit(out, func(w io.Writer) {
				t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
				fmt.Fprintln(t, "HOSTS\tLAST SEEN\tKIND\tSHA256\tPATH\tSIGNER")
				for _, i := range out.Items {
					fmt.Fprintf(t, "%d\t%s\t%s\t%.12s\t%s\t%s\n", i.Hosts, i.Last.Format("2006-01-02 15h"), shown(i.Kind), i.SHA256, shown(i.Path), dash(i.Signer))
				}
				_ = t.Flush() // to the writer that emit checks
			})
		},
	}
	f := c.Flags()
	f.StringVar(&scope, "scope", "/", "of hosts below this `ID`")
	f.DurationVar(&within, "within", 0, "only what ran within this `TIME` (default: ever)")
	f.IntVar(&limit, "limit", 1000, "at most `N`")
	return c
}
