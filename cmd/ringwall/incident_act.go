package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"ringwall/internal/codesign"
	"ringwall/internal/control/rollouts"
	"ringwall/internal/errs"
	"ringwall/internal/integrity"
	"ringwall/internal/resource"
)

// incidentChange is a change of policy that answers an incident: what was
// blocked may run for a while, or may not run any more. It is signed here, with
// the policy's key, and goes through the rings like every other.
type incidentChange struct {
	bundleOptions
	bundle    string
	reason    string
	lasts     time.Duration
	emergency bool
	digests   []string
}

func (o *incidentChange) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.bundle, "bundle", "", "`DIR` of the bundle that hosts have now")
	f.StringVar(&o.out, "out", "", "write the new bundle to this new `DIR`")
	f.StringVar(&o.keys, "keys", "", "the authority's `DIR`, with the keys policy-ca and tsa")
	passphraseFlag(c, &o.passphraseFile)
	f.StringVar(&o.identity, "identity", "", "who signs, as a `URI`")
	f.StringVar(&o.log, "log", "", "append the signatures to the transparency log in `DIR`")
	f.StringVar(&o.tsa, "tsa", "", "timestamp authority's `URL` (default: the authority's own)")
	f.StringVar(&o.reason, "reason", "", "`WHY`, for people and in the policy")
	f.StringArrayVar(&o.digests, "sha256", nil, "only this `DIGEST` of the incident; repeat (default: all of them)")
	f.BoolVar(&o.emergency, "emergency", false, "leave rings and bake out; two people must approve")
	require(c, "bundle", "out", "keys", "reason")
}

const changeHelp = `

The policy of the bundle that hosts have (--bundle) gets one entry more, is signed
with the next epoch, with the way back, and is pushed. A rollout of the incident's
name is started below the incident's scope; nothing moves before somebody else has
approved it.

JSON: as ringwall rollout plan`

func newIncidentAuthoriseCommand(e *env) *cobra.Command {
	var o incidentChange
	c := &cobra.Command{
		Use:   "authorise INCIDENT --for TIME --bundle DIR --keys DIR --out DIR --reason WHY",
		Short: "Let what was blocked run, for some hours",
		Long:  "Makes a time-boxed exception for the contents of an incident." + changeHelp,
		Example: `  ringwall incident authorise inc-20310501-k3f9ab --for 4h --reason "ticket 4711" --bundle b12 --keys keys --out b14
  ringwall rollout approve …    as somebody else`,
		Args: exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error {
			if o.lasts < time.Minute || o.lasts > 30*24*time.Hour {
				return usage(fmt.Errorf("--for %v: from a minute to 30 days", o.lasts))
			}
			return o.run(c.Context(), e, args[0], "exceptions", func(name string, digests, kinds []string) map[string]any {
				return map[string]any{
					"rule": name, "sha256": digests, "kinds": kinds, "reason": o.reason, "until": e.now().Add(o.lasts).UTC().Truncate(time.Second).Format(time.RFC3339),
				}
			})
		},
	}
	o.flags(c)
	c.Flags().DurationVar(&o.lasts, "for", 4*time.Hour, "how `LONG`")
	return c
}

func newIncidentDenyCommand(e *env) *cobra.Command {
	var o incidentChange
	c := &cobra.Command{
		Use:   "deny INCIDENT --bundle DIR --keys DIR --out DIR --reason WHY",
		Short: "Refuse the contents of an incident from now on, whoever vouches for them",
		Long: "Raises a deny rule: deny beats allow. For what ran although it should not, and for\n" +
			"what is blocked here and must not be allowed elsewhere." + changeHelp,
		Example: `  ringwall incident deny inc-20310501-k3f9ab --reason "a stolen build" --bundle b12 --keys keys --out b14 --emergency`,
		Args:    exactly("INCIDENT"),
		RunE: func(c *cobra.Command, args []string) error {
			return o.run(c.Context(), e, args[0], "deny", func(name string, digests, _ []string) map[string]any {
				return map[string]any{"rule": name, "sha256": digests, "reason": o.reason}
			})
		},
	}
	o.flags(c)
	return c
}

// contents are the digests and kinds of an incident that are asked for.
func (o *incidentChange) contents(d *incidentDoc) (digests, kinds []string, err error) {
	for _, want := range o.digests {
		if _, err := integrity.ParseDigest(want); err != nil {
			return nil, nil, usage(err)
		}
	}
	for k := range d.Incident.Alerts {
		a := &d.Incident.Alerts[k].Sample
		b, err := hex.DecodeString(a.SHA256)
		if err != nil || len(b) != len(integrity.Digest{}) || len(o.digests) > 0 && !slices.Contains(o.digests, a.SHA256) {
			continue
		}
		if !slices.Contains(digests, a.SHA256) {
			digests = append(digests, a.SHA256)
		}
		if !slices.Contains(kinds, a.Kind) {
			kinds = append(kinds, a.Kind)
		}
	}
	if len(digests) == 0 {
		return nil, nil, fmt.Errorf("incident %s is about no content of that digest: %w", d.Incident.ID, errs.NotFound)
	}
	return digests, kinds, nil
}

func (o *incidentChange) run(ctx context.Context, e *env, incident, section string, entry func(name string, digests, kinds []string) map[string]any) error {
	client, err := connect(e)
	if err != nil {
		return err
	}
	d, err := findIncident(ctx, client, incident)
	if err != nil {
		return err
	}
	digests, kinds, err := o.contents(d)
	if err != nil {
		return err
	}
	id, err := resource.ParseID(d.ID)
	if err != nil {
		return err
	}
	made, err := o.makeChanged(e, section, entry(d.Incident.ID, digests, kinds)) //nolint:contextcheck // keys and the log are files
	if err != nil {
		return err
	}
	p := &pusher{e: e, client: client, dir: o.out, Manifests: []resource.ID{}}
	if err := p.push(ctx); err != nil {
		return err
	}
	spec := &rollouts.Spec{Manifest: made.Manifest, Rollback: &made.Rollback.Manifest, Reason: fmt.Sprintf("incident %s: %s", d.Incident.ID, o.reason)}
	if o.emergency {
		spec.Emergency = &rollouts.Emergency{Reason: spec.Reason, Until: e.now().Add(4 * time.Hour).UTC().Truncate(time.Second)}
	}
	e.notef("epoch %d in %s is pushed; it needs the approval of somebody else:\n  ringwall rollout approve %s/%s", made.Epoch, shown(o.out), rolloutCollection(id.Parent().String()), d.Incident.ID)
	return startRollout(ctx, e, id.Parent().String(), d.Incident.ID, spec)
}

// makeChanged makes a bundle of the one that hosts have, with one entry more in
// a section of its policy.
func (o *incidentChange) makeChanged(e *env, section string, entry map[string]any) (*madeBundle, error) {
	before, err := openBundle(o.bundle)
	if err != nil {
		return nil, err
	}
	text, err := before.policy(nil)
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", o.bundle, err)
	}
	if text, err = withEntry(text, section, entry); err != nil {
		return nil, fmt.Errorf("bundle %s: %w", o.bundle, err)
	}
	if text, err = withEpoch(text, before.manifest.Epoch+2); err != nil {
		return nil, fmt.Errorf("bundle %s: %w", o.bundle, err)
	}
	scope, err := resource.ParseID(before.manifest.Scope)
	if err != nil {
		return nil, err
	}
	if exists(o.out) {
		return nil, hint(fmt.Errorf("%s is there already: %w", o.out, errs.Conflict), "a bundle is made anew, and never changed")
	}
	o.previous, o.life = o.bundle, before.manifest.NotAfter.Sub(before.manifest.NotBefore)
	return o.makeOf(e, filepath.Join(o.out, "policy.yaml"), text, scope, e.now().UTC().Truncate(time.Second),
		func(_ *integrity.Policy, b *bundleWriter) ([]codesign.Item, error) { return before.items(b) })
}

// withEntry is a policy's text with one entry more in a section, which is made
// if need be. What stands there already, and what it says in comments, stays.
func withEntry(policy []byte, section string, entry map[string]any) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(policy, &doc); err != nil {
		return nil, fmt.Errorf("policy: %w: %w", err, errs.Invalid)
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, fmt.Errorf("policy: it is no mapping: %w", errs.Invalid)
	}
	var node yaml.Node
	if err := node.Encode([]any{entry}); err != nil {
		return nil, err
	}
	top := doc.Content[0]
	at := -1
	for i := 0; i+1 < len(top.Content); i += 2 {
		if top.Content[i].Value == section {
			at = i + 1
		}
	}
	switch {
	case at < 0:
		top.Content = append(top.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: section}, &node)
	case top.Content[at].Kind == yaml.SequenceNode:
		top.Content[at].Content = append(top.Content[at].Content, node.Content...)
	default:
		return nil, fmt.Errorf("policy: %s is no list: %w", section, errs.Invalid)
	}
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, err
	}
	return out.Bytes(), enc.Close()
}
