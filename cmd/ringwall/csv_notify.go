package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/csv"
	"ringwall/internal/notify"
)

// csvNotify says whom to tell of a build that must not ship.
type csvNotify struct {
	config, state, ownersFile string
	owners                    []string
	again                     time.Duration
}

func (n *csvNotify) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&n.config, "notify", "", "tell the owners, as this YAML `FILE` says (docs/ops/csv-in-ci.md)")
	f.StringVar(&n.state, "notify-state", "", "remember in `FILE` what was told, so that the next run does not repeat it")
	f.DurationVar(&n.again, "notify-again", 24*time.Hour, "tell the same once more after this; 0: never")
	f.StringArrayVar(&n.owners, "owner", nil, "an owner's `NAME` or mail address; repeat (default: of --owners)")
	f.StringVar(&n.ownersFile, "owners", "", "a CODEOWNERS or OWNERS `FILE` whose patterns are paths in the build")
}

// load reads the configuration before anything long begins.
func (n *csvNotify) load() ([]notify.Target, *notify.Owners, error) {
	if n.config == "" {
		if n.state != "" || n.ownersFile != "" || len(n.owners) > 0 {
			return nil, nil, usage(errors.New("--notify-state, --owner and --owners need --notify"))
		}
		return nil, nil, nil
	}
	targets, err := notify.Load(n.config)
	if err != nil {
		return nil, nil, err
	}
	owners := &notify.Owners{}
	if n.ownersFile != "" {
		doc, err := readBounded(n.ownersFile, maxBundleFile)
		if err != nil {
			return nil, nil, fmt.Errorf("owners: %w", err)
		}
		if owners, err = notify.ParseOwners(doc); err != nil {
			return nil, nil, err
		}
	}
	return targets, owners, nil
}

// csvEvent is what programs get of a report.
type csvEvent struct {
	Outcome      csv.Severity      `json:"outcome"`
	Artefact     csv.ArtefactInfo  `json:"artefact"`
	Hosts        int               `json:"hosts"`
	HostsBlocked int               `json:"hosts_blocked"`
	Findings     []csvEventFinding `json:"findings"`
	More         int               `json:"more"` // findings that are left out
}

type csvEventFinding struct {
	ID       csv.ID       `json:"id"`
	Severity csv.Severity `json:"severity"`
	Cause    string       `json:"cause"`
	Fix      string       `json:"fix"`
	Members  int          `json:"members"`
	Examples []string     `json:"examples"`
	Hosts    int          `json:"hosts"`
}

// Bounds of a notification: what people read, not the report.
const (
	toldFindings = 20
	toldExamples = 5
)

// tell sends what stops a build to its owners, and remembers when it is well.
func (n *csvNotify) tell(ctx context.Context, e *env, targets []notify.Target, owners *notify.Owners, r *csv.Report, strict bool) error {
	if len(targets) == 0 {
		return nil
	}
	out := notify.Notifier{Targets: targets, State: n.state, Again: n.again, Now: e.now}
	subject := r.Artefact.Package
	if subject == "" {
		subject = r.Artefact.Name
		if r.Release != nil {
			subject = r.Release.Product
		}
	}
	if r.Exit(strict) == csv.ExitPass {
		return out.Resolve(subject)
	}
	m := csvMessage(r, subject)
	m.At = e.now()
	if m.Owners = n.owners; len(m.Owners) == 0 {
		m.Owners = owners.Of(toldPaths(r))
	}
	done, err := out.Notify(ctx, m)
	for _, t := range done.Sent {
		e.notef("told %s (%s)", strings.Join(m.Owners, ", "), t)
	}
	for _, t := range done.Skipped {
		e.notef("told already (%s)", t)
	}
	return err
}

// toldPaths are the members that stop the build.
func toldPaths(r *csv.Report) []string {
	var out []string
	for _, f := range r.Findings {
		if f.Severity != csv.Block && f.Severity != csv.Hold {
			continue
		}
		for _, m := range f.Members {
			out = append(out, m.Paths...)
		}
	}
	return out
}

func csvMessage(r *csv.Report, subject string) *notify.Message {
	kind := map[csv.Severity]string{csv.Block: "blocked", csv.Hold: "undecided", csv.Warn: "warned"}[r.Outcome]
	event := csvEvent{Outcome: r.Outcome, Artefact: r.Artefact, Hosts: r.Hosts, HostsBlocked: r.HostsBlocked, Findings: []csvEventFinding{}}
	var text strings.Builder
	fmt.Fprintf(&text, "%s: %s\nsha256 %s\n", r.Artefact.Name, r.Sentence(), r.Artefact.SHA256)
	for _, f := range r.Findings {
		if f.Severity == csv.Note || f.Severity == csv.Warn && r.Outcome != csv.Warn {
			continue
		}
		if len(event.Findings) == toldFindings {
			event.More++
			continue
		}
		x := csvEventFinding{f.ID, f.Severity, f.Cause, f.Fix, len(f.Members), []string{}, f.Hosts}
		for _, m := range f.Members[:min(toldExamples, len(f.Members))] {
			x.Examples = append(x.Examples, m.Paths...)
		}
		x.Examples = x.Examples[:min(toldExamples, len(x.Examples))]
		event.Findings = append(event.Findings, x)
		fmt.Fprintf(&text, "\n%s %s: %s\n", strings.ToUpper(string(f.Severity)), f.ID, f.Cause)
		for _, p := range x.Examples {
			fmt.Fprintf(&text, "  %s\n", shown(p))
		}
		if more := len(f.Members) - len(x.Examples); more > 0 {
			fmt.Fprintf(&text, "  … and %d more\n", more)
		}
		fmt.Fprintf(&text, "  fix: %s\n", f.Fix)
	}
	if event.More > 0 {
		fmt.Fprintf(&text, "\n… and %d more findings, in the report\n", event.More)
	}
	name := r.Artefact.Name
	if !slices.Contains([]string{"", name}, r.Artefact.Package) {
		name = r.Artefact.Package + " " + r.Artefact.Version
	}
	return &notify.Message{
		Type: "ringwall.csv." + kind, Source: "urn:ringwall:csv", Subject: subject, Fingerprint: r.Fingerprint(),
		Title: "CSV: " + filepath.Base(name) + ": " + r.Sentence(), Text: printable(text.String()), Data: event,
	}
}
