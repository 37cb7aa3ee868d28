package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ringwall/internal/agent"
	"ringwall/internal/codesign"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
)

// explanation is what a policy says of one file or digest.
type explanation struct {
	Path     string       `json:"path,omitempty"`
	SHA256   string       `json:"sha256"`
	FSVerity string       `json:"fsverity,omitempty"`
	Verdicts []verdict    `json:"verdicts"`
	Origins  []originJSON `json:"origins"`
	Vouched  []string     `json:"vouched_by,omitempty"` // in the agent's words
}

// answer is a verdict with who vouches for the content.
type answer struct {
	verdict
	origins []originJSON
	vouched []string
}

// asker asks a policy about one content as one kind.
type asker func(integrity.Digest, integrity.Kind) (answer, error)

// originJSON is who vouches for a content.
type originJSON struct {
	Release  string   `json:"release,omitempty"`
	Product  string   `json:"product,omitempty"`
	Epoch    uint32   `json:"epoch,omitempty"`
	Identity string   `json:"identity,omitempty"`
	Archive  string   `json:"archive,omitempty"`
	Package  string   `json:"package,omitempty"`
	Version  string   `json:"version"`
	Kinds    string   `json:"kinds"`
	Names    []string `json:"names"`
}

func newPolicyExplainCommand(e *env) *cobra.Command {
	var q whatIf
	var kind, runDir string
	c := &cobra.Command{
		Use:   "explain PATH|DIGEST [--policy FILE]",
		Short: "Say whether something would run, by which rule, and why",
		Long: `Hashes the file and asks the policy, for each kind of code that the file is; or
asks for a bare SHA-256. Releases and packages that the policy's rules rely on
are given with --release and --package. Without --policy it asks the agent on
this host, which knows what is in force here.

Exit code 0 means that the policy allows it as every kind asked; 1 that it does
not, even if its mode is audit and the file would run.

JSON: {"path", "sha256", "fsverity", "verdicts": [{"kind", "digest", "allow",
"mode", "effect": "runs|blocked|logged|unchecked", "rule", "indicator": {"type",
"value"}, "reason", "roles", "interpreter"}], "origins": [{"release", "product",
"epoch", "identity", "archive", "package", "version", "kinds", "names"}],
"vouched_by"}; origins are known with --policy, vouched_by from an agent.`,
		Example: `  ringwall policy explain /usr/bin/ls
  ringwall policy explain /opt/edged/bin/edged --policy base.yaml --release releases
  ringwall policy explain /usr/bin/python3 --policy base.yaml --package /var/cache/apt/archives --kind exec
  ringwall policy explain sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 --policy base.yaml`,
		Args: exactly("PATH"),
		RunE: func(c *cobra.Command, args []string) error {
			var only integrity.KindSet
			if kind != "" {
				k, err := integrity.ParseKind(kind)
				if err != nil {
					return usage(fmt.Errorf("--kind: %w", err))
				}
				only = integrity.SetOf(k)
			}
			ask, err := q.asker(c.Context(), e, runDir)
			if err != nil {
				return err
			}
			out, err := explain(ask, args[0], only)
			if err != nil {
				return err
			}
			if err := e.emit(out, out.write); err != nil {
				return err
			}
			for _, v := range out.Verdicts {
				if !v.Allow {
					return fmt.Errorf("%s is not allowed as %s: %w", args[0], v.Kind, errs.Denied)
				}
			}
			return nil
		},
	}
	q.flags(c)
	c.Flags().StringVar(&runDir, "run", agent.DefaultRunDir, "the agent's run `DIR`")
	c.Flags().StringVar(&kind, "kind", "", "ask for this `KIND` of use only, instead of what the file is")
	complete(c, "kind", kindNames()...)
	return c
}

func kindNames() []string {
	var out []string
	for _, k := range integrity.Kinds() {
		out = append(out, k.String())
	}
	return out
}

// verdict is what a policy says of one content as one kind.
type verdict struct {
	Kind        string        `json:"kind"`
	Digest      string        `json:"digest"` // sha256:…, fsverity:… or dmverity:…
	Allow       bool          `json:"allow"`
	Mode        string        `json:"mode"`
	Effect      string        `json:"effect"`
	Rule        string        `json:"rule"`
	Indicator   indicatorJSON `json:"indicator"`
	Reason      string        `json:"reason"`
	Roles       []string      `json:"roles"`
	Interpreter string        `json:"interpreter"`
}

type indicatorJSON struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// judge asks the policy.
func judge(c *integrity.Compiled, key integrity.Key, k integrity.Kind, now time.Time) (verdict, integrity.Object) {
	o := c.Object(k, key)
	v := c.Evaluate(&o, now)
	out := verdict{
		Kind: k.String(), Digest: key.String(), Allow: v.Allow, Mode: v.Mode.String(), Effect: effect(v.Allow, v.Mode.String()), Rule: v.Rule,
		Indicator: indicatorJSON{v.Indicator.Type, v.Indicator.Value}, Reason: v.Reason, Roles: roleNames(v.Roles), Interpreter: v.Interpreter,
	}
	return out, o
}

func roleNames(r integrity.Role) []string {
	if r == 0 {
		return []string{}
	}
	return splitWords(r.String())
}

// asker asks the policy that is named, or the agent when none is.
func (q *whatIf) asker(ctx context.Context, e *env, runDir string) (asker, error) {
	if q.policy == "" {
		if len(q.releases)+len(q.packages)+len(q.supplements) > 0 || q.at != "" || q.archive != "" {
			return nil, usage(errors.New("--release, --package, --archive, --supplement and --at need --policy"))
		}
		return askAgent(ctx, agent.NewClient(runDir)), nil
	}
	c, now, err := q.load(ctx, e)
	if err != nil {
		return nil, err
	}
	return func(d integrity.Digest, k integrity.Kind) (answer, error) {
		v, o := judge(c, integrity.Key{Digest: d}, k, now)
		return answer{verdict: v, origins: originsOf(&o)}, nil
	}, nil
}

func askAgent(ctx context.Context, client *agent.Client) asker {
	return func(d integrity.Digest, k integrity.Kind) (answer, error) {
		var got agent.ExplainAnswer
		err := client.Call(ctx, "explain", agent.ExplainRequest{Kind: k.String(), Digest: d.String()}, &got)
		if err != nil {
			if noAgent(err) {
				err = hint(err, "ask a policy instead: --policy FILE")
			}
			return answer{}, err
		}
		out := answer{vouched: got.Vouched, verdict: verdict{
			Kind: k.String(), Digest: integrity.Key{Digest: d}.String(), Allow: got.Allow, Mode: got.Mode,
			Effect: effect(got.Allow, got.Mode), Rule: got.Rule, Reason: got.Reason, Roles: []string{},
		}}
		out.Indicator.Type, out.Indicator.Value, _ = strings.Cut(got.Indicator, " ")
		return out, nil
	}
}

// effect is what a verdict comes to.
func effect(allow bool, mode string) string {
	switch {
	case allow:
		return "runs"
	case mode == integrity.ModeEnforce.String():
		return "blocked"
	case mode == integrity.ModeAudit.String():
		return "logged"
	}
	return "unchecked"
}

// explain asks about a file, or about a digest when no file is called that.
func explain(ask asker, what string, only integrity.KindSet) (*explanation, error) {
	out := &explanation{Path: what, Verdicts: []verdict{}, Origins: []originJSON{}}
	d, notDigest := integrity.ParseDigest(what)
	if _, err := os.Stat(what); err != nil && notDigest == nil {
		out.Path, out.SHA256 = "", d.String()
		if only == 0 {
			only = integrity.Unclassified
		}
		return out, out.ask(ask, d, only)
	}
	contents, err := measure(oneFile{what}, codesign.Options{AllFiles: true})
	if err != nil {
		return nil, err
	}
	for _, m := range contents { // more than one: a compressed module, and what is inside
		if m.Flags&codesign.FlagInner == 0 {
			out.SHA256, out.FSVerity = m.Digest.String(), m.Verity.String()
		}
		kinds := m.Kinds
		if only != 0 {
			kinds = only
		} else if m.Flags&codesign.FlagData != 0 {
			kinds = integrity.Unclassified // it says nothing of itself
		}
		if err := out.ask(ask, m.Digest, kinds); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (x *explanation) ask(ask asker, d integrity.Digest, kinds integrity.KindSet) error {
	var last answer
	for _, k := range integrity.Kinds() {
		if !kinds.Has(k) {
			continue
		}
		var err error
		if last, err = ask(d, k); err != nil {
			return err
		}
		x.Verdicts = append(x.Verdicts, last.verdict)
	}
	x.Origins, x.Vouched = append(x.Origins, last.origins...), append(x.Vouched, last.vouched...)
	return nil
}

func originsOf(o *integrity.Object) []originJSON {
	var out []originJSON
	for _, m := range o.Memberships {
		j := originJSON{
			Product: m.Origin.Product, Epoch: m.Origin.Epoch, Identity: m.Origin.Identity,
			Archive: m.Origin.Archive, Package: m.Origin.Package, Version: m.Origin.Version, Kinds: m.Kinds.String(), Names: m.Names,
		}
		if !m.Origin.Release.IsZero() {
			j.Release = m.Origin.Release.String()
		}
		out = append(out, j)
	}
	return out
}

func (x *explanation) write(w io.Writer) {
	if x.Path != "" {
		fmt.Fprintln(w, shown(x.Path))
	}
	fmt.Fprintf(w, "sha256 %s\n", x.SHA256)
	for _, v := range x.Verdicts {
		word := "ALLOW"
		if !v.Allow {
			word = "DENY"
		}
		fmt.Fprintf(w, "%-5s as %s (mode %s: %s): %s\n", word, v.Kind, v.Mode, v.Effect, v.Reason)
		if v.Digest != "sha256:"+x.SHA256 {
			fmt.Fprintf(w, "      what is inside: %s\n", v.Digest)
		}
		if v.Rule != "" {
			fmt.Fprintf(w, "      rule %s", shown(v.Rule))
			if v.Indicator.Type != "" {
				fmt.Fprintf(w, ", by %s %s", v.Indicator.Type, v.Indicator.Value)
			}
			fmt.Fprintln(w)
		}
		if len(v.Roles) > 0 {
			fmt.Fprintf(w, "      may: %s\n", strings.Join(v.Roles, ", "))
		}
		if v.Interpreter != "" {
			fmt.Fprintf(w, "      interpreter rule %s\n", shown(v.Interpreter))
		}
	}
	for _, o := range x.Origins {
		if o.Package != "" {
			fmt.Fprintf(w, "listed by package %s %s of %s", o.Package, o.Version, o.Archive)
		} else {
			fmt.Fprintf(w, "listed by release %s %s, epoch %d, signed by %s", o.Product, o.Version, o.Epoch, o.Identity)
		}
		fmt.Fprintf(w, " as %s", o.Kinds)
		for _, n := range o.Names {
			fmt.Fprintf(w, " %s", shown(n))
		}
		fmt.Fprintln(w)
	}
	for _, v := range x.Vouched {
		fmt.Fprintf(w, "vouched for by %s\n", v)
	}
}
