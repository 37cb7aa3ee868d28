package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/integrity"
	"ringwall/internal/pki"
)

// shownPolicy is a policy as hosts see it: with its baseline and supplements.
type shownPolicy struct {
	Name         string             `json:"name"`
	Epoch        uint64             `json:"epoch"`
	Supplements  string             `json:"supplements,omitempty"`
	SHA256       string             `json:"sha256"`
	Modes        map[string]string  `json:"modes"`
	Trust        shownTrust         `json:"trust"`
	Allow        []shownRule        `json:"allow"`
	Deny         []shownRule        `json:"deny"`
	Programs     []shownProgram     `json:"programs"`
	Interpreters []shownInterpreter `json:"interpreters"`
	Knobs        []shownKnob        `json:"knobs"`
}

type shownTrust struct {
	Authorities []shownAnchor `json:"authorities"`
	Timestamps  []shownAnchor `json:"timestamps"`
	Archives    []string      `json:"archives"`
}

type shownAnchor struct {
	Name        string    `json:"name"`
	Signs       []string  `json:"signs,omitempty"`
	Fingerprint string    `json:"fingerprint"`
	NotAfter    time.Time `json:"not_after"`
}

// shownRule is a rule in words: one for each indicator.
type shownRule struct {
	Rule   string     `json:"rule"`
	What   []string   `json:"what"`
	Kinds  string     `json:"kinds,omitempty"`
	Until  *time.Time `json:"until,omitempty"`
	Reason string     `json:"reason,omitempty"`
}

type shownProgram struct {
	Rule  string   `json:"rule"`
	Match string   `json:"match"`
	May   []string `json:"may"`
}

type shownInterpreter struct {
	Name   string   `json:"name"`
	Match  []string `json:"match"`
	Reads  string   `json:"reads"`
	Inline string   `json:"inline"`
	Stdin  []string `json:"stdin"`
}

type shownKnob struct {
	Name  string `json:"name"`
	Want  string `json:"want"`
	Rule  string `json:"rule"`
	Boot  bool   `json:"boot"`
	Apply bool   `json:"apply"`
}

func newPolicyShowCommand(e *env) *cobra.Command {
	var supplements []string
	c := &cobra.Command{
		Use:   "show FILE",
		Short: "Show what a policy comes to, with its baseline",
		Long: `Shows a policy as hosts use it: modes of every kind, whom it trusts, every rule,
and the interpreters, programs and kernel settings that its baseline brings.

JSON: {"name", "epoch", "supplements", "sha256", "modes": {KIND: MODE}, "trust":
{"authorities", "timestamps", "archives"}, "allow": [{"rule", "what", "kinds",
"until", "reason"}], "deny", "programs": [{"rule", "match", "may"}],
"interpreters": [{"name", "match", "reads", "inline", "stdin"}], "knobs":
[{"name", "want", "rule", "boot", "apply"}]}`,
		Example: "  ringwall policy show base.yaml\n  ringwall policy show base.yaml --supplement extra.yaml",
		Args:    exactly("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := loadPolicy(args[0])
			if err != nil {
				return err
			}
			if p, err = joinFiles(p, supplements); err != nil {
				return err
			}
			s := showPolicy(p)
			return e.emit(s, s.write)
		},
	}
	c.Flags().StringArrayVar(&supplements, "supplement", nil, "add a supplemental policy's YAML `FILE`; repeat")
	return c
}

// joinFiles adds supplemental policies to one.
func joinFiles(base *integrity.Policy, files []string) (*integrity.Policy, error) {
	if len(files) == 0 {
		return base, nil
	}
	var supplements []*integrity.Policy
	for _, f := range files {
		s, err := loadPolicy(f)
		if err != nil {
			return nil, err
		}
		supplements = append(supplements, s)
	}
	return integrity.Join(base, supplements...)
}

func showPolicy(p *integrity.Policy) *shownPolicy {
	s := &shownPolicy{
		Name: p.Name, Epoch: p.Epoch, Supplements: p.Supplements, SHA256: p.Digest.String(), Modes: map[string]string{
			"memory": p.Process.Memory.String(), "ptrace": p.Process.Ptrace.String(),
			"block_writes": p.Process.BlockWrites.String(), "code_writes": p.Process.CodeWrites.String(),
		},
		Trust: shownTrust{Authorities: []shownAnchor{}, Timestamps: []shownAnchor{}, Archives: []string{}},
		Allow: []shownRule{}, Deny: []shownRule{}, Programs: []shownProgram{}, Interpreters: []shownInterpreter{}, Knobs: []shownKnob{},
	}
	for _, k := range integrity.Kinds() {
		s.Modes[k.String()] = p.Modes[k].String()
	}
	for _, a := range p.Trust.Authorities {
		s.Trust.Authorities = append(s.Trust.Authorities, shownAnchor{a.Name, a.Signs, fmt.Sprintf("%x", pki.Fingerprint(a.Certificate)), a.Certificate.NotAfter})
	}
	for _, a := range p.Trust.Timestamps {
		s.Trust.Timestamps = append(s.Trust.Timestamps, shownAnchor{a.Name, nil, fmt.Sprintf("%x", pki.Fingerprint(a.Certificate)), a.Certificate.NotAfter})
	}
	for _, a := range p.Trust.Archives {
		s.Trust.Archives = append(s.Trust.Archives, a.Name)
	}
	for i := range p.Allow {
		s.Allow = append(s.Allow, showAllow(&p.Allow[i]))
	}
	for i := range p.Deny {
		s.Deny = append(s.Deny, showDeny(&p.Deny[i]))
	}
	for _, r := range p.Programs {
		s.Programs = append(s.Programs, shownProgram{r.Rule, showMatch(&r.Match), roleNames(r.May)})
	}
	for _, r := range p.Interpreters {
		x := shownInterpreter{Name: r.Name, Match: []string{}, Reads: readsName(r.Reads), Inline: inlineName(r.Inline), Stdin: stdinNames(r.Stdin)}
		for i := range r.Match {
			x.Match = append(x.Match, showMatch(&r.Match[i]))
		}
		s.Interpreters = append(s.Interpreters, x)
	}
	for _, k := range p.Knobs {
		s.Knobs = append(s.Knobs, shownKnob{k.Name, k.Want, k.Rule, k.Boot, k.Apply})
	}
	return s
}

func showAllow(r *integrity.AllowRule) shownRule {
	out := shownRule{Rule: r.Rule, What: []string{}, Reason: r.Reason}
	if r.Kinds != 0 {
		out.Kinds = r.Kinds.String()
	}
	if !r.Until.IsZero() {
		out.Until = &r.Until
	}
	if r.Signer != nil {
		out.What = append(out.What, "signed by "+r.Signer.String())
	}
	if r.Package != nil {
		out.What = append(out.What, showPackages(r.Package))
	}
	out.What = append(out.What, showDigests("release", r.Releases)...)
	out.What = append(out.What, showDigests("sha256", r.SHA256)...)
	out.What = append(out.What, showDigests("fsverity", r.FSVerity)...)
	out.What = append(out.What, showDigests("dmverity", r.DMVerity)...)
	return out
}

func showDeny(r *integrity.DenyRule) shownRule {
	out := shownRule{Rule: r.Rule, What: []string{}, Reason: r.Reason}
	out.What = append(out.What, showDigests("sha256", r.SHA256)...)
	out.What = append(out.What, showDigests("release", r.Releases)...)
	for _, c := range r.Certificates {
		what := "signed by certificate " + c.Certificate.String()
		if !c.From.IsZero() {
			what += " from " + c.From.UTC().Format(time.RFC3339) + " on"
		}
		out.What = append(out.What, what)
	}
	for _, o := range r.Products {
		out.What = append(out.What, fmt.Sprintf("releases of %s below epoch %d", o.Product, o.BelowEpoch))
	}
	if r.Package != nil {
		out.What = append(out.What, showPackages(r.Package))
	}
	return out
}

func showPackages(s *integrity.PackageSet) string {
	return "packages " + strings.Join(s.Names, ", ") + " of " + s.Archive
}

func showDigests(what string, ds []integrity.Digest) []string {
	out := make([]string, len(ds))
	for i, d := range ds {
		out[i] = what + " " + d.String()
	}
	return out
}

func showMatch(m *integrity.Match) string {
	var parts []string
	if len(m.Files) > 0 {
		parts = append(parts, strings.Join(m.Files, ", "))
	}
	if m.Package != "" {
		parts = append(parts, "of package "+m.Package)
	}
	if m.Product != "" {
		parts = append(parts, "of product "+m.Product)
	}
	return strings.Join(append(parts, showDigests("sha256", m.SHA256)...), " ")
}

func readsName(r integrity.Reads) string {
	switch r {
	case integrity.ReadsCode:
		return "code"
	case integrity.ReadsStrict:
		return "strict"
	}
	return "any"
}

// inlineName uses the words of the policy: code in arguments is allowed, logged or denied.
func inlineName(m integrity.Mode) string {
	switch m {
	case integrity.ModeAudit:
		return "audit"
	case integrity.ModeEnforce:
		return "deny"
	}
	return "allow"
}

func stdinNames(s integrity.Stdin) []string {
	out := []string{}
	for _, x := range []struct {
		form integrity.Stdin
		name string
	}{
		{integrity.StdinTTY, "tty"},
		{integrity.StdinPipe, "pipe"},
		{integrity.StdinFile, "file"},
		{integrity.StdinSocket, "socket"},
		{integrity.StdinNull, "null"},
	} {
		if s&x.form != 0 {
			out = append(out, x.name)
		}
	}
	return out
}

func (s *shownPolicy) write(w io.Writer) {
	fmt.Fprintf(w, "policy %s, epoch %d, sha256 %s\n", s.Name, s.Epoch, s.SHA256)
	if s.Supplements != "" {
		fmt.Fprintf(w, "adds to %s\n", s.Supplements)
	}
	byMode := map[string][]string{}
	for _, k := range slices.Sorted(maps.Keys(s.Modes)) {
		byMode[s.Modes[k]] = append(byMode[s.Modes[k]], k)
	}
	for _, m := range []string{"enforce", "audit", "off"} {
		if len(byMode[m]) > 0 && s.Supplements == "" {
			fmt.Fprintf(w, "%s: %s\n", m, strings.Join(byMode[m], ", "))
		}
	}
	for _, a := range s.Trust.Authorities {
		fmt.Fprintf(w, "trusts %s to sign %s, until %s\n", a.Name, strings.Join(a.Signs, ", "), a.NotAfter.Format(time.DateOnly))
	}
	for _, a := range s.Trust.Timestamps {
		fmt.Fprintf(w, "trusts %s to say when, until %s\n", a.Name, a.NotAfter.Format(time.DateOnly))
	}
	for _, a := range s.Trust.Archives {
		fmt.Fprintf(w, "trusts archive %s\n", a)
	}
	rules := func(word string, rs []shownRule) {
		for _, r := range rs {
			fmt.Fprintf(w, "%s %s", word, r.Rule)
			if r.Kinds != "" {
				fmt.Fprintf(w, " as %s", r.Kinds)
			}
			if r.Until != nil {
				fmt.Fprintf(w, " until %s", r.Until.UTC().Format(time.RFC3339))
			}
			if r.Reason != "" {
				fmt.Fprintf(w, " (%s)", r.Reason)
			}
			fmt.Fprintln(w)
			for _, what := range r.What {
				fmt.Fprintf(w, "  %s\n", what)
			}
		}
	}
	rules("allow", s.Allow)
	rules("deny", s.Deny)
	for _, p := range s.Programs {
		fmt.Fprintf(w, "program %s may %s: %s\n", p.Rule, strings.Join(p.May, ", "), p.Match)
	}
	for _, i := range s.Interpreters {
		fmt.Fprintf(w, "interpreter %s reads %s, inline %s, stdin %s: %s\n",
			i.Name, i.Reads, i.Inline, strings.Join(i.Stdin, " "), strings.Join(i.Match, "; "))
	}
	for _, k := range s.Knobs {
		verb := "report"
		if k.Apply {
			verb = "set"
		}
		fmt.Fprintf(w, "%s %s %s %s\n", verb, k.Name, k.Rule, k.Want)
	}
}
